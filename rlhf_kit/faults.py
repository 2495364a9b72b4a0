"""Faults while training: what is done about each, one sentence for the user, one line of record.

    DIR/<stage>/faults.jsonl   {"time", "stage", "step", "fault", "action", "sentence"} a line

A fault is found by all ranks together, before the optimiser step. `docs/faults.md` lists them
with their policies; the settings are `config.faults`.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

from rlhf_kit import distributed
from rlhf_kit.config import FaultConfig, LimitConfig
from rlhf_kit.training_state import State

FILE_NAME = "faults.jsonl"
Action = Literal["skip", "halve", "roll_back", "stop", "warn", "drop"]
Result = TypeVar("Result")

LIMITS = {
    "kl": ("objective/kl", "raise ppo.kl.coef or lower ppo.actor_optimizer.learning_rate"),
    "ratio": (
        "policy/ratio_mean",
        "lower ppo.actor_optimizer.learning_rate or ppo.max_approx_kl",
    ),
    "entropy": ("objective/entropy", "raise ppo.kl.coef or train for fewer iterations"),
    "length": ("response/length", "look at ppo/samples.jsonl, and at what the reward model pays"),
    "truncated": (
        "response/truncated_rate",
        "raise generation.max_new_tokens, or lower ppo.missing_eos_score",
    ),
    "empty": ("response/empty_rate", "check that the chat template does not end with an EOS"),
    "score_spread": ("objective/score_std", "check the reward model: it tells nothing apart"),
    "distinct": ("response/distinct_rate", "raise ppo.kl.coef or use a better reward model"),
}
"""Of each limit in FaultConfig: the metric it is about, and what to change."""


STOPPED = 3
"""Exit code of a script whose training was stopped by a fault."""
LOST = ("closed by peer", "reset by peer", "Timed out waiting", "Broken pipe", "Connection refused")
"""What collectives say when another rank is gone or does not answer."""


class TrainingStopped(RuntimeError):
    """Training can't go on; the message is for the user."""

    alone = False
    """Whether this rank stops while the others know nothing of it yet."""


class RolledBack(Exception):
    """The models are those of an earlier checkpoint again: what was going on is void."""


class _OutOfMemoryElsewhere(Exception):
    """Another rank has run out of memory, and this one must repeat with it."""


