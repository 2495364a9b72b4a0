"""Which elements of each trained parameter this rank's optimiser works on, under any ZeRO stage.

DeepSpeed keeps AdamW's state by flat buffers, not by parameters. These maps lead from one to the
other, so that what was saved under one stage and number of ranks is found under another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_kit import distributed


def shard(parameter: nn.Parameter) -> tuple[tuple[int, ...], int, int]:
    """Shape of the whole, first element and number of elements that this rank stores.

    All of them, except under ZeRO-3: there the last ranks' shards end in padding, or are nothing
    but padding, which is not counted.
    """
    if not hasattr(parameter, "ds_id"):
        return tuple(parameter.shape), 0, parameter.numel()
    whole: Any = parameter
    length = whole.ds_tensor.ds_numel
    start = min(length * distributed.rank(), whole.ds_numel)
    return tuple(whole.ds_shape), start, min(length, whole.ds_numel - start)


def _is_whole(parameter: Any) -> bool:
    return parameter.ds_status.name == "AVAILABLE"


@contextlib.contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Whole parameters on every rank, where ZeRO-3 has cut them into shards; all ranks call it.

    Not for a forward: DeepSpeed's hooks may partition the parameters again behind its back.
    """
    apart = [p for p in parameters if hasattr(p, "ds_id") and not _is_whole(p)]
    if not apart:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(apart):
        yield


def put_away(parameters: Iterable[nn.Parameter]) -> None:
    """Leave only the shards of what ZeRO-3 holds whole: after a step, small parameters are.

    Who writes to shards has to, before: a parameter that is whole is not gathered from them.
    """
    whole: list[Any] = [p for p in parameters if hasattr(p, "ds_id") and _is_whole(p)]
    if whole:
        whole[0].partition(param_list=whole, has_been_updated=False)


@dataclass(frozen=True)
class Part:
    """A stretch of one parameter, and where this rank's optimiser keeps it."""

    name: str
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    start: int
    """Its first element in the flattened parameter."""
    length: int
    """Its number of elements; 0 where other ranks have them all."""
    master: Tensor
    """What AdamW steps, and keys its state by: the parameter, or a flat buffer of many."""
    offset: int
    """Place of the first element in `master`."""

    def of(self, buffer: Tensor) -> Tensor:
        """[length] view of `buffer`, which is `master` or a moment of it."""
        return buffer.detach().view(-1)[self.offset : self.offset + self.length]


def optimizer_parts(module: nn.Module, optimizer: Any) -> list[Part]:
    """One part of each trained parameter of a DeepSpeed engine's module, in the module's order."""
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if isinstance(optimizer, torch.optim.Optimizer):  # no ZeRO: every rank steps the whole
        return [Part(name, tuple(p.shape), 0, p.numel(), p, 0) for name, p in trained]
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return [_stage_3(name, p, optimizer) for name, p in trained]
    masters = {
        id(p): flat
        for group, flat in zip(
            optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True
        )
        for p in group
    }
    return [_stage_1_or_2(name, p, masters[id(p)]) for name, p in trained]


def _stage_1_or_2(name: str, parameter: Any, master: Tensor) -> Part:
    mapping = parameter._hp_mapping
    if mapping is None:
        return Part(name, tuple(parameter.shape), 0, 0, master, 0)
    part, place = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Part(name, tuple(parameter.shape), part.start, part.numel, master, place.start)


def _stage_3(name: str, parameter: Any, optimizer: Any) -> Part:
    shape, start, length = shard(parameter)
    group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    return Part(name, shape, start, length, optimizer.fp32_partitioned_groups_flat[group], offset)


def adam_state(adamw: torch.optim.Optimizer, master: Tensor) -> dict[str, Tensor]:
    """AdamW's `step`, `exp_avg` and `exp_avg_sq` of one tensor, begun as its first step would."""
    state = adamw.state[master]
    if not state:
        fused = adamw.param_groups[0]["fused"]  # the kernel reads the count on the device
        state["step"] = torch.zeros((), device=master.device if fused else "cpu")
        state["exp_avg"] = torch.zeros_like(master, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(master, memory_format=torch.preserve_format)
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment].requires_grad_(False)
    return state


def publish_masters(optimizer: Any) -> None:
    """Make the live weights what an optimiser step leaves: masters cast to the weights' dtype.

    All ranks must call it; they exchange their partitions. Without ZeRO the two are one.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        return
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.update_lp_params()
        return
    optimizer._partition_all_parameters()
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
