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
# # 04 PPO
#
# The SFT model imitates its demonstrations, good and bad alike. Now it tries
# responses of its own, the reward model scores them, and PPO makes the better
# tokens likelier. A KL penalty, a clip and a mixture loss keep it from paying
# for the score with its language.
#
# | preset | hardware | minutes | peak memory |
# |---|---|---|---|
# | toy | two CPU cores | 0.8 | 0.8 GiB |
# | consumer | one GPU, 24 GB of it | 28.4 | 19.8 GiB |
#
# It starts from the SFT model of notebook 02 and the reward model of notebook
# 03. Where they are missing it says so and uses their base models.
#
# `benchmarks/notebooks.py` and `benchmarks/consumer.py` measured them, the
# latter a few iterations, reckoned to 100, of Qwen2.5-0.5B's shape with random
# weights on an H200 of which 24 GB were allowed.

# %% tags=["parameters"]
preset: str = "toy"  # toy, consumer, cluster or a recipe
run_dir: str = "runs/notebooks"  # where models and metrics go
resume: bool = True  # go on where training was cut short
seed: int | None = None  # decides data order, sampling and initialisation
iterations: int | None = None  # rollout and update rounds
epochs: int | None = None  # passes over each rollout
micro_batch_size: int | None = None  # rows a forward pass, on one rank
kl_coef: float | None = None  # penalty a nat against the SFT model
kl_kind: str | None = None  # fixed or adaptive
actor_learning_rate: float | None = None  # peak learning rate of the actor
critic_learning_rate: float | None = None  # and of the critic
old_logprobs: str | None = None  # recompute, rollout or corrected
mixture: str | None = None  # none, coef or grad_norm_ratio
ptx_coef: float | None = None  # weight of the mixture loss with coef
ema_decay: float | None = None  # of the average of the actor's weights
zero_stage: int | None = None  # ZeRO stage of the actor, 0 to 3
lora_rank: int | None = None  # adapters of this rank; 0 trains all weights
generation_tp: int | None = None  # ranks of a host that generate together

# %% [markdown]
# Each of these is also a flag when the file runs as a script
# (`python notebooks/04_ppo.py --iterations 5`). None leaves what the preset
# says.

# %%
from rlhf_kit import launch

launch.read_flags(globals())

# %%
import dataclasses
import math

import torch
from rlhf_kit import (
    DeepSpeedPPOTrainer,
    DeepSpeedRLHFEngine,
    distributed,
    invariants,
    preflight,
)
from rlhf_kit import functional as f
from rlhf_kit.blending import Blend
from rlhf_kit.checkpoint import export, is_complete
from rlhf_kit.config import EMAConfig
from rlhf_kit.ema import EMA
from rlhf_kit.faults import Faults
from rlhf_kit.hybrid_engine.self_test import self_test
from rlhf_kit.hybrid_engine.training import start_deepspeed
from rlhf_kit.measure import weight_distance

# %%
from rlhf_kit.metrics import MetricsLog, read_metrics
from rlhf_kit.models import resolve_model
from rlhf_kit.plots import plot_curves
from rlhf_kit.resume import Checkpoints
from rlhf_kit.rollout import PromptLoader, write_samples
from rlhf_kit.run_directory import RunDirectory
from rlhf_kit.tokenization import (
    as_text,
    collate_prompts,
    decode_response,
    encode_demonstrations,
    keep_fitting,
    load_tokenizer,
    prepare_tokenizer,
)
from tqdm.auto import tqdm

# %%
start_deepspeed()
run = RunDirectory.open(
    run_dir,
    preset_name=preset,
    seed=seed,
    ppo__iterations=iterations,
    ppo__epochs=epochs,
    ppo__micro_batch_size=micro_batch_size,
    ppo__kl__coef=kl_coef,
    ppo__kl__kind=kl_kind,
    ppo__actor_optimizer__learning_rate=actor_learning_rate,
    ppo__critic_optimizer__learning_rate=critic_learning_rate,
    ppo__old_logprobs=old_logprobs,
    ppo__mixture__kind=mixture,
    ppo__mixture__ptx_coef=ptx_coef,
    ppo__ema__decay=ema_decay,
    actor_engine__zero_stage=zero_stage,
    actor_engine__lora__rank=lora_rank,
    actor_engine__generation_tp=generation_tp,
)
args = run.args()
preflight.check(run)
distributed.seed_everything(args.seed)


# %%
# Explanations are for readers: a script trains and prints little.
show = print if launch.in_notebook() else lambda *_: None


