"""The PPO trainer on tiny models: the announced API, every source of old logprobs, stability.

Shapes: B batch, P prompt, R response, T = P + R.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import copied, prompt_rows, same_weights
from transformers import AutoModelForCausalLM

from rlhf_kit.checkpoint import export
from rlhf_kit.config import GenerationConfig, RunConfig
from rlhf_kit.models import adapters_off
from rlhf_kit.ppo import PPOTrainer
from rlhf_kit.rlhf_engine import RLHFEngine
from rlhf_kit.rollout import PromptLoader
from rlhf_kit.types import PromptBatch

Args = Callable[..., RunConfig]
Build = Callable[[RunConfig], RLHFEngine]
Prompts = Callable[..., PromptBatch]
LORA = {"actor_engine__lora__rank": 4, "critic_engine__lora__rank": 4}


def test_the_announced_loop_runs_as_it_was_printed(tokenizer: Any, tiny_args: Args):
    from rlhf_kit import DeepSpeedPPOTrainer, DeepSpeedRLHFEngine

    args = tiny_args(ppo__iterations=2)
    num_total_iters = args.ppo.iterations
    prompt_train_dataloader = PromptLoader(
        tokenizer, prompt_rows(16), batch_size=8, iterations=num_total_iters, seed=1
    )
    losses = []

    engine = DeepSpeedRLHFEngine(
        actor_model_name_or_path=args.actor_model_name_or_path,
        critic_model_name_or_path=args.critic_model_name_or_path,
        tokenizer=tokenizer,
        num_total_iters=num_total_iters,
        args=args,
    )
    trainer = DeepSpeedPPOTrainer(engine=engine, args=args)
    for prompt_batch in prompt_train_dataloader:
        out = trainer.generate_experience(prompt_batch)
        actor_loss, critic_loss = trainer.train_rlhf(out)
        losses.append((actor_loss, critic_loss))

    assert len(losses) == 2 and all(math.isfinite(x) for pair in losses for x in pair)
    assert trainer.iteration == 2 and all(critic > 0 for _, critic in losses)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("lora", [0, 4])
def test_generation_reads_the_weights_that_the_optimiser_just_wrote(
    stage: int, lora: int, build: Build, tiny_args: Args, prompts: Prompts, tmp_path: Path
):
    args = tiny_args(
        actor_engine__zero_stage=stage,
        actor_engine__lora__rank=lora,
        ppo__actor_optimizer__learning_rate=0.03,
    )
    engine = build(args)
    trainer = PPOTrainer(engine=engine, args=args)
    greedy = GenerationConfig(max_new_tokens=8, temperature=0.0)
    before = engine.actor.generate(prompts(), greedy)
    for _ in range(2):
        trainer.step(trainer.generate_experience(prompts()))
    after = engine.actor.generate(prompts(), greedy)
    assert before.response_ids.shape != after.response_ids.shape or not torch.equal(
        before.response_ids, after.response_ids
    )
    export(engine.actor.module, engine.tokenizer, tmp_path / "final")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    for row, mask in enumerate(after.prompts.attention_mask):
        ids = after.prompts.input_ids[row, mask].unsqueeze(0)
        found = plain.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert found.tolist() == after.response_ids[row, after.response_mask[row]].tolist()


@pytest.mark.parametrize("source", ["recompute", "rollout", "corrected"])
def test_every_source_of_old_logprobs_trains(
    source: str, build: Build, tiny_args: Args, prompts: Prompts
):
    args = tiny_args(
        ppo__old_logprobs=source, ppo__actor_optimizer__learning_rate=1e-4, ppo__epochs=2
    )
    trainer = PPOTrainer(engine=build(args), args=args)
    experience = trainer.generate_experience(prompts())
    same = torch.equal(experience.old_logprobs, experience.rollout_logprobs)
    assert same or source != "rollout"
    metrics = trainer.step(experience)
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["policy/approx_kl"] < 0.1


def test_the_adaptive_coefficient_rises_when_the_kl_is_over_its_target(
    build: Build, tiny_args: Args, prompts: Prompts
):
    args = tiny_args(
        ppo__kl__kind="adaptive",
        ppo__kl__target=0.01,
        ppo__kl__horizon=40,
        ppo__actor_optimizer__learning_rate=0.02,
    )
    trainer = PPOTrainer(engine=build(args), args=args)
    coefficients = []
    for _ in range(3):
        metrics = trainer.step(trainer.generate_experience(prompts()))
        coefficients.append(trainer.kl_coef)
    assert metrics["objective/kl"] > 0.02
    # One step down from KL 0, then up: the error is clipped at 0.2 and 8 of 40 rollouts count.
    assert coefficients == pytest.approx([0.2 * 0.96, 0.2 * 0.96 * 1.04, 0.2 * 0.96 * 1.04**2])


def test_four_epochs_of_minibatches_stay_finite(build: Build, tiny_args: Args, prompts: Prompts):
    args = tiny_args(ppo__epochs=4, ppo__minibatch_size=2, ppo__max_approx_kl=0.0)
    trainer = PPOTrainer(engine=build(args), args=args)
    for _ in range(4):
        metrics = trainer.step(trainer.generate_experience(prompts()))
        assert all(math.isfinite(value) for value in metrics.values())
        assert 0.5 < metrics["policy/ratio_mean"] < 2.0
    assert metrics["ppo/epochs_done"] == 4.0 and trainer.engine.actor.steps_done == 64


def test_training_raises_the_logprob_of_what_scored_well(
    build: Build, tiny_args: Args, prompts: Prompts
):
    args = tiny_args(ppo__minibatch_size=8, ppo__actor_optimizer__learning_rate=1e-4)
    trainer = PPOTrainer(engine=build(args), args=args)
    experience = trainer.generate_experience(prompts())
    mask, length = experience.response_mask, experience.response_mask.shape[1]
    trainer.step(experience)
    now = trainer.engine.actor_logprobs(
        experience.sequences, experience.attention_mask, length, 1.0
    )
    gain = ((now - experience.old_logprobs) * experience.advantages)[mask]
    assert float(gain.sum()) > 0


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("lora", [0, 4])
def test_gradient_checkpointing_gives_the_same_step(
    stage: int, lora: int, build: Build, tiny_args: Args, prompts: Prompts
):
    ends = []
    for checkpointing in (False, True):
        engines = {
            f"{role}_engine__{name}": value
            for role in ("actor", "critic")
            for name, value in (
                ("gradient_checkpointing", checkpointing),
                ("zero_stage", stage),
                ("lora__rank", lora),
            )
        }
        engine = build(tiny_args(**engines))
        trainer = PPOTrainer(engine=engine, args=engine.args)
        layers = [engine.actor.module.model.layers, engine.critic.module.scorer.model.layers]
        assert all(part[0].gradient_checkpointing == checkpointing for part in layers)
        metrics = trainer.step(trainer.generate_experience(prompts()))
        ends.append(
            {key: metrics[key] for key in metrics if key.split("/")[0] in ("optim", "value")}
        )
    assert ends[0]["optim/actor_grad_norm"] > 0
    assert ends[1] == pytest.approx(ends[0], rel=1e-6)


# LoRA --------------------------------------------------------------------------------------


def test_the_ref_of_a_lora_actor_is_its_base_to_the_last_bit_and_no_copy(
    build: Build, tiny_args: Args, prompts: Prompts
):
    plain = build(tiny_args())
    args = tiny_args(**LORA)
    engine = build(args)
    assert engine._ref is None
    trainer = PPOTrainer(engine=engine, args=args)
    trainer.step(trainer.generate_experience(prompts()))
    batch = trainer.generate_experience(prompts())
    inputs = (batch.sequences, batch.attention_mask, batch.response_mask.shape[1], 1.0)
    assert torch.equal(engine.ref_logprobs(*inputs), plain.ref_logprobs(*inputs))
    assert not torch.equal(engine.actor_logprobs(*inputs), engine.ref_logprobs(*inputs))
    ids = batch.sequences[:1]
    with adapters_off(engine.actor.module), torch.no_grad():
        assert torch.equal(
            engine.actor.module(input_ids=ids).logits, plain.actor.module(input_ids=ids).logits
        )


def test_lora_trains_adapters_and_the_critics_score_head_and_nothing_else(
    build: Build, tiny_args: Args, prompts: Prompts
):
    args = tiny_args(**LORA)
    engine = build(args)
    trainer = PPOTrainer(engine=engine, args=args)
    models = (engine.actor.module, engine.critic.module)
    before = [copied(model) for model in models]
    for _ in range(2):
        metrics = trainer.step(trainer.generate_experience(prompts()))
    assert metrics["optim/actor_grad_norm"] > 0 and metrics["optim/critic_grad_norm"] > 0
    for model, old in zip(models, before, strict=True):
        new = copied(model)
        moved = {key for key in new if not torch.equal(new[key], old[key])}
        adapters = {key for key in new if ".lora_" in key}
        assert adapters and moved == adapters | {k for k in new if k.endswith("score.weight")}
    assert engine.ema is not None and 0 < engine.ema.distance() < 1


def test_lora_dropout_is_refused_in_ppo(build: Build, tiny_args: Args):
    with pytest.raises(ValueError, match="lora dropout must be 0 in PPO"):
        build(tiny_args(**LORA, actor_engine__lora__dropout=0.1))


def test_batches_that_do_not_divide_are_refused_by_name(build: Build, tiny_args: Args):
    with pytest.raises(ValueError, match=r"ppo\.batch_size / ppo\.minibatch_size"):
        tiny_args(ppo__minibatch_size=3)
    with pytest.raises(ValueError, match=r"ppo\.minibatch_size on each rank"):
        build(tiny_args(ppo__micro_batch_size=3))


def test_an_actor_with_new_tokens_still_equals_its_ref(
    build: Build, tiny_args: Args, prompts: Prompts, model_dir: Callable[..., str]
):
    # A base model without the PAD row: actor and ref must grow by the same random row.
    from conftest import small_tokenizer

    tokenizer = small_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|one more|>"]})
    args = tiny_args(reward_model=model_dir())
    engine = RLHFEngine(
        actor_model_name_or_path=model_dir(),
        critic_model_name_or_path=model_dir(),
        tokenizer=tokenizer,
        num_total_iters=4,
        args=args,
    )
    trainer = PPOTrainer(engine=engine, args=args)
    experience = trainer.generate_experience(prompts())
    assert engine.actor.module.lm_head.weight.shape[0] == len(tokenizer)
    torch.testing.assert_close(experience.old_logprobs, experience.ref_logprobs, atol=1e-5, rtol=0)


def test_two_trainers_of_one_seed_end_with_the_same_weights(
    build: Build, tiny_args: Args, prompts: Prompts
):
    ends = []
    for _ in range(2):
        trainer = PPOTrainer(engine=build(tiny_args()), args=tiny_args())
        trainer.step(trainer.generate_experience(prompts()))
        ends.append(copied(trainer.engine.actor.module))
    assert same_weights(*ends)
