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
# # 02 Supervised fine-tuning: solutions
#
# To the exercises of [notebook 02](../02_sft.ipynb). Try them first. Each
# model here is trained on a thousand demonstrations, a sixth of the preset's,
# so that all of them take a minute or two.

# %% tags=["parameters"]
run_dir: str = "runs/notebooks"  # only its settings are used
rows: int = 1000  # demonstrations of each model
prompts: int = 64  # held-out prompts that each one answers

# %%
from rlhf_kit import launch

launch.read_flags(globals())

# %%
import dataclasses
import time

from rlhf_kit import toy_world
from rlhf_kit.blending import Blend, length_bucketed_batches
from rlhf_kit.config import override
from rlhf_kit.hybrid_engine.engine import HybridEngine
from rlhf_kit.hybrid_engine.training import start_deepspeed
from rlhf_kit.models import add_lora, load_causal_lm, resolve_model
from rlhf_kit.plots import plot_curves
from rlhf_kit.run_directory import RunDirectory
from rlhf_kit.sft import SFTTrainer
from rlhf_kit.tokenization import (
    as_text,
    collate_prompts,
    decode_response,
    encode_demonstrations,
    keep_fitting,
    load_tokenizer,
    prepare_tokenizer,
    stop_token_ids,
)

start_deepspeed()
config = RunDirectory.open(run_dir, preset_name="toy").config
tokenizer = load_tokenizer(resolve_model(config.actor_model))
prepare_tokenizer(tokenizer)
blend = Blend(config.data, config.seed)
train = encode_demonstrations(tokenizer, blend["sft"][:rows], config.data).rows
held_out = encode_demonstrations(
    tokenizer, blend.evaluation("sft"), config.data
).rows
asked = keep_fitting(tokenizer, blend.evaluation("sft"), config.data)
asked = asked.rows[:prompts]


# %% [markdown]
# One function trains a model as the notebook does, one asks it.


# %%
def fine_tune(rows, epochs=1, **changes):
    """Engine, trainer, losses by step: (training, held out) at each epoch."""
    args = override(config, sft__epochs=epochs, **changes)
    model = load_causal_lm(args.actor_model, tokenizer, dtype="fp32")
    if args.actor_engine.lora.rank:
        add_lora(model, args.actor_engine.lora)
    size = min(args.sft.batch_size, len(rows))
    plan = [
        length_bucketed_batches(
            [row.length for row in rows], size, seed=1, epoch=e, drop_last=True
        )
        for e in range(epochs)
    ]
    engine = HybridEngine(
        model,
        args.actor_engine,
        args.sft.optimizer,
        total_steps=sum(map(len, plan)),
        eos_token_ids=stop_token_ids(tokenizer, model),
        pad_token_id=tokenizer.pad_token_id,
    )
    trainer = SFTTrainer(engine, args.sft, pad_token_id=tokenizer.pad_token_id)
    losses = [(trainer.evaluate(rows), trainer.evaluate(held_out))]
    for batches in plan:
        for batch in batches:
            trainer.step([rows[i] for i in batch])
        losses.append((trainer.evaluate(rows), trainer.evaluate(held_out)))
    return engine, losses


# %%
def ask(engine, temperature):
    """Means over the prompts: gold score, its parts, share that ended."""
    engine.eval()
    generation = dataclasses.replace(
        config.generation, temperature=temperature
    )
    batch = collate_prompts(tokenizer, asked, seeds=range(len(asked)))
    rollout = engine.generate(batch.to(engine.device), generation)
    answers = [
        decode_response(tokenizer, ids[mask])
        for ids, mask in zip(
            rollout.response_ids, rollout.response_mask, strict=True
        )
    ]
    ended = rollout.ended.tolist()
    scores = [
        toy_world.judge(list(pair.prompt), answer, ended=end)
        for pair, answer, end in zip(asked, answers, ended, strict=True)
    ]
    parts = ("total", "correct", "polite", "brief")
    means = [sum(getattr(x, p) for x in scores) / len(scores) for p in parts]
    return dict(zip(parts, means, strict=True)) | {
        "ended": sum(ended) / len(ended)
    }


# %%
def report(name, engine, losses):
    """A line for each way to decode."""
    found = {}
    for how, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        found[how] = ask(engine, temperature)
        values = "".join(f"{value:8.2f}" for value in found[how].values())
        print(f"{name:16}{how:9}{losses[-1][1]:6.3f}{values}")
    return found


