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
# # 04 PPO: solutions
#
# To the exercises of [notebook 04](../04_ppo.ipynb). Try them first. The runs
# here are short and small, so curves are ragged, and their learning rate is
# the one of notebook 07, 2.5 times the preset's, so that a few iterations
# show something.

# %% tags=["parameters"]
run_dir: str = "runs/notebooks"  # its SFT and reward model are used
iterations: int = 15  # of each PPO run
batch_size: int = 32  # prompts an iteration

# %%
from rlhf_kit import launch

launch.read_flags(globals())

# %%
import torch
from rlhf_kit import DeepSpeedPPOTrainer, DeepSpeedRLHFEngine
from rlhf_kit import functional as f
from rlhf_kit.blending import Blend
from rlhf_kit.config import override
from rlhf_kit.hybrid_engine.training import start_deepspeed
from rlhf_kit.models import resolve_model
from rlhf_kit.plots import plot_curves
from rlhf_kit.rollout import PromptLoader
from rlhf_kit.run_directory import RunDirectory
from rlhf_kit.tokenization import (
    decode_response,
    keep_fitting,
    load_tokenizer,
    prepare_tokenizer,
)

start_deepspeed()
run = RunDirectory.open(
    run_dir,
    preset_name="toy",
    ppo__iterations=iterations,
    ppo__batch_size=batch_size,
    ppo__minibatch_size=batch_size // 2,
    ppo__micro_batch_size=batch_size // 2,
    ppo__critic_warmup_iterations=0,
    ppo__actor_optimizer__learning_rate=1.5e-3,
    ppo__actor_optimizer__final_ratio=0.5,
    ppo__mixture__kind="none",
)
args = run.args()
tokenizer = load_tokenizer(resolve_model(args.actor_model))
prepare_tokenizer(tokenizer)
blend = Blend(args.data, args.seed)
prompts = keep_fitting(tokenizer, blend["ppo"][:1000], args.data).rows


# %%
def train(**changes):
    """What each iteration logged, and the last responses."""
    mine = override(args, **changes)
    engine = DeepSpeedRLHFEngine(
        actor_model_name_or_path=mine.actor_model_name_or_path,
        critic_model_name_or_path=mine.critic_model_name_or_path,
        tokenizer=tokenizer,
        num_total_iters=iterations,
        args=mine,
    )
    trainer = DeepSpeedPPOTrainer(engine=engine, args=mine)
    loader = PromptLoader(
        tokenizer,
        prompts,
        batch_size=batch_size,
        iterations=iterations,
        seed=mine.seed,
    )
    history = []
    for prompt_batch in loader:
        out = trainer.generate_experience(prompt_batch)
        trainer.train_rlhf(out)
        history.append({"step": trainer.iteration, **trainer.metrics})
    rollout = trainer.last_rollout
    responses = [
        decode_response(tokenizer, ids[mask].tolist())
        for ids, mask in zip(
            rollout.response_ids, rollout.response_mask, strict=True
        )
    ]
    return history, responses


def together(runs, key):
    """One metric of several runs, as points of one plot."""
    steps = zip(*runs.values(), strict=True)
    return [
        {"step": rows[0]["step"]}
        | {name: row[key] for name, row in zip(runs, rows, strict=True)}
        for rows in steps
    ]


# %% [markdown]
# ## 1. Without a penalty
#
# The column that is gone in step 2 of the notebook is the toll: with
# `kl_coef` 0 every token's reward is 0 but the last one's.

# %%
plain, plain_says = train()
free, free_says = train(ppo__kl__coef=0.0)
runs = {f"kl_coef {args.ppo.kl.coef:g}": plain, "kl_coef 0": free}
names = list(runs)
points = together(runs, "objective/kl")
scores = together(runs, "objective/score")
for point, score in zip(points, scores, strict=True):
    point |= {f"{name}, score": score[name] for name in names}
panels = {
    "KL to SFT (nats)": names,
    "score (sd)": [f"{name}, score" for name in names],
}
plot_curves(points, panels, xlabel="iteration")

# %%
for name, said in zip(names, (plain_says, free_says), strict=True):
    print(name)
    for text in said[:4]:
        print("   ", text[:70])

# %% [markdown]
# Without the toll the KL goes three times as far, and buys nothing: at this
# rate the actor stumbles rather than climbs, as its sentences show. The toll
# keeps it on its feet. That a *higher* score may be worth less as well is
# another matter, for the gold judge of notebook 07.

# %%
if iterations >= 15:
    assert free[-1]["objective/kl"] > plain[-1]["objective/kl"]

