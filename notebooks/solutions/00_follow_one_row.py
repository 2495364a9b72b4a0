# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 00 Follow one row: solutions
#
# To the exercises of [notebook 00](../00_follow_one_row.ipynb). Try them
# first. Each solution is a number that you can check, and a sentence about
# what it means.

# %% tags=["parameters"]
run_dir: str = "runs/notebooks"  # its models are used where there are any
steps: int = 10  # optimiser steps on one rollout, in exercise 3

# %%
from rlhf_kit import launch

launch.read_flags(globals())

# %%
import dataclasses

import torch
from rlhf_kit import functional as f
from rlhf_kit import toy_world
from rlhf_kit.config import override
from rlhf_kit.hybrid_engine.training import start_deepspeed
from rlhf_kit.models import resolve_model
from rlhf_kit.ppo import PPOTrainer
from rlhf_kit.rlhf_engine import RLHFEngine
from rlhf_kit.rollout import make_experience
from rlhf_kit.run_directory import RunDirectory
from rlhf_kit.tokenization import (
    collate_prompts,
    decode_response,
    load_tokenizer,
    prepare_tokenizer,
)
from rlhf_kit.types import PreferencePair

# %% [markdown]
# Four rows walk together, as in the notebook.

# %%
B = 4
start_deepspeed()
run = RunDirectory.open(
    run_dir,
    preset_name="toy",
    ppo__batch_size=B,
    ppo__minibatch_size=B,
    ppo__micro_batch_size=B,
    ppo__critic_warmup_iterations=0,
    ppo__mixture__kind="none",
)

# %%
args = run.args()
tokenizer = load_tokenizer(resolve_model(args.actor_model))
prepare_tokenizer(tokenizer)
rows = [
    PreferencePair(tuple(row["prompt"]))
    for row in toy_world.prompts(B, seed=0, split="train")
]
prompts = collate_prompts(tokenizer, rows, seeds=range(B))


# %%
def walk(args):
    """Engine and trainer as they begin."""
    engine = RLHFEngine(
        actor_model_name_or_path=args.actor_model,
        critic_model_name_or_path=args.reward_model,
        tokenizer=tokenizer,
        num_total_iters=args.ppo.iterations,
        args=args,
    )
    return engine, PPOTrainer(engine=engine, args=args)


# %%
def say(engine, ids, mask):
    return [
        decode_response(tokenizer, row[keep].tolist())
        for row, keep in zip(ids, mask, strict=True)
    ]


# %% [markdown]
# ## 1. With $\lambda = 1$ all returns are the score
#
# With $\gamma = \lambda = 1$ the advantage is the sum of all later surprises,
# $A_t = \sum_{k \ge t} (r_k + V_{k+1} - V_k)$. Every value but $V_t$ comes
# once with plus and once with minus, so $A_t = \sum_{k \ge t} r_k - V_t$ and
# $G_t = A_t + V_t = \sum_{k \ge t} r_k$. The actor still equals the ref, so
# the only reward is the score at the end: every return of a row *is* its
# score. The critic plays no part any more.

# %%
engine, trainer = walk(args)
experience = trainer.generate_experience(prompts)

# %%
mask = experience.response_mask
_, returns = f.gae(
    experience.rewards, experience.values, mask, gamma=1.0, lam=1.0
)
_, usual = f.gae(
    experience.rewards, experience.values, mask, gamma=1.0, lam=0.95
)
for row in range(B):
    score = float(experience.score[row])
    first = [f"{x:.3f}" for x in returns[row][mask[row]].tolist()[:4]]
    print(f"score {score:+.3f}   returns {first} ...")
expected = experience.score.unsqueeze(1).expand_as(returns) * mask
torch.testing.assert_close(returns, expected, rtol=0, atol=1e-4)
assert not torch.allclose(usual, expected, atol=1e-2)

# %% [markdown]
# ## 2. Four tokens are too few
#
# `ended` says that the responses were cut, and their scores are at most
# `missing_eos_score`: what they would have said next is unknown.

# %%
short = dataclasses.replace(args.generation, max_new_tokens=4)
engine.actor.eval()
cut = engine.actor.generate(prompts, short)
found, _ = make_experience(
    cut, engine, args.ppo, kl_coef=args.ppo.kl.coef, temperature=1.0
)

# %%
texts = say(engine, cut.response_ids, cut.response_mask)
for text, ended, score in zip(
    texts, cut.ended.tolist(), found.score.tolist(), strict=True
):
    print(f"ended {ended!s:5}  score {score:+.2f}  {text!r}")
limit = args.ppo.missing_eos_score
assert (found.score[~cut.ended] <= limit + 1e-6).all()