def table(**columns):
    """Print columns of equal length, their names on top."""
    texts = []
    for name, column in columns.items():
        values = column.tolist() if torch.is_tensor(column) else column
        cells = [f"{v:.3f}" if type(v) is float else str(v) for v in values]
        texts.append([name, *cells])
    widths = [max(map(len, column)) for column in texts]
    for line in zip(*texts, strict=True):
        cells = zip(line, widths, strict=True)
        show("  ".join(cell.rjust(width) for cell, width in cells))


# %% [markdown]
# ## Theory on one screen
#
# For prompts $x$ and responses $y$ that the actor $\pi$ writes itself, we
# want a high score $S$, near the SFT model $\pi_{ref}$, without forgetting
# ordinary text (Ouyang et al. 2022, equation 2):
#
# $$\max_\pi\;
# E\Big[\, S(x, y) - \beta \log\frac{\pi(y|x)}{\pi_{ref}(y|x)} \Big]
# + c\; E_{text}\big[ \log\pi \big]$$
#
# $\log\pi(y|x)$ is a sum over tokens, so the penalty is paid token by token
# and the score at the end. Then come generalised advantage estimation
# (Schulman et al. 2016) and the clipped loss of PPO (Schulman et al. 2017):
#
# $$r_t = -\beta \log\frac{\pi_{old}(a_t|s_t)}{\pi_{ref}(a_t|s_t)}
# + [t\ \text{last}]\, S \qquad
# \delta_t = r_t + \gamma V_{t+1} - V_t \qquad
# A_t = \delta_t + \gamma\lambda A_{t+1} \qquad G_t = A_t + V_t$$
#
# $$L_\pi = \text{mean}_t \max\big(-A_t \rho_t,\;
# -A_t\, \text{clip}(\rho_t, 1 \pm \epsilon)\big) \qquad
# \rho_t = \pi(a_t|s_t) / \pi_{old}(a_t|s_t)$$
#
# $$L_V = \tfrac12 \text{mean}_t \max\big((V - G_t)^2,
# (\text{clip}(V, V_{old} \pm \epsilon_V) - G_t)^2\big) \qquad
# L_{mix} = -\text{mean}_t \log\pi(x_t | x_{<t})$$
#
# $$\text{actor: } L_\pi + c\, L_{mix} \qquad \text{critic: } L_V \qquad
# \text{average: } \bar\theta \leftarrow d_n \bar\theta + (1 - d_n)\,\theta,
# \quad d_n = \min\big(d, \tfrac{1 + n}{10 + n}\big)$$
#
# | symbol | variable | symbol | variable |
# |---|---|---|---|
# | $S$ | `score` | $\beta$ | `kl_coef` |
# | $r_t$ | `rewards` | $\gamma, \lambda$ | `gamma`, `lam` |
# | $\log\pi$ | `logprobs` | $\epsilon$ | `clip_ratio` |
# | $\log\pi_{old}$ | `old_logprobs` | $\epsilon_V$ | `value_clip` |
# | $\log\pi_{ref}$ | `ref_logprobs` | $c$ | `ptx_coef`, or measured |
# | $V_t, A_t$ | `values`, `advantages` | $d$ | `ema_decay` |
# | $G_t$ | `returns` | $\rho_t$ | the ratio |
#
# `score` is `[B]`, one a response; what has an index $t$ is `[B, R]`, one a
# response token.

# %% [markdown]
# ## 1. Two estimators of the KL
#
# A world of four words, an actor $p$ and a ref $q$. Here the KL can be
# computed exactly. A language model has $V^R$ responses, so there it is
# estimated from the tokens that were sampled: by k1, $\log p - \log q$, or by
# k3, $e^{-x} + x - 1$ with $x = \log p - \log q$ (Schulman 2020).

# %%
p = torch.tensor([0.6, 0.2, 0.1, 0.1])
q = torch.tensor([0.3, 0.3, 0.2, 0.2])
exact = float((p * (p / q).log()).sum())
x = p.log() - q.log()
drafts = {"k1": x, "k3": torch.exp(-x) + x - 1}
table(word=["moss", "grain", "fish", "EOS"], p=p, q=q, **drafts)
assert torch.equal(drafts["k1"], f.kl_k1(p.log(), q.log()))
assert torch.equal(drafts["k3"], f.kl_k3(p.log(), q.log()))

