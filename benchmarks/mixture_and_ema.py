"""What are the mixture loss and the EMA worth, when, and what do they cost? Five seeds.

    python benchmarks/mixture_and_ema.py [--seeds 1 2 3 4 5] [--jobs 2]

Each seed gets one SFT and one reward model, by notebooks 02 and 03 with the toy preset. From
these PPO runs under each of `SETTINGS` with each of `MIXTURES`, with equal prompts and sampling
seeds; `ppo_run.py` says what is measured, `ppo_cost.py` what it costs. Beside the length of the
runs without a penalty (one of seed 1 with 30 iterations had gone wrong by the 15th) no setting was
chosen on what came out.

A run is a process with one thread and leaves `RUNS/SEED/SETTING-MIXTURE.json`. What is there is
not repeated, so that the benchmark goes on where it was cut short. Differences are paired by
seed, with Student's 95 % interval of their mean over the seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ppo_run import AVERAGES, COURSE_PROMPTS, MODELS, PROMPTS, TEXTS
from toy_seeds import hardware

from rlhf_kit import pipeline

RESULT = Path(__file__).parent / "results" / "mixture_and_ema.json"
SETTINGS: dict[str, dict[str, Any]] = {
    # Notebook 07's rate and schedule, and no price on the distance from the SFT model.
    "free": {
        "ppo__iterations": 20,
        "ppo__kl__coef": 0.0,
        "ppo__actor_optimizer__learning_rate": 1.5e-3,
        "ppo__actor_optimizer__final_ratio": 0.5,
    },
    # The preset, half as long.
    "penalty": {"ppo__iterations": 30},
}
MIXTURES = ("none", "grad_norm_ratio", "coef")
"""Off; the preset's tenth of PPO's gradient; InstructGPT's constant, 27.8."""
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Number of seeds -> 97.5 % quantile of Student's distribution with one degree less."""
Result = Mapping[str, Any]
Measure = Callable[[Result], float]
MEASURES: dict[str, Measure] = {
    "gold sampled": lambda end: end["sampled"]["total"],
    "gold greedy": lambda end: end["greedy"]["total"],
    "correct sampled": lambda end: end["sampled"]["correct"],
    "correct greedy": lambda end: end["greedy"]["correct"],
    "correct greedy, worst family": lambda end: min(end["correct_by_family"].values()),
    "KL": lambda end: end["kl"],
    "distinct": lambda end: end["distinct"],
    "loss on pretraining text": lambda end: end["loss on pretraining text"],
    "loss on dialogues": lambda end: end["loss on dialogues"],
}
"""Of one set of weights, as `PPORun.evaluate` measured it."""


# ---- the runs


def prepare(args: argparse.Namespace, seed: int) -> None:
    """SFT and reward model of a seed, by their notebooks."""
    run = args.runs / str(seed) / "models"
    command = " ".join(sys.argv)
    changes = {"seed": seed}
    pipeline.open_run(run, preset_name="toy", changes=changes, resume=True, command=command)
    for name, files in pipeline.STAGES[:2]:
        if not all((run / file).is_file() for file in files) and pipeline.run_stage(name, run):
            raise RuntimeError(f"{name} of seed {seed} failed; see {run / 'logs'}")


def result_file(args: argparse.Namespace, seed: int, setting: str, mixture: str) -> Path:
    return args.runs / str(seed) / f"{setting}-{mixture}.json"


def start(args: argparse.Namespace, seed: int, setting: str, mixture: str) -> bool:
    """One run, unless its result is there; whether it is there now."""
    changes = {**SETTINGS[setting], "ppo__mixture__kind": mixture}
    changes["data__cache"] = str(args.runs / str(seed) / "cache")
    path = result_file(args, seed, setting, mixture)
    return run(args, seed, path, "ppo_run.py", json.dumps(changes))


def run(args: argparse.Namespace, seed: int, path: Path, script: str, *words: str) -> bool:
    """A script in a process of its own, unless its result is there; whether it is there now."""
    if path.is_file():
        return True
    command = [sys.executable, str(Path(__file__).with_name(script))]
    command += [str(args.runs / str(seed) / "models"), str(path), *words]
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "OMP_NUM_THREADS": "1"}
    begin = time.monotonic()
    with open(path.with_suffix(".log"), "w", encoding="utf-8") as log:
        subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    print(f"{path}: {pipeline.duration(time.monotonic() - begin)}", flush=True)
    return path.is_file()


# ---- what they say


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean and Student's 95 % interval of one number a seed."""
    mean, reach = fmean(values), T_975[len(values)] * stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - reach, "high": mean + reach, "seeds": list(values)}


def measured(results: Sequence[Result], side: Measure, other: Measure | None = None) -> Any:
    """`side` of each result, or what it has more than `other`."""
    return over_seeds([side(r) - (other(r) if other else 0.0) for r in results])


