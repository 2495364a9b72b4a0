"""The plots of reports and notebooks, in one style.

Every function returns a matplotlib `Figure`, also saves it where `path` is given (rank 0 alone),
and leaves pyplot's state and backend alone: a notebook shows the figure once, as the value of
its cell, and a headless script keeps no figure alive. Colours are Okabe and Ito's, which
colour-blind readers can tell apart; a second channel (marker, line style) repeats what matters.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any

import matplotlib.figure
import numpy as np
from cycler import cycler

from rlhf_kit import distributed
from rlhf_kit.config import require
from rlhf_kit.metrics import history

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PathLike = str | os.PathLike[str] | None
INK, GRID = "#24292f", "#d8dee4"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))
DISTANCE = "square root of the KL to SFT (nats a response)"
MARKERS = ("o", "s", "^", "D", "v", "P")


class Figure(matplotlib.figure.Figure):
    """A figure that a kernel shows as the value of a cell, whatever the backend."""

    def _repr_png_(self) -> bytes:
        image = BytesIO()
        self.savefig(image, format="png")
        return image.getvalue()


def style() -> dict[Any, Any]:
    """The matplotlib settings of every plot here; `matplotlib.rc_context(style())` applies them."""
    return {
        "axes.edgecolor": INK,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.labelcolor": INK,
        "axes.labelsize": 10,
        "axes.prop_cycle": cycler(color=COLOURS),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "figure.constrained_layout.use": True,
        "figure.dpi": 110,
        "font.size": 10,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "savefig.dpi": 160,
        "text.color": INK,
        "xtick.color": INK,
        "xtick.labelsize": 9,
        "ytick.color": INK,
        "ytick.labelsize": 9,
    }


@contextmanager
def _figure(width: float, height: float, path: PathLike, rows: int = 1, columns: int = 1):
    """A figure and its axes [rows, columns] to draw on; laid out and saved at the end."""
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(width, height))
        yield figure, figure.subplots(rows, columns, squeeze=False)
        figure.draw_without_rendering()  # ticks are made lazily: make them in this style, now
        if path is not None and distributed.is_main_rank():
            figure.savefig(path)


def plot_curves(
    rows: Sequence[Mapping[str, Any]],
    panels: Mapping[str, Sequence[str]],
    path: PathLike = None,
    *,
    xlabel: str = "step",
    columns: int = 3,
) -> Figure:
    """Small multiples of logged metrics over steps: one panel a title, one line a key.

    rows: what `read_metrics` returned. A panel none of whose keys was logged is left out;
    ValueError where that leaves none.
    """
    curves = {
        title: [(key, *history(rows, key)) for key in keys if any(key in row for row in rows)]
        for title, keys in panels.items()
    }
    curves = {title: lines for title, lines in curves.items() if lines}
    require(bool(curves), f"none of the metrics of {', '.join(panels)} was logged")
    columns = min(columns, len(curves))
    height = math.ceil(len(curves) / columns)
    with _figure(3.9 * columns, 2.6 * height, path, height, columns) as (figure, axes):
        for ax, (title, lines) in zip(axes.flat, curves.items(), strict=False):
            for (key, steps, values), line in zip(lines, LINES, strict=False):
                marker = "o" if len(steps) < 12 else None
                ax.plot(steps, values, line, label=key, marker=marker, markersize=4)
            ax.set(title=title, xlabel=xlabel)
            whole = all(float(x).is_integer() for _, steps, _ in lines for x in steps)
            ax.locator_params(axis="x", nbins=6, integer=whole)
            ax.margins(x=0.02)
            if len(lines) > 1:
                _legend(ax)
        for ax in list(axes.flat)[len(curves) :]:
            ax.remove()
    return figure


def plot_frontier(points: Sequence[Mapping[str, Any]], path: PathLike = None) -> Figure:
    """Reward against distance from the SFT model, one labelled dot a model or checkpoint.

    points: mappings with `name`, `kl` (nats a sequence), `reward`, and optionally `low` and
    `high` of the reward's interval. Distance is sqrt(KL), in which the curves of Gao et al.
    (2023, equation 1) are drawn.
    """
    with _figure(5.6, 3.8, path) as (figure, axes):
        ax = axes[0, 0]
        for point, color, marker in zip(points, _cycle(COLOURS), _cycle(MARKERS), strict=False):
            x, y = math.sqrt(max(point["kl"], 0.0)), point["reward"]
            bars = [[y - point["low"]], [point["high"] - y]] if "low" in point else None
            label = point["name"]
            ax.errorbar(x, y, bars, fmt=marker, color=color, capsize=3, markersize=7, label=label)
        ax.set(xlabel=DISTANCE, ylabel="reward")
        ax.margins(0.15)
        ax.legend(loc="best")
    return figure


def plot_overoptimisation(
    points: Sequence[Mapping[str, Any]], path: PathLike = None, *, x: str = "kl"
) -> Figure:
    """What training maximises (proxy) and what was meant (gold), against sqrt(KL) or iteration.

    points: mappings with `gold`, `proxy`, `kl` and/or `iteration`, and optionally `gold_low`,
    `gold_high`, `proxy_low`, `proxy_high` (drawn as bands or bars) and `ema_gold` with `ema_kl`
    (drawn as hollow dots). x: `kl` or `iteration`. Lines follow the iterations where all points
    name theirs, also against the KL, which may turn back.
    """
    require(x in ("kl", "iteration"), f"x must be kl or iteration, not {x!r}")
    order = "iteration" if all("iteration" in point for point in points) else x
    points = sorted(points, key=lambda point: point[order])
    place = [_place(point[x], x) for point in points]
    with _figure(6.2, 3.8, path) as (figure, axes):
        left = axes[0, 0]
        right = left.twinx()
        for ax, name, what, color, line, marker in (
            (left, "proxy", "proxy score (reward model)", COLOURS[1], "--", "s"),
            (right, "gold", "gold score (true judge)", COLOURS[0], "-", "o"),
        ):
            values = [p[name] for p in points]
            ax.plot(place, values, line, marker=marker, color=color, ms=5, label=name)
            if all(f"{name}_low" in p and f"{name}_high" in p for p in points):
                low, high = ([p[f"{name}_{end}"] for p in points] for end in ("low", "high"))
                if x == "iteration":
                    ax.fill_between(place, low, high, color=color, alpha=0.18, linewidth=0)
                else:
                    ax.vlines(place, low, high, color=color, alpha=0.4, linewidth=1.2)
            ax.tick_params(axis="y", colors=color)
            ax.set_ylabel(what, color=color)
        ema = [p for p in points if "ema_gold" in p]
        if ema:
            where = [_place(p["ema_kl"] if x == "kl" else p[x], x) for p in ema]
            values = [p["ema_gold"] for p in ema]
            right.plot(where, values, "o", mfc="none", color=COLOURS[0], label="gold of the EMA")
        figure.legend(loc="outside upper left", ncols=3)
        right.spines["right"].set(visible=True)
        right.grid(False)
        left.set_xlabel(DISTANCE if x == "kl" else "PPO iteration")
    return figure


def plot_bands(
    panels: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]],
    path: PathLike = None,
    *,
    xlabel: str = "iteration",
    ylabel: str = "gold score",
) -> Figure:
    """Means and their intervals side by side: one panel a title, one line and its band a name.

    panels: title -> name -> points, mappings with `x`, `mean`, `low` and `high`.
    """
    require(bool(panels), "bands need at least one panel")
    with _figure(4.6 * len(panels), 3.4, path, 1, len(panels)) as (figure, axes):
        for ax, (title, lines) in zip(axes.flat, panels.items(), strict=True):
            looks = zip(lines.items(), _cycle(COLOURS), _cycle(LINES), strict=False)
            for (name, points), color, line in looks:
                x, mean, low, high = (
                    [point[key] for point in points] for key in ("x", "mean", "low", "high")
                )
                ax.plot(x, mean, linestyle=line, color=color, label=name)
                ax.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
            ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
            whole = all(float(p["x"]).is_integer() for points in lines.values() for p in points)
            ax.locator_params(axis="x", nbins=6, integer=whole)
            _legend(ax)
    return figure


def plot_histogram(
    groups: Mapping[str, Sequence[float]],
    path: PathLike = None,
    *,
    label: str = "score",
    of: str = "responses",
) -> Figure:
    """The distribution of `label` in each group, over common bins, as shares `of` the group."""
    values = {name: np.asarray(group, dtype=float) for name, group in groups.items()}
    values = {name: group[np.isfinite(group)] for name, group in values.items()}
    require(any(map(len, values.values())), f"a histogram of {label} needs at least one value")
    edges = np.histogram_bin_edges(np.concatenate(list(values.values())), bins=24)
    with _figure(5.6, 3.4, path) as (figure, axes):
        ax = axes[0, 0]
        for (name, group), color, line in zip(
            values.items(), _cycle(COLOURS), _cycle(LINES), strict=False
        ):
            if len(group):
                share = np.histogram(group, edges)[0] / len(group)
                ax.stairs(share, edges, color=color, linestyle=line, linewidth=1.8, label=name)
                ax.stairs(share, edges, color=color, alpha=0.08, fill=True)
        ax.set(xlabel=label, ylabel=f"share of {of}")
        if len(values) > 1:
            _legend(ax)
        ax.set_ylim(bottom=0)
    return figure


def plot_calibration(calibration: Mapping[str, Any], path: PathLike = None) -> Figure:
    """How often the preferred response wins, against how sure the reward model is of it.

    calibration: `{"bins": [{"confidence", "accuracy", "low", "high", "count"}, ...], "ece": x}`,
    as `rlhf_kit.evaluate.calibration` makes it. On the diagonal 80 % sure means 80 % right.
    """
    bins = [b for b in calibration["bins"] if b["count"]]
    with _figure(4.6, 3.9, path) as (figure, axes):
        ax = axes[0, 0]
        ax.plot([0.5, 1], [0.5, 1], "--", color=INK, linewidth=1, label="perfectly calibrated")
        x, y = ([b[key] for b in bins] for key in ("confidence", "accuracy"))
        error = np.array([[b["accuracy"] - b["low"], b["high"] - b["accuracy"]] for b in bins]).T
        label = f"reward model (ECE {calibration['ece']:.3f})"
        ax.errorbar(x, y, np.maximum(error, 0), fmt="o-", capsize=3, markersize=5, label=label)
        for number, b in enumerate(bins):  # on two lines in turn: bins may lie close together
            ax.annotate(
                f"{b['count']}", (b["confidence"], (0.02, 0.07)[number % 2]), ha="center",
                fontsize=9, xycoords=("data", "axes fraction"),
            )  # fmt: skip
        ax.text(0.01, 0.13, "pairs in the bin:", transform=ax.transAxes, fontsize=9)
        ax.set(xlabel="confidence: sigmoid of the absolute margin", ylabel="accuracy")
        ax.set_xlim(0.48, 1.02)
        ax.set_ylim(min(0.35, *(b["low"] - 0.15 for b in bins)), 1.03)
        figure.legend(loc="outside upper left")
    return figure


def plot_length(
    groups: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: PathLike = None,
    *,
    label: str = "score",
) -> Figure:
    """Score against response length, one dot a response; groups map to (lengths, scores)."""
    with _figure(5.6, 3.6, path) as (figure, axes):
        ax = axes[0, 0]
        for (name, (lengths, scores)), color, marker in zip(
            groups.items(), _cycle(COLOURS), _cycle(MARKERS), strict=False
        ):
            options: dict[str, Any] = {"alpha": 0.45, "linewidths": 0, "rasterized": True}
            ax.scatter(lengths, scores, 14, color, marker, label=name, **options)
        ax.set(xlabel="response length (tokens)", ylabel=label)
        if len(groups) > 1:
            _legend(ax, markerscale=2)
    return figure


def plot_bars(values: Mapping[str, float], path: PathLike = None, *, label: str) -> Figure:
    """One horizontal bar a name, in the order given from the top, with its number."""
    require(bool(values), f"bars of {label} need at least one value")
    with _figure(7.0, 0.9 + 0.42 * len(values), path) as (figure, axes):
        ax = axes[0, 0]
        names = list(values)[::-1]
        bars = ax.barh(names, [values[name] for name in names], color=COLOURS[0], height=0.6)
        ax.bar_label(bars, [f"{values[name]:,.0f}" for name in names], padding=4, fontsize=9)
        ax.set(xlabel=label)
        ax.margins(x=0.14)
    return figure


def plot_step_times(decode: Mapping[str, Any], path: PathLike = None) -> Figure:
    """Milliseconds of a decode step: transformers, ours, and the floor, a panel a model.

    decode: what `benchmarks/decode.py` wrote.
    """
    models = decode["models"]
    with _figure(3.4 * len(models), 3.2, path, 1, len(models)) as (figure, axes):
        for ax, (name, model) in zip(axes.flat, models.items(), strict=True):
            cells = model["batches"]
            batches = list(cells)
            peer, ours = (
                [cells[batch][who]["decode_step_ms"] for batch in batches]
                for who in ("transformers_static", "ours")
            )
            shares = [cells[batch]["ours"]["share_of_floor"] for batch in batches]
            floor = [ms * share for ms, share in zip(ours, shares, strict=True)]
            x = np.arange(len(batches))
            looks = (("transformers", peer), ("ours", ours), ("floor", floor))
            for number, (label, heights) in enumerate(looks):
                ax.bar(x + 0.27 * (number - 1), heights, 0.25, label=label, color=COLOURS[number])
            ax.set(title=name, xlabel="rows", ylabel="ms a step")
            ax.set_xticks(x, batches)
        _legend(axes[0, 0])
    return figure


def _cycle(items: Sequence[Any]) -> list[Any]:
    return list(items) * 8


def _place(value: float, x: str) -> float:
    """An estimate of a KL may dip below zero; its distance is then zero."""
    return math.sqrt(max(value, 0.0)) if x == "kl" else value


def _legend(ax: Axes, **options: Any) -> None:
    """A legend with room above the data, so that it hides none."""
    low, high = ax.get_ylim()
    lines = len(ax.get_legend_handles_labels()[0])
    ax.set_ylim(low, high + 0.11 * lines * (high - low))
    legend = ax.legend(loc="best", **options)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)
