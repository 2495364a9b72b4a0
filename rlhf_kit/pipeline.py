"""A run: the notebooks of the three stages in order, and run.json, its record.

    DIR/run.json                    configuration, versions, commit, seed, times
    DIR/<stage>/final, DIR/ppo/ema  what the stages export; export.json says that it is whole
    DIR/<stage>/checkpoints         while a stage trains; it goes on from the last one
    DIR/logs/NN_name.log            all that a notebook printed

There is no second copy of a step here: `train` runs the files in `notebooks/` as scripts.
"""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from rlhf_kit import __version__, integrity
from rlhf_kit.config import PRESETS, from_dict, override, preset, require

EXPORTS = {"sft": "sft/final", "reward": "reward/final", "final": "ppo/final", "ema": "ppo/ema"}
"""The models that a run ends with, by name, and where they lie in its directory."""
STAGES = (
    ("02_sft", (f"{EXPORTS['sft']}/export.json", "sft/summary.json")),
    ("03_reward_model", (f"{EXPORTS['reward']}/export.json", "reward/summary.json")),
    ("04_ppo", (f"{EXPORTS['final']}/export.json", "ppo/summary.json")),
)
"""The notebooks, in order, and the files by which each says that it is done: its model, and the
summary, which is written last."""
STOPPED = {-signal.SIGTERM: 143, -signal.SIGINT: 130, 143: 143, 130: 130}
"""Exit codes of a notebook that was asked to stop, and what they are on the command line."""
NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
PACKAGES = ("torch", "transformers", "deepspeed", "peft", "datasets", "tokenizers", "safetensors")


