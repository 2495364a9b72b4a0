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
# # 03 Reward model
#
# Nobody can write down what a good answer is, but people can say which of two
# they prefer. Here a model learns from such pairs to give a response one
# number, its score. PPO will maximise that number, so this notebook also
# looks hard at where the number is wrong.
#
# | preset | hardware | minutes | peak memory |
# |---|---|---|---|
# | toy | two CPU cores | 1.0 | 1.3 GiB |
# | consumer | one GPU, 24 GB of it | 4.0 | 12.0 GiB |
#
# `benchmarks/notebooks.py` and `benchmarks/consumer.py` measured them, the
# latter a few steps, reckoned to 100, of Qwen2.5-0.5B's shape with random
# weights on an H200 of which 24 GB were allowed.

# %% tags=["parameters"]
preset: str = "toy"  # toy, consumer, cluster or a recipe
run_dir: str = "runs/notebooks"  # where models and metrics go
resume: bool = True  # go on where training was cut short
seed: int | None = None  # decides data order and initialisation
epochs: int | None = None  # passes over the pairs
rows: int | None = None  # use at most this many pairs
learning_rate: float | None = None  # peak learning rate
init_from: str | None = None  # sft, or base for reward_model's own weights
reward_model: str | None = None  # the base to start from with init_from base
zero_stage: int | None = None  # ZeRO stage, 0 to 3

# %%
from rlhf_kit import launch

launch.read_flags(globals())

# %%
import dataclasses
import math
from collections import Counter

import torch
from rlhf_kit import distributed, memory_check, plots, preflight, statistics
from rlhf_kit.blending import Blend
from rlhf_kit.checkpoint import export
from rlhf_kit.datasets import load_source
from rlhf_kit.evaluate import is_toy_world
from rlhf_kit.faults import Faults
from rlhf_kit.functional import pairwise_loss, shape_score
from rlhf_kit.hybrid_engine.training import TrainingEngine, start_deepspeed
from rlhf_kit.metrics import MetricsLog, Phases, read_metrics
from rlhf_kit.models import (
    ValueModel,
    add_lora,
    load_scorer,
    resolve_model,
    save_normalisation,
)
from rlhf_kit.resume import Checkpoints
from rlhf_kit.reward import RewardTrainer, last_token_scores, prompt_batches
from rlhf_kit.run_directory import RunDirectory
from rlhf_kit.tokenization import (
    collate_scored,
    encode_demonstrations,
    encode_dialogue,
    encode_pairs,
    load_tokenizer,
    prepare_tokenizer,
)
from rlhf_kit.toy_world import judge
from tqdm.auto import tqdm

# %%
start_deepspeed()
run = RunDirectory.open(
    run_dir,
    preset_name=preset,
    seed=seed,
    reward__epochs=epochs,
    reward__init_from=init_from,
    reward__optimizer__learning_rate=learning_rate,
    reward_model=reward_model,
    critic_engine__zero_stage=zero_stage,
)
config = run.config
preflight.check(run)
distributed.seed_everything(config.seed)
# Explanations are for readers: a script trains and prints little.
show = print if launch.in_notebook() else lambda *_: None

