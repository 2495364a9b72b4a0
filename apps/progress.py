"""The run's checkpoints in numbers: gold and proxy scores, KL, win rates, weight distances."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

Interval = tuple[float, float, float]
"""Mean, low, high (95 %)."""


@dataclass(frozen=True)
class Row:
    """One checkpoint; None is not known (yet)."""

    name: str
    label: str
    step: int | None
    gold: Interval | None
    """The toy world's judge, from report.json."""
    proxy: Interval | None
    """Reward model, from report.json."""
    kl: float | None
    """KL to SFT, from report.json."""
    measured_score: float | None
    """Reward model on a few held-out prompts, measured here on request."""
    measured_kl: float | None
    measured_prompts: int
    win_rate: Interval | None
    """Votes against SFT, Wilson."""
    votes: int
    to_sft: float | None
    """||w - w_sft||, over all weights both have."""
    to_sft_relative: float | None
    """The same over ||w_sft||."""


@dataclass(frozen=True)
class Distance:
    """How far apart the weights of two checkpoints are."""

    a: str
    b: str
    l2: float
    relative: float
    """l2 over the norm of b."""
    bf16_equal: float
    """Share of entries that are the same once rounded to bf16 (EMA and SFT: a stalled EMA)."""


class Progress:
    """Numbers are computed once for each state of a checkpoint; thread-safe."""

    def rows(self) -> list[Row]:
        """All complete checkpoints in the order of `Checkpoints.list`; reads weights once."""
        raise NotImplementedError

    def distances(self) -> list[Distance]:
        """final-sft, ema-sft, ema-final, and each periodic export to SFT."""
        raise NotImplementedError

    def measure(
        self, *, session: str, checkpoint: Any = None, prompts: Any = 8
    ) -> Generator[tuple[int, int, str], None, None]:
        """Answer held-out prompts with a checkpoint (None: all) and score them.

        Yields (done, of, checkpoint's name). `rows` has the numbers afterwards.
        """
        raise NotImplementedError