print(f"{'':25}  loss    gold correct  polite   brief   ended")
plain_engine, plain_losses = fine_tune(train)
plain = report("as it is", plain_engine, plain_losses)

# %% [markdown]
# ## 1. Leave the EOS out
#
# The EOS is each row's last token, so dropping it from the row is the same as
# setting its `loss_mask` to False.

# %%
no_eos = [dataclasses.replace(r, input_ids=r.input_ids[:-1]) for r in train]
assert all(r.input_ids[-1] == tokenizer.eos_token_id for r in train)
without = report("no EOS", *fine_tune(no_eos))

# %% [markdown]
# The loss hardly notices: one token in fifteen, and the base model has met the
# same EOS at the end of forum answers, so it does not forget at once how to
# stop. But nobody teaches the probability of stopping, while every step makes
# other tokens likelier. Sampled, one response in twenty runs into the limit
# and others ramble on, which the column *brief* shows. With a base model that
# never saw this EOS, nothing would ever stop.

# %%
assert without["sampled"]["ended"] <= plain["sampled"]["ended"]

# %% [markdown]
# ## 2. Learn the prompts too

# %%
with_prompts = report("with prompts", *fine_tune(as_text(train)))

# %% [markdown]
# The held-out loss counts responses alone in all rows of this table, and it
# is higher: the prompts' tokens, nearly as many as the responses', take their
# share of each of the sixteen steps. Of a prompt one can predict its form
# (`Human:`, the words of a question once it has begun) but not what it asks
# about: which animal, which numbers. Those tokens cost as much at the end as
# before.
#
# ## 3. Three epochs

# %%
three_engine, three_losses = fine_tune(train, epochs=3)
three = report("three epochs", three_engine, three_losses)
history = [
    {"step": epoch, "training rows": seen, "held-out rows": new}
    for epoch, (seen, new) in enumerate(three_losses)
]
for row in history:
    print(row)
panel = {"loss (nats a token)": ["training rows", "held-out rows"]}
plot_curves(history, panel, xlabel="epoch")

# %% [markdown]
# Both curves fall together for the first epoch, since every row is new. From
# the second on the training rows fall further than the held-out ones: the gap
# is what is learnt by heart. The gold score does not follow the loss: greedy
# it is higher than after one epoch, sampled it is lower. What the loss asks
# for is the demonstrations' mixture, wrong answers and idle talk included; a
# model that fits it better copies those more faithfully.
#
# ## 4. LoRA

# %%
seconds = {}
for name, changes in {
    "all weights": {},
    "LoRA, rank 8": {
        "actor_engine__lora__rank": 8,
        "sft__optimizer__learning_rate": 3e-3,
    },
}.items():
    start = time.process_time()
    engine, losses = fine_tune(train, **changes)
    seconds[name] = time.process_time() - start
    trained = sum(
        p.numel() for p in engine.module.parameters() if p.requires_grad
    )
    print(f"{name:13} {trained:9,} trained, held-out loss {losses[-1][1]:.3f}")
ratio = seconds["LoRA, rank 8"] / seconds["all weights"]
print(f"LoRA takes {ratio:.1f} times the processor's time")

# %% [markdown]
# One weight in thirteen is trained (a model this narrow makes adapters large;
# at 7B it is one in hundreds), and the loss comes near. It is not faster
# here: the forward pass has the adapters on top, and the backward pass still
# goes through every layer. What LoRA saves is memory: gradients and AdamW's
# states of the weights that are frozen.
#
# ## 5. Better data

# %%
rich = encode_demonstrations(
    tokenizer,
    [
        pair
        for pair in blend["sft"]
        if toy_world.judge(list(pair.prompt), pair.chosen).total > 0.8
    ][:rows],
    config.data,
).rows
print(len(rich), "demonstrations score above 0.8")
better = report("better data", *fine_tune(rich))

# %% [markdown]
# This beats everything else on this page, with as many rows and the *highest*
# held-out loss: that loss is taken on demonstrations of which a quarter is
# wrong, and this model no longer expects them to be. It is what *rejection
# sampling* does: keep the best, and imitate those. But it needs the gold
# judge, or a reward model, to say what is good. And it can only keep what
# somebody has written; PPO tries answers of its own.

# %%
if rows >= 1000:
    assert better["sampled"]["total"] > plain["sampled"]["total"] + 0.1
    gap = [new - seen for seen, new in three_losses]
    assert gap[3] > gap[1]