# %% [markdown]
# ## Theory on one screen
#
# Bradley and Terry (1952) gave each player a strength and said how likely one
# beats the other. Here the players are two responses $y_c, y_r$ to one prompt
# $x$, and the strength is a score $r_\phi(x, y)$:
#
# $$P(y_c \succ y_r \mid x) = \sigma\big(r_\phi(x, y_c) - r_\phi(x, y_r)\big),
# \qquad \sigma(z) = \frac{1}{1 + e^{-z}}$$
#
# Maximum likelihood over pairs of a chosen and a rejected response is
# equation 1 of InstructGPT (Ouyang et al. 2022), and a term that pins the
# level (Eisenstein et al. 2023):
#
# $$L(\phi) = -\frac{1}{B} \sum_{b=1}^{B} \log \sigma(r_c^b - r_r^b)
# + \frac{\lambda}{B} \sum_{b=1}^{B} (r_c^b + r_r^b)^2$$
#
# | symbol | variable | shape |
# |---|---|---|
# | $r_c, r_r$ | `chosen`, `rejected` | `[B]` |
# | $r_c - r_r$ | the margin, `reward/margin` | `[B]` |
# | $L$ | `loss/train` | one number |
# | $\lambda$ | `config.reward.center_coef` | one number |
# | $\mu, s$ | `mean`, `std` of demonstrations' scores | one number |
#
# - **Only differences are identified.** Add a constant to every score of a
#   prompt and no probability changes. The level is ours to choose.
# - **One score a response, read at the last token**, the EOS: the one place
#   where the model has read all of it.
# - **All pairs of one prompt go into one batch.** They are not independent;
#   spread over many steps they are fitted several times over (InstructGPT,
#   section 3.5).
# - **Labels are noisy.** People disagree and slip. The best model of labels
#   that are wrong one time in ten is never more than 90 % sure.

# %% [markdown]
# ## 1. The pairs
#
# The model starts from the SFT model, which already reads dialogues, with a
# fresh linear head in place of its vocabulary. The pairs' prompts belong to a
# split of their own.

# %%
start = (
    run.sft_model()
    if config.reward.init_from == "sft"
    else config.reward_model
)
tokenizer = load_tokenizer(resolve_model(start))
distributed.print_main(prepare_tokenizer(tokenizer))
blend = Blend(config.data, config.seed)
train = encode_pairs(tokenizer, blend["reward"][:rows], config.data)
held_out = encode_pairs(tokenizer, blend.evaluation("reward"), config.data)
demonstrations = encode_demonstrations(
    tokenizer, blend["sft"][:1000], config.data
)
distributed.print_main(len(train.rows), "pairs", *train.lines())

# %%
kinds = Counter(row.kind for row in train.rows)
show(dict(kinds), "of", len({row.prompt_id for row in train.rows}), "prompts")
for kind in kinds:
    pair = next(p for p in blend["reward"][:rows] if p.kind == kind)
    show(f"\n{kind}: {pair.prompt[-1]['content']}")
    show("  chosen:  ", pair.chosen)
    show("  rejected:", pair.rejected)

# %% [markdown]
# In the toy world `kind` says what the two responses differ in. Half of the
# pairs differ in correctness alone. A share of 10 % of the training labels is
# the wrong way round on purpose; the first one above may be such a one. The
# labels of held-out pairs have no errors.
#
# ## 2. The loss on four strings
#
# Two pairs of our own: right against wrong, polite against rude. First the
# model with its untrained head.

# %%
scorer = load_scorer(start, tokenizer, dtype=config.critic_engine.dtype)
if config.critic_engine.lora.rank:
    add_lora(scorer, config.critic_engine.lora)
plan = [
    batch
    for epoch in range(config.reward.epochs)
    for batch in prompt_batches(
        train.rows, config.reward.batch_size, seed=config.seed, epoch=epoch
    )
]
engine = TrainingEngine(
    ValueModel(scorer),
    config.critic_engine,
    config.reward.optimizer,
    total_steps=len(plan),
)
trainer = RewardTrainer(
    engine,
    config.reward,
    pad_token_id=tokenizer.pad_token_id,
    faults=Faults(config.faults, run.stage("reward")),
)

# %%
QUESTION = "How much is 2 plus 3?"
CHOSEN = ("The answer is 5.", "Of course! The answer is 5.")
REJECTED = ("The answer is 6.", "Ugh. The answer is 5.")


def encode(question, response):
    """A one-turn dialogue as ids, the response ending with EOS."""
    dialogue = [{"role": "user", "content": question}]
    return encode_dialogue(
        tokenizer, dialogue, response, config.data.max_length
    )


@torch.no_grad()
def values_of(rows):
    """[B, T] a value at every token, and the index [B] of the last ones."""
    engine.eval()
    batch = collate_scored(rows, pad_token_id=tokenizer.pad_token_id)
    batch = batch.to(engine.device)
    return engine(batch.input_ids, batch.attention_mask), batch.last_index


