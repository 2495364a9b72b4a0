"""Train, save, crash, corrupt, delete, resume in any order, against a dict of what is on disk."""

from __future__ import annotations

import shutil
import signal
import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from tiny_training import Training, die, forked, saved, uninterrupted

from rlhf_kit import integrity

STEPS, KEPT = 40, 2
WEIGHTS, ROWS = uninterrupted(STEPS)
PHASES = ("seal", "publish", "write_file")


class Machine(RuleBasedStateMachine):
    """The model: `on_disk` says which steps have a directory and whether it is whole, `rated`
    which of them still say in their manifest how good they are."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.on_disk: dict[int, bool] = {}
        self.rated: set[int] = set()

    def teardown(self) -> None:
        if hasattr(self, "training"):
            self.training.checkpoints.finish()
        assert not (self.directory / "sft" / "checkpoints").exists()
        shutil.rmtree(self.directory)

    @initialize()
    def start(self) -> None:
        self.training = Training(self.directory, every_steps=2, keep_last=KEPT)
        newest_whole = max((step for step, whole in self.on_disk.items() if whole), default=0)
        assert self.training.resume() == newest_whole
        # Broken ones that are newer were moved aside; older ones nobody has looked at.
        self.on_disk = {s: whole for s, whole in self.on_disk.items() if s <= newest_whole}

    def keep(self, step: int) -> None:
        """What is left after a checkpoint of `step` was completed."""
        self.on_disk[step] = True
        self.rated.add(step)
        by_loss = sorted(self.rated & set(self.on_disk), key=lambda s: ROWS[s - 1][1])
        keep = {*sorted(self.on_disk, reverse=True)[:KEPT], by_loss[0]}
        self.on_disk = {s: whole for s, whole in self.on_disk.items() if s in keep}

    def path(self, step: int) -> Path:
        return self.directory / "sft" / "checkpoints" / f"step-{step:08d}"

    @rule(steps=st.integers(1, 4))
    def train(self, steps: int) -> None:
        done = self.training.checkpoints.done
        until = min(done + steps, STEPS)
        self.training.train(until)
        for step in range(done + 1, until + 1):
            if step % 2 == 0:
                self.keep(step)

    @rule()
    def crash(self) -> None:
        """All that is not on the disk is gone."""
        self.start()

    @rule(phase=st.sampled_from(PHASES), after=st.booleans())
    def crash_while_saving(self, phase: str, after: bool) -> None:
        done = self.training.checkpoints.done
        next_save = done + 2 - done % 2
        if next_save > STEPS:
            return

        def killed() -> None:
            real = getattr(integrity, phase)

            def dying(*arguments: object, **keywords: object) -> None:
                if after:
                    real(*arguments, **keywords)
                die()

            setattr(integrity, phase, dying)
            self.training.train(next_save)

        assert forked(killed) == -signal.SIGKILL
        if (phase, after) == ("publish", True) or phase == "write_file":
            self.on_disk[next_save] = True  # complete, and nothing pruned yet
            self.rated.add(next_save)
        self.start()

    @precondition(lambda self: self.on_disk)
    @rule(data=st.data())
    def corrupt(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.on_disk)))
        name = data.draw(
            st.sampled_from(["rank-0.safetensors", "state.json", "manifest.json", "+"])
        )
        path = self.path(step) / name
        self.on_disk[step] = False
        if name == "+":
            path.write_text("it was not here")
            return
        content = path.read_bytes()
        # A share of the file: its size is no constant, for it holds times.
        place = data.draw(st.integers(0, 100)) * len(content) // 100
        if data.draw(st.booleans()):
            path.write_bytes(content[:place] + b"x" + content[place:])
        else:
            path.write_bytes(content[: place // 2])
        if name == "manifest.json":  # what its training had reached is not known any more
            self.rated.discard(step)

    @precondition(lambda self: self.on_disk)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.on_disk)))
        shutil.rmtree(self.path(step))
        del self.on_disk[step]
        self.rated.discard(step)

    @invariant()
    def training_is_as_if_never_interrupted(self) -> None:
        done = self.training.checkpoints.done
        assert torch.equal(self.training.walk.weights, WEIGHTS[done])
        rows = self.training.rows() if self.training.log.path.exists() else []
        assert rows[:done] == ROWS[:done]

    @invariant()
    def the_disk_holds_what_it_should(self) -> None:
        assert saved(self.directory) == sorted(self.on_disk, reverse=True)


Machine.TestCase.settings = settings(
    max_examples=15,
    stateful_step_count=15,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestMachine = Machine.TestCase
