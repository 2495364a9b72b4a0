"""The decode step with compiled layers against the plain one, on every architecture.

Compiled here by a backend that runs the traced operations one by one: what is rewritten, how
often a layer is traced, and that numbers stay the same does not depend on the code that follows.
"""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from test_decode import CONFIGS, EOS, GROUPED, PAD, WINDOWS, prompts, tiny
from torch import nn
from torch._dynamo.utils import counters

from rlhf_kit.config import EngineConfig, GenerationConfig, OptimizerConfig
from rlhf_kit.hybrid_engine import compiled_layers as compiled
from rlhf_kit.hybrid_engine import linears
from rlhf_kit.hybrid_engine.attention import STEP_NAME, PromptPlan, attach, own_attention
from rlhf_kit.hybrid_engine.decode import Decoder, _Run
from rlhf_kit.hybrid_engine.step import Step, forward
from rlhf_kit.hybrid_engine.tensor_parallel import RowParallelLinear
from rlhf_kit.hybrid_engine.training import TrainingEngine, start_deepspeed

LINEAR: Any = torch.nn.functional.linear
ALL = {**CONFIGS, "gemma2": WINDOWS["gemma2"], "gemma3_text": WINDOWS["gemma3_text"]}


@pytest.fixture(autouse=True)
def _plain_backend(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    monkeypatch.setattr(compiled, "_compiled_forwards", {})
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def step_after_prompts(model: Any, rows: int = 8) -> Step:
    """A step whose slots hold the prompts and the first token of each response."""
    decoder = Decoder(model, eos_token_ids=EOS, pad_token_id=PAD)
    run = _Run(decoder, prompts(rows=rows), GenerationConfig(max_new_tokens=6, slots=rows))
    with torch.no_grad(), own_attention(model):
        run.admit()
    return run.decode


def logits(step: Step, rows: int, *, fast: bool) -> torch.Tensor:
    with torch.no_grad(), own_attention(step.model, STEP_NAME), attach(step.model, step.cache):
        if not fast:
            return step._logits(rows)
        with compiled.compiled_layers(step.model):
            return step._logits(rows)


@pytest.mark.parametrize("kind", ALL)
def test_layers_of_a_kind_share_one_trace_for_any_number_of_rows(kind: str) -> None:
    step = step_after_prompts(tiny(kind, **ALL[kind]))
    for rows in (8, 5, 3):
        plain, fast = logits(step, rows, fast=False), logits(step, rows, fast=True)
        assert torch.allclose(plain, fast, atol=1e-5), rows
    kinds = 2 if kind in ("gemma2", "gemma3_text") else 1  # with and without a window
    assert counters["stats"]["unique_graphs"] == kinds
    assert "forward" not in vars(compiled.decoder_layers(step.model)[0])


@pytest.mark.parametrize("kind", ALL)
def test_prompts_read_by_compiled_layers_are_those_read_by_plain_ones(kind: str) -> None:
    step = step_after_prompts(tiny(kind, **ALL[kind]))
    other = {i: (k.clone(), v.clone()) for i, (k, v) in step.cache.layers.items()}
    chance = torch.Generator().manual_seed(3)
    for lengths in ([5, 3, 9], [7, 7], [2, 6, 6, 4]):  # of prompts, into blocks from behind
        blocks = torch.arange(len(lengths)).flip(0) + 2
        at = torch.arange(max(lengths))
        inside = at < torch.tensor(lengths)[:, None]
        ends = torch.tensor(lengths).cumsum(0)
        pad = (ends - torch.tensor(lengths))[:, None] + at.minimum(
            torch.tensor(lengths)[:, None] - 1
        )
        unpad = inside.flatten().nonzero()[:, 0]
        tokens = torch.randint(8, 40, (sum(lengths),), generator=chance)
        positions = at.expand_as(inside)[inside]
        plan = PromptPlan(step.cache, len(lengths), blocks, None if inside.all() else pad, unpad)
        with torch.no_grad():
            fast = step.read(tokens, positions, plan, ends - 1)
            read = {i: (k.clone(), v.clone()) for i, (k, v) in step.cache.layers.items()}
            step.cache.layers.update(other)
            with own_attention(step.model):
                plain = forward(step.model, tokens, positions, plan, ends - 1)
        assert fast.shape == (len(lengths), step.model.config.vocab_size)
        assert torch.allclose(plain, fast, atol=1e-5)
        for i, (keys, values) in read.items():
            for fast_block, block in zip((keys, values), step.cache.layers[i], strict=True):
                for at_block, length in zip(blocks.tolist(), lengths, strict=True):
                    there = fast_block[at_block, :, :length], block[at_block, :, :length]
                    assert torch.allclose(*there, atol=1e-5)


def test_lora_layers_share_one_trace_too() -> None:
    model = tiny("llama", **GROUPED)
    targets = peft.LoraConfig(r=2, target_modules="all-linear", exclude_modules=["lm_head"])
    peft.inject_adapter_in_model(targets, model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    step = step_after_prompts(model)
    for rows in (8, 3):
        assert torch.allclose(
            logits(step, rows, fast=False), logits(step, rows, fast=True), atol=1e-5
        )
    assert counters["stats"]["unique_graphs"] == 1


def watched_operators(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators of each traced layer after the rewrites, in order."""
    seen: list[str] = []
    join = compiled.join_linears

    def joined(graph: torch.fx.GraphModule, names: Any) -> None:
        join(graph, names)
        seen.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")

    monkeypatch.setattr(compiled, "join_linears", joined)
    return seen


def test_projections_are_joined_relu_and_sum_are_fused_and_the_query_scale_is_folded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = watched_operators(monkeypatch)
    # As DeepSpeed leaves it in a process that has used ZeRO-3.
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w, b=None: LINEAR(x, w, b))
    logits(step_after_prompts(tiny("opt", **CONFIGS["opt"])), 4, fast=True)
    assert seen.count("rlhf_kit.linears.default") == 2  # queries, keys, values; after attention
    assert seen.count("rlhf_kit.add_linear.default") == 1
    assert seen.count("rlhf_kit.linear_relu.default") == 1
    others = " ".join(name for name in seen if "rlhf_kit" not in name)
    assert not any(word in others for word in ("mul", "relu", "linear", "dropout"))
    seen.clear()
    logits(step_after_prompts(tiny("llama", **GROUPED)), 4, fast=True)
    assert seen.count("rlhf_kit.linears.default") == 3  # gate and up in one, too
    assert seen.count("rlhf_kit.add_linear.default") == 1


@pytest.mark.parametrize("kind", ["opt", "llama", "qwen2"])
def test_under_zero_the_joined_projections_are_one_product(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(kind, **CONFIGS[kind])
    engine = TrainingEngine(model, EngineConfig(zero_stage=1), OptimizerConfig(), total_steps=1)
    whole: list[bool] = []
    adjoining = linears._adjoining

    def watched(parts: Any) -> Any:
        found = adjoining(parts)
        if parts[0].dim() == 2:
            whole.append(found is not None)
            if found is not None:
                assert torch.equal(found, torch.cat(list(parts)))
        return found

    monkeypatch.setattr(linears, "_adjoining", watched)
    step = step_after_prompts(engine.module)
    assert torch.allclose(logits(step, 5, fast=False), logits(step, 5, fast=True), atol=1e-5)
    assert whole and all(whole)


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_layers_that_add_up_over_ranks_are_compiled_too(kind: str) -> None:
    start_deepspeed()
    model = tiny(kind, **CONFIGS[kind])
    for module in model.modules():
        for name in ("out_proj", "fc2", "o_proj", "down_proj"):
            linear: Any = getattr(module, name, None)
            if linear is not None:
                linear.__class__ = RowParallelLinear
                linear.group = torch.distributed.group.WORLD
    step = step_after_prompts(model)
    assert torch.allclose(logits(step, 5, fast=False), logits(step, 5, fast=True), atol=1e-5)


def test_weights_that_do_not_adjoin_give_the_same_columns() -> None:
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, 8, generator=chance)
    weights = [torch.randn(n, 8, generator=chance) for n in (6, 2, 4)]
    biases = [torch.randn(n, generator=chance) for n in (6, 2, 4)]
    expected = torch.cat([x @ w.T + b for w, b in zip(weights, biases, strict=True)], dim=-1)
    assert torch.allclose(linears.linears(x, weights, biases), expected, atol=1e-6)
    block, row = torch.cat(weights), torch.cat(biases)
    views, parts = list(block.split([6, 2, 4])), list(row.split([6, 2, 4]))
    assert torch.allclose(linears.linears(x, views, parts), expected, atol=1e-6)
    assert torch.allclose(linears.linears(x, views, biases), expected, atol=1e-6)
    swapped = [views[1], views[0], views[2]]
    assert linears._adjoining(swapped) is None and linears._adjoining(views) is not None