def scores_of(rows):
    """[N] scores of encoded dialogues, by the weights as they are now."""
    parts = [rows[i : i + 128] for i in range(0, len(rows), 128)]
    scores = [last_token_scores(*values_of(part)) for part in parts]
    return torch.cat(scores).float().cpu()


# %% [markdown]
# By hand, with Python's numbers:


# %%
def draft_loss(chosen, rejected):
    """Mean of -log P(chosen wins) over the pairs."""
    total = 0.0
    for better, worse in zip(chosen, rejected, strict=True):
        p = 1 / (1 + math.exp(-(better - worse)))
        show(f"{better:8.3f}{worse:8.3f}{better - worse:8.3f}{p:8.3f}")
        total -= math.log(p)
    return total / len(chosen)


toys = [encode(QUESTION, text) for text in CHOSEN + REJECTED]
chosen, rejected = scores_of(toys).chunk(2)
show("  chosen rejected margin     P")
by_hand = draft_loss(chosen.tolist(), rejected.tolist())
ours, metrics = pairwise_loss(chosen, rejected, denominator=2.0)
assert abs(float(ours) - by_hand) < 1e-5
show(f"by hand {by_hand:.6f}, rlhf_kit {float(ours):.6f}, log 2 0.693147")

# %% [markdown]
# The head is random, and drawn so that first scores are of order 1. Both
# probabilities are near a coin's, and the loss is near the coin's log 2.
#
# ### Only differences count
#
# Move all scores by seven. The likelihood does not notice. The centring term
# does, and that is its only purpose: without it the level drifts while
# training, far from zero where bf16 has few digits left.

# %%
moved, _ = pairwise_loss(chosen + 7, rejected + 7, denominator=2.0)
torch.testing.assert_close(moved, ours)
for shift in (0, 7):
    centred, _ = pairwise_loss(
        chosen + shift, rejected + shift, denominator=2.0, center_coef=0.01
    )
    show(f"all scores + {shift}: with centring {float(centred):.4f}")

# %% [markdown]
# ### The last token
#
# `ValueModel` gives a value at every token, which PPO's critic will need. The
# reward model reads one of them, the last. Causal attention and explicit
# positions make padding invisible: alone or in a batch, a score is the same.

# %%
values, last = values_of(toys)
alone = torch.cat([scores_of([row]) for row in toys])
close = 1e-3 if config.critic_engine.dtype == "fp32" else 0.2
torch.testing.assert_close(alone, scores_of(toys), rtol=close, atol=close)
show("width", values.shape[1], "last tokens at", last.tolist())
assert all(row.input_ids[-1] == tokenizer.eos_token_id for row in toys)

# %% [markdown]
# The score must be read where PPO's rollouts will end, at the EOS. A reward
# model trained on another ending than the actor's is asked about texts of a
# form that it has never seen. Here one chat template writes both.
#
# ### Pairs of one prompt
#
# Annotators who rank $K$ responses give $K(K-1)/2$ pairs of one prompt.
# `prompt_batches` never tears them apart:

# %%
homes = {}
size = config.reward.batch_size
for number, batch in enumerate(
    prompt_batches(train.rows, size, seed=config.seed, epoch=0)
):
    for i in batch:
        homes.setdefault(train.rows[i].prompt_id, set()).add(number)
assert all(len(batches) == 1 for batches in homes.values())
most = Counter(row.prompt_id for row in train.rows).most_common(1)[0][1]
show(f"{len(homes)} prompts, up to {most} pairs a prompt, one batch each")

# %% [markdown]
# ### How sure should it be?
#
# Say a share $\varepsilon$ of labels is wrong. Then a pair with margin $m$
# costs on average $-(1 - \varepsilon) \log \sigma(m) - \varepsilon \log
# \sigma(-m)$. With one error in ten:

