"""Checkpoints of a stage while it trains, and going on from the last one that is whole.

    checkpoints = Checkpoints(run, "sft", {"trainer": trainer}, log=log, data=[train.rows])
    checkpoints.resume()
    with checkpoints:                                   # signals are heard inside
        for step, rows in checkpoints.remaining(plan):
            ...
            checkpoints.step(step, metrics)
    ...                                                 # export what was trained
    checkpoints.finish()

A checkpoint holds all that training depends on: the parts' states, every rank's random
generators, and how far the metrics had been written. Which rows come next follows from the step.
docs/resume.md says what is promised.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from rlhf_kit import __version__, distributed, integrity, training_state
from rlhf_kit.checkpoint_directory import CheckpointDirectory
from rlhf_kit.generators import Generators
from rlhf_kit.launch import in_notebook
from rlhf_kit.metrics import MetricsLog
from rlhf_kit.run_directory import RunDirectory
from rlhf_kit.signals import Signals
from rlhf_kit.training_settings import sharing, training_settings
from rlhf_kit.training_state import Stateful
from rlhf_kit.types import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")
BEST: dict[Stage, tuple[str, Callable[..., Path]]] = {
    "sft": ("loss/train", min),
    "reward": ("reward/accuracy", max),
    "ppo": ("objective/score", max),
}
"""The metric of each stage's loop by which its best checkpoint is kept."""
LOGS = ("metrics.jsonl", "samples.jsonl")
"""Files of a stage that go back to where they were when the checkpoint was taken."""


class Stopped(SystemExit):
    """A signal ended training, after its state was saved; the exit code is 128 + the signal."""


