"""Memory of a device that is given up while nobody needs what is in it.

The bytes wait in pinned host memory, which is taken once. Tensors stay what they are, views and
all: only the storage below them is emptied, and filled again when it comes back. Both copies are
queued on the device's current stream, so no host waits, and what is freed is used again no sooner
than it was copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


class Parked:
    """Some tensors, here or away."""

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], *, frozen: bool = False):
        """`tensors` are asked for whenever they leave; `frozen` ones are copied once and for all.

        Tensors of one storage leave together, whether all are named or not.
        """
        self._tensors = tensors
        self._frozen = frozen
        self._host: dict[int, Tensor] = {}
        """Bytes of each storage, by its place in the order of `tensors`."""
        self._away: list[torch.UntypedStorage] = []

    @property
    def is_away(self) -> bool:
        return bool(self._away)

    @property
    def nbytes(self) -> int:
        """Bytes of the device that leaving gives back."""
        return sum(len(host) for host in self._host.values())

    def leave(self) -> None:
        """Give the device's memory back, until `come`. Nothing happens where it is away already."""
        if self._away:
            return
        for place, storage in enumerate(_storages(self._tensors())):
            host = self._host.get(place)
            if host is None or len(host) != storage.nbytes():
                self._host[place] = host = _host_bytes(storage.nbytes(), storage.device)
                host.copy_(_bytes(storage), non_blocking=True)
            elif not self._frozen:
                host.copy_(_bytes(storage), non_blocking=True)
            storage.resize_(0)
            self._away.append(storage)

    def come(self) -> None:
        """Bring everything back, bit for bit. Nothing happens where it is here already."""
        for place, storage in enumerate(self._away):
            host = self._host[place]
            storage.resize_(len(host))
            _bytes(storage).copy_(host, non_blocking=True)
        self._away = []


def parked_module(module: nn.Module, device: torch.device) -> Parked:
    """A frozen module of the CPU for `device`, away: none of it need ever have been there at once.

    Its buffers, which are small, stay on the device.
    """
    parked = Parked(module.parameters, frozen=True)
    for place, parameter in enumerate(module.parameters()):
        parked._host[place] = host = _host_bytes(parameter.nbytes, device)
        host.copy_(parameter.detach().contiguous().view(-1).view(torch.uint8))
        parameter.data = torch.empty_like(parameter, device=device).contiguous()
        storage = parameter.untyped_storage()
        storage.resize_(0)
        parked._away.append(storage)
    module.to(device)
    return parked


def _storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """Those of some tensors, each once, without empty ones."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr()] = storage
    return list(found.values())


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[arg-type]


def _host_bytes(count: int, device: torch.device) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, pin_memory=device.type == "cuda")
