"""Adapters on disk, beside the merged model that they were exported with, and which one computes.

DIR/adapter/adapter_config.json, adapter_model.safetensors: peft's format, and a score head where
the model has one. The header of the weights says, by a checksum, which base they belong to.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_kit.config import require
from rlhf_kit.trust import read_json

FOLDER, WEIGHTS, CONFIG = "adapter", "adapter_model.safetensors", "adapter_config.json"
CONFIG_SIZE = 1 << 20
PREFIX = "base_model.model."
"""What peft puts before every name."""
LORA = re.compile(r"\.(lora_[AB])\.(\w+)\.weight$")


@dataclass(frozen=True)
class Adapter:
    """One that was read from disk."""

    rank: int
    alpha: int
    target_modules: tuple[str, ...]
    """Last parts of the names of the layers it adapts."""
    base: str
    """Checksum of the base it was trained on."""
    tensors: dict[str, Tensor]
    """By names without an adapter's own: `model.layers.0.mlp.up_proj.lora_A.weight`."""
    head: dict[str, Tensor]
    """`weight`, and `bias` where there is one, of the score head; empty without a head."""


def base_checksum(model: Any) -> str:
    """A number of the frozen weights below the head: equal for a causal LM and its classifier.

    From integer sums over the bit patterns, which no order of summation changes.
    """
    base: nn.Module = model.base_model
    digest = hashlib.blake2b(digest_size=8)
    bits = {4: torch.int32, 2: torch.int16}
    for name, parameter in sorted(base.named_parameters()):
        if ".lora_" in name:
            continue
        tensor = parameter.detach().contiguous()
        total = tensor.view(bits[tensor.element_size()]).sum(dtype=torch.int64)
        digest.update(f"{name.replace('.base_layer.', '.')} {int(total)}\n".encode())
    return digest.hexdigest()


def active_adapter(model: Any) -> str:
    """The name of the adapter that computes now; all layers have the same one."""
    return AdapterSwitch(model).layers[0].active_adapters[0]


def save_adapter(model: Any, directory: Path) -> None:
    """Write the adapter in use, and the score head, of a transformers model with adapters."""
    from safetensors.torch import save_file

    name = active_adapter(model)
    tensors = {}
    for key, tensor in model.state_dict().items():
        found = LORA.search(key)
        if found and found[2] == name:
            tensors[f"{PREFIX}{key[: found.start()]}.{found[1]}.weight"] = tensor
        elif key.startswith("score."):
            tensors[PREFIX + key] = tensor
    config = copy.deepcopy(model.peft_config[name])
    config.base_model_name_or_path = getattr(model, "name_or_path", "") or None
    config.inference_mode = True
    if isinstance(getattr(model, "score", None), nn.Linear):
        config.task_type, config.modules_to_save = "SEQ_CLS", ["score"]
    directory.mkdir()
    config.save_pretrained(directory)
    save_file(
        {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()},
        directory / WEIGHTS,
        metadata={"format": "pt", "base": base_checksum(model)},
    )


def read_adapter(model_directory: str | Path) -> Adapter | None:
    """The adapter beside an exported model; None where it has none."""
    from safetensors import SafetensorError, safe_open

    directory = Path(model_directory) / FOLDER
    if not (directory / WEIGHTS).is_file():
        return None
    broken = f"{directory} is not an adapter that was exported here; export its model again"
    config = read_json(directory / CONFIG, CONFIG_SIZE)
    rank, alpha, targets = (config.get(key) for key in ("r", "lora_alpha", "target_modules"))
    numbers = all(type(number) is int and number > 0 for number in (rank, alpha))
    require(numbers and isinstance(targets, list) and all(map(_is_name, targets)), broken)
    try:
        with safe_open(directory / WEIGHTS, framework="pt") as file:
            base = (file.metadata() or {}).get("base", "")
            tensors = {key.removeprefix(PREFIX): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError:
        raise ValueError(broken) from None
    head = {key.removeprefix("score."): t for key, t in tensors.items() if key[:6] == "score."}
    tensors = {key: tensor for key, tensor in tensors.items() if ".lora_" in key}
    require(bool(base and tensors), broken)
    return Adapter(rank, alpha, tuple(sorted(targets)), base, tensors, head)  # type: ignore[arg-type]


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.]+", value) is not None


def load_into(model: nn.Module, adapter: Adapter, name: str, *, where: str) -> None:
    """Copy an adapter's weights into the adapter `name` of a model that has one of its shape.

    `where` names the directory in the ValueError for one that does not fit.
    """
    own = dict(model.named_parameters())
    ours = {}
    for key, parameter in own.items():
        found = LORA.search(key)
        if found and found[2] == name:
            ours[f"{key[: found.start()]}.{found[1]}.weight"] = parameter
    differ = sorted(ours.keys() ^ adapter.tensors.keys())
    differ += [key for key in ours if not differ and ours[key].shape != adapter.tensors[key].shape]
    require(not differ, f"the adapter in {where} does not fit the base: {differ[:1]} differs")
    with torch.no_grad():
        for key, parameter in ours.items():
            parameter.copy_(adapter.tensors[key])


class AdapterSwitch:
    """Says which of a model's adapters computes; None leaves the base alone, bit for bit.

    A flag on each layer, and nothing else: what is trained stays trained, unlike with peft's own
    `set_adapter`.
    """

    def __init__(self, model: nn.Module, resting: str | None = None):
        """`resting` computes from now on, wherever nothing else is chosen."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
        if resting is not None:
            self._choose(resting)

    def _choose(self, name: str | None) -> None:
        for layer in self.layers:
            layer._disable_adapters = name is None
            if name is not None:
                layer._active_adapter = [name]

    @contextlib.contextmanager
    def chosen(self, name: str | None) -> Iterator[None]:
        """Inside, the adapter `name` computes, or none."""
        before = [(layer._disable_adapters, layer._active_adapter) for layer in self.layers]
        self._choose(name)
        try:
            yield
        finally:
            for layer, (off, active) in zip(self.layers, before, strict=True):
                layer._disable_adapters, layer._active_adapter = off, active