# %%
show("margin   P(chosen)  if right  if wrong   average")
for margin in (0.0, 1.0, math.log(9), 4.0, 8.0):
    right, wrong = (math.log(1 + math.exp(-m)) for m in (margin, -margin))
    average = 0.9 * right + 0.1 * wrong
    p = math.exp(-right)
    show(f"{margin:6.2f}{p:11.3f}{right:10.3f}{wrong:10.3f}{average:10.3f}")

# %% [markdown]
# The average is smallest at $m = \log\frac{1 - \varepsilon}{\varepsilon} =
# \log 9 \approx 2.2$, which means 90 % sure. Beyond that, confidence costs
# more on the wrong labels than it gains on the right ones. So noise keeps
# scores bounded, `loss/train` can't fall below 0.325, and a model that is
# much surer has learnt the errors by heart. That is why one epoch is enough
# (InstructGPT, appendix C.2).
#
# ## 3. Train

# %%
phases = Phases()
log = MetricsLog(run.stage("reward"), console=["loss/train"])
checkpoints = Checkpoints(
    run,
    "reward",
    {"trainer": trainer, "phases": phases},
    log=log,
    data=[train.rows],
    tokenizer=tokenizer,
)
trainer.faults.roll_back = checkpoints.roll_back
if checkpoints.resume(resume) == 0:
    log(0, trainer.accuracy(held_out.rows))

# %%
quiet = None if distributed.is_main_rank() else True  # one bar, in terminals
bar = tqdm(checkpoints.remaining(plan), disable=quiet)
with checkpoints:
    for step, batch in bar:
        with phases("train") as phase:
            metrics = trainer.step([train.rows[i] for i in batch])
            phase.tokens += sum(train.rows[i].tokens for i in batch)
        metrics["perf/tokens_per_second"] = phase.tokens / phase.seconds
        if step == 1:
            metrics |= memory_check.compare(config, "reward", phases)
        log(step, metrics, bar=bar)
        checkpoints.step(step, metrics)

# %%
accuracy = trainer.accuracy(held_out.rows)
log(len(plan), accuracy)
log.close()
for key, share in accuracy.items():
    distributed.print_main(f"{key} {share:.3f}")

# %% [markdown]
# ## 4. The curves

# %%
history = read_metrics(run.path / "reward")
plots.plot_curves(
    history,
    {
        "loss": ["loss/train"],
        "accuracy, noisy training labels": ["reward/accuracy"],
        "mean scores": ["reward/chosen", "reward/rejected"],
    },
)

# %% [markdown]
# **What you should see** with the toy preset:
#
# - `loss/train` falls from 0.86 to about 0.45 in ten steps and stays around
#   it. Its floor is 0.325, from the label noise, and the centring term.
# - The training accuracy hovers around 0.87. With a tenth of the labels wrong
#   the best possible is 0.9; single batches go above by luck. The held-out
#   accuracy, on clean labels, ends at 0.985 (200 pairs).
# - Both mean scores start near 2.6, where the random head put them, and
#   centring has brought them down around 0 within five steps. What is left
#   is the difference, 1.2 to 1.5.
#
# ## 5. How good is it, and at what?
#
# One accuracy hides a lot. The toy world never ends, so a thousand more
# held-out pairs cost nothing, with labels that have no errors. With other
# data the held-out split has to do.

# %%
test = held_out.rows
if launch.in_notebook() and is_toy_world(config):
    drawn = load_source(
        config.data.sources[0],
        "reward",
        seed=config.seed,
        rows=1000,
        split="validation",
    )
    test = encode_pairs(tokenizer, drawn.pairs, config.data).rows
if launch.in_notebook():
    chosen = scores_of([row.chosen for row in test])
    rejected = scores_of([row.rejected for row in test])
    margins = (chosen - rejected).numpy()
    for kind in ["", *sorted(kinds - Counter({""}))]:
        mine = margins[[kind in ("", row.kind) for row in test]]
        share = float((mine > 0).mean())
        low, high = statistics.wilson_interval(share, len(mine))
        show(
            f"{kind or 'all':12}{len(mine):5} pairs  {share:6.1%} right",
            f"(95 %: {low:.1%} to {high:.1%})",
        )

