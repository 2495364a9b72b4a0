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
# # 06 The hybrid engine
#
# PPO spends a third to a half of its time on generating. Here we build the
# generation loop up from the naive one, see what each idea saves, and check
# every draft against the library. Then the same weights learn, and answer
# otherwise.
#
# | preset | hardware | minutes | peak memory |
# |---|---|---|---|
# | toy | two CPU cores | 0.1 | 0.5 GiB |
#
# The figures of a GPU at the end come from `benchmarks/results/`; the command
# that measures each stands beside it.

# %% tags=["parameters"]
preset: str = "toy"  # toy, consumer, cluster or a recipe
run_dir: str = "runs/notebooks"  # a run whose SFT model answers, if it has one
rows: int = 48  # prompts that are answered at once
max_new_tokens: int = 44  # longest answer
seed: int = 1  # of the sampling

# %%
from rlhf_kit import launch

launch.read_flags(globals())

# %%
import json
import time

import torch
from rlhf_kit.blending import Blend
from rlhf_kit.config import EngineConfig, GenerationConfig, OptimizerConfig
from rlhf_kit.distributed import local_device, print_main
from rlhf_kit.encoded_rows import keep_fitting
from rlhf_kit.evaluate import model_directories
from rlhf_kit.hybrid_engine.decode import Decoder
from rlhf_kit.hybrid_engine.engine import HybridEngine
from rlhf_kit.hybrid_engine.sampling import draw, log_distribution, uniforms
from rlhf_kit.launch import in_notebook
from rlhf_kit.models import load_causal_lm, resolve_model
from rlhf_kit.plots import plot_bars, plot_step_times
from rlhf_kit.run_directory import RunDirectory
from rlhf_kit.tokenization import (
    collate_prompts,
    load_tokenizer,
    prepare_tokenizer,
    stop_token_ids,
)

run = RunDirectory.open(run_dir, preset_name=preset, seed=seed)
config = run.config
found = model_directories(run.path, config)
start = resolve_model(found.get("sft", found["base"]))
print_main("the model that answers:", "sft" if "sft" in found else "base")

# %% [markdown]
# ## Theory on one screen
#
# To sample token $t$ a model needs the keys and values of all tokens before
# it, in every layer. One step for $B$ rows must at least read
#
# $$\text{bytes} = W + 2\,L\,H_{kv}\,D\,b\sum_{i=1}^{B} T_i$$
#
# and does about $2 W/b$ operations a row with them, far too few to keep a GPU
# busy. So the bytes over the bandwidth $\beta$ are the **floor** of a step:
# whatever is slower than $\text{bytes}/\beta$ waits for something else.
#
# | symbol | variable |
# |---|---|
# | $W$, bytes of all weights | `weights` |
# | $L$ layers, $H_{kv}$ heads of keys and values of size $D$ | `config` |
# | $b$, bytes a number | `element_size()` |
# | $T_i$, tokens of row $i$ so far | `lengths` |
# | $u_{i,t}$, which picks token $t$ of row $i$ | `uniforms(seeds, t)` |
#
# Three things waste time beyond the floor: reading the sequence again for
# every token, computing rows that have ended, and waiting for the host.

# %% [markdown]
# ## 1. The naive loop reads everything again
#
# Four prompts, greedy. Each token costs a forward pass over all tokens before
# it.

# %%
tokenizer = load_tokenizer(start)
prepare_tokenizer(tokenizer)
model = load_causal_lm(start, tokenizer).to(local_device()).eval()
pad, eos = tokenizer.pad_token_id, stop_token_ids(tokenizer, model)
prompts = keep_fitting(tokenizer, Blend(config.data, seed)["ppo"], config.data)
four = collate_prompts(tokenizer, prompts.rows[:4], seeds=range(4))
four = four.to(local_device())


# %%
@torch.no_grad()
def naive(ids: list[int], limit: int) -> tuple[list[int], int]:
    """A greedy answer, and how many tokens were read for it."""
    answer, read = [], 0
    while len(answer) < limit and not (answer and answer[-1] in eos):
        tokens = torch.tensor([ids + answer], device=local_device())
        answer.append(int(model(input_ids=tokens).logits[0, -1].argmax()))
        read += tokens.shape[1]
    return answer, read


begin = time.perf_counter()
four_ids = [
    ids[mask].tolist()
    for ids, mask in zip(four.input_ids, four.attention_mask, strict=True)
]
answers = [naive(ids, max_new_tokens) for ids in four_ids]
naive_seconds = time.perf_counter() - begin
for answer, read in answers:
    print_main(f"{read:5d} tokens read for", repr(tokenizer.decode(answer)))

# %% [markdown]
# ## 2. What was read before does not change
#
# Attention is causal: a later token changes nothing about the keys and values
# of an earlier one. We look at them, in the longest of the four prompts and
# in its first half.

