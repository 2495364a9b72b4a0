"""What the server accepts, whoever calls: sizes, ranges, times. One sentence says what is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_kit.config import require
from rlhf_kit.types import Message

IN_TURN = "the messages must be user and assistant in turn, the first and the last the user's"


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
    """Highest."""
    top_p: float = 0.01
    """Lowest."""
    seed: int = 2**31 - 1
    """Highest; also of `attempt`."""
    seconds: float = 120.0
    """Wall time of one answer, waiting for its model not counted."""
    wait_seconds: float = 300.0
    """Wall time of waiting for a model."""
    unread_seconds: float = 20.0
    """An answer that nobody has read for so long ends: its page is gone."""
    running: int = 16
    """Answers of all sessions that wait or are decoded at once."""
    kept: int = 128
    """Answers, and comparisons, remembered for scores and votes; the oldest are forgotten."""
    updates_per_second: float = 12.0
    """Events of a stream, at most."""


@dataclass(frozen=True)
class Settings:
    """How an answer is sampled."""

    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 256
    seed: int = 0
    attempt: int = 0
    """Retries so far: each draws another answer from the same seed."""


def check_settings(
    limits: Limits,
    *,
    temperature: Any = 0.7,
    top_p: Any = 0.9,
    max_new_tokens: Any = 256,
    seed: Any = 0,
    attempt: Any = 0,
) -> Settings:
    """Settings from whatever a caller sent; ValueError with one sentence."""
    return Settings(
        temperature=_number("the temperature", temperature, 0, limits.temperature),
        top_p=_number("top-p", top_p, limits.top_p, 1),
        max_new_tokens=whole("the length", max_new_tokens, 1, limits.new_tokens),
        seed=whole("the seed", seed, 0, limits.seed),
        attempt=whole("the attempt", attempt, 0, limits.seed),
    )


def check_dialogue(limits: Limits, messages: Any, system: Any = "") -> tuple[Message, ...]:
    """A dialogue that ends with the user's question, with the system prompt first if not "".

    `messages` are dicts with `role` (user and assistant in turn) and `content`, a text or
    Gradio's `[{"type": "text", "text": ...}]`; other keys are ignored. An exchange whose answer
    is empty is left out. ValueError with one sentence.
    """
    require(
        isinstance(messages, Sequence) and not isinstance(messages, str | bytes),
        "the messages must be a list",
    )
    require(len(messages) > 0, "write a message first")
    require(
        len(messages) <= limits.messages,
        f"a dialogue may have {limits.messages} messages, not {len(messages)}; begin a new one",
    )
    instruction = check_text(limits, system, "the system prompt").strip()
    turns: list[Message] = []
    for place, message in enumerate(messages):
        role = "assistant" if place % 2 else "user"
        if not isinstance(message, Mapping) or message.get("role") != role:
            raise ValueError(IN_TURN)
        text = check_text(limits, _plain(message.get("content")), of=role)
        turns.append({"role": role, "content": text})
    require(turns[-1]["role"] == "user", IN_TURN)
    require(bool(turns[-1]["content"].strip()), "write a message first")
    total = len(instruction) + sum(len(turn["content"]) for turn in turns)
    require(
        total <= limits.dialogue_characters,
        f"a dialogue may have {limits.dialogue_characters:,} characters, not {total:,}; "
        "begin a new one",
    )
    kept: list[Message] = [{"role": "system", "content": instruction}] if instruction else []
    for question, answer in zip(turns[:-1:2], turns[1::2], strict=True):
        if answer["content"].strip():
            kept += [question, answer]
    return (*kept, turns[-1])


def check_text(limits: Limits, text: Any, what: str = "a message", of: str = "user") -> str:
    """A text within the limits, without lone surrogates, which no file and no model takes.

    An assistant's message is bounded by the length of an answer, which is counted in tokens.
    """
    most = limits.dialogue_characters if of == "assistant" else limits.message_characters
    require(isinstance(text, str), f"{what} must be text")
    require(
        len(text) <= most, f"{what} may have {most:,} characters, not {len(text):,}; shorten it"
    )
    clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text if clean == text else clean  # a conversation's answers share its texts


def check_session(session: Any) -> str:
    """The name of a browser session, a key of dicts and nothing else."""
    if not isinstance(session, str) or not 0 < len(session) <= 200:
        raise ValueError("the session must be named by a short text")
    return session


def _plain(content: Any) -> Any:
    """The text of a message as Gradio's chatbot gives it back; anything else as it is."""
    if not isinstance(content, list):
        return content
    parts: list[str] = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str) or part.get("type") != "text":
            return None
        parts.append(text)
    return "".join(parts)


def _number(what: str, value: Any, low: float, high: float) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    require(
        is_number and low <= value <= high,  # NaN is not
        f"{what} must be a number from {low:g} to {high:g}, not {shown(value)}",
    )
    return float(value)


def whole(what: str, value: Any, low: int, high: int) -> int:
    """A whole number from `low` to `high`; Gradio's 5.0 is one."""
    is_whole = (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, float) and value.is_integer()
    )
    require(
        is_whole and low <= value <= high,
        f"{what} must be a whole number from {low} to {high}, not {shown(value)}",
    )
    return int(value)


def shown(value: Any) -> str:
    """A wrong value in a sentence: short, and no object's insides."""
    if not isinstance(value, str | int | float | bool | None):
        return f"a {type(value).__name__}"
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**20 else "a huge number"
    return text if len(text) <= 40 else f"{text[:40]}..."
