"""From the live actor, sharded by ZeRO or whole, to a tensor-parallel copy that generates.

Shapes: t ranks of a group, B prompts, P prompt, R response, M packed tokens, V vocabulary.

The copy is a model of the actor's own class with smaller projections, so that a `Decoder` takes it
as any other. All ranks of a group decode the same rows: every sum and every logit is equal on all
of them to the last bit, hence every token too, and with the tokens all that follows from them.

    DeepSpeed: each weight cut over all ranks        copy: some heads, some units, on each of t
    [shard 0] [shard 1] ... [shard n]    -- a layer at a time -->    [rank 0] ... [rank t - 1]
"""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_kit import distributed
from rlhf_kit.config import require
from rlhf_kit.hybrid_engine.partitions import gathered
from rlhf_kit.hybrid_engine.shards import (
    LAYER,
    Range,
    Shard,
    attention_modules,
    features_of,
    heads_of,
    is_transposed,
    shards,
    vocabulary_range,
)
from rlhf_kit.types import PromptBatch, Rollout


class RowParallelLinear(nn.Linear):
    """A rank's columns of a linear layer: what it returns is the sum over the group.

    The group's first rank alone has the bias.
    """

    group: dist.ProcessGroup

    def forward(self, input: Tensor) -> Tensor:
        output = F.linear(input, self.weight, self.bias)
        dist.all_reduce(output, group=self.group)
        return output