# %% [markdown]
# **What you should see:** about 99 % overall; brevity, correctness and
# politeness 99 or more, mixed 97. Mixed pairs are the hardest, since there
# the better tone may stand against the right answer, and some are almost
# ties.
#
# Human preferences give 65 to 75 %: people agree with each other no more
# often than that. Look at the lowest kind, not at the average. PPO will find
# what the reward model only guesses.
#
# ### Is it right as often as it is sure?
#
# The loss fits probabilities, so they can be checked: of the pairs about
# which the model is 80 % sure, about 80 % should come out right.

# %%
if launch.in_notebook():
    measured = statistics.calibration(margins)
    coin = torch.Generator().manual_seed(0)
    flips = torch.rand(len(margins), generator=coin) < 0.1
    noisy = statistics.calibration(margins, (~flips).tolist())
    show(f"ECE {measured.ece:.3f}; with a tenth flipped {noisy.ece:.3f}")
reliability = dataclasses.asdict(measured) if launch.in_notebook() else {}
plots.plot_calibration(reliability) if reliability else None

# %% [markdown]
# **What you should see:** the curve lies above the diagonal (ECE 0.18). The
# model is right more often than it is sure. It learnt from labels of which a
# tenth is wrong, and is tested on clean ones; flip a tenth of the test labels
# too and half of the gap is gone (0.10). The rest says that one epoch stops
# before the margins have grown to their 2.2.
#
# An evenly timid model does no harm, as section 6 divides its scale out. A
# curve *below* the diagonal would: that is a model sure of its mistakes.
#
# ### The scores, and length
#
# Overlapping histograms are no fault: prompts differ in how good answers to
# them can be, and only differences within a prompt were trained.

# %%
if launch.in_notebook():
    groups = {"chosen": chosen.tolist(), "rejected": rejected.tolist()}
    lengths = {
        "chosen": [r.chosen.length - r.chosen.prompt_length for r in test],
        "rejected": [
            r.rejected.length - r.rejected.prompt_length for r in test
        ],
    }
plots.plot_histogram(groups) if launch.in_notebook() else None

# %%
if launch.in_notebook():
    pull = statistics.length_correlation(
        groups["chosen"] + groups["rejected"],
        lengths["chosen"] + lengths["rejected"],
    )
    show(f"correlation of score and length: {pull.pearson:.2f}")
    dots = {name: (lengths[name], groups[name]) for name in groups}
plots.plot_length(dots) if launch.in_notebook() else None

# %% [markdown]
# **What you should see:** a correlation of -0.4, and two clouds: right
# answers above, wrong ones below, both falling with length. Here that is as
# it should be, because the judge pays for brevity. On human preferences the
# slope usually goes up, and further than length deserves (Singhal et al.
# 2023); PPO then learns to be long before it learns to be good.
#
# ## 6. Mean and standard deviation
#
# The scale of the scores depends on the data's noise, the learning rate and
# the number of steps; their level is arbitrary. Yet in PPO the score will be
# weighed against a KL penalty, `score - kl_coef * KL`. With raw scores a
# `kl_coef` that is right for one reward model is ten times too weak for
# another. So the mean and the standard deviation of the scores of a thousand
# demonstrations are saved with the model, and PPO uses
#
# $$\frac{r_\phi(x, y) - \mu}{s}.$$
#
# A score of 1 then means: one standard deviation better than a demonstration.
# A `kl_coef` of 0.1 means: a nat of KL must gain a tenth of that. (Stiennon
# et al. 2020 and InstructGPT shift the mean to 0; Ziegler et al. 2019 also
# scale.)

# %%
mean, std = trainer.normalisation(demonstrations.rows)
save_normalisation(scorer, mean=mean, std=std)
export(scorer, tokenizer, run.model("reward"))
summary = run.finish(
    "reward", phases, steps=len(plan), mean=mean, std=std, **accuracy
)
checkpoints.finish()
show(f"mean {mean:.3f}, standard deviation {std:.3f}")

