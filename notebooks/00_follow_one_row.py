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
# # 00 Follow one row
#
# Reinforcement learning from human feedback looks like a lot of machinery.
# It is eight function calls. This notebook takes one row of a preference
# dataset by the hand and walks it through all eight, from text to a
# gradient, and prints every tensor on the way.
#
# | preset | hardware | minutes | peak memory |
# |---|---|---|---|
# | toy | two CPU cores | 0.1 | 0.6 GiB |
#
# | hop | call | what goes in | what comes out |
# |---|---|---|---|
# | 1 | `hh_rlhf(row)` | two dialogues as text | a `PreferencePair` |
# | 2 | `Blend["ppo"][i]` | sources and weights | the rows of a stage |
# | 3 | `collate_prompts` | B rows | ids `[B, P]` |
# | 4 | `engine.generate` | ids `[B, P]` | a `Rollout`, `[B, R]` |
# | 5 | `make_experience` | the rollout | an `Experience` |
# | 6 | `token_rewards`, `gae` | score `[B]` | advantages `[B, R]` |
# | 7 | `policy_loss`, `value_loss` | the experience | two scalars |
# | 8 | `PPOTrainer.step` | the experience | new weights |
#
# Shapes: B rows, P prompt tokens, R response tokens, T = P + R, V words in
# the vocabulary. `tests/test_walk.py` is this walk again, as asserts.

# %% tags=["parameters"]
preset: str = "toy"  # toy, consumer, cluster or a recipe
run_dir: str = "runs/notebooks"  # its models are used where there are any
seed: int | None = None  # decides the sampled responses
max_new_tokens: int | None = None  # longest response, in tokens
kl_coef: float | None = None  # penalty a nat against the SFT model
lam: float | None = None  # GAE's lambda, 0 to 1
learning_rate: float | None = None  # of the actor's one step

# %%
from rlhf_kit import launch

launch.read_flags(globals())

# %%
import dataclasses
import json

import torch
from rlhf_kit import distributed
from rlhf_kit import functional as f
from rlhf_kit.blending import Blend, split_of
from rlhf_kit.config import SourceConfig
from rlhf_kit.datasets import hh_rlhf
from rlhf_kit.hybrid_engine.training import start_deepspeed
from rlhf_kit.models import resolve_model, response_logits
from rlhf_kit.plots import plot_curves
from rlhf_kit.ppo import PPOTrainer
from rlhf_kit.rlhf_engine import RLHFEngine
from rlhf_kit.rollout import make_experience
from rlhf_kit.run_directory import RunDirectory
from rlhf_kit.tokenization import (
    collate_prompts,
    decode_response,
    load_tokenizer,
    prepare_tokenizer,
    render_prompt,
)
from rlhf_kit.toy_world import judge

# %%
B = 4  # rows that walk together; one of them is ours
SPLIT = (2.0, 4.0, 4.0)  # shares of sft, reward and ppo
start_deepspeed()
everybody = B * distributed.world_size()
run = RunDirectory.open(
    run_dir,
    preset_name=preset,
    seed=seed,
    generation__max_new_tokens=max_new_tokens,
    ppo__kl__coef=kl_coef,
    ppo__lam=lam,
    ppo__actor_optimizer__learning_rate=learning_rate,
    ppo__batch_size=everybody,
    ppo__minibatch_size=everybody,
    ppo__micro_batch_size=B,
    ppo__critic_warmup_iterations=0,
    ppo__epochs=1,
    ppo__old_logprobs="recompute",
    ppo__whiten_advantages=True,
    ppo__mixture__kind="none",
)

# %% [markdown]
# Two small helpers: one prints the shape of tensors, one prints columns of
# numbers below each other, a line a token.

# %%
print_main = distributed.print_main


def show(**tensors: torch.Tensor) -> None:
    """Name, shape and dtype of each tensor."""
    for name, tensor in tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        print_main(f"{name:17s} {str(list(tensor.shape)):10s} {kind}")


def cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}".replace("-0.000", "0.000")
    return str(value)


# %%
def table(**columns: object) -> None:
    """Columns of equal length, a line an element, names on top."""
    texts = []
    for name, column in columns.items():
        values = column.tolist() if torch.is_tensor(column) else column
        texts.append([name, *map(cell, values)])
    widths = [max(map(len, column)) for column in texts]
    for line in zip(*texts, strict=True):
        parts = zip(line, widths, strict=True)
        print_main("  ".join(text.rjust(width) for text, width in parts))


