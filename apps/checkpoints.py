"""The checkpoints of a run directory, by opaque ids: nothing a browser sends is ever a path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Checkpoint:
    """One model that may be chosen."""

    id: str
    """Opaque and random; the same for a name as long as the server runs."""
    name: str
    """`base`, `sft`, `final`, `ema`, `step-00000020`; `model` where one directory was given."""
    label: str
    """For people, English: "SFT", "final", "EMA", "PPO step 20", "base (toy_world)"."""
    step: int | None
    """PPO iteration of a periodic export."""
    complete: bool
    """False while it is being written: shown, not to be chosen."""


class Checkpoints:
    """Scans `root`, a run directory or one HF model directory."""

    def __init__(self, root: str | Path) -> None:
        """ValueError with one sentence where `root` is neither."""
        raise NotImplementedError

    def list(self) -> list[Checkpoint]:
        """What is there now, in the order base, sft, steps, final, ema; scans again each time."""
        raise NotImplementedError

    def get(self, id: object) -> Checkpoint:
        """ValueError for an id this server did not give out."""
        raise NotImplementedError

    def named(self, name: object) -> Checkpoint:
        """By name, for `?a=ema&b=final`; ValueError where there is none of that name."""
        raise NotImplementedError

    def default(self) -> Checkpoint:
        """The one a chat begins with: final, else the latest there is."""
        raise NotImplementedError

    def default_pair(self) -> tuple[Checkpoint, Checkpoint]:
        """EMA and final where they are there, else the two latest (or the same one twice)."""
        raise NotImplementedError
