"""The plots: what they show, what they refuse, and that they leave pyplot alone."""

from __future__ import annotations

import sys

import pytest

from rlhf_kit import distributed, plots

ROWS = [{"step": step, "objective/kl": 0.1 * step, "objective/score": 1.0} for step in range(4)]
POINTS = [
    {"iteration": i, "kl": i**2, "proxy": float(i), "gold": 0.5, "gold_low": 0.4, "gold_high": 0.6}
    for i in range(3)
]
BINS = [
    {"confidence": 0.6, "accuracy": 0.5, "low": 0.3, "high": 0.7, "count": 10},
    {"confidence": 0.8, "accuracy": None, "low": None, "high": None, "count": 0},
]
BAND = [{"x": x, "mean": 0.5, "low": 0.5 - x, "high": 0.6} for x in (0.0, 0.2)]
FIGURES = {
    "curves": lambda path: plots.plot_curves(ROWS, {"KL": ["objective/kl"]}, path),
    "frontier": lambda path: plots.plot_frontier([{"name": "SFT", "kl": -0.1, "reward": 1}], path),
    "overoptimisation": lambda path: plots.plot_overoptimisation(POINTS, path),
    "bands": lambda path: plots.plot_bands({"free": {"live": BAND}}, path),
    "histogram": lambda path: plots.plot_histogram({"SFT": [1.0, 2.0, 2.0]}, path),
    "calibration": lambda path: plots.plot_calibration({"bins": BINS, "ece": 0.1}, path),
    "length": lambda path: plots.plot_length({"SFT": ([3, 4], [0.1, 0.2])}, path),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_plot_saves_a_png_with_readable_type_and_opens_no_pyplot_figure(tmp_path, name):
    figure = FIGURES[name](tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    for ax in figure.axes:
        sizes = [text.get_fontsize() for text in (*ax.get_xticklabels(), ax.xaxis.label, *ax.texts)]
        assert min(sizes) >= 9
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_a_figure_shows_itself_in_a_kernel():
    assert FIGURES["histogram"](None)._repr_png_().startswith(b"\x89PNG")


def test_other_ranks_save_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    FIGURES["curves"](tmp_path / "plot.png")
    assert list(tmp_path.iterdir()) == []


def test_panels_without_logged_metrics_are_left_out():
    panels = {"KL": ["objective/kl", "objective/kl_k3"], "Loss": ["loss/train"]}
    figure = plots.plot_curves(ROWS, panels)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["KL"]
    assert list(figure.axes[0].lines[0].get_ydata()) == pytest.approx([0, 0.1, 0.2, 0.3])


def test_curves_of_nothing_are_refused_by_title():
    with pytest.raises(ValueError, match="none of the metrics of Loss"):
        plots.plot_curves(ROWS, {"Loss": ["loss/train"]})


def test_overoptimisation_is_drawn_against_the_root_of_the_kl():
    figure = plots.plot_overoptimisation(POINTS)
    proxy, gold = (ax.lines[0] for ax in figure.axes)
    assert list(proxy.get_xdata()) == [0, 1, 2] and list(proxy.get_ydata()) == [0, 1, 2]
    assert list(gold.get_ydata()) == [0.5, 0.5, 0.5]
    assert all(ax.get_ylabel() for ax in figure.axes)


def test_overoptimisation_follows_training_where_the_kl_turns_back():
    points = [point | {"kl": kl} for point, kl in zip(POINTS, (0, 9, 4), strict=True)]
    figure = plots.plot_overoptimisation(points[::-1])
    assert list(figure.axes[0].lines[0].get_xdata()) == [0, 3, 2]


def test_an_unknown_axis_is_refused():
    with pytest.raises(ValueError, match="kl or iteration"):
        plots.plot_overoptimisation(POINTS, x="time")


def test_a_histogram_counts_shares_and_skips_what_is_not_finite():
    figure = plots.plot_histogram({"a": [0.0, 1.0, float("nan")], "b": []})
    assert sum(figure.axes[0].patches[0].get_data().values) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="at least one value"):
        plots.plot_histogram({"a": []})


def test_bands_reach_from_the_low_to_the_high_end():
    figure = plots.plot_bands({"one": {"live": BAND}, "two": {"live": BAND, "EMA": BAND}})
    first, second = figure.axes
    assert list(first.lines[0].get_ydata()) == [0.5, 0.5]
    corners = first.collections[0].get_paths()[0].vertices
    assert {(0.2, 0.3), (0.2, 0.6), (0.0, 0.5)} <= {(x, round(y, 9)) for x, y in corners}
    assert len(second.lines) == 2 and second.get_title(loc="left") == "two"
    with pytest.raises(ValueError, match="at least one panel"):
        plots.plot_bands({})


def test_the_axis_of_a_histogram_says_what_is_counted():
    figure = plots.plot_histogram({"prompt": [3.0, 4.0]}, label="tokens", of="rows")
    assert figure.axes[0].get_ylabel() == "share of rows"