# %% [markdown]
# ## 3. Without the clip
#
# The same rollout ten times, with `clip_ratio` 0.2 and 10. The first epoch's
# ratio is 1 either way. From then on nothing holds the second actor back.

# %%
far = {}
for clip_ratio in (0.2, 10.0):
    engine, trainer = walk(override(args, ppo__clip_ratio=clip_ratio))
    experience = trainer.generate_experience(prompts)
    history = [trainer.step(experience) for _ in range(steps)]
    far[clip_ratio] = history[-1]["policy/approx_kl"]
    engine.actor.eval()
    now = engine.actor.generate(prompts, args.generation)
    print(f"clip_ratio {clip_ratio}: approx_kl {far[clip_ratio]:.3f}")
    for text in say(engine, now.response_ids, now.response_mask)[:3]:
        print(f"    {text[:70]!r}")

# %% [markdown]
# The clip does not stop the walk, but it shortens it: tokens beyond 1.2 (or
# below 0.8) no longer pull. Without it ten steps on four responses take the
# actor nearly twice as far, for no new information, and the first answer
# comes apart. These four rows are all it has to go by.

# %%
if steps >= 10:
    assert far[10.0] > far[0.2] > 0

# %% [markdown]
# ## 4. When is it no longer worth saying?
#
# The last actor has walked away from the ref. `token_rewards` pays the score
# once and takes `kl_coef` times the log-ratio on every token, so a row's
# rewards sum up to $S - \beta \sum_t \log(\pi / \pi_{ref})$. First for the
# same responses, then for new ones of the actor's own.


# %%
def balance(score, logprobs, ref_logprobs, mask):
    """A line a response: its score, its log-ratio, its rewards' sums."""
    gaps = ((logprobs - ref_logprobs) * mask).sum(1)
    print("score  log-ratio  sum at 0.1  sum at 1.0")
    for row in range(B):
        print(f"{score[row]:+.2f}  {gaps[row]:+9.2f}", end="")
        for kl_coef in (0.1, 1.0):
            rewards = f.token_rewards(
                score, logprobs, ref_logprobs, mask, kl_coef=kl_coef
            )
            total = float((rewards * mask)[row].sum())
            print(f"  {total:+10.2f}", end="")
            by_hand = float(score[row] - kl_coef * gaps[row])
            assert abs(total - by_hand) < 1e-3
        print()
    return float(gaps.mean())


# %%
mask, ref = experience.response_mask, experience.ref_logprobs
texts = (experience.sequences, experience.attention_mask)
new = engine.actor_logprobs(*texts, mask.shape[1], 1.0)
same = balance(experience.score, new, ref, mask)
own = trainer.generate_experience(prompts)

# %%
mask, ref = own.response_mask, own.ref_logprobs
theirs = balance(own.score, own.old_logprobs, ref, mask)

# %% [markdown]
# The same responses have become *less* likely, and not by accident: they
# were sampled from the ref, and there the mean of $\log(\pi / \pi_{ref})$ is
# $-KL(\pi_{ref} \| \pi)$, which is never positive. The price shows on what
# the new actor says itself, where the mean is $+KL(\pi \| \pi_{ref})$.
#
# A response is worth saying while its sum beats what the ref's responses
# get. At 0.1 ten nats eat one standard deviation of score; at 1.0 a single
# nat does, and the actor would hardly dare to move.
#
# ## 5. The wrong temperature
#
# The ratio compares the actor that sampled, at temperature 1, with the actor
# now. Ask the second one at 0.7 and the two are different functions before
# anything was learnt. The first number to tell is `policy/ratio_mean`: not 1
# on the very first minibatch. The share of clipped tokens follows.

# %%
engine, trainer = walk(args)
experience = trainer.generate_experience(prompts)
mask = experience.response_mask
texts = (experience.sequences, experience.attention_mask)

# %%
for temperature in (1.0, 0.7):
    now = engine.actor_logprobs(*texts, mask.shape[1], temperature)
    _, metrics = f.policy_loss(
        now,
        experience.old_logprobs,
        experience.advantages,
        mask,
        clip_ratio=0.2,
        denominator=float(mask.sum()),
    )
    mean, clipped = (
        float(metrics[f"policy/{key}"]) for key in ("ratio_mean", "clipfrac")
    )
    print(
        f"temperature {temperature}: ratio {mean:.4f}, clipped {clipped:.2f}"
    )
    assert (abs(mean - 1) < 1e-4) == (temperature == 1.0)

# %% [markdown]
# Training would go on without an error and push tokens by ratios that mean
# nothing. That is why every run checks that its first ratio is 1
# (`rlhf_kit.invariants`), and stops where it is not.
