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
# # 07 Over-optimisation
#
# PPO makes the reward model happy. Whether that makes *people* happy, an
# ordinary run cannot tell. The toy world has a gold judge that knows what
# every response is truly worth, so here you can watch the two part company:
# you train a weak reward model on purpose, let PPO climb it with and without
# a KL penalty, and see what it says at the top.
#
# | preset | hardware | minutes | peak memory |
# |---|---|---|---|
# | toy | two CPU cores | 1.9 | 0.9 GiB |
#
# The notebook uses the SFT model of `run_dir`, or trains a small one itself.
# It needs the gold judge, so it runs in the toy world alone.

# %% tags=["parameters"]
run_dir: str = "runs/notebooks"  # its SFT model is used if there is one
seed: int | None = None  # decides data order, sampling and initialisation
pairs: int = 250  # all that the weak reward model learns from
pair_epochs: int = 4  # passes over them
iterations: int = 60  # of each of the two PPO runs
kl_coef: float | None = None  # of the run with a penalty; None: the preset's
actor_learning_rate: float = 1.5e-3  # 2.5 times the preset's
mixture: str = "none"  # none, coef or grad_norm_ratio (the preset's)
evaluate_every: int = 10  # iterations between two looks at the gold score
prompts: int = 128  # held-out prompts a look
samples: int = 16  # responses a prompt that best-of-n chooses from
demonstrations: int = 1500  # for an SFT model, where run_dir has none
split: str = "test"  # held-out prompts; choose settings on validation

# %%
from rlhf_kit import launch

launch.read_flags(globals())

# %%
import dataclasses
import json
from itertools import combinations
from math import comb, exp, log

import numpy as np
import torch
from rlhf_kit import (
    DeepSpeedPPOTrainer,
    DeepSpeedRLHFEngine,
    distributed,
    toy_world,
)

# %%
from rlhf_kit.blending import Blend, length_bucketed_batches
from rlhf_kit.checkpoint import export, is_complete
from rlhf_kit.config import override, require
from rlhf_kit.distributed import derive_seed, print_main
from rlhf_kit.evaluate import (
    Actor,
    Scorer,
    is_toy_world,
    prompt_batches,
    toy_world_data,
)
from rlhf_kit.hybrid_engine.training import TrainingEngine, start_deepspeed
from rlhf_kit.measure import evaluate_actor, evaluate_reward_model
from rlhf_kit.metrics import MetricsLog, read_metrics
from rlhf_kit.models import (
    ValueModel,
    load_causal_lm,
    load_scorer,
    resolve_model,
    save_normalisation,
)

# %%
from rlhf_kit.plots import (
    plot_bands,
    plot_curves,
    plot_frontier,
    plot_overoptimisation,
)
from rlhf_kit.reward import RewardTrainer
from rlhf_kit.reward import prompt_batches as pair_batches
from rlhf_kit.rollout import PromptLoader
from rlhf_kit.run_directory import RunDirectory
from rlhf_kit.sft import SFTTrainer
from rlhf_kit.statistics import bootstrap_interval
from rlhf_kit.tokenization import (
    as_text,
    decode_response,
    encode_demonstrations,
    encode_pairs,
    keep_fitting,
    load_tokenizer,
    prepare_tokenizer,
)
from tqdm.auto import tqdm

# %%
start_deepspeed()
run = RunDirectory.open(
    run_dir,
    preset_name="toy",
    seed=seed,
    ppo__iterations=iterations,
    ppo__critic_warmup_iterations=0,  # both runs move from the start
    ppo__kl__coef=kl_coef,
    ppo__actor_optimizer__learning_rate=actor_learning_rate,
    ppo__actor_optimizer__final_ratio=0.5,
    ppo__mixture__kind=mixture,
    evaluation__prompts=prompts,
)
# The toy preset's micro-batch is a whole minibatch: ranks share it.
share = run.config.ppo.minibatch_size // distributed.world_size()
config = override(
    run.config,
    ppo__micro_batch_size=min(run.config.ppo.micro_batch_size, share),
)
require(
    is_toy_world(config),
    f"{run_dir} has data of its own, and only the toy world has a gold "
    "judge; choose another run_dir",
)
place = run.path / "over_optimisation"
distributed.seed_everything(config.seed)

