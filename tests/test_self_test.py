"""The self-test of generation: a right engine passes, every planted fault stops it.

Shapes: B batch, R response, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhf_kit.config import GenerationConfig, RunConfig
from rlhf_kit.hybrid_engine.engine import HybridEngine
from rlhf_kit.hybrid_engine.self_test import SelfTestError, self_test
from rlhf_kit.rlhf_engine import RLHFEngine
from rlhf_kit.types import PromptBatch, Rollout

SAMPLED = GenerationConfig(max_new_tokens=8, temperature=0.7, top_k=5, min_new_tokens=3)
"""Of which only the length may matter."""
Prompts = Callable[..., PromptBatch]


@pytest.fixture
def actor(
    build: Callable[[RunConfig], RLHFEngine], tiny_args: Callable[..., RunConfig]
) -> Callable[..., HybridEngine]:
    return lambda **changes: build(tiny_args(**changes)).actor


def plant(
    monkeypatch: pytest.MonkeyPatch, engine: HybridEngine, fault: Callable[[Rollout], Rollout]
) -> None:
    """Let the engine generate rollouts with a fault in them."""
    right = engine.generate
    monkeypatch.setattr(engine, "generate", lambda *inputs: fault(right(*inputs)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"actor_engine__lora__rank": 4},
        {"actor_engine__zero_stage": 3},
        {"actor_engine__dtype": "bf16", "actor_engine__zero_stage": 2},
    ],
    ids=str,
)
def test_the_engine_generates_what_plain_transformers_does(
    changes: dict[str, Any], actor: Callable[..., HybridEngine], prompts: Prompts
):
    engine = actor(**changes)
    before: Any = engine.module.generation_config
    found = self_test(engine, prompts(5), SAMPLED)
    assert found.tokens_equal or "dtype" in str(changes)
    assert found.largest_logprob_gap < (0.15 if "dtype" in str(changes) else 1e-4)
    assert found.speed_up > 0 and found.tokens_per_second > 0
    assert engine.module.generation_config is before
    assert "greedy tokens equal" in str(found)


def test_a_models_own_penalties_change_neither_side(
    actor: Callable[..., HybridEngine], prompts: Prompts
):
    engine = actor()
    settings: Any = engine.module.generation_config
    settings.repetition_penalty, settings.do_sample, settings.temperature = 5.0, True, 2.0
    assert self_test(engine, prompts(5), SAMPLED).tokens_equal


def test_another_token_stops_it_with_the_place(
    actor: Callable[..., HybridEngine], prompts: Prompts, monkeypatch: pytest.MonkeyPatch
):
    engine = actor()

    def fault(rollout: Rollout) -> Rollout:
        ids = rollout.response_ids.clone()
        ids[2, 0] = (ids[2, 0] + 1) % 50 + 10
        return dataclasses.replace(rollout, response_ids=ids)

    plant(monkeypatch, engine, fault)
    with pytest.raises(SelfTestError, match="token 0 of the response to prompt 2 is .* nats"):
        self_test(engine, prompts(5), SAMPLED)


def test_logprobs_of_another_temperature_stop_it_with_the_gap(
    actor: Callable[..., HybridEngine], prompts: Prompts, monkeypatch: pytest.MonkeyPatch
):
    engine = actor()
    plant(
        monkeypatch,
        engine,
        lambda rollout: dataclasses.replace(rollout, logprobs=rollout.logprobs / 0.7),
    )
    with pytest.raises(SelfTestError, match="logprobs differ by up to .* allowed 0.001"):
        self_test(engine, prompts(5), SAMPLED)


def test_a_response_that_ends_too_early_stops_it(
    actor: Callable[..., HybridEngine], prompts: Prompts, monkeypatch: pytest.MonkeyPatch
):
    engine = actor()

    def fault(rollout: Rollout) -> Rollout:
        mask = rollout.response_mask.clone()
        longest = int(mask.sum(1).argmax())
        mask[longest, int(mask[longest].sum()) - 1] = False
        return dataclasses.replace(rollout, response_mask=mask)

    plant(monkeypatch, engine, fault)
    with pytest.raises(SelfTestError, match="has 7 tokens, plain generation's 8"):
        self_test(engine, prompts(5), SAMPLED)


def test_a_tie_may_be_broken_either_way(
    actor: Callable[..., HybridEngine], prompts: Prompts, monkeypatch: pytest.MonkeyPatch
):
    engine = actor()
    module: Any = engine.module
    rollout = engine.generate(prompts(5), dataclasses.replace(SAMPLED, temperature=0.0))
    token, twin = int(rollout.response_ids[0, 0]), 0
    assert token not in (twin, *engine.decoder.eos_token_ids)
    with torch.no_grad():  # two tokens that mean the same and are always equally likely
        for layer in (module.get_input_embeddings(), module.get_output_embeddings()):
            layer.weight[twin] = layer.weight[token]
    assert self_test(engine, prompts(5), SAMPLED).tokens_equal

    def other_twin(rollout: Rollout) -> Rollout:
        ids = rollout.response_ids
        return dataclasses.replace(rollout, response_ids=ids.where(ids != twin, token))

    plant(monkeypatch, engine, other_twin)
    found = self_test(engine, prompts(5), SAMPLED)
    assert not found.tokens_equal and "equal up to ties" in str(found)
