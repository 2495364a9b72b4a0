"""Comparisons of two checkpoints and their votes, one JSON line each in RUN_DIR/votes.jsonl."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
import threading
from collections import Counter, OrderedDict
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps.checkpoints import Checkpoint
from apps.generation import Answer, Event, Generation
from apps.limits import check_dialogue, check_session, check_settings, shown
from apps.scores import Scores, Scoring
from rlhf_kit.config import require
from rlhf_kit.pipeline import now
from rlhf_kit.statistics import wilson_interval
from rlhf_kit.votes import VERDICTS, VOTES, read_votes


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
    """Share won by `a` of wins + losses + ties, a tie counting half; None without such votes.
    Both-bad says nothing about which is better, and is left out."""
    low: float | None
    """95 % Wilson interval."""
    high: float | None
    blind: int
    """How many of the votes were blind."""


@dataclass
class Comparison:
    """Two answers side by side: `answers` as shown, pane A first."""

    id: str
    session: str
    answers: tuple[Answer, Answer]
    blind: bool
    is_over: bool = False
    """Nobody reads its events any more."""
    verdict: str = ""
    while_streaming: bool = False
    time: str = ""
    shown_scores: tuple[dict[str, Any] | None, dict[str, Any] | None] = (None, None)


class Arena:
    """Two panes, the same dialogue, settings and seed; thread-safe."""

    def __init__(self, generation: Generation, scoring: Scoring, directory: Path) -> None:
        self.generation = generation
        self.scoring = scoring
        self.path = directory / VOTES
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._comparisons: OrderedDict[str, Comparison] = OrderedDict()
        self._read: tuple[tuple[int, int] | None, list[dict[str, Any]]] = (None, [])

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
        limits = self.generation.limits
        settings = check_settings(
            limits,
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            seed=seed,
            attempt=attempt,
        )
        require(isinstance(blind, bool), "blind must be true or false")
        pair = [first, second]
        if blind and secrets.randbelow(2):
            pair.reverse()
        a, b = self.generation.begin(
            pair,
            check_dialogue(limits, messages, system),
            settings,
            session=session,
            panes=["a", "b"],
            blind=blind,
        )
        comparison = Comparison(secrets.token_urlsafe(12), session, (a, b), blind)
        with self._lock:
            self._comparisons[comparison.id] = comparison
            while len(self._comparisons) > limits.kept:
                self._comparisons.popitem(last=False)
        watching = self.generation.watch([a, b])
        try:
            for events in watching:
                yield PairEvent(comparison.id, *events, errors=(a.error, b.error))
        finally:
            watching.close()
            with self._lock:
                comparison.is_over = True
            self._complete(comparison)

    def vote(self, comparison: Any, verdict: Any, *, session: str) -> Vote:
        """Append the vote: verdict `a`, `b`, `tie` or `both_bad` of the panes as shown.

        Also while the answers stream. ValueError with one sentence: unknown comparison, another
        session's, voted before (the first vote stands), or nothing to judge yet.
        """
        session = check_session(session)
        require(
            isinstance(verdict, str) and verdict in VERDICTS,
            f"a vote is one of {', '.join(VERDICTS)}, not {shown(verdict)}",
        )
        with self._lock:
            found = self._comparisons.get(comparison) if isinstance(comparison, str) else None
            if found is None or found.session != session:
                raise ValueError("this comparison is not remembered any more; compare again")
            require(not found.verdict, "this comparison has its vote already; the first one counts")
            for answer in found.answers:
                require(not answer.error, "one of the answers failed; compare again")
                require(bool(answer.ids), "wait until both answers have begun")
            found.shown_scores = tuple(self._scores(answer) for answer in found.answers)  # type: ignore[assignment]
            found.while_streaming = not all(answer.reason for answer in found.answers)
            found.time = now()
            self._append(record(found, verdict))
            found.verdict = verdict
            for answer in found.answers:
                answer.blind = False
        checkpoints = self.generation.pool.checkpoints
        a, b = (checkpoints.get(answer.checkpoint) for answer in found.answers)
        if found.is_over:  # the page went on, or away, while the vote was on its way
            self._complete(found)
        return Vote(verdict, a, b)

    def tally(self, a: Any, b: Any) -> Tally:
        """Running win rate of checkpoint `a` (id) over `b`."""
        checkpoints = self.generation.pool.checkpoints
        return tally(self._votes(), checkpoints.get(a).name, checkpoints.get(b).name)

    def tallies(self) -> list[Tally]:
        """Of every pair that has votes, the most voted on first."""
        votes = self._votes()
        pairs = Counter(tuple(sorted(vote[s]["checkpoint"] for s in ("a", "b"))) for vote in votes)
        return [tally(votes, a, b) for (a, b), _ in pairs.most_common() if a != b]

    # ---- inside

    def _scores(self, answer: Answer) -> dict[str, Any] | None:
        """What the voter may have seen: scores that were asked for before the vote."""
        if answer.measured is None:
            return None
        scores: Scores = answer.measured[0]
        return {k: getattr(scores, k) for k in ("score", "kl", "kl_k3", "length")}

    def _complete(self, comparison: Comparison) -> None:
        """Write a vote again, with the whole answers, where it was given while they streamed."""
        with self._lock:
            if not comparison.while_streaming:
                return
            comparison.while_streaming = False
        for answer in comparison.answers:
            with answer.changed:
                answer.changed.wait_for(lambda answer=answer: bool(answer.reason), timeout=30)
        with self._lock:
            self._append(record(comparison, comparison.verdict, while_streaming=True))

    def _append(self, vote: Mapping[str, Any]) -> None:
        """One line, on the disk when this returns; a torn line before it is ended first."""
        line = json.dumps(vote, ensure_ascii=False).encode() + b"\n"
        with self._writing:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a+b") as file:
                    fcntl.flock(file, fcntl.LOCK_EX)  # two servers may show one run
                    if end := file.seek(0, os.SEEK_END):
                        file.seek(end - 1)
                        line = line if file.read(1) == b"\n" else b"\n" + line
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                why = error.strerror or error
                raise ValueError(f"the vote could not be written to {VOTES}: {why}") from error

    def _votes(self) -> list[dict[str, Any]]:
        """All votes of the file, read again when it has changed."""
        with self._writing:
            state = None
            with contextlib.suppress(OSError):
                info = self.path.stat()
                state = info.st_size, info.st_mtime_ns
            if state != self._read[0]:
                self._read = state, read_votes(self.path)[0]
            return self._read[1]


def record(
    comparison: Comparison, verdict: str, *, while_streaming: bool | None = None
) -> dict[str, Any]:
    """A vote as it is written. Nothing in it tells who voted."""
    streaming = comparison.while_streaming if while_streaming is None else while_streaming
    answers = dict(zip("ab", comparison.answers, strict=True))
    scores = dict(zip("ab", comparison.shown_scores, strict=True))
    settings = dataclasses.asdict(comparison.answers[0].settings)
    seed = settings.pop("seed")
    return {
        "id": comparison.id,
        "time": comparison.time,
        "verdict": verdict,
        "blind": comparison.blind,
        "while_streaming": streaming,
        "prompt": list(comparison.answers[0].dialogue),
        "settings": settings,
        "seed": seed,
        **{
            side: {  # a is the side that was shown first
                "checkpoint": answer.name,
                "response": answer.text.strip(),
                "tokens": len(answer.ids),
                "ended_by": answer.reason,
                "scores": scores[side],
            }
            for side, answer in answers.items()
        },
    }


def tally(votes: list[dict[str, Any]], a: str, b: str) -> Tally:
    """Count the votes on checkpoint `a` against `b`, whichever side they stood on."""
    counts: Counter[str] = Counter()
    for vote in votes:
        sides = (vote["a"]["checkpoint"], vote["b"]["checkpoint"])
        if a == b or sides not in ((a, b), (b, a)):
            continue
        verdict = vote["verdict"]
        if verdict in ("a", "b"):
            verdict = "wins" if sides["ab".index(verdict)] == a else "losses"
        counts[verdict] += 1
        counts["blind"] += bool(vote.get("blind"))
    wins, losses, ties = counts["wins"], counts["losses"], counts["tie"]
    judged = wins + losses + ties
    rate = (wins + ties / 2) / judged if judged else None
    low, high = (None, None) if rate is None else wilson_interval(rate, judged)
    return Tally(
        a, b, wins, losses, ties, counts["both_bad"], rate, low, high, blind=counts["blind"]
    )
