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
# # 02 Supervised fine-tuning
#
# A base model knows a lot and answers nobody. Here it learns the *form* of a
# dialogue from demonstrations: to reply when the user has finished, in the
# tone of the demonstrations, and to stop. The result, the SFT model, is where
# the reward model and PPO begin.
#
# | preset | hardware | minutes | peak memory |
# |---|---|---|---|
# | toy | two CPU cores | 0.3 | 1.0 GiB |
# | consumer | one GPU, 24 GB of it | 3.2 | 12.0 GiB |
#
# `benchmarks/notebooks.py` and `benchmarks/consumer.py` measured them, the
# latter a few steps, reckoned to 100, of Qwen2.5-0.5B's shape with random
# weights on an H200 of which 24 GB were allowed.

# %% tags=["parameters"]
preset: str = "toy"  # toy, consumer, cluster or a recipe
run_dir: str = "runs/notebooks"  # where models and metrics go
resume: bool = True  # go on where training was cut short
seed: int | None = None  # decides data order and initialisation
actor_model: str | None = None  # hub name or directory of the base model
epochs: int | None = None  # passes over the demonstrations
rows: int | None = None  # use at most this many demonstrations
learning_rate: float | None = None  # peak learning rate
zero_stage: int | None = None  # ZeRO stage of the actor, 0 to 3
lora_rank: int | None = None  # adapters of this rank; 0 trains all weights

# %% [markdown]
# Each of these is also a flag when the file runs as a script
# (`python notebooks/02_sft.py --rows 256`). None leaves what the preset says.

# %%
from rlhf_kit import launch

launch.read_flags(globals())

# %%
import dataclasses
import math

import torch
import torch.nn.functional as F
from rlhf_kit import distributed, memory_check, preflight
from rlhf_kit.blending import Blend, length_bucketed_batches
from rlhf_kit.checkpoint import export
from rlhf_kit.evaluate import is_toy_world
from rlhf_kit.faults import Faults
from rlhf_kit.functional import language_model_loss
from rlhf_kit.hybrid_engine.engine import HybridEngine
from rlhf_kit.hybrid_engine.training import start_deepspeed
from rlhf_kit.metrics import MetricsLog, Phases, read_metrics
from rlhf_kit.models import add_lora, load_causal_lm, resolve_model
from rlhf_kit.plots import plot_curves, plot_histogram
from rlhf_kit.resume import Checkpoints
from rlhf_kit.run_directory import RunDirectory
from rlhf_kit.sft import SFTTrainer, language_model_forward
from rlhf_kit.tokenization import (
    collate_prompts,
    collate_sft,
    decode_response,
    encode_demonstrations,
    encode_dialogue,
    keep_fitting,
    load_tokenizer,
    prepare_tokenizer,
    stop_token_ids,
)
from rlhf_kit.toy_world import judge
from tqdm.auto import tqdm

# %%
start_deepspeed()
run = RunDirectory.open(
    run_dir,
    preset_name=preset,
    seed=seed,
    actor_model=actor_model,
    sft__epochs=epochs,
    sft__optimizer__learning_rate=learning_rate,
    actor_engine__zero_stage=zero_stage,
    actor_engine__lora__rank=lora_rank,
)
config = run.config
preflight.check(run)
distributed.seed_everything(config.seed)
# Explanations are for readers: a script trains and prints little.
show = print if launch.in_notebook() else lambda *_: None

