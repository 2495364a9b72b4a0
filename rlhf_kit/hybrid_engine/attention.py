"""Attention for decoding, plugged into transformers' attention interface.

Shapes: M packed tokens, N rows being decoded, K a group of prompts, P the longest of them,
H query heads, Hkv key/value heads, G = H / Hkv, D head size, S cached tokens read.

Every model with that interface calls one function per layer with its own queries, keys and
values. Ours keeps keys and values in a `KVCache` and knows where each row stands from a plan: a
record made once per forward pass and handed down as a keyword. transformers builds no mask for
an attention function without a registered mask, so the plan alone decides who sees what.

The model always gets one packed row of tokens [1, M]: either whole prompts one after another
(`PromptPlan`) or one token of each row (`TokenPlan`). So no layer computes padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_kit.config import require
from rlhf_kit.hybrid_engine.kv_cache import KVCache

NAME = "rlhf_kit_decode"
STEP_NAME = "rlhf_kit_step"
"""The attention of a decode step on a GPU: one operator a layer, `attend_step`."""
PROMPT_NAME = "rlhf_kit_prompts"
"""The attention of compiled passes over prompts: one operator a layer, `attend_packed`."""

_IGNORED = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "return_dict"}
"""Keywords that layers pass on and that do not change the arithmetic."""


def check_model(model: Any) -> None:
    """Raise ValueError, by name, for a model that cannot attend through this module."""
    name = type(model).__name__
    config: Any = getattr(model, "config", None)
    require(hasattr(config, "get_text_config"), f"{name} is not a transformers model")
    require(not config.is_encoder_decoder, f"{name} is an encoder-decoder, not a causal LM")
    require(
        model._supports_attention_backend,
        f"{name} does not attend through transformers' attention interface, which decoding needs",
    )


def check_layers(model: Any, cache: KVCache) -> None:
    """Raise ValueError unless every layer of the model wrote to the cache."""
    layers = model.config.get_text_config().num_hidden_layers
    if sorted(cache.layers) != list(range(layers)):
        raise ValueError(
            f"{type(model).__name__} attends through transformers' attention interface in "
            f"{len(cache.layers)} of {layers} layers, but decoding needs it in all of them"
        )


def check_length(model: Any, longest: int) -> None:
    """Raise ValueError where a sequence of `longest` tokens would outgrow the positions."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None or longest <= limit:
        return
    words = model.get_input_embeddings()
    learned = any(
        isinstance(module, nn.Embedding)
        and module is not words
        # OPT keeps two rows more than it has positions.
        and limit <= module.num_embeddings <= limit + 2
        for module in model.modules()
    )
    require(
        not learned,
        f"prompt and response may take {longest} tokens, but {type(model).__name__} has {limit} "
        "positions: lower max_new_tokens or drop longer prompts",
    )
    rope = str(getattr(config, "rope_parameters", None))
    require(
        "dynamic" not in rope and "longrope" not in rope,
        f"prompt and response may take {longest} tokens, but beyond {limit} the rotary positions "
        f"of {type(model).__name__} depend on the whole batch: lower max_new_tokens",
    )