class VocabularyParallelLinear(nn.Linear):
    """A rank's rows of the head: what it returns are the logits of all ranks, [..., V]."""

    group: dist.ProcessGroup
    ranks: int
    vocabulary: int

    def forward(self, input: Tensor) -> Tensor:
        mine = F.linear(input, self.weight, self.bias).flatten(0, -2)
        each = -(-self.vocabulary // self.ranks)
        if mine.shape[-1] < each:
            mine = F.pad(mine, (0, each - mine.shape[-1]))
        logits = mine.new_empty(self.ranks * len(mine), each)
        _all_gather(logits, mine, group=self.group)
        rows = logits.view(self.ranks, -1, each).transpose(0, 1).flatten(1)
        return rows[:, : self.vocabulary].unflatten(0, input.shape[:-1])


# torch 2.13 has renamed it, and warns about the old name.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def require_hosts(ranks: int) -> None:
    """ValueError unless groups of so many ranks fit into each host."""
    here = distributed.local_world_size()
    require(
        here % ranks == 0,
        f"generation_tp is {ranks}, which does not divide the number of ranks of each host, "
        f"{here}; choose a divisor, or start another number of ranks",
    )


@functools.cache
def group_of(ranks: int, timeout: timedelta) -> dist.ProcessGroup:
    """This rank's group of `ranks` neighbours on its host; all ranks of the run must call it.

    Made once: a group keeps communicators and their memory.
    """
    require_hosts(ranks)
    world = range(0, distributed.world_size(), ranks)
    groups: list[Any] = [dist.new_group(range(n, n + ranks), timeout=timeout) for n in world]
    return groups[distributed.rank() // ranks]


class TensorParallelCopy:
    """This rank's part of `source`, in buffers that stay where they are from update to update.

    Memory is taken at the first update and given back by `free`.
    """

    def __init__(self, source: Any, group: dist.ProcessGroup) -> None:
        """`source` is a transformers causal LM, before or after DeepSpeed has taken it.

        ValueError, by name, for an architecture that can't be split over the group.
        """
        self.source = source
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        with torch.device("meta"):
            self.model: Any = type(source)(copy.deepcopy(source.config))
        self.version: int | None = None
        """Of the source's weights that the copy has."""
        self._shards = shards(self.model, self.rank, self.ranks)
        self._take_heads()
        self._split_linears()
        self._tied = self._split_head()
        self.model.eval().requires_grad_(False)

    @property
    def allocated(self) -> bool:
        return self.version is not None

    def nbytes(self) -> int:
        """Memory of this rank's part."""
        storages = {
            p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
            for p in self.model.parameters()
            if not p.is_meta
        }
        return sum(storages.values())

    @torch.no_grad()
    def update(self, version: int) -> None:
        """Take over the source's weights, unless they are still those of `version`.

        A layer is whole on a rank only while its part is copied. Adapters are merged into the
        copy. Under ZeRO-3 all ranks of the run must call it.
        """
        if version == self.version:
            return
        if not self.allocated:
            self._allocate()
        for unit in self._units():
            modules = [self.source.get_submodule(name) for name, _ in unit]
            with gathered(p for module in modules for p in module.parameters()):
                for name, leaf in unit:
                    self._copy(name, leaf)
        self.version = version

    def free(self) -> None:
        """Give the memory back; what holds addresses in it (CUDA graphs) is void."""
        for module in self.model.modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[leaf] = _parameter(parameter.to("meta"))
        self.version = None

    def _take_heads(self) -> None:
        """Tell the attention modules, and the config they share, how many heads are here."""
        heads = heads_of(self.source, self.ranks)
        config = self.model.config.get_text_config()
        size = getattr(config, "head_dim", None) or config.hidden_size // heads.query
        config.head_dim = size
        config.num_attention_heads = heads.local
        if getattr(config, "num_key_value_heads", None) is not None:
            config.num_key_value_heads = heads.local_key_value
        here = {
            "num_heads": heads.local,
            "num_attention_heads": heads.local,
            "num_key_value_heads": heads.local_key_value,
            "num_key_value_groups": heads.local // heads.local_key_value,
            "split_size": heads.local * size,  # of GPT-2
        }
        for module in attention_modules(self.model).values():
            for name in here.keys() & vars(module).keys():
                setattr(module, name, here[name])

    def _split_linears(self) -> None:
        for name, shard in self._shards.items():
            whole: Any = self.model.get_submodule(name)
            inputs, outputs = features_of(whole)
            outputs = sum(length for _, length in shard.outputs) or outputs
            kind, bias = nn.Linear, whole.bias is not None
            if shard.inputs is not None:
                kind, inputs, bias = RowParallelLinear, shard.inputs[1], bias and self.rank == 0
            self._replace(name, kind(inputs, outputs, bias=bias, device="meta"))

    def _split_head(self) -> bool:
        """Replace the head by this rank's part of it; whether it shares the embeddings' weight."""
        head: Any = self.model.get_output_embeddings()
        (name,) = (name for name, module in self.model.named_modules() if module is head)
        start, length = vocabulary_range(head.out_features, self.rank, self.ranks)
        bias = head.bias is not None
        part = VocabularyParallelLinear(head.in_features, length, bias=bias, device="meta")
        part.ranks, part.vocabulary = self.ranks, head.out_features
        self._replace(name, part)
        self._shards[name] = Shard(((start, length),))
        self._head = name
        source = self.source
        words, head = source.get_input_embeddings(), source.get_output_embeddings()
        return _base(head).weight is _base(words).weight

    def _replace(self, name: str, module: Any) -> None:
        module.group = self.group
        parent, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, module)

    def _owned(self) -> Iterator[tuple[str, str]]:
        """Module and name of each parameter with memory of its own."""
        shared = (self._head, "weight") if self._tied else None
        for name, module in self.model.named_modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None and (name, leaf) != shared:
                    yield name, leaf

    def _units(self) -> Iterable[list[tuple[str, str]]]:
        """What is gathered at a time: a layer, or a module outside the layers."""
        units: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for name, leaf in self._owned():
            layer = LAYER.fullmatch(name)
            units[layer[1] if layer else name].append((name, leaf))
        return units.values()

    def _allocate(self) -> None:
        """Take memory as the source has it by now: DeepSpeed may have moved and cast it.

        Of a layer one behind the other, first matrices, then vectors, as ZeRO keeps them: so
        those of an attention's queries, keys and values are one matrix for the decoder.
        """
        device = distributed.local_device()
        for unit in self._units():
            flat: dict[torch.dtype, list[Any]] = defaultdict(list)
            for name, leaf in unit:
                module = self.model.get_submodule(name)
                base = _base(self.source.get_submodule(name))
                flat[getattr(base, leaf).dtype].append((module, leaf, getattr(module, leaf).shape))
            for dtype, parts in flat.items():
                parts.sort(key=lambda part: len(part[2]) < 2)
                sizes = [shape.numel() for *_, shape in parts]
                memory = torch.empty(sum(sizes), dtype=dtype, device=device).split(sizes)
                for (module, leaf, shape), part in zip(parts, memory, strict=True):
                    module._parameters[leaf] = _parameter(part.view(shape))
        if self._tied:
            words: Any = self.model.get_input_embeddings()
            ((start, length),) = self._shards[self._head].outputs
            self.model.get_submodule(self._head)._parameters["weight"] = _parameter(
                words.weight.data[start : start + length]
            )
        for name, module in self.model.named_modules():
            for leaf in module._buffers:  # of positions: the same for every head
                module._buffers[leaf] = getattr(_base(self.source.get_submodule(name)), leaf)

    def _copy(self, name: str, leaf: str) -> None:
        """Copy this rank's part of a parameter, whose source is whole."""
        target: Tensor = getattr(self.model.get_submodule(name), leaf).data
        source: Any = self.source.get_submodule(name)
        base = _base(source)
        whole: Tensor = getattr(base, leaf).data
        delta = _delta(source) if leaf == "weight" else None
        if leaf == "weight" and is_transposed(base):
            whole, delta = whole.T, None if delta is None else delta.T
        shard = self._shards.get(name, Shard())
        inputs = shard.inputs if leaf == "weight" else None
        at = 0
        for outputs in shard.outputs or ((0, whole.shape[0]),):
            part = _part(whole, outputs, inputs)
            if delta is not None:
                part = part.float() + _part(delta, outputs, inputs).float()
            target[at : at + outputs[1]].copy_(part)
            at += outputs[1]


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _base(module: Any) -> Any:
    """The plain layer inside one with adapters."""
    return getattr(module, "base_layer", module)


def _delta(module: Any) -> Any:
    """What the adapters of a layer add to its weight, a tensor; None where it has none."""
    if not hasattr(module, "lora_A"):
        return None
    return sum(module.get_delta_weight(adapter) for adapter in module.active_adapters)


def _part(whole: Tensor, outputs: Range, inputs: Range | None) -> Tensor:
    part = whole.narrow(0, *outputs)
    return part if inputs is None else part.narrow(1, *inputs)


# ---- the rows of a group


def gather_prompts(prompts: PromptBatch, group: dist.ProcessGroup) -> tuple[PromptBatch, slice]:
    """The prompts of all ranks of a group, without their texts, and where this rank's stand."""
    mine = tuple(x.cpu() for x in (prompts.input_ids, prompts.attention_mask, prompts.seeds))
    parts = distributed.gather_objects(mine, group)
    longest = max(ids.shape[1] for ids, _, _ in parts)
    ids, mask, seeds = (
        torch.cat([_pad_left(x, longest) if x.dim() == 2 else x for x in column])
        for column in zip(*parts, strict=True)
    )
    before = sum(len(seeds) for _, _, seeds in parts[: dist.get_rank(group)])
    together = PromptBatch(ids, mask, seeds, ((),) * len(ids))
    return together.to(prompts.input_ids.device), slice(before, before + len(prompts))


def _pad_left(rows: Tensor, length: int) -> Tensor:
    return F.pad(rows, (length - rows.shape[1], 0))


def rows_of(rollout: Rollout, rows: slice, prompts: PromptBatch) -> Rollout:
    """Some rows of a rollout, cut to their own longest response; `prompts` are theirs."""
    mask = rollout.response_mask[rows]
    longest = int(mask.sum(-1).max()) if len(mask) else 0
    return Rollout(
        prompts=prompts,
        response_ids=rollout.response_ids[rows, :longest],
        response_mask=mask[:, :longest],
        logprobs=rollout.logprobs[rows, :longest],
        ended=rollout.ended[rows],
    )


def require_same(rollout: Rollout, group: dist.ProcessGroup) -> None:
    """RuntimeError where the ranks of a group have sampled different tokens."""
    ids = rollout.response_ids.masked_fill(~rollout.response_mask, -1).cpu()
    places = torch.arange(1, ids.numel() + 1).view_as(ids)
    said = distributed.gather_objects((tuple(ids.shape), int((ids * places).sum())), group)
    if len(set(said)) > 1:
        raise RuntimeError(
            "the ranks of a generation group sampled different tokens from the same prompts, "
            "which their equal logits can't explain: look for a faulty GPU, or for GPUs of "
            "different kinds in one host, and set generation_tp to 1 meanwhile"
        )