# %% [markdown]
# ## Theory on one screen
#
# A language model gives every next token a probability, $p_\theta(x_t \mid
# x_{<t})$. Pretraining and SFT minimise the same thing, the cross-entropy
# of what comes next. SFT counts only the tokens of the response, because the
# prompt is the user's part, and the actor need not learn to write it:
#
# $$L(\theta) = -\frac{1}{N} \sum_{b=1}^{B} \sum_{t=2}^{T} m_{b,t}
# \log p_\theta(x_{b,t} \mid x_{b,<t}), \qquad N = \sum_{b,t} m_{b,t}$$
#
# | symbol | variable | shape |
# |---|---|---|
# | $x$ | `batch.input_ids` | `[B, T]` |
# | $m$ | `batch.loss_mask`, True on response tokens | `[B, T]` |
# | $\log p_\theta$ | `token_logprobs(logits, ids)` | `[B, T - 1]` |
# | $N$ | `denominator` | one number |
# | $L$ | `loss/train`, `loss/eval`, in nats a token | one number |
# | $e^L$ | perplexity | one number |
#
# - **Shifted by one.** The logits at position $t - 1$ predict token $t$. The
#   mask names the token that is *predicted*.
# - **The EOS is a token like any other.** It is the decision to stop. If the
#   mask leaves it out, the model never learns when to stop, and PPO will pay
#   for responses that run into the length limit.
# - **Perplexity** $e^L$: the model is as unsure as if it chose among that
#   many equally likely tokens. It can't fall to 1 where the demonstrations
#   are random themselves.
# - **$N$ counts the whole batch**: all rows, all micro-batches, all ranks.
#   Step 4 shows what goes wrong otherwise.
#
# This is step 1 of InstructGPT (Ouyang et al. 2022, section 3.5).

# %% [markdown]
# ## 1. The demonstrations
#
# The blend of notebook 01 gives this stage its own split of the prompts.
# `encode_demonstrations` turns each row into ids and says what it dropped or
# cut: prompts over `max_prompt_length` go, a long response is cut and keeps
# its EOS.

# %%
tokenizer = load_tokenizer(resolve_model(config.actor_model))
distributed.print_main(prepare_tokenizer(tokenizer))
blend = Blend(config.data, config.seed)
train = encode_demonstrations(tokenizer, blend["sft"][:rows], config.data)
held_out = encode_demonstrations(
    tokenizer, blend.evaluation("sft"), config.data
)
distributed.print_main(len(train.rows), "demonstrations", *train.lines())
lengths = [row.length for row in train.rows]

# %%
for pair in blend["sft"][:5]:
    show("user:     ", pair.prompt[-1]["content"])
    show("assistant:", pair.chosen, "\n")

# %% [markdown]
# In the toy world demonstrations are of mixed quality on purpose: about a
# quarter of the answers is wrong, some are rude, most ramble. SFT imitates
# all of it. What is worth imitating is for the reward model to say.
#
# ## 2. The mask
#
# Four strings of our own, encoded as every row is: the template's text up to
# `Assistant:`, then the response, then EOS.

# %%
EXAMPLES = (
    ("How much is 2 plus 3?", "The answer is 5."),
    ("What color is the drosk?", "Ugh. The drosk is red."),
    ("Thanks, the story is done now.", "Any time! Good luck with the story."),
    (
        "Tell me the first word of: violin sled.",
        "It is violin. It depends on how one looks at it.",
    ),
)
examples = [
    encode_dialogue(
        tokenizer,
        [{"role": "user", "content": question}],
        answer,
        config.data.max_length,
    )
    for question, answer in EXAMPLES
]
for row in examples:
    show(row.length, "tokens,", row.prompt_length, "of them the prompt's")

# %% [markdown]
# Rows of a batch have one width, so the shorter ones are padded on the right.
# The draft below decides for every place whether it counts. It asks for
# lengths only, never whether an id looks like padding.

# %%
width = max(row.length for row in examples)


def draft_mask(row):
    """True where a token is one of the response's, the EOS included."""
    return [row.prompt_length <= t < row.length for t in range(width)]


for row in examples:
    marks = "".join("#" if counts else "." for counts in draft_mask(row))
    show(marks[: row.length] + "_" * (width - row.length))

# %% [markdown]
# `.` is the prompt, `#` counts, `_` is padding. As we can see, the loss sees
# fewer than half of the tokens. The library builds the same mask from
# tensors:

