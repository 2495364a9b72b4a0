"""Raw rows of any source -> `PreferencePair`; what cannot be used is counted and named.

Three schemas, one function each, in `SCHEMAS`:

* `preference`: columns `prompt` and, where the source has them, `chosen` and `rejected`; each a
  text or a list of messages. A prompt alone serves PPO, a prompt and `chosen` also SFT.
* `messages`: a list of messages that ends with the assistant's demonstration.
* `hh_rlhf`: `chosen` and `rejected` as two whole dialogues that share all but the last turn.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf_kit.config import SourceConfig
from rlhf_kit.distributed import print_main
from rlhf_kit.types import Message, PreferencePair, Stage

TOY_WORLD = "toy_world"
ROLES = ("system", "user", "assistant")
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
EXPECTED_COLUMNS = (
    "expected prompt (with chosen and rejected), messages, or chosen and rejected as whole "
    "dialogues"
)
SAVED_BY_DATASETS = ("dataset_info.json", "dataset_dict.json")

RawRow = Mapping[str, Any]
TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


class RefusedRow(ValueError):
    """One row cannot be used; the message is the reason, the same text for every such row."""


class NotForThisStage(ValueError):
    """A whole source lacks what a stage needs, such as `rejected` for the reward model."""


@dataclass
class Report:
    """What became of the rows of one source."""

    source: str
    read: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    """How many rows were refused, by reason."""
    first: dict[str, str] = field(default_factory=dict)
    """Where the first row of each reason stands: a line of a file or a row of a dataset."""

    def refuse(self, reason: str, place: str) -> None:
        self.refused[reason] = self.refused.get(reason, 0) + 1
        self.first.setdefault(reason, place)

    def lines(self) -> list[str]:
        """One line of text for each reason."""
        return [
            f"{self.source}: refused {count} of {self.read} rows: {reason} "
            f"(first: {self.first[reason]})"
            for reason, count in self.refused.items()
        ]


@dataclass(frozen=True)
class Rows:
    """The good rows of one source for one stage, and what happened to the others."""

    pairs: tuple[PreferencePair, ...]
    report: Report

    def __len__(self) -> int:
        return len(self.pairs)


# One function a schema ---------------------------------------------------------------------


def hh_rlhf(row: RawRow) -> PreferencePair:
    """Two dialogues of "Human:" and "Assistant:" turns that differ in the last turn alone.

    Raises:
        RefusedRow: a column is missing, the dialogues have different prompts, or a turn the row
            needs is empty.
    """
    dialogues = [_dialogue(_text(row, name)) for name in ("chosen", "rejected")]
    for turns in dialogues:
        if not turns or turns[-1]["role"] != "assistant":
            raise RefusedRow("no assistant turn at the end")
    chosen, rejected = dialogues
    if chosen[:-1] != rejected[:-1]:
        raise RefusedRow("chosen and rejected have different prompts")
    return _pair(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


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
    return _pair(prompt, *responses)


def messages(row: RawRow) -> PreferencePair:
    """A demonstration: messages, of which the assistant's last is the response.

    Raises:
        RefusedRow: the column is missing, or no assistant turn stands at the end.
    """
    if row.get("messages") is None:
        raise RefusedRow("missing column messages")
    *prompt, last = _messages(row["messages"])
    if last["role"] != "assistant":
        raise RefusedRow("no assistant turn at the end")
    return _pair(prompt, last["content"])


SCHEMAS: dict[str, Callable[[RawRow], PreferencePair]] = {
    "preference": preference,
    "messages": messages,
    "hh_rlhf": hh_rlhf,
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
    raise ValueError(f"found the columns {', '.join(columns) or '(none)'}; {EXPECTED_COLUMNS}")


def _pair(prompt: list[Message], chosen: str | None, rejected: str | None = None) -> PreferencePair:
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
    texts = [message["content"] for message in prompt] + [chosen or "", rejected or ""]
    if any("\ud800" <= char <= "\udfff" for text in texts for char in text):
        raise RefusedRow("broken Unicode (a lone surrogate)")
    return PreferencePair(tuple(prompt), chosen, rejected)


def _text(row: RawRow, name: str) -> str:
    if row.get(name) is None:
        raise RefusedRow(f"missing column {name}")
    if not isinstance(row[name], str):
        raise RefusedRow(f"{name} is not text")
    return row[name]


def _dialogue(text: str) -> list[Message]:
    """The turns of "Human: ... Assistant: ..." text; none where it has no such turns."""
    before, *parts = TURN.split(text.strip())
    if before.strip():
        raise RefusedRow("no user turn at the start")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        Message(role=roles[name], content=content.strip())  # pyright: ignore[reportArgumentType]
        for name, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _prompt(value: Any) -> list[Message]:
    if not isinstance(value, str):
        return _messages(value)
    text = value.strip()
    if text.startswith("Human:") and text.endswith("\n\nAssistant:"):
        return _dialogue(text)[:-1]
    return [Message(role="user", content=text)]


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


# Sources -----------------------------------------------------------------------------------


def load_source(
    source: SourceConfig,
    stage: Stage,
    *,
    seed: int = 1,
    rows: int | None = None,
    split: str = "train",
) -> Rows:
    """The rows of one source that serve `stage`: prints, and counts, those it refuses.

    Args:
        source: `toy_world`, a local file or directory, or `owner/name[@revision]` on the hub.
        seed: decides what the toy world draws; other sources come whole and in their order.
        rows: how many rows the toy world draws; at most this many are read from others.
        split: of the toy world and of hub datasets.

    Raises:
        ValueError: the source does not exist, has other columns, or no row of it can be used.
        NotForThisStage: its columns cannot serve this stage.
    """
    if source.name == TOY_WORLD:
        return _toy_world(stage, seed, rows, split)
    report = Report(source.name)
    numbered = list(_read(source.name, split, report, rows))
    if not report.read:
        raise ValueError(f"data source {source.name} is empty")
    try:
        pairs = _convert(numbered, stage, source.name, report)
    finally:
        for line in report.lines():
            print_main(line)
    return Rows(tuple(pairs), report)


def _convert(
    numbered: list[tuple[str, RawRow]], stage: Stage, name: str, report: Report
) -> list[PreferencePair]:
    if not numbered:
        raise ValueError(_nothing_left(name, report))
    columns = {column for _, row in numbered for column in row}
    try:
        answered = (row for _, row in numbered if row.get("chosen") is not None)
        schema = detect_schema(columns, next(answered, {}))
    except ValueError as error:
        raise ValueError(f"data source {name}: {error}") from None
    needed = {"sft": ["chosen"], "reward": ["chosen", "rejected"], "ppo": []}[stage]
    served = ["chosen"] if schema == "messages" else columns
    if missing := [column for column in needed if column not in served]:
        raise NotForThisStage(
            f"data source {name} has no {' and no '.join(missing)}, which stage {stage} needs; "
            f"its columns are {', '.join(sorted(columns))}"
        )
    pairs: list[PreferencePair] = []
    for place, row in numbered:
        try:
            pair = SCHEMAS[schema](row)
            if lacking := [column for column in needed if getattr(pair, column) is None]:
                raise RefusedRow(f"missing column {lacking[0]}")
        except RefusedRow as refused:
            report.refuse(str(refused), place)
            continue
        kind = row.get("kind")
        pairs.append(replace(pair, kind=kind if isinstance(kind, str) else "", source=name))
    if not pairs:
        raise ValueError(_nothing_left(name, report))
    return pairs


def _nothing_left(name: str, report: Report) -> str:
    reasons = ", ".join(f"{count} x {reason}" for reason, count in report.refused.items())
    return f"data source {name}: none of its {report.read} rows can be used ({reasons})"


def _toy_world(stage: Stage, seed: int, rows: int | None, split: str) -> Rows:
    from rlhf_kit import toy_world

    if not rows:
        raise ValueError("the toy world has no end: say how many rows to draw (data.rows)")
    draw = {
        "sft": toy_world.demonstrations,
        "reward": toy_world.preferences,
        "ppo": toy_world.prompts,
    }[stage]
    # Label noise belongs to training: an accuracy on flipped labels could not reach 1.
    noise = {"flip": 0.0} if stage == "reward" and split != "train" else {}
    pairs = tuple(
        PreferencePair(
            tuple(row["prompt"]),
            row.get("response", row.get("chosen")),
            row.get("rejected"),
            kind=row.get("kind", ""),
            source=TOY_WORLD,
        )
        for row in draw(rows, seed=seed, split=split, **noise)
    )
    return Rows(pairs, Report(TOY_WORLD, read=len(pairs)))


def _read(name: str, split: str, report: Report, limit: int | None) -> Iterator[tuple[str, RawRow]]:
    """Raw rows with their places; counts all of them and refuses what is no JSON object."""
    path = Path(name).expanduser()
    if not path.exists():
        if _looks_like_path(name):
            raise ValueError(f"file {name} does not exist")
        raw = _read_hub(name, split)
    elif path.is_dir() and any((path / file).exists() for file in SAVED_BY_DATASETS):
        raw = _read_saved(path, split)
    elif path.is_dir():
        files = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES))
        if not files:
            raise ValueError(f"directory {name} holds no {', '.join(SUFFIXES)} file")
        raw = (row for file in files for row in _read_file(file, f"{file.name} "))
    else:
        raw = _read_file(path)
    for place, row in raw:
        if limit and report.read >= limit:
            return
        report.read += 1
        if isinstance(row, Mapping):
            yield place, row
        else:
            report.refuse("not JSON" if row is _NOT_JSON else "not a JSON object", place)


_NOT_JSON = object()


def _looks_like_path(name: str) -> bool:
    return (
        name.startswith((".", "~", "/"))
        or "\\" in name
        or name.count("/") > 1
        or name.endswith((*SUFFIXES, ".gz", ".csv", ".txt", ".parquet"))
    )


def _read_file(path: Path, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"file {path} is none of {', '.join(SUFFIXES)}")
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"file {path} cannot be unpacked: {error}") from error
    if ".json" in path.suffixes and data.lstrip()[:1] == b"[":
        rows = _parse(data)
        if not isinstance(rows, list):
            raise ValueError(f"file {path} begins as a JSON list but is none")
        yield from ((f"{prefix}row {i}", row) for i, row in enumerate(rows, 1))
        return
    for i, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            yield f"{prefix}line {i}", _parse(line)


def _parse(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _NOT_JSON


def _read_saved(path: Path, split: str) -> Iterator[tuple[str, Any]]:
    import datasets

    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            there = ", ".join(map(str, saved))
            raise ValueError(f"dataset {path} has no split {split}, only {there}")
        saved = saved[split]
    return ((f"row {i}", row) for i, row in enumerate(saved, 1))


def _read_hub(name: str, split: str) -> Iterator[tuple[str, Any]]:
    dataset_id, _, revision = name.partition("@")
    # A bare word would name one of the library's file readers, and `pandas` unpickles.
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", dataset_id):
        raise ValueError(
            f"data source {name} is neither toy_world, nor a local path, nor owner/name on the hub"
        )
    import datasets

    try:
        dataset = datasets.load_dataset(dataset_id, split=split, revision=revision or None)
    except Exception as error:  # the library raises a dozen kinds, for one and the same cause
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"data source {name} is no local path and cannot be loaded from the hub: {reason}"
        ) from error
    return ((f"row {i}", row) for i, row in enumerate(dataset, 1))