# %%
ids = max(four_ids, key=len)
half = len(ids) // 2
with torch.no_grad():
    whole, part = (
        model(
            input_ids=torch.tensor([x], device=local_device()), use_cache=True
        )
        for x in (ids, ids[:half])
    )
for layer in (0, -1):
    a = whole.past_key_values.layers[layer].keys[0, :, :half]
    b = part.past_key_values.layers[layer].keys[0]
    gap = float((a - b).abs().max())
    print_main(
        f"layer {layer:2d}: largest difference of {a.numel()} keys {gap:.1e}"
    )
    assert gap < 1e-4


# %% [markdown]
# So they are kept: each step reads one token. The draft with transformers'
# own growing cache:


# %%
@torch.no_grad()
def cached(ids: list[int], limit: int) -> tuple[list[int], int]:
    answer, read, past, new = [], 0, None, ids
    while len(answer) < limit and not (answer and answer[-1] in eos):
        tokens = torch.tensor([new], device=local_device())
        out = model(input_ids=tokens, past_key_values=past, use_cache=True)
        past, read = out.past_key_values, read + tokens.shape[1]
        answer.append(int(out.logits[0, -1].argmax()))
        new = answer[-1:]
    return answer, read


saved = [cached(ids, max_new_tokens) for ids in four_ids]
assert [a for a, _ in saved] == [a for a, _ in answers]
total = [sum(read for _, read in x) for x in (answers, saved)]
print_main(f"tokens read: {total[0]} naively, {total[1]} with a cache")

# %% [markdown]
# The library's `Decoder` does the same for all rows at once, and gives the
# same tokens. Its cache is one preallocated block a layer, with a *slot* for
# each row.

# %%
decoder = Decoder(model, eos_token_ids=eos, pad_token_id=pad)
greedy = GenerationConfig(max_new_tokens=max_new_tokens, temperature=0)
rollout = decoder.generate(four, greedy)
for (answer, _), row, mask in zip(
    answers, rollout.response_ids, rollout.response_mask, strict=True
):
    assert row[mask].tolist() == answer
print_main("greedy tokens equal the naive loop's")

# %% [markdown]
# ## 3. A row that ended costs nothing
#
# Answers differ in length. A batch that waits for its longest row computes
# padding; slots are refilled instead. Below, `rows` prompts in a quarter as
# many slots.

