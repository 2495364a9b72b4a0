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
# # 07 Over-optimisation: solutions
#
# To the exercises of [notebook 07](../07_over_optimisation.ipynb). Try them
# first. The runs here are shorter than the notebook's and take half as many
# prompts an iteration, so that ten of them fit into minutes.
#
# One run of each kind is one draw, and without a penalty the draws lie far
# apart. So everything was run three times, for 25, 40 (shown) and 60
# iterations, and what is said below holds in all three. On another processor
# the figures differ, too: PPO amplifies what rounds differently.

# %% tags=["parameters"]
run_dir: str = "runs/notebooks"  # its SFT and reward model are used
pairs: int = 250  # of the weak reward model
iterations: int = 40  # of each PPO run
batch_size: int = 32  # prompts an iteration
evaluate_every: int = 10  # iterations between two looks at the gold score
prompts: int = 128  # held-out prompts a look

# %%
from rlhf_kit import launch

launch.read_flags(globals())

# %%
import dataclasses

import numpy as np
import torch
from rlhf_kit import DeepSpeedPPOTrainer, DeepSpeedRLHFEngine, distributed
from rlhf_kit.blending import Blend
from rlhf_kit.checkpoint import export, is_complete
from rlhf_kit.config import override
from rlhf_kit.evaluate import Scorer, prompt_batches, toy_world_data
from rlhf_kit.hybrid_engine.training import TrainingEngine, start_deepspeed
from rlhf_kit.measure import evaluate_actor
from rlhf_kit.models import (
    ValueModel,
    load_scorer,
    resolve_model,
    save_normalisation,
)

# %%
from rlhf_kit.plots import plot_curves
from rlhf_kit.reward import RewardTrainer
from rlhf_kit.reward import prompt_batches as pair_batches
from rlhf_kit.rollout import PromptLoader
from rlhf_kit.run_directory import RunDirectory
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

# %%
start_deepspeed()
run = RunDirectory.open(
    run_dir,
    preset_name="toy",
    ppo__iterations=iterations,
    ppo__critic_warmup_iterations=0,
    ppo__batch_size=batch_size,
    ppo__minibatch_size=batch_size // 2,
    ppo__micro_batch_size=batch_size // 2,
    ppo__actor_optimizer__learning_rate=1.5e-3,
    ppo__actor_optimizer__final_ratio=0.5,
    ppo__mixture__kind="none",
    evaluation__prompts=prompts,
)
config, sft_model = run.config, run.sft_model()
place = run.path / "over_optimisation_solutions"

# %%
tokenizer = load_tokenizer(resolve_model(sft_model))
prepare_tokenizer(tokenizer)
blend = Blend(config.data, config.seed)
demos = encode_demonstrations(tokenizer, blend["sft"][:2000], config.data).rows
reward_rows = encode_pairs(tokenizer, blend["reward"][:2000], config.data).rows
ppo_rows = keep_fitting(tokenizer, blend["ppo"][:1500], config.data).rows
# Settings are chosen on validation; the test split is for reports.
held_out = toy_world_data(config, "validation")
batches = prompt_batches(tokenizer, held_out.prompts)


# %%
def learn_reward(rows, epochs, seed):
    """The directory of a reward model of these pairs."""
    distributed.seed_everything(seed)
    scorer = load_scorer(sft_model, tokenizer, dtype="fp32")
    plan = [
        batch
        for epoch in range(epochs)
        for batch in pair_batches(rows, 16, seed=seed, epoch=epoch)
    ]
    engine = TrainingEngine(
        ValueModel(scorer),
        config.critic_engine,
        config.reward.optimizer,
        total_steps=len(plan),
    )
    pad = tokenizer.pad_token_id
    trainer = RewardTrainer(engine, config.reward, pad_token_id=pad)
    for batch in plan:
        trainer.step([rows[i] for i in batch])
    mean, std = trainer.normalisation(demos[:300])
    save_normalisation(scorer, mean=mean, std=std)
    name = f"{len(rows)}_pairs_seed_{seed}"
    return str(export(scorer, tokenizer, place / name))


# %%
weak = learn_reward(reward_rows[:pairs], 4, config.seed)

# %% [markdown]
# One function walks: PPO against a reward model, with a look at the gold
# score every few iterations.


