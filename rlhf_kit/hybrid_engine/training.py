"""The training mode: a DeepSpeed engine around any module, the same on a CPU and on many GPUs."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_kit import distributed
from rlhf_kit.config import EngineConfig, OptimizerConfig
from rlhf_kit.deepspeed_config import deepspeed_config
from rlhf_kit.functional import learning_rate_scale


def start_deepspeed() -> None:
    """Join the launcher's ranks, or become the only one. Safe to call again.

    Without a launcher DeepSpeed looks for MPI, so the five variables are set here; port 0 takes
    a free one. On a CPU its shared-memory all-reduce would be compiled at start: gloo does the
    same without a compiler.
    """
    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    if "RANK" not in os.environ:
        os.environ.update(single, MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import logging
    import warnings

    # torch renamed two collectives that DeepSpeed still calls by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", category=FutureWarning, module="deepspeed")
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not distributed.is_distributed():
        if torch.cuda.is_available():
            torch.cuda.set_device(distributed.local_device())
        deepspeed.init_distributed(
            dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False
        )
        # Left to the interpreter, gloo's threads now and then abort a finished program.
        atexit.register(_leave)


def _leave() -> None:
    if distributed.is_distributed():
        torch.distributed.destroy_process_group()


@dataclass(frozen=True)
class StepInfo:
    """What one optimiser step did."""

    learning_rate: float
    """The rate it used."""
    grad_norm: float
    """Global norm of the gradient before clipping."""


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, biases and norms do not.

    The two groups also keep each layer's matrices side by side in ZeRO's flat buffer.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class TrainingEngine:
    """A module under DeepSpeed: forward, backward, step.

    Losses passed to `backward` are already divided by the token count of the *global* minibatch,
    so gradients add up over micro-batches and ranks; DeepSpeed's own divisions are undone.
    """

    def __init__(
        self,
        module: nn.Module,
        config: EngineConfig,
        optimizer: OptimizerConfig,
        *,
        total_steps: int,
    ):
        """The schedule runs over `total_steps` optimiser steps."""
        start_deepspeed()
        import deepspeed

        self.config = config
        self.optimizer_config = optimizer
        self.total_steps = total_steps
        self.steps_done = 0
        module.to(distributed.local_device())
        if config.gradient_checkpointing:
            hf_model: Any = getattr(module, "scorer", module)
            hf_model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        adamw = torch.optim.AdamW(
            _parameter_groups(module, optimizer.weight_decay),
            lr=optimizer.learning_rate,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            fused=not config.offload_optimizer,
        )
        # A plain optimiser under DeepSpeed clips without telling the norm: here we do it, at the
        # one moment when gradients are reduced over ranks and not yet used.
        self._plain = config.zero_stage == 0 and config.dtype == "fp32"
        self._grad_norm = 0.0
        if self._plain:
            adamw.register_step_pre_hook(self._clip)
        self.deepspeed: Any
        self.optimizer: Any
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=adamw,
            config=deepspeed_config(
                config, max_grad_norm=0.0 if self._plain else optimizer.max_grad_norm
            ),
        )

    def _clip(self, *_: Any) -> None:
        self._grad_norm = float(
            nn.utils.clip_grad_norm_(
                self.deepspeed.module.parameters(), self.optimizer_config.max_grad_norm
            )
        )

    @property
    def module(self) -> nn.Module:
        """The plain module; its parameters are the trained ones (under ZeRO-3, shards)."""
        return self.deepspeed.module

    @property
    def device(self) -> torch.device:
        return self.deepspeed.device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, through DeepSpeed's hooks."""
        return self.deepspeed(*args, **kwargs)

    def train(self) -> None:
        self.deepspeed.train()

    def eval(self) -> None:
        self.deepspeed.eval()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, a share of the global minibatch's mean."""
        # DeepSpeed averages gradients over ranks; our denominators already count all of them.
        self.deepspeed.backward(loss * distributed.world_size(), scale_wrt_gas=False)

    def step(self) -> StepInfo:
        """One optimiser step over all that was added by `backward` since the last one."""
        rate = self.optimizer_config.learning_rate * learning_rate_scale(
            self.steps_done,
            total=self.total_steps,
            warmup_ratio=self.optimizer_config.warmup_ratio,
            schedule=self.optimizer_config.schedule,
            final_ratio=self.optimizer_config.final_ratio,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.deepspeed.step()
        self.steps_done += 1
        norm = self._grad_norm if self._plain else self.deepspeed.get_global_grad_norm()
        return StepInfo(learning_rate=rate, grad_norm=float(norm))