# %%
toy_batch = collate_sft(examples, pad_token_id=tokenizer.pad_token_id)
assert toy_batch.loss_mask.tolist() == [draft_mask(row) for row in examples]
assert all(row.input_ids[-1] == tokenizer.eos_token_id for row in examples)
show("collate_sft makes the same mask", tuple(toy_batch.loss_mask.shape))

# %% [markdown]
# The same on real rows, with what is learnt in square brackets, one pair a
# token. The last bracket of each row is the EOS.
#
# Two ways to get this wrong have a history. DeepSpeed Chat and others set
# PAD to the EOS id and then masked every PAD: that hides the one EOS that
# matters, and such models do not stop. And a mask that searches for the text
# `Assistant:` among the ids fails when the tokenizer merges the colon with
# what follows. So here PAD is never EOS, and the mask comes from lengths.


# %%
def token_text(token_id):
    """One token as text, newlines visible."""
    return tokenizer.decode([token_id]).replace("\n", "\\n")


def marked(row):
    """The dialogue, with brackets around every token that counts."""
    texts = [token_text(i) for i in row.input_ids]
    learnt = [f"[{text}]" for text in texts[row.prompt_length :]]
    return "".join(texts[: row.prompt_length] + learnt)


for row in train.rows[:3]:
    show(marked(row), "\n")

# %%
share = 1 - sum(r.prompt_length for r in train.rows) / sum(lengths)
show(f"{share:.0%} of the training tokens count in the loss")
sizes = {"response": [row.length - row.prompt_length for row in train.rows]}
label = "response length (tokens)"
plot_histogram(sizes, label=label) if launch.in_notebook() else None

# %% [markdown]
# Lengths differ by a factor of ten: some demonstrations answer in a few
# words, others ramble. A batch is as wide as its longest row, so batches put
# rows of similar length together (`length_bucketed_batches`) and little of
# the computing goes into padding.
#
# ## 3. The model, and what DeepSpeed holds where
#
# With bf16 and AdamW a parameter costs 16 bytes: 2 for the weight, 2 for its
# gradient, and 12 in the optimiser (an fp32 copy of the weight, and two fp32
# averages). Plain data parallelism keeps all 16 on every GPU. ZeRO
# (Rajbhandari et al. 2020) gives each of $N$ ranks its share instead:
#
# | stage | whole on every rank | 1/N on every rank | bytes a parameter |
# |---|---|---|---|
# | 0 | weights, gradients, optimiser | | 16 |
# | 1 | weights, gradients | optimiser | 4 + 12/N |
# | 2 | weights | gradients, optimiser | 2 + 14/N |
# | 3 | one layer at a time | weights, gradients, optimiser | 16/N |
#
# The numbers that come out are the same at every stage; what changes is
# memory and traffic. Stages 1 and 2 send as much as plain data parallelism,
# stage 3 about half as much again, since it fetches the weights before each
# use. So take the lowest stage that fits. Activations come on top, and
# gradient checkpointing makes them small for a third more time.
#
# LoRA (Hu et al. 2021) shrinks the other factor: the base weights are frozen
# (2 bytes each, no gradient, no optimiser) and each matrix $W$ gets a
# trained $\frac{\alpha}{r} B A$ of rank $r$. That often is one parameter in
# a hundred. The export is a merged model again.


# %%
def gibibytes(parameters, ranks, stage):
    """Weights, gradients and AdamW's states on one GPU, in bf16."""
    kept, shared = {0: (16, 0), 1: (4, 12), 2: (2, 14), 3: (0, 16)}[stage]
    return parameters * (kept + shared / ranks) / 2**30


