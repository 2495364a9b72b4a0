"""Answers as streams of events, each made by a thread that ends within a token when told to.

Shapes: P prompt, R response.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Literal

Reason = Literal["", "end", "length", "context", "stopped", "time", "error"]
"""Why an answer ended: its model's EOS, max_new_tokens, no room left in the context, Stop or a
closed page, Limits.seconds; "" while it goes on."""


@dataclass(frozen=True)
class Event:
    """An answer as it stands now. Events replace each other; the last has a `reason`."""

    answer: str
    """Opaque id of the answer, for scores, token colours and votes."""
    text: str
    """All of it so far, whole characters, not escaped: it may hold HTML."""
    tokens: int
    reason: Reason
    tokens_per_second: float
    """Of the tokens after the first; 0 before there are two."""
    first_token_seconds: float | None
    """From the call to the first token, waiting and loading included."""
    prompt_tokens: int
    dropped: int
    """Old messages that were left out because the context is full."""
    note: str
    """What the model pool did: "" or e.g. "loaded beside final", "swapped in for final"; "" in a
    blind comparison."""
    waiting: bool
    """Still waiting for its turn or for the model to load."""


@dataclass(frozen=True)
class Prompt:
    """The exact prompt of a dialogue."""

    text: str
    """As the model's template writes it."""
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    """The text of each id (special tokens by their names)."""
    dropped: int
    context: int
    """Tokens that prompt and answer may take together."""


class Generation:
    """All answers of the server; thread-safe."""

    def stream(
        self,
        checkpoint: Any,
        messages: Any,
        *,
        session: str,
        pane: str = "chat",
        system: Any = "",
        temperature: Any = 0.7,
        top_p: Any = 0.9,
        max_new_tokens: Any = 256,
        seed: Any = 0,
        attempt: Any = 0,
    ) -> Generator[Event, None, None]:
        """The answer of a checkpoint (its id) to a dialogue, at most 12 events a second.

        Everything is checked before the first event: ValueError with one sentence. The same
        seed gives the same answer; `attempt` counts retries and gives another one each. A
        stream that begins ends the one before it in the same session and pane. Closing the
        generator stops the answer and frees the device. OutOfMemory (a ValueError) when memory
        ran out.
        """
        raise NotImplementedError

    def stop(self, session: str, pane: str | None = None) -> int:
        """End the answers of a session (of one pane, or of all); how many were running.

        Returns at once; each ends within a token and its stream then gives its last event.
        """
        raise NotImplementedError

    def running(self, session: str | None = None) -> int:
        """Answers whose threads have not ended."""
        raise NotImplementedError

    def prompt(
        self, checkpoint: Any, messages: Any, *, system: Any = "", max_new_tokens: Any = 256
    ) -> Prompt:
        """The exact prompt that `stream` would give the model."""
        raise NotImplementedError