# %%
generator = torch.Generator().manual_seed(0)
drawn = torch.multinomial(p, 10_000, replacement=True, generator=generator)
samples = [draft[drawn] for draft in drafts.values()]
table(
    estimator=list(drafts),
    mean=[float(s.mean()) for s in samples],
    std=[float(s.std()) for s in samples],
    negative=[float((s < 0).float().mean()) for s in samples],
    exact=[exact, exact],
)
for sample in samples:
    error = float(sample.mean()) - exact
    assert abs(error) < 4 * float(sample.std()) / 100  # 100 = sqrt(10000)

# %% [markdown]
# As we can see, both find the KL on average. k1 is noisy and often negative;
# k3 is never negative and has far less spread. So why is k1 the one in the
# rewards? Because PPO treats rewards as constants. What that leaves out of
# the gradient has mean zero for k1, and has not for k3:

# %%
logits = p.log().requires_grad_(True)
probs = logits.softmax(-1)
kl = (probs * (probs.log() - q.log())).sum()
(true,) = torch.autograd.grad(kl, logits)


def policy_gradient(reward):
    """sum_a p(a) reward(a) d log p(a): the reward is a constant."""
    expected = (p * reward * logits.log_softmax(-1)).sum()
    return torch.autograd.grad(expected, logits)[0]


pull = {name: policy_gradient(draft) for name, draft in drafts.items()}
table(word=["moss", "grain", "fish", "EOS"], true_gradient=true, **pull)
torch.testing.assert_close(pull["k1"], true)
assert not torch.allclose(pull["k3"], true, atol=0.01)

# %% [markdown]
# With k1 as the reward the policy gradient *is* the gradient of the KL. With
# k3 it is another one. Several codebases offer k3 as a penalty; here it is a
# monitor, `objective/kl_k3`, and k1 pays.
#
# ## 2. Rewards: a toll on every token, the score on the last
#
# Four responses to "What does the urgle eat?", with log-probabilities made up
# to be read. The third is an exploit: the reward model likes it, although no
# person talks like that. The fourth ran into the length limit.

# %%
RESPONSES = (
    "It eats moss . EOS",
    "Gladly ! It eats moss EOS",
    "moss moss moss moss moss EOS",
    "It eats moss or grain or",
)
old = torch.tensor(
    [
        [-0.7, -0.4, -0.9, -0.1, -0.2, 0.0],
        [-0.5, -0.2, -0.6, -0.3, -0.8, -0.1],
        [-2.0, -0.3, -0.2, -0.2, -0.1, -0.9],
        [-0.7, -0.4, -1.1, -1.5, -0.8, -0.6],
    ]
)
ref = torch.tensor(
    [
        [-0.8, -0.4, -1.0, -0.1, -0.3, 0.0],
        [-1.5, -0.4, -0.6, -0.2, -0.9, -0.1],
        [-4.0, -2.3, -1.2, -0.7, -0.6, -2.9],
        [-0.6, -0.4, -1.0, -1.4, -0.9, -0.7],
    ]
)
words = [response.split() for response in RESPONSES]
mask = torch.tensor([[t < len(row) for t in range(6)] for row in words])
ended = torch.tensor([row[-1] == "EOS" for row in words])
score = f.shape_score(
    torch.tensor([0.4, 1.2, 0.9, 0.7]), ended, missing_eos_score=-1.0
)


# %%
def draft_rewards(b, kl_coef):
    """The rewards of response b, one a token."""
    rewards = []
    for t in range(len(words[b])):
        toll = -kl_coef * float(old[b, t] - ref[b, t])
        is_last = t == len(words[b]) - 1
        rewards.append(toll + (float(score[b]) if is_last else 0.0))
    return rewards


drafts = [draft_rewards(b, kl_coef=0.1) for b in range(4)]
for b, draft in enumerate(drafts):
    tolls = "  ".join(
        f"{word} {r:+.2f}" for word, r in zip(words[b], draft, strict=True)
    )
    show(f"score {float(score[b]):+.1f}, sum {sum(draft):+.2f}:  {tolls}")

# %%
rewards = f.token_rewards(score, old, ref, mask, kl_coef=0.1)
for row, draft in zip(rewards.tolist(), drafts, strict=True):
    padded = draft + [0.0] * (6 - len(draft))
    torch.testing.assert_close(row, padded, rtol=0, atol=1e-6)
kl = f.masked_sum(f.kl_k1(old, ref), mask) / 4
show(f"objective/kl would be {float(kl):.2f} nats a response")

