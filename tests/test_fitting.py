"""Memory settings from a plan: what is taken, what is taken back, and what stands.

The plan is a stand-in whose sums can be done by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from rlhf_kit.config import RunConfig, preset
from rlhf_kit.fitting import Fitting, fit, roomy
from rlhf_kit.hybrid_engine.memory import GIB

MICRO = "ppo__micro_batch_size"


@dataclass(frozen=True)
class StandIn:
    needed: float

    def fits(self, memory: float) -> bool:
        return self.needed <= memory * GIB


Needs = Callable[[RunConfig], float]


@pytest.fixture
def needs(monkeypatch: pytest.MonkeyPatch) -> Callable[[Needs], None]:
    """Let a run need so many GiB."""

    def set_needs(gib: Needs) -> None:
        class Plan:
            @staticmethod
            def of(config: RunConfig, *, ranks: int) -> StandIn:
                return StandIn(gib(config) * GIB)

        monkeypatch.setattr("rlhf_kit.fitting.Plan", Plan)

    return set_needs


def of_ppo(config: RunConfig) -> float:
    """1 GiB a row, 20 without checkpointing the actor, 10 while what idles stays."""
    return (
        config.ppo.micro_batch_size
        + 20 * (not config.actor_engine.gradient_checkpointing)
        + 10 * (not config.memory.offload_idle)
    )


def taken(found: Fitting) -> list[dict]:
    return [dict(choice.changes) for choice, _ in found.reasons()]


def test_where_there_is_room_nothing_is_saved_though_the_preset_would(needs):
    needs(of_ppo)
    config = preset("consumer")
    assert config.actor_engine.gradient_checkpointing and config.memory.offload_idle
    found = fit(config, 94, 1, ())
    assert found.fits and taken(found) == []
    assert not found.config.actor_engine.gradient_checkpointing
    assert not found.config.memory.offload_idle
    # 64 rows a step of each stage, all at once; on four GPUs 16 each.
    assert found.config.ppo.micro_batch_size == found.config.sft.micro_batch_size == 64
    assert roomy(config, 4)[MICRO] == 16


def test_the_cheapest_choice_that_is_enough_is_taken_and_no_more_of_it(needs):
    needs(of_ppo)
    found = fit(preset("consumer"), 60, 1, ())
    # 64, 32 and 16 rows need 94, 62 and 46 GiB; the other stages need not change.
    assert taken(found) == [{MICRO: 16}]
    assert [without.needed / GIB for _, without in found.reasons()] == [94]
    assert found.config.sft.micro_batch_size == 64


def test_what_a_later_choice_makes_unnecessary_is_taken_back(needs):
    needs(of_ppo)
    found = fit(preset("consumer"), 25, 1, ())
    # One row needs 31 GiB: checkpointing as well. With it 8 rows do, 18 GiB; 16 need 26.
    assert taken(found) == [{MICRO: 8}, {"actor_engine__gradient_checkpointing": True}]
    assert [without.needed / GIB for _, without in found.reasons()] == [74, 38]


def test_what_the_user_sets_stands(needs):
    needs(of_ppo)
    config = preset("consumer", ppo__micro_batch_size=8)
    found = fit(config, 25, 1, {MICRO})
    assert taken(found) == [{"actor_engine__gradient_checkpointing": True}]
    assert found.config.ppo.micro_batch_size == 8

    config = preset("consumer", actor_engine__gradient_checkpointing=False)
    found = fit(config, 20, 1, {"actor_engine"})
    # One row with what idles away: 1 + 20 GiB is the closest.
    assert not found.fits and found.plan.needed / GIB == 21
    assert not found.config.actor_engine.gradient_checkpointing


def test_settings_that_belong_together_are_changed_all_or_not(needs):
    needs(lambda config: 1 if config.actor_engine.lora.rank else 100)
    config = preset("consumer")
    found = fit(config, 50, 1, ())
    assert found.config.actor_engine.lora.rank == 64
    assert found.config.sft.optimizer.learning_rate == pytest.approx(1e-4)
    found = fit(config, 50, 1, {"sft__optimizer__learning_rate"})
    assert not found.fits and found.config.actor_engine.lora.rank == 0


def test_adapters_are_not_made_of_adapters(needs):
    needs(lambda config: 100)
    found = fit(preset("consumer", actor_engine__lora__rank=128), 50, 1, ())
    assert not found.fits and found.config.actor_engine.lora.rank == 128
    assert found.config.sft.optimizer.learning_rate == 1e-5


def test_ranks_can_share_a_minibatch_with_every_micro_batch(needs):
    needs(lambda config: config.ppo.micro_batch_size)
    config = preset("consumer", ppo__batch_size=28, ppo__minibatch_size=28, ppo__micro_batch_size=7)
    # 14 rows a rank: 14, 7, not 3, 1.
    assert fit(config, 3, 2, ()).config.ppo.micro_batch_size == 1
    assert fit(config, 7, 2, ()).config.ppo.micro_batch_size == 7
