"""What DeepSpeed and AdamW hold of one model on one GPU, counted from DeepSpeed's code.

ZeRO-1 and 2 are runtime/zero/stage_1_and_2.py, ZeRO-3 is runtime/zero/stage3.py, of 0.19.8;
tests/test_engine_memory.py compares with what they allocate.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from rlhf_kit.config import EngineConfig
from rlhf_kit.deepspeed_config import REDUCE_BUCKET
from rlhf_kit.hybrid_engine.dry_run import Sizes

FLAT_BUCKET = 500_000_000
"""Gradient elements that DeepSpeed flattens at once where it does not shard."""
ZERO_3_LIVE = 1_000_000_000
"""Elements that ZeRO-3 keeps gathered at most (stage3_max_live_parameters), and steps at once
(sub_group_size)."""


class EngineMemory(NamedTuple):
    """Bytes of one trained model on one GPU."""

    weights: int
    masters: int = 0
    """fp32 weights; none where the weights are fp32 and DeepSpeed does not shard."""
    moments: int = 0
    """AdamW's two, from its first step on."""
    buffers: int = 0
    """Of gradients, always there."""
    gradients: int = 0
    """Between two backward passes of a step."""
    arriving: int = 0
    """More than that while a backward pass runs."""
    gathered: int = 0
    """Weights that ZeRO-3 has put together for a pass."""
    first_step: int = 0
    """Gradients, their copies and the moments at the fullest moment of the first step."""
    step: int = 0
    """The same of every later one."""
    loading: int = 0
    """Besides the weights, while DeepSpeed takes them over."""
    host: int = 0
    """In the memory of the host."""


def engine_memory(
    sizes: Sizes, engine: EngineConfig, ranks: int, *, accumulates: bool
) -> EngineMemory:
    """What DeepSpeed and AdamW keep; `accumulates` where a step has several backward passes."""
    b = 4 if engine.dtype == "fp32" else 2
    stage = max(engine.zero_stage, 1) if engine.dtype == "bf16" else engine.zero_stage
    trained, weights, bucket = sizes.trained, b * sizes.total, b * REDUCE_BUCKET
    mine, matrices = math.ceil(trained / ranks), math.ceil(sizes.trained_matrices / ranks)
    if stage == 0:  # AdamW on the weights themselves; gradients are flattened to be reduced
        flat = 4 * min(trained, FLAT_BUCKET)
        return EngineMemory(
            weights,
            moments=8 * trained,
            gradients=4 * trained,
            first_step=4 * trained + max(flat, 8 * trained),
            step=(4 + 8) * trained + flat,
        )
    held = EngineMemory(weights, masters=4 * mine, moments=8 * mine)
    own = b * mine  # its gradients
    # What does not fit into the bucket is reduced alone; either is copied for it.
    copied = b * max(min(REDUCE_BUCKET, trained), sizes.largest)
    if stage == 3:
        # Biases and norms stay whole.
        whole, share = b * sizes.vectors, -(-weights // ranks)
        held = held._replace(
            weights=whole + (0 if engine.offload_parameters else share),
            buffers=bucket + own,
            gathered=b * min(sizes.total, ZERO_3_LIVE),
            loading=max(weights, 8 * mine),
        )
        flattened, waiting = min(mine, ZERO_3_LIVE), 0
    else:
        # ZeRO-1 makes its bucket early. ZeRO-2 gathers each backward pass in a new set before it
        # is added to the first.
        held = held._replace(
            gradients=b * trained + bucket if stage == 1 else own,
            arriving=bucket + copied + own * accumulates if stage == 2 else 0,
            loading=max(b * trained, 8 * mine),
        )
        flattened, waiting = matrices, own
    if engine.offload_optimizer:
        # Gradients leave as they come, in ZeRO-1 at the step, through a buffer for the largest.
        gradients = held.gradients if stage == 1 else 0
        step = gradients + (b + 8) * sizes.largest
        return held._replace(
            masters=0,
            moments=0,
            buffers=bucket if stage == 3 else b * sizes.largest,
            gradients=gradients,
            arriving=bucket + copied if stage == 2 else 0,
            first_step=step,
            step=step,
            loading=weights if stage == 3 else b * trained,
            host=(16 + b + b * accumulates + b * engine.offload_parameters) * mine,
        )
    # Groups of parameters one after the other: flattened, cast to fp32, stepped. The first has
    # all matrices; the gradients that it came from are freed with the last.
    cast = (b + (4 if b == 2 else 0)) * flattened
    norm = 8 * min(sizes.largest, mine)  # in fp64, of one parameter after the other
    reducing = held.gradients + copied if stage == 1 else 0
    before = waiting + max(cast, norm, reducing)
    first = max(before, waiting + (4 + 8) * flattened)
    return held._replace(first_step=first, step=held.moments + before)