def compare(runs: Mapping[str, Sequence[Result]]) -> dict[str, Any]:
    """`runs["setting-mixture"]`, a result a seed -> every comparison, over the seeds.

    mixture: the live actor's end with a mixture, less that without; paired by seed.
    average: an average's end, less the live actor's of the same run.
    course: the same on the way, of the gold score; and the live actor's KL.
    """
    plain = {name: runs[f"{name}-none"] for name in SETTINGS}
    found: dict[str, Any] = {
        "before": {
            key: measured(plain["free"], lambda r, m=m: m(r["before"]))
            for key, m in MEASURES.items()
        },
        "ends": {},
        "mixture": {},
        "average": {},
        "course": {},
    }
    for name, results in runs.items():
        setting, mixture = name.split("-")

        def end(model: str, measure: Measure) -> Measure:
            return lambda result: measure(result["ends"][model])

        def way(model: str, place: int, key: str = "gold") -> Measure:
            return lambda result: result["course"][place][model][key]

        found["ends"][name] = {
            model: {key: measured(results, end(model, m)) for key, m in MEASURES.items()}
            for model in MODELS
        }
        found["average"][name] = {
            model: {
                key: measured(results, end(model, m), end("live", m)) for key, m in MEASURES.items()
            }
            for model in AVERAGES
        }
        if mixture != "none":
            both = list(zip(results, plain[setting], strict=True))
            found["mixture"][name] = {
                key: over_seeds([m(a["ends"]["live"]) - m(b["ends"]["live"]) for a, b in both])
                for key, m in MEASURES.items()
            }
        places = range(len(results[0]["course"]))
        found["course"][name] = {
            "iteration": [point["iteration"] for point in results[0]["course"]],
            **{model: [measured(results, way(model, i)) for i in places] for model in MODELS},
            "KL": [measured(results, way("live", i, "kl")) for i in places],
            **{
                f"{model} - live": [
                    measured(results, way(model, i), way("live", i)) for i in places
                ]
                for model in AVERAGES
            },
        }
    return found


def cost(results: Sequence[Result]) -> dict[str, Any]:
    """Of `ppo_cost.py`, a result a seed: shares of an iteration with neither; one seed's bytes."""
    return {
        "share": {
            part: measured(results, lambda result, part=part: result["share"][part])
            for part in ("mixture", "average")
        },
        "seconds": {
            part: measured(results, lambda r, part=part: r["seconds"][part] / r["iterations"])
            for part in ("plain", "mixture", "average")
        },
        "bytes": results[0]["bytes"],
    }


# ---- the tables of docs/mixture-and-ema.md

SHOWN = tuple(key for key in MEASURES if key not in ("correct sampled", "distinct"))


def table(first: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> list[str]:
    lines = [[first, *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *cells] for name, cells in rows.items()]
    return [f"| {' | '.join(line)} |" for line in lines]


def change(value: Mapping[str, Any]) -> str:
    return f"{value['mean']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"


def tables(found: Mapping[str, Any]) -> dict[str, list[str]]:
    """Markdown: what runs end as, what a mixture and an average are worth, what they cost."""
    ends = {"SFT": found["before"]} | {n: models["live"] for n, models in found["ends"].items()}
    average = {
        f"{name}, {model}": values
        for name, models in found["average"].items()
        for model, values in models.items()
    }
    cost = found["cost"]
    size = {name: f"{count / 1e6:.1f} MB" for name, count in cost["bytes"].items()}
    return {
        "ends": table(
            "run", SHOWN, {n: [f"{v[k]['mean']:.3f}" for k in SHOWN] for n, v in ends.items()}
        ),
        "mixture": table(
            "less the run without",
            SHOWN,
            {n: [change(v[k]) for k in SHOWN] for n, v in found["mixture"].items()},
        ),
        "average": table(
            "less the live actor",
            (short := (*SHOWN[:3], "KL")),
            {name: [change(values[k]) for k in short] for name, values in average.items()},
        ),
        "cost": table(
            "",
            ["processor time, share of an iteration with neither"],
            {name: [change(value)] for name, value in cost["share"].items()},
        ),
        "bytes": table("", ["bytes"], {name: [count] for name, count in size.items()}),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], metavar="N")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--runs", type=Path, default=Path("runs/mixture"), metavar="DIR")
    parser.add_argument("--output", type=Path, default=RESULT, metavar="FILE")
    args = parser.parse_args()
    names = [(setting, mixture) for setting in SETTINGS for mixture in MIXTURES]
    for seed in args.seeds:
        prepare(args, seed)
    # Setting by setting, so that what is there when it is cut short compares over all seeds.
    jobs = [(seed, *name) for name in names for seed in args.seeds]
    with ThreadPoolExecutor(args.jobs) as pool:
        done = list(pool.map(lambda job: start(args, *job), jobs))
    costs = {seed: args.runs / str(seed) / "cost.json" for seed in args.seeds}
    done += [run(args, seed, path, "ppo_cost.py") for seed, path in costs.items()]
    if missing := [job for job, there in zip([*jobs, *costs], done, strict=True) if not there]:
        print(f"error: failed, see the logs in {args.runs}: {missing}", file=sys.stderr)
        return 1
    runs = {
        f"{setting}-{mixture}": [
            json.loads(result_file(args, seed, setting, mixture).read_text()) for seed in args.seeds
        ]
        for setting, mixture in names
    }
    found = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commits": sorted({result["commit"] for results in runs.values() for result in results}),
        "hardware": hardware(),
        "threads_a_run": 1,
        "versions": pipeline.versions(),
        "seeds": args.seeds,
        "settings": SETTINGS,
        "averages": {name: asdict(config) for name, config in AVERAGES.items()},
        "split": "test",
        "prompts": PROMPTS,
        "course_prompts": COURSE_PROMPTS,
        "texts": TEXTS,
        **compare(runs),
        "cost": cost([json.loads(path.read_text()) for path in costs.values()]),
    }
    pipeline.write_json(args.output, found)
    for lines in tables(found).values():
        print(*lines, "", sep="\n")
    print(f"written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