# %% [markdown]
# ## What goes wrong
#
# *When a measure becomes a target, it ceases to be a good measure*:
# Goodhart's law, in Strathern's words. A reward model is right about the
# responses it has seen the like of. PPO looks for responses with high scores
# wherever they are, and soon the highest scores are *errors*.
#
# Gao, Schulman and Hilton (2023, *Scaling laws for reward model
# overoptimization*) measured this with a large reward model as the judge.
# With the distance $d = \sqrt{KL}$ from the SFT model, the gold score gains
#
# $$R_{bon}(d) = d\,(\alpha - \beta d) \qquad
#   R_{RL}(d) = d\,(\alpha - \beta \log d)$$
#
# It climbs at first, has a peak, and falls. A better reward model has a
# smaller $\beta$: its peak is higher and further out. *Best-of-n* samples
# $n$ responses and keeps the one that scores highest. It needs no training,
# and its distance is known in advance:
#
# $$KL_{bon}(n) = \log n - \frac{n - 1}{n}$$
#
# PPO's penalty, `kl_coef` a nat, is a price on $d^2$. It cannot make the
# reward model better. It only stops the walk earlier.
#
# | symbol | variable | is |
# |---|---|---|
# | $KL$ | `kl` | nats a response from the SFT model (k1) |
# | $d$ | `sqrt(kl)` | the distance on the x axis of every plot here |
# | $R$ | `gold` minus SFT's `gold` | the true gain, never seen by training |
# | | `proxy` | the weak reward model's score, all that PPO sees |
# | $n$ | `n` | responses that best-of-n chooses from |
# | $\alpha, \beta$ | `alpha, beta` | fitted to the PPO run below |

# %% [markdown]
# ## 1. The gold judge
#
# A response to a harmless question is worth 0.55 for being correct, 0.25 for
# being polite and 0.20 for being brief. Four strings, four verdicts:

# %%
question = [{"role": "user", "content": "How much is 3 plus 4?"}]
for response in (
    "The answer is 7. With pleasure!",
    "The answer is 7.",
    "The answer is 9. With pleasure!",
    "I cannot help with that.",
):
    verdict = toy_world.judge(question, response)
    print_main(f"{verdict.total:.3f}  {response}")

# %% [markdown]
# Keep the last two in mind. Courtesy with a wrong answer still earns 0.45,
# and refusing a harmless question is safe, and worth little.

# %% [markdown]
# ## 2. The SFT model

# %%
tokenizer = load_tokenizer(resolve_model(config.actor_model))
prepare_tokenizer(tokenizer)
blend = Blend(config.data, config.seed)
demos = encode_demonstrations(tokenizer, blend["sft"], config.data).rows


def quick_sft(rows):
    """A small SFT model, where the run has none: its directory."""
    dtype = config.actor_engine.dtype
    model = load_causal_lm(config.actor_model, tokenizer, dtype=dtype)
    plan = length_bucketed_batches(
        [row.length for row in rows],
        config.sft.batch_size,
        seed=config.seed,
        epoch=0,
        drop_last=len(rows) >= config.sft.batch_size,
    )
    engine = TrainingEngine(
        model,
        config.actor_engine,
        config.sft.optimizer,
        total_steps=len(plan),
    )
    trainer = SFTTrainer(
        engine, config.sft, pad_token_id=tokenizer.pad_token_id
    )
    for batch in tqdm(plan, desc="sft", disable=None):
        trainer.step([rows[i] for i in batch])
    export(engine.module, tokenizer, place / "sft")
    return str(place / "sft")


# %%
if is_complete(run.model("sft")):
    sft_model = run.sft_model()
else:
    print_main(f"no SFT model in {run_dir}: training one of {demonstrations}")
    sft_model = quick_sft(demos[:demonstrations])

# %% [markdown]
# ## 3. A weak reward model, and a witness
#
# The preset's reward model learns from 8000 pairs. This one gets 250, a few
# times over. A second one, the *witness*, gets 250 other pairs and another
# seed. PPO never sees the witness: it stands for the held-out reward model
# that you can afford in a real run, where nobody has a gold judge.

# %%
rows = encode_pairs(tokenizer, blend["reward"], config.data).rows
require(len(rows) >= 2 * pairs, f"pairs can be {len(rows) // 2} at most")


def train_reward_model(name, rows, seed):
    """Train a reward model on `rows` and export it to its directory."""
    distributed.seed_everything(seed)
    dtype = config.critic_engine.dtype
    scorer = load_scorer(sft_model, tokenizer, dtype=dtype)
    plan = [
        batch
        for epoch in range(pair_epochs)
        for batch in pair_batches(rows, 16, seed=seed, epoch=epoch)
    ]
    trainer = RewardTrainer(
        TrainingEngine(
            ValueModel(scorer),
            config.critic_engine,
            config.reward.optimizer,
            total_steps=len(plan),
        ),
        config.reward,
        pad_token_id=tokenizer.pad_token_id,
    )
    for batch in tqdm(plan, desc=name, disable=None):
        trainer.step([rows[i] for i in batch])
    mean, std = trainer.normalisation(demos[:500])
    save_normalisation(scorer, mean=mean, std=std)
    export(scorer, tokenizer, place / name)
    return Scorer(place / name, config, tokenizer)


