"""Votes of the app -> preferences that notebook 03 trains on.

RUN_DIR/votes.jsonl holds one JSON object a line:

    id, time, verdict     of the comparison; UTC; `a`, `b`, `tie` or `both_bad`
    blind                 whether the models were hidden until the vote
    while_streaming       whether it was given before both answers had ended
    prompt                the dialogue, as messages; a system prompt first
    settings, seed        temperature, top_p, max_new_tokens, attempt (retries); of both answers
    a, b                  by pane, left and right: checkpoint, response, tokens, ended_by (`end`,
                          `length`, `context`, `stopped`, `time`; "" while it streamed), and
                          scores where the voter had asked for them

A vote that was given while the answers still streamed is written again when they have ended,
under the same `id`: the last line of an id counts. Nothing in the file tells who voted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_kit.config import require
from rlhf_kit.datasets import RefusedRow, preference
from rlhf_kit.types import PreferencePair

VOTES = "votes.jsonl"
"""In a run directory."""
PREFERENCES = "preferences.jsonl"
"""What `rlhf-kit data from-votes` writes beside it."""
VERDICTS = ("a", "b", "tie", "both_bad")
UNFINISHED = {"", "stopped", "time", "error"}
"""Reasons for which an answer ended that leave a text which its model would not have said."""


@dataclass
class FromVotes:
    """The pairs, and what became of the other votes."""

    votes: int = 0
    pairs: list[PreferencePair] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    """How many votes made no pair, by reason."""

    def lines(self) -> list[str]:
        """One line of text for each reason."""
        return [f"{count} left out: {reason}" for reason, count in self.left_out.items()]


def read_votes(path: str | Path) -> tuple[list[dict[str, Any]], int]:
    """The votes of a file, in order, and the number of lines that are none (such as a torn last
    line, where the machine went down); no votes where there is no file."""
    votes: dict[str, dict[str, Any]] = {}
    broken = 0
    path = Path(path)
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        if not line.strip():
            continue
        try:
            vote: Any = json.loads(line)
        except (ValueError, RecursionError):
            vote = None
        if is_vote(vote):
            votes[vote["id"]] = vote
        else:
            broken += 1
    return list(votes.values()), broken


def is_vote(value: Any) -> bool:
    """Whether a JSON value has what readers of votes rely on."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("id"), str)
        and value.get("verdict") in VERDICTS
        and isinstance(value.get("prompt"), list)
        and all(
            isinstance(value.get(side), dict)
            and all(isinstance(value[side].get(k), str) for k in ("checkpoint", "response"))
            for side in ("a", "b")
        )
    )


def preferences(votes: Iterable[Mapping[str, Any]]) -> FromVotes:
    """Chosen and rejected of each vote for one side; ties, both-bad and unfinished answers are
    left out, and so is what no stage could use."""
    result = FromVotes()
    for vote in votes:
        result.votes += 1
        reason = ""
        if vote["verdict"] in ("tie", "both_bad"):
            reason = vote["verdict"].replace("_", " ")
        elif UNFINISHED & {vote[side].get("ended_by", "") for side in ("a", "b")}:
            reason = "an answer was not finished"
        else:
            chosen = vote["verdict"]
            rejected = "b" if chosen == "a" else "a"
            row = {
                "prompt": vote["prompt"],
                "chosen": vote[chosen]["response"],
                "rejected": vote[rejected]["response"],
            }
            try:
                result.pairs.append(preference(row))
            except RefusedRow as refused:
                reason = str(refused)
        if reason:
            result.left_out[reason] = result.left_out.get(reason, 0) + 1
    return result


def from_votes(run_dir: str | Path, output: str | Path | None = None) -> tuple[FromVotes, Path]:
    """Write the preferences of a run's votes as JSONL, whole or not at all.

    output: by default RUN_DIR/preferences.jsonl, which is written anew; another file must not
        exist yet.

    Raises ValueError with one sentence: no votes, none for one side, or a file in the way.
    """
    source = Path(run_dir) / VOTES
    target = Path(run_dir) / PREFERENCES if output is None else Path(output)
    require(source.is_file(), f"there are no votes in {run_dir}; compare and vote in the app first")
    require(target.suffix == ".jsonl", f"name the output *.jsonl, not {target.name}")
    require(
        output is None or not target.exists(),
        f"{target} exists already; choose another name or delete it",
    )
    votes, broken = read_votes(source)
    result = preferences(votes)
    if broken:
        result.left_out["no vote on the line"] = broken
    require(
        bool(result.pairs),
        f"none of {result.votes} votes in {source} prefers a whole answer to another"
        + (f" ({'; '.join(result.lines())})" if result.left_out else ""),
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for pair in result.pairs:
            row = {"prompt": list(pair.prompt), "chosen": pair.chosen, "rejected": pair.rejected}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(partial, target)
    return result, target
