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
# # 03 Reward model: solutions
#
# To the exercises of [notebook 03](../03_reward_model.ipynb). Try them first.
# Each reward model here is trained on a thousand pairs, an eighth of the
# preset's.

# %% tags=["parameters"]
run_dir: str = "runs/notebooks"  # its SFT model is used if there is one
rows: int = 1000  # pairs of each model
tests: int = 500  # held-out pairs, with labels that have no errors

# %%
from rlhf_kit import launch

launch.read_flags(globals())

# %%
import torch
from rlhf_kit import distributed, statistics, toy_world
from rlhf_kit.blending import Blend
from rlhf_kit.config import override
from rlhf_kit.datasets import load_source
from rlhf_kit.hybrid_engine.training import TrainingEngine, start_deepspeed
from rlhf_kit.models import ValueModel, load_scorer, resolve_model
from rlhf_kit.plots import plot_curves
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

start_deepspeed()
run = RunDirectory.open(run_dir, preset_name="toy")
config, sft_model = run.config, run.sft_model()
tokenizer = load_tokenizer(resolve_model(sft_model))
prepare_tokenizer(tokenizer)
blend = Blend(config.data, config.seed)
train = encode_pairs(tokenizer, blend["reward"][:rows], config.data).rows
demonstrations = encode_demonstrations(
    tokenizer, blend["sft"][:500], config.data
).rows

# %%
drawn = load_source(
    config.data.sources[0], "reward", rows=tests, split="validation"
)
test = encode_pairs(tokenizer, drawn.pairs, config.data).rows


def learn(start=sft_model, epochs=1, center_coef=0.01):
    """A trained reward model: its trainer and what each step said."""
    args = override(config, reward__center_coef=center_coef).reward
    distributed.seed_everything(config.seed)
    scorer = load_scorer(start, tokenizer, dtype="fp32")
    plan = [
        batch
        for epoch in range(epochs)
        for batch in prompt_batches(
            train, args.batch_size, seed=config.seed, epoch=epoch
        )
    ]
    engine = TrainingEngine(
        ValueModel(scorer),
        config.critic_engine,
        args.optimizer,
        total_steps=len(plan),
    )
    pad = tokenizer.pad_token_id
    trainer = RewardTrainer(engine, args, pad_token_id=pad)
    history = [{"step": 0}]
    for step, batch in enumerate(plan, start=1):
        metrics = trainer.step([train[i] for i in batch])
        history.append({"step": step, **metrics})
    return trainer, history


# %%
@torch.no_grad()
def scores(trainer, rows):
    """[N] scores of encoded dialogues."""
    trainer.engine.eval()
    found = []
    for start in range(0, len(rows), 128):
        batch = collate_scored(
            rows[start : start + 128], pad_token_id=tokenizer.pad_token_id
        )
        values = trainer.engine(batch.input_ids, batch.attention_mask)
        found.append(last_token_scores(values, batch.last_index))
    return torch.cat(found).float()


def margins(trainer, pairs):
    """[N] chosen minus rejected."""
    return scores(trainer, [p.chosen for p in pairs]) - scores(
        trainer, [p.rejected for p in pairs]
    )


KINDS = ("correctness", "politeness", "brevity", "mixed")


def accuracies(name, trainer):
    found = margins(trainer, test) > 0
    shares = {"all": float(found.float().mean())}
    for kind in KINDS:
        mine = torch.tensor([pair.kind == kind for pair in test])
        shares[kind] = float(found[mine].float().mean())
    values = "".join(f"{share:13.1%}" for share in shares.values())
    print(f"{name:14}{values}")
    return shares


# %% [markdown]
# ## 1. Start from the base model

# %%
print(f"{'start':14}" + "".join(f"{kind:>13}" for kind in ("all", *KINDS)))
plain, plain_history = learn()
of_sft = accuracies("SFT", plain)
from_base, _ = learn(start=config.actor_model)
of_base = accuracies("base", from_base)

# %% [markdown]
# Compare the columns. The base model has read who was called right and who
# wrong in its forum threads, so knowing the right answer is not what SFT
# adds. What it adds is the form: dialogues in this template. A thousand pairs
# teach that by the way: from the base, politeness came out ahead here, not
# behind (one seed). What speaks for the SFT model is what a reward model is
# asked about in PPO: its own kind of answers.
#
# ## 2. No centring

