"""A training of a few numbers, exact enough to tell resumed from uninterrupted, and ways to die.

Forked processes are real ones that cost no imports: they are killed, signalled and starved.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from rlhf_kit.config import preset
from rlhf_kit.metrics import MetricsLog, read_metrics
from rlhf_kit.resume import Checkpoints
from rlhf_kit.run_directory import RunDirectory
from rlhf_kit.training_state import Fragment, State


class Walk:
    """Four weights that random steps move: what comes next depends on them and the generator."""

    def __init__(self, size: int = 4):
        torch.manual_seed(1)
        self.weights = torch.zeros(size)
        self.moments = torch.zeros(size, dtype=torch.bfloat16)

    def step(self) -> dict[str, float]:
        gradient = torch.randn(self.weights.shape) + self.weights
        self.moments.lerp_(gradient.bfloat16(), 0.5)
        self.weights -= 0.1 * self.moments.float()
        return {"loss/train": float(self.weights.square().sum())}

    def state(self) -> State:
        return {
            "weights": {"w": Fragment(self.weights, 0, tuple(self.weights.shape))},
            "moments": self.moments,
        }

    def load_state(self, state: State) -> None:
        self.weights.copy_(state["weights"]["w"].read(0, len(self.weights)))
        self.moments.copy_(state["moments"])


class Training:
    """One start of a stage, as a notebook makes it."""

    def __init__(
        self,
        directory: Path,
        *,
        size: int = 4,
        walk: Any = None,
        changes: Mapping[str, Any] | None = None,
        **checkpoint: Any,
    ):
        values = {"every_steps": 2, "every_minutes": 0.0, "keep_last": 2, **checkpoint}
        settings = {f"checkpoint__{name}": value for name, value in values.items()}
        config = preset("toy", **settings, **(changes or {}))
        self.run = RunDirectory(directory, config, time.monotonic())
        self.walk = walk or Walk(size)
        self.log = MetricsLog(self.run.stage("sft"), tensorboard=False)
        self.checkpoints = Checkpoints(
            self.run, "sft", {"walk": self.walk}, log=self.log, data=[["a row"]]
        )

    def resume(self, go_on: bool = True) -> int:
        return self.checkpoints.resume(go_on)

    def train(
        self,
        until: int,
        inside: Callable[[int], None] = lambda step: None,
        *,
        overlapping: bool = False,
    ) -> None:
        """Steps take no time at all, so each waits for the disk, unless saves may overlap them."""
        with self.checkpoints:
            for step, _ in self.checkpoints.remaining(range(until)):
                metrics = self.walk.step()
                inside(step)
                self.log(step, metrics)
                self.checkpoints.step(step, metrics)
                if not overlapping:
                    self.checkpoints._settle()
        self.log.close()

    def rows(self) -> list[tuple[int, float]]:
        """(step, loss) as they were logged."""
        return [(row["step"], row["loss/train"]) for row in read_metrics(self.log.path)]


def uninterrupted(steps: int) -> tuple[list[torch.Tensor], list[tuple[int, float]]]:
    """The weights after 0, 1, ... steps, and the rows that are logged."""
    walk = Walk()
    weights, rows = [walk.weights.clone()], []
    for step in range(1, steps + 1):
        rows.append((step, walk.step()["loss/train"]))
        weights.append(walk.weights.clone())
    return weights, rows


def saved(directory: Path) -> list[int]:
    """Steps of the checkpoints that are there, the newest first."""
    found = (directory / "sft" / "checkpoints").glob("step-*")
    return sorted((int(path.name[5:]) for path in found), reverse=True)


def forked(act: Callable[[], object], *, meanwhile: Callable[[int], None] | None = None) -> int:
    """Run `act` in a process of its own; its exit code, negative for a signal.

    `meanwhile` is called with its process id. What `act` prints is not shown.
    """
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            act()
            code = 0
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        finally:
            os._exit(code)
    if meanwhile is not None:
        meanwhile(pid)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / "manifest.json").read_text())