show("GiB on each GPU:      stage 0       1       2       3")
for name, parameters, ranks in (
    ("0.5B on one GPU", 0.5e9, 1),
    ("1.3B on eight", 1.3e9, 8),
    ("13B on eight", 13e9, 8),
    ("66B on sixty-four", 66e9, 64),
):
    sizes = [gibibytes(parameters, ranks, stage) for stage in range(4)]
    show(f"{name:<20}" + "".join(f"{size:8.0f}" for size in sizes))

# %% [markdown]
# One GPU gains nothing from a higher stage: there is nobody to share with.
# Eight GPUs of 80 GB hold 13B parameters from stage 2 on.
#
# The engine below is the one that PPO will use. Under it lies a DeepSpeed
# engine; beside the training mode stands an inference mode that generates
# from the same weights.

# %%
model = load_causal_lm(
    config.actor_model, tokenizer, dtype=config.actor_engine.dtype
)
if config.actor_engine.lora.rank:
    add_lora(model, config.actor_engine.lora)
counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
show(
    f"{sum(n for n, _ in counts):,} parameters,",
    f"{sum(n for n, trained in counts if trained):,} of them trained,",
    config.actor_engine.dtype,
    f"ZeRO stage {config.actor_engine.zero_stage}",
)

# %%
plan = [
    batch
    for epoch in range(config.sft.epochs)
    for batch in length_bucketed_batches(
        lengths,
        config.sft.batch_size,
        seed=config.seed,
        epoch=epoch,
        drop_last=len(lengths) >= config.sft.batch_size,
    )
]
engine = HybridEngine(
    model,
    config.actor_engine,
    config.sft.optimizer,
    total_steps=len(plan),
    eos_token_ids=stop_token_ids(tokenizer, model),
    pad_token_id=tokenizer.pad_token_id,
)
trainer = SFTTrainer(
    engine,
    config.sft,
    pad_token_id=tokenizer.pad_token_id,
    faults=Faults(config.faults, run.stage("sft")),
    logprob_chunk=config.memory.logprob_chunk,
)

# %% [markdown]
# ## 4. The loss, token by token
#
# What does the base model pay for our four strings? First by hand: for every
# token that counts, take the softmax of the logits one place before, and the
# negative logarithm of what it gives to the token that came.

# %%
toy_batch = toy_batch.to(engine.device)
ids, mask = toy_batch.input_ids, toy_batch.loss_mask


def logits_now():
    """[4, T, V] of the four strings, by the weights as they are now."""
    engine.eval()
    with torch.no_grad():
        return language_model_forward(engine, toy_batch).float()


def draft_costs(logits, row):
    """-log p of each token of one row that counts, in order."""
    costs = []
    for t in range(1, ids.shape[1]):
        if mask[row, t]:
            p = torch.softmax(logits[row, t - 1].double(), dim=-1)
            costs.append(-math.log(p[ids[row, t]]))
    return costs


# %%
logits = logits_now()
costs = [draft_costs(logits, row) for row in range(len(examples))]
for token, cost in zip(ids[0][mask[0]].tolist(), costs[0], strict=True):
    p = math.exp(-cost)
    show(f"{token_text(token)!r:12} p {p:6.1%}   costs {cost:6.3f} nats")

# %% [markdown]
# As we can see, the first word is the expensive one. The base model gives
# `The` one chance in a thousand: after a question it expects its forum
# thread to go on. Once the sentence has begun it is sure of every word but
# the 5 itself, which it has a good idea of. Knowledge is there already; how
# to reply is what it lacks.
#
# The mean over all tokens that count is the loss. Ours, the library's and
# torch's must be one number:

# %%
everything = [cost for row in costs for cost in row]
by_hand = sum(everything) / len(everything)
tokens = float(mask[:, 1:].sum())
ours = language_model_loss(logits, ids, mask, denominator=tokens)
labels = ids.masked_fill(~mask, -100)  # -100: ignored
theirs = F.cross_entropy(
    logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
)
torch.testing.assert_close(float(ours), by_hand, rtol=1e-4, atol=1e-4)
torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
show(f"by hand            {by_hand:.6f}")
show(f"rlhf_kit           {float(ours):.6f}")
show(f"F.cross_entropy    {float(theirs):.6f}")
show(f"perplexity         {math.exp(by_hand):.2f}")

