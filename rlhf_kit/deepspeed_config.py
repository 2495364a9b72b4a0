"""From an `EngineConfig` to DeepSpeed's dict: a pure function, so that it can be tested."""

from __future__ import annotations

from typing import Any

from rlhf_kit.config import EngineConfig

REDUCE_BUCKET = 50_000_000
"""Gradient elements that are reduced at once. DeepSpeed allocates two buffers of this size for
each engine, whatever the model's; by default they take 2 GB in bf16."""


def deepspeed_config(engine: EngineConfig, *, max_grad_norm: float) -> dict[str, Any]:
    """The configuration of one DeepSpeed engine.

    Gradient accumulation is ours (`managed_gradient_accumulation` off): every `step` is a
    boundary, however many backward passes came before it, so that PPO and mixture batches of
    any number meet in one optimiser step. The micro-batch size only serves DeepSpeed's log.
    """
    # With bf16 at stage 0 DeepSpeed takes a wrapper written for LAMB, whose start counts as an
    # Adam step and decays the weights. Stage 1 computes what stage 0 should.
    stage = max(engine.zero_stage, 1) if engine.dtype == "bf16" else engine.zero_stage
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": REDUCE_BUCKET}
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if engine.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    if engine.zero_stage == 3:
        # Small tensors stay whole: norms and biases cost more to gather than to keep.
        zero["stage3_param_persistence_threshold"] = 10_000
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": max_grad_norm,
        # A gradient that is not finite is never applied, in bf16 either.
        "bf16": {"enabled": engine.dtype == "bf16", "check_grad_overflow": True},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # With offload, DeepSpeed would insist on a CPU Adam that needs a compiler.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        # It would wait for the GPU in every forward pass, to measure what we measure by phase.
        "timers": {"throughput": {"enabled": False}},
    }
