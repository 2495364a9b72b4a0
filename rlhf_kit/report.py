"""The report card of a run: `report.json`, a page beside it, and a table in the terminal.

`build` gathers what the evaluation found and what the stages logged; the verdict and the
warnings are computed from intervals, never from single means.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rlhf_kit import __version__, report_page
from rlhf_kit.config import require
from rlhf_kit.metrics import FILE_NAME, GIB, read_metrics
from rlhf_kit.pipeline import read_faults, read_record, seconds_of
from rlhf_kit.results import COMPARISONS, MODELS
from rlhf_kit.types import STAGES

EQUAL = 1e-6
"""Weights closer than this (relative L2) count as equal."""
NEAR_CHANCE = 0.6
"""A reward model's accuracy on one kind of pair below which PPO is likely to exploit it."""
FEW_ENDED = 0.5
"""A smaller share of responses that end by themselves is worth a warning."""


def build(
    run_dir: str | os.PathLike[str],
    *,
    split: str = "test",
    evaluation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate a run and write `report.json` and `report.html` into it; returns the report.

    split: of the toy world, as in `evaluate_run`.
    evaluation: what `evaluate_run` returned; None evaluates now.

    A stage without a summary or metrics is left out and named in `notes`. Raises ValueError
    where `run_dir` holds no run.
    """
    run = Path(run_dir)
    record = read_record(run)
    if evaluation is None:
        from rlhf_kit.evaluate import evaluate_run

        evaluation = evaluate_run(run, split=split)
    summaries = {stage: _summary(run / stage / "summary.json") for stage in STAGES}
    metrics = {stage: _metrics(run / stage / FILE_NAME) for stage in STAGES}
    phases = {stage: summary.get("phases", {}) for stage, summary in summaries.items()}
    report: dict[str, Any] = {
        **evaluation,
        "seconds": _seconds(record, summaries, evaluation.get("evaluation_seconds", 0.0)),
        "throughput": {stage: _throughput(summaries[stage]) for stage in STAGES},
        "phase_shares": _shares(phases["ppo"]),
        "memory": {stage: _memory(metrics[stage], phases[stage]) for stage in STAGES},
        "config": record["config"],
        "seed": record.get("seed"),
        "versions": record.get("versions", {"rlhf-kit": __version__}),
        "commit": record.get("commit"),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    report["verdict"] = verdict(report)
    report["warnings"] = warnings(report) + _nonfinite(metrics) + _faults(read_faults(run))
    report["notes"] = [*evaluation.get("notes", []), *_gaps(summaries, metrics)]
    _write(run / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    _write(run / "report.html", report_page.render(report, metrics))
    return report


def load(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """The report that `build` wrote; ValueError where there is none."""
    path = Path(run_dir) / "report.json"
    require(path.is_file(), f"{run_dir} has no report yet; write it with rlhf-kit report {run_dir}")
    return json.loads(path.read_text(encoding="utf-8"))


# ---- what the numbers say


def verdict(report: Mapping[str, Any]) -> str:
    """One sentence: did the final model learn, against the SFT model?"""
    judge = report.get("win_rate_judge", "gold")
    scores = report.get(judge, {})
    compared = report.get("win_rate", {}).get("final_vs_sft")
    if compared is None:
        return "PPO has not run yet, or there is nothing to judge it by."
    difference = compared["difference"]
    if difference["low"] > 0:
        said = "PPO learned"
    elif difference["high"] < 0:
        said = "PPO made the model worse"
    else:
        said = "PPO changed nothing that these prompts could show"
    greedy = report["win_rate_greedy"]["final_vs_sft"]["difference"]
    return (
        f"{said}: {judge} score {_interval(scores['sft'])} for SFT, {_interval(scores['final'])} "
        f"for the final model; difference {_signed(difference)} sampled and {_signed(greedy)} "
        f"greedy (95 % intervals, {report['prompts']} held-out prompts)."
    )


def warnings(report: Mapping[str, Any]) -> list[str]:
    """What a reader must not miss; empty when all is well."""
    found = []
    gold = _difference(report, "gold", "final_vs_sft")
    proxy = report.get("proxy", {})
    if (
        gold
        and gold["high"] < 0
        and proxy.get("final", {}).get("mean", -math.inf)
        > (proxy.get("sft", {}).get("mean", math.inf))
    ):
        found.append(
            "Over-optimisation: the proxy score rose while the gold score fell. Raise kl_coef, "
            "train for fewer iterations, or use a better reward model."
        )
    for suffix, how in (("", "sampled"), ("_greedy", "greedy")):
        difference = report.get(f"win_rate{suffix}", {}).get("final_vs_sft", {}).get("difference")
        if difference and difference["high"] < 0:
            found.append(f"The final model is worse than the SFT model ({how}).")
    distance = report.get("weight_distance", {}).get("ema_vs_sft")
    if distance and distance["relative_l2"] < EQUAL:
        found.append(
            "The EMA model equals the SFT model: its average never moved. Check ppo.ema.decay "
            "against the number of optimiser steps."
        )
    ended = report.get("ended_rate", {}).get("final")
    if ended is not None and ended < FEW_ENDED:
        found.append(
            f"Only {ended:.0%} of the final model's responses end by themselves; the others are "
            "cut at max_new_tokens."
        )
    if "reward_model" in report:
        found += _reward_model_warnings(report["reward_model"])
    return found


def _reward_model_warnings(reward_model: Mapping[str, Any]) -> list[str]:
    if reward_model["accuracy_interval"]["low"] <= 0.5:
        return ["The reward model may be no better than chance on held-out pairs."]
    kinds = reward_model["accuracy_by_kind"].items()
    weak = [f"{kind} ({accuracy:.0%})" for kind, accuracy in kinds if accuracy < NEAR_CHANCE]
    if weak:
        return [f"The reward model hardly tells pairs apart that differ in: {', '.join(weak)}."]
    return []


def _difference(report: Mapping[str, Any], judge: str, pair: str) -> dict[str, float] | None:
    """The paired difference, where it was measured with this judge."""
    if report.get("win_rate_judge") != judge:
        return None
    return report.get("win_rate", {}).get(pair, {}).get("difference")


def _nonfinite(metrics: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    found = []
    for stage, rows in metrics.items():
        values = {(key, value) for row in rows for key, value in row.items()}
        bad = {key for key, value in values if not math.isfinite(value)}
        if bad:
            found.append(f"Stage {stage} logged NaN or infinity in {', '.join(sorted(bad))}.")
    return found


def _faults(faults: list[dict[str, Any]]) -> list[str]:
    """The first of each kind in each stage, and how often it came."""
    kinds: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for fault in faults:
        kinds.setdefault((fault["stage"], fault["fault"], fault["action"]), []).append(fault)
    return [
        f"Stage {stage}, step {found[0]['step']}: {found[0]['sentence']}"
        + (f" ({len(found)} times in all)." if len(found) > 1 else ".")
        for (stage, _, _), found in kinds.items()
    ]


# ---- what the stages wrote


def _summary(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _metrics(path: Path) -> list[dict[str, Any]]:
    return read_metrics(path) if path.is_file() else []


def _seconds(
    record: Mapping[str, Any], summaries: Mapping[str, Mapping[str, Any]], evaluation: float
) -> dict[str, float]:
    """By stage, as the stages say; in all, as the run's clock says where it ran to its end."""
    seconds = {stage: float(s["seconds"]) for stage, s in summaries.items() if "seconds" in s}
    stages = seconds_of(record) if record["finished"] else sum(seconds.values())
    seconds["evaluation"] = float(evaluation)
    return {**seconds, "total": stages + seconds["evaluation"]}


def _throughput(summary: Mapping[str, Any]) -> dict[str, float]:
    """Tokens a second, of the stage (`all`) and of each phase that counted tokens."""
    parts = {"all": summary, **summary.get("phases", {})}
    return {
        name: part["tokens"] / part["seconds"]
        for name, part in parts.items()
        if part.get("tokens") and part.get("seconds")
    }


def _shares(phases: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    total = sum(phase["seconds"] for phase in phases.values())
    return {name: phase["seconds"] / total for name, phase in phases.items()} if total else {}


def _memory(
    rows: list[dict[str, Any]], phases: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """By phase, GiB: the first step's peak as predicted and as measured, and the stage's."""
    logged = {key: value for row in rows for key, value in row.items() if key.startswith("memory/")}
    found = {
        name: {kind: logged.get(f"memory/{name}/{kind}_gib") for kind in ("predicted", "measured")}
        | {"peak": phase["peak_bytes"] / GIB}
        for name, phase in phases.items()
        if "peak_bytes" in phase
    }
    return {n: {k: v for k, v in gib.items() if v is not None} for n, gib in found.items()}


def _gaps(
    summaries: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, list[dict[str, Any]]]
) -> list[str]:
    found = []
    for stage in STAGES:
        missing = [
            name
            for name, there in ((FILE_NAME, metrics[stage]), ("summary.json", summaries[stage]))
            if not there
        ]
        if missing:
            found.append(f"Stage {stage} left no {' and no '.join(missing)}.")
    return found


def _write(path: Path, text: str) -> None:
    """Whole or not at all: a reader never sees half a report."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


# ---- the terminal


def print_terminal(report: Mapping[str, Any], *, width: int = 100) -> None:
    """The report in one screen."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(width=width, highlight=False)
    console.print(escape(report["verdict"]), style="bold")
    for warning in report["warnings"]:
        console.print(f"warning: {escape(warning)}", style="yellow")
    console.print(_model_table(report))
    if report.get("gold_parts", {}).get("sampled"):
        console.print(_parts_table(report))
    for line in _lines(report):
        console.print(escape(line))
    for note in report["notes"]:
        console.print(f"note: {escape(note)}", style="dim")


def _model_table(report: Mapping[str, Any]) -> Any:
    judge = "gold" if report.get("gold") else "proxy"
    columns = [f"{judge}, sampled", f"{judge}, greedy"]
    columns += ["proxy"] if judge == "gold" and report.get("proxy") else []
    table = _table("model", *columns, "KL", "tokens", "ended")
    for name in _models(report):
        scores = [report[judge].get(name), report[f"{judge}_greedy"].get(name)]
        row = [_interval(score) if score else "-" for score in scores]
        if len(columns) == 3:
            row.append(_number(report["proxy"].get(name, {}).get("mean"), "+.2f"))
        table.add_row(
            name,
            *row,
            _number(report["kl"].get(name), ".2f"),
            _number(report["length"].get(name), ".1f"),
            _number(report["ended_rate"].get(name), ".0%"),
        )
    return table


def _parts_table(report: Mapping[str, Any]) -> Any:
    """Components of the gold score, `sampled / greedy`."""
    sampled, greedy = (report["gold_parts"][how] for how in ("sampled", "greedy"))
    names = list(sampled)
    table = _table("sampled / greedy", *names)
    for part in sampled[names[0]]:
        cells = [
            f"{sampled[name][part]['mean']:.3f} / {greedy[name][part]['mean']:.3f}"
            for name in names
        ]
        table.add_row(part, *cells)
    return table


def _table(first: str, *columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _lines(report: Mapping[str, Any]) -> list[str]:
    lines = []
    for a, b in COMPARISONS:
        if result := report.get("win_rate", {}).get(f"{a}_vs_{b}"):
            lines.append(
                f"{a} against {b}: {result['wins']} wins, {result['ties']} ties, "
                f"{result['losses']} losses; win rate {_interval(result['rate'])}"
            )
    if rm := report.get("reward_model"):
        kinds = ", ".join(f"{k} {v:.3f}" for k, v in rm["accuracy_by_kind"].items())
        lines.append(
            f"reward model: accuracy {_interval(rm['accuracy_interval'])}, ECE {rm['ece']:.3f}"
            + (f"; {kinds}" if kinds else "")
        )
    if distances := report.get("weight_distance"):
        parts = [f"{k.replace('_', ' ')} {v['relative_l2']:.4f}" for k, v in distances.items()]
        lines.append(f"relative distance of weights: {', '.join(parts)}")
    seconds = ", ".join(f"{k} {v:.0f}" for k, v in report["seconds"].items())
    lines.append(f"seconds: {seconds}")
    if shares := report["phase_shares"]:
        speed = report["throughput"]["ppo"]
        parts = [
            f"{name} {share:.0%}" + (f" ({speed[name]:,.0f} tokens/s)" if name in speed else "")
            for name, share in shares.items()
        ]
        lines.append(f"PPO: {', '.join(parts)}")
    for stage, phases in report.get("memory", {}).items():
        parts = [
            f"{name} {gib['peak']:.1f}"
            + (f" (predicted {gib['predicted']:.1f})" if "predicted" in gib else "")
            for name, gib in phases.items()
        ]
        lines += [f"peak memory, GiB, {stage}: {', '.join(parts)}"] if parts else []
    return lines


def _models(report: Mapping[str, Any]) -> list[str]:
    return [name for name in MODELS if name in report.get("length", {})]


def _interval(value: Mapping[str, float]) -> str:
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def _signed(value: Mapping[str, float]) -> str:
    return f"{value['mean']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
