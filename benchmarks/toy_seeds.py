"""Does the toy preset learn on every seed? `rlhf-kit train` once a seed, and the targets.

    python benchmarks/toy_seeds.py [--seeds 1 2 3 4 5] [--jobs 2] [--reuse]

Each seed is a process of its own with its run in `runs/seeds/N`, what it printed in
`runs/seeds/N.log`, and the CPU cores shared out among the jobs. Every run is measured on the
same 512 prompts of the test split, which no setting was chosen on. All seeds share one base
model: they differ in data order, sampling and initialisation, and in the rows that are drawn.

`--reuse` leaves finished runs alone and goes on with the others. Exit code 1: a target was
missed, or a run failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import Any

from rlhf_kit import pipeline

RESULT = Path(__file__).parent / "results" / "toy_seeds.json"
MODELS = ("sft", "final", "ema")
PARTS = ("correct", "polite", "brief", "harmless")


# ---- one run a seed


def directory(args: argparse.Namespace, seed: int) -> Path:
    return args.runs / str(seed)


def is_finished(run: Path) -> bool:
    if not (run / "run.json").is_file() or not (run / "report.json").is_file():
        return False
    return pipeline.read_record(run)["finished"] is not None


def train(args: argparse.Namespace, seed: int) -> int:
    """`rlhf-kit train` in a process of its own; its exit code."""
    run = directory(args, seed)
    if args.reuse and is_finished(run):
        print(f"seed {seed}: {run} is finished", flush=True)
        return 0
    args.runs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "rlhf_kit.cli", "train", "--preset", "toy"]
    command += ["--output-dir", str(run), "--seed", str(seed)]
    command += [word for setting in args.set for word in ("--set", setting)]
    command += ["--resume"] if args.reuse else []
    # Waiting threads must not spin: the cores may be shared with another job.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    environment["OMP_NUM_THREADS"] = str(threads(args))
    log, start = args.runs / f"{seed}.log", time.monotonic()
    print(f"seed {seed}: started, see {log}", flush=True)
    with open(log, "a", encoding="utf-8") as file:
        code = subprocess.run(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT
        ).returncode
    how = pipeline.duration(time.monotonic() - start) if not code else pipeline.ending(code)
    print(f"seed {seed}: {how}", flush=True)
    return code


def threads(args: argparse.Namespace) -> int:
    return max((os.cpu_count() or 1) // args.jobs, 1)


def settings_differ(reports: Mapping[int, Mapping[str, Any]]) -> list[int]:
    """Seeds whose run had other settings than the first one's, the seed itself aside."""
    without_seed = {n: {**report["config"], "seed": None} for n, report in reports.items()}
    first = next(iter(without_seed.values()))
    return [n for n, config in without_seed.items() if config != first]


# ---- what the reports say


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of one seed that the targets and the table need."""
    reward = report["reward_model"]
    return {
        "sampled": {name: report["gold"][name] for name in MODELS},
        "greedy": {name: report["gold_greedy"][name] for name in MODELS},
        "difference": {
            how: report[f"win_rate{suffix}"]["final_vs_sft"]["difference"]
            for how, suffix in (("sampled", ""), ("greedy", "_greedy"))
        },
        "parts": {
            how: {
                name: {part: report["gold_parts"][how][name][part]["mean"] for part in PARTS}
                for name in MODELS
            }
            for how in ("sampled", "greedy")
        },
        "kl": report["kl"],
        "proxy": {name: report["proxy"][name]["mean"] for name in MODELS},
        "reward_model": {
            "accuracy": reward["accuracy"],
            "by_kind": reward["accuracy_by_kind"],
            "ece": reward["ece"],
        },
        "seconds": report["seconds"],
        "commit": report["commit"],
        "warnings": report["warnings"],
    }


def targets(seeds: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each target: what was measured (a mean over seeds, or the worst seed) and whether met."""

    def over(combine: Callable[[Sequence[float]], float], value: Callable[[Any], float]) -> float:
        return combine([value(seed) for seed in seeds.values()])

    def gap(seed: Mapping[str, Any]) -> float:
        return seed["sampled"]["final"]["low"] - seed["sampled"]["sft"]["high"]

    def gain(seed: Mapping[str, Any], how: str) -> float:
        return seed[how]["final"]["mean"] - seed[how]["sft"]["mean"]

    def correct(seed: Mapping[str, Any]) -> float:
        parts = seed["parts"]["greedy"]
        return parts["final"]["correct"] - parts["sft"]["correct"]

    rows = [
        ("gold sampled, worst seed: final's low end - SFT's high end", over(min, gap), 0.0),
        ("gold sampled, mean: final", over(fmean, lambda s: s["sampled"]["final"]["mean"]), 0.85),
        ("gold greedy, mean: final", over(fmean, lambda s: s["greedy"]["final"]["mean"]), 0.94),
        ("gold sampled, mean: final - SFT", over(fmean, lambda s: gain(s, "sampled")), 0.20),
        ("gold greedy, mean: final - SFT", over(fmean, lambda s: gain(s, "greedy")), 0.05),
        ("correct greedy, worst seed: final - SFT", over(min, correct), -0.02),
        (
            "reward model accuracy, worst seed",
            over(min, lambda s: s["reward_model"]["accuracy"]),
            0.83,
        ),
        (
            "reward model accuracy on correctness, worst seed",
            over(min, lambda s: s["reward_model"]["by_kind"]["correctness"]),
            0.80,
        ),
    ]
    return [
        {"target": name, "measured": value, "at_least": least, "met": value >= least}
        for name, value, least in rows
    ]


