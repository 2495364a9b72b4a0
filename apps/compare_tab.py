"""The Compare tab: two answers side by side. What its buttons do is in compare_actions.py."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from apps.markup import pane_title
from apps.page import Page, Settings, choices, settings_panel

VERDICTS = ("a", "b", "tie", "both_bad")


@dataclass(frozen=True)
class Pane:
    """One side."""

    title: gr.HTML
    answer: gr.HTML
    line: gr.HTML
    scores: gr.HTML


@dataclass(frozen=True)
class CompareTab:
    """The components of the tab."""

    first: gr.Dropdown
    second: gr.Dropdown
    blind: gr.Checkbox
    context: gr.Checkbox
    colours: gr.Checkbox
    message: gr.Textbox
    send: gr.Button
    stop: gr.Button
    another: gr.Button
    status: gr.HTML
    panes: tuple[Pane, Pane]
    votes: dict[str, gr.Button]
    verdict: gr.HTML
    tally: gr.HTML
    settings: Settings
    link: gr.Textbox
    copy: gr.Button
    pair: gr.State
    """The comparison on show: its id, its prompt, its last events, whether it is blind."""
    voted: gr.State
    """What the vote on it said; None before."""


def build(page: Page) -> CompareTab:
    labels = page.labels
    language = labels.language
    offered = choices(language, page.bench.checkpoints.list())
    one, other = page.bench.checkpoints.default_pair()
    pair, voted = gr.State(None), gr.State(None)
    with gr.Row(elem_classes="bar"):
        first = labels(gr.Dropdown(offered, value=one.id, min_width=160), label="model_a")
        second = labels(gr.Dropdown(offered, value=other.id, min_width=160), label="model_b")
    with gr.Row(elem_classes="switches"):
        blind = labels(gr.Checkbox(True, elem_id="blind", min_width=220), label="blind")
        context = labels(gr.Checkbox(False, min_width=220), label="context")
        colours = labels(gr.Checkbox(False, elem_id="colours", min_width=220), label="colours")
    message = labels(
        gr.Textbox(
            lines=1,
            max_lines=10,
            max_length=page.bench.limits.message_characters,
            elem_id="question",
        ),
        label="question",
        placeholder="message_hint",
    )
    with gr.Row(elem_classes="buttons"):
        send = labels(gr.Button(variant="primary", min_width=90), value="ask_both")
        stop = labels(
            gr.Button(variant="stop", interactive=False, min_width=90, elem_id="stop-both"),
            value="stop",
        )
        another = labels(gr.Button(min_width=90, elem_id="another"), value="another")
    status = _html("compare-status")
    with gr.Row(elem_id="panes"):
        panes = (_pane(language, "a"), _pane(language, "b"))
    with gr.Column(elem_id="vote-bar"):
        labels(
            gr.HTML(elem_id="votes-label", apply_default_css=False, js_on_load=None), value="votes"
        )
        with gr.Row(elem_classes="votes", elem_id="votes"):
            votes = {
                verdict: labels(
                    gr.Button(interactive=False, min_width=60, elem_id=f"vote-{verdict}"),
                    value=f"vote_{verdict}",
                )
                for verdict in VERDICTS
            }
    verdict = _html("verdict")
    tally = _html("tally")
    with gr.Row(elem_classes="columns"):
        with labels(gr.Accordion(open=False), label="settings"):
            settings = settings_panel(page)
        with labels(gr.Accordion(open=False), label="shortcuts"):
            labels(gr.Checkbox(True, interactive=True, elem_id="shortcuts"), label="shortcuts_on")
            labels(gr.HTML(apply_default_css=False, js_on_load=None), value="shortcuts_text")
        with labels(gr.Accordion(open=False), label="link"):
            link = labels(gr.Textbox(interactive=False, elem_id="link"), label="link")
            copy = labels(gr.Button(), value="copy_link")
    return CompareTab(
        first=first,
        second=second,
        blind=blind,
        context=context,
        colours=colours,
        message=message,
        send=send,
        stop=stop,
        another=another,
        status=status,
        panes=panes,
        votes=votes,
        verdict=verdict,
        tally=tally,
        settings=settings,
        link=link,
        copy=copy,
        pair=pair,
        voted=voted,
    )


def _pane(language: str, side: str) -> Pane:
    with gr.Column(min_width=300, elem_classes="pane", elem_id=f"pane-{side}"):
        return Pane(
            title=_html(f"head-{side}", pane_title(language, side, "")),
            answer=_html(f"answer-{side}"),
            line=_html(f"line-{side}"),
            scores=_html(f"scores-{side}"),
        )


def _html(name: str, value: str = "") -> gr.HTML:
    return gr.HTML(value, elem_id=name, apply_default_css=False, js_on_load=None)