# %% [markdown]
# Three things to see. The exploit's 8 nats eat most of its score: that is
# what $\beta$ is for. The response that was cut scores -1, not 0.7: what it
# would have said next is unknown, and stopping must pay. And the score sits
# *on the EOS*. Where codes pad with the EOS id and mask the padding, the last
# action that gets a reward is the one before; the actor then unlearns to
# stop, and the run shows it as a falling `response/eos_rate`.
#
# ## 3. Advantages: who earned it?
#
# The second response, by hand, from the last token backwards. The critic's
# values are made up; the arithmetic is the theory's.

# %%
values = torch.tensor(
    [
        [0.3, 0.3, 0.4, 0.4, 0.4, 0.0],
        [0.6, 0.7, 0.7, 0.8, 0.9, 1.0],
        [0.3, -0.2, -0.4, -0.3, -0.1, 0.2],
        [0.3, 0.3, 0.3, -0.1, -0.3, -0.6],
    ]
)
gamma, lam = 1.0, 0.95
later_value = later_advantage = 0.0
by_hand = []
for t in reversed(range(6)):
    r, v = float(rewards[1, t]), float(values[1, t])
    delta = r + gamma * later_value - v
    advantage = delta + gamma * lam * later_advantage
    show(
        f"{words[1][t]:>6}: delta {r:+.2f} {later_value:+.2f} - {v:.2f}"
        f" = {delta:+.2f},  A = {delta:+.2f} + 0.95 x"
        f" {later_advantage:+.3f} = {advantage:+.3f}"
    )
    by_hand.insert(0, advantage)
    later_value, later_advantage = v, advantage

# %%
advantages, returns = f.gae(rewards, values, mask, gamma=gamma, lam=lam)
torch.testing.assert_close(advantages[1], torch.tensor(by_hand))
mean, std = f.mean_and_std(f.moments(advantages, mask))
whitened = f.whiten(advantages, mask, mean=mean, std=std)
table(
    word=words[1],
    reward=rewards[1],
    value=values[1],
    advantage=advantages[1],
    whitened=whitened[1],
    **{"return": returns[1]},
)
torch.testing.assert_close(returns, (advantages + values) * mask)

# %% [markdown]
# As we can see, the surprise at the end (a score of 1.2 where 1.0 was
# expected) travels back and fades by $\lambda$ a step. "Gladly" gets its
# share although the score came five tokens later; its toll of 0.1 is in it
# too. Whitening then sets mean 0 and standard deviation 1 over *all* tokens
# of the batch, so that the step size does not hang on the scale of scores.
# The returns, which the critic learns, are made before it.
#
# ## 4. The ratio is 1, and then it is not
#
# `old_logprobs` were taken from the very weights that the first minibatch
# starts from, so its ratio is 1 for every token and nothing is clipped: the
# first step is a plain policy gradient. Later steps on the same rollout see a
# moved actor. Watch one action with advantage +1, and six steps on it:


# %%
def draft_loss(ratio, advantage, clip_ratio=0.2):
    """The clipped loss of one token."""
    inside = min(max(ratio, 1 - clip_ratio), 1 + clip_ratio)
    return max(-advantage * ratio, -advantage * inside)


# %%
one = torch.ones(1, 1)
logits = torch.zeros(1, 1, 4, requires_grad=True)  # [B, R, V]
action = torch.zeros(1, 1, dtype=torch.long)
then = f.token_logprobs(logits, action).detach()
steps = []
for _ in range(6):
    now = f.token_logprobs(logits, action)
    loss, metrics = f.policy_loss(
        now, then, one, one.bool(), clip_ratio=0.2, denominator=1.0
    )
    ratio = float((now.detach() - then).exp())
    assert math.isclose(loss.item(), draft_loss(ratio, 1.0), rel_tol=1e-5)
    (slope,) = torch.autograd.grad(loss, logits)
    clipped = bool(metrics["policy/clipfrac"])
    steps.append((ratio, loss.item(), clipped, float(slope.norm())))
    logits = (logits - 0.09 * slope).detach().requires_grad_(True)
ratios, losses, clipped, norms = zip(*steps, strict=True)
table(ratio=ratios, loss=losses, clipped=clipped, gradient_norm=norms)
assert ratios[0] == 1.0 and not clipped[0] and norms[-1] == 0

# %% [markdown]
# The first ratio is exactly 1. Beyond 1.2 the gradient is gone and the token
# rests. The clip is no wall: the ratio lands where the last step took it, and
# other tokens share the weights and may push it on.
#
# The whole picture, for a good token and a bad one. Solid is what is
# minimised, dashed what it would be without the clip:

