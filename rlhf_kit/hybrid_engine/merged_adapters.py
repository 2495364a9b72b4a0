"""LoRA added into a copy of the weights, to generate from.

The base stays as it is, bit for bit: adding in place and taking off again is not reversible in
bf16. The copy keeps its addresses from call to call, so captured steps over it stay valid.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_kit.config import require


class MergedAdapters:
    """A buffer for the merged weight of every adapted layer of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._buffers: dict[str, Tensor] = {}

    @contextmanager
    def refreshed(self) -> Iterator[None]:
        """Merge the adapters as they are now; inside, the model computes with the merged copy.

        Raises ValueError for adapters that do more than add to a weight (DoRA).
        """
        layers = _layers(self.model)
        bases = {name: layer.get_base_layer().weight for name, layer in layers.items()}
        for name, layer in layers.items():
            weight = bases[name]
            if name not in self._buffers or self._buffers[name].shape != weight.shape:
                self._buffers[name] = torch.empty_like(weight)
            delta = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
            torch.add(weight, delta, out=self._buffers[name])
        before = {name: weight.data for name, weight in bases.items()}
        try:
            for name, weight in bases.items():
                weight.data = self._buffers[name]
                layers[name]._disable_adapters = True
            yield
        finally:
            for name, weight in bases.items():
                weight.data = before[name]
                layers[name]._disable_adapters = False

    def release(self) -> None:
        """Free the copy."""
        self._buffers.clear()


def _layers(model: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    for layer in layers.values():
        dora = any(getattr(layer, "use_dora", {}).values())
        require(not dora, "DoRA adapters cannot be merged for generation; set lora.merge to false")
    return {name: layer for name, layer in layers.items() if not layer.disable_adapters}