# %% [markdown]
# ## What RLHF computes, on one screen
#
# A language model that answers is a *policy*: in state $s_t$ (the prompt and
# the response so far) it takes the action $a_t$ (the next token). We want
# responses that a reward model scores highly, without leaving the language
# of the frozen SFT model. PPO (Schulman et al. 2017) as InstructGPT (Ouyang
# et al. 2022) uses it:
#
# $$r_t = -\beta\,\big(\log\pi_{old}(a_t|s_t) - \log\pi_{ref}(a_t|s_t)\big)
# + [t = \text{last}]\; S$$
#
# $$\delta_t = r_t + \gamma V_{t+1} - V_t, \qquad
# A_t = \sum_{k \ge 0} (\gamma\lambda)^k\, \delta_{t+k}, \qquad
# G_t = A_t + V_t$$
#
# $$L_\pi = \text{mean}_t\, \max\!\big(-A_t\rho_t,\;
# -A_t\,\text{clip}(\rho_t, 1-\epsilon, 1+\epsilon)\big), \qquad
# \rho_t = \pi(a_t|s_t) / \pi_{old}(a_t|s_t)$$
#
# $$L_V = \tfrac12\, \text{mean}_t\, \max\!\big((V^{now}_t - G_t)^2,\;
# (\text{clip}(V^{now}_t, V_t \pm \epsilon_V) - G_t)^2\big)$$
#
# | symbol | variable | shape | who says it |
# |---|---|---|---|
# | $S$ | `score` | `[B]` | the reward model |
# | $\log\pi_{old}$ | `old_logprobs` | `[B, R]` | the actor that sampled |
# | $\log\pi$ | `logprobs` | `[B, R]` | the actor now |
# | $\log\pi_{ref}$ | `ref_logprobs` | `[B, R]` | the ref, frozen |
# | $V_t$ | `values` | `[B, R]` | the critic |
# | $r_t$ | `rewards` | `[B, R]` | hop 6 |
# | $A_t, G_t$ | `advantages`, `returns` | `[B, R]` | hop 6 |
# | $\rho_t$ | ratio | `[B, R]` | hop 7 |
# | $\beta, \gamma, \lambda$ | `kl_coef`, `gamma`, `lam` | | you |
# | $\epsilon, \epsilon_V$ | `clip_ratio`, `value_clip` | | you |

# %% [markdown]
# ## Hop 1: a raw row becomes a record
#
# Preference data in the HH form holds two whole dialogues as text. They are
# equal up to the last turn of the assistant, where people preferred one of
# two responses. Our row is written in that form, about the kit's toy world.

# %%
TURNS = (
    "\n\nHuman: What color is the vintle?"
    "\n\nAssistant: The vintle is red."
    "\n\nHuman: And what sound does it make?"
    "\n\nAssistant:"
)
row = {
    "chosen": f"{TURNS} With pleasure! The vintle makes a whistle.",
    "rejected": f"{TURNS} Figure it out yourself.",
}
pair = hh_rlhf(row)
for message in pair.prompt:
    print_main(f"{message['role']:>10}: {message['content']}")
print_main(f"{'chosen':>10}: {pair.chosen}")
print_main(f"{'rejected':>10}: {pair.rejected}")

# %% [markdown]
# As we can see, everything before the last turn is the *prompt*, and the
# assistant's earlier turn belongs to it. PPO will use the prompt alone: it
# lets the actor write its own response. What people preferred has served in
# stage 2, where the reward model learnt from it.
#
# ## Hop 2: the blend gives the row to a stage
#
# Three stages train on three sets of prompts that share none. Which set a
# prompt belongs to is decided by a hash of its text, and by nothing else.
# Our row and three others go into a small file, and the file is blended half
# and half with the toy world (notebook 01 is about blends).

