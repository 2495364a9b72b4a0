"""The report as one HTML file: no request leaves it, and its curves follow the reader's theme."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from rlhf_kit import plots
from rlhf_kit.results import MODELS

TEMPLATE = Path(__file__).with_name("report.html")
PANELS = {
    "ppo": {
        "Score (normalised, clipped)": ["objective/score"],
        "KL to SFT (nats a response)": ["objective/kl", "objective/kl_k3"],
        "Entropy (nats a token)": ["objective/entropy"],
        "Response length (tokens)": ["response/length"],
        "Share of responses that end": ["response/eos_rate"],
        "Clip fraction": ["policy/clipfrac", "value/clipfrac"],
        "Approximate KL of an update": ["policy/approx_kl"],
        "Explained variance of the critic": ["value/explained_variance"],
        "Gradient norms": ["optim/actor_grad_norm", "optim/critic_grad_norm"],
    },
    "sft": {
        "Loss": ["loss/train", "loss/eval"],
        "Learning rate": ["optim/lr"],
        "Gradient norm": ["optim/grad_norm"],
    },
    "reward": {
        "Loss": ["loss/train"],
        "Accuracy": ["reward/accuracy", "eval/accuracy"],
        "Scores": ["reward/chosen", "reward/rejected"],
    },
}
NAMES = {"base": "Base", "sft": "SFT", "final": "Final", "ema": "EMA"}
WIDTH = 4.0
"""Inches of a chart: about what a phone shows, so that its type stays readable there."""
TITLES = {"sft": "Supervised fine-tuning", "reward": "Reward model", "ppo": "PPO"}


def render(report: Mapping[str, Any], metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The page; a section whose data is missing is left out, and the page's notes say why."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        report=report,
        models=[name for name in MODELS if name in report.get("length", {})],
        charts=_charts(report),
        curves={stage: _curves(stage, metrics.get(stage, ())) for stage in TITLES},
        titles=TITLES,
        names=NAMES,
    )


def _curves(stage: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One chart a panel, so that they stack on a narrow screen."""
    xlabel = "iteration" if stage == "ppo" else "step"
    return [
        _chart(title, lambda t=title, k=keys: plots.plot_curves(rows, {t: k}, xlabel=xlabel))
        for title, keys in PANELS[stage].items()
        if any(key in row for row in rows for key in keys)
    ]


def _charts(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The charts of the evaluation, by name."""
    charts: dict[str, dict[str, Any]] = {}
    values = report.get("distributions", {})
    proxy = {NAMES[name]: v["proxy"] for name, v in values.items() if "proxy" in v}
    judge = "gold" if report.get("gold") else "proxy"
    frontier = [
        {
            "name": NAMES[name],
            "kl": kl,
            "reward": report[judge][name]["mean"],
            **_ends(report, judge, name),
        }
        for name, kl in report.get("kl", {}).items()
        if name in report.get(judge, {})
    ]
    if len(frontier) > 1:
        charts["frontier"] = _chart(
            f"{judge.capitalize()} score against distance", lambda: plots.plot_frontier(frontier)
        )
    if proxy:
        charts["histogram"] = _chart(
            "Proxy scores", lambda: plots.plot_histogram(proxy, label="proxy score (normalised)")
        )
        groups = {
            NAMES[name]: (values[name]["length"], values[name]["proxy"])
            for name in ("sft", "final")
            if NAMES[name] in proxy
        }
        charts["length"] = _chart(
            "Proxy score against length", lambda: plots.plot_length(groups, label="proxy score")
        )
    if "reward_model" in report:
        calibration = report["reward_model"]["calibration"]
        charts["calibration"] = _chart(
            "Calibration of the reward model", lambda: plots.plot_calibration(calibration)
        )
    return charts


def _ends(report: Mapping[str, Any], judge: str, name: str) -> dict[str, float]:
    return {end: report[judge][name][end] for end in ("low", "high")}


def _chart(title: str, draw: Callable[[], plots.Figure]) -> dict[str, Any]:
    from markupsafe import Markup

    return {"title": title, "svg": Markup(to_svg(draw(), title))}


def to_svg(figure: plots.Figure, title: str) -> str:
    """The figure as inline SVG whose ink and grid take the page's colours."""
    import matplotlib
    from markupsafe import escape

    width, height = figure.get_size_inches()
    height, width = max(height * WIDTH / width, 2.6), WIDTH
    figure.set_size_inches(width, height)
    for ax in figure.axes:
        ax.set_title("", loc="left")  # the page's caption says it
    buffer = StringIO()
    with matplotlib.rc_context({**plots.style(), "svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # ids repeat between figures, and none is used
    label = f'<svg role="img" aria-label="{escape(title)}" '
    svg = svg.replace("<svg ", label, 1)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    return svg.replace(plots.INK, "currentColor").replace(plots.GRID, "var(--grid)")
