"""Raw rows of any source -> `PreferencePair`; what cannot be used is counted and named.

Which function reads a row is decided by the source's name, where it is a dataset of
hub_datasets.py, and by its columns otherwise (row_schemas.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from rlhf_kit import data_files, hub_datasets
from rlhf_kit.config import SourceConfig, printable, require
from rlhf_kit.distributed import print_main
from rlhf_kit.row_schemas import EXPECTED_COLUMNS as EXPECTED_COLUMNS
from rlhf_kit.row_schemas import SCHEMAS, RawRow, RefusedRow, served
from rlhf_kit.row_schemas import detect_schema as detect_schema
from rlhf_kit.row_schemas import hh_rlhf as hh_rlhf
from rlhf_kit.row_schemas import messages as messages
from rlhf_kit.row_schemas import preference as preference
from rlhf_kit.types import PreferencePair, Stage

TOY_WORLD = "toy_world"
FIRST_ROWS = 1000
"""Rows whose columns decide how a source is read, unless they do not serve the stage."""
FEW = 8
"""Places that a report keeps for each reason."""
NEEDED: dict[Stage, tuple[str, ...]] = {
    "sft": ("chosen",),
    "reward": ("chosen", "rejected"),
    "ppo": (),
}
"""The responses a stage needs."""


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
    places: dict[str, list[str]] = field(default_factory=dict)
    """The same of the first few."""

    def refuse(self, reason: str, place: str) -> None:
        self.refused[reason] = self.refused.get(reason, 0) + 1
        self.first.setdefault(reason, place)
        if len(places := self.places.setdefault(reason, [])) < FEW:
            places.append(place)

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
        source: `toy_world`, a local file or directory, `owner/name[@revision]` on the hub, or a
            Python function (`file.py:function`, `module:function`).
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
    return Rows(tuple(stream_source(source, stage, report, rows=rows, split=split)), report)


def stream_source(
    source: SourceConfig,
    stage: Stage,
    report: Report,
    *,
    rows: int | None = None,
    split: str = "train",
) -> Iterator[PreferencePair]:
    """The same rows one by one, for sources larger than memory; not for the toy world.

    What is refused is counted in `report`, and printed at the end. Raises what `load_source`
    raises, some of it after the last row.
    """
    try:
        for _, pair in numbered_pairs(source.name, stage, report, rows=rows, split=split):
            yield pair
    finally:
        for line in report.lines():
            print_main(line)


def numbered_pairs(
    name: str, stage: Stage, report: Report, *, rows: int | None = None, split: str = "train"
) -> Iterator[tuple[str, PreferencePair]]:
    """The same with the place of each row, and nothing printed about those refused."""
    raw = _numbered(name, split, report, rows)
    first = list(islice(raw, FIRST_ROWS))
    if not report.read:
        raise ValueError(f"data source {name} is empty")
    read = _reader(name, stage, split, rows, first)
    good = 0
    for place, row in chain(first, raw):
        try:
            pair = read(row)
            if lacking := [column for column in NEEDED[stage] if getattr(pair, column) is None]:
                raise RefusedRow(f"missing column {lacking[0]}")
        except RefusedRow as refused:
            report.refuse(str(refused), place)
            continue
        good += 1
        kind = row.get("kind")
        yield (
            place,
            PreferencePair(
                pair.prompt,
                pair.chosen,
                pair.rejected,
                kind=kind if isinstance(kind, str) else "",
                source=name,
            ),
        )
    if not good:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in report.refused.items())
        raise ValueError(
            f"data source {name}: none of its {report.read} rows can be used ({reasons})"
        )


def _numbered(
    name: str, split: str, report: Report, limit: int | None
) -> Iterator[tuple[str, RawRow]]:
    """Raw rows with their places; counts all of them and refuses what is no JSON object."""
    for place, row in data_files.read(name, split):
        if limit and report.read >= limit:
            return
        report.read += 1
        if isinstance(row, Mapping):
            yield place, row
        else:
            is_broken = isinstance(row, data_files.Broken)
            report.refuse(row.reason if is_broken else "not a JSON object", place)


def _reader(
    name: str,
    stage: Stage,
    split: str,
    limit: int | None,
    first: list[tuple[str, RawRow]],
) -> Callable[[RawRow], PreferencePair]:
    """The function that reads this source's rows. ValueError where none does or can serve."""
    if known := hub_datasets.find(name):
        if known[0] != name.partition("@")[0]:
            print_main(f"data source {name} is read as {known[0]}, whose name it holds")
        _require_served(name, stage, known[1].serves, known[1].serves | {"prompt"})
        return known[1].read
    if not first:  # no row is an object: the caller says why
        return SCHEMAS["preference"]
    try:
        return _by_columns(name, stage, (row for _, row in first))
    except ValueError:
        if len(first) < FIRST_ROWS:  # these were all
            raise
    again = _numbered(name, split, Report(name), limit)
    return _by_columns(name, stage, (row for _, row in again))


def _by_columns(
    name: str, stage: Stage, rows: Iterable[RawRow]
) -> Callable[[RawRow], PreferencePair]:
    columns: set[str] = set()
    example: RawRow | None = None  # with `chosen`, which tells texts from messages
    for row in rows:
        columns.update(column for column in row if isinstance(column, str))
        if example is None and row.get("chosen") is not None:
            example = row
    try:
        schema = detect_schema(columns, example or {})
    except ValueError as error:
        raise ValueError(f"data source {name}: {error}") from None
    _require_served(name, stage, served(schema, columns), columns)
    return SCHEMAS[schema]


def _require_served(name: str, stage: Stage, serves: Iterable[str], columns: Iterable[str]) -> None:
    if missing := [column for column in NEEDED[stage] if column not in serves]:
        raise NotForThisStage(
            f"data source {name} has no {' and no '.join(missing)}, which stage {stage} needs; "
            f"its columns are {', '.join(map(printable, sorted(columns)))}"
        )


def _toy_world(stage: Stage, seed: int, rows: int | None, split: str) -> Rows:
    from rlhf_kit import toy_world

    require(bool(rows), "the toy world has no end: say how many rows to draw (data.rows)")
    draw: Any = {
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