# %% [markdown]
# ### A mean of means is another number
#
# Memory often allows a few rows at a time only. Say two micro-batches of two
# rows. It is tempting to take each one's mean and then the mean of the two:

# %%
halves = [costs[0] + costs[1], costs[2] + costs[3]]
means = [sum(half) / len(half) for half in halves]
for half, mean in zip(halves, means, strict=True):
    show(f"{len(half):2} tokens, mean {mean:.4f}")
show(f"mean of the means  {sum(means) / 2:.4f}")
show(f"mean of all tokens {by_hand:.4f}")

# %% [markdown]
# The mean of means gives a token of a short micro-batch more weight than one
# of a long one, and how much depends on how rows happened to be grouped. The
# same happens between GPUs, where each rank has a count of its own. Widely
# used trainers averaged like this until 2024.
#
# Here every loss is a sum divided by the count of the *global* batch
# (`denominator`), so shares add up to the exact mean, and one GPU with eight
# micro-batches computes what eight GPUs with one compute:

# %%
shares = [
    language_model_loss(
        logits[part], ids[part], mask[part], denominator=tokens
    )
    for part in (slice(0, 2), slice(2, 4))
]
torch.testing.assert_close(sum(shares), ours)
show(" + ".join(f"{float(x):.4f}" for x in shares), f"= {float(ours):.4f}")

# %% [markdown]
# ## 5. What the base model says
#
# Prompts from the held-out split, sampled at temperature 1 and greedily. Each
# row has its own seed, so that before and after training the same dice are
# thrown.

# %%
asked = keep_fitting(tokenizer, blend.evaluation("sft"), config.data).rows[:64]


def answers(temperature):
    """Responses as text and whether they ended, from the weights of now."""
    prompts = collate_prompts(tokenizer, asked, seeds=range(len(asked)))
    rollout = engine.generate(
        prompts.to(engine.device),
        dataclasses.replace(config.generation, temperature=temperature),
    )
    texts = [
        decode_response(tokenizer, ids[mask])
        for ids, mask in zip(
            rollout.response_ids, rollout.response_mask, strict=True
        )
    ]
    return texts, rollout.ended.tolist()


def show_answers(sampled, greedy):
    for row in range(min(5, len(asked))):
        show("user:   ", asked[row].prompt[-1]["content"])
        show("sampled:", sampled[0][row])
        show("greedy: ", greedy[0][row], "\n")


# %%
said = {}
if launch.in_notebook():
    said["base"] = answers(1.0), answers(0.0)
    show_answers(*said["base"])

# %% [markdown]
# It goes on as a forum does: it answers other questions than the one asked,
# or asks its own. Now and then a reply fits, so the facts are there.
#
# ## 6. Train
#
# One pass over the demonstrations. The held-out loss is taken before the
# first step and after the last.
#
# Training may be cut short: a full disk, a power cut, or you, who press stop.
# So everything it depends on is saved now and then: the weights, AdamW's two
# averages, the random generators, and how far the metrics had come. Run the
# notebook again and it goes on from there, to the same last bit. Which rows
# come next needs no saving, since the plan follows from the seed.

# %%
phases = Phases()
log = MetricsLog(run.stage("sft"), console=["loss/train"])
checkpoints = Checkpoints(
    run,
    "sft",
    {"trainer": trainer, "phases": phases},
    log=log,
    data=[train.rows],
    tokenizer=tokenizer,
)
trainer.faults.roll_back = checkpoints.roll_back
if checkpoints.resume(resume) == 0:
    log(0, {"loss/eval": trainer.evaluate(held_out.rows)})