class Faults:
    """What to do about faults in one stage, and the record of what was done.

    `roll_back` is set by what keeps checkpoints: it loads the last complete one into the objects
    that train, on all ranks, and returns its step, or None where there is none. Data and
    metrics go on: the same rows would end in the same fault, to the last bit.
    """

    def __init__(self, config: FaultConfig | None = None, directory: Path | None = None) -> None:
        """`directory` is the stage's, DIR/<stage>; without one nothing is written."""
        self.config = config or FaultConfig()
        self.directory = directory
        self.roll_back: Callable[[], int | None] | None = None
        self.place: list[tuple[Any, str]] = []
        """Attributes (owner, name) that say where in data and schedules training is."""
        self.step = 0
        """Optimiser step, or iteration of PPO, that is going on."""
        self.rolled_back = 0
        self.in_a_row = 0
        """Minibatches left out since the last one that was not."""
        self._outside: dict[str, int] = {}

    def report(self, fault: str, action: Action, sentence: str) -> None:
        """One line on screen and one in the file, from the main rank."""
        if distributed.is_main_rank():
            tqdm.write(f"step {self.step}: {sentence}")
        if self.directory is not None:
            record(self.directory, self.step, fault, action, sentence)

    def act(self, fault: str, policy: str, what: str, advice: str) -> None:
        """Follow a policy; all ranks call it. `what` happened, `advice` says what to change.

        Raises RolledBack where the models are now those of a checkpoint, and TrainingStopped.
        """
        if policy == "warn":
            self.report(fault, "warn", f"{what}; {advice}")
        elif policy == "roll_back":
            self._go_back(fault, what, advice)
        elif policy == "stop":
            self.stop(fault, what, advice)

    def stop(self, fault: str, what: str, advice: str, *, alone: bool = False) -> None:
        """Raise TrainingStopped, on all ranks or, in the middle of a collective, on one `alone`."""
        stopped = TrainingStopped(f"{what}; training stops here; {advice}")
        stopped.alone = alone
        if self.directory is not None:
            record(self.directory, self.step, fault, "stop", str(stopped), alone=alone)
        raise stopped

    def _go_back(self, fault: str, what: str, advice: str) -> None:
        if self.rolled_back >= self.config.roll_backs:
            again = "again, and it has gone back to a checkpoint before" if self.rolled_back else ""
            return self.stop(fault, f"{what} {again}".strip(), advice)
        before = self.rolled_back  # the checkpoint has counted fewer
        place = [(owner, name, getattr(owner, name)) for owner, name in self.place if owner]
        found = self.roll_back() if self.roll_back is not None else None
        if found is None:
            return self.stop(fault, f"{what}, and there is no checkpoint to go back to", advice)
        for owner, name, value in place:
            setattr(owner, name, value)
        self.rolled_back = before + 1
        self.in_a_row = 0
        self._outside.clear()
        self.report(
            fault,
            "roll_back",
            f"{what}; the models are those of step {found} again, and training goes on with the "
            f"next rows; if it comes back, {advice}",
        )
        raise RolledBack

    def state(self) -> State:
        """What decides when a fault has come back too often."""
        outside = dict(self._outside)
        return {"rolled_back": self.rolled_back, "in_a_row": self.in_a_row, "outside": outside}

    def load_state(self, state: State) -> None:
        self.rolled_back, self.in_a_row = state["rolled_back"], state["in_a_row"]
        self._outside = dict(state["outside"])

    # ---- NaN and infinity

    def finite(self, metrics: Mapping[str, float], engines: Sequence[Any]) -> bool:
        """Whether losses (sums over ranks) and gradients may be stepped on; all ranks call it.

        Where not, the gradients of all `engines` are dropped, and the policy is followed. Weights,
        optimisers, schedules and averages stay as they are, to the last bit.
        """
        bad = sorted(key for key, value in metrics.items() if not math.isfinite(value))
        if not bad:
            mine = all(engine.gradients_finite() for engine in engines)
            bad = [] if self._agreed(mine) else ["gradient"]
        if not bad:
            self.in_a_row = 0
            return True
        for engine in engines:
            engine.drop_gradients()
        self.nonfinite(f"NaN or infinity in {', '.join(bad)}")
        return False

    def step_if_finite(self, metrics: Mapping[str, float], engine: Any) -> Any | None:
        """The StepInfo of `engine.step()`, or None where the minibatch was left out."""
        try:
            if not self.finite(metrics, [engine]):
                return None
            info = engine.step()
            if not info.applied:  # a sum over ranks too large for its terms
                self.nonfinite("NaN or infinity in the gradient")
        except RolledBack:
            return None
        return info if info.applied else None

    def nonfinite(self, what: str) -> None:
        """A minibatch was left out; after too many in a row go back, or stop."""
        advice = "lower the learning rate, and look at the rows or rewards of that step"
        policy = self.config.nonfinite
        self.in_a_row += 1
        if policy == "skip" and self.in_a_row <= self.config.nonfinite_in_a_row:
            sentence = f"{what}: the minibatch was left out; if it happens often, {advice}"
            return self.report("nonfinite", "skip", sentence)
        if policy == "skip":
            what = f"{what}, in {self.in_a_row} minibatches in a row"
        self.act("nonfinite", "stop" if policy == "stop" else "roll_back", what, advice)

    def _agreed(self, mine: bool) -> bool:
        return not distributed.any_host(not mine)

    # ---- metrics out of their limits

    def check(self, metrics: Mapping[str, float]) -> None:
        """Compare an iteration's metrics, which all ranks share, with the limits."""
        for name, (key, advice) in LIMITS.items():
            limit: LimitConfig = getattr(self.config, name)
            value = metrics.get(key)
            if limit.policy == "off" or value is None:
                continue
            low = limit.low is not None and value < limit.low
            high = limit.high is not None and value > limit.high
            self._outside[name] = self._outside.get(name, 0) + 1 if low or high else 0
            if self._outside[name] == self.config.window:  # said once, until it was inside again
                side = f"below {limit.low:g}" if low else f"above {limit.high:g}"
                what = f"{key} has been {side} for {self.config.window} iterations, now {value:.3g}"
                self.act(name, limit.policy, what, advice)

    # ---- memory

    def within_memory(
        self,
        doing: str,
        size: int,
        attempt: Callable[[int], Result],
        *,
        lower: str,
        undo: Callable[[], None] = lambda: None,
        whole: bool = True,
        unit: str = "row",
        smallest: int = 1,
    ) -> tuple[Result, int]:
        """`attempt(size)`, and where any rank runs out of memory again with half of `size`.

        All ranks repeat together: inside an attempt they may meet in `backward` alone. `lower`
        names the setting that `size` came from. `whole` False says that ranks meet inside the
        attempt in ways that can't be left half way (ZeRO-3, generation in groups): then it stops.
        So it does from `smallest` downwards; `size` counts rows, or what `unit` says.
        """
        while True:
            result, short, told = None, False, False
            try:
                result = attempt(size)
            except torch.OutOfMemoryError:
                short = True
            except _OutOfMemoryElsewhere:
                told = True
            if short and not whole and distributed.world_size() > 1:
                why = "ranks can't repeat a pass they share"
                self._out_of_memory(doing, lower, size, why, unit=unit)
            if not told and self._agreed(not short):
                assert result is not None
                return result, size
            del result
            undo()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if size <= smallest or self.config.out_of_memory == "stop":
                last = size <= smallest
                self._out_of_memory(doing, lower, size, "", unit=unit, last=last)
            size //= 2
            self.report(
                "out_of_memory",
                "halve",
                f"memory ran out in {doing}: repeated, and from now on done, with {size} {unit}s "
                f"at once; to have it so from the start, set {lower} to {size}",
            )

    def backward(self, engine: Any, loss: Tensor) -> None:
        """`engine.backward(loss)` inside an attempt, on all ranks or on none.

        ZeRO-2 sums gradients over ranks during the backward pass, so no rank may be missing.
        """
        meets = engine.config.zero_stage >= 2 and distributed.world_size() > 1
        if meets and not self._agreed(True):
            raise _OutOfMemoryElsewhere
        try:
            engine.backward(loss)
        except torch.OutOfMemoryError:
            if meets:
                why = "under ZeRO-2 and 3 ranks can't repeat a backward pass"
                self._out_of_memory("a backward pass", "the stage's micro_batch_size", 0, why)
            raise

    def _out_of_memory(
        self,
        doing: str,
        lower: str,
        size: int,
        why: str,
        *,
        unit: str = "row",
        last: bool = False,
    ) -> None:
        """Stop; `last` says that `size` can't be lowered."""
        rows = f" with {size} {unit}{'s' * (size > 1)} at once" if size else ""
        reason = f" ({why})" if why else ""
        advice = "lower data.max_length" if last else f"lower {lower}"
        advice += ", turn gradient_checkpointing on, or use a higher zero_stage"
        what = f"memory ran out in {doing}{rows}{reason}"
        self.stop("out_of_memory", what, advice, alone=bool(why))


