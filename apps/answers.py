"""An answer while a thread makes it and afterwards, and what a page is told of it."""

from __future__ import annotations

import threading
import time
from array import array
from dataclasses import dataclass, field
from typing import Any, Literal

from apps.limits import Settings
from apps.memory import OutOfMemory
from rlhf_kit.types import Message

Reason = Literal["", "end", "length", "context", "stopped", "time", "error"]
"""Why an answer ended: its model's EOS, max_new_tokens, no room left in the context, Stop or a
closed page, Limits.seconds, an error; "" while it goes on."""


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
    placement: tuple[str, ...]
    """Where the model came from: () it was in memory; ("alone",); ("beside", label, ...);
    ("instead of", label, ...). Always () in a blind comparison."""
    waiting: bool
    """Still waiting for its turn or for the model to load."""

    @property
    def note(self) -> str:
        """`placement` in English; "" where there is nothing to say."""
        if not self.placement:
            return ""
        how, *labels = self.placement
        return " ".join(["loaded", how, ", ".join(labels)] if labels else ["loaded"])


@dataclass
class Answer:
    """One answer while it is made and afterwards. `changed` guards what the thread writes."""

    id: str
    checkpoint: str
    """Id."""
    name: str
    label: str
    stamp: str
    """Of the checkpoint's files when the answer began."""
    dialogue: tuple[Message, ...]
    settings: Settings
    session: str
    blind: bool = False
    """The model's name is not to be given away yet."""
    started: float = field(default_factory=time.monotonic)
    changed: threading.Condition = field(default_factory=threading.Condition)
    stop: threading.Event = field(default_factory=threading.Event)
    read: float = field(default_factory=time.monotonic)
    """When somebody last looked."""
    prompt_ids: array[int] = field(default_factory=lambda: array("i"))
    """Four bytes each: many answers are kept, each with its whole prompt."""
    dropped: int = 0
    ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    response: str = ""
    """The whole text, once it has ended."""
    placement: tuple[str, ...] = ()
    leased: float | None = None
    first: float | None = None
    last: float | None = None
    """When the model was there, the first token and the last."""
    reason: Reason = ""
    error: str = ""
    out_of_memory: bool = False
    measured: Any = None
    """What `Scoring` found, kept with the answer."""

    @property
    def text(self) -> str:
        return self.response if self.reason else "".join(self.pieces)

    def event(self) -> Event:
        with self.changed:
            count, rate = len(self.ids), 0.0
            if self.first is not None and self.last is not None and self.last > self.first:
                rate = (count - 1) / (self.last - self.first)
            return Event(
                answer=self.id,
                text=self.text,
                tokens=count,
                reason=self.reason,
                tokens_per_second=rate,
                first_token_seconds=None if self.first is None else self.first - self.started,
                prompt_tokens=len(self.prompt_ids),
                dropped=self.dropped,
                placement=() if self.blind else self.placement,
                waiting=self.leased is None and not self.reason,
            )

    def raise_error(self) -> None:
        """The error that ended the answer: OutOfMemory, or another ValueError."""
        if self.error:
            raise (OutOfMemory if self.out_of_memory else ValueError)(self.error)
