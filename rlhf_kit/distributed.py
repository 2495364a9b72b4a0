"""Ranks, seeds and reductions. Every function is a plain no-op in one process."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Row = TypeVar("Row")


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else int(os.environ.get("WORLD_SIZE", 1))


def local_world_size() -> int:
    """Ranks on this host: what torchrun or DeepSpeed's launcher says, else all there are."""
    here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return int(here) if here else world_size()


def is_main_rank() -> bool:
    return rank() == 0


def barrier() -> None:
    if is_distributed() and world_size() > 1:
        dist.barrier()


def print_main(*values: Any) -> None:
    """Print on rank 0 alone."""
    if is_main_rank():
        print(*values, flush=True)


def sent(values: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """`values` on `device`; the host does not wait for what a GPU still has to do."""
    if torch.device(device).type != "cuda" or values.is_cuda:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` (any shape) over all ranks; all ranks must call it."""
    if world_size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total


def all_any(flag: bool, device: torch.device | str = "cpu") -> bool:
    """True where any rank says True, so that ranks leave a loop together."""
    return bool(all_sum(torch.tensor(float(flag), device=device)).item() > 0)


_hosts: list[Any] = []
"""The process group of the hosts, made when first asked for."""


def any_host(flag: bool) -> bool:
    """`all_any` over the CPUs' own connection: no host waits for what its GPU has still to do."""
    if world_size() == 1:
        return flag
    if not _hosts:
        gloo = dist.get_backend() == "gloo"
        _hosts.append(dist.group.WORLD if gloo else dist.new_group(backend="gloo"))
    said = torch.tensor(float(flag))
    dist.all_reduce(said, op=dist.ReduceOp.SUM, group=_hosts[0])
    return said.item() > 0


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """One picklable object of every rank (of `group`), in rank order, on all of them."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part, stable across processes and machines.

    Used for data order (seed, stage, epoch) and for sampling (seed, iteration, prompt id), so
    that neither depends on the number of ranks.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)


def seed_everything(seed: int) -> None:
    """Seed Python and torch for initialisation; NumPy's legacy generator where it is loaded.

    The same on all ranks, because replicated weights must be initialised alike. What has to
    differ by rank (sampling) takes its seed from `derive_seed` and the row.
    """
    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def local_device() -> torch.device:
    """This rank's device: its GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def micro_batches(rows: Sequence[Row], size: int) -> list[Sequence[Row]]:
    """This rank's share of a global batch, in parts of at most `size` rows.

    Rank r takes rows r, r + world, ...: a global batch is the same set of rows on any number of
    ranks, and length-sorted rows spread evenly. Every rank gets as many rows, or ValueError.
    """
    ranks = world_size()
    if len(rows) % ranks:
        raise ValueError(
            f"a global batch of {len(rows)} rows can't be shared evenly by {ranks} ranks; "
            "choose a batch size that is a multiple of the number of ranks"
        )
    mine = rows[rank() :: ranks]
    return [mine[start : start + size] for start in range(0, len(mine), size)]


def filled(rows: Sequence[Row], filler: Row) -> list[Row]:
    """`rows` and as many fillers as make them an even share for each rank.

    Ranks meet in every pass, so none may have one less. The caller sees to it that a filler
    counts nothing; fillers come last, and a rank has one at most.
    """
    return [*rows, *[filler] * (-len(rows) % world_size())]


def all_max(value: torch.Tensor) -> torch.Tensor:
    """The elementwise maximum of `value` over all ranks; all ranks must call it."""
    if world_size() == 1:
        return value
    largest = value.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest
