"""Does a long PPO training stay as it began? Memory, open files, metrics over three resumes.

    python benchmarks/soak.py --models runs/demo [--steps 2000] [--keep DIR]

Notebook 04 runs as a script in the toy world, with the SFT and the reward model of a finished
run and small batches, so that many steps take minutes. It is ended three times, by SIGTERM (which
saves first), by SIGKILL and by SIGTERM again, and started again each time; the last start is the
longest. Resident memory and open files are read from the system about once a second. Exit code 1:
something grew, a step is missing or there twice, or the training did not end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil

from rlhf_kit import pipeline
from rlhf_kit.metrics import read_metrics

RESULT = Path(__file__).parent / "results" / "soak.json"
NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "04_ppo.py"
SETTINGS = {
    "ppo.batch_size": 16,
    "ppo.minibatch_size": 16,
    "ppo.micro_batch_size": 16,
    "checkpoint.every_steps": 50,
    "checkpoint.export_every": 500,
    "data.rows": [500, 500, 1600],
}
ENDS = ((0.15, signal.SIGTERM), (0.30, signal.SIGKILL), (0.45, signal.SIGTERM))
"""At which share of all steps the training is ended, and how."""
WARM_UP = 0.25
"""Share of a process's samples that is not looked at: caches are being filled."""
MOST_GROWTH = 0.05
"""Memory may differ by this share between the first and the last quarter looked at."""


def start(run: Path) -> psutil.Popen:
    log = (run / "soak.log").open("ab")
    command = [sys.executable, str(NOTEBOOK), f"--run_dir={run}"]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    return psutil.Popen(command, stdout=log, stderr=log, env=environment)


def steps_logged(run: Path) -> int:
    path = run / "ppo" / "metrics.jsonl"
    return len(read_metrics(path)) if path.exists() else 0


def live(run: Path, until: float, number: signal.Signals | None) -> dict[str, Any]:
    """One process, from its start until `until` steps are logged or it ends by itself."""
    process, samples, first = start(run), [], steps_logged(run)
    asked = False
    while process.poll() is None:
        done = steps_logged(run)
        if done > first:  # it trains: what it needed to start is there
            try:
                memory = process.memory_info().rss / 2**20
                samples.append((done, memory, process.num_fds()))
            except psutil.Error:
                break
        if number is not None and done >= until and not asked:
            process.send_signal(number)
            asked = True
        time.sleep(1)
    code = process.wait()
    if not samples:
        sys.exit(f"the training ended with exit code {code} before its first step: see {run}")
    steady = samples[math.floor(len(samples) * WARM_UP) :]
    quarter = max(len(steady) // 4, 1)
    begin, end = steady[:quarter], steady[-quarter:]
    result = {
        "ended_by": number.name if number else "itself",
        "exit_code": code,
        "first_step": first + 1,
        "last_step": steps_logged(run),
        "samples": len(samples),
        "memory_mib": [round(fmean(m for _, m, _ in part), 1) for part in (begin, end)],
        "memory_peak_mib": round(max(m for _, m, _ in samples), 1),
        "open_files": [round(fmean(n for _, _, n in part), 2) for part in (begin, end)],
    }
    print(json.dumps(result), flush=True)
    return result


def findings(lives: list[dict[str, Any]], run: Path, steps: int) -> list[str]:
    """What is wrong, in words; nothing where all is as it should be."""
    found = []
    rows = [row["step"] for row in read_metrics(run / "ppo")]
    if rows != list(range(1, steps + 1)):
        found.append("metrics.jsonl does not hold every step once, in order")
    if any("nonfinite" in row for row in read_metrics(run / "ppo")):
        found.append("a metric was not finite")
    if not (run / pipeline.EXPORTS["final"] / "export.json").is_file():
        found.append("there is no final model")
    for one in lives:
        name = f"steps {one['first_step']} to {one['last_step']}"
        before, after = one["memory_mib"]
        # The short ones are all warm-up; the last one is what the claim is about.
        if one is lives[-1] and after > before * (1 + MOST_GROWTH):
            found.append(f"{name}: memory grew from {before} to {after} MiB")
        if one["open_files"][1] > one["open_files"][0] + 1:
            found.append(f"{name}: open files grew from {one['open_files']}")
    return found


def soak(run: Path, models: Path, steps: int) -> dict[str, Any]:
    changes = {name.replace(".", "__"): value for name, value in SETTINGS.items()}
    pipeline.open_run(
        run,
        preset_name="toy",
        changes={**changes, "ppo__iterations": steps},
        resume=False,
        command=f"soak of {steps} steps",
    )
    for name in ("sft", "reward"):
        shutil.copytree(models / pipeline.EXPORTS[name], run / pipeline.EXPORTS[name])
    begin = time.monotonic()
    lives = [live(run, share * steps, number) for share, number in ENDS]
    lives.append(live(run, steps, None))
    rows = read_metrics(run / "ppo")
    tenth = max(len(rows) // 10, 1)
    return {
        "what": "PPO in the toy world, notebook 04 as a script",
        "steps": steps,
        "settings": SETTINGS,
        "lives": lives,
        "findings": findings(lives, run, steps),
        "score": [
            round(fmean(row["objective/score"] for row in part), 3)
            for part in (rows[:tenth], rows[-tenth:])
        ],
        "seconds": round(time.monotonic() - begin),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": pipeline.commit(),
        "versions": pipeline.versions(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=Path, required=True, help="a finished toy run")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--keep", type=Path, help="where the run goes, to be looked at")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        result = soak(args.keep or Path(directory, "run"), args.models, args.steps)
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print("\n".join(result["findings"]) or f"{args.steps} steps: as they should be")
    return 1 if result["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
