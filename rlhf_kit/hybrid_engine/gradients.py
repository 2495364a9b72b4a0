"""What DeepSpeed has accumulated since the last step: whether it is finite, and away with it.

DeepSpeed 0.19 has no call for either. Where it keeps gradients depends on the ZeRO stage, on
offload and on the dtype; the tests hold this file to its promise, bitwise, in every stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def accumulated(engine: Any) -> Iterator[Tensor]:
    """Every tensor of this rank that holds accumulated gradients of a DeepSpeed engine.

    Between two steps a gradient may lie in several of them, or, before its first reduction, be
    this rank's part of a sum only.
    """
    for parameter in engine.module.parameters():
        for name in ("grad", "grad_accum"):
            if (gradient := getattr(parameter, name, None)) is not None:
                yield gradient
    for name in ("averaged_gradients", "all_grad_tensors"):  # ZeRO 1 to 3, by parameter group
        for group in getattr(engine.optimizer, name, {}).values():
            yield from (tensor for tensor in group or () if tensor is not None)
    yield from getattr(engine.optimizer, "accumulated_grads_in_cpu", {}).values()
    partitions = getattr(
        engine.optimizer, "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition", {}
    )
    for key in getattr(engine.optimizer, "_offload_boundary_param_ids", ()):  # ZeRO-3, offloaded
        if key in partitions:
            yield partitions[key]


def are_finite(engine: Any) -> bool:
    """Whether no accumulated gradient of this rank holds a NaN or an infinity."""
    gradients = [tensor for tensor in accumulated(engine) if tensor.numel()]
    if not gradients:
        return True
    # A sum of absolute values is finite exactly where its terms are (up to sizes beyond fp32).
    norms = torch._foreach_norm(gradients, 1)  # type: ignore[attr-defined]
    return bool(torch.stack([norm.float() for norm in norms]).isfinite().all())


def drop(engine: Any) -> None:
    """Forget all gradients, as if `backward` had never been called; weights stay.

    Also takes back what an exception in a forward or a backward pass has left half done.
    """
    optimizer = engine.optimizer
    engine.zero_grad()
    if not hasattr(optimizer, "ipg_buckets"):  # plain torch, without ZeRO
        return
    optimizer.zero_grad(set_to_none=True)
    while optimizer._backward_active_depth:
        optimizer.exit_backward()
    optimizer.clear_backward_seen_flag()
    if hasattr(optimizer, "all_grad_tensors"):
        _drop_12(optimizer)
    else:
        _drop_3(optimizer)


def _drop_12(optimizer: Any) -> None:
    optimizer.micro_step_id = -1  # as after a step
    optimizer._release_preflattened_grad_buffers()
    for buffers in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
        for group in buffers:
            buffers[group] = None
    for bucket in optimizer.ipg_buckets.values():
        bucket.clear()
    optimizer.params_already_reduced = [False] * len(optimizer.params_already_reduced)
    optimizer._release_ipg_buffers()
    optimizer.previous_reduced_grads.clear()
    if optimizer.cpu_offload:
        optimizer.accumulated_grads_in_cpu.clear()
        optimizer._offload_accumulated_param_ids = set()
        optimizer.reset_cpu_buffers()


def _drop_3(optimizer: Any) -> None:
    optimizer._offload_boundary_param_ids = set()
    optimizer.averaged_gradients = {}
    for bucket in optimizer.ipg_buckets.values():
        bucket.clear_params()
    for parameter in list(optimizer.params_already_reduced):
        optimizer.params_already_reduced[parameter] = False
    coordinator = optimizer._get_param_coordinator()
    coordinator.release_backward_leftovers()
    if not coordinator.is_invalid_trace():  # a pass cut short is no order to prefetch by
        coordinator._invalidate_trace()
    coordinator.reset_step()
    coordinator.hierarchy = 0
    optimizer._partition_all_parameters()
    if small := optimizer.persistent_parameters:  # kept whole, as after a step
        small[0].all_gather(small)