@dataclass(frozen=True)
class PromptPlan:
    """K prompts, packed one after another, going into `blocks`."""

    cache: KVCache
    rows: int
    """K."""
    blocks: Tensor
    """[K] the blocks of the cache."""
    pad: Tensor | None
    """[K, P] where each prompt's tokens stand in the packed row; any token behind its end. None:
    all prompts have the same length, and the packed row is [K, P] already."""
    unpad: Tensor
    """[M] where each packed token stands in the flattened [K, P]."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        # Padded on the right, a causal mask is all that real tokens need.
        query, key, value = (self._padded(x[0].transpose(0, 1)) for x in (query, key, value))
        self.cache.write_prompts(layer, self.blocks, key, value)
        out = attend_prompts(query, key, value, rule).transpose(1, 2).flatten(0, 1)
        return out if self.pad is None else out[self.unpad]

    def _padded(self, x: Tensor) -> Tensor:
        """[M, H, D] -> [K, H, P, D]."""
        rows = x.unflatten(0, (self.rows, -1)) if self.pad is None else x[self.pad]
        return rows.transpose(1, 2)


class PackedPrompts(NamedTuple):
    """A `PromptPlan` without the cache, which layers have from `attach`: tensors can be traced."""

    blocks: Tensor
    pad: Tensor | None
    unpad: Tensor


@dataclass(frozen=True)
class TokenPlan:
    """One new token for each of the first N slots."""

    cache: KVCache
    lengths: Tensor
    """[N] tokens in each slot before this one, which is the position it gets."""
    span: int
    """At least the longest length plus one: how far the cache is read."""
    biases: dict[int | None, Tensor] = field(default_factory=dict)
    """The mask of each window size, shared by the layers."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        self.cache.write_tokens(layer, self.lengths, key, value)
        keys, values = self.cache.read(layer, query.shape[0], self.span)
        return attend_tokens(query, keys, values, self._bias(rule.window, query.dtype), rule)

    def _bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        if window not in self.biases:
            at = torch.arange(self.span, device=self.lengths.device)
            hidden = at > self.lengths[:, None]
            if window is not None:
                hidden |= at <= self.lengths[:, None] - window
            bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            self.biases[window] = bias.masked_fill_(hidden, -torch.inf)[:, None, None, :]
        return self.biases[window]


@dataclass(frozen=True)
class Rule:
    """What a layer asks of its attention besides being causal."""

    scale: float
    window: int | None
    """A token sees itself and the `window - 1` before it; None: all before it."""
    softcap: float | None
    """Scores s become softcap * tanh(s / softcap) (Gemma 2); None: as they are."""


