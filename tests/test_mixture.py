"""The mixture loss: off, by a constant, or as a share of PPO's gradient.

Shapes: B batch, R response, T = P + R.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import prompt_rows

from rlhf_kit.config import DataConfig, RunConfig
from rlhf_kit.mixture import MEASURE_EVERY, probe_parameters
from rlhf_kit.ppo import PPOTrainer
from rlhf_kit.rlhf_engine import RLHFEngine
from rlhf_kit.tokenization import Encoded, as_text, encode_demonstrations
from rlhf_kit.types import PromptBatch

Args = Callable[..., RunConfig]
Build = Callable[[RunConfig], RLHFEngine]


@pytest.fixture(scope="module")
def texts(tokenizer: Any) -> list[Encoded]:
    return as_text(encode_demonstrations(tokenizer, prompt_rows(16), DataConfig()).rows)


def test_without_texts_or_with_kind_off_there_is_no_mixture_loss(
    build: Build, tiny_args: Args, texts: list[Encoded], capsys: pytest.CaptureFixture[str]
):
    engine = build(tiny_args())
    assert PPOTrainer(engine=engine, args=tiny_args(), mixture_rows=texts).mixture is None
    assert "mixture" not in capsys.readouterr().out
    wanted = tiny_args(ppo__mixture__kind="coef")
    assert PPOTrainer(engine=engine, args=wanted).mixture is None
    assert "no texts for the mixture loss were given: it is off" in capsys.readouterr().out


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("lora", [0, 4])
def test_the_weighted_gradient_has_the_share_that_was_asked_for(
    stage: int,
    lora: int,
    build: Build,
    tiny_args: Args,
    texts: list[Encoded],
    prompts: Callable[..., PromptBatch],
):
    args = tiny_args(
        actor_engine__zero_stage=stage,
        actor_engine__lora__rank=lora,
        ppo__minibatch_size=8,
        ppo__mixture__kind="grad_norm_ratio",
        ppo__mixture__ratio=0.25,
    )
    trainer = PPOTrainer(engine=build(args), args=args, mixture_rows=texts)
    experience = trainer.generate_experience(prompts())
    mixture, actor = trainer.mixture, trainer.engine.actor
    assert mixture is not None
    probes = probe_parameters(actor)
    tokens = float(experience.response_mask.sum())
    # Independently: one backward pass each over the whole batch.
    policy, _ = trainer._policy(actor.module, experience, tokens)
    of_policy = torch.autograd.grad(policy, probes)
    count = mixture.tokens()
    text = sum(mixture._loss(actor.module, part, count) for part in mixture._texts(8))
    of_text = torch.autograd.grad(text, probes)
    norms = [
        torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        for grads in (of_policy, of_text)
    ]
    metrics = trainer.step(experience)
    assert metrics["mixture/coef"] * float(norms[1] / norms[0]) == pytest.approx(0.25, rel=1e-3)
    assert metrics["mixture/loss"] == pytest.approx(float(text.detach()), rel=1e-5)
    assert actor.steps_done == 1


def test_the_weight_is_measured_again_every_tenth_step(
    build: Build, tiny_args: Args, texts: list[Encoded], prompts: Callable[..., PromptBatch]
):
    args = tiny_args(
        ppo__minibatch_size=2,
        ppo__epochs=3,
        ppo__max_approx_kl=0.0,
        ppo__mixture__kind="grad_norm_ratio",
    )
    trainer = PPOTrainer(engine=build(args), args=args, mixture_rows=texts)
    mixture = trainer.mixture
    assert mixture is not None
    weights = []
    original = mixture.backward

    def backward(*args: Any) -> torch.Tensor:
        weights.append(mixture.weight)
        return original(*args)

    mixture.backward = backward  # type: ignore[method-assign]
    trainer.step(trainer.generate_experience(prompts()))
    assert len(weights) == 12 and len(set(weights)) == 2
    assert len(set(weights[:MEASURE_EVERY])) == 1


def test_every_step_draws_other_texts_and_every_run_the_same(
    build: Build, tiny_args: Args, texts: list[Encoded]
):
    args = tiny_args(ppo__mixture__kind="coef", ppo__mixture__batch_ratio=2.0)
    engine = build(args)
    drawn = []
    for _ in range(2):
        mixture = PPOTrainer(engine=engine, args=args, mixture_rows=texts).mixture
        assert mixture is not None
        for mixture.steps in range(2):
            parts, tokens = mixture._texts(3), mixture.tokens()
            assert [len(text.input_ids) for text in parts] == [3, 3, 2]
            assert tokens == sum(len(text.places) for text in parts)
            drawn.append([row.tolist() for text in parts for row in text.input_ids])
    assert drawn[:2] == drawn[2:] and drawn[0] != drawn[1]


def test_a_gradient_share_is_refused_under_zero_3(
    build: Build, tiny_args: Args, texts: list[Encoded]
):
    args = tiny_args(actor_engine__zero_stage=3, ppo__mixture__kind="grad_norm_ratio")
    engine = build(args)
    with pytest.raises(ValueError, match="set ppo.mixture.kind to coef"):
        PPOTrainer(engine=engine, args=args, mixture_rows=texts)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_constant_weight_trains_under_zero(
    stage: int,
    build: Build,
    tiny_args: Args,
    texts: list[Encoded],
    prompts: Callable[..., PromptBatch],
):
    args = tiny_args(
        actor_engine__zero_stage=stage, ppo__mixture__kind="coef", ppo__mixture__ptx_coef=1.0
    )
    trainer = PPOTrainer(engine=build(args), args=args, mixture_rows=texts)
    losses = []
    for _ in range(4):
        losses.append(trainer.step(trainer.generate_experience(prompts()))["mixture/loss"])
    assert losses[-1] < losses[0]