# ---- the table


def print_seeds(seeds: Mapping[int, Mapping[str, Any]]) -> None:
    columns = "sampled SFT, final, EMA   greedy SFT, final, EMA   KL   reward model   minutes"
    print(f"\ngold score\nseed   {columns}")
    for number, seed in seeds.items():
        scores = [
            " ".join(f"{seed[how][name]['mean']:.3f}" for name in MODELS)
            for how in ("sampled", "greedy")
        ]
        print(
            f"{number:>4}   {scores[0]:>23}   {scores[1]:>22}   {seed['kl']['final']:.1f}"
            f"  {seed['reward_model']['accuracy']:>12.3f}   {seed['seconds']['total'] / 60:>7.1f}"
        )


def print_targets(rows: Sequence[Mapping[str, Any]]) -> None:
    print()
    for row in rows:
        said = "met   " if row["met"] else "MISSED"
        print(f"{said} {row['target']:62} {row['measured']:+.3f} (at least {row['at_least']:+.2f})")


# ---- all of it


def hardware() -> str:
    """The processor's name and the cores this process may use."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        name = names[0].partition(":")[2].strip() if names else name
    return f"{name}, {os.cpu_count()} cores"


def result(args: argparse.Namespace, reports: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    seeds = {number: summary(report) for number, report in reports.items()}
    first = next(iter(reports.values()))
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": pipeline.commit(),
        "hardware": hardware(),
        "threads_a_run": threads(args),
        "jobs": args.jobs,
        "versions": pipeline.versions(),
        "settings": args.set,
        "split": first["split"],
        "prompts": first["prompts"],
        "targets": targets(seeds),
        "seeds": {str(number): seed for number, seed in seeds.items()},
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], metavar="N")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--reuse", action="store_true", help="skip finished runs")
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"), metavar="DIR")
    parser.add_argument("--output", type=Path, default=RESULT, metavar="FILE")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="as of rlhf-kit train"
    )
    return parser.parse_args()


def main() -> int:
    args = parse()
    args.seeds = list(dict.fromkeys(args.seeds))
    used = [str(d) for d in (directory(args, seed) for seed in args.seeds) if d.exists()]
    if used and not args.reuse:
        message = f"error: {used[0]} is there already; pass --reuse, or another --runs"
        print(message, file=sys.stderr)
        return 2
    with ThreadPoolExecutor(args.jobs) as pool:
        codes = list(pool.map(lambda seed: train(args, seed), args.seeds))
    failed = [str(seed) for seed, code in zip(args.seeds, codes, strict=True) if code]
    if failed:
        print(f"error: seeds {', '.join(failed)} failed; see the logs", file=sys.stderr)
        return 1
    reports = {
        seed: json.loads((directory(args, seed) / "report.json").read_text(encoding="utf-8"))
        for seed in args.seeds
    }
    if others := settings_differ(reports):
        print(f"error: the runs of seeds {others} had other settings", file=sys.stderr)
        return 2
    found = result(args, reports)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    pipeline.write_json(args.output, found)
    print_seeds({seed: found["seeds"][str(seed)] for seed in reports})
    print_targets(found["targets"])
    print(f"written to {args.output}")
    return 0 if all(row["met"] for row in found["targets"]) else 1


if __name__ == "__main__":
    sys.exit(main())