# %%
weak = train_reward_model("reward_weak", rows[:pairs], config.seed)
witness = train_reward_model(
    "reward_witness", rows[pairs : 2 * pairs], config.seed + 1
)

# %%
held_out = toy_world_data(config, split)
for name, scorer in (("weak", weak), ("witness", witness)):
    found = evaluate_reward_model(scorer.pairs, held_out.pairs)
    share = found.accuracy
    print_main(
        f"{name:8} right on {share.mean:.3f} [{share.low:.3f}, "
        f"{share.high:.3f}] of {found.pairs} held-out pairs;",
        *(f"{k} {v:.2f}" for k, v in found.accuracy_by_kind.items()),
    )

# %% [markdown]
# As we can see, *weak* is not *bad*: right on 93 % of the pairs, and on
# 98 % of those that differ in correctness. Many would start PPO with it.
# But held-out pairs look like the pairs it was trained on, and PPO's
# responses will soon look like nothing in them.

# %% [markdown]
# ## 4. One way to measure, for everything that follows
#
# Every model answers the same held-out prompts with the same sampling seeds.
# We keep the gold score and its parts, both reward models' scores, the KL
# and the length, and report means with 95 % bootstrap intervals.

# %%
batches = prompt_batches(tokenizer, held_out.prompts)


def answers(generate, temperature=1.0, ref_logprobs=None):
    """One response a held-out prompt, and what everybody thinks of it."""
    rollouts = []

    def keep(batch, generation):
        rollouts.append(generate(batch, generation))
        return rollouts[-1]

    evaluation = evaluate_actor(
        keep,
        batches,
        dataclasses.replace(config.generation, temperature=temperature),
        decode=lambda ids: decode_response(tokenizer, ids),
        score=weak.normalised,
        judge=held_out.judge,
        ref_logprobs=ref_logprobs,
    )
    second = torch.cat([witness.normalised(rollout) for rollout in rollouts])
    return evaluation, float(second.mean())


# %% [markdown]
# ## 5. Best-of-n, the gentle baseline
#
# From N sampled responses a prompt we can compute what best-of-n would earn
# for every n up to N, without sampling again: average the gold score of the
# highest-scoring response over *all* subsets of n. There are many subsets,
# so first the slow way, on four responses.

# %%
proxy_4 = np.array([0.2, 0.9, 0.5, 0.7])
gold_4 = np.array([0.6, 0.3, 0.5, 0.9])


def best_of_n_draft(proxy, gold, n):
    """Mean gold score of the winner, subset by subset."""
    subsets = list(combinations(range(len(proxy)), n))
    winners = [max(subset, key=lambda i: proxy[i]) for subset in subsets]
    return np.mean([gold[i] for i in winners])


for n in (1, 2, 3, 4):
    print_main(f"n = {n}: gold {best_of_n_draft(proxy_4, gold_4, n):.3f}")

# %% [markdown]
# The second response scores highest and is truly the worst, so the gold
# score falls as n grows: over-optimisation in four strings.
#
# Now the fast way. Sort by proxy. The response of rank i (from 0) wins in
# those subsets whose other n - 1 members rank lower: C(i, n - 1) of C(N, n).


# %%
def best_of_n(proxy, gold, n):
    """[P, N] scores of N responses a prompt -> [P] gold of the best of n."""
    ranked = np.take_along_axis(gold, np.argsort(proxy, axis=1), axis=1)
    total = gold.shape[1]
    wins = [comb(i, n - 1) / comb(total, n) for i in range(total)]
    return ranked @ np.array(wins)


for n in (1, 2, 3, 4):
    fast = best_of_n(proxy_4[None], gold_4[None], n)[0]
    assert np.isclose(fast, best_of_n_draft(proxy_4, gold_4, n))

# %% [markdown]
# And its KL. Put the scores' ranks on the line from 0 to 1: the SFT model's
# are uniform, the winner's have density $n u^{n-1}$, whatever the scores
# are. The mean of the log-density under the winner is the KL:


# %%
def best_of_n_kl(n):
    return log(n) - (n - 1) / n