# %%
many = collate_prompts(
    tokenizer,
    prompts.rows[:rows],
    seeds=[1000 * seed + i for i in range(len(prompts.rows[:rows]))],
).to(local_device())
slots = max(1, rows // 4)
sampling = GenerationConfig(max_new_tokens=max_new_tokens, slots=slots)
ragged = decoder.generate(many, sampling)
stats = decoder.last_stats
lengths = ragged.response_mask.sum(1)
waiting = int(lengths.max()) * len(lengths)
print_main(f"{stats.new_tokens} tokens; a waiting batch computes {waiting}")
print_main(
    f"{stats.slots} slots, {stats.occupancy:.0%} of them busy on average"
)

# %% [markdown]
# What a row samples depends on its prompt and its seed, and not on the slot
# or the rows around it. So refilling changes no answer:

# %%
alone = decoder.generate(
    many, GenerationConfig(max_new_tokens=max_new_tokens, slots=len(lengths))
)
same = (alone.response_ids == ragged.response_ids).float().mean()
print_main(
    f"tokens equal with {slots} and with {len(lengths)} slots: {same:.1%}"
)

# %% [markdown]
# ## 4. Sampling where the logits are
#
# One number $u$ picks a token: the first whose cumulative probability exceeds
# it. It comes from the row's seed and the position alone, so no random state
# has to be kept, and the GPU can make it itself. The draft, and the library:

# %%
logits = torch.tensor([[0.0, 1.0, 2.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
u = uniforms(torch.tensor([7, 8, 9]), torch.tensor([0]))[:, 0]
ours, logprob = draw(log_distribution(logits, temperature=1.0), u)
drafts = []
for row, number in zip(logits.softmax(-1).tolist(), u.tolist(), strict=True):
    token, below = 0, row[0]
    while below <= number:
        token += 1
        below += row[token]
    drafts.append(token)
print_main("u:", [f"{x:.2f}" for x in u.tolist()], "tokens:", drafts)
assert drafts == ours.tolist()

# %% [markdown]
# ## 5. One set of weights, two modes
#
# The engine generates from the very parameters that the optimiser wrote: no
# copy, nothing to bring up to date. We generate, take one step that makes an
# answer likelier, and generate again.

# %%
engine = HybridEngine(
    model,
    EngineConfig(),
    OptimizerConfig(learning_rate=1e-2, schedule="constant"),
    total_steps=1,
    eos_token_ids=eos,
    pad_token_id=pad,
)
engine.eval()
before = engine.generate(four, greedy)
engine.train()
target = four.input_ids.roll(1, 0)
logits = engine(input_ids=four.input_ids, use_cache=False).logits
engine.backward(torch.nn.functional.cross_entropy(logits.mT, target))
engine.step()
engine.eval()
after = engine.generate(four, greedy)
changed = tokenizer.decode(after.response_ids[0], skip_special_tokens=True)
print_main("after one bad step:", repr(changed[:60]))
assert after.response_ids.tolist() != before.response_ids.tolist()

# %% [markdown]
# ## 6. On a GPU: towards the floor
#
# There the waits for the host are what remains. A step of a 24-layer model is
# three hundred small kernels, each started by Python; so the whole step is
# recorded once as a CUDA graph and replayed with one call. Attention is a
# Triton kernel that reads every row's own length and no more. What stands
# between two matrix products is compiled into one kernel (one layer is
# compiled, the others share its code), and products that read the same input
# become one. `python benchmarks/ideas.py` measured what each is worth (before
# the last idea, in `linear_kernels.py`: few rows leave cuBLAS most of the chip
# idle, so a product's sum is cut into parts):


# %%
def results(name: str) -> dict:
    """What a benchmark of this repository left."""
    path = launch.ROOT / "benchmarks" / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


ideas = results("ideas")
speeds = ideas["tokens_per_second"]
print_main(ideas["device"], ideas["model"], "batch", ideas["batch"])
for idea, speed in speeds.items():
    print_main(f"{speed:9,.0f} tokens/s  {idea}")

# %%
plot_bars(speeds, label="tokens a second") if in_notebook() else None

# %% [markdown]
# What you should see: a cache is worth the most, and the graph with compiled
# layers four times what Python alone can start. Our slots without a graph are
# slower than transformers' own loop on a GPU: they mask what lies behind a
# row's end instead of not reading it, and only the Triton kernel mends that.
#
# Side by side with transformers' compiled static cache
# (`python benchmarks/decode.py`), and the floor of the same GPU:

# %%
decode = results("decode")
table = [
    (name, batch, cells["transformers_static"], cells["ours"])
    for name, model_ in decode["models"].items()
    for batch, cells in model_["batches"].items()
]
cards = {model_["device"] for model_ in decode["models"].values()}
print_main(*cards, "decoding alone, tokens a second")
for name, batch, peer, mine in table:
    a, b = peer["decode_tokens_per_second"], mine["decode_tokens_per_second"]
    print_main(
        f"{name:13s} {batch:>3s} rows: transformers {a:7,.0f}, ours {b:7,.0f} "
        f"({b / a:.1f} times), {mine['share_of_floor']:.0%} of the floor"
    )

# %%
plot_step_times(decode) if in_notebook() else None

# %% [markdown]
# What you should see: our bars come close to the floor, the closer the more
# bytes a step has to read; grouped heads (Llama, Qwen) make the peer slower,
# which copies them, and us faster. At batch 16 what is left is the start of
# two hundred kernels; at 256 the card draws all the power it may.
#
# ## Checks

# %%
assert total[1] < total[0]
assert stats.new_tokens == int(ragged.response_mask.sum())
assert stats.occupancy > 0.3
assert float(u.min()) >= 0 and float(u.max()) < 1
for _, _, peer, mine in table:
    assert mine["decode_tokens_per_second"] > peer["decode_tokens_per_second"]

# %% [markdown]
# ## Exercises
#
# [Solutions](solutions/06_hybrid_engine.ipynb).
#
# 1. How many tokens does the naive loop read for a prompt of $P$ tokens and
#    an answer of $R$, and how many does the cached one? Check your formula on
#    the four prompts.
# 2. Compute the floor of a step for this model at 100 GB/s and for batches of
#    1 and 256, both with 64 tokens of context. Which term dominates?
# 3. Vary `slots` from 1 to `rows` and print occupancy and steps. Where is the
#    product of slots and steps smallest, and why not at 1?
# 4. Count how often a token that was drawn with `seed` would be drawn by the
#    next seed too. *Hint: two draws agree with probability $\sum p^2$.*
#
# ## On your GPU
#
#     python benchmarks/limits.py          # the parts of a step, by themselves
#     python benchmarks/decode.py          # this notebook's table
#     python benchmarks/ppo_step.py opt-1.3b --who peer ours
#     rlhf-kit plan --actor-model facebook/opt-1.3b --gpu-memory 24
#
# ## What to read next
#
# `rlhf_kit/hybrid_engine/`: `decode.py` is the loop, `step.py` the captured
# step, `kernels.py` and `linear_kernels.py` the Triton kernels. Notebook 07
# asks what PPO does when the reward model is wrong.