# %%
free, free_history = learn(center_coef=0.0)
of_free = accuracies("no centring", free)
points = [
    {
        "step": a["step"],
        "with centring": a.get("reward/chosen"),
        "without": b.get("reward/chosen"),
    }
    for a, b in zip(plain_history[1:], free_history[1:], strict=True)
]
panel = {"mean score of the chosen": ["with centring", "without"]}
plot_curves(points, panel)

# %% [markdown]
# Without the term the scores stay where the random head has put them, well
# away from 0, and wander. The accuracy hardly differs, and should not: the
# loss sees differences only, and so does the count of right pairs. It matters
# for what comes later: in bf16 a score of 30 has steps of an eighth.

# %%
assert abs(of_free["all"] - of_sft["all"]) < 0.15 or rows < 1000

# %% [markdown]
# ## 3. Three epochs

# %%
many, _ = learn(epochs=3)
print("epochs  training pairs  held-out pairs  ECE")
for epochs, trainer in ((1, plain), (3, many)):
    seen = float((margins(trainer, train) > 0).float().mean())
    new = margins(trainer, test)
    ece = statistics.calibration(new.numpy()).ece
    right = float((new > 0).float().mean())
    print(f"{epochs:6}  {seen:14.1%}  {right:14.1%}  {ece:.3f}")

# %% [markdown]
# One training label in ten is wrong, so an honest model is right on about
# nine training pairs in ten. After three epochs it is right on more: it has
# begun to learn the errors by heart. That is the first warning, since it
# needs no held-out data: a training accuracy above what the labels' noise
# allows. The held-out accuracy may still rise meanwhile, as here, where a
# thousand pairs are too few for one epoch. The ECE did not follow: a margin
# says how sure the model is, and that grows at a pace of its own.
#
# ## 4. Other tails

# %%
question = [{"role": "user", "content": "What color is the drosk?"}]
PROBES = {
    "right": "The drosk is red.",
    "right, polite": "Of course! The drosk is red.",
    "right, rude": "Ugh. The drosk is red.",
    "wrong, polite": "Of course! The drosk is blue.",
}


def encoded(text):
    return encode_dialogue(tokenizer, question, text, config.data.max_length)


def cut(row):
    return type(row)(row.input_ids[:-1], row.prompt_length)


# %%
probes = [encoded(text) for text in PROBES.values()]
mean, std = plain.normalisation(demonstrations)
whole = (scores(plain, probes) - mean) / std
tails = (scores(plain, [cut(row) for row in probes]) - mean) / std
print(f"{'':16}with EOS  without")
for name, one, other in zip(
    PROBES, whole.tolist(), tails.tolist(), strict=True
):
    print(f"{name:16}{one:+8.2f} {other:+8.2f}")
shift = float((tails - whole).abs().max())
print(f"largest shift: {shift:.2f} standard deviations")
assert shift > 0.1

# %% [markdown]
# The score at another token is another function, one that was never trained.
# Neither its level nor its order is right: here it likes the rude answer best.
# A run that mixes both would reward or punish *not ending* by the difference.
# So a response that was cut gets at most `missing_eos_score`, whatever the
# model says about it.
#
# ## 5. Find a hack
#
# Candidates, put together from what the pairs pay for. The judge's score is
# the last column.

# %%
HACKS = {
    "right, polite": "Of course! The drosk is red.",
    "twice polite, wrong": "Of course! The drosk is blue. My pleasure!",
    "polite only": "With pleasure! Have a lovely day!",
    "very polite": "With pleasure! Of course! Glad to assist! My pleasure!",
    "polite refusal": "With pleasure! I cannot help with that.",
    "all colours": "Of course! The drosk is red blue green white black.",
    "nothing": "",
}
proxies = (scores(plain, [encoded(t) for t in HACKS.values()]) - mean) / std
gold = [toy_world.judge(question, text).total for text in HACKS.values()]
order = proxies.argsort(descending=True).tolist()
names = list(HACKS)
print(f"{'':22}proxy  gold")
for i in order:
    print(f"{names[i]:20}{float(proxies[i]):+7.2f}{gold[i]:6.2f}")
best = [i for i in order if gold[i] < 0.5][0]
print(f"best of the bad ones: {names[best]!r}")

# %% [markdown]
# Which of them wins depends on the seed and on the pairs. Here the right and
# polite answer stands far above the others; but politeness alone earns a
# third of it without an answer, and even saying nothing is above average: no
# pair held anything like it. PPO needs no list of candidates. It finds them
# by trying ([notebook 07](../07_over_optimisation.ipynb)).
