"""Where raw rows come from: files, directories, the hub, or a Python function of the user's.

Every reader yields (place, row), the place as a reader of the file would name it. Files of rows a
line, CSV and Parquet are read piece by piece; a JSON list is read as a whole.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf_kit import hub_datasets, row_function
from rlhf_kit.config import require

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".csv", ".csv.gz", ".parquet")
SAVED_BY_DATASETS = ("dataset_info.json", "dataset_dict.json")
LARGEST_LINE, LARGEST_LIST = 1 << 26, 1 << 30
"""Bytes, unpacked, of one line and of one JSON list: a small archive can hold any number."""
LARGEST_CELL = 1 << 24
"""Bytes of one CSV field; beyond it a quote that is never closed has swallowed the file."""
BROKEN_ARCHIVE = (gzip.BadGzipFile, EOFError, zlib.error)

Numbered = Iterator[tuple[str, Any]]


class Broken:
    """Stands where a row should be, with the reason why there is none."""

    def __init__(self, reason: str):
        self.reason = reason


NOT_JSON = Broken("not JSON")


def read(name: str, split: str) -> Numbered:
    """(place, row) of every row of a source; a row that cannot be parsed is a `Broken`.

    Raises:
        ValueError: the source does not exist, is of no kind that can be read, or breaks off.
    """
    path = hub_datasets.local_path(name)
    if path is None:
        if row_function.FUNCTION.fullmatch(name):
            return row_function.read(name)
        require(not _looks_like_path(name), f"file {name} does not exist")
        return _read_hub(name, split)
    if not path.is_dir():
        return _read_file(path)
    if any((path / file).exists() for file in SAVED_BY_DATASETS):
        return _read_saved(path, split)
    files = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES))
    require(bool(files), f"directory {name} holds no {', '.join(SUFFIXES)} file")
    return ((f"{file.name} {place}", row) for file in files for place, row in _read_file(file))


def _looks_like_path(name: str) -> bool:
    return (
        name.startswith((".", "~", "/"))
        or "\\" in name
        or name.count("/") > 1
        or name.endswith((*SUFFIXES, ".gz", ".txt", ".tsv", ".py"))
    )


# Files -------------------------------------------------------------------------------------


def _read_file(path: Path) -> Numbered:
    require(path.name.endswith(SUFFIXES), f"file {path} is none of {', '.join(SUFFIXES)}")
    require(path.is_file(), f"file {path} is no plain file")
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    rows = {"csv": _read_csv, "parquet": _read_parquet}.get(kind, _read_json)(path)
    try:
        yield from rows
    except BROKEN_ARCHIVE as error:
        raise ValueError(f"file {path} cannot be unpacked: {error}") from error
    except OSError as error:
        raise ValueError(f"file {path} cannot be read: {error.strerror or error}") from error


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _lines(file: Any, path: Path) -> Iterator[bytes]:
    while line := file.readline(LARGEST_LINE + 1):
        require(
            len(line) <= LARGEST_LINE,
            f"file {path} has a line of more than {LARGEST_LINE >> 20} MiB; is it text?",
        )
        yield line


def _read_json(path: Path) -> Numbered:
    is_json = ".json" in path.suffixes
    with _open(path) as file:
        start = file.read(4096)
        require(
            start[:2] not in (b"\xff\xfe", b"\xfe\xff"),
            f"file {path} is UTF-16; save it as UTF-8",
        )
        file.seek(0)
        if is_json and start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
            text = file.read(LARGEST_LIST + 1)
            require(
                len(text) <= LARGEST_LIST,
                f"file {path} is a JSON list of more than {LARGEST_LIST >> 20} MiB; write a row a "
                "line (.jsonl) instead",
            )
            rows = _parse(text)
            require(isinstance(rows, list), f"file {path} begins as a JSON list but is none")
            yield from ((f"row {i}", row) for i, row in enumerate(rows, 1))
            return
        is_one_object = is_json and start.lstrip()[:1] == b"{" and start.lstrip()[1:2] in b"\r\n"
        require(
            not is_one_object,
            f"file {path} is one JSON object; write a list of rows, or a row a line",
        )
        for i, line in enumerate(_lines(file, path), 1):
            if line.strip():
                yield f"line {i}", _parse(line)


def _parse(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return NOT_JSON


def _read_csv(path: Path) -> Numbered:
    """Rows by the header's names; an empty cell is a missing value."""
    csv.field_size_limit(LARGEST_CELL)
    with _open(path) as binary:
        lines = (_text(line, path) for line in _lines(binary, path))
        reader = csv.reader(lines, strict=True)
        try:
            header = next(reader, [])
            require(len(set(header)) == len(header), f"file {path} names a column twice")
            before = reader.line_num
            for cells in reader:
                place, before = f"line {before + 1}", reader.line_num
                if not cells:
                    continue
                if len(cells) != len(header):
                    yield place, Broken("another number of cells than the header has")
                    continue
                yield place, {name: cell or None for name, cell in zip(header, cells, strict=True)}
        except csv.Error as error:
            raise ValueError(f"file {path}, line {reader.line_num}: {error}") from error


