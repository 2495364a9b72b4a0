"""The size of a model and the memory of its passes, without the model: on the meta device.

The very modules and losses that train are built and run there, and each storage is counted from
the operation that makes it to the moment nothing refers to it any more. So there is no formula to
keep for each architecture. What a CUDA kernel takes inside itself is not seen; attention alone is
replaced, by a stand-in that keeps what torch's fused kernels keep.

Shapes: B rows, P prompt, R response, T = P + R sequence tokens.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf_kit.chat_template import first_line
from rlhf_kit.config import LoRAConfig
from rlhf_kit.hybrid_engine import passes
from rlhf_kit.hybrid_engine.watch import Watch, attending, fused_attention
from rlhf_kit.models import (
    DTYPES,
    ValueModel,
    add_lora,
    disable_dropout,
    quiet_transformers,
    resolve_model,
    score_head,
)
from rlhf_kit.token_logprobs import FORMS, LogitForm
from rlhf_kit.trust import check_settings

SHALLOW = 2, 3
"""Layers of the models that are run for a deeper one: memory is linear in the number of layers."""


class Sizes(NamedTuple):
    """A model in numbers of elements."""

    embeddings: int
    """Tables that tokens and positions are looked up in."""
    matrices: int
    """All other parameters of two or more dimensions but the head."""
    vectors: int
    """Biases and norms."""
    head: int
    """The matrix to the vocabulary, or to the score."""
    tied: bool
    """Whether the head is one of the tables."""
    adapters: int
    """LoRA's, which are not in the three above."""
    trained_matrices: int
    """Trained parameters of two or more dimensions."""
    trained_vectors: int
    largest: int
    """The largest trained parameter."""
    vocabulary: int
    kv: int
    """Keys and values of one token, in all layers."""
    queries: int
    """Of one token, in all layers."""

    @property
    def total(self) -> int:
        head = 0 if self.tied else self.head
        return self.embeddings + self.matrices + self.vectors + self.adapters + head

    @property
    def trained(self) -> int:
        return self.trained_matrices + self.trained_vectors


class Pass(NamedTuple):
    """Bytes that a pass takes besides parameters and their gradients."""

    kept: int
    """Alive when the forward pass and the loss are done: what the backward pass needs."""
    peak: int
    """Most at any time."""


@dataclass(frozen=True)
class Model:
    """A model that need not exist: an architecture, and how an engine would hold it."""

    settings: str
    """Its transformers configuration, as JSON."""
    scorer: bool = False
    """A reward model or critic, which has a head of one label."""
    dtype: str = "bf16"
    lora: LoRAConfig = LoRAConfig()
    checkpointing: bool = False

    @property
    def sizes(self) -> Sizes:
        return _sizes(self)

    @property
    def element_size(self) -> int:
        """Bytes of a weight."""
        return DTYPES[self.dtype].itemsize

    @property
    def bytes(self) -> int:
        """Of all weights."""
        return self.element_size * self.sizes.total

    # Forward and backward of a number of rows, by what is minimised:

    def policy(self, rows: int, prompt: int, response: int, chunk: int) -> Pass:
        """PPO's policy loss; `chunk` is memory.logprob_chunk."""
        return _measure(self, passes.policy, rows, prompt, response, chunk)

    def text(self, rows: int, length: int, chunk: int) -> Pass:
        """The language model's loss, of SFT and of the mixture."""
        return _measure(self, passes.text, rows, length, chunk)

    def value(self, rows: int, prompt: int, response: int) -> Pass:
        """The critic's loss."""
        return _measure(self, passes.value, rows, prompt, response)

    def pairs(self, pairs: int, length: int) -> Pass:
        """The reward model's loss."""
        return _measure(self, passes.pairs, pairs, length)

    # Forward alone:

    def logprobs(self, rows: int, prompt: int, response: int, chunk: int) -> Pass:
        """Logprobs of responses, by the actor or the ref."""
        return _measure(self, passes.logprobs, rows, prompt, response, chunk)

    def values(self, rows: int, length: int) -> Pass:
        """A number for every token, by the critic or the reward model."""
        return _measure(self, passes.values, rows, length)

    def prompts(self, rows: int, length: int) -> Pass:
        """The decoder's pass over whole prompts, packed, with logits of their last tokens."""
        return _measure(self, passes.prompts, rows, length)


def read_config(name: str) -> Any:
    """The transformers configuration of a directory, of a config.json or of a hub model.

    No weights are read and no code is run. ValueError, one sentence, where there is none.
    """
    from transformers import AutoConfig, PreTrainedConfig

    path = name if name.endswith(".json") and os.path.isfile(name) else resolve_model(name)
    local = os.path.exists(path)
    try:
        with quiet_transformers():
            settings, _ = PreTrainedConfig.get_config_dict(path, local_files_only=local)
            ignored = frozenset() if local else frozenset({"auto_map"})
            check_settings(settings, f"the configuration of {name}", ignored=ignored)
            return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=local)
    except Exception as error:
        reason = first_line(error)
        raise ValueError(
            f"the configuration of {name} cannot be read: {reason}"
            if local
            else f"{name} is no local directory, and the hub gave no configuration of that name; "
            f"check the spelling, or give a directory or a config.json ({reason})"
        ) from error