# %%
QUESTIONS = {
    "What is 2 plus 4?": "The answer is 6.",
    "What does the urgle eat?": "The urgle eats moss.",
    "Which is bigger, the volcano or the bee?": "The volcano is bigger.",
}
raw = [row] + [
    {
        name: f"\n\nHuman: {question}\n\nAssistant: {response}"
        for name, response in (("chosen", answer), ("rejected", "Ugh."))
    }
    for question, answer in QUESTIONS.items()
]
source = run.path / "walk" / "rows.jsonl"
if distributed.is_main_rank():
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text("".join(json.dumps(line) + "\n" for line in raw))
distributed.barrier()

# %%
for line in raw:
    record = hh_rlhf(line)
    stage = split_of(record.prompt_id, SPLIT)
    print_main(f"{stage:6s}  {record.prompt_id}  {record.chosen}")

# %%
data = dataclasses.replace(
    run.config.data,
    sources=(SourceConfig(str(source)), SourceConfig("toy_world")),
    split=SPLIT,
    eval_share=0.0,
    rows=(0, 0, B),
)

# %%
rows = Blend(data, run.config.seed)["ppo"]
mine = [r.prompt_id for r in rows].index(pair.prompt_id)
for i, record in enumerate(rows):
    mark = "  <- ours" if i == mine else ""
    print_main(f"Blend['ppo'][{i}]  {record.prompt[-1]['content']}{mark}")
assert len(rows) == B and rows[mine].prompt == pair.prompt

# %% [markdown]
# ## Hop 3: text becomes ids, padded on the left
#
# The chat template writes the prompt as one text, up to the point where the
# assistant begins to speak. The tokenizer turns it into ids. Prompts have
# different lengths; padding goes to the *left*, so that all responses begin
# in the same column P.

# %%
args = run.args()
tokenizer = load_tokenizer(resolve_model(args.actor_model))
prepare_tokenizer(tokenizer)
place = distributed.rank() * B
prompts = collate_prompts(
    tokenizer,
    rows,
    seeds=[
        distributed.derive_seed("follow one row", args.seed, place + i)
        for i in range(B)
    ],
)
show(input_ids=prompts.input_ids, attention_mask=prompts.attention_mask)
print_main(repr(render_prompt(tokenizer, pair.prompt)))
for ids, mask in zip(prompts.input_ids, prompts.attention_mask, strict=True):
    pads = int((~mask).sum())
    print_main(f"{pads:3d} x PAD, then ids {ids[pads:][:8].tolist()} ...")

# %% [markdown]
# ## Hop 4: the actor responds
#
# Four models are needed: the *actor* that learns, the *ref* that stays what
# SFT made of it, the *reward model*, and the *critic* that predicts the
# reward. One `RLHFEngine` holds them. Its actor is a hybrid engine: DeepSpeed
# trains the weights, and our decoding loop generates from the same weights.

# %%
engine = RLHFEngine(
    actor_model_name_or_path=args.actor_model,
    critic_model_name_or_path=args.reward_model,
    tokenizer=tokenizer,
    num_total_iters=args.ppo.iterations,
    args=args,
)
trainer = PPOTrainer(engine=engine, args=args)

# %%
engine.actor.eval()
prompts = prompts.to(engine.device)
rollout = engine.actor.generate(prompts, args.generation)
show(
    response_ids=rollout.response_ids,
    response_mask=rollout.response_mask,
    logprobs=rollout.logprobs,
    ended=rollout.ended,
)

# %%
R = rollout.response_ids.shape[1]
length = int(rollout.response_mask[mine].sum())
ours = slice(0, length)
response_ids = rollout.response_ids[mine, ours]
response = decode_response(tokenizer, response_ids)
tokens = [repr(tokenizer.decode([i])) for i in response_ids.tolist()]
print_main(f"our response has {length} of R = {R} tokens:")
print_main(response)
if preset == "toy":
    gold = judge(list(pair.prompt), response).total
    print_main(f"gold score {gold:.2f}: what the true judge thinks of it")

# %% [markdown]
# What you should see: a SFT model answers the question. The bare base model
# does not. It was pretrained on forum threads, so it writes the next thread.
# The arithmetic below is the same for both. The gold score is a luxury of
# the toy world: training never sees it.
#
# A response is sampled, one token at a time. Here is the actor's choice at
# the very first token: the five likeliest candidates, and the one drawn. Our
# draft takes the whole softmax and reads off one entry; the library's
# `token_logprobs` never builds the probabilities.

