"""Each invariant passes on a right set-up, and fails readably on a fault planted for it.

Shapes: B batch, P prompt, R response.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhf_kit import invariants
from rlhf_kit.config import RunConfig
from rlhf_kit.micro_batches import micro_batches
from rlhf_kit.ppo import PPOTrainer
from rlhf_kit.rlhf_engine import RLHFEngine
from rlhf_kit.types import Experience, PromptBatch

Started = tuple[PPOTrainer, Experience]


@pytest.fixture
def started(
    build: Callable[[RunConfig], RLHFEngine],
    tiny_args: Callable[..., RunConfig],
    prompts: Callable[..., PromptBatch],
) -> Callable[..., Started]:
    def start(**changes: Any) -> Started:
        args = tiny_args(**changes)
        trainer = PPOTrainer(engine=build(args), args=args)
        return trainer, trainer.generate_experience(prompts())

    return start


def failures(trainer: PPOTrainer, experience: Experience) -> dict[str, str]:
    checks = invariants.check_first_batch(trainer, experience)
    return {check.name: check.detail for check in checks if not check.passed}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"generation__temperature": 0.7},
        {"ppo__old_logprobs": "rollout"},
        {"ppo__old_logprobs": "corrected"},
        {"actor_engine__lora__rank": 4},
        {"actor_engine__zero_stage": 3},
        {"actor_engine__dtype": "bf16", "actor_engine__zero_stage": 2},
    ],
    ids=str,
)
def test_a_right_set_up_passes_every_check(
    changes: dict[str, Any], started: Callable[..., Started], capsys: pytest.CaptureFixture[str]
):
    trainer, experience = started(**changes)
    checks = invariants.check_first_batch(trainer, experience)
    invariants.report(checks)
    trainer.step(experience)
    after = invariants.check_after_first_step(trainer)
    invariants.report(after)
    assert len(checks) == 7 and len(after) == 1
    assert capsys.readouterr().out.count("ok  ") == 8


@pytest.mark.parametrize("kind", ["opt", "gpt2"])
def test_other_architectures_pass_too(
    kind: str, started: Callable[..., Started], model_dir: Callable[..., str]
):
    assert not failures(*started(actor_model=model_dir(kind), reward_model=model_dir(kind)))


def test_a_ratio_that_is_not_one_is_named(started: Callable[..., Started]):
    trainer, experience = started()
    wrong = dataclasses.replace(experience, old_logprobs=experience.old_logprobs + 1e-3)
    assert "largest |log ratio| 1.00e-03" in failures(trainer, wrong)["the first ratio is 1"]


def test_live_dropout_is_caught_as_a_ratio(started: Callable[..., Started]):
    trainer, experience = started()
    layer = trainer.engine.actor.module.model.layers[0].mlp
    layer.register_forward_hook(
        lambda module, _, out: torch.nn.functional.dropout(out, 0.1) if module.training else out
    )
    assert "the first ratio is 1" in failures(trainer, experience)


def test_an_actor_that_is_not_its_ref_is_named(started: Callable[..., Started]):
    trainer, experience = started()
    wrong = dataclasses.replace(experience, ref_logprobs=experience.ref_logprobs - 0.5)
    found = failures(trainer, wrong)
    assert "5.00e-01" in found["KL is 0 while the actor equals the ref"]


def test_padding_that_is_read_like_tokens_is_caught(
    started: Callable[..., Started], monkeypatch: pytest.MonkeyPatch
):
    from rlhf_kit import rlhf_engine

    def careless(ids: torch.Tensor, mask: torch.Tensor, length: int, **how: Any) -> Any:
        prompt = torch.arange(ids.shape[1]) < ids.shape[1] - length
        return micro_batches(ids, mask | prompt, length, **how)

    trainer, experience = started()
    monkeypatch.setattr(rlhf_engine, "micro_batches", careless)
    assert "largest difference" in failures(trainer, experience)["left padding changes nothing"]


def test_an_engine_that_samples_from_other_weights_is_caught(started: Callable[..., Started]):
    trainer, experience = started()
    wrong = dataclasses.replace(experience, rollout_logprobs=experience.rollout_logprobs - 0.3)
    assert "3.00e-01" in failures(trainer, wrong)["generation and training agree"]


def test_prompts_that_end_otherwise_than_the_template_says_are_caught(
    started: Callable[..., Started],
):
    trainer, _ = started()
    rollout = trainer.last_rollout
    ids = rollout.prompts.input_ids.clone()
    ids[0, -1] = 5
    wrong = dataclasses.replace(
        rollout, prompts=dataclasses.replace(rollout.prompts, input_ids=ids)
    )
    check = invariants._prompt_end(trainer, wrong)
    assert not check.passed and check.detail.startswith("7 of 8 end with")


def test_an_eos_outside_the_mask_is_caught(started: Callable[..., Started]):
    trainer, experience = started()
    rollout = trainer.last_rollout
    row = int((rollout.ended & (rollout.response_mask.sum(1) > 0)).nonzero()[0])
    mask = experience.response_mask.clone()
    mask[row, int(mask[row].sum()) - 1] = False
    mask[row, 0] = True
    ids = rollout.response_ids.clone()
    ids[row, 0] = 5
    trainer.last_rollout = dataclasses.replace(rollout, response_ids=ids, response_mask=mask)
    found = failures(trainer, dataclasses.replace(experience, response_mask=mask))
    assert "have EOS as their last token under the mask" in found["EOS is a trained action"]


def test_a_score_one_slot_late_is_caught(started: Callable[..., Started]):
    trainer, experience = started()
    wrong = dataclasses.replace(experience, rewards=experience.rewards.roll(1, dims=1))
    assert "largest deviation" in failures(trainer, wrong)["the score sits on the last token"]


def test_an_average_that_never_moved_is_caught(
    started: Callable[..., Started], monkeypatch: pytest.MonkeyPatch
):
    trainer, experience = started()
    monkeypatch.setattr(trainer.engine.ema, "update", lambda: 0.9)
    trainer.step(experience)
    (check,) = invariants.check_after_first_step(trainer)
    assert not check.passed
    with pytest.raises(invariants.InvariantError, match="the EMA follows the weights: relative"):
        invariants.report([check])


def test_the_average_is_not_asked_for_during_the_warm_up(started: Callable[..., Started]):
    trainer, experience = started(ppo__critic_warmup_iterations=1)
    trainer.step(experience)
    assert invariants.check_after_first_step(trainer) == []


def test_a_failure_raises_one_sentence_with_every_diagnosis(started: Callable[..., Started]):
    trainer, experience = started()
    wrong = dataclasses.replace(
        experience,
        ref_logprobs=experience.ref_logprobs - 0.5,
        rollout_logprobs=experience.rollout_logprobs - 0.3,
    )
    with pytest.raises(ValueError) as caught:
        invariants.report(invariants.check_first_batch(trainer, wrong))
    text = str(caught.value)
    assert "KL is 0" in text and "generation and training agree" in text and "\n" not in text


def test_a_failure_on_another_rank_stops_this_one_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(invariants.distributed, "all_any", lambda *_: True)
    with pytest.raises(invariants.InvariantError, match="another rank's check"):
        invariants.report([invariants.Check("a", True, "b")])