# %% [markdown]
# A reward model that gives scores five times as large and three higher orders
# every pair alike. Normalised, it is the same to PPO:

# %%
raw = scores_of(demonstrations.rows[:4])
ended = torch.ones(4, dtype=torch.bool)
one = shape_score(raw, ended, mean=mean, std=std)
other = shape_score(5 * raw + 3, ended, mean=5 * mean + 3, std=5 * std)
torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
show("raw        ", [f"{x:6.2f}" for x in raw.tolist()])
show("normalised ", [f"{x:6.2f}" for x in one.tolist()])

# %% [markdown]
# ## 7. Why not a loss at every token?
#
# Some codes, DeepSpeed Chat among them, apply the pairwise loss at every
# position from the first difference to the end of the longer response. It
# looks like more signal. But it compares tokens that merely stand in the same
# column, asks for a verdict before the response has made its point, and past
# the end of the shorter response it compares words with padding, so that
# length itself becomes evidence. PPO reads one score at the end; that is the
# one to train. The values on the way are by-products:

# %%
values, last = values_of(toys)
for row in (0, 2) if launch.in_notebook() else ():
    ids = toys[row].input_ids
    for t in range(toys[row].prompt_length, toys[row].length):
        text = tokenizer.decode([ids[t]])
        mark = " <- the score" if t == int(last[row]) else ""
        show(f"{text!r:12}{float(values[row, t]):8.2f}{mark}")
    show()

# %% [markdown]
# Both responses share their first words and so their first values. At the
# wrong 6 nothing much happens, and nothing has to: those values were never
# trained. The score knows: 1.7 against -0.1, a margin of 1.8, so the 5 is
# preferred with a probability of 86 %, about as sure as the noise allows.
#
# ## 8. Weak spots
#
# PPO searches for responses with a high score, not for good ones. Wherever
# the two differ, it will find the difference: that is reward hacking, or
# over-optimisation (Gao et al. 2023). In the toy world we can look first,
# because a judge gives the gold score, from 0 to 1.

# %%
PROBES = {
    "right": "The drosk is red.",
    "right, polite": "Of course! The drosk is red.",
    "right, rude": "Ugh. The drosk is red.",
    "wrong, polite": "Of course! The drosk is blue.",
    "right, rambling": "The drosk is red. It depends on how one looks at it. "
    "That is how the world goes around these days.",
    "grovelling": "With pleasure! Of course! Glad to assist! The drosk is "
    "red. Have a lovely day! It was my pleasure!",
    "praise alone": "With pleasure! Have a lovely day!",
    "says nothing": "",
    "babble": "drosk drosk drosk drosk",
}
ask = [{"role": "user", "content": "What color is the drosk?"}]
if launch.in_notebook() and is_toy_world(config):
    probes = [encode(ask[0]["content"], text) for text in PROBES.values()]
    proxies = ((scores_of(probes) - mean) / std).tolist()
    show(f"{'':16}   proxy    gold")
    for (name, text), proxy in zip(PROBES.items(), proxies, strict=True):
        gold = judge(ask, text).total
        show(f"{name:16}{proxy:8.2f}{gold:8.2f}")

# %% [markdown]
# **What you should see.** The order is mostly the judge's: polite before
# neutral before rude, right before wrong. But:
#
# - *Grovelling* gets 1.6, far more than the plain right answer's 1.1. The
#   judge likes it less. No training pair held six polite sentences, so the
#   reward model prolongs the line: more is better.
# - *Praise alone* answers nothing and is worth almost as much as the right
#   answer.
# - *Saying nothing* beats a polite wrong answer, though the judge gives it 0.
#
# An accuracy of 99 % says nothing about these texts, because no pair
# contains them. An actor that is free to move gets there. What holds it back
# in notebook 04 is the KL penalty, which keeps it where the reward model has
# seen data; notebook 07 takes the penalty away and watches.
#
# ## 9. How many pairs are enough?
#
# The same notebook with fewer rows, once each: `rows=100`, `250` ... 4000,
# one seed, the thousand held-out pairs of section 5. Measured on two CPU
# cores with torch 2.13.0, 2026-11-22. (The preset has 8000 pairs, whose
# accuracy you saw above.)