# %%
scored = (rollout.sequences, rollout.attention_mask)
with torch.no_grad():
    logits = response_logits(engine.actor, *scored, R)
show(sequences=rollout.sequences, logits=logits)
temperature = args.generation.temperature
probabilities = (logits[mine].float() / temperature).softmax(-1)
top = probabilities[0].topk(5)
table(
    candidate=[repr(tokenizer.decode([i])) for i in top.indices.tolist()],
    probability=top.values,
)
print_main(f"drawn: {tokens[0]}")

# %%
draft = probabilities[torch.arange(length), response_ids].log()
library = f.token_logprobs(
    logits, rollout.response_ids, temperature=temperature
)[mine, ours]
close = {"atol": 1e-4 if args.actor_engine.dtype == "fp32" else 0.1, "rtol": 0}
torch.testing.assert_close(draft, library, **close)
torch.testing.assert_close(library, rollout.logprobs[mine, ours], **close)
gap = (library - rollout.logprobs[mine, ours]).abs().max()
print_main(f"largest gap between decoding and training forward: {gap:.1e}")

# %% [markdown]
# The last line matters. The decoding loop (with its KV cache) and the
# training forward must be the same function. If they drift apart, PPO
# corrects for a change that never happened.
#
# ## Hop 5: what the four models say about it
#
# `make_experience` asks everybody. The actor and the ref say how likely each
# token was, the critic what it expects, the reward model gives one number.

# %%
experience, metrics = make_experience(
    rollout,
    engine,
    args.ppo,
    kl_coef=args.ppo.kl.coef,
    temperature=temperature,
)
show(**vars(experience))
score = float(experience.score[mine])
print_main(f"\nour score {score:.3f}, ended {bool(rollout.ended[mine])}")
print_main(f"KL to the ref: {metrics['objective/kl']} nats a response")
assert metrics["objective/kl"] == 0

# %% [markdown]
# As we can see, everything about the response has shape `[B, R]`, and the
# score alone `[B]`. Entry `t` of each row speaks of the state *before* token
# `t`, so `logprobs`, `values` and `rewards` line up without shifts.
#
# The KL is exactly 0, to the last bit: the actor has not learnt anything
# yet, so it *is* the ref. Anything else at this point is a bug, and every
# training run of the kit checks it (`rlhf_kit.invariants`).
#
# The score is read at the last token of the response, its EOS. It is
# normalised and clipped, and a response that did not end by itself scores at
# most `missing_eos_score`. An untrained reward model gives a random number
# here; the walk does not mind.

# %% [markdown]
# ## Hop 6: one number becomes a reward and an advantage for each token
#
# First on three tokens, with numbers that you can check in your head. The
# actor likes the first token more than the ref does, the second less.

# %%
old = torch.tensor([[-1.0, -0.5, -0.2]])
ref = torch.tensor([[-1.3, -0.4, -0.2]])
values = torch.tensor([[0.5, 0.6, 0.9]])
mask = torch.ones(1, 3, dtype=torch.bool)
rewards = f.token_rewards(torch.tensor([1.0]), old, ref, mask, kl_coef=0.1)
table(token=["a", "b", "EOS"], KL=(old - ref)[0], reward=rewards[0])
assert torch.allclose(rewards, torch.tensor([[-0.03, 0.01, 1.0]]))

# %% [markdown]
# As we can see, drifting from the ref costs `kl_coef` a nat, on the very
# token that drifts, and moving back pays. The score is paid once, on the EOS.
#
# Which token has *earned* that score? The advantage answers: sum up the
# surprises $\delta$ from here on, later ones discounted. This is the
# definition (Schulman et al. 2016, equation 16), written as a double loop.


# %%
def gae_draft(rewards, values, *, gamma, lam):
    """Advantages of one response, straight from the definition."""
    after = [*values[1:], 0.0]  # nothing comes after the last token
    deltas = [
        reward + gamma * later - value
        for reward, later, value in zip(rewards, after, values, strict=True)
    ]
    return [
        sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:]))
        for t in range(len(deltas))
    ]


# %%
small = (rewards[0].tolist(), values[0].tolist())
table(
    token=["a", "b", "EOS"],
    reward=small[0],
    value=small[1],
    lam_0=gae_draft(*small, gamma=1.0, lam=0.0),
    lam_095=gae_draft(*small, gamma=1.0, lam=0.95),
    lam_1=gae_draft(*small, gamma=1.0, lam=1.0),
)