# %%
def look(engine, iteration):
    """What the held-out prompts show of the actor as it is."""

    def ref_logprobs(rollout):
        length = rollout.response_ids.shape[1]
        parts = (rollout.sequences, rollout.attention_mask, length)
        return engine.ref_logprobs(*parts, 1.0)

    engine.actor.eval()
    found = evaluate_actor(
        engine.actor.generate,
        batches,
        config.generation,
        decode=lambda ids: decode_response(tokenizer, ids),
        judge=held_out.judge,
        ref_logprobs=ref_logprobs,
    )
    interval = bootstrap_interval(found.gold["total"])
    return {
        "step": iteration,
        "gold": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "kl": float(found.kl.mean()),
        "distinct": len(set(found.responses)) / len(found.responses),
    }


# %%
def climb(reward_model, engine_class=DeepSpeedRLHFEngine, **changes):
    """The looks of one PPO run, the first before it."""
    args = dataclasses.replace(
        override(config, **changes),
        actor_model=sft_model,
        reward_model=reward_model,
    )
    engine = engine_class(
        actor_model_name_or_path=args.actor_model_name_or_path,
        critic_model_name_or_path=args.critic_model_name_or_path,
        tokenizer=tokenizer,
        num_total_iters=iterations,
        args=args,
    )
    trainer = DeepSpeedPPOTrainer(
        engine=engine, args=args, mixture_rows=as_text(demos)
    )
    loader = PromptLoader(
        tokenizer,
        ppo_rows,
        batch_size=batch_size,
        iterations=iterations,
        seed=args.seed,
    )
    looks = [look(engine, 0)]
    for prompt_batch in loader:
        trainer.train_rlhf(trainer.generate_experience(prompt_batch))
        if trainer.iteration % evaluate_every == 0:
            looks.append(look(engine, trainer.iteration))
    return looks


def tell(name, looks):
    best, last = max(looks, key=lambda x: x["gold"]), looks[-1]
    print(
        f"{name:24} peak {best['gold']:.3f} at {best['step']:2}, last "
        f"{last['gold']:.3f} [{last['low']:.3f}, {last['high']:.3f}],"
        f" KL {last['kl']:.1f}"
    )


# %%
free = climb(weak, ppo__kl__coef=0.0)
before = free[0]
print(f"SFT: {before['gold']:.3f} [{before['low']:.3f}, {before['high']:.3f}]")
tell(f"kl_coef 0, {pairs} pairs", free)

# %% [markdown]
# ## 1. More pairs
#
# Four times as many, and the run's own reward model, which saw 8,000 with the
# toy preset.

# %%
models = {f"{4 * pairs} pairs": learn_reward(reward_rows[: 4 * pairs], 2, 1)}
if is_complete(run.model("reward")):
    models["the run's own"] = str(run.model("reward"))
more = {f"{pairs} pairs": free}
for name, model in models.items():
    more[name] = climb(model, ppo__kl__coef=0.0)
    tell(name, more[name])

# %%
points = [
    {"step": rows[0]["step"]}
    | {name: row["gold"] for name, row in zip(more, rows, strict=True)}
    for rows in zip(*more.values(), strict=True)
]
plot_curves(points, {"gold score": list(more)}, xlabel="iteration")

# %% [markdown]
# More pairs do not save these runs. Those of 25 and 60 iterations ended, with
# 250, 1,000 and 8,000 pairs, at 0.67, 0.58, 0.49 and at 0.58, 0.32, 0.56:
# there is no order in it. So the reward model's mistakes are not all that is
# wrong. With steps this large and no price on them the actor also loses what
# SFT had taught it, whatever it is rewarded for: with the good model it goes
# 16 to 32 nats away. On five seeds (section 11 of the notebook) the good model
# left 0.82 of the greedy answers correct, where SFT has 0.97.
#
# Gao et al. see $\beta$ shrink as the reward model grows, in runs whose
# optimisation works. Mend that first (exercises 2 and 5), then count pairs.
#
# ## 2. The smallest penalty that works
#
# The preset's and a quarter of it, on the validation split.

# %%
paid = {}
for kl_coef in (0.1, 0.025):
    paid[kl_coef] = climb(weak, ppo__kl__coef=kl_coef)
    tell(f"kl_coef {kl_coef}", paid[kl_coef])
good = [c for c, looks in paid.items() if looks[-1]["low"] > before["high"]]
print("above SFT, intervals apart:", good or "none")