def _text(line: bytes, path: Path) -> str:
    try:
        return line.decode("utf-8-sig" if line.startswith(b"\xef\xbb\xbf") else "utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"file {path} is not UTF-8; save it as UTF-8") from None


def _read_parquet(path: Path) -> Numbered:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"file {path} is no readable Parquet: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# Datasets ----------------------------------------------------------------------------------


def _read_saved(path: Path, split: str) -> Numbered:
    import datasets

    known = hub_datasets.find(str(path))
    split = _split_of(known, split)
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises a dozen kinds, for a damaged directory
        raise ValueError(f"dataset {path} cannot be read: {_first_line(error)}") from error
    if isinstance(saved, datasets.DatasetDict):
        there = ", ".join(map(str, saved))
        require(split in saved, f"dataset {path} has no split {split}, only {there}")
        saved = saved[split]
    return ((f"row {i}", row) for i, row in enumerate(saved, 1))


def _split_of(known: tuple[str, hub_datasets.HubDataset] | None, split: str) -> str:
    if known is None:
        return split
    name, dataset = known
    if split == "train":
        return dataset.train
    if split not in ("validation", "test"):
        return split
    if dataset.evaluation is None:
        raise ValueError(
            f"{name} has a split for training alone; data.eval_share holds rows of it out"
        )
    return dataset.evaluation


def _read_hub(name: str, split: str) -> Numbered:
    dataset_id, _, revision = name.partition("@")
    known = hub_datasets.find(name)
    # A bare word would name one of the library's file readers, and `pandas` unpickles.
    if known is None and not re.fullmatch(r"[\w.-]+/[\w.-]+", dataset_id):
        raise ValueError(
            f"data source {name} is neither toy_world, nor a local path, nor owner/name on the hub"
        )
    import datasets

    options: dict[str, Any] = {"split": _split_of(known, split), "revision": revision or None}
    if known is not None:
        dataset = known[1]
        dataset_id = dataset.repository or dataset_id
        if dataset.is_script and not revision:
            # `datasets` runs no programs; the hub keeps such datasets as Parquet on a branch.
            pattern = f"{dataset.config}/{options['split']}/*.parquet"
            options["data_files"] = {options["split"]: pattern}
            options["revision"] = "refs/convert/parquet"
        elif dataset.config:
            options["name"] = dataset.config
    try:
        rows: Iterable[Any] = datasets.load_dataset(dataset_id, **options)
    except Exception as error:  # the library raises a dozen kinds, for one and the same cause
        raise ValueError(
            f"data source {name} is no local path and cannot be loaded from the hub: "
            f"{_first_line(error)}"
        ) from error
    return ((f"row {i}", row) for i, row in enumerate(rows, 1))
