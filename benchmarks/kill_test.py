"""Does a killed training go on to the same last bit? Kill it again and again, and compare.

    python benchmarks/kill_test.py --kills 50
    python benchmarks/kill_test.py --kills 10 --ranks 2 --output benchmarks/results/kill_test_2.json

The three stages run once uninterrupted, small. Then each trial runs one stage until a SIGKILL
to all its processes, at a random instant of the loop or while files are being written, and again
to its end. Compared to the uninterrupted run: every file of every export, byte by byte; the
training state at the end (weights, AdamW's averages, EMA, counters, random generators); the
samples; the metrics without times and speeds.

Processes are forked from one that has imported everything, so that a start takes no time; each
is a process of its own that runs the notebook as a script. Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = {"sft": "02_sft", "reward": "03_reward_model", "ppo": "04_ppo"}
SETTINGS: dict[str, Any] = {
    "data__rows": [192, 96, 32],
    "data__max_prompt_length": 90,
    "data__max_length": 120,
    "generation__max_new_tokens": 8,
    "sft__batch_size": 8,
    "sft__micro_batch_size": 4,
    "reward__batch_size": 4,
    "reward__micro_batch_size": 4,
    "ppo__iterations": 12,
    "ppo__critic_warmup_iterations": 2,
    "ppo__batch_size": 8,
    "ppo__minibatch_size": 8,
    "ppo__micro_batch_size": 4,
    "checkpoint__every_steps": 2,
    "checkpoint__export_every": 4,
}
TIMES = ("time", "perf/", "phase/")
"""Beginnings of the keys of metrics that are no part of the promise."""
PATIENCE = 300.0
"""Seconds after which a stage is taken to hang."""


@dataclass
class Trial:
    """One kill, and what the run that went on from it gave."""

    stage: str
    aim: str
    """`loop`: at a random instant; `save`, `export`: while such files are written."""
    rows: int = 0
    """Lines of metrics.jsonl when it was killed."""
    writing: list[str] = field(default_factory=list)
    """What was half written when it was killed."""
    went_on_from: int = 0
    """The step of the checkpoint that the second start found; 0 is the beginning."""
    differs: list[str] = field(default_factory=list)
    """What is not as in the uninterrupted run: nothing."""


# ---- starting and killing


def import_everything() -> None:
    """What the notebooks import, once, before any fork."""
    os.environ.update({"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"})
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import torch.utils.tensorboard
    import transformers.models.gpt2.modeling_gpt2
    import transformers.models.llama.modeling_llama  # noqa: F401

    import rlhf_kit.ppo
    import rlhf_kit.resume  # noqa: F401

    torch.set_num_threads(1)
    assert deepspeed and not torch.cuda.is_initialized()


class Run:
    """One start of a stage: a process for each rank, in a group of their own."""

    def __init__(self, stage: str, directory: Path, ranks: int):
        self.stage, self.directory = stage, directory
        self.log = directory / f"{stage}.out"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pids: list[int] = []
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                self._become_rank(rank, ranks, port)
            os.setpgid(pid, self.pids[0] if self.pids else pid)
            self.pids.append(pid)

    def _become_rank(self, rank: int, ranks: int, port: int) -> None:
        code = 1
        try:
            out = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout = os.fdopen(1, "w", buffering=1)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            if ranks > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            _keep_the_last_state()
            path = ROOT / "notebooks" / f"{NOTEBOOKS[self.stage]}.py"
            sys.argv = [str(path), f"--run_dir={self.directory}"]
            runpy.run_path(str(path), run_name="__main__")
            if ranks > 1:
                torch.distributed.destroy_process_group()
            code = 0
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def ended(self) -> bool:
        """Whether its processes have ended, all well; RuntimeError where one has not."""
        for pid in list(self.pids):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.pids.remove(pid)
                if status:
                    self.kill()
                    text = self.log.read_text()[-3000:]
                    raise RuntimeError(f"{self.stage} in {self.directory} failed:\n{text}")
        return not self.pids

    def wait(self) -> None:
        """Until its end."""
        until = time.monotonic() + PATIENCE
        while not self.ended():
            if time.monotonic() > until:
                self.kill()
                raise RuntimeError(f"{self.stage} in {self.directory} hangs, see {self.log}")
            time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL to all processes at once."""
        if self.pids:
            os.killpg(os.getpgid(self.pids[0]), signal.SIGKILL)
        for pid in self.pids:
            os.waitpid(pid, 0)
        self.pids = []


