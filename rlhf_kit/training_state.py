"""What an object hands over to be saved, and what it gets back: nested dicts of plain leaves.

    {"steps_done": 12, "exp_avg": {"lm_head.weight": Fragment(...)}, "rng": tensor}

A `Fragment` is a part of a tensor that all ranks hold together: saved by the ranks that own it,
read back in other pieces where the number of ranks or the ZeRO stage has changed. A plain
tensor belongs to its rank and comes back on as many ranks only. Everything else is JSON, and
the main rank's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

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
