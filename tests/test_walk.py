"""One row, from its text to its gradient: one assert a hop.

Shapes: B batch, P prompt, R response, T = P + R.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import copied, same_weights

from rlhf_kit import functional as f
from rlhf_kit.blending import Blend
from rlhf_kit.config import DataConfig, RunConfig, SourceConfig
from rlhf_kit.datasets import hh_rlhf
from rlhf_kit.ppo import PPOTrainer
from rlhf_kit.rlhf_engine import RLHFEngine
from rlhf_kit.rollout import make_experience
from rlhf_kit.tokenization import collate_prompts

TURNS = "\n\nHuman: Name a river.\n\nAssistant: The Rhine.\n\nHuman: And a lake?\n\nAssistant:"
ROW = {"chosen": f"{TURNS} Como.", "rejected": f"{TURNS} No."}


def test_one_row_walks_from_text_to_gradient_in_eight_hops(
    tmp_path: Path,
    tokenizer: Any,
    tiny_args: Callable[..., RunConfig],
    build: Callable[[RunConfig], RLHFEngine],
):
    # 1. A raw row becomes a record: the last answers, and the dialogue before them.
    pair = hh_rlhf(ROW)
    assert (pair.chosen, pair.rejected) == ("Como.", "No.")
    assert [turn["role"] for turn in pair.prompt] == ["user", "assistant", "user"]

    # 2. The blend gives that record to the PPO stage.
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps(ROW) + "\n")
    data = DataConfig(sources=(SourceConfig(str(source)),), split=(0, 0, 1), eval_share=0.0)
    rows = Blend(data, seed=1)["ppo"]
    assert len(rows) == 1 and rows[0].prompt_id == pair.prompt_id

    # 3. Collated, it reads as the template writes it, up to where the assistant begins.
    prompts = collate_prompts(tokenizer, rows, seeds=[1])
    text = tokenizer.decode(prompts.input_ids[0], skip_special_tokens=True)
    assert text == TURNS.strip("\n") and prompts.attention_mask.all()

    # 4. The engine samples a response: within the limit, with the logprobs it sampled by.
    args = tiny_args(ppo__batch_size=1, ppo__minibatch_size=1, ppo__micro_batch_size=1)
    engine = build(args)
    rollout = engine.actor.generate(prompts, args.generation)
    length = int(rollout.response_mask.sum())
    assert 2 <= length <= 8 and (rollout.logprobs[rollout.response_mask] <= 0).all()

    # 5. The experience holds what the four models say about it; actor and ref still agree.
    experience, metrics = make_experience(
        rollout, engine, args.ppo, kl_coef=0.2, temperature=args.generation.temperature
    )
    torch.testing.assert_close(experience.old_logprobs, experience.ref_logprobs)
    assert metrics["objective/kl"] == 0 and experience.values.shape == (1, length)

    # 6. Per-token rewards are the score on the last token alone; GAE's returns end there too.
    rewards = f.token_rewards(
        experience.score,
        experience.old_logprobs,
        experience.ref_logprobs,
        experience.response_mask,
        kl_coef=0.2,
    )
    assert rewards[0].tolist() == [0.0] * (length - 1) + [float(experience.score)]
    advantages, returns = f.gae(
        rewards, experience.values, experience.response_mask, gamma=1.0, lam=0.95
    )
    torch.testing.assert_close(returns, advantages + experience.values)
    torch.testing.assert_close(returns[0, -1], experience.score[0])

    # 7. Both losses are finite, and reach the weights.
    trainer = PPOTrainer(engine=engine, args=args)
    policy, _ = trainer._policy(engine.actor, experience, float(length))
    assert policy.isfinite() and policy.requires_grad
    values = engine.values(experience.sequences, experience.attention_mask, length)
    value, _ = f.value_loss(
        values,
        experience.values,
        experience.returns,
        experience.response_mask,
        value_clip=0.2,
        denominator=float(length),
    )
    torch.testing.assert_close(value, 0.5 * (values - experience.returns).square().mean())

    # 8. One step moves actor and critic.
    actor, critic = copied(engine.actor.module), copied(engine.critic.module)
    trainer.generate_experience(prompts)
    metrics = trainer.step(experience)
    assert not same_weights(actor, copied(engine.actor.module))
    assert not same_weights(critic, copied(engine.critic.module))
    assert metrics["optim/actor_grad_norm"] > 0 and metrics["optim/critic_grad_norm"] > 0