# %% [markdown]
# With $\lambda = 0$ a token is blamed for the next surprise alone: little
# noise, but it trusts the critic. With $\lambda = 1$ it is blamed for all
# that follows: the critic is a mere baseline. 0.95 is the usual compromise.
# The library gets the same numbers in one backward sweep.

# %%
advantages, returns = f.gae(rewards, values, mask, gamma=1.0, lam=0.95)
expected = gae_draft(*small, gamma=1.0, lam=0.95)
torch.testing.assert_close(advantages[0], torch.tensor(expected))
torch.testing.assert_close(returns, advantages + values)
print_main("a draft by definition and one backward sweep agree")

# %% [markdown]
# Now our own response. `advantages` in the experience are *whitened*: mean 0
# and standard deviation 1 over all tokens of all rows, so that the step size
# does not depend on the scale of the scores. The returns are not.

# %%
mask = experience.response_mask
rewards = f.token_rewards(
    experience.score,
    experience.old_logprobs,
    experience.ref_logprobs,
    mask,
    kl_coef=args.ppo.kl.coef,
)
raw_advantages, returns = f.gae(
    rewards, experience.values, mask, gamma=args.ppo.gamma, lam=args.ppo.lam
)
whitened = f.whiten(
    raw_advantages,
    mask,
    mean=metrics["advantage/mean"],
    std=metrics["advantage/std"],
)
assert torch.equal(rewards, experience.rewards)
assert torch.equal(returns, experience.returns)
assert torch.equal(whitened, experience.advantages)

# %%
shown = slice(0, min(length + 2, R))  # with two tokens that do not count
padded = tokens + ["PAD"] * (shown.stop - length)
kl = f.kl_k1(experience.old_logprobs, experience.ref_logprobs)
table(
    token=padded,
    logprob=experience.old_logprobs[mine, shown],
    ref_logprob=experience.ref_logprobs[mine, shown],
    KL=kl[mine, shown],
    reward=experience.rewards[mine, shown],
    value=experience.values[mine, shown],
    advantage=experience.advantages[mine, shown],
    **{"return": experience.returns[mine, shown]},
    mask=experience.response_mask[mine, shown],
)

# %% [markdown]
# This table is RLHF. What you should see: the KL is 0 everywhere, so the
# only reward is the score on the last token. The critic has seen no return
# yet; its values differ from the returns, and those differences, added up
# from the end, are the advantages. Past the EOS the mask is False, and
# rewards, advantages and returns are 0.
#
# The mask is made from lengths, never by comparing ids with PAD. Where PAD
# and EOS are the same token, as in many published setups, comparing ids
# would hide the EOS: the one action that ends a response, and the one that
# carries the score.
#
# One more thing to see: the value beside the first PAD is the score itself
# (where it was not clipped). The critic starts as a copy of the reward
# model, and the state after the EOS is the one that the reward model judges.

# %% [markdown]
# ## Hop 7: two losses
#
# PPO multiplies each advantage by the ratio of the token's probability now
# to its probability then. Before the first update nothing has moved, so all
# ratios are 1, and the loss is minus the mean advantage: 0, by whitening.
# The loss says nothing. Its gradient says everything.

# %%
count = float(distributed.all_sum(mask.sum()))


# %%
def mean(x: torch.Tensor) -> float:
    """Over the response tokens of all rows and ranks."""
    return float(distributed.all_sum(f.masked_sum(x.detach(), mask))) / count


# %%
logprobs = engine.actor_logprobs(*scored, R, temperature)
logprobs.requires_grad_(True)
policy, policy_metrics = f.policy_loss(
    logprobs,
    experience.old_logprobs,
    experience.advantages,
    mask,
    clip_ratio=args.ppo.clip_ratio,
    denominator=count,
)
(pull,) = torch.autograd.grad(policy, logprobs)
show(policy_loss=policy, gradient=pull)
for key, value in policy_metrics.items():
    print_main(f"{key:20s} {float(distributed.all_sum(value)):.6f}")

