"""The optimiser steps of one engine, and what is done where one of them breaks: stages 1 and 2.

PPO steps two engines at a time, and has more to lower where memory runs out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor

from rlhf_kit.faults import Faults
from rlhf_kit.hybrid_engine.training import TrainingEngine
from rlhf_kit.training_state import State

Result = TypeVar("Result")


class GuardedSteps:
    """`begin`, any number of `backward` `within_memory`, `end`: one step of `engine`."""

    def __init__(
        self, engine: TrainingEngine, faults: Faults, *, micro_batch_size: int, setting: str
    ):
        """`setting` is the name of the one that `micro_batch_size`, rows at once, came from."""
        self.engine = engine
        self.faults = faults
        self.faults.place = [(engine, "steps_done")]
        self.micro_batch_size = micro_batch_size
        self.setting = setting

    def begin(self) -> None:
        self.engine.train()
        self.faults.step = self.engine.steps_done + 1

    def within_memory(self, doing: str, attempt: Callable[[int], Result]) -> Result:
        """`attempt(rows at once)`, with half of them where memory runs out, and from then on."""
        result, self.micro_batch_size = self.faults.within_memory(
            doing,
            self.micro_batch_size,
            attempt,
            lower=self.setting,
            undo=self.engine.drop_gradients,
            whole=self.engine.config.zero_stage < 3,
        )
        return result

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` to this step's."""
        self.faults.backward(self.engine, loss)

    def end(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Step where all `metrics` (sums over ranks) and gradients are finite.

        Returns the metrics with learning rate and gradient norm, or with `faults/skipped`.
        """
        info = self.faults.step_if_finite(metrics, self.engine)
        if info is None:
            return {**metrics, "faults/skipped": 1.0}
        return {**metrics, "optim/lr": info.learning_rate, "optim/grad_norm": info.grad_norm}

    def state(self) -> State:
        """The engine's, and what faults have changed. The next rows follow from the steps."""
        return {
            "engine": self.engine.state(),
            "faults": self.faults.state(),
            "micro_batch_size": self.micro_batch_size,
        }

    def load_state(self, state: State) -> None:
        self.engine.load_state(state["engine"])
        self.faults.load_state(state["faults"])
        # Lowered since, by memory that ran out before a roll-back: it would run out again.
        self.micro_batch_size = min(self.micro_batch_size, state["micro_batch_size"])
