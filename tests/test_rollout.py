"""From prompts to experience: the loader, the sweep of the four models, and the samples.

Shapes: B batch, P prompt, R response, T = P + R.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import prompt_rows

from rlhf_kit import distributed
from rlhf_kit.config import RunConfig
from rlhf_kit.ppo import PPOTrainer
from rlhf_kit.rlhf_engine import RLHFEngine
from rlhf_kit.rollout import PromptLoader, make_experience, write_samples
from rlhf_kit.types import Experience, PromptBatch


@pytest.fixture(scope="module")
def trainer(
    build: Callable[[RunConfig], RLHFEngine], tiny_args: Callable[..., RunConfig]
) -> PPOTrainer:
    return PPOTrainer(engine=build(tiny_args()), args=tiny_args())


@pytest.fixture(scope="module")
def experience(trainer: PPOTrainer, prompts: Callable[..., PromptBatch]) -> Experience:
    return trainer.generate_experience(prompts())


def test_no_value_of_an_experience_depends_on_the_micro_batch(
    trainer: PPOTrainer, experience: Experience
):
    for changes in ({"micro_batch_size": 1}, {"micro_batch_size": 8}, {"micro_batch_tokens": 60}):
        config = dataclasses.replace(trainer.config, minibatch_size=8, **changes)
        assert trainer.last_rollout is not None
        other, _ = make_experience(
            trainer.last_rollout, trainer.engine, config, kl_coef=0.2, temperature=1.0
        )
        for name in ("old_logprobs", "ref_logprobs", "values", "rewards", "returns"):
            mask = experience.response_mask
            torch.testing.assert_close(
                getattr(other, name)[mask], getattr(experience, name)[mask], atol=1e-4, rtol=1e-4
            )


def test_an_experience_is_made_without_a_graph_and_never_edited(experience: Experience):
    tensors = [getattr(experience, field.name) for field in dataclasses.fields(experience)]
    assert not any(tensor.requires_grad for tensor in tensors)
    with pytest.raises(dataclasses.FrozenInstanceError):
        experience.rewards = experience.values  # type: ignore[misc]


def test_rows_of_an_experience_are_picked_from_every_tensor(experience: Experience):
    part = experience.rows(torch.tensor([5, 2]))
    assert len(part) == 2
    for field in dataclasses.fields(experience):
        whole = getattr(experience, field.name)
        assert torch.equal(getattr(part, field.name), torch.stack([whole[5], whole[2]]))


def test_explained_variance_is_over_the_tokens_of_all_ranks(
    trainer: PPOTrainer, experience: Experience, monkeypatch: pytest.MonkeyPatch
):
    """Two ranks with the same rows know as much as one."""
    assert trainer.last_rollout is not None
    arguments = (trainer.last_rollout, trainer.engine, trainer.config)
    _, one = make_experience(*arguments, kl_coef=0.2, temperature=1.0)
    monkeypatch.setattr(distributed, "all_sum", lambda x: 2 * x)
    _, two = make_experience(*arguments, kl_coef=0.2, temperature=1.0)
    assert one == pytest.approx(two, rel=1e-6, abs=1e-9)


def test_too_few_prompts_are_refused_with_the_numbers(tokenizer: Any):
    with pytest.raises(ValueError, match=r"ppo.batch_size is 8, but only 5 prompts are left"):
        PromptLoader(tokenizer, prompt_rows(5), batch_size=8, iterations=1, seed=1)


def test_a_loader_gives_as_many_batches_as_it_says(tokenizer: Any):
    loader = PromptLoader(tokenizer, prompt_rows(9), batch_size=4, iterations=5, seed=1)
    batches = list(loader)
    assert len(loader) == len(batches) == 5
    assert all(len(batch) == 4 and batch.attention_mask[:, -1].all() for batch in batches)


def test_samples_of_every_iteration_can_be_read(
    trainer: PPOTrainer, experience: Experience, tokenizer: Any, tmp_path: Path
):
    path = tmp_path / "samples.jsonl"
    path.write_text("what an earlier run left\n")
    rollout = trainer.last_rollout
    assert rollout is not None
    for iteration in (1, 2):
        write_samples(path, iteration, rollout, experience, tokenizer, count=3)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 1, 1, 2, 2, 2]
    for row, line in enumerate(lines[:3]):
        assert line["prompt"] == list(prompt_rows(3)[row].prompt)
        assert line["score"] == pytest.approx(float(experience.score[row]))
        assert line["ended"] == bool(rollout.ended[row]) and "<eos>" not in line["response"]