def _keep_the_last_state() -> None:
    """Write the state of the end into DIR/<stage>/last, before the stage forgets it."""
    from rlhf_kit import distributed, training_state
    from rlhf_kit.resume import Checkpoints

    finish = Checkpoints.finish

    def keep_and_finish(self: Checkpoints) -> None:
        last = self.run.path / self.stage / "last"
        last.mkdir(exist_ok=True)
        state = {name: part.state() for name, part in self._parts.items()}
        training_state.write(training_state.snapshot(state), last, rank=distributed.rank())
        finish(self)

    Checkpoints.finish = keep_and_finish  # type: ignore[method-assign]


# ---- looking


def rows_in(stage: Path) -> int:
    try:
        return (stage / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def half_written(stage: Path) -> list[str]:
    """Names of what is being written below a stage's directory, without the process id."""
    found = [*stage.glob(".*.tmp-*"), *stage.glob("*/.*.tmp-*")]
    return sorted(f"{path.parent.name}/{path.name.split('.tmp-')[0]}" for path in found)


def differences(stage: Path, reference: Path) -> list[str]:
    """What of a stage is not as in the uninterrupted run."""
    found = []
    for name in sorted(_files(stage) | _files(reference)):
        one, other = stage / name, reference / name
        if not (one.is_file() and other.is_file()):
            found.append(f"{name} is only in one of them")
        elif _content(one) != _content(other):
            found.append(name)
    return found


def _files(stage: Path) -> set[str]:
    found = {path.relative_to(stage).as_posix() for path in stage.rglob("*") if path.is_file()}
    return {name for name in found if not name.startswith("events.") and name != "summary.json"}


def _content(path: Path) -> Any:
    if path.name == "metrics.jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]
    if path.name == "state.json":
        return _without_phases(json.loads(path.read_text()))
    return path.read_bytes()


def _without_phases(state: Any) -> Any:
    if isinstance(state, dict):
        return {k: _without_phases(v) for k, v in state.items() if k != "phases"}
    return state


# ---- the test


def prepare(directory: Path, reference: Path | None = None, stage: str = "sft") -> Path:
    """A run directory with the settings, and the stages before `stage` of the reference."""
    from rlhf_kit import pipeline

    if reference is None:
        pipeline.open_run(
            directory, preset_name="toy", changes=SETTINGS, resume=False, command="kill_test.py"
        )
        return directory
    directory.mkdir(parents=True)
    shutil.copy(reference / "run.json", directory)
    for name in list(NOTEBOOKS)[: list(NOTEBOOKS).index(stage)]:
        shutil.copytree(reference / name / "final", directory / name / "final")
    return directory


def run_uninterrupted(directory: Path, ranks: int) -> dict[str, float]:
    """All three stages; the seconds between the first row of metrics and the end of each."""
    seconds = {}
    for stage in NOTEBOOKS:
        run, began = Run(stage, directory, ranks), 0.0
        while not run.ended():
            if not began and rows_in(directory / stage):
                began = time.monotonic()
            time.sleep(0.002)
        seconds[stage] = time.monotonic() - began
    return seconds


def kill_once(
    trial: Trial, directory: Path, ranks: int, seconds: float, chance: random.Random
) -> bool:
    """Start the stage and kill it as the trial says; False where it ended before."""
    stage = directory / trial.stage
    run, kill_at = Run(trial.stage, directory, ranks), 0.0
    after = chance.uniform(0, seconds) if trial.aim == "loop" else 0.0
    wanted = {"save": "checkpoints/", "export": ""}.get(trial.aim, "")
    seen, which = 0, chance.randrange(1, 5)  # the first to fourth save
    before: list[str] = []
    while not run.ended():
        writing = half_written(stage)
        new = [name for name in writing if name not in before and name.startswith(wanted)]
        if trial.aim == "export":
            new = [name for name in new if not name.startswith("checkpoints/")]
        seen, before = seen + len(new), writing
        if not kill_at and rows_in(stage):
            if trial.aim == "loop":
                kill_at = time.monotonic() + after
            elif seen >= (which if trial.aim == "save" else 1):
                kill_at = time.monotonic() + chance.uniform(0, 0.02)
        if kill_at and time.monotonic() >= kill_at:
            run.kill()
            trial.rows, trial.writing = rows_in(stage), half_written(stage)
            return True
        time.sleep(0.0005)
    return False


def one_trial(
    trial: Trial,
    directory: Path,
    reference: Path,
    *,
    ranks: int,
    seconds: float,
    chance: random.Random,
) -> None:
    """Kill, go on, compare; a stage that ended before it was killed is begun again."""
    for attempt in range(10):
        shutil.rmtree(directory, ignore_errors=True)
        prepare(directory, reference, trial.stage)
        if attempt == 3:
            trial.aim = "loop"
        if kill_once(trial, directory, ranks, seconds * 0.8**attempt, chance):
            break
    else:
        raise RuntimeError(f"{trial.stage} always ended before it could be killed")
    (log := directory / f"{trial.stage}.out").unlink()
    Run(trial.stage, directory, ranks).wait()
    found = [line for line in log.read_text().splitlines() if line.startswith("going on from")]
    trial.went_on_from = int(found[0].rpartition("step-")[2]) if found else 0
    trial.differs = differences(directory / trial.stage, reference / trial.stage)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1, help="decides where it is killed")
    parser.add_argument("--aims", default="loop,save,loop,export", help="repeated in this order")
    parser.add_argument("--output", type=Path, help="where the result is written as JSON")
    arguments = parser.parse_args(words)
    start, chance = time.monotonic(), random.Random(arguments.seed)
    import_everything()
    from rlhf_kit import pipeline

    stages, aims = list(NOTEBOOKS), arguments.aims.split(",")
    trials = [
        Trial(stage=stages[number % len(stages)], aim=aims[number % len(aims)])
        for number in range(arguments.kills)
    ]
    with tempfile.TemporaryDirectory() as work:
        reference = prepare(Path(work, "uninterrupted"))
        seconds = run_uninterrupted(reference, arguments.ranks)
        print("uninterrupted:", {k: f"{v:.1f} s" for k, v in seconds.items()}, flush=True)
        for number, trial in enumerate(trials, start=1):
            one_trial(
                trial,
                Path(work, "trial"),
                reference,
                ranks=arguments.ranks,
                seconds=seconds[trial.stage],
                chance=chance,
            )
            print(
                f"{number:3} {trial.stage:6} {trial.aim:6} killed after {trial.rows} rows, writing "
                f"{trial.writing or 'nothing'}; went on from {trial.went_on_from}: "
                f"{'differs in ' + ', '.join(trial.differs) if trial.differs else 'equal'}",
                flush=True,
            )
    equal = sum(not trial.differs for trial in trials)
    result = {
        "kills": len(trials),
        "equal": equal,
        "ranks": arguments.ranks,
        "seed": arguments.seed,
        "by_stage": dict(Counter(trial.stage for trial in trials)),
        "while_writing": sum(bool(trial.writing) for trial in trials),
        "from_the_beginning": sum(not trial.went_on_from for trial in trials),
        "seconds": round(time.monotonic() - start),
        "date": pipeline.now(),
        "commit": pipeline.commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": pipeline.versions(),
        "settings": SETTINGS,
        "trials": [asdict(trial) for trial in trials],
    }
    if arguments.output:
        pipeline.write_json(arguments.output, result)
    print(f"{equal} of {len(trials)} went on to the same last bit")
    return 0 if equal == len(trials) else 1


if __name__ == "__main__":
    sys.exit(main())
