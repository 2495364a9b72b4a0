"""The training mode: a DeepSpeed engine around any module, the same on a CPU and on many GPUs."""

from __future__ import annotations

import atexit
import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_kit import distributed
from rlhf_kit.config import EngineConfig, OptimizerConfig, require
from rlhf_kit.deepspeed_config import deepspeed_config
from rlhf_kit.faults import end_in_one_sentence
from rlhf_kit.functional import learning_rate_scale
from rlhf_kit.hybrid_engine import gradients
from rlhf_kit.hybrid_engine.parked import Parked
from rlhf_kit.hybrid_engine.partitions import (
    Part,
    adam_state,
    optimizer_parts,
    publish_masters,
)
from rlhf_kit.hybrid_engine.weights_version import weights_changed
from rlhf_kit.shared_base import Role
from rlhf_kit.training_state import Fragment, State

TIMEOUT_VARIABLE = "RLHF_KIT_RANK_TIMEOUT"
"""Minutes that a rank waits for another one in a collective before it ends, 30 unless set."""


def rank_timeout() -> timedelta:
    """How long a rank waits for another one in a collective."""
    return timedelta(minutes=float(os.environ.get(TIMEOUT_VARIABLE, 30)))


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
            dist_backend="nccl" if torch.cuda.is_available() else "gloo",
            timeout=rank_timeout(),
            verbose=False,
        )
        end_in_one_sentence()
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
    applied: bool = True
    """False where the gradient was not finite: weights and optimiser are as they were."""


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


MASTERS = ("weights", "exp_avg", "exp_avg_sq")
"""What is saved of every trained parameter, in fp32: the weight itself, and AdamW's moments."""


