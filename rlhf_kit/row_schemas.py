"""One raw row -> `PreferencePair`, for the schemas that are recognised by their columns.

* `preference`: columns `prompt` and, where the source has them, `chosen` and `rejected`; each a
  text or a list of messages. A prompt alone serves PPO, a prompt and `chosen` also SFT.
* `messages`: a list of messages that ends with the assistant's demonstration.
* `hh_rlhf`: `chosen` and `rejected` as two whole dialogues that share all but the last turn.
* `alpaca`: `instruction`, an optional `input`, and `output`.
* `sharegpt`: `conversations`, a list of {"from": human, gpt or system, "value": text}.

Datasets of the hub with columns of their own have their functions in hub_datasets.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rlhf_kit.config import printable
from rlhf_kit.types import Message, PreferencePair

RawRow = Mapping[str, Any]

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
EXPECTED_COLUMNS = (
    "expected prompt (with chosen and rejected), messages, instruction and output, conversations, "
    "or chosen and rejected as whole dialogues"
)


class RefusedRow(ValueError):
    """One row cannot be used; the message is the reason, the same text for every such row."""


def hh_rlhf(row: RawRow) -> PreferencePair:
    """Two dialogues of "Human:" and "Assistant:" turns that differ in the last turn alone.

    Raises:
        RefusedRow: a column is missing, the dialogues have different prompts, or a turn the row
            needs is empty.
    """
    dialogues = [hh_turns(text_of(row, name)) for name in ("chosen", "rejected")]
    for turns in dialogues:
        if not turns or turns[-1]["role"] != "assistant":
            raise RefusedRow("no assistant turn at the end")
    chosen, rejected = dialogues
    if chosen[:-1] != rejected[:-1]:
        raise RefusedRow("chosen and rejected have different prompts")
    return checked_pair(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def preference(row: RawRow) -> PreferencePair:
    """A prompt and up to two responses to it, as texts or as lists of messages.

    A text written as "Human: ... Assistant:" is read as turns. Where `prompt` is missing, the
    messages of `chosen` before its last are the prompt.

    Raises:
        RefusedRow: a column is missing or not text, or a turn the row needs is empty.
    """
    prompt = _prompt(row["prompt"]) if row.get("prompt") is not None else None
    responses: list[str | None] = []
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            responses.append(None)
        elif isinstance(row[name], str):
            responses.append(row[name].strip())
        else:
            *before, last = _messages(row[name])
            if last["role"] != "assistant":
                raise RefusedRow("no assistant turn at the end")
            if before and prompt is not None and before != prompt:
                raise RefusedRow(f"{name} repeats another prompt")
            prompt = before if prompt is None else prompt
            responses.append(last["content"])
    if prompt is None:
        raise RefusedRow("missing column prompt")
    return checked_pair(prompt, *responses)


def messages(row: RawRow) -> PreferencePair:
    """A demonstration: messages, of which the assistant's last is the response.

    Raises:
        RefusedRow: the column is missing, or no assistant turn stands at the end.
    """
    if row.get("messages") is None:
        raise RefusedRow("missing column messages")
    return _demonstration(_messages(row["messages"]))


def alpaca(row: RawRow) -> PreferencePair:
    """A demonstration: `instruction`, below it the `input` where there is one, and `output`.

    Raises:
        RefusedRow: instruction or output is missing, empty or no text.
    """
    prompt = text_of(row, "instruction").strip()
    if row.get("input") is not None and (context := text_of(row, "input").strip()):
        prompt = f"{prompt}\n\n{context}" if prompt else ""
    return checked_pair([user_turn(prompt)], text_of(row, "output").strip())


def sharegpt(row: RawRow) -> PreferencePair:
    """A demonstration: turns of `from` (human, gpt, system) and `value`, a gpt turn at the end.

    Raises:
        RefusedRow: the column is missing, a turn is not of this form, or none of gpt ends it.
    """
    value = row.get("conversations")
    if value is None:
        raise RefusedRow("missing column conversations")
    if not isinstance(value, list | tuple) or not value:
        raise RefusedRow("no messages where messages are expected")
    turns: list[dict[str, Any]] = []
    for turn in value:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
            raise RefusedRow("a turn without from and value")
        sender = turn.get("from")
        role = SHAREGPT_ROLES.get(sender) if isinstance(sender, str) else None
        if role is None:
            raise RefusedRow(f"a turn from another than {', '.join(SHAREGPT_ROLES)}")
        turns.append({"role": role, "content": turn["value"]})
    return _demonstration(_messages(turns))


SCHEMAS: dict[str, Callable[[RawRow], PreferencePair]] = {
    "preference": preference,
    "messages": messages,
    "hh_rlhf": hh_rlhf,
    "alpaca": alpaca,
    "sharegpt": sharegpt,
}


def detect_schema(columns: Iterable[str], example: RawRow) -> str:
    """The name of the schema these columns are of; `example` tells texts from messages.

    Raises:
        ValueError: no schema has these columns; names those found and those expected.
    """
    columns = sorted(columns)
    if "prompt" in columns:
        return "preference"
    if "messages" in columns:
        return "messages"
    if "chosen" in columns and "rejected" in columns:
        return "hh_rlhf" if isinstance(example.get("chosen"), str) else "preference"
    if "instruction" in columns and "output" in columns:
        return "alpaca"
    if "conversations" in columns:
        return "sharegpt"
    found = ", ".join(map(printable, columns)) or "(none)"
    raise ValueError(f"found the columns {found}; {EXPECTED_COLUMNS}")


def served(schema: str, columns: Iterable[str]) -> set[str]:
    """Which of `chosen` and `rejected` rows of this schema and these columns can fill."""
    return {"chosen"} if schema in ("messages", "alpaca", "sharegpt") else set(columns)


# What the functions share ------------------------------------------------------------------


def checked_pair(
    prompt: list[Message], chosen: str | None, rejected: str | None = None
) -> PreferencePair:
    """The record, unless the row cannot be trained on; see the reasons below."""
    if not prompt:
        raise RefusedRow("empty prompt")
    if not any(message["role"] == "user" for message in prompt):
        raise RefusedRow("no user turn")
    if prompt[-1]["role"] != "user":
        raise RefusedRow("the prompt does not end with a user turn")
    if not all(message["content"] for message in prompt):
        raise RefusedRow("empty prompt")
    if chosen == "" or rejected == "":
        raise RefusedRow("empty response")
    if chosen is not None and chosen == rejected:
        raise RefusedRow("equal chosen and rejected")
    for text in (*(message["content"] for message in prompt), chosen or "", rejected or ""):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RefusedRow("broken Unicode (a lone surrogate)") from None
    return PreferencePair(tuple(prompt), chosen, rejected)


def user_turn(text: str) -> Message:
    return Message(role="user", content=text.strip())


def text_of(row: RawRow, name: str) -> str:
    """The text in a column; RefusedRow where it is missing or something else."""
    if row.get(name) is None:
        raise RefusedRow(f"missing column {name}")
    if not isinstance(row[name], str):
        raise RefusedRow(f"{name} is not text")
    return row[name]


def turns_of(text: str, turn: re.Pattern[str], roles: Mapping[str, str]) -> list[Message]:
    """The turns of a text in which `turn` finds who speaks; what stands before them is refused."""
    before, *parts = turn.split(text.strip())
    if before.strip():
        raise RefusedRow("no user turn at the start")
    return [
        Message(role=roles[name], content=content.strip())  # pyright: ignore[reportArgumentType]
        for name, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def hh_turns(text: str) -> list[Message]:
    """The turns of "Human: ... Assistant: ..." text; none where it has no such turns."""
    return turns_of(text, HH_TURN, HH_ROLES)


def _prompt(value: Any) -> list[Message]:
    if not isinstance(value, str):
        return _messages(value)
    text = value.strip()
    if text.startswith("Human:") and text.endswith("\n\nAssistant:"):
        return hh_turns(text)[:-1]
    return [user_turn(text)]


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list | tuple) or not value:
        raise RefusedRow("no messages where messages are expected")
    found: list[Message] = []
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise RefusedRow("a message without role and content")
        if message.get("role") not in ROLES:
            raise RefusedRow(f"a role other than {', '.join(ROLES)}")
        found.append(Message(role=message["role"], content=message["content"].strip()))
    return found


def _demonstration(turns: Sequence[Message]) -> PreferencePair:
    *prompt, last = turns
    if last["role"] != "assistant":
        raise RefusedRow("no assistant turn at the end")
    return checked_pair(prompt, last["content"])