def attend_prompts(query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
    """Causal attention of whole prompts: query [K, H, P, D], key and value [K, Hkv, P, D]."""
    length = query.shape[2]
    plain = rule.softcap is None and (rule.window is None or length <= rule.window)
    visible = None if plain else _visible(length, rule.window, query.device)
    if visible is None or rule.softcap is None:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=visible,
            is_causal=visible is None,
            scale=rule.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = _capped(query * rule.scale @ key.transpose(-1, -2), rule.softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value


def attend_tokens(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, rule: Rule) -> Tensor:
    """Attention of one token a row over its slot.

    query [N, H, D], keys and values [N, Hkv, S, D], bias [N, 1, 1, S] -> [N, H, D]. The G
    queries of a key/value head are treated as G positions, so no head is copied.
    """
    rows, kv_heads = keys.shape[:2]
    grouped = query.reshape(rows, kv_heads, -1, query.shape[-1]) * rule.scale
    scores = grouped @ keys.transpose(-1, -2)
    if rule.softcap is not None:
        scores = _capped(scores, rule.softcap)
    weights = (scores + bias).softmax(dim=-1, dtype=torch.float32).to(values.dtype)
    return (weights @ values).flatten(1, 2)


@contextmanager
def own_attention(model: nn.Module, implementation: str = NAME) -> Iterator[None]:
    """Let `model` attend through this module inside the block, with dropout off.

    `implementation` is NAME, which takes a `PromptPlan` or `TokenPlan`, or one of those that run
    in layers that `attach` gave their cache: STEP_NAME takes the lengths and blocks of the slots,
    both [N], as `plan`, PROMPT_NAME takes `PackedPrompts`.

    The attention implementation in its configs and the train/eval state of every module are what
    they were afterwards.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)
    AttentionInterface.register(STEP_NAME, _step_attention)
    AttentionInterface.register(PROMPT_NAME, _packed_attention)
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if _chooses(m)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        for config, _ in before:
            config._attn_implementation = implementation
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name
        for module in training:
            module.training = True


@contextmanager
def attach(model: nn.Module, cache: KVCache) -> Iterator[None]:
    """Inside, every attention module holds its layer's keys and values.

    As attributes, not by number: layers that differ in a number alone then share their compiled
    code, which takes tensors as arguments and numbers as constants.
    """
    modules = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]
    for module in modules:
        layer: Any = module
        layer.kit_keys, layer.kit_values = cache.layers[layer.layer_idx]
    try:
        yield
    finally:
        for module in modules:
            del module.kit_keys, module.kit_values


@torch.library.custom_op("rlhf_kit::attend_step", mutates_args=("keys", "values"))
def attend_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    blocks: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """`kernels.attend` as one operator, so that it can be compiled around; on a CPU, in torch."""
    if query.is_cuda:
        from rlhf_kit.hybrid_engine import kernels

        rule = {"scale": scale, "window": window, "softcap": softcap}
        return kernels.attend(query, key, value, keys, values, lengths, blocks, **rule)
    cache = KVCache(*keys.shape[::2])
    cache.layers[0] = (keys[blocks], values[blocks])
    plan = TokenPlan(cache, lengths, int(lengths.max()) + 1)
    out = plan.attend(
        0, query[None], key[None], value[None], Rule(scale, window or None, softcap or None)
    )
    keys[blocks], values[blocks] = cache.layers[0]
    return out.contiguous()


@attend_step.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    blocks: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    return query.new_empty(query.shape[1], query.shape[0], value.shape[2])


@torch.library.custom_op("rlhf_kit::attend_packed", mutates_args=("keys", "values"))
def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    blocks: Tensor,
    pad: Tensor | None,
    unpad: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """`PromptPlan.attend` as one operator, so that it can be compiled around."""
    cache = KVCache(*keys.shape[::2])
    cache.layers[0] = (keys, values)
    plan = PromptPlan(cache, len(blocks), blocks, pad, unpad)
    rule = Rule(scale, window or None, softcap or None)
    return plan.attend(0, query[None], key[None], value[None], rule).contiguous()


@attend_packed.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    blocks: Tensor,
    pad: Tensor | None,
    unpad: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    return query.new_empty(query.shape[1], query.shape[0], value.shape[2])


def _step_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    plan: tuple[Tensor, Tensor],
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """`_attention` for one token a slot; what a layer asks for was checked with its prompts."""
    out = attend_step(
        query[0],
        key[0],
        value[0],
        module.kit_keys,
        module.kit_values,
        *plan,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window or 0,
        softcap or 0.0,
    )
    return out[None], None


def _packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    plan: PackedPrompts,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """`_attention` for packed prompts; what a layer asks for was checked with the first ones."""
    out = attend_packed(
        query[0],
        key[0],
        value[0],
        module.kit_keys,
        module.kit_values,
        plan.blocks,
        plan.pad,
        plan.unpad,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window or 0,
        softcap or 0.0,
    )
    return out[None], None


def _chooses(module: nn.Module) -> bool:
    return hasattr(getattr(module, "config", None), "_attn_implementation")


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    plan: PromptPlan | TokenPlan | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: query [1, H, M, D] -> [1, M, H, D].

    Raises ValueError for everything that would change the result and is not done here.
    """
    assert dropout == 0.0, "dropout is off while we generate"
    name = type(module).__name__
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    kind = _layer_type(module)
    # Switches come as False and features as tensors, numbers or True.
    unknown = [
        k for k, v in others.items() if k not in _IGNORED and v is not None and v is not False
    ]
    refused = None
    if plan is None:
        refused = "hides from its attention the keywords its forward was given"
    elif attention_mask is not None or not causal:
        refused = "attends with a mask of its own"
    elif unknown:
        refused = f"attends with {', '.join(sorted(unknown))}"
    elif sliding_window is None and kind not in (None, "full_attention"):
        refused = f"uses {kind}"
    if plan is None or refused is not None:
        raise ValueError(f"{name} {refused}, which decoding does not support")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rule = Rule(scale, sliding_window, softcap)
    return plan.attend(module.layer_idx, query, key, value, rule)[None], None


def _layer_type(module: Any) -> str | None:
    types = getattr(module.config, "layer_types", None)
    return types[module.layer_idx] if types else None


def _visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """[P, P] bool, True where query p may look at key q."""
    at = torch.arange(length, device=device)
    distance = at[:, None] - at[None, :]
    return (distance >= 0) & (distance < (window or length))


def _capped(scores: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(scores / softcap)