# %% [markdown]
# Both end above the run without. 0.1 walked 4 to 5 nats and ended at 0.68 in
# all three lengths: the penalty makes runs repeatable as well as better. A
# quarter of it ended between 0.62 and 0.68. Whether "above SFT" can be said
# depends on the prompts as much as on the penalty: 128 of them leave an
# interval of 0.05 to either side, and here the two just touch.
#
# Choosing it takes a gold score on a few prompts, which in life is people
# reading answers. What was chosen is then reported once, on the test split.
#
# ## 3. The more sceptical of two
#
# Scores are normalised one by one, and the smaller one counts.

# %%
other_rows = reward_rows[pairs : 2 * pairs]
second = Scorer(
    learn_reward(other_rows, 4, config.seed + 1), config, tokenizer
)


# %%
class SmallerOfTwo(DeepSpeedRLHFEngine):
    """Scores a response by the less convinced of two reward models."""

    def scores(self, rollout, parts, **sizes):
        """[B] raw scores: PPO normalises them with the first one's scale."""
        raw = super().scores(rollout, parts, **sizes)
        first = (raw - self.score_mean) / self.score_std
        smaller = torch.minimum(first, second.normalised(rollout))
        return smaller * self.score_std + self.score_mean


# %%
sceptical = climb(weak, SmallerOfTwo, ppo__kl__coef=0.0)
tell("smaller of two scores", sceptical)

# %% [markdown]
# Not to be relied on: 0.59, 0.55 and, after 60 iterations, 0.24, where the
# single model's runs ended at 0.67, 0.52 and 0.58. A second opinion helps
# where the two err on different responses. Errors that both share, because
# all pairs have the same gap (no harmless request was ever refused), pass
# both. Eisenstein et al. (2023): ensembles mitigate, and do not eliminate.
#
# ## 4. Stop without a gold score
#
# A rule from the table of section 10: stop at the first look at which the
# responses have become alike (distinct below nine tenths of the start's) or
# the walk is long (KL above 8 nats).


# %%
def stop(looks):
    """The look at which the rule stops; the last one where it never does."""
    start = looks[0]["distinct"]
    for one in looks:
        if one["distinct"] < 0.9 * start or one["kl"] > 8:
            return one
    return looks[-1]


# %%
tests = {f"{pairs} pairs (made on it)": free, **more}
del tests[f"{pairs} pairs"]
tests |= {"smaller of two": sceptical}
tests |= {"another seed": climb(weak, ppo__kl__coef=0.0, seed=2)}
print(f"{'':26} stops at  gold  peak   last")
for name, looks in tests.items():
    at = stop(looks)
    peak = max(one["gold"] for one in looks)
    print(
        f"{name:26} {at['step']:8}  {at['gold']:.3f} {peak:.3f}"
        f"  {looks[-1]['gold']:.3f}"
    )

# %% [markdown]
# Where a run goes badly wrong later (0.41, 0.36) the rule saves most of it,
# elsewhere next to nothing, and it never stops much above SFT: these runs
# fall almost from the start. A rule is worth something where it stops before
# the fall *and* lets healthy runs go on. Both of its numbers were made up on
# one run; a run that fails in another way (polite and wrong, all responses
# distinct) passes it. So a rule is a reason to look, not a replacement for
# looking:
# `docs/faults.md` has the kit's own, which warn.
#
# ## 5. The preset's settings back

# %%
back = {
    "mixture": {"ppo__mixture__kind": "grad_norm_ratio"},
    "mixture and rate": {
        "ppo__mixture__kind": "grad_norm_ratio",
        "ppo__actor_optimizer__learning_rate": 6e-4,
    },
}
tell("neither", free)
for name, changes in back.items():
    back[name] = climb(weak, ppo__kl__coef=0.0, **changes)
    tell(name, back[name])

# %% [markdown]
# Here is the answer to exercise 1. At the preset's rate nothing is left of the
# fall: 0.77, 0.79 and 0.76, above every other run on this page, with the same
# weak reward model and no penalty at all. Small steps stay near (a few nats)
# and learn the reward model's true lessons first. Its mistakes are still
# there, and a long enough run finds them.
#
# The mixture loss by itself decides nothing: 0.59, 0.62 and 0.55. Section 11
# of the notebook has it on five seeds, with intervals.

# %%
assert np.isfinite([one["gold"] for one in free]).all()
if iterations >= 40 and prompts >= 128:
    # A second opinion that was never asked would end as the plain run does.
    assert sceptical[-1]["gold"] != free[-1]["gold"]
    assert paid[0.1][-1]["kl"] < free[-1]["kl"]
    assert back["mixture and rate"][-1]["kl"] < free[-1]["kl"]
