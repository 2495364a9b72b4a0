"""Charts of checkpoints as SVG in the page: they take its text colour, so dark mode suits them.

Words stand around a chart as HTML, its numbers in a table below it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from io import StringIO
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from rlhf_kit.plots import COLOURS, GRID, INK, MARKERS, style

SIGNS = {"o": "●", "s": "■", "^": "▲"}
"""What a legend shows for a marker."""

Points = Sequence[tuple[float, float, float] | None]
"""(value, low, high) a checkpoint; None where it is not known."""


def chart(
    title: str,
    names: Sequence[str],
    series: Mapping[str, Points],
    *,
    line: float | None = None,
) -> str:
    """Dots with intervals, one place a checkpoint; "" where no series has a point.

    line: a level to compare with, dashed (a win rate of one half).
    """
    series = {label: points for label, points in series.items() if any(points)}
    if not series:
        return ""
    keys = "".join(
        f'<li><span aria-hidden="true" style="color:{color}">{SIGNS[marker]}</span> '
        f"{escape(label)}</li>"
        for label, color, marker in zip(series, COLOURS, MARKERS, strict=False)
    )
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<ul class="legend">{keys}</ul>{drawing(title, names, series, line)}</figure>'
    )


def drawing(
    title: str, names: Sequence[str], series: Mapping[str, Points], line: float | None
) -> str:
    settings: Any = {**style(), "svg.fonttype": "none", "svg.hashsalt": title}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.6, 2.7))
        ax = figure.subplots()
        spread = 0.12
        for place, (points, color, marker) in enumerate(
            zip(series.values(), COLOURS, MARKERS, strict=False)
        ):
            shift = spread * (place - (len(series) - 1) / 2)
            known = [(x + shift, *point) for x, point in enumerate(points) if point is not None]
            xs, ys, lows, highs = (list(column) for column in zip(*known, strict=True))
            below = [max(y - low, 0.0) for y, low in zip(ys, lows, strict=True)]
            above = [max(high - y, 0.0) for y, high in zip(ys, highs, strict=True)]
            ax.errorbar(xs, ys, [below, above], fmt=marker, color=color, capsize=3, markersize=6)
        if line is not None:
            ax.axhline(line, color=INK, linestyle="--", linewidth=1)
        ax.set_xticks(range(len(names)), names, rotation=45 if len(names) > 6 else 0)
        ax.set_xlim(-0.5, len(names) - 0.5)
        ax.margins(y=0.15)
        text = StringIO()
        figure.savefig(text, format="svg", transparent=True)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(GRID, "var(--grid)")
    # The page's own width; matplotlib's size stays as the shape.
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
