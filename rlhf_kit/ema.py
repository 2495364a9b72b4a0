"""The exponential moving average of the actor's weights, in fp32, right under every ZeRO stage.

In bf16 a step of 0.8 % of the difference is mostly rounded away, so the average is kept in fp32.
It advances once an optimiser step. Under ZeRO-3 each rank averages the shard it owns; writing
into gathered parameters instead, as DeepSpeed Chat does, is thrown away at the next partition.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rlhf_kit import distributed
from rlhf_kit.config import EMAConfig
from rlhf_kit.functional import ema_decay


def _local(parameter: nn.Parameter) -> Tensor:
    """The storage this rank owns: a ZeRO-3 shard, or the whole parameter."""
    return getattr(parameter, "ds_tensor", parameter).data


class EMA:
    """The average of every trained parameter of `module`; frozen ones equal their own average."""

    def __init__(self, module: nn.Module, config: EMAConfig):
        """Starts at the current weights. `module` must already be under its engine."""
        self.config = config
        self.updates = 0
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._averages = [_local(p).detach().float().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self) -> float:
        """Move towards the current weights; returns the decay used."""
        decay = ema_decay(self.updates, decay=self.config.decay, warmup=self.config.warmup)
        live = [_local(p) for p in self._parameters]
        if all(tensor.dtype == torch.float32 for tensor in live):
            torch._foreach_lerp_(self._averages, live, 1.0 - decay)  # type: ignore[attr-defined]
        else:
            for average, tensor in zip(self._averages, live, strict=True):
                average.lerp_(tensor.float(), 1.0 - decay)
        self.updates += 1
        return decay

    @torch.no_grad()
    def distance(self) -> float:
        """||average - weights|| / ||weights||, over all ranks; all ranks must call it."""
        sums = torch.zeros(2, dtype=torch.float64)
        for parameter, average in zip(self._parameters, self._averages, strict=True):
            live = _local(parameter).float()
            sums += torch.stack([(average - live).square().sum(), live.square().sum()]).cpu()
        # Replicated weights are counted once by every rank, which leaves the quotient alone.
        sums = distributed.all_sum(sums.to(distributed.local_device()))
        return float((sums[0] / sums[1].clamp(min=1e-30)).sqrt())

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the module's weights are the average (rounded to its dtype); restored exactly."""
        with torch.no_grad():
            kept = [_local(p).clone() for p in self._parameters]
            for parameter, average in zip(self._parameters, self._averages, strict=True):
                _local(parameter).copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, tensor in zip(self._parameters, kept, strict=True):
                    _local(parameter).copy_(tensor)

    def state_dict(self) -> dict[str, object]:
        """The averages of this rank and the update count, for resuming on as many ranks."""
        return {"updates": self.updates, "averages": self._averages}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        for average, saved in zip(self._averages, state["averages"], strict=True):
            average.copy_(saved)