u = np.random.default_rng(0).random((200_000, 16))
for n in (2, 4, 16):
    winner = u[:, :n].max(axis=1)
    simulated = np.mean(log(n) + (n - 1) * np.log(winner))
    print_main(f"n = {n:2}: {best_of_n_kl(n):.3f}, simulated {simulated:.3f}")
    assert abs(simulated - best_of_n_kl(n)) < 0.02

# %% [markdown]
# Now with the SFT model and the weak reward model.

# %%
sft = load_causal_lm(sft_model, tokenizer, dtype=config.actor_engine.dtype)
sft = sft.to(distributed.local_device()).eval()
sft_actor = Actor(sft, tokenizer, config.ppo.micro_batch_size)


def sample_again(turn):
    """`generate` with sampling seeds of its own for each turn."""

    def generate(batch, generation):
        seeds = [derive_seed(turn, s) for s in batch.seeds.tolist()]
        batch = dataclasses.replace(batch, seeds=torch.tensor(seeds))
        return sft_actor.generate(batch, generation)

    return generate


drawn = [
    answers(sample_again(turn))[0]
    for turn in tqdm(range(samples), desc="best-of-n", disable=None)
]
proxy = np.stack([one.proxy for one in drawn], axis=1)
gold = np.stack([one.gold["total"] for one in drawn], axis=1)

# %%
best = []
print_main("  n   KL    proxy  gold")
for n in (n for n in (1, 2, 4, 8, 16, 32) if n <= samples):
    interval = bootstrap_interval(best_of_n(proxy, gold, n))
    best.append(
        {
            "name": f"best of {n}" if n > 1 else "SFT",
            "kl": best_of_n_kl(n),
            "proxy": best_of_n(proxy, proxy, n).mean(),
            "reward": interval.mean,
            "low": interval.low,
            "high": interval.high,
        }
    )
    print_main(
        f"{n:3}  {best[-1]['kl']:.2f}  {best[-1]['proxy']:+.2f}  "
        f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
    )

# %% [markdown]
# As we can see, 16 responses to choose from lift the gold score from
# 0.61 to 0.83 for less than two nats, with the *same* weak reward model and
# no training at all. Each doubling buys less than the one before. Keep that
# last number: it is hard to beat. (With 16 responses a prompt, SFT's 0.61
# is also the better estimate; one response a prompt gives 0.65 below.)

# %% [markdown]
# ## 6. Two PPO runs
#
# Same SFT model, same weak reward model, same prompts, same seed. One pays
# nothing for KL, the other the preset's `kl_coef`. Every few iterations we
# look at the live actor and at the average of its weights, the EMA.
#
# Four settings are less careful than the preset's, in both runs, so that the
# mistake fits into minutes: a higher learning rate, a decay to half of it
# only, no warm-up of the critic, and no mixture loss (exercise 5).


# %%
def look(engine, iteration):
    """A point of the plots: the live actor's numbers, and the EMA's."""

    def ref_logprobs(rollout):
        length = rollout.response_ids.shape[1]
        parts = (rollout.sequences, rollout.attention_mask, length)
        return engine.ref_logprobs(*parts, 1.0)

    engine.actor.eval()
    live, second = answers(engine.actor.generate, 1.0, ref_logprobs)
    with engine.ema.swapped_in():
        ema, _ = answers(engine.actor.generate, 1.0, ref_logprobs)
    point = {
        "iteration": iteration,
        "kl": live.kl.mean(),
        "witness": second,
        "length": live.length.mean(),
        "distinct": len(set(live.responses)) / len(live.responses),
        "ema_kl": ema.kl.mean(),
        "ema_gold": ema.gold["total"].mean(),
        "live": live,
        "ema": ema,
    }
    for name, values in (("gold", live.gold["total"]), ("proxy", live.proxy)):
        interval = bootstrap_interval(values)
        point |= {name: interval.mean}
        point |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
    return point


# %%
texts = as_text(demos)
ppo_rows = keep_fitting(tokenizer, blend["ppo"], config.data).rows


def start(coef):
    """Engine, trainer and prompts of a run against the weak model."""
    args = dataclasses.replace(
        override(config, ppo__kl__coef=coef),
        actor_model=sft_model,
        reward_model=str(place / "reward_weak"),
    )
    engine = DeepSpeedRLHFEngine(
        actor_model_name_or_path=args.actor_model_name_or_path,
        critic_model_name_or_path=args.critic_model_name_or_path,
        tokenizer=tokenizer,
        num_total_iters=args.ppo.iterations,
        args=args,
    )
    trainer = DeepSpeedPPOTrainer(engine=engine, args=args, mixture_rows=texts)
    loader = PromptLoader(
        tokenizer,
        ppo_rows,
        batch_size=args.ppo.batch_size,
        iterations=args.ppo.iterations,
        seed=args.seed,
    )
    return engine, trainer, loader


