"""What the server accepts, whoever calls: sizes, ranges, times. One sentence says what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_kit.types import Message


@dataclass(frozen=True)
class Limits:
    """One set for every caller: the page, its HTTP API, a script."""

    message_characters: int = 20_000
    """One message, the system prompt included."""
    dialogue_characters: int = 200_000
    """All messages of a dialogue together."""
    messages: int = 200
    """Messages of a dialogue, the question included."""
    new_tokens: int = 2048
    """Longest answer."""
    temperature: float = 2.0
    top_p: float = 0.01
    """Smallest top-p."""
    seed: int = 2**31 - 1
    seconds: float = 120.0
    """Wall time of one answer, waiting for its turn not counted."""
    wait_seconds: float = 300.0
    """Wall time of waiting for a model."""
    unread_seconds: float = 20.0
    """An answer that nobody has read for so long ends: its page is gone."""
    updates_per_second: float = 12.0
    """Events of a stream, at most."""


@dataclass(frozen=True)
class Settings:
    """How an answer is sampled."""

    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 256
    seed: int = 0


def check_settings(
    limits: Limits,
    *,
    temperature: Any = 0.7,
    top_p: Any = 0.9,
    max_new_tokens: Any = 256,
    seed: Any = 0,
) -> Settings:
    """Settings from whatever a caller sent; ValueError with one sentence."""
    raise NotImplementedError


def check_dialogue(limits: Limits, messages: Any, system: Any = "") -> tuple[Message, ...]:
    """A dialogue that ends with the user's question, with the system prompt first if not "".

    `messages` are dicts with `role` (user, assistant) and `content`, a text or Gradio's
    `[{"type": "text", "text": ...}]`; other keys are ignored. ValueError with one sentence.
    """
    raise NotImplementedError


__all__ = ["Limits", "Sequence", "Settings", "check_dialogue", "check_settings"]