# %%
quiet = None if distributed.is_main_rank() else True  # one bar, in terminals
bar = tqdm(checkpoints.remaining(plan), disable=quiet)
with checkpoints:
    for step, chosen in bar:
        with phases("train") as phase:
            metrics = trainer.step([train.rows[i] for i in chosen])
            phase.tokens += sum(lengths[i] for i in chosen)
        metrics["perf/tokens_per_second"] = phase.tokens / phase.seconds
        if step == 1:
            metrics |= memory_check.compare(config, "sft", phases)
        log(step, metrics, bar=bar)
        checkpoints.step(step, metrics)
log(len(plan), {"loss/eval": trainer.evaluate(held_out.rows)})
log.close()

# %%
export(engine.module, tokenizer, run.model("sft"))
summary = run.finish("sft", phases, steps=len(plan))
checkpoints.finish()

# %% [markdown]
# A finished stage needs no checkpoint, so the last line deletes them.
# The directory `sft/final/` is a model like any other:
# `AutoModelForCausalLM.from_pretrained` reads it, tokenizer and chat template
# included.
#
# ## 7. The curves

# %%
history = read_metrics(run.path / "sft")
plot_curves(
    history,
    {
        "loss (nats a token)": ["loss/train", "loss/eval"],
        "gradient norm": ["optim/grad_norm"],
        "learning rate": ["optim/lr"],
    },
)

# %% [markdown]
# **What you should see** with the toy preset:
#
# - `loss/train` falls within ten steps from 0.85 to about 0.5, and then jumps
#   between 0.37 and 0.65. That is no instability. Rows of like length share
#   a batch, and a short response costs more a token than a long one, whose
#   idle talk is easy to predict once a sentence has begun. Judge progress by
#   `loss/eval`.
# - `loss/eval` falls from 0.857 to 0.423, perplexity from 2.36 to 1.53. It
#   can't reach 0: tone, number of idle sentences and one answer in four
#   being wrong are drawn at random.
# - The gradient's norm starts near 6 and settles around 1. The learning rate
#   is a half cosine from 1e-3 to 0.
#
# With your own data: a `loss/eval` well above `loss/train` means memorising;
# one that has hardly fallen means too low a rate or too few steps.

# %%
before, after = (row["loss/eval"] for row in history if "loss/eval" in row)
distributed.print_main(
    f"held-out loss {before:.3f} -> {after:.3f} nats a token,",
    f"perplexity {math.exp(before):.2f} -> {math.exp(after):.2f}",
)

# %% [markdown]
# ## 8. What the SFT model says
#
# The same prompts, the same seeds, the same engine. Its weights are the ones
# that the optimiser has just written.

# %%
if launch.in_notebook():
    said["sft"] = answers(1.0), answers(0.0)
    show_answers(*said["sft"])

# %% [markdown]
# Every prompt now gets a reply, of the demonstrations' form: sometimes
# polite, sometimes rude, often rambling. Where did the probability go?

# %%
now = [draft_costs(logits_now(), row) for row in range(len(examples))]
show(f"{'token':12}{'p before':>12}{'p after':>12}")
for row in (0, 1):
    tokens_of_row = ids[row][mask[row]].tolist()
    for token, *both in zip(tokens_of_row, costs[row], now[row], strict=True):
        before_after = "".join(f"{math.exp(-cost):12.1%}" for cost in both)
        show(f"{token_text(token)!r:12}{before_after}")

# %% [markdown]
# Three things have been learnt. To begin a reply at all. When to stop: right
# after a bare answer only half of the time, because six demonstrations in
# ten ramble on. And doubt: the drosk *is* red, and the base model was sure
# of it. But demonstrations are wrong one time in four, so the SFT model is
# less sure now. Imitation copies errors at the rate at which they occur.
#
# In the toy world a judge knows what a response is truly worth. It plays no
# part in training; here it says what the two models' answers to the
# held-out prompts are worth, from 0 to 1.