@functools.cache
def _config(settings: str) -> Any:
    import transformers

    values = json.loads(settings)
    return transformers.CONFIG_MAPPING[values["model_type"]].from_dict(values)


def _build(model: Model, layers: int | None = None) -> Any:
    """The module on the meta device; with `layers`, that many of its layers only."""
    import transformers

    config = copy.deepcopy(_config(model.settings))
    text = config.get_text_config()
    if layers is not None:
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    kind: Any = transformers.AutoModelForCausalLM
    if model.scorer:
        kind, config.num_labels = transformers.AutoModelForSequenceClassification, 1
    with quiet_transformers(), torch.device("meta"):
        module = kind.from_config(config, dtype=DTYPES[model.dtype])
    disable_dropout(module)
    module.config.use_cache = False
    if model.lora.rank:
        add_lora(module, model.lora)
    if model.checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers has a new name for it
            module.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
    if model.scorer:
        return ValueModel(module)
    # Found by trying elsewhere, which needs values.
    FORMS[module] = LogitForm(softcap=getattr(text, "final_logit_softcapping", None))
    return module


def _linear(model: Model, measure: Callable[[Any], Sequence[int]]) -> list[int]:
    """`measure` of the module: of itself where it is shallow, or continued from two that are."""
    depth = _config(model.settings).get_text_config().num_hidden_layers
    if depth <= SHALLOW[1]:
        return list(measure(_build(model)))
    fewer, more = (measure(_build(model, layers)) for layers in SHALLOW)
    return [b + (b - a) * (depth - SHALLOW[1]) for a, b in zip(fewer, more, strict=True)]


@functools.cache
def _sizes(model: Model) -> Sizes:
    module = _build(replace(model, lora=LoRAConfig(), checkpointing=False))
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    head = score_head(module.scorer) if model.scorer else module.get_output_embeddings()
    counts = dict.fromkeys(("embeddings", "matrices", "vectors"), 0)
    for parameter in module.parameters():
        if id(parameter) in tables:
            counts["embeddings"] += parameter.numel()
        elif parameter is not head.weight:
            counts["vectors" if parameter.dim() < 2 else "matrices"] += parameter.numel()
    adapters, matrices, vectors = _linear(model, _trained)
    shallow = _build(model, 1)
    largest = max(p.numel() for p in shallow.parameters() if p.requires_grad)
    kv, queries = _linear(replace(model, checkpointing=False), _attention_width)
    return Sizes(
        **counts,
        head=head.weight.numel(),
        tied=id(head.weight) in tables,
        adapters=adapters,
        trained_matrices=matrices,
        trained_vectors=vectors,
        largest=largest,
        vocabulary=0 if model.scorer else head.out_features,
        kv=kv,
        queries=queries,
    )


def _trained(module: nn.Module) -> tuple[int, int, int]:
    """Elements of adapters, of all trained matrices, of all trained vectors."""
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    adapters = sum(p.numel() for name, p in trained if ".lora_" in name)
    matrices = sum(p.numel() for _, p in trained if p.dim() >= 2)
    return adapters, matrices, sum(p.numel() for _, p in trained) - matrices


def _attention_width(module: Any) -> tuple[int, int]:
    """Elements of the keys and values of one token over all layers, and of its queries."""
    widths = [0, 0]

    def attend(_: Any, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any) -> Any:
        widths[0] += key.shape[1] * key.shape[3] + value.shape[1] * value.shape[3]
        widths[1] += query.shape[1] * query.shape[3]
        return query.transpose(1, 2), None

    base = module.scorer.base_model if isinstance(module, ValueModel) else module.base_model
    with torch.no_grad(), attending(base, attend):
        base(input_ids=passes.ids(1, 1), position_ids=passes.ids(1, 1), use_cache=False)
    return widths[0], widths[1]


@functools.cache
def _measure(model: Model, run: Callable[..., Tensor], *shape: int) -> Pass:
    def measure(module: nn.Module) -> Pass:
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_take)
        known = [*module.parameters(), *module.buffers()]
        # Asked are positions, whether all are of one sequence, and a mask, whether it is all True:
        # pairs alone have one, and it has padding in it.
        with fused_attention(), Watch(known, answer=run is not passes.pairs) as watch:
            result = run(module, *shape)
            kept = watch.live
            if result.requires_grad:
                torch.autograd.backward(result)
        return Pass(kept, watch.peak)

    return Pass(*_linear(model, measure))


def _take(parameter: Tensor) -> None:
    """What an engine does with gradients, and where it keeps them, is counted elsewhere."""
    parameter.grad = None