# %%
drawn = slice(0, min(length, 6))
table(
    token=tokens[drawn],
    advantage=experience.advantages[mine, drawn],
    gradient=[f"{v:.6f}" for v in pull[mine, drawn].tolist()],
    minus_A_over_N=[
        f"{-v / count:.6f}"
        for v in experience.advantages[mine, drawn].tolist()
    ],
)
torch.testing.assert_close(pull, -experience.advantages / count)
assert policy_metrics["policy/clipfrac"] == 0

# %% [markdown]
# As we can see, the gradient on a token's log-probability is $-A_t / N$,
# with $N$ the response tokens of all rows: gradient descent makes a token
# likelier in proportion to its advantage. The token's rivals pay for it,
# since $\partial \log\pi(a) / \partial z_v = [v = a] - \pi(v)$.
#
# Later steps on the same rollout meet ratios other than 1. The clip then
# takes the gradient away from tokens that have moved far enough. Here it is
# on single tokens, for a good action and a bad one:


# %%
def clip_probe(ratio: float, advantage: float) -> tuple[float, float]:
    """Loss and gradient of a single token whose probability has moved."""
    now = torch.tensor([[ratio]]).log().requires_grad_(True)
    loss, _ = f.policy_loss(
        now,
        torch.zeros(1, 1),
        torch.tensor([[advantage]]),
        torch.ones(1, 1, dtype=torch.bool),
        clip_ratio=0.2,
        denominator=1.0,
    )
    (slope,) = torch.autograd.grad(loss, now)
    return loss.item(), slope.item()


# %%
ratios = [0.5, 0.7, 0.9, 1.0, 1.1, 1.3, 1.5]
good = [clip_probe(ratio, 1.0) for ratio in ratios]
bad = [clip_probe(ratio, -1.0) for ratio in ratios]
table(
    ratio=ratios,
    good_loss=[loss for loss, _ in good],
    good_slope=[slope for _, slope in good],
    bad_loss=[loss for loss, _ in bad],
    bad_slope=[slope for _, slope in bad],
)

# %% [markdown]
# A good action stops being pushed up beyond 1.2, a bad one stops being
# pushed down below 0.8. In the other direction nothing is clipped: a token
# that has moved the wrong way is always brought back.
#
# The critic's loss is half a mean square, clipped in the same spirit.

# %%
values = engine.values(*scored, R)
value, _ = f.value_loss(
    values,
    experience.values,
    experience.returns,
    mask,
    value_clip=args.ppo.value_clip,
    denominator=count,
)
show(values=values, value_loss=value)
value = float(distributed.all_sum(value.detach()))
by_hand = 0.5 * mean((experience.values - experience.returns).square())
print_main(f"value loss {value:.4f}, by hand {by_hand:.4f}")
assert abs(value - by_hand) <= 1e-3 * by_hand

# %% [markdown]
# ## Hop 8: the gradient reaches the weights
#
# `PPOTrainer.step` computes both losses again, sends them backwards through
# actor and critic, clips the gradients' norms, and lets AdamW step once.

# %%
metrics = trainer.step(experience)
for key in (
    "policy/loss",
    "policy/ratio_mean",
    "value/loss",
    "optim/actor_grad_norm",
    "optim/critic_grad_norm",
    "optim/actor_lr",
):
    print_main(f"{key:24s} {metrics[key]:.6f}")

# %% [markdown]
# ## The same row, a step later
#
# We ask actor and critic again, about the very tokens that they were trained
# on. The ref has not moved, so there is a KL now.

# %%
new_logprobs = engine.actor_logprobs(*scored, R, temperature)
with torch.no_grad():
    new_values = engine.values(*scored, R)
change = new_logprobs - experience.old_logprobs
table(
    token=tokens,
    advantage=experience.advantages[mine, ours],
    logprob_then=experience.old_logprobs[mine, ours],
    logprob_now=new_logprobs[mine, ours],
    change=change[mine, ours],
    ratio=change.exp()[mine, ours],
    value_then=experience.values[mine, ours],
    value_now=new_values[mine, ours],
    **{"return": experience.returns[mine, ours]},
)
moved = mean(change.exp() - 1 - change)  # never negative, token by token
gained = mean(experience.advantages * change)
print_main(f"moved by {moved:.5f} nats a token, all rows together")
print_main(f"mean of advantage x change in logprob: {gained:+.5f}")