# %%
points = [
    {
        "step": 0.5 + 0.01 * i,
        "A = +1": draft_loss(0.5 + 0.01 * i, 1.0),
        "A = +1, no clip": -(0.5 + 0.01 * i),
        "A = -1": draft_loss(0.5 + 0.01 * i, -1.0),
        "A = -1, no clip": 0.5 + 0.01 * i,
    }
    for i in range(101)
]
panels = {
    "loss of a good token": ["A = +1", "A = +1, no clip"],
    "loss of a bad token": ["A = -1", "A = -1, no clip"],
}
plot_curves(points, panels, xlabel="ratio") if launch.in_notebook() else None

# %% [markdown]
# What you should see: descending, a good token moves right until 1.2, a bad
# one left until 0.8, where the loss becomes flat. On the other side nothing
# is flat: a token that has gone the wrong way is always pulled back. A bad
# token with a huge ratio has a huge loss; `dual_clip` (Ye et al. 2020) bounds
# it, and is off by default.
#
# Our four responses with an actor that has moved a little, by the draft and
# by the library:

# %%
moved = old + torch.tensor([0.3, -0.3, 0.1, -0.1, 0.0, 0.25])
drafts = [
    draft_loss(math.exp(float(moved[b, t] - old[b, t])), float(whitened[b, t]))
    for b, t in mask.nonzero().tolist()
]
tokens = float(mask.sum())
loss, metrics = f.policy_loss(
    moved, old, whitened, mask, clip_ratio=0.2, denominator=tokens
)
torch.testing.assert_close(float(loss), sum(drafts) / tokens)
for key in ("approx_kl", "clipfrac", "ratio_mean"):
    show(f"policy/{key:10} {float(metrics['policy/' + key]):.4f}")

# %% [markdown]
# ## 5. How much text to mix in?
#
# InstructGPT multiplies the mixture loss by 27.8. That number belongs to its
# batch and its rewards: gradients of a language model loss and of PPO differ
# by orders of magnitude from set-up to set-up. The default here measures both
# norms every tenth step and sets $c$ so that the text's gradient is a tenth
# of PPO's.

# %%
ppo_norm, text_norm = 0.05, 2.0
weight = f.mixture_weight(text_norm, ppo_norm, ratio=0.1)
assert math.isclose(weight * text_norm, 0.1 * ppo_norm)
show(f"measured: c = {weight:.4f}, a tenth of PPO's pull")
show(
    f"constant: c = 27.8, {27.8 * text_norm / ppo_norm:,.0f} times PPO's pull"
)

# %% [markdown]
# ## 6. The average, and why it needs a warm-up
#
# Say a weight goes from 0 to 1 in 120 optimiser steps, as long as a run of
# the toy preset. An average with decay $d$ remembers about $1 / (1 - d)$
# steps: with InstructGPT's 0.992 that is 125, more than the whole run.


# %%
def draft_average(weights, decay, warmup):
    """The average after each update, begun at the first weight."""
    average, history = weights[0], []
    for n, weight in enumerate(weights):
        d = min(decay, (1 + n) / (10 + n)) if warmup else decay
        average = d * average + (1 - d) * weight
        history.append(average)
    return history


weights = [n / 119 for n in range(120)]
averages = {
    "0.95": draft_average(weights, 0.95, False),
    "0.992": draft_average(weights, 0.992, False),
    "0.992 with warm-up": draft_average(weights, 0.992, True),
}
columns = {"the weight": weights, **averages}
points = [
    {"step": n, **{name: column[n] for name, column in columns.items()}}
    for n in range(120)
]
panel = {"one weight and its averages": list(columns)}
plot_curves(points, panel) if launch.in_notebook() else None

# %%
layer = torch.nn.Linear(1, 1, bias=False).requires_grad_(True)
torch.nn.init.zeros_(layer.weight)
ema = EMA(layer, EMAConfig(decay=0.992, warmup=True))
for weight in weights:
    layer.weight.data.fill_(weight)
    ema.update()
with ema.swapped_in():
    library = layer.weight.item()
by_hand = averages["0.992 with warm-up"][-1]
assert math.isclose(library, by_hand, rel_tol=1e-5)
table(average=list(averages), last=[a[-1] for a in averages.values()])

