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
from rlhf_kit.config import EMAConfig, require
from rlhf_kit.functional import ema_decay
from rlhf_kit.hybrid_engine.parked import Parked
from rlhf_kit.hybrid_engine.partitions import put_away, shard
from rlhf_kit.hybrid_engine.weights_version import weights_changed
from rlhf_kit.training_state import Fragment, State


def _local(parameter: nn.Parameter) -> Tensor:
    """The storage this rank owns: a ZeRO-3 shard, or the whole parameter."""
    return getattr(parameter, "ds_tensor", parameter).data


class EMA:
    """The average of every trained parameter of `module`; frozen ones equal their own average."""

    def __init__(self, module: nn.Module, config: EMAConfig):
        """Starts at the current weights. `module` must already be under its engine."""
        self.config = config
        self.updates = 0
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self._module = module
        self._names = [name for name, _ in trained]
        self._parameters = [p for _, p in trained]
        self._averages = [_local(p).detach().float().clone() for p in self._parameters]
        self._parked = Parked(lambda: self._averages)

    def leave(self) -> None:
        """Give up the device's memory; the averages come back by themselves when used."""
        self._parked.leave()

    @torch.no_grad()
    def update(self) -> float:
        """Move towards the current weights; returns the decay used."""
        self._parked.come()
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
        self._parked.come()
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
        self._parked.come()
        kept = [_local(p).detach().clone() for p in self._parameters]
        self._write(self._averages)
        try:
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, weights: list[Tensor]) -> None:
        """Make `weights` the module's; what ZeRO-3 holds whole would hide them."""
        put_away(self._parameters)
        for parameter, tensor in zip(self._parameters, weights, strict=True):
            _local(parameter).copy_(tensor)
        weights_changed(self._module)

    def state(self) -> State:
        """The averages in fp32 and the update count; all ranks must call it."""
        self._parked.come()
        averages = {}
        for name, parameter, average in self._named():
            shape, start, length = shard(parameter)
            # Whole weights are averaged alike on all ranks; the main one hands them over.
            if length and (hasattr(parameter, "ds_id") or distributed.is_main_rank()):
                averages[name] = Fragment(average.view(-1)[:length], start, shape)
        return {"averages": averages, "updates": self.updates}

    def load_state(self, state: State) -> None:
        """Go on from a state, of any number of ranks and ZeRO stage."""
        self._parked.come()
        for name, parameter, average in self._named():
            shape, start, length = shard(parameter)
            stored = state["averages"].get(name)
            require(
                stored is not None and tuple(stored.shape) == shape,
                f"the checkpoint has no average of {name}; resume with the model and the LoRA "
                "settings of the run that saved it",
            )
            assert stored is not None
            if length:
                average.view(-1)[:length].copy_(stored.read(start, length))
        self.updates = state["updates"]

    def _named(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        return zip(self._names, self._parameters, self._averages, strict=True)