def open_run(
    directory: Path,
    *,
    preset_name: str | None,
    changes: Mapping[str, Any],
    resume: bool,
    command: str,
    deployment: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The record of a new run, written; with `resume`, of the one in `directory` if it has one.

    `changes` are `config.override`'s, `deployment` says where `--resume` starts it again. The
    whole configuration is validated before anything is written. ValueError where the directory
    is in use, or was started with other settings.
    """
    path = directory / "run.json"
    require_free(directory, resume=resume)
    if path.is_file():
        record = read_record(directory)
        config = from_dict(record["config"])
        require(
            preset_name in (None, config.preset) and override(config, **changes) == config,
            f"{directory} was started with other settings; leave them out to go on with it, "
            "or choose another directory",
        )
        return record
    if preset_name is None:
        raise ValueError(f"name the settings to start from: --preset {'|'.join(PRESETS)}")
    config = preset(preset_name, **changes)
    require(
        (NOTEBOOKS / f"{STAGES[0][0]}.py").is_file(),
        f"there are no notebooks in {NOTEBOOKS}; train from a checkout of the repository, "
        "installed with pip install -e .",
    )
    record = {
        "config": config.to_dict(),
        "seed": config.seed,
        "command": command,
        "commit": commit(),
        "versions": versions(),
        "started": now(),
        "finished": None,
        "stages": {},
    }
    if deployment is not None:
        record["deployment"] = dict(deployment)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"{directory} can't be made ({error.strerror}); choose another"
        raise ValueError(message) from None
    write_json(path, record)
    return record


def require_free(directory: Path, *, resume: bool) -> None:
    """ValueError where a run cannot be started in this directory, or gone on with."""
    if (directory / "run.json").is_file():
        require(
            resume,
            f"{directory} already holds a run; pass --resume to go on with it, or choose another",
        )
    else:
        require(
            not directory.exists() or (directory.is_dir() and not any(directory.iterdir())),
            f"{directory} is in use and holds no run; choose another",
        )


def is_done(name: str, directory: Path) -> bool:
    """Whether a stage has written all that it ends with."""
    return all((directory / done).is_file() for done in dict(STAGES)[name])


def train(
    directory: Path,
    record: dict[str, Any],
    *,
    is_new: bool,
    run: Callable[[str, Path], int] | None = None,
) -> int:
    """Run the stages that are not done, keep their times in the record; the exit code.

    A stage that was cut short goes on from its last checkpoint. `is_new`: what this start wrote
    is taken away again where the first stage refuses its input. `run` starts a stage, by default
    `run_stage`.
    """
    cut_short = record.setdefault("cut_short", {})
    for name, files in STAGES:
        if is_done(name, directory):
            print(f"{name}: done before", flush=True)
            if name not in record["stages"]:  # as a batch job does it
                summary = json.loads((directory / files[-1]).read_text(encoding="utf-8"))
                record["stages"][name] = {"seconds": summary.get("seconds", 0.0)}
            continue
        start = time.monotonic()
        code = 130  # Ctrl-C, unless the stage ends before it
        try:
            code = (run or run_stage)(name, directory)
        finally:
            seconds = time.monotonic() - start + cut_short.pop(name, 0.0)
            record["faults"] = read_faults(directory)
            if code not in (0, 2):
                cut_short[name] = round(seconds, 1)
                write_json(directory / "run.json", record)
        if code == 2 and is_new and not record["stages"]:
            forget(directory)
            return code
        if code:
            return code
        for done in files:
            require(
                (directory / done).is_file(),
                f"{name} ended without writing {directory / done}, so the run cannot go on",
            )
        record["stages"][name] = {"seconds": round(seconds, 1)}
        write_json(directory / "run.json", record)
        print(f"{name}: {duration(seconds)}", flush=True)
    record["finished"] = now()
    write_json(directory / "run.json", record)
    return 0


def run_stage(name: str, directory: Path) -> int:
    """Run one notebook of the run; 0, 2 where it refused its input, 3 where a fault stopped it.

    1 where it failed; 130 or 143 where it was asked to stop, by SIGINT or SIGTERM.
    """
    from rlhf_kit.launch import run_notebook

    log = directory / "logs" / f"{name}.log"
    code = run_notebook(NOTEBOOKS / f"{name}.py", {"run_dir": str(directory)}, log=log)
    if code in (0, 2, 3):  # the notebook itself has said in one sentence what is wrong
        return code
    if code in STOPPED:
        return STOPPED[code]
    print(f"error: {name} {ending(code)}; its last lines:", file=sys.stderr)
    for line in log.read_text(encoding="utf-8").splitlines()[-5:]:
        print(f"  {line}", file=sys.stderr)
    print(f"The whole log is {log}.", file=sys.stderr)
    return 1


def forget(directory: Path) -> None:
    """Take away what a run wrote whose first stage refused its input: the user starts afresh."""
    for name in ("logs", "notebooks", "sft"):
        shutil.rmtree(directory / name, ignore_errors=True)
    (directory / "run.json").unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # a directory with anything else in it stays
        directory.rmdir()


def ending(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"stopped with exit code {code}"
    name = signal.Signals(-code).name
    hint = ", as it happens when memory runs out" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


# ---- the record


def read_record(directory: Path) -> dict[str, Any]:
    """run.json of a run; ValueError where there is none or it is not one."""
    path = directory / "run.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{directory} holds no run: there is no {path}") from None
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not {"config", "stages", "finished"} <= record.keys():
        raise ValueError(f"{path} is not the record of a run; choose another directory")
    stages = record["stages"].values() if isinstance(record["stages"], dict) else [None]
    require(
        isinstance(record["config"], dict)
        and isinstance(record["finished"], str | None)
        and all(isinstance(s, dict) and type(s.get("seconds")) in (int, float) for s in stages),
        f"{path} is broken: config, stages or finished is not what a run writes there",
    )
    return record


def read_faults(directory: Path) -> list[dict[str, Any]]:
    """The faults of all stages, as `rlhf_kit.faults` recorded them; a torn last line is dropped."""
    found = []
    for stage in ("sft", "reward", "ppo"):
        path = directory / stage / "faults.jsonl"
        for line in path.read_bytes().splitlines() if path.is_file() else ():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


def write_json(path: Path, value: Any) -> None:
    """Write whole or not at all; ValueError where it can't be written."""
    try:
        integrity.write_file(path, json.dumps(value, indent=2) + "\n")
    except OSError as error:
        raise ValueError(f"{path} can't be written ({error.strerror})") from None


def seconds_of(record: Mapping[str, Any]) -> float:
    """What all stages took, over all starts of the run."""
    return sum(stage["seconds"] for stage in record["stages"].values())


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Of Python and the packages that numbers depend on; none of them is imported."""
    found = {"rlhf-kit": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str | None:
    """The kit's git commit, with a + where files differ from it; None outside a checkout."""
    root = NOTEBOOKS.parent
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *words], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
