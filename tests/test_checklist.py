"""Twenty-eight details that decide whether PPO on a language model works, each on the real path.

Maths that tests/test_functional.py checks by hand is checked here where the trainers use it.
Shapes: B batch, P prompt, R response, T = P + R, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import copied, prompt, prompt_rows, same_weights, tiny_model

from rlhf_kit import distributed
from rlhf_kit.blending import epoch_order
from rlhf_kit.config import DataConfig, EMAConfig, RewardConfig, RunConfig, preset
from rlhf_kit.hybrid_engine.decode import Decoder
from rlhf_kit.hybrid_engine.training import TrainingEngine
from rlhf_kit.models import ValueModel, load_causal_lm, load_scorer, response_logits, score_head
from rlhf_kit.ppo import PPOTrainer
from rlhf_kit.reward import RewardTrainer, prompt_batches
from rlhf_kit.rlhf_engine import RLHFEngine
from rlhf_kit.rollout import PromptLoader, make_experience
from rlhf_kit.tokenization import (
    as_text,
    encode_demonstrations,
    encode_pairs,
    keep_fitting,
)
from rlhf_kit.types import Experience, PromptBatch, Rollout

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"
Args = Callable[..., RunConfig]
Build = Callable[[RunConfig], RLHFEngine]
Prompts = Callable[..., PromptBatch]


@pytest.fixture(scope="module")
def engine(build: Build, tiny_args: Args) -> RLHFEngine:
    """One that no test trains."""
    return build(tiny_args())


@pytest.fixture(scope="module")
def rollout(engine: RLHFEngine, prompts: Prompts, tiny_args: Args) -> Rollout:
    """Ragged responses; some end, some run into the limit."""
    result = engine.actor.generate(prompts(), tiny_args().generation)
    assert 0 < int(result.ended.sum()) < len(result.ended)
    return result


@pytest.fixture
def start(build: Build, tiny_args: Args, prompts: Prompts) -> Callable[..., Any]:
    """A fresh trainer with the experience of its first batch."""

    def trainer(**changes: Any) -> tuple[PPOTrainer, Experience]:
        mixture_rows = changes.pop("mixture_rows", None)
        args = tiny_args(**changes)
        result = PPOTrainer(engine=build(args), args=args, mixture_rows=mixture_rows)
        return result, result.generate_experience(prompts())

    return trainer


def experience_of(
    rollout: Rollout, engine: RLHFEngine, *, kl_coef: float = 0.2, temperature: float = 1.0
) -> tuple[Experience, dict[str, float]]:
    return make_experience(
        rollout, engine, engine.args.ppo, kl_coef=kl_coef, temperature=temperature
    )


def test_row_01_a_pad_id_inside_a_response_is_a_token_like_any_other(
    engine: RLHFEngine, rollout: Rollout, tokenizer: Any
):
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    row = int(rollout.response_mask.sum(1).argmax())
    ids = rollout.response_ids.clone()
    ids[row, 2] = tokenizer.pad_token_id
    with_pad = dataclasses.replace(rollout, response_ids=ids)
    experience, metrics = experience_of(with_pad, engine)
    assert experience.response_mask[row].all()
    assert metrics["response/length"] == float(rollout.response_mask.sum(1).float().mean())
    # By hand: the pad's own logprob from a forward over the one row without padding.
    prompt_mask = rollout.prompts.attention_mask[row]
    alone = torch.cat([rollout.prompts.input_ids[row, prompt_mask], ids[row]]).unsqueeze(0)
    logits = engine.actor.module(input_ids=alone).logits[0].log_softmax(-1)
    expected = logits[int(prompt_mask.sum()) + 1, tokenizer.pad_token_id]
    torch.testing.assert_close(experience.old_logprobs[row, 2], expected.detach())


def test_row_01_generation_masks_by_length_when_pad_is_sampled(
    engine: RLHFEngine, prompts: Prompts, tiny_args: Args, tokenizer: Any
):
    model = tiny_model("llama", tokenizer)
    with torch.no_grad():  # PAD becomes the likeliest token everywhere, EOS the least likely
        model.lm_head.weight.mul_(0.1)
        model.model.norm.weight.zero_()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
    with torch.no_grad():
        model.lm_head.bias[tokenizer.pad_token_id] = 20.0
    decoder = Decoder(
        model, eos_token_ids=[tokenizer.eos_token_id], pad_token_id=tokenizer.pad_token_id
    )
    result = decoder.generate(prompts(2), tiny_args().generation)
    assert (result.response_ids == tokenizer.pad_token_id).all()
    assert result.response_mask.all() and result.response_mask.shape == (2, 8)
    assert not result.ended.any()


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])
def test_row_02_left_padding_changes_no_logprob(
    kind: str, model_dir: Callable[..., str], tokenizer: Any, prompts: Prompts
):
    model = load_causal_lm(model_dir(kind), tokenizer)
    batch = prompts(5)
    together = response_logits(model, batch.input_ids, batch.attention_mask, 1)
    for row, mask in enumerate(batch.attention_mask):
        ids = batch.input_ids[row : row + 1, mask]
        alone = model(input_ids=ids).logits[:, -2]
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-5)


def test_row_03_long_prompts_are_dropped_whole_and_responses_end_at_the_first_eos(
    tokenizer: Any, rollout: Rollout
):
    rows = [*prompt_rows(3), dataclasses.replace(prompt_rows(1)[0], prompt=prompt("long " * 99))]
    fitting = keep_fitting(tokenizer, rows, DataConfig(max_prompt_length=60))
    assert fitting.rows == rows[:3] and fitting.long_prompts == 1
    is_eos = rollout.response_ids == tokenizer.eos_token_id
    for row, length in enumerate(rollout.response_mask.sum(1).tolist()):
        assert not is_eos[row, : length - 1].any()
        assert bool(is_eos[row, length - 1]) == bool(rollout.ended[row])
        assert (rollout.response_ids[row, length:] == tokenizer.pad_token_id).all()


@pytest.mark.parametrize(
    "change",
    [
        {"generation__temperature": 0.0},
        {"generation__top_k": 5},
        {"generation__top_p": 0.9},
        {"generation__min_new_tokens": 2},
    ],
)
def test_row_04_a_run_samples_from_the_whole_distribution(change: dict[str, Any]):
    with pytest.raises(ValueError, match=r"generation\."):
        preset("toy", **change)


def test_row_04_other_seeds_sample_other_responses(
    engine: RLHFEngine, prompts: Prompts, tiny_args: Args
):
    generation = tiny_args().generation
    one = engine.actor.generate(prompts(), generation)
    again = engine.actor.generate(prompts(), generation)
    other = engine.actor.generate(prompts(first_seed=900), generation)
    assert torch.equal(one.response_ids, again.response_ids)
    assert not (
        one.response_ids.shape == other.response_ids.shape
        and torch.equal(one.response_ids, other.response_ids)
    )


def test_row_05_all_logprobs_are_taken_at_the_sampling_temperature(start: Callable[..., Any]):
    trainer, experience = start(generation__temperature=0.7, ppo__mixture__kind="none")
    length = experience.response_mask.shape[1]
    logits = trainer.engine.actor.module(
        input_ids=experience.sequences,
        attention_mask=experience.attention_mask,
        position_ids=(experience.attention_mask.long().cumsum(1) - 1).clamp(min=0),
    ).logits[:, -length - 1 : -1]
    by_hand = (logits / 0.7).log_softmax(-1).gather(-1, experience.sequences[:, -length:, None])
    mask = experience.response_mask
    expected = by_hand[:, :, 0][mask]
    for name in ("rollout_logprobs", "old_logprobs", "ref_logprobs"):
        torch.testing.assert_close(getattr(experience, name)[mask], expected, atol=1e-4, rtol=1e-4)
    _, metrics = trainer._policy(trainer.engine.actor, experience, float(mask.sum()))
    assert float(metrics["policy/ratio_mean"]) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("kind", ["opt", "gpt2"])
def test_row_06_dropout_is_off_even_where_the_config_asks_for_it(
    kind: str, model_dir: Callable[..., str], tokenizer: Any
):
    ids = torch.arange(5, 25).reshape(2, 10)
    for model in (
        load_causal_lm(model_dir(kind), tokenizer),
        load_scorer(model_dir(kind), tokenizer),
    ):
        assert not any(m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)), (
            "dropout is live"
        )
        model.train()
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_row_07_the_reward_loss_reads_the_last_token_and_never_the_padding(
    tokenizer: Any, model_dir: Callable[..., str]
):
    torch.manual_seed(5)
    scorer = load_scorer(model_dir(), tokenizer)
    pairs = encode_pairs(tokenizer, prompt_rows(4), DataConfig()).rows
    expected = []
    for pair in pairs:  # each dialogue alone, so without any padding
        scores = [
            scorer(input_ids=torch.tensor([row.input_ids])).logits.item()
            for row in (pair.chosen, pair.rejected)
        ]
        expected.append(math.log1p(math.exp(-(scores[0] - scores[1]))))
    engine = TrainingEngine(
        ValueModel(scorer),
        preset("toy").critic_engine,
        preset("toy").reward.optimizer,
        total_steps=1,
    )
    trainer = RewardTrainer(
        engine,
        RewardConfig(micro_batch_size=3, center_coef=0.0),
        pad_token_id=tokenizer.pad_token_id,
    )
    loss = trainer.step(pairs)["loss/train"]
    assert loss == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_row_07_all_pairs_of_a_prompt_share_a_batch(tokenizer: Any):
    pairs = encode_pairs(tokenizer, prompt_rows(12), DataConfig()).rows
    pairs = [dataclasses.replace(pair, prompt_id=str(i // 3)) for i, pair in enumerate(pairs)]
    for batch in prompt_batches(pairs, 6, seed=1, epoch=0):
        prompts = [pairs[i].prompt_id for i in batch]
        assert all(prompts.count(name) == 3 for name in prompts)


def test_row_08_a_fresh_head_has_the_standard_deviation_of_the_paper(
    model_dir: Callable[..., str], tokenizer: Any
):
    weights = []
    for seed in range(60):
        torch.manual_seed(seed)
        weights.append(score_head(load_scorer(model_dir(), tokenizer)).weight.flatten())
    drawn = torch.cat(weights)
    # 60 x 32 draws: the standard deviation is known to 1 / sqrt(2 x 1920) = 1.6 %.
    drawn = drawn.detach()
    assert float(drawn.std()) == pytest.approx(1 / math.sqrt(33), rel=0.06)
    assert float(drawn.mean()) == pytest.approx(0.0, abs=4 / math.sqrt(33 * drawn.numel()))


def test_row_08_normalised_scores_of_demonstrations_have_mean_zero_and_deviation_one(
    tokenizer: Any, model_dir: Callable[..., str]
):
    torch.manual_seed(5)
    scorer = load_scorer(model_dir(), tokenizer)
    config = preset("toy")
    engine = TrainingEngine(
        ValueModel(scorer), config.critic_engine, config.reward.optimizer, total_steps=1
    )
    trainer = RewardTrainer(engine, config.reward, pad_token_id=tokenizer.pad_token_id)
    rows = encode_demonstrations(tokenizer, prompt_rows(10), DataConfig()).rows
    mean, std = trainer.normalisation(rows)
    raw = torch.tensor(
        [scorer(input_ids=torch.tensor([row.input_ids])).logits.item() for row in rows]
    )
    assert mean == pytest.approx(float(raw.mean()), abs=1e-5)
    assert std == pytest.approx(float(raw.std(unbiased=False)), rel=1e-4)


def test_row_09_ppo_reads_the_reward_model_at_the_token_that_its_training_read(
    engine: RLHFEngine, rollout: Rollout
):
    scores = engine.score(rollout)
    for row in range(len(scores)):
        kept = torch.cat([rollout.prompts.attention_mask[row], rollout.response_mask[row]])
        alone = rollout.sequences[row, kept].unsqueeze(0)
        expected = engine.reward.scorer(input_ids=alone).logits.squeeze()
        torch.testing.assert_close(scores[row], expected, atol=1e-4, rtol=1e-4)


def test_row_10_a_response_without_eos_scores_at_most_the_fixed_low_score(
    engine: RLHFEngine, rollout: Rollout
):
    normal = dataclasses.replace(engine.args.ppo, missing_eos_score=None)
    capped = dataclasses.replace(engine.args.ppo, missing_eos_score=-1.0)
    plain, _ = make_experience(rollout, engine, normal, kl_coef=0.2, temperature=1.0)
    low, _ = make_experience(rollout, engine, capped, kl_coef=0.2, temperature=1.0)
    ended = rollout.ended
    assert torch.equal(low.score[ended], plain.score[ended])
    assert torch.equal(low.score[~ended], plain.score[~ended].clamp(max=-1.0))
    assert (plain.score[~ended] > -1.0).any(), "nothing to cap in this batch"


def test_row_11_rewards_are_the_kl_penalty_and_the_score_on_the_eos(start: Callable[..., Any]):
    trainer, _ = start()
    with torch.no_grad():  # the actor moves away from the ref
        trainer.engine.actor.module.lm_head.weight.mul_(1.5)
    rollout = trainer.last_rollout
    experience, metrics = experience_of(rollout, trainer.engine, kl_coef=0.3)
    kl = 0.0
    for row in range(len(experience)):
        length = int(experience.response_mask[row].sum())
        for t in range(experience.rewards.shape[1]):
            gap = float(experience.old_logprobs[row, t] - experience.ref_logprobs[row, t])
            expected = -0.3 * gap if t < length else 0.0
            kl += gap if t < length else 0.0
            expected += float(experience.score[row]) if t == length - 1 else 0.0
            assert float(experience.rewards[row, t]) == pytest.approx(expected, abs=1e-4)
    assert metrics["objective/kl"] == pytest.approx(kl / len(experience), rel=1e-4)
    assert abs(kl) > 1e-2


def test_row_12_the_kl_coefficient_is_fixed_or_follows_the_controller(start: Callable[..., Any]):
    fixed, experience = start(ppo__kl__coef=0.2)
    fixed.step(experience)
    assert fixed.kl_coef == 0.2
    adaptive, experience = start(ppo__kl__kind="adaptive", ppo__kl__coef=0.2, ppo__kl__horizon=100)
    metrics = adaptive.step(experience)
    # The KL is 0 before the first update: the error is clipped at -0.2, over 8 of 100 rollouts.
    assert metrics["objective/kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["objective/kl_coef"] == 0.2
    assert adaptive.kl_coef == pytest.approx(0.2 * (1 - 0.2 * 8 / 100))


def test_row_13_scores_are_in_the_reward_models_own_units_then_clipped(
    engine: RLHFEngine, rollout: Rollout
):
    assert (engine.score_mean, engine.score_std) == (0.3, 0.5)  # as exported with it
    config = dataclasses.replace(engine.args.ppo, missing_eos_score=None, score_clip=0.7)
    experience, metrics = make_experience(rollout, engine, config, kl_coef=0.2, temperature=1.0)
    raw = engine.score(rollout)
    torch.testing.assert_close(experience.score, ((raw - 0.3) / 0.5).clamp(-0.7, 0.7))
    assert metrics["objective/score_raw"] == pytest.approx(float(raw.mean()), rel=1e-5)
    unscaled = dataclasses.replace(config, normalize_score=False, score_clip=50.0)
    experience, _ = make_experience(rollout, engine, unscaled, kl_coef=0.2, temperature=1.0)
    torch.testing.assert_close(experience.score, raw)


def test_row_14_returns_are_the_discounted_sum_after_which_nothing_comes(
    engine: RLHFEngine, rollout: Rollout
):
    config = dataclasses.replace(engine.args.ppo, gamma=0.9, lam=1.0)
    experience, _ = make_experience(rollout, engine, config, kl_coef=0.2, temperature=1.0)
    for row in range(len(experience)):
        length = int(experience.response_mask[row].sum())
        rewards = experience.rewards[row].tolist()
        for t in range(length):  # with lambda 1 GAE's return is the sum of rewards to come
            expected = sum(0.9 ** (k - t) * rewards[k] for k in range(t, length))
            assert float(experience.returns[row, t]) == pytest.approx(expected, abs=1e-4)
        assert (experience.returns[row, length:] == 0).all()


def test_row_15_returns_come_first_and_whitening_uses_the_tokens_of_all_ranks(
    engine: RLHFEngine, rollout: Rollout, monkeypatch: pytest.MonkeyPatch
):
    plain = dataclasses.replace(engine.args.ppo, whiten_advantages=False)
    raw, _ = make_experience(rollout, engine, plain, kl_coef=0.2, temperature=1.0)
    white, _ = experience_of(rollout, engine)
    mask = white.response_mask
    torch.testing.assert_close(raw.returns[mask], (raw.advantages + raw.values)[mask])
    torch.testing.assert_close(white.returns, raw.returns)
    expected = raw.advantages[mask]
    expected = (expected - expected.mean()) / expected.std(unbiased=False)
    torch.testing.assert_close(white.advantages[mask], expected, atol=1e-4, rtol=1e-4)
    # Another rank with three tokens of advantage 2: the moments to whiten with are of both.
    other = torch.tensor([3.0, 6.0, 12.0], dtype=torch.float64)
    monkeypatch.setattr(
        distributed, "all_sum", lambda x: x + other if x.shape == other.shape else x
    )
    both, metrics = experience_of(rollout, engine)
    tokens = torch.cat([raw.advantages[mask], torch.full((3,), 2.0)])
    assert metrics["advantage/mean"] == pytest.approx(float(tokens.mean()), rel=1e-4)
    expected = (raw.advantages[mask] - tokens.mean()) / tokens.std(unbiased=False)
    torch.testing.assert_close(both.advantages[mask], expected, atol=1e-4, rtol=1e-4)


def test_row_16_the_policy_gradient_of_the_trainer_is_that_of_the_clipped_surrogate(
    start: Callable[..., Any],
):
    trainer, experience = start()
    actor = trainer.engine.actor.module
    tokens = float(experience.response_mask.sum())
    loss, _ = trainer._policy(actor, experience, tokens)
    head = actor.lm_head.weight
    (found,) = torch.autograd.grad(loss, head)
    # Where the ratio is 1 the surrogate's gradient is -A grad log pi: vanilla policy gradient.
    length = experience.response_mask.shape[1]
    logits = response_logits(actor, experience.sequences, experience.attention_mask, length)
    logprobs = F.log_softmax(logits, -1).gather(-1, experience.sequences[:, -length:, None])[..., 0]
    mask = experience.response_mask
    vanilla = -(experience.advantages[mask] * logprobs[mask]).sum() / tokens
    (expected,) = torch.autograd.grad(vanilla, head)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_row_16_a_ratio_beyond_the_clip_has_no_gradient(start: Callable[..., Any]):
    trainer, experience = start()
    actor = trainer.engine.actor.module
    beyond = dataclasses.replace(
        experience,
        old_logprobs=experience.old_logprobs - 0.5,  # the ratio is e^0.5 everywhere
        advantages=torch.ones_like(experience.advantages),
    )
    loss, metrics = trainer._policy(actor, beyond, float(experience.response_mask.sum()))
    assert float(loss) == pytest.approx(-1.2)
    assert float(metrics["policy/clipfrac"]) == pytest.approx(1.0)
    (gradient,) = torch.autograd.grad(loss, actor.lm_head.weight)
    assert not gradient.any()


def test_row_17_values_move_at_most_the_clip_range_in_the_loss(start: Callable[..., Any]):
    trainer, experience = start()
    far = dataclasses.replace(
        experience, values=experience.values - 1.0, returns=experience.values + 5.0
    )
    parts = trainer._value_backward(far, float(experience.response_mask.sum()))
    # Clipped to V_old + 0.2 = V - 0.8, the distance to V + 5 is 5.8, more than the 5 without.
    assert float(parts["value/loss"]) == pytest.approx(0.5 * 5.8**2, rel=1e-4)
    assert float(parts["value/clipfrac"]) == pytest.approx(1.0)


def test_row_18_the_critic_starts_as_the_normalised_reward_model(
    engine: RLHFEngine, rollout: Rollout
):
    for row in range(len(rollout.ended)):
        kept = torch.cat([rollout.prompts.attention_mask[row], rollout.response_mask[row]])
        ids = rollout.sequences[row, kept].unsqueeze(0)
        values = engine.critic(ids, torch.ones_like(ids, dtype=torch.bool))
        expected = (engine.reward.scorer(input_ids=ids).logits.squeeze() - 0.3) / 0.5
        torch.testing.assert_close(values[0, -1], expected, atol=1e-4, rtol=1e-4)


def test_row_18_the_critic_starts_as_the_reward_model_even_with_an_untrained_head(
    build: Build, tiny_args: Args, model_dir: Callable[..., str]
):
    engine = build(tiny_args(reward_model=model_dir()))
    critic, reward = engine.critic.module.state_dict(), engine.reward.state_dict()
    assert same_weights(critic, reward)


def test_row_18_the_warm_up_trains_the_critic_and_leaves_the_actor_to_the_last_bit(
    start: Callable[..., Any], prompts: Prompts
):
    trainer, experience = start(ppo__critic_warmup_iterations=1)
    actor, critic = copied(trainer.engine.actor.module), copied(trainer.engine.critic.module)
    actor_loss, critic_loss = trainer.train_rlhf(experience)
    assert same_weights(actor, copied(trainer.engine.actor.module))
    assert not same_weights(critic, copied(trainer.engine.critic.module))
    assert actor_loss == 0.0 and critic_loss > 0
    assert trainer.engine.ema is not None and trainer.engine.ema.updates == 0
    trainer.train_rlhf(trainer.generate_experience(prompts()))
    assert not same_weights(actor, copied(trainer.engine.actor.module))
    # Three iterations of two steps train the actor, and its schedule is exactly that long.
    assert trainer.engine.actor.total_steps == 6 and trainer.engine.critic.total_steps == 8


def test_row_19_any_micro_batch_size_gives_the_same_step(
    build: Build, tiny_args: Args, prompts: Prompts
):
    after = {}
    experience = None
    for size in (1, 2, 4, 8):
        args = tiny_args(ppo__minibatch_size=8, ppo__micro_batch_size=size)
        trainer = PPOTrainer(engine=build(args), args=args)
        if experience is None:
            experience = trainer.generate_experience(prompts())
            lengths = experience.response_mask.sum(1).tolist()
            assert len(set(lengths)) > 1, "responses must be ragged for this to mean anything"
        metrics = trainer.step(experience)
        after[size] = (
            copied(trainer.engine.actor.module),
            copied(trainer.engine.critic.module),
            [metrics[key] for key in ("policy/loss", "value/loss", "objective/entropy")],
        )
    actor, critic, losses = after[8]
    for size in (1, 2, 4):
        assert after[size][2] == pytest.approx(losses, rel=1e-4, abs=1e-6)
        for found, expected in zip(after[size][:2], (actor, critic), strict=True):
            for key in expected:  # Adam's first step divides by |g|: 3 % of the rate of 1e-3
                torch.testing.assert_close(found[key], expected[key], atol=3e-5, rtol=0)


def test_row_20_every_epoch_has_its_own_permutation(start: Callable[..., Any]):
    trainer, experience = start(ppo__epochs=4, ppo__max_approx_kl=0.0)
    seen: list[list[int]] = []
    original = trainer._minibatch

    def spy(part: Experience, *, train_actor: bool) -> dict[str, float]:
        rows = [
            next(i for i in range(8) if torch.equal(experience.sequences[i], row))
            for row in part.sequences
        ]
        seen.append(rows)
        return original(part, train_actor=train_actor)

    trainer._minibatch = spy  # type: ignore[method-assign]
    metrics = trainer.step(experience)
    epochs = [seen[i] + seen[i + 1] for i in range(0, 8, 2)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert metrics["ppo/epochs_done"] == 4.0


def test_row_20_an_iteration_ends_early_beyond_the_approximate_kl(start: Callable[..., Any]):
    trainer, experience = start(
        ppo__epochs=4, ppo__max_approx_kl=1e-4, ppo__actor_optimizer__learning_rate=0.02
    )
    metrics = trainer.step(experience)
    assert metrics["ppo/epochs_done"] == 1.0  # the first minibatch has KL 0, the second left
    assert trainer.engine.actor.steps_done == 2


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_row_21_the_first_ratio_is_one_to_the_last_bit(dtype: str, start: Callable[..., Any]):
    trainer, experience = start(
        actor_engine__dtype=dtype, actor_engine__zero_stage=2 if dtype == "bf16" else 0
    )
    assert experience.old_logprobs.dtype == torch.float32
    trainer.engine.actor.train()
    for rows in torch.arange(8).split(2):
        micro = experience.rows(rows)
        tokens = float(micro.response_mask.sum())
        _, metrics = trainer._policy(trainer.engine.actor, micro, tokens)
        assert float(metrics["policy/ratio_mean"]) == 1.0
        assert float(metrics["policy/ratio_square"]) == 1.0
        assert float(metrics["policy/approx_kl"]) == 0.0
        assert float(metrics["policy/clipfrac"]) == 0.0


def test_row_22_adam_has_its_large_epsilon_and_the_rate_falls_to_its_end(
    start: Callable[..., Any], prompts: Prompts
):
    for name in ("toy", "consumer", "cluster"):
        ppo = preset(name).ppo
        assert ppo.actor_optimizer.eps == ppo.critic_optimizer.eps == 1e-5
        assert ppo.actor_optimizer.schedule == "linear"
    trainer, experience = start(
        ppo__iterations=2,
        ppo__actor_optimizer__warmup_ratio=0.0,
        ppo__actor_optimizer__final_ratio=0.0,
    )
    assert all(group["eps"] == 1e-5 for group in trainer.engine.actor.optimizer.param_groups)
    trainer.step(experience)
    metrics = trainer.step(trainer.generate_experience(prompts()))
    # Four steps at 1, 2/3, 1/3 and 0 of the peak: the second iteration's mean is 1/6.
    assert metrics["optim/actor_lr"] == pytest.approx(1e-3 / 6)
    assert all(group["lr"] == 0.0 for group in trainer.engine.actor.optimizer.param_groups)


def test_row_23_gradients_are_clipped_to_a_global_norm_of_one(start: Callable[..., Any]):
    assert preset("toy").ppo.actor_optimizer.max_grad_norm == 1.0
    trainer, experience = start()
    actor = trainer.engine.actor
    norms = []
    actor.optimizer.register_step_pre_hook(
        lambda *_: norms.append(
            math.sqrt(sum(float(p.grad.square().sum()) for p in actor.module.parameters()))
        )
    )
    metrics = trainer.step(experience)
    assert metrics["optim/actor_grad_norm"] > 1.5
    assert all(norm < 1.0001 for norm in norms) and len(norms) == 2


def test_row_24_the_average_moves_once_a_step_in_fp32_even_of_a_bf16_model(
    start: Callable[..., Any],
):
    trainer, experience = start(
        actor_engine__dtype="bf16",
        actor_engine__zero_stage=1,
        ppo__epochs=2,
        ppo__max_approx_kl=0.0,
        ppo__ema__decay=0.992,
        ppo__ema__warmup=False,
    )
    ema, actor = trainer.engine.ema, trainer.engine.actor
    assert ema is not None and all(a.dtype == torch.float32 for a in ema._averages)
    head = actor.module.lm_head.weight
    expected = head.detach().float().clone()
    original = actor.step

    def step() -> Any:
        info = original()
        expected.mul_(0.992).add_(head.detach().float(), alpha=0.008)
        return info

    actor.step = step  # type: ignore[method-assign]
    metrics = trainer.step(experience)
    assert ema.updates == actor.steps_done == 4
    assert metrics["ema/decay"] == pytest.approx(0.992)
    index = next(i for i, p in enumerate(ema._parameters) if p is head)
    torch.testing.assert_close(ema._averages[index], expected, atol=1e-7, rtol=1e-6)
    assert not torch.equal(expected, head.detach().float())


def test_row_24_the_paper_says_0_992_and_so_does_the_default():
    assert EMAConfig().decay == 0.992 and preset("consumer").ppo.ema.decay == 0.992


def test_row_25_the_mixture_gradient_joins_the_same_optimiser_step(
    start: Callable[..., Any], tokenizer: Any
):
    texts = as_text(encode_demonstrations(tokenizer, prompt_rows(16), DataConfig()).rows)
    gradients: dict[str, torch.Tensor] = {}
    for kind in ("none", "coef"):
        trainer, experience = start(
            ppo__minibatch_size=8,
            ppo__mixture__kind=kind,
            ppo__mixture__ptx_coef=0.5,
            ppo__mixture__batch_ratio=2.0,
            ppo__actor_optimizer__max_grad_norm=1e9,
            mixture_rows=texts,
        )
        actor = trainer.engine.actor
        if trainer.mixture is not None:
            assert trainer.mixture.batch_size == 16
            parts, tokens = trainer.mixture._texts(4), trainer.mixture.tokens()
            losses = [trainer.mixture._loss(actor.module, part, tokens) for part in parts]
            head = actor.module.lm_head.weight
            (gradients["text"],) = torch.autograd.grad(sum(losses), head)
            expected_loss = float(sum(losses).detach())
        hooked: list[torch.Tensor] = []
        actor.optimizer.register_step_pre_hook(
            lambda *_, a=actor, h=hooked: h.append(a.module.lm_head.weight.grad.clone())
        )
        metrics = trainer.step(experience)
        assert len(hooked) == actor.steps_done == 1
        gradients[kind] = hooked[0]
    torch.testing.assert_close(
        gradients["coef"], gradients["none"] + 0.5 * gradients["text"], atol=1e-5, rtol=1e-4
    )
    assert metrics["mixture/loss"] == pytest.approx(expected_loss, rel=1e-5)
    assert metrics["mixture/coef"] == 0.5


def test_row_26_data_order_comes_from_seed_and_epoch_and_samples_from_each_row(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    rows = prompt_rows(12)

    def batches(seed: int) -> list[PromptBatch]:
        return list(PromptLoader(tokenizer, rows, batch_size=4, iterations=6, seed=seed))

    one, again, other = batches(1), batches(1), batches(2)
    assert all(a.dialogues == b.dialogues for a, b in zip(one, again, strict=True))
    assert all(torch.equal(a.seeds, b.seeds) for a, b in zip(one, again, strict=True))
    assert [b.dialogues for b in one] != [b.dialogues for b in other]
    for epoch in (0, 1):  # three iterations are one pass over the twelve prompts
        passed = [d for batch in one[3 * epoch : 3 * epoch + 3] for d in batch.dialogues]
        order = epoch_order(12, seed=1, epoch=epoch)
        assert passed == [rows[i].prompt for i in order]
    assert [b.dialogues for b in one[:3]] != [b.dialogues for b in one[3:]]
    seeds = torch.cat([batch.seeds for batch in one]).tolist()
    assert len(set(seeds)) == 24
    # Two ranks share the same rows and seeds out.
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(batches(1))
    for whole, left, right in zip(one, *shares, strict=True):
        pairs = list(zip(left.seeds.tolist(), left.dialogues, strict=True))
        pairs += zip(right.seeds.tolist(), right.dialogues, strict=True)
        assert sorted(pairs, key=lambda p: p[0]) == sorted(
            zip(whole.seeds.tolist(), whole.dialogues, strict=True), key=lambda p: p[0]
        )


MUST_LOG = {
    "objective/kl",
    "objective/entropy",
    "objective/score",
    "objective/score_raw",
    "objective/kl_coef",
    "policy/approx_kl",
    "policy/clipfrac",
    "policy/ratio_mean",
    "policy/ratio_var",
    "value/clipfrac",
    "value/explained_variance",
    "response/length",
    "response/eos_rate",
    "response/truncated_rate",
    "optim/actor_grad_norm",
    "optim/critic_grad_norm",
    "engine/logprob_gap_max",
}


def test_row_27_what_must_be_logged_is_there_and_finite(start: Callable[..., Any], tokenizer: Any):
    texts = as_text(encode_demonstrations(tokenizer, prompt_rows(16), DataConfig()).rows)
    trainer, experience = start(
        ppo__mixture__kind="grad_norm_ratio", mixture_rows=texts, ppo__epochs=2
    )
    metrics = trainer.step(experience)
    assert not MUST_LOG - set(metrics)
    assert all(math.isfinite(value) for value in metrics.values())
    mask, rollout = experience.response_mask, trainer.last_rollout
    assert metrics["response/length"] == pytest.approx(float(mask.sum(1).float().mean()))
    assert metrics["response/eos_rate"] == pytest.approx(float(rollout.ended.float().mean()))
    assert metrics["response/eos_rate"] + metrics["response/truncated_rate"] == pytest.approx(1.0)
    returns, values = experience.returns[mask], experience.values[mask]
    variance = 1 - (returns - values).var(unbiased=False) / returns.var(unbiased=False)
    assert metrics["value/explained_variance"] == pytest.approx(float(variance), rel=1e-3)
    text = DOCUMENT.read_text()
    assert not [key for key in metrics if key not in text], "docs/metrics.md explains every key"


def test_row_28_the_gap_between_generation_and_training_is_logged(
    engine: RLHFEngine, rollout: Rollout
):
    _, metrics = experience_of(rollout, engine)
    assert metrics["engine/logprob_gap_max"] < 1e-4
    off = dataclasses.replace(rollout, logprobs=rollout.logprobs + 0.25 * rollout.response_mask)
    _, metrics = experience_of(off, engine)
    assert metrics["engine/logprob_gap_max"] == pytest.approx(0.25, abs=1e-4)
    assert metrics["engine/logprob_gap_mean"] == pytest.approx(0.25, abs=1e-4)


def test_row_28_corrected_logprobs_weigh_tokens_by_the_truncated_ratio(start: Callable[..., Any]):
    trainer, experience = start(ppo__old_logprobs="corrected", ppo__importance_cap=1.5)
    actor, tokens = trainer.engine.actor, float(experience.response_mask.sum())
    experience = dataclasses.replace(experience, advantages=torch.ones_like(experience.advantages))
    plain, _ = trainer._policy(actor, experience, tokens)
    for gap, weight in ((0.1, math.exp(0.1)), (2.0, 1.5), (-1.0, math.exp(-1.0))):
        other = dataclasses.replace(experience, rollout_logprobs=experience.old_logprobs - gap)
        loss, _ = trainer._policy(actor, other, tokens)
        assert float(loss) == pytest.approx(weight * float(plain), rel=1e-4)
