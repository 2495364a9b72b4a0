"""What an object hands over to be saved, and what it gets back: nested dicts of plain leaves.

    {"steps_done": 12, "exp_avg": {"lm_head.weight": Fragment(...)}, "rng": tensor}

A `Fragment` is a part of a tensor that all ranks hold together: saved by the ranks that own it,
read back in other pieces where the number of ranks or the ZeRO stage has changed. A plain
tensor belongs to its rank and comes back on as many ranks only. Everything else is JSON, and
the main rank's.

On disk rank K's tensors are `rank-K.safetensors`, whose header says of which whole each fragment
is a part, and the rest is the main rank's `state.json`. Nothing is pickled.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf_kit.config import require

State = dict[str, Any]


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + n) of a flattened tensor of `shape`.

    Where every rank holds the whole, the main rank alone hands it over.
    """

    data: Tensor
    """[n], on any device; copied before training goes on."""
    start: int
    """Place of its first element in the flattened whole."""
    shape: tuple[int, ...]
    """Shape of the whole."""


class Stored(Protocol):
    """A whole tensor on disk, in as many fragments as it was saved in."""

    shape: tuple[int, ...]

    def read(self, start: int, length: int) -> Tensor:
        """Elements [start, start + length) as a 1-D tensor on the CPU."""
        ...


class Stateful(Protocol):
    """An object that training cannot go on without."""

    def state(self) -> State:
        """All that changes while training; live tensors, not copies. All ranks call it."""
        ...

    def load_state(self, state: State) -> None:
        """Take back a state: `Stored` in place of each Fragment, absent rank tensors as None."""
        ...


# ---- to disk


@dataclass(frozen=True)
class Snapshot:
    """One rank's state, copied to the CPU so that it can be written while training goes on."""

    values: State
    """The JSON part, nested as in the state."""
    tensors: dict[str, Tensor]
    """By path, as in `engine/weights/lm_head.weight`."""
    fragments: dict[str, tuple[int, tuple[int, ...]]]
    """Start and shape of the whole, for those tensors that are fragments."""

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def snapshot(state: State) -> Snapshot:
    """Copy a state. All its tensors are read here, so training may go on after it returns."""
    tensors: dict[str, Tensor] = {}
    fragments: dict[str, tuple[int, tuple[int, ...]]] = {}

    def copy(value: Any, path: str) -> Any:
        if isinstance(value, dict):
            inner = {key: copy(item, _join(path, key)) for key, item in value.items()}
            return {key: item for key, item in inner.items() if item is not _TENSOR}
        if isinstance(value, Fragment):
            fragments[path] = value.start, tuple(value.shape)
            value = value.data.reshape(-1)
        if isinstance(value, Tensor):
            tensors[path] = torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())
            return _TENSOR
        assert _is_json(value), f"{path} is of type {type(value).__name__}, which JSON lacks"
        return value

    return Snapshot(copy(state, ""), tensors, fragments)


def write(taken: Snapshot, directory: Path, *, rank: int) -> None:
    """Write `rank-K.safetensors`, and on rank 0 state.json."""
    from safetensors.torch import save_file

    save_file(
        taken.tensors,
        directory / f"rank-{rank}.safetensors",
        {"fragments": json.dumps(taken.fragments)},
    )
    if rank == 0:
        (directory / "state.json").write_text(json.dumps(taken.values), encoding="utf-8")


# ---- from disk


def read(directory: Path, *, rank: int, ranks: int) -> State:
    """What `write` was given by all ranks, as `Stateful.load_state` wants it.

    Rank tensors are None unless the state was saved by as many ranks. Fragments are read when
    they are asked for.
    """
    files = [
        _RankFile(directory / f"rank-{number}.safetensors")
        for number in range(len(list(directory.glob("rank-*.safetensors"))))
    ]
    state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
    paths = sorted({path for file in files for path in file.names})
    for path in paths:
        holders = [file for file in files if path in file.names]
        if path in holders[0].fragments:
            leaf: Any = StoredFragments(path, holders)
        else:
            own = len(files) == ranks and path in files[rank].names
            leaf = files[rank].tensor(path) if own else None
        _insert(state, path, leaf)
    return state


class StoredFragments:
    """A `Stored` whose fragments lie in the files of the ranks that saved it."""

    def __init__(self, path: str, files: list[_RankFile]):
        self.path = path
        self.shape: tuple[int, ...] = files[0].fragments[path][1]
        self._parts = sorted(
            ((*file.span(path), file) for file in files), key=lambda part: part[:2]
        )

    def read(self, start: int, length: int) -> Tensor:
        """Elements [start, start + length); ValueError where no rank has saved one of them."""
        end, pieces = start + length, []
        for first, last, file in self._parts:
            if first <= start < last:
                pieces.append(file.elements(self.path, start - first, min(end, last) - first))
                start += pieces[-1].numel()
            if start >= end:
                break
        if not pieces:  # of nothing there is everything
            pieces.append(self._parts[0][2].elements(self.path, 0, 0))
        require(start >= end, f"{self.path}: elements {start} to {end} are in no rank's file")
        return torch.cat(pieces)


class _RankFile:
    """One rank's safetensors file, open; tensors are copied out of it when asked for."""

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        try:
            self._file: Any = safe_open(path, framework="pt")
            self.names = set(self._file.keys())
            fragments = json.loads(self._file.metadata()["fragments"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no part of a checkpoint: {error}") from None
        self.fragments = {name: (start, tuple(shape)) for name, (start, shape) in fragments.items()}

    def tensor(self, name: str) -> Tensor:
        return self._file.get_tensor(name).clone()

    def span(self, name: str) -> tuple[int, int]:
        """Of a fragment: its first element in the whole, and the one after its last."""
        start = self.fragments[name][0]
        return start, start + self._file.get_slice(name).get_shape()[0]

    def elements(self, name: str, start: int, end: int) -> Tensor:
        return self._file.get_slice(name)[start:end].clone()


# ---- paths in a state

_TENSOR = object()
"""Stands for a tensor that was taken out of the JSON part."""


def _join(path: str, key: Any) -> str:
    assert isinstance(key, str), f"{path}: the key {key!r} is no string"
    key = key.replace("~", "~0").replace("/", "~1")  # as in a JSON pointer
    return f"{path}/{key}" if path else key


def _insert(state: State, path: str, leaf: Any) -> None:
    *above, last = (part.replace("~1", "/").replace("~0", "~") for part in path.split("/"))
    for key in above:
        state = state.setdefault(key, {})
    state[last] = leaf


def _is_json(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_json(v) for k, v in value.items())
    return value is None or isinstance(value, bool | int | float | str)