# %% [markdown]
# What you should see: 0.95 follows about twenty steps behind. 0.992 alone is
# still mostly the SFT model when the run ends. The warm-up makes the average
# remember the last tenth of what there has been, however long the run: at
# step 119 its decay is 120/129 = 0.93, and 0.992 takes over at step 1115.
#
# Two more details decide. The average is kept in fp32: in bf16, 0.8 % of a
# small difference is rounded away, and it never moves. And it advances once
# an *optimiser step*, not once an iteration.

# %% [markdown]
# ## 7. Prompts, text and four models
#
# PPO has a split of the prompts of its own. Demonstrations of the first stage
# are the text that is mixed in.

# %%
tokenizer = load_tokenizer(resolve_model(args.actor_model))
prepare_tokenizer(tokenizer)
blend = Blend(args.data, args.seed)
prompts = keep_fitting(tokenizer, blend["ppo"], args.data)
texts = encode_demonstrations(tokenizer, blend["sft"], args.data)
show(len(prompts.rows), "prompts,", len(texts.rows), "texts to mix in")

# %%
num_total_iters = args.ppo.iterations
prompt_train_dataloader = PromptLoader(
    tokenizer,
    prompts.rows,
    batch_size=args.ppo.batch_size,
    iterations=num_total_iters,
    seed=args.seed,
)

# %% [markdown]
# | model | starts as | trained | what it says |
# |---|---|---|---|
# | actor | SFT model | yes | the next token |
# | ref | SFT model | no | how likely the SFT model finds that token |
# | reward model | reward model | no | a score for the whole response |
# | critic | reward model | yes | what rewards are still to come |
#
# To train again from the start, run the cells from here on.

# %%
engine = DeepSpeedRLHFEngine(
    actor_model_name_or_path=args.actor_model_name_or_path,
    critic_model_name_or_path=args.critic_model_name_or_path,
    tokenizer=tokenizer,
    num_total_iters=num_total_iters,
    args=args,
)
trainer = DeepSpeedPPOTrainer(
    engine=engine,
    args=args,
    mixture_rows=as_text(texts.rows),
    faults=Faults(args.faults, run.stage("ppo")),
)

# %% [markdown]
# The actor generates with a decoding loop of our own, over the weights that
# DeepSpeed trains. Can we trust it? Sixteen prompts, greedily, by our loop and
# by transformers' `generate`: a token or a log-probability that differs stops
# the run here, with the numbers.

# %%
few = collate_prompts(tokenizer, prompts.rows[:16], seeds=range(16))
found = self_test(engine.actor, few, args.generation)
distributed.print_main(found)

# %% [markdown]
# Before anything is learnt, we ask for greedy answers to a few held-out
# prompts, to compare with at the end.

# %%
asked = keep_fitting(tokenizer, blend.evaluation("ppo"), args.data).rows[:6]


def answers():
    """The actor's greedy answers, by the weights of now."""
    greedy = dataclasses.replace(args.generation, temperature=0.0)
    batch = collate_prompts(tokenizer, asked, seeds=range(len(asked)))
    rollout = engine.actor.generate(batch.to(engine.device), greedy)
    return [
        decode_response(tokenizer, ids[mask].tolist())
        for ids, mask in zip(
            rollout.response_ids, rollout.response_mask, strict=True
        )
    ]


# %%
before = answers() if launch.in_notebook() else []

# %% [markdown]
# ## 8. What must hold on the first batch
#
# Seven facts follow from the theory before a single update. Each has silently
# ruined somebody's run, so each is checked, in every run.
#
# - **The first ratio is 1.** Else old and new logprobs are two functions:
#   dropout, another temperature, another padding.
# - **KL is 0 while the actor equals the ref.** Else there are two sets of
#   weights, or an adapter that does not start at zero.
# - **Left padding changes nothing.** Else positions count pads, and short
#   prompts are read wrongly.
# - **Generation and training agree.** Else the KV cache or the sampler is
#   wrong, or bf16 is too coarse for this model.
# - **Prompts end as the template says.** Else the actor is asked in another
#   way than it was taught.
# - **EOS is a trained action.** Else stopping is masked away, and responses
#   grow to the limit.
# - **The score sits on the last token.** Else it rewards padding, or the
#   token before the end.

# %%
first_batch = next(iter(prompt_train_dataloader))
out = trainer.generate_experience(first_batch)
trainer.phases.lap()  # the loop starts the clock anew
invariants.report(invariants.check_first_batch(trainer, out))

