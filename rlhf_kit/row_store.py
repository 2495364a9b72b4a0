"""Pairs in a temporary file, so that a blend may be larger than memory.

A megabyte of each store stays in memory. What is more lies in a file without a name in TMPDIR,
which is gone when the process is; in memory remain sixteen bytes a row.
"""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from random import Random
from typing import overload

from rlhf_kit.types import PreferencePair

IN_MEMORY = 1 << 20
"""Bytes of one store that are kept in memory before they are written to its file."""


class RowStore(Sequence[PreferencePair]):
    """The pairs of one source, appended one by one and read at any place, in a shuffled order."""

    def __init__(self, source: str):
        self.source = source
        self._buffer = bytearray()
        self._file: int | None = None
        self._bounds = array("q", [0])
        self._order: array[int] | None = None

    def append(self, pair: PreferencePair) -> None:
        """ValueError where the disk is full."""
        turns = [[message["role"], message["content"]] for message in pair.prompt]
        record = json.dumps([turns, pair.chosen, pair.rejected, pair.kind]).encode()
        self._bounds.append(self._bounds[-1] + len(record))
        self._buffer += record
        if len(self._buffer) > IN_MEMORY:
            self._flush()

    def _flush(self) -> None:
        try:
            if self._file is None:
                with tempfile.TemporaryFile(prefix="rlhf-kit-") as file:
                    self._file = os.dup(file.fileno())
            view = memoryview(self._buffer)
            start = self._bounds[-1] - len(view)
            while view:
                written = os.pwrite(self._file, view, start)
                view, start = view[written:], start + written
        except OSError as error:
            raise ValueError(
                f"the rows of {self.source} cannot be kept in {tempfile.gettempdir()} "
                f"({error.strerror}); name a directory with more room in TMPDIR"
            ) from error
        self._buffer = bytearray()

    def shuffle(self, seed: int, most: int | None = None) -> None:
        """Put the rows into the order that shuffling a list of them would give; keep `most`."""
        order = array("q", range(len(self._bounds) - 1))
        Random(seed).shuffle(order)  # pyright: ignore[reportArgumentType]
        self._order = order[:most]

    def __len__(self) -> int:
        return len(self._bounds) - 1 if self._order is None else len(self._order)

    @overload
    def __getitem__(self, index: int) -> PreferencePair: ...
    @overload
    def __getitem__(self, index: slice) -> list[PreferencePair]: ...
    def __getitem__(self, index: int | slice) -> PreferencePair | list[PreferencePair]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        row = range(len(self))[index]
        row = row if self._order is None else self._order[row]
        start, end = self._bounds[row], self._bounds[row + 1]
        written = self._bounds[-1] - len(self._buffer)
        if start < written:
            assert self._file is not None
            record = os.pread(self._file, end - start, start)
        else:
            record = bytes(self._buffer[start - written : end - written])
        turns, chosen, rejected, kind = json.loads(record)
        prompt = tuple({"role": role, "content": content} for role, content in turns)
        return PreferencePair(prompt, chosen, rejected, kind, self.source)  # type: ignore[arg-type]

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]


class BlendedRows(Sequence[PreferencePair]):
    """Rows of several sequences in one order; slices and selections copy places, not rows."""

    def __init__(
        self, parts: Sequence[Sequence[PreferencePair]], sources: array[int], rows: array[int]
    ):
        """Row i of it is `parts[sources[i]][rows[i]]`."""
        self._parts, self.sources, self._rows = parts, sources, rows

    def take(self, indices: Sequence[int]) -> BlendedRows:
        """The rows at these places, in their order."""
        return BlendedRows(
            self._parts,
            array(self.sources.typecode, (self.sources[i] for i in indices)),
            array(self._rows.typecode, (self._rows[i] for i in indices)),
        )

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> PreferencePair: ...
    @overload
    def __getitem__(self, index: slice) -> BlendedRows: ...
    def __getitem__(self, index: int | slice) -> PreferencePair | BlendedRows:
        if isinstance(index, slice):
            return BlendedRows(self._parts, self.sources[index], self._rows[index])
        return self._parts[self.sources[index]][self._rows[index]]

    def __iter__(self) -> Iterator[PreferencePair]:
        for source, row in zip(self.sources, self._rows, strict=True):
            yield self._parts[source][row]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return NotImplemented if not isinstance(other, Sequence) else False
        return all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]