# %%
def gold_row(texts, ended):
    """Means over the prompts: gold score, its parts, share that ended."""
    scores = [
        judge(list(pair.prompt), text, ended=end)
        for pair, text, end in zip(asked, texts, ended, strict=True)
    ]
    parts = ("total", "correct", "polite", "brief")
    means = [sum(getattr(x, p) for x in scores) / len(scores) for p in parts]
    return [*means, sum(ended) / len(ended)]


if launch.in_notebook() and is_toy_world(config):
    show(f"{'':14}    gold  correct  polite   brief   ended")
    for name, decodes in said.items():
        for how, decode in zip(("sampled", "greedy"), decodes, strict=True):
            values = "".join(f"{x:8.2f}" for x in gold_row(*decode))
            show(f"{name:5}{how:9}{values}")

# %% [markdown]
# **What you should see:** base 0.32 sampled and 0.30 greedy; SFT 0.69
# sampled and 0.88 greedy (64 prompts; give or take 0.04). Greedy
# decoding is always correct and never polite: the likeliest answer is the
# right one in a neutral tone. Sampled, the SFT model is as often right as
# its demonstrations are. The report measures this on 512 prompts; PPO will
# be judged against both columns.
#
# ## Checks
#
# The export must be the model that was trained, and training must have
# helped.

# %%
if launch.in_notebook():
    dtype = config.actor_engine.dtype
    again = load_causal_lm(str(run.model("sft")), tokenizer, dtype=dtype)
    with torch.no_grad():
        exported = language_model_forward(again.to(engine.device), toy_batch)
    close = 1e-3 if dtype == "fp32" else 0.5
    torch.testing.assert_close(
        exported.float(), logits_now(), rtol=close, atol=close
    )
    show("the exported model computes what the trained one does")

# %%
assert math.isfinite(after), "the held-out loss is not a number"
if launch.in_notebook():
    assert after < before, "SFT has not lowered the held-out loss"
    show("the held-out loss fell")

# %% [markdown]
# ## Exercises
#
# [Solutions](solutions/02_sft.ipynb).
#
# 1. **Leave the EOS out.** Set `loss_mask` to False on each row's last token
#    before the loss, train, and look at the column *ended*. (Hint:
#    `collate_sft` is the one place; `row.length - 1` is where EOS stands.)
# 2. **Learn the prompts too.** `as_text(train.rows)` puts the loss on every
#    token. Compare `loss/eval` on the responses and the gold scores. Which
#    tokens of a prompt can be predicted at all?
# 3. **More epochs.** Run with `epochs=3`. Where do `loss/train` and
#    `loss/eval` part? Does the gold score follow the loss? (InstructGPT
#    overfits on the loss for 16 epochs and finds that people prefer it.)
# 4. **LoRA.** `lora_rank=8` with `learning_rate=3e-3`: how many parameters
#    are trained, how close does the held-out loss come, and is it faster?
# 5. **Better data.** Keep only demonstrations that the judge scores above
#    0.8, and train on as many rows. How far does SFT alone get?
#
# ## On more than this computer
#
# The file is a script with the same parameters as flags. On eight GPUs:
#
# ```
# deepspeed --num_gpus 8 notebooks/02_sft.py --preset cluster
# torchrun --nproc_per_node 8 notebooks/02_sft.py --preset cluster
# ```
#
# `--zero_stage`, `--lora_rank` and the other parameters follow. The global
# batch keeps its size; each rank takes its share, and the losses that are
# logged are the same sums.
#
# **Next:** [03_reward_model](03_reward_model.ipynb) learns from pairs which
# of these answers people prefer, and starts from `sft/final/`.
#
# **Papers:** Ouyang et al. 2022, *Training language models to follow
# instructions with human feedback* (InstructGPT). Rajbhandari et al. 2020,
# *ZeRO: Memory optimizations toward training trillion parameter models*. Hu
# et al. 2021, *LoRA: Low-rank adaptation of large language models*.