# %% [markdown]
# ## 9. The loop
#
# This is the loop of DeepSpeed Chat's announcement: `generate_experience`
# samples, scores and shapes (steps 1 to 3 above), `train_rlhf` does the
# epochs and minibatches (steps 4 to 6). The first batch is generated again,
# with the same seeds and so the same responses.
#
# As in notebook 02, a run that is cut short goes on from its last checkpoint,
# to the same last bit: actor, critic, their optimisers, the average, the KL
# coefficient, the random generators, and a rollout that was sampled and not
# yet learnt from. `between` looks for signals in the middle of an iteration,
# which may be minutes long on a cluster.

# %%
log = MetricsLog(run.stage("ppo"), console=["objective/score", "objective/kl"])
samples = run.stage("ppo") / "samples.jsonl"
quiet = None if distributed.is_main_rank() else True  # one bar, in terminals

# %%
checkpoints = Checkpoints(
    run,
    "ppo",
    {"trainer": trainer},
    log=log,
    data=[prompts.rows, texts.rows],
    tokenizer=tokenizer,
)
trainer.faults.roll_back = checkpoints.roll_back
checkpoints.resume(resume)

# %%
bar = tqdm(checkpoints.remaining(prompt_train_dataloader), disable=quiet)
with checkpoints:
    for iteration, prompt_batch in bar:
        out = trainer.generate_experience(prompt_batch)
        checkpoints.between()
        actor_loss, critic_loss = trainer.train_rlhf(out)
        if iteration == args.ppo.critic_warmup_iterations + 1:
            invariants.report(invariants.check_after_first_step(trainer))
        log(iteration, trainer.metrics, bar=bar)
        rollout = trainer.last_rollout
        write_samples(samples, iteration, rollout, out, tokenizer)
        if directory := run.export_due(iteration):
            export(engine.actor.module, tokenizer, directory)
        checkpoints.step(iteration, trainer.metrics)
log.close()

# %% [markdown]
# Two models are exported: the last weights and their average. Both are plain
# directories for `AutoModelForCausalLM`. So are those in `ppo/exports/`, the
# actor every so many iterations (`checkpoint.export_every`).

# %%
if engine.ema is not None:
    with engine.ema.swapped_in():
        export(engine.actor.module, tokenizer, run.model("ema"))
export(engine.actor.module, tokenizer, run.model("final"))
summary = run.finish("ppo", trainer.phases, iterations=trainer.iteration)
checkpoints.finish()

# %% [markdown]
# ## 10. The curves

# %%
history = read_metrics(run.path / "ppo") if distributed.is_main_rank() else []
panels = {
    "score (sd)": ["objective/score", "objective/reward_sum"],
    "KL to SFT (nats a response)": ["objective/kl", "objective/kl_k3"],
    "entropy (nats a token)": ["objective/entropy"],
    "response length (tokens)": ["response/length"],
    "responses that end (share)": ["response/eos_rate"],
    "clipped tokens (share)": ["policy/clipfrac", "value/clipfrac"],
    "mean ratio": ["policy/ratio_mean"],
    "the critic's explained variance": ["value/explained_variance"],
    "mixture loss (nats a token)": ["mixture/loss"],
    "distance of the average": ["ema/distance"],
    "generation (tokens/s)": ["perf/generated_tokens_per_second"],
    "seconds an iteration": [
        "phase/generate/seconds",
        "phase/score/seconds",
        "phase/train/seconds",
    ],
}
if launch.keeps_figures():
    figure = plot_curves(history, panels, xlabel="iteration")
figure if launch.keeps_figures() else None

# %% [markdown]
# What you should see, and what trouble looks like:
#
# - **Score.** Level while the critic alone learns (five iterations of the
#   toy preset), then up, fast at first. *Flat:* too low a
#   rate, or a reward model that knows nothing. *Rising without end while the
#   text gets odd:* over-optimisation, the subject of notebook 07. The reward
#   sum stays a little below. *It falls while the score rises:* the actor pays
#   more KL than it gains; raise `kl_coef`.
# - **KL.** 0 until the actor moves, then up, then level at a few nats.
#   *Tens of nats:* another language. *k1 and k3 far apart for long:* a few
#   outliers decide.
# - **Entropy.** Falls by about half. *Near 0 after a few iterations:* one
#   answer for everything. *Rising:* the learning rate is too high.
# - **Length, and responses that end.** In the toy world the idle talk goes
#   first, then courtesies come. The share is near 1. *The share falls:* EOS is
#   masked, or not rewarded. *Length climbs with the score:* the reward model
#   likes length.
# - **Clipped tokens and ratio.** With one epoch and two minibatches under 2 %
#   of the actor's tokens, and a ratio within half a percent of 1; more with
#   more epochs. *A third clipped:* steps are too large. *Exactly 0 for good:*
#   one minibatch an iteration, or nothing is learnt.
# - **Explained variance.** From far below 0 to just above it here. The critic
#   starts as the reward model, which was never asked about half a response.
#   *Negative for good:* it is worse than a constant. Raise its rate, or give
#   it a longer head start (`ppo.critic_warmup_iterations`).
# - **Mixture loss.** Falls here: it counts whole dialogues, and SFT has
#   learnt their responses alone. *Climbing:* the actor forgets; raise
#   `ppo.mixture.ratio`.
# - **Distance of the average.** Above 0 at once, grows while the actor runs
#   ahead, shrinks as the rate falls. *0 for good:* the average is a copy, or
#   never moves.
#
# One run is one draw: with another `seed` the curves differ in their details.

