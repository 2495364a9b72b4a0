"""Memory that is given up and taken back: the same bits, views and results, whatever has left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import copied, same_weights

from rlhf_kit.config import RunConfig
from rlhf_kit.hybrid_engine.parked import Parked, parked_module
from rlhf_kit.ppo import PPOTrainer
from rlhf_kit.rlhf_engine import RLHFEngine
from rlhf_kit.types import PromptBatch

CPU = torch.device("cpu")


def test_a_storage_is_emptied_under_all_its_views_and_filled_again():
    flat = torch.arange(6.0)
    view, other = flat.view(2, 3)[1], torch.tensor([7, 8], dtype=torch.bfloat16)
    parked = Parked(lambda: [view, other])
    parked.leave()
    assert flat.untyped_storage().nbytes() == other.untyped_storage().nbytes() == 0
    assert parked.is_away and parked.nbytes == 24 + 4
    parked.leave()
    parked.come()
    parked.come()
    assert flat.tolist() == [0, 1, 2, 3, 4, 5] and view.tolist() == [3, 4, 5]
    assert other.tolist() == [7, 8] and not parked.is_away
    view += 1
    parked.leave()
    parked.come()
    assert flat.tolist() == [0, 1, 2, 4, 5, 6]


def test_tensors_are_asked_for_whenever_they_leave():
    held = [torch.ones(2)]
    parked = Parked(lambda: held)
    parked.leave()
    parked.come()
    held.append(torch.full((3,), 2.0))
    parked.leave()
    assert parked.nbytes == 8 + 12
    parked.come()
    assert held[1].tolist() == [2, 2, 2]


def test_a_frozen_module_is_away_from_the_start_and_is_copied_once():
    layer = torch.nn.Linear(3, 2)
    x = torch.ones(1, 3)
    expected = layer(x).detach()
    parked = parked_module(layer, CPU)
    assert all(p.untyped_storage().nbytes() == 0 for p in layer.parameters())
    for _ in range(2):
        parked.come()
        assert torch.equal(layer(x), expected)
        with torch.no_grad():
            layer.weight += 1  # what is frozen does not change; if it did, it would come back
        parked.leave()


def away(engine: RLHFEngine) -> set[str]:
    """What is not on the device now."""
    found = {name for name, parked in engine._parked.items() if parked.is_away}
    for name, trained in (("actor", engine.actor), ("critic", engine.critic)):
        found |= {f"{name} weights"} if trained._weights.is_away else set()
        found |= {f"{name} states"} if trained._states.is_away else set()
    return found | ({"ema"} if engine.ema and engine.ema._parked.is_away else set())


@pytest.mark.parametrize(
    ("stage", "dtype", "lora"),
    [(0, "fp32", 0), (1, "fp32", 4), (2, "bf16", 0), (3, "fp32", 0)],
)
def test_what_a_phase_does_not_need_is_away_and_every_number_stays(
    stage: int,
    dtype: str,
    lora: int,
    build: Callable[[RunConfig], RLHFEngine],
    tiny_args: Callable[..., RunConfig],
    prompts: Callable[..., PromptBatch],
):
    ends: list[Any] = []
    for offload in (False, True):
        args = tiny_args(
            memory__offload_idle=offload,
            actor_engine__zero_stage=stage,
            actor_engine__dtype=dtype,
            actor_engine__lora__rank=lora,
            critic_engine__zero_stage=min(stage, 2),
            critic_engine__dtype=dtype,
        )
        trainer = PPOTrainer(engine=build(args), args=args)
        engine = trainer.engine
        for weight in engine.reward.parameters():
            # In both cases where PyTorch puts tensors, whose address a product's rounding depends
            # on: those that were not away yet lie as their file was mapped.
            weight.data = weight.data if weight.untyped_storage().nbytes() == 0 else weight.clone()
        phases: list[set[str]] = []
        generate = engine.actor.generate

        def watched(
            *inputs: Any, engine: Any = engine, generate: Any = generate, seen: Any = phases
        ) -> Any:
            seen.append(away(engine))
            return generate(*inputs)

        engine.actor.generate = watched  # type: ignore[method-assign]
        history = []
        for _ in range(2):
            history.append(trainer.step(trainer.generate_experience(prompts())))
            phases.append(away(engine))
        ends.append((history, copied(engine.critic.module), engine.actor.state()["adam_steps"]))
        frozen = {"reward"} if lora else {"ref", "reward"}
        idle = frozen | {"critic weights", "actor states", "critic states", "ema"}
        unborn = {"actor states", "critic states"} if stage == 0 else set()  # before a first step
        expected = [idle - unborn, frozen, idle, frozen]
        assert phases == (expected if offload else [set()] * 4)
    (plain, weights, steps), (offloaded, others, other_steps) = ends
    for one, other in zip(plain, offloaded, strict=True):
        keys = [key for key in one if key.split("/")[0] not in ("phase", "perf")]
        assert {key: one[key] for key in keys} == {key: other[key] for key in keys}
    assert same_weights(weights, others) and steps == other_steps