# %% [markdown]
# ## 2. Four epochs
#
# `max_approx_kl` would leave the epochs early; it is off here, to see all.

# %%
often, _ = train(ppo__epochs=4, ppo__max_approx_kl=0.0)
print(f"{'mean over all iterations':28}{'1 epoch':>10}{'4 epochs':>10}")
for key in ("policy/clipfrac", "policy/approx_kl", "policy/ratio_mean"):
    one, four = (
        sum(row[key] for row in h) / iterations for h in (plain, often)
    )
    print(f"{key:28}{one:10.4f}{four:10.4f}")
    if key != "policy/ratio_mean":
        assert four > one

# %% [markdown]
# With one epoch and two minibatches, half of all tokens have a ratio of
# exactly 1. With four epochs seven eighths were seen by an actor that has
# moved since, and more of them are beyond the clip. They cost as much to
# compute and teach nothing. What was saved is sampling, which on a CPU with
# short responses is not what takes the time.
#
# ## 3. $\lambda$ of 0 and of 1
#
# The second response of the notebook's step 3 again.

# %%
words = "Gladly ! It eats moss EOS".split()
rewards = torch.tensor([[-0.10, -0.02, 0.0, 0.01, -0.01, 1.2]])
values = torch.tensor([[0.6, 0.7, 0.7, 0.8, 0.9, 1.0]])
mask = torch.ones(1, 6, dtype=torch.bool)
found = {}
for lam in (0.0, 0.95, 1.0):
    advantages, returns = f.gae(rewards, values, mask, gamma=1.0, lam=lam)
    found[lam] = returns[0]
    cells = zip(words, advantages[0].tolist(), strict=True)
    print(f"lam {lam:4}:", *(f"{word} {a:+.2f}" for word, a in cells))
later = rewards[0].flip(0).cumsum(0).flip(0)
torch.testing.assert_close(found[1.0], later)
print("returns at 1:", [f"{x:.2f}" for x in found[1.0].tolist()])

# %% [markdown]
# With 1 and `gamma` 1 a token's return is the sum of the rewards from it on:
# the score, less the tolls still to come. The values cancel. With 0 a token
# knows the next surprise alone: only the EOS hears of the score, and "Gladly"
# gets 0, since the critic's hopes rise by as much as its toll.
#
# ## 4. The score one token too early
#
# Codes that pad with the EOS and mask padding by its id do this.

# %%
wrong = rewards.clone()
wrong[0, 4], wrong[0, 5] = rewards[0, 4] + rewards[0, 5], 0.0
for name, r in (("on the EOS", rewards), ("before it", wrong)):
    advantages, _ = f.gae(r, values, mask, gamma=1.0, lam=0.95)
    cells = zip(words, advantages[0].tolist(), strict=True)
    print(f"{name:11}", *(f"{word} {a:+.2f}" for word, a in cells))
    last = float(advantages[0, -1])
assert last == -1.0

# %% [markdown]
# The critic expects 1.0 of the EOS, and it earns 0: its advantage is -1.
# "Moss" takes the praise. So the actor learns that stopping is a bad idea,
# `response/eos_rate` falls, and responses grow until the limit cuts them.
# Where the EOS is masked as well, it is not even told.
#
# ## 5. The adaptive controller
#
# `objective/kl_coef` shows it. Each iteration multiplies the coefficient by
# $1 + \text{clip}(KL / target - 1, \pm 0.2) \cdot n / horizon$ for $n$
# responses. With the default horizon of 10,000 that is at most 0.13 % an
# iteration of 64, so doubling takes over five hundred iterations. A short
# horizon makes it visible:

# %%
steered, _ = train(
    ppo__kl__kind="adaptive", ppo__kl__target=1.0, ppo__kl__horizon=300
)
points = [
    {
        "step": row["step"],
        "KL": row["objective/kl"],
        "kl_coef": row["objective/kl_coef"],
    }
    for row in steered
]
panels = {"KL (nats)": ["KL"], "kl_coef": ["kl_coef"]}
plot_curves(points, panels, xlabel="iteration")

# %%
coef, n = args.ppo.kl.coef, 0
while coef < 2 * args.ppo.kl.coef:
    coef = f.next_kl_coef(coef, kl=60.0, target=6.0, horizon=10_000, n=64)
    n += 1
print(f"doubled after {n} iterations with a KL ten times the target")
assert 500 < n < 600
assert steered[1]["objective/kl_coef"] < steered[0]["objective/kl_coef"]

# %% [markdown]
# It falls while the KL is below its target and rises once it is above. The
# controller answers a *level* of KL, slowly: it is made for runs of thousands
# of iterations, and cannot catch a jump.