# %% [markdown]
# ## 11. Before and after
#
# The same prompts, greedily. Read them: a mean hides *how* the score was
# earned.

# %%
if launch.in_notebook():
    for pair, was, now in zip(asked, before, answers(), strict=True):
        show("user:  ", pair.prompt[-1]["content"])
        show("before:", was)
        show("after: ", now, "\n")

# %% [markdown]
# What you should see: the answers stay right and refusals stay refusals.
# What changes is the manner, because that is what the SFT model did at random
# and the reward model pays for. If one opener stands before every answer, you
# have met the reward model's favourite phrase, and seen why entropy falls.
#
# ## 12. Where the time goes

# %%
rates = trainer.phases.tokens_per_second()
for name, share in trainer.phases.shares().items():
    bar = "#" * round(40 * share)
    show(f"{name:9} {share:4.0%} {rates[name]:8,.0f} tokens/s  {bar}")

# %% [markdown]
# What you should see with the toy preset on a CPU: the updates take more
# than half. A training token costs forward and backward passes of actor and
# critic, and those of the mixture loss; a scored one costs four forwards. A
# generated token costs one, but each has to wait for the one before. So with
# long responses and a large model on a GPU the order turns around, and
# generation takes most of the time.
#
# ## Checks

# %%
if distributed.is_main_rank():
    assert is_complete(run.path / "ppo" / "final")
    assert len(history) == trainer.iteration == num_total_iters
    start, end = history[0], history[-1]
    assert 0.5 < end["policy/ratio_mean"] < 2
    if args.ppo.old_logprobs != "rollout":
        assert abs(start["objective/kl"]) < 1e-3
    if engine.ema is not None:
        apart = weight_distance(run.path / "ppo/ema", run.path / "ppo/final")
        assert 0 < apart["relative_l2"] < 0.5
    if preset == "toy" and num_total_iters >= 30:
        assert end["objective/score"] > start["objective/score"]
        assert end["response/eos_rate"] > 0.9

# %% [markdown]
# ## Exercises
#
# [Solutions](solutions/04_ppo.ipynb).
#
# 1. Set `kl_coef` to 0 and train again into another `run_dir`. Compare the
#    curves, then the samples in `ppo/samples.jsonl`. *Hint: which column of
#    step 2 is gone?*
# 2. Set `epochs` to 4. What happens to the clipped share, the ratio and
#    `policy/approx_kl`? *Hint: only the first minibatch has ratio 1.*
# 3. In step 3, set `lam` to 0 and to 1. With 1 and `gamma` 1, what is the
#    return of each token? *Hint: the values in between cancel.*
# 4. In step 2, move the score from the EOS to the token before it. What is
#    the advantage of the EOS now, and what will the actor learn about
#    stopping?
# 5. Turn `kl_kind` to `adaptive`. Which metric shows the controller at work,
#    and how long does it need? *Hint: `horizon` counts responses.*
#
# ## On a cluster
#
#     deepspeed --num_gpus 8 notebooks/04_ppo.py --preset cluster \
#         --zero_stage 3 --generation_tp 2
#     torchrun --nproc_per_node 8 notebooks/04_ppo.py --preset cluster
#
# ## What to read next
#
# Notebook 05 compares the models of this run, side by side and in numbers.
# Notebook 07 drives the score too far on purpose.
# `docs/metrics.md` explains every key that was logged. Papers: Ziegler et al.
# 2019 and Stiennon et al. 2020 (where this recipe comes from), Ouyang et al.
# 2022 (InstructGPT), Huang et al. 2024 (the details that decide).