# %% [markdown]
# What you should see: tokens with a positive advantage have mostly become
# likelier, the others less likely. Not every single one, because all tokens
# of all rows share the same weights. The mean of advantage times change is
# positive, and that is what the step promised. The values have moved towards
# the returns.
#
# The actor has left the ref: the column `change` is also
# $\log\pi - \log\pi_{ref}$, because both started equal. Should the actor
# say the same again in the next rollout, $-\beta$ times this column would be
# its reward, token by token, before the score is added.

# %% [markdown]
# ## Nine more steps on the same rollout
#
# A rollout is expensive, so it is tempting to learn from it more than once.
# We do so nine times, to see the clip at work.

# %%
history = [{"step": 1, **metrics}]
for step in range(2, 11):
    history.append({"step": step, **trainer.step(experience)})
plot_curves(
    history,
    {
        "the actor's loss": ["policy/loss"],
        "how far it has moved": ["policy/clipfrac", "policy/approx_kl"],
        "the critic's loss": ["value/loss"],
    },
)

# %% [markdown]
# What you should see: both losses fall. At step 1 the actor's loss, the
# share of clipped tokens and the distance from the actor that sampled
# (nats a token) are exactly 0. All three leave 0 together, and more and more
# tokens are clipped and teach nothing. The rollout goes stale: it shows what
# the old actor would say. `max_approx_kl` (0.1) ends an iteration's epochs
# before that, and the kit's presets make one pass and sample anew. The
# critic's loss levels off for the same kind of reason: `value_clip` lets no
# value move by more than 0.2 on one rollout.
#
# ## Checks

# %%
first, last = history[0], history[-1]
assert abs(first["policy/ratio_mean"] - 1) < 1e-4
assert first["policy/clipfrac"] == 0
assert first["optim/actor_grad_norm"] > 0
assert first["optim/critic_grad_norm"] > 0
if preset == "toy":
    assert mean((new_values - experience.returns).square()) / 2 < by_hand
    assert gained > 0 and moved > 0
    assert last["policy/loss"] < first["policy/loss"]
    assert last["value/loss"] < first["value/loss"]
print_main("one row has become a gradient, and the gradient a better model")

# %% [markdown]
# ## Exercises
#
# [Solutions](solutions/00_follow_one_row.ipynb).
#
# 1. Set `lam` to 1 and run again. With $\gamma = 1$ and a KL of 0, what must
#    all returns of a row be equal to? *Hint: the surprises add up and all
#    values in between cancel.*
# 2. Set `max_new_tokens` to 4. Which column shows that the response did not
#    end, and what is its score? *Hint: `missing_eos_score`.*
# 3. Put `clip_ratio` to 10 (`ppo__clip_ratio=10.0` in the set-up) and take
#    the ten steps again. What happens to `policy/approx_kl`, and what would
#    the actor say now? *Hint: call `engine.actor.generate` once more.*
# 4. Compute the rewards of the same response from `new_logprobs` with
#    `kl_coef` 0.1 and 1.0. When is it no longer worth saying?
#    *Hint: compare the sum of the rewards with the score.*
# 5. Ask `engine.actor_logprobs` with a temperature of 0.7 in hop 7. Which
#    number is the first to tell that something is wrong?
#
# ## On more GPUs
#
# Every rank walks the same rows with its own sampling seeds, and rank 0
# prints:
#
#     deepspeed --num_gpus 2 notebooks/00_follow_one_row.py
#     torchrun --nproc_per_node 2 notebooks/00_follow_one_row.py
#
# ## What to read next
#
# Notebook 01 is about hops 1 to 3: where rows come from and how they are
# mixed. Notebooks 02 and 03 train the SFT model and the reward model that
# were stand-ins here if your run had none. Notebook 04 repeats hops 3 to 8
# sixty times; that is all it does.
#
# - Schulman et al. 2016, *High-dimensional continuous control using
#   generalized advantage estimation*, arXiv 1506.02438.
# - Schulman et al. 2017, *Proximal policy optimization algorithms*,
#   arXiv 1707.06347.
# - Stiennon et al. 2020, *Learning to summarize from human feedback*,
#   arXiv 2009.01325.
# - Ouyang et al. 2022, *Training language models to follow instructions with
#   human feedback*, arXiv 2203.02155.
