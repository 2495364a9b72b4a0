"""The Progress tab: the run's checkpoints in charts and tables."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from apps.charts import Points, chart
from apps.markup import status, table
from apps.page import QUIET, STREAM, Page, sentence, session_of
from apps.progress import Distance, Interval, Row
from apps.text import say

PROMPTS = 8
"""Held-out prompts of a measurement on request."""

Update = dict[Any, Any]


@dataclass(frozen=True)
class ProgressTab:
    """The components of the tab."""

    read: gr.Button
    measure: gr.Button
    stop: gr.Button
    status: gr.HTML
    charts: gr.HTML


def build(page: Page) -> ProgressTab:
    labels = page.labels
    labels(gr.HTML(apply_default_css=False, js_on_load=None), value="progress_intro")
    with gr.Row(elem_classes="buttons"):
        read = labels(gr.Button(min_width=120, elem_id="read"), value="read")
        measure = labels(gr.Button(min_width=120, elem_id="measure"), value="measure")
        stop = labels(
            gr.Button(variant="stop", interactive=False, min_width=90, elem_id="measure-stop"),
            value="stop",
        )
    line = gr.HTML("", elem_id="progress-status", apply_default_css=False, js_on_load=None)
    charts = gr.HTML("", elem_id="charts", apply_default_css=False, js_on_load=None)
    return ProgressTab(read=read, measure=measure, stop=stop, status=line, charts=charts)


class ProgressActions:
    """Handlers of the tab."""

    def __init__(self, page: Page, tab: ProgressTab) -> None:
        self.page, self.tab, self.bench = page, tab, page.bench

    def read(self, language: str) -> Update:
        """All numbers that are there, drawn."""
        try:
            rows, distances = self.bench.progress.rows(), self.bench.progress.distances()
        except (ValueError, OSError) as error:
            return {self.tab.status: status(sentence(language, error), "error")}
        return {self.tab.charts: overview(language, rows, distances)}

    def measure(self, request: gr.Request, language: str) -> Iterator[Update]:
        """Answer held-out prompts with every checkpoint; slow, and says how far it is."""
        tab = self.tab
        resting = {tab.measure: gr.update(interactive=True), tab.stop: gr.update(interactive=False)}
        yield {
            tab.measure: gr.update(interactive=False),
            tab.stop: gr.update(interactive=True),
            tab.status: status(say(language, "waiting")),
        }
        done, of = 0, 1
        try:
            steps = self.bench.progress.measure(session=session_of(request), prompts=PROMPTS)
            with contextlib.closing(steps):
                for done, of, name in steps:
                    line = say(language, "measuring", name=name, done=done, of=of)
                    yield {tab.status: status(line)}
        except ValueError as error:
            yield {**resting, tab.status: status(sentence(language, error), "error")}
            return
        text = say(language, "measured" if done == of else "stopped")
        yield {**resting, tab.status: status(text), self.page.announcement: text}

    def stop(self, request: gr.Request) -> None:
        self.bench.generation.stop(session_of(request))


# ---- charts and tables


def overview(language: str, rows: Sequence[Row], distances: Sequence[Distance]) -> str:
    names = [row.name if row.step is None else str(row.step) for row in rows]

    def of(values: Sequence[Interval | float | None]) -> Points:
        return [v if v is None or isinstance(v, tuple) else (v, v, v) for v in values]

    charts = [
        chart(
            say(language, "scores_title"),
            names,
            {
                say(language, "gold"): of([row.gold for row in rows]),
                say(language, "proxy"): of([row.proxy for row in rows]),
                say(language, "measured_score"): of([row.measured_score for row in rows]),
            },
        ),
        chart(
            say(language, "kl_title"),
            names,
            {
                say(language, "kl_report"): of([row.kl for row in rows]),
                say(language, "kl_measured"): of([row.measured_kl for row in rows]),
            },
        ),
        chart(
            say(language, "wins_title"),
            names,
            {say(language, "votes_series"): of([row.win_rate for row in rows])},
            line=0.5,
        ),
        chart(
            say(language, "distance_title"),
            names,
            {say(language, "column_relative"): of([row.to_sft_relative for row in rows])},
        ),
    ]
    drawn = "".join(charts) or status(say(language, "nothing"))
    return f'<div class="charts">{drawn}</div>{numbers(language, rows)}{pairs(language, distances)}'


def numbers(language: str, rows: Sequence[Row]) -> str:
    keys = ("gold", "proxy", "kl", "measured", "wins", "votes", "distance")
    return table(
        say(language, "table"),
        [say(language, "checkpoint"), *(say(language, f"column_{key}") for key in keys)],
        [
            [
                row.label,
                interval(language, row.gold),
                interval(language, row.proxy),
                number(row.kl),
                measured(language, row),
                interval(language, row.win_rate),
                str(row.votes),
                number(row.to_sft_relative, 4),
            ]
            for row in rows
        ],
    )


def pairs(language: str, distances: Sequence[Distance]) -> str:
    if not distances:
        return ""
    keys = ("pair", "l2", "relative", "equal")
    return table(
        say(language, "distances"),
        [say(language, f"column_{key}") for key in keys],
        [
            [f"{d.a} – {d.b}", number(d.l2), number(d.relative, 4), f"{d.bf16_equal:.1%}"]
            for d in distances
        ],
    )


def measured(language: str, row: Row) -> str:
    if row.measured_score is None:
        return "–"
    places = {"score": number(row.measured_score), "kl": number(row.measured_kl)}
    return say(language, "measured_cell", **places)


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def interval(language: str, value: Interval | None) -> str:
    if value is None:
        return "–"
    mean, low, high = (number(part) for part in value)
    return say(language, "interval", mean=mean, low=low, high=high)


# ---- wiring


def wire(page: Page, tab: ProgressTab) -> ProgressActions:
    do = ProgressActions(page, tab)
    tab.read.click(do.read, page.language, [tab.charts, tab.status], **QUIET)
    tab.measure.click(
        do.measure,
        page.language,
        [tab.measure, tab.stop, tab.status, page.announcement],
        **STREAM,
    ).then(do.read, page.language, [tab.charts, tab.status], **QUIET)
    tab.stop.click(do.stop, None, None, queue=False, **QUIET)
    return do