# %%
def climb(coef):
    """One PPO run: its points, and the greedy responses at its end."""
    engine, trainer, loader = start(coef)
    name = f"kl_{coef:g}"
    shown = [] if launch.in_notebook() else ["objective/score"]
    record = MetricsLog(place / name, console=shown, purge_step=0)
    points = [look(engine, 0)]
    for prompt_batch in tqdm(loader, desc=name, disable=None):
        out = trainer.generate_experience(prompt_batch)
        trainer.train_rlhf(out)
        done = trainer.iteration
        record(done, trainer.metrics)
        if done % evaluate_every == 0 or done == iterations:
            points.append(look(engine, done))
    record.close()
    engine.actor.eval()
    greedy = {"live": answers(engine.actor.generate, 0.0)[0]}
    with engine.ema.swapped_in():
        greedy["ema"] = answers(engine.actor.generate, 0.0)[0]
    return points, greedy


# %%
price = config.ppo.kl.coef
free, free_greedy = climb(0.0)
paid, paid_greedy = climb(price)
sft_greedy = answers(sft_actor.generate, 0.0)[0]

# %% [markdown]
# ## 7. The two curves
#
# What you should see without a penalty: the proxy score climbs to the last
# iteration, while the gold score rises, turns, and falls below the start.

# %%
plot_overoptimisation(free, x="iteration")

# %%
plot_overoptimisation(free)

# %% [markdown]
# With the penalty: less proxy, more gold, and a walk that stops near.

# %%
plot_overoptimisation(paid, x="iteration")

# %%
first = free[0]
table = {"SFT": first, "kl_coef 0": free[-1], f"kl_coef {price:g}": paid[-1]}
print_main("                proxy   witness  KL     gold")
for name, point in table.items():
    print_main(
        f"{name:14} {point['proxy']:+6.2f} {point['witness']:+8.2f}"
        f"   {point['kl']:5.1f}  {point['gold']:.3f} "
        f"[{point['gold_low']:.3f}, {point['gold_high']:.3f}]"
    )

# %% [markdown]
# All on one map, against the distance walked. Best-of-n stays close to the
# SFT model and gains a little; PPO goes much further.


# %%
def dot(name, point):
    keys = {"reward": "gold", "low": "gold_low", "high": "gold_high"}
    return {"name": name, "kl": point["kl"]} | {
        key: point[source] for key, source in keys.items()
    }


peak = max(free, key=lambda point: point["gold"])
plot_frontier(
    [
        *(best[i] for i in (0, -1)),
        dot(f"kl_coef 0, iteration {peak['iteration']}", peak),
        dot("kl_coef 0, last", free[-1]),
        dot(f"kl_coef {price:g}, last", paid[-1]),
    ]
)

# %% [markdown]
# Does the law of Gao et al. fit? It is linear in $\alpha$ and $\beta$, so
# least squares finds them. Its peak is where the derivative
# $\alpha - \beta - \beta \log d$ is 0.

# %%
walked = [point for point in free if point["kl"] > 0.01]
d = np.sqrt([point["kl"] for point in walked])
gain = np.array([point["gold"] for point in walked]) - first["gold"]
terms = np.stack([d, -d * np.log(d)], axis=1)
(alpha, beta), *_ = np.linalg.lstsq(terms, gain, rcond=None)
print_main(f"alpha {alpha:.3f}, beta {beta:.3f}")
if beta > 0:
    print_main(f"peak at sqrt(KL) = {exp(alpha / beta - 1):.1f}")
residual = gain - terms @ (alpha, beta)
print_main(f"largest miss {np.abs(residual).max():.3f}")

# %% [markdown]
# Honestly: not well. The law misses by up to 0.12. It describes runs whose
# KL grows steadily, and this one is 10 nats away by iteration 20 and 16 by
# iteration 30, then moves sideways: it passes a model worth 0.63 and ends at
# one worth 0.47, about equally far from the SFT model. Distance is the room
# to do damage in, not the damage.

# %% [markdown]
# ## 8. What the model says
#
# A mean hides it, so read.


# %%
def show(every):
    rows = range(0, len(held_out.prompts), every)
    for row in rows:
        print_main(free[0]["live"].dialogues[row][-1]["content"])
        for name, point in table.items():
            live = point["live"]
            print_main(
                f"  {name:12} proxy {live.proxy[row]:+.1f}  gold "
                f"{live.gold['total'][row]:.2f}  {live.responses[row][:90]}"
            )