class Checkpoints:
    """Saves what `parts` hold by steps, by the clock and on signals, and loads it again.

    All ranks call every method together. Threads write files while training goes on; what to do
    the ranks agree on in `step` and `between`, never in a thread.
    """

    def __init__(
        self,
        run: RunDirectory,
        stage: Stage,
        parts: Mapping[str, Stateful],
        *,
        log: MetricsLog | None = None,
        data: Sequence[Iterable[object]] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        """`data` (rows of one or several kinds) and `tokenizer` are what is trained on: a
        checkpoint of a training on others is refused."""
        self.run = run
        self.stage: Stage = stage
        self.config = run.config.checkpoint
        self.done = 0
        """Steps (in PPO: iterations) that are done."""
        self._parts: dict[str, Stateful] = {**parts, "generators": Generators()}
        self._log = log
        self._metric_name, best = BEST[stage]
        is_main = distributed.is_main_rank()
        settings = training_settings(run, stage, data, tokenizer) if is_main else {}
        self._directory = CheckpointDirectory(
            run.path / stage / "checkpoints", self.config, settings, best=best
        )
        self._signals = Signals(exit_at_once=not in_notebook(), quiet=not is_main)
        self._metric: float | None = None
        self._due = False
        self._saved_at = time.monotonic()
        self._write: _Write | None = None

    # ---- going on

    def resume(self, go_on: bool = True) -> int:
        """Load the newest whole checkpoint; the steps that are done, 0 where training starts.

        Training starts anew where there is none, or with `go_on` False. ValueError where the
        last training had other settings, or where nothing can be written.
        """
        path = self._on_main(lambda: self._find(go_on))
        if path is not None:
            self._load(path)
        elif self._log is not None:
            self._log.rewind(0)
        self._saved_at = time.monotonic()
        return self.done

    def roll_back(self) -> int | None:
        """Give the parts the state of the newest whole checkpoint, and nothing else; its step.

        Steps and metrics go on as they were, because the same rows would end in the same fault
        (`faults.Faults.roll_back`). None where there is no checkpoint.
        """
        self._settle()
        path = self._on_main(lambda: self._directory.newest(_say))
        return None if path is None else self._load_parts(path)["step"]

    def remaining(self, items: Sequence[Item]) -> Remaining[Item]:
        """(step, item) of each of `items` that is not done; the first step is 1."""
        return Remaining(items, self.done)

    # ---- in the loop

    def __enter__(self) -> Checkpoints:
        self._signals.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._signals.__exit__()
        if kind is None:
            self._settle()
            return
        if self._write is not None and kind is not KeyboardInterrupt:
            self._write.thread.join()  # other ranks may be gone, so nothing is agreed on
        self._directory.release()

    def step(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """`step` is done and logged: save where it is time, or where a signal asks for it.

        Raises Stopped (in a kernel KeyboardInterrupt) after SIGTERM or SIGINT.
        """
        self.done = step
        self._metric = (metrics or {}).get(self._metric_name, self._metric)
        self._due |= self.config.every_steps > 0 and step % self.config.every_steps == 0
        self._safe_point()

    def between(self) -> None:
        """In the middle of a step, where the parts can be saved too: only look for signals."""
        self._safe_point()

    def finish(self) -> None:
        """The stage is over and exported: wait for the disk, and leave no checkpoint behind."""
        self._settle()
        self._on_main(self._directory.clear)
        self._directory.release()

    # ---- agreeing

    def _on_main(self, act: Callable[[], Any]) -> Any:
        """What `act` returns on the main rank, on all of them; its error is a ValueError on all."""
        result, problem = None, None
        if distributed.is_main_rank():
            try:
                result = act()
            except (OSError, ValueError) as error:
                problem = str(error)
        result, problem = distributed.gather_objects((result, problem))[0]
        if problem is not None:
            raise ValueError(problem)
        return result

    def _safe_point(self) -> None:
        flags = [
            self._signals.stop is signal.SIGTERM,
            self._signals.stop is signal.SIGINT,
            self._signals.save,
            0 < 60 * self.config.every_minutes <= time.monotonic() - self._saved_at,
            self._write is not None and self._write.thread.is_alive(),
        ]
        counts = torch.tensor(flags, dtype=torch.float32, device=distributed.local_device())
        sigterm, sigint, save, late, busy = (n > 0 for n in distributed.all_sum(counts).tolist())
        if self._write is not None and not busy:
            self._advance()
        if sigterm or sigint:
            self._stop(signal.SIGTERM if sigterm else signal.SIGINT)
        self._due |= save or late
        if self._due and self._write is None:
            self._due = self._signals.save = False
            problem = self._begin()
            if save and not (problem or self._settle()):
                _say(f"SIGUSR1: saved {self._directory.step_path(self.done)}")

    def _stop(self, number: signal.Signals) -> None:
        self._settle()
        problem = self._begin() or self._settle()
        saved = f"saved {self._directory.step_path(self.done)}; run the same again to go on"
        _say(f"{number.name}: {'nothing new is saved' if problem else saved}")
        if number is signal.SIGINT and in_notebook():
            raise KeyboardInterrupt
        raise Stopped(128 + number)

    # ---- saving

    def _begin(self) -> str | None:
        """Copy the state and start to write it; the reason where that is not possible."""
        self._saved_at = time.monotonic()
        taken = training_state.snapshot({name: p.state() for name, p in self._parts.items()})
        size = sum(distributed.gather_objects(taken.size))
        step, directory, rank = self.done, self._directory, distributed.rank()
        try:
            unfinished = self._on_main(lambda: directory.begin(step, size))
        except ValueError as error:
            return self._given_up(str(error))
        details = self._details()

        def write() -> None:
            training_state.write(taken, unfinished, rank=rank)

        def complete() -> None:
            if rank == 0:
                directory.complete(unfinished, step, details)

        def both() -> None:
            write()
            complete()

        # With several ranks the main one completes what all have written, and says so in between.
        phases = (both,) if distributed.world_size() == 1 else (write, complete)
        self._write = _Write(unfinished, *phases)
        return None

    def _settle(self) -> str | None:
        """Wait until nothing is being written any more; what went wrong, if anything did."""
        problem = None
        while self._write is not None:
            self._write.thread.join()
            problem = self._advance() or problem
        return problem

    def _advance(self) -> str | None:
        """All ranks' threads have ended: on to the next phase, or the end; what went wrong."""
        assert self._write is not None
        self._write.thread.join()
        problems = [p for p in distributed.gather_objects(self._write.problem) if p]
        if not problems and self._write.next_phase():
            return None
        write, self._write = self._write, None
        if not problems:
            return None
        if distributed.is_main_rank():
            integrity.discard(write.unfinished)
        return self._given_up(problems[0])

    def _given_up(self, problem: str) -> str:
        _say(f"a checkpoint of {self.stage} could not be saved: {problem}; those before it stay")
        return problem

    def _details(self) -> dict[str, Any]:
        stage = self.run.path / self.stage
        return {
            "stage": self.stage,
            "sharing": sharing(self.run),
            "metric": self._metric,
            "seconds": round(time.monotonic() - self.run.started, 2),
            "logs": {name: _size_on_disk(stage / name) for name in LOGS},
            "versions": {"rlhf-kit": __version__, "torch": torch.__version__},
        }

    # ---- loading

    def _find(self, go_on: bool) -> Path | None:
        """On the main rank: where to go on from; None, after clearing up, for a new start."""
        self._directory.prepare()
        path = self._directory.newest(_say) if go_on else None
        if path is None:
            if self._directory.clear():
                _say(f"the checkpoints in {self._directory.path} are deleted: training starts anew")
            self._directory.prepare()
            stage = self.run.path / self.stage
            (stage / "summary.json").unlink(missing_ok=True)
            for export in stage.glob("exports/step-*"):
                integrity.remove(export)
        return path

    def _load(self, path: Path) -> None:
        manifest = self._load_parts(path)
        self.done, self._metric = manifest["step"], manifest["metric"]
        self.run.started -= manifest["seconds"]
        if self._log is not None:
            self._log.rewind(self.done + 1)
        self._on_main(lambda: self._cut_logs(manifest["logs"]))
        _say(f"going on from {path}")
        for name, value in sharing(self.run).items():
            if (before := manifest["sharing"].get(name)) != value:
                _say(f"{name} was {before} and is {value}: equal within rounding, not to the bit")

    def _load_parts(self, path: Path) -> dict[str, Any]:
        ranks = distributed.world_size()
        state = training_state.read(path, rank=distributed.rank(), ranks=ranks)
        for name, part in self._parts.items():
            part.load_state(state[name])
        return integrity.read_manifest(path)

    def _cut_logs(self, sizes: Mapping[str, int]) -> None:
        for name, size in sizes.items():
            path = self.run.path / self.stage / name
            there = path.stat().st_size if path.exists() else 0
            if there < size:
                _say(f"{path} has lost rows that were written before the checkpoint")
            elif there > size:
                os.truncate(path, size)


class Remaining(Generic[Item]):
    """What `Checkpoints.remaining` gives: it has a length, for progress bars."""

    def __init__(self, items: Sequence[Item], done: int):
        self._items, self._done = items, done

    def __len__(self) -> int:
        return max(len(self._items) - self._done, 0)

    def __iter__(self) -> Iterator[tuple[int, Item]]:
        for place in range(self._done, len(self._items)):
            yield place + 1, self._items[place]


class _Write:
    """A checkpoint on its way to the disk: this rank's phases, each in a thread of its own."""

    def __init__(self, unfinished: Path, *phases: Callable[[], None]):
        self.unfinished = unfinished
        self.problem: str | None = None
        self._phases = list(phases)
        self.next_phase()

    def next_phase(self) -> bool:
        """Start the next one; False where there is none."""
        if not self._phases:
            return False
        self.thread = threading.Thread(target=self._run, args=(self._phases.pop(0),), daemon=True)
        self.thread.start()
        return True

    def _run(self, phase: Callable[[], None]) -> None:
        try:
            phase()
        except Exception as error:  # told by the main thread: training goes on without it
            self.problem = str(error) or type(error).__name__


def _size_on_disk(path: Path) -> int:
    """Bytes of a file, after bringing them to the disk; 0 where there is none."""
    if not (distributed.is_main_rank() and path.exists()):
        return 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def _say(sentence: str) -> None:
    """Print on the main rank, above a progress bar."""
    from tqdm.auto import tqdm

    if distributed.is_main_rank():
        tqdm.write(sentence)
