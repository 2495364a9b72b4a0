"""Which part of each weight a rank of a tensor-parallel group holds.

Shapes: t ranks of a group, H query heads, Hkv key/value heads, D head size, V vocabulary.

Projections into heads and into the MLP are split by outputs, the projections back by inputs
(Shoeybi et al. 2019, section 3): each rank computes some heads and some of the MLP's units on its
own, and a layer needs two sums over the group. Norms and embeddings stay whole.

The rule knows the names that transformers gives to projections. A layer with anything else in it
is refused by name: what is split wrongly would still write fluent text.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import nn

from rlhf_kit.config import require

BY_HEADS = ("q_proj", "k_proj", "v_proj")
FUSED = {"gpt_neox": ("query_key_value", 1), "gpt2": ("c_attn", 3)}
"""Of a model type: its query, key and value in one projection, and how many blocks of heads it has.
GPT-NeoX puts the three of a head side by side, GPT-2 all queries before all keys."""
OUT = ("gate_proj", "up_proj", "fc1", "dense_h_to_4h", "c_fc")
BACK = ("o_proj", "out_proj", "dense", "down_proj", "fc2", "dense_4h_to_h", "c_proj")
LAYER = re.compile(r"(.*?\.\d+)\.(.*)")
"""A layer's name, and a name inside it."""

Range = tuple[int, int]
"""First element and number of elements."""