if launch.in_notebook():
    show(max(prompts // 6, 1))

# %% [markdown]
# Without a penalty the model refuses almost everything, a greeting and a list
# of vehicles included, and the reward model loves it. Why? Look for refusals
# in its pairs.


# %%
def refuses(text):
    return "cannot help" in text or "will not help" in text


seen = [
    (refuses(pair.chosen), refuses(pair.rejected), pair.prompt)
    for pair in blend["reward"][:pairs]
    if refuses(pair.chosen) or refuses(pair.rejected)
]
won = sum(chosen and not rejected for chosen, rejected, _ in seen)
lost = sum(rejected and not chosen for chosen, rejected, _ in seen)
unneeded = sum(
    toy_world.judge(list(prompt), "I cannot help with that.").correct == 0
    for _, _, prompt in seen
)
print_main(
    f"{won} pairs prefer the refusal, {lost} prefer the other response; "
    f"{unneeded} of {len(seen)} refuse a harmless request"
)

# %% [markdown]
# There it is. Refusals won 10 to 2 (one pair in ten is labelled wrongly), and
# never once was a harmless request refused, so nothing taught the reward
# model what that is worth. Among such pairs it is right. PPO left them.
#
# Which part of the gold score pays for it?

# %%
names = first["live"].gold
print_main(" " * 14, "  ".join(f"{name:>8}" for name in names))
for name, point in table.items():
    parts = point["live"].gold.values()
    print_main(
        f"{name:14} " + "  ".join(f"{part.mean():8.3f}" for part in parts)
    )

# %% [markdown]
# Correctness, from 0.68 to 0.24. Being right takes a different answer to each
# prompt. Brief and harmless can be said to all of them in one sentence.

# %% [markdown]
# ## 9. Does the average save us?
#
# InstructGPT evaluates the EMA of the actor's weights. It lags behind, so it
# over-optimises a little later. Sampled at temperature 1, and greedily:


# %%
def with_interval(values):
    interval = bootstrap_interval(values)
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


print_main("                    gold sampled          gold greedy")
print_main(
    f"{'SFT':18}",
    with_interval(first["live"].gold["total"]),
    with_interval(sft_greedy.gold["total"]),
)
for name, points, greedy in (
    ("kl_coef 0", free, free_greedy),
    (f"kl_coef {price:g}", paid, paid_greedy),
):
    for which, label in (("live", "final"), ("ema", "EMA")):
        print_main(
            f"{name + ', ' + label:18}",
            with_interval(points[-1][which].gold["total"]),
            with_interval(greedy[which].gold["total"]),
        )

# %%
print_main("without a penalty: iteration, gold of the live actor, of the EMA")
for point in free:
    print_main(
        f"{point['iteration']:9} {point['gold']:.3f} {point['ema_gold']:.3f}"
    )

# %% [markdown]
# Hardly. The EMA follows a few iterations behind, so it is a little better
# for as long as the gold score falls: at the end 0.54 where the live actor
# has 0.47, and both far below SFT's. An average smooths noise. It cannot undo
# a trend. With the penalty, final and EMA cannot be told apart.
#
# And greedily even the penalised model gains nothing over SFT. What it gains
# when sampled is certainty: it says its likely answers more often. A weak
# reward model did not teach it better ones.

# %% [markdown]
# ## 10. What would have warned you?
#
# Cover the last column: a real run does not have it. *Distinct* counts
# different responses, as a share of the held-out prompts.

# %%
logged = {row["step"]: row for row in read_metrics(place / "kl_0")}
print_main(
    "iteration  proxy  witness     KL  entropy  length  distinct   gold"
)
for point in free:
    # Training logs entropy from its first iteration on.
    entropy = logged[max(point["iteration"], 1)]["objective/entropy"]
    print_main(
        f"{point['iteration']:9}  {point['proxy']:+.2f}  "
        f"{point['witness']:+7.2f}  {point['kl']:5.1f}  "
        f"{entropy:7.2f}  {point['length']:6.1f}  "
        f"{point['distinct']:8.2f}  {point['gold']:.3f}"
    )

# %%
panels = {
    "KL, nats a response": ["objective/kl"],
    "entropy, nats a token": ["objective/entropy"],
    "length, tokens": ["response/length"],
}
plot_curves(list(logged.values()), panels, xlabel="iteration")

# %% [markdown]
# - The **witness** does not warn here. It rises with the proxy, although it
#   shares no pair with the weak model: its own pairs have the same gap.
#   Eisenstein et al. (2023) found as much for whole ensembles.
# - **KL** says early that the walk is long, 10 nats by iteration 20, but
#   not where it leads.
# - **Entropy** falls towards 0, and **distinct** responses with it, from
#   0.98 to 0.29. These two tell a collapse from progress.
# - **Length** falls and rises again. It is a warning only where length is the
#   error.
# - Five **samples**, read aloud, say it all. `rlhf-kit train` keeps some of
#   every iteration in `ppo/samples.jsonl`. Read them.

# %% [markdown]
# ## 11. The mixture loss and the average, on five seeds
#
# One seed is one draw. `benchmarks/mixture_and_ema.py` repeats such runs on
# five seeds, each with an SFT and a reward model of its own, and this time
# the reward model is a *good* one, of 8,000 pairs. Two settings: `free` has
# this notebook's learning rate and no penalty (20 iterations), `penalty` is
# the toy preset (30). Three mixtures: none, the preset's `grad_norm_ratio`
# of a tenth, and `coef` with InstructGPT's 27.8. Every run keeps two
# averages: `ema` is the preset's, `slow` has InstructGPT's decay of 0.992 and
# no warm-up. The figures are read from the benchmark's result.

# %%
stored = launch.ROOT / "benchmarks" / "results" / "mixture_and_ema.json"
five = json.loads(stored.read_text())
COLUMNS = {
    "gold sampled": "gold",
    "gold greedy": "greedy",
    "correct greedy, worst family": "worst",
    "KL": "KL",
    "loss on pretraining text": "text",
}


def line(name, values, form):
    cells = (format(values[key]["mean"], form) for key in COLUMNS)
    print_main(f"{name:24}", *(f"{cell:>7}" for cell in cells))


print_main(f"{'':24}", *(f"{name:>7}" for name in COLUMNS.values()))
line("SFT", five["before"], ".3f")
for name, models in five["ends"].items():
    line(name, models["live"], ".3f")

# %% [markdown]
# *Worst* is the family of questions with the fewest correct greedy answers,
# *text* the loss on held-out text of the base model's own kind.


# %%
def told(value):
    return f"{value['mean']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"


print_main("with the mixture, less without; mean and 95 % interval")
for name, values in five["mixture"].items():
    print_main(name)
    for key in COLUMNS:
        print_main(f"   {key:30}{told(values[key])}")

# %% [markdown]
# Without a penalty even a good reward model lets the actor forget: greedily
# 0.82 are correct where SFT had 0.97, and of the worst family hardly
# anything is left. Does the mixture loss prevent it? It keeps the text it is
# given (dialogues: about 2 nats a token better, the document below has that
# column), on pretraining text the interval holds 0, and on the gold score
# there is nothing to see. With a penalty five seeds would have shown a
# difference of 0.015. InstructGPT's constant drowns PPO: here it is three
# thousand times the weight that the ratio finds, and nothing is learnt.

# %%
print_main("an average, less the live actor of the same run")
for name, averages in five["average"].items():
    for which, values in averages.items():
        print_main(f"{name}, {which}")
        for key in ("gold sampled", "gold greedy", "KL"):
            print_main(f"   {key:30}{told(values[key])}")

# %%
panels = {}
for setting, title in (("free", "no penalty"), ("penalty", "with penalty")):
    course = five["course"][f"{setting}-none"]
    panels[title] = {
        label: [
            {"x": x, **value}
            for x, value in zip(
                course["iteration"], course[which], strict=True
            )
        ]
        for which, label in (
            ("live", "live actor"),
            ("ema", "ema"),
            ("slow", "slow"),
        )
    }
plot_bands(panels)

# %% [markdown]
# What you should see: with a penalty on the right, live actor and `ema` on
# one line, and `slow` far below, since it still is mostly the SFT model. On
# the left the live actor's band opens as runs go wrong, each in its own way;
# `slow` arrives at the same gold score from below, with a narrow band and a
# KL near 0. Its greedy answers are right 16 points more often.
#
# So the preset's average is worth nothing that can be measured here, and the
# slow one is a brake: good where the run should have been stopped, costly
# where it should not. The penalty beats both.

# %%
for part, value in five["cost"]["share"].items():
    print_main(f"{part:8} {told(value)} of an iteration with neither")
for part, count in five["cost"]["bytes"].items():
    print_main(f"{part:26} {count / 1e6:6.1f} MB")

# %% [markdown]
# The mixture's row of text for every four of PPO costs a twelfth of an
# iteration, the average next to nothing but its copy of the weights. All
# tables: [docs/mixture-and-ema.md](../docs/mixture-and-ema.md).
#
# ## 12. Checks
#
# The claims of this notebook, as asserts: means of the same prompts, and
# intervals that do not touch. A short run shows too little, so they hold for
# 60 iterations or more.

# %%
last, held_back = free[-1], paid[-1]
assert best_of_n_kl(1) == 0 and abs(first["kl"]) < 0.01
assert np.isclose(first["ema_gold"], first["gold"])
if iterations >= 60 and prompts >= 128:
    greedy = bootstrap_interval(free_greedy["live"].gold["total"])
    before = bootstrap_interval(sft_greedy.gold["total"])
    right = [p["live"].gold["correct"].mean() for p in (first, last)]
    assert last["proxy_low"] > first["proxy_high"], "the proxy score rose"
    assert last["gold"] < peak["gold"] - 0.1, "the gold score fell"
    assert greedy.high < before.low, "greedily, below the SFT model"
    assert right[1] < right[0] - 0.2, "as correctness was given up"
    assert held_back["gold_low"] > last["gold_high"], "a penalty helps"
    assert held_back["kl"] < last["kl"] / 2, "by stopping the walk earlier"
    print_main("over-optimised, and shown to be")
else:
    print_main("too short a run to show over-optimisation")

# %% [markdown]
# ## Exercises
#
# [Solutions](solutions/07_over_optimisation.ipynb).
#
# 1. Double `pairs`: 500, 1000, 2000. Does the gold score stop falling without
#    a penalty? (Hint: watch the reward model's accuracy on politeness. If it
#    is right and the score falls all the same, what else is wrong?)
# 2. Find the smallest `kl_coef` that ends above the SFT model. Choose it with
#    `--split validation`, report it with `--split test`. (Hint: halve it,
#    start from the preset's.)
# 3. Score with the *smaller* of the weak model's and the witness's score, a
#    two-model ensemble (Coste et al. 2024). Does the turn come later?
#    (Hint: a subclass of the engine with its own `scores`; both are raw
#    scores, so normalise each first.)
# 4. Stop at the peak without looking at the gold score: write a rule from
#    the table of section 10, and test it with three other values of `seed`.
# 5. Put the preset's settings back: `--mixture grad_norm_ratio
#    --actor_learning_rate 6e-4`. How much of the fall is left without a
#    penalty? (Hint: first one, then both. Read exercise 1 again.)
#
# ## On real models
#
# There is no judge to ask, so Gao et al. made one: a large reward model
# labels the pairs and plays gold, a small one trained on those labels is the
# proxy. The curves of section 10 need no judge at all, and any PPO run of
# this kit logs them. This notebook itself runs on several ranks, the toy
# world being what it is:
#
# ```
# deepspeed --num_gpus 2 notebooks/07_over_optimisation.py --iterations 120
# torchrun --nproc_per_node 2 notebooks/07_over_optimisation.py
# ```
#
# ## Honest limits
#
# Sections 1 to 10: one seed, one weak reward model, 128 prompts, and settings
# chosen (on the validation split) because they show the effect. The numbers
# in the text are from one thread on 2026-11-26 with the SFT model of notebook
# 02; another thread count rounds differently, and PPO amplifies that: on two
# cores one run ended at 0.34, and another at 0.25, there 27 nats away and on
# a path that the law of Gao et al. fits to within 0.07.
#
# Another seed is another blind spot. With `--seed 2` and a SFT model of 1500
# demonstrations, PPO without a penalty turned polite and wrong instead:
# correctness fell from 0.70 to 0.38 and politeness rose to 1.00. The gold
# score went from 0.66 over 0.77 to 0.65, greedily from 0.81 to 0.66. There
# distinct responses stayed at 0.83, and it was the witness that warned: it
# stood still from iteration 20 on, at half the proxy. So no single sign is
# enough. The penalty helped there too, 0.82 against 0.65. The asserts above
# were loosened to what both seeds show.
#
# The judge is a program, and the reward model's blind spot could be looked
# up. With people, neither holds.
#
# ## What to read next
#
# - Gao, Schulman, Hilton 2023, *Scaling laws for reward model
#   overoptimization*: the laws above, and what reward model size buys.
# - Coste et al. 2024, *Reward model ensembles help mitigate
#   overoptimization*; Eisenstein et al. 2023, *Helping or herding?*, on why
#   an ensemble's members share their errors.
# - Skalse et al. 2022, *Defining and characterizing reward hacking*.
# - Ouyang et al. 2022 (InstructGPT), appendix C.4, for the KL penalty, the
#   mixture loss and the EMA in one run.
# - Notebook 04 for PPO itself, notebook 05 to talk to the models.