def explain(error: BaseException) -> str | None:
    """One sentence for the user about an error that ends training; None for any other error."""
    if isinstance(error, TrainingStopped):
        return str(error)
    if not isinstance(error, RuntimeError) or distributed.world_size() == 1:
        return None
    if any(words in str(error) for words in LOST) or isinstance(error, dist.DistError):
        return (
            f"rank {distributed.rank()} lost another rank, which died or did not answer in time, "
            "so training stops here; find the first error among the other ranks' output, and run "
            "the same again to go on from the last checkpoint"
        )
    return None


def end_in_one_sentence() -> None:
    """From here on a fault ends this program with its sentence alone, and exit code 3."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        sentence = explain(error)
        if sentence is None:
            return before(kind, error, trace)
        together = isinstance(error, TrainingStopped) and not error.alone
        if distributed.is_main_rank() or not together:
            # Not sys.stderr: torch.distributed swallows what is written there.
            print(f"error: {sentence}", file=sys.__stderr__, flush=True)
        sys.stdout.flush()
        if distributed.world_size() > 1:
            os._exit(STOPPED)  # to leave the process group could mean to wait for the dead
        sys.exit(STOPPED)

    sys.excepthook = hook


def record(
    directory: Path, step: int, fault: str, action: str, sentence: str, *, alone: bool = False
) -> None:
    """Append one line to DIR/<stage>/faults.jsonl, from the main rank or one that is `alone`.

    Where even that can't be written (a full disk is a fault too) the screen has to do.
    """
    if not distributed.is_main_rank() and not alone:
        return
    line = {
        "time": round(time.time(), 3),
        "stage": directory.name,
        "step": step,
        "fault": fault,
        "action": action,
        "sentence": sentence,
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / FILE_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    except OSError as error:
        distributed.print_main(f"this is not in {directory / FILE_NAME}: {error.strerror}")