class TrainingEngine:
    """A module under DeepSpeed: forward, backward, step.

    Losses passed to `backward` are already divided by the token count of the *global* minibatch,
    so gradients add up over micro-batches and ranks; DeepSpeed's own divisions are undone.

    Bytes of a GPU for each trained parameter, on one of R ranks (DeepSpeed 0.19.8, AdamW). A frozen
    one takes its weight alone, and under ZeRO-3 that of all ranks together.

    | | weights | masters | moments | summed gradients | their copies in `step` |
    |---|---|---|---|---|---|
    | fp32, ZeRO 0 | 4 | | 8 | 4 | |
    | fp32, ZeRO 1, 2 | 4 | 4/R | 8/R | 4; ZeRO 2: 4/R | 4/R |
    | bf16, ZeRO 0, 1, 2 | 2 | 4/R | 8/R | 2; ZeRO 2: 2/R | 2/R and in fp32 4/R |
    | bf16, ZeRO 3 | 2/R | 4/R | 8/R | 2/R | 2/R and in fp32 4/R |

    Moments come with the first step; gradients and their copies go with each. A bucket of
    `REDUCE_BUCKET` gradients comes on top. `leave` takes masters and moments off the device until
    the next step, and offload_optimizer has them on the CPU always, where AdamW then runs.
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
            any_module: Any = module
            any_module.gradient_checkpointing_enable(
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
        if config.dtype == "bf16" and config.zero_stage < 3:
            # DeepSpeed looks at every gradient on its own, which takes longer than AdamW. The
            # norm, which it looks at next, is finite where they all are.
            self.optimizer.check_overflow = lambda **_: None
        self._weights = Parked(self.held.parameters)
        self._states = Parked(self._state_tensors)

    def _clip(self, *_: Any) -> None:
        self._grad_norm = float(
            nn.utils.clip_grad_norm_(
                self.deepspeed.module.parameters(), self.optimizer_config.max_grad_norm
            )
        )
        if not math.isfinite(self._grad_norm):
            self.deepspeed.zero_grad()  # AdamW passes over weights without a gradient

    @property
    def module(self) -> nn.Module:
        """The plain module, whole (under ZeRO-3, of shards)."""
        held = self.held
        return held.whole if isinstance(held, Role) else held

    @property
    def held(self) -> nn.Module:
        """What DeepSpeed holds, with all trained parameters: the module, or its own part of it."""
        return self.deepspeed.module

    @property
    def device(self) -> torch.device:
        return self.deepspeed.device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, through DeepSpeed's hooks."""
        self._weights.come()
        return self.deepspeed(*args, **kwargs)

    def train(self) -> None:
        self.deepspeed.train()

    def eval(self) -> None:
        self.deepspeed.eval()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, a share of the global minibatch's mean."""
        held = self.held
        with held.chosen() if isinstance(held, Role) else contextlib.nullcontext():
            # DeepSpeed averages gradients over ranks; our denominators already count all of them.
            self.deepspeed.backward(loss * distributed.world_size(), scale_wrt_gas=False)

    def gradients_finite(self) -> bool:
        """Whether this rank's part of what `backward` has added is free of NaN and infinity."""
        return gradients.are_finite(self.deepspeed)

    def drop_gradients(self) -> None:
        """Forget what `backward` has added since the last step; all ranks must call it."""
        gradients.drop(self.deepspeed)

    def step(self) -> StepInfo:
        """One optimiser step over all that was added by `backward` since the last one.

        Where its norm is not finite nothing moves and the schedule waits: `applied` is False.
        """
        rate = self.optimizer_config.learning_rate * learning_rate_scale(
            self.steps_done,
            total=self.total_steps,
            warmup_ratio=self.optimizer_config.warmup_ratio,
            schedule=self.optimizer_config.schedule,
            final_ratio=self.optimizer_config.final_ratio,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._states.come()
        self.deepspeed.step()
        weights_changed(self.module)
        norm = float(self._grad_norm if self._plain else self.deepspeed.get_global_grad_norm())
        applied = math.isfinite(norm)
        self.steps_done += applied
        return StepInfo(learning_rate=rate, grad_norm=norm, applied=applied)

    def leave(self, *, weights: bool = False) -> None:
        """Give up the device's memory for the optimiser's states, and `weights`, while idle.

        They come back by themselves when they are used. Between `step` and `backward` only. What
        DeepSpeed keeps elsewhere already, or in shards (ZeRO-3's weights), stays where it is.
        """
        if not self.config.offload_optimizer:
            self._states.leave()
        if weights and self.config.zero_stage < 3:
            self._weights.leave()

    def come(self) -> None:
        """Have on the device again all that `leave` has sent away."""
        self._weights.come()
        self._states.come()

    def _state_tensors(self) -> Iterator[Tensor]:
        """The fp32 masters, where they are not the weights themselves, and both moments."""
        for part in self._parts():
            if not self._plain:
                yield part.master.detach()
            for key, tensor in self._adamw.state.get(part.master, {}).items():
                if key in MASTERS:
                    yield tensor

    def state(self) -> State:
        """Trained weights in fp32, AdamW's moments and counts; all ranks must call it.

        Frozen weights are not in it: they come from the directory that the module came from.
        Nor is anything else of DeepSpeed's: without loss scaling and with accumulation of our
        own, its counters only serve its log.
        """
        self.come()
        state: State = {key: {} for key in MASTERS}
        steps: set[int] = set()
        for part in self._parts():
            adam = adam_state(self._adamw, part.master)
            steps.add(int(adam["step"]))
            # Without ZeRO all ranks hold the same; the main one hands it over.
            if part.length and (not self._plain or distributed.is_main_rank()):
                for key, tensor in self._masters(part).items():
                    state[key][part.name] = Fragment(tensor, part.start, part.shape)
        assert len(steps) == 1, f"AdamW took {steps} steps on different weights"
        return {**state, "adam_steps": steps.pop(), "steps_done": self.steps_done}

    def load_state(self, state: State) -> None:
        """Go on from a state, of any number of ranks and ZeRO stage; all ranks must call it.

        Also in the middle of training: gradients of the weights that go are dropped. ValueError
        where it belongs to a model with other trained weights.
        """
        self.come()
        parts = self._parts()
        saved = {name: tuple(stored.shape) for name, stored in state["weights"].items()}
        ours = {part.name: part.shape for part in parts}
        differ = [name for name in {**ours, **saved} if ours.get(name) != saved.get(name)]
        require(
            not differ,
            f"the checkpoint's trained weights are not this model's, {differ[:1]} first; resume "
            "with the model and the LoRA settings of the run that saved it",
        )
        self.drop_gradients()
        for part in parts:
            for key, tensor in self._masters(part).items():
                if part.length:
                    tensor.copy_(state[key][part.name].read(part.start, part.length))
            adam_state(self._adamw, part.master)["step"].fill_(state["adam_steps"])
        publish_masters(self.optimizer)
        weights_changed(self.module)
        self.steps_done = state["steps_done"]

    @property
    def _adamw(self) -> torch.optim.Optimizer:
        return self.optimizer if self._plain else self.optimizer.optimizer

    def _parts(self) -> list[Part]:
        return optimizer_parts(self.held, self.optimizer)

    def _masters(self, part: Part) -> dict[str, Tensor]:
        """[length] views of the fp32 weight and both moments of a part, by MASTERS."""
        adam = adam_state(self._adamw, part.master)
        buffers = (part.master, adam["exp_avg"], adam["exp_avg_sq"])
        return {key: part.of(buffer) for key, buffer in zip(MASTERS, buffers, strict=True)}