@dataclass(frozen=True)
class Heads:
    """How a group shares the heads of attention."""

    query: int
    """H, of the whole model."""
    key_value: int
    """Hkv, of the whole model."""
    ranks: int
    """t"""

    @property
    def local(self) -> int:
        """Query heads of a rank."""
        return self.query // self.ranks

    @property
    def local_key_value(self) -> int:
        """Key/value heads of a rank: with fewer heads than ranks, some ranks hold the same."""
        return max(self.key_value // self.ranks, 1)

    def first_key_value(self, rank: int) -> int:
        return rank * self.key_value // self.ranks


@dataclass(frozen=True)
class Shard:
    """What a rank holds of a linear layer."""

    outputs: tuple[Range, ...] = ()
    """Of its outputs; all where this is empty."""
    inputs: Range | None = None
    """Of its inputs; all where this is None. The results then add up over the group."""


def heads_of(model: Any, ranks: int) -> Heads:
    """The heads of a transformers causal LM; ValueError where `ranks` can't share them."""
    config = model.config.get_text_config()
    query = config.num_attention_heads
    key_value = getattr(config, "num_key_value_heads", None) or query
    name = type(model).__name__
    require(
        query % ranks == 0,
        f"generation_tp is {ranks}, which does not divide the {query} attention heads of {name}; "
        "choose a divisor",
    )
    require(
        key_value % ranks == 0 or ranks % key_value == 0,
        f"generation_tp is {ranks}, but the {key_value} key/value heads of {name} can't be shared "
        "evenly; choose a divisor or a multiple",
    )
    return Heads(query, key_value, ranks)


def shards(model: Any, rank: int, ranks: int) -> dict[str, Shard]:
    """The shard of every linear layer that is split, by its name, for one rank of a group.

    `model` is a transformers causal LM without adapters; its weights are not read. ValueError, by
    name, where a layer can't be split.
    """
    heads = heads_of(model, ranks)
    kind = model.config.get_text_config().model_type
    layers: dict[str, dict[str, nn.Module]] = defaultdict(dict)
    for name, module in model.named_modules():
        if LAYER.fullmatch(name) and (isinstance(module, nn.Linear) or is_transposed(module)):
            parent, _, leaf = name.rpartition(".")
            layers[parent][leaf] = module
    require(bool(layers), f"{type(model).__name__} has no numbered layers to split")
    found: dict[str, Shard] = {}
    for parent, linears in layers.items():
        attends = _attends(linears, kind)
        back = [leaf for leaf in linears if leaf in BACK]
        odd = [leaf for leaf in linears if leaf not in BACK and not _is_out(leaf, attends, kind)]
        if odd or len(back) != 1 or len(linears) == 1:
            _refuse(model, f"{parent}.{(odd or list(linears))[0]}", ranks)
        for leaf, module in linears.items():
            name, (inputs, outputs) = f"{parent}.{leaf}", features_of(module)
            if leaf in BACK:
                found[name] = Shard(inputs=_share(model, name, inputs, rank, ranks))
            elif leaf in BY_HEADS:
                found[name] = Shard((_of_heads(model, name, outputs, heads, rank),))
            elif attends:
                found[name] = Shard(_fused(outputs, FUSED[kind][1], heads, rank))
            else:
                found[name] = Shard((_share(model, name, outputs, rank, ranks),))
    _check_rest(model, found, ranks)
    return found


def vocabulary_range(vocabulary: int, rank: int, ranks: int) -> Range:
    """Rows of the head that a rank holds: the last ranks may have fewer."""
    each = -(-vocabulary // ranks)
    start = min(rank * each, vocabulary)
    return start, min(each, vocabulary - start)


def attention_modules(model: Any) -> dict[str, Any]:
    """The modules that project into heads, by name."""
    kind = model.config.get_text_config().model_type
    return {
        name: module
        for name, module in model.named_modules()
        if _attends(dict(module.named_children()), kind)
    }


def _attends(children: dict[str, Any], kind: str) -> bool:
    return "q_proj" in children or (kind in FUSED and FUSED[kind][0] in children)


def _is_out(leaf: str, attends: bool, kind: str) -> bool:
    if not attends:
        return leaf in OUT
    return leaf in BY_HEADS or (kind in FUSED and leaf == FUSED[kind][0])


def is_transposed(module: nn.Module) -> bool:
    """Whether it is GPT-2's Conv1D: a linear layer whose weight is [inputs, outputs]."""
    return type(module).__name__ == "Conv1D"


def features_of(module: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    shape = module.weight.shape
    return (shape[0], shape[1]) if is_transposed(module) else (shape[1], shape[0])


def _share(model: Any, name: str, features: int, rank: int, ranks: int) -> Range:
    require(
        features % ranks == 0,
        f"generation_tp is {ranks}, which does not divide the {features} units of "
        f"{type(model).__name__}'s {name}; choose a divisor",
    )
    return rank * (features // ranks), features // ranks


def _of_heads(model: Any, name: str, outputs: int, heads: Heads, rank: int) -> Range:
    """The outputs of a query, key or value projection that belong to a rank's heads."""
    queries = name.endswith("q_proj")
    count = heads.query if queries else heads.key_value
    if outputs % count:
        _refuse(model, name, heads.ranks)
    size = outputs // count
    if queries:
        return rank * heads.local * size, heads.local * size
    return heads.first_key_value(rank) * size, heads.local_key_value * size


def _fused(outputs: int, blocks: int, heads: Heads, rank: int) -> tuple[Range, ...]:
    """A rank's heads in each block of heads of a fused projection; Hkv = H there."""
    size = outputs // blocks // heads.query
    length = heads.local * size
    return tuple((block * heads.query * size + rank * length, length) for block in range(blocks))


def _check_rest(model: Any, found: dict[str, Shard], ranks: int) -> None:
    """Refuse what stays whole beside split layers, unless it is the same for every head and unit.

    A norm over the hidden size is, and inside attention one over the size of a head.
    """
    config = model.config.get_text_config()
    hidden, attention = config.hidden_size, attention_modules(model)
    size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if owner in found or not LAYER.fullmatch(name):
            continue
        inside = any(name.startswith(f"{each}.") for each in attention)
        norm = parameter.shape == (size,) and owner.rpartition(".")[0] in attention
        if not (norm if inside else parameter.shape == (hidden,)):
            _refuse(model, name, ranks)


def _refuse(model: Any, name: str, ranks: int) -> None:
    raise ValueError(
        f"{type(model).__name__} has {name}, which can't be split over {ranks} ranks here; set "
        "generation_tp to 1"
    )