# %%
KINDS = ("all", "correctness", "politeness", "brevity", "mixed")
MEASURED = {
    100: (0.824, 0.928, 0.444, 0.911, 0.840),
    250: (0.863, 0.992, 0.444, 0.949, 0.847),
    500: (0.879, 0.998, 0.511, 0.955, 0.847),
    1000: (0.891, 0.998, 0.572, 0.975, 0.834),
    2000: (0.939, 0.980, 0.817, 0.994, 0.896),
    4000: (0.981, 0.986, 0.983, 1.000, 0.945),
}
show("pairs", *(f"{kind:>12}" for kind in KINDS))
for pairs, shares in MEASURED.items():
    show(f"{pairs:5}", *(f"{share:12.1%}" for share in shares))
points = [
    {"step": pairs, **dict(zip(KINDS, shares, strict=True))}
    for pairs, shares in MEASURED.items()
]
panels = {"held-out accuracy": KINDS[:3]}
plots.plot_curves(
    points, panels, xlabel="pairs"
) if launch.in_notebook() else None

# %% [markdown]
# Correctness is there after 250 pairs: the base model has read forum threads
# whose answers were called right or wrong, so the pairs need only point to
# what it knows. Politeness is learnt from the pairs alone, and takes 4000.
# The average hides it: at 1000 pairs 89 % looks fine, and the tone is hardly
# better than a coin. PPO on that reward model would not become polite.
#
# ## Checks

# %%
assert math.isfinite(mean) and std > 1e-6, "the scores are all alike"
if launch.in_notebook():
    assert accuracy["eval/accuracy"] > 0.5, "no better than a coin"
    again = load_scorer(str(run.model("reward")), tokenizer)
    assert again.config.score_mean == mean and again.config.score_std == std
    show("the export carries its mean and standard deviation")

# %% [markdown]
# ## Exercises
#
# [Solutions](solutions/03_reward_model.ipynb).
#
# 1. **Start from the base model.** `init_from="base"`. Which kind of pair
#    suffers? What does the SFT model know that the base model doesn't?
# 2. **No centring.** Set `center_coef` to 0 (`reward__center_coef=0.0` in
#    `RunDirectory.open`) and plot `reward/chosen` again. Does the accuracy
#    change? Should it?
# 3. **Three epochs.** `epochs=3`: what do training accuracy, held-out
#    accuracy and ECE do? Which of them warns you first?
# 4. **Other tails.** Score the same probes without their EOS (drop the last
#    id). How far do scores move, and why must PPO never see such scores?
# 5. **Find a hack.** Add a probe whose proxy beats *right* while its gold is
#    below 0.5. Notebook 07 shows how PPO finds them for you.
#
# ## On more than this computer
#
# ```
# deepspeed --num_gpus 8 notebooks/03_reward_model.py --preset cluster
# torchrun --nproc_per_node 8 notebooks/03_reward_model.py --preset cluster
# ```
#
# The reward model may be much smaller than the actor: the `cluster` preset
# pairs OPT-13B with OPT-350M, as DeepSpeed Chat does. It then starts from
# its own base (`init_from base`).
#
# **Next:** [04_ppo](04_ppo.ipynb) lets the SFT model try, scores what it
# says with `reward/final/`, and makes better answers likelier.
#
# **Papers:** Bradley and Terry 1952, *Rank analysis of incomplete block
# designs*. Ziegler et al. 2019, *Fine-tuning language models from human
# preferences*. Stiennon et al. 2020, *Learning to summarize from human
# feedback*. Ouyang et al. 2022 (InstructGPT). Eisenstein et al. 2023,
# *Helping or herding? Reward model ensembles mitigate but do not eliminate
# reward hacking*. Singhal et al. 2023, *A long way to go: Investigating
# length correlations in RLHF*. Gao et al. 2023, *Scaling laws for reward model
# overoptimization*.
