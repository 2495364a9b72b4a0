"""Comparisons of two checkpoints and their votes, one JSON line each in RUN_DIR/votes.jsonl."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps.checkpoints import Checkpoint
from apps.generation import Event


@dataclass(frozen=True)
class PairEvent:
    """Both panes as they stand now. With an error one pane says so and the other goes on."""

    comparison: str
    """Opaque id of the comparison, for the vote."""
    a: Event
    b: Event
    errors: tuple[str, str]
    """One sentence a pane; "" where all is well."""


@dataclass(frozen=True)
class Vote:
    """What to show after a vote."""

    verdict: str
    a: Checkpoint
    """What pane A showed: the reveal."""
    b: Checkpoint


@dataclass(frozen=True)
class Tally:
    """Votes on one pair of checkpoints, blind or not."""

    a: str
    """Names of the checkpoints, in the order given."""
    b: str
    wins: int
    losses: int
    ties: int
    both_bad: int
    rate: float | None
    """Share won by `a` of wins + losses + ties, a tie counting half; None without votes."""
    low: float | None
    """95 % Wilson interval."""
    high: float | None
    blind: int
    """How many of the votes were blind."""


class Arena:
    """Two panes, the same dialogue, settings and seed."""

    path: Path
    """votes.jsonl."""

    def compare(
        self,
        first: Any,
        second: Any,
        messages: Any,
        *,
        session: str,
        blind: Any = False,
        system: Any = "",
        temperature: Any = 0.7,
        top_p: Any = 0.9,
        max_new_tokens: Any = 256,
        seed: Any = 0,
        attempt: Any = 0,
    ) -> Generator[PairEvent, None, None]:
        """Stream both answers; without `blind` pane A is `first`, with it a coin decides.

        They decode in turn, token by token, where both models fit in memory, else one after the
        other. `Generation.stop(session)` ends both; pane names are "a" and "b".
        """
        raise NotImplementedError

    def vote(self, comparison: Any, verdict: Any, *, session: str) -> Vote:
        """Append the vote: verdict `a`, `b`, `tie` or `both_bad` of the panes as shown.

        Also while the answers stream. ValueError with one sentence: unknown comparison, another
        session's, voted before (the first vote stands), or nothing to judge yet.
        """
        raise NotImplementedError

    def tally(self, a: Any, b: Any) -> Tally:
        """Running win rate of checkpoint `a` (id) over `b`."""
        raise NotImplementedError

    def tallies(self) -> list[Tally]:
        """Of every pair that has votes."""
        raise NotImplementedError
