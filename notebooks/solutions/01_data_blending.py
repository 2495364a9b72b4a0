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
# # 01 Data blending: solutions
#
# To the exercises of [notebook 01](../01_data_blending.ipynb). Try them
# first.

# %% tags=["parameters"]
run_dir: str = "runs/notebooks"  # where the example file goes
rows: int = 1000  # demonstrations whose padding is measured
batch_size: int = 32  # rows a batch

# %%
from rlhf_kit import launch

launch.read_flags(globals())

# %%
import json
import unicodedata

from rlhf_kit import toy_world
from rlhf_kit.blending import (
    Blend,
    interleave,
    length_bucketed_batches,
    split_of,
)
from rlhf_kit.config import SourceConfig, preset
from rlhf_kit.datasets import load_source
from rlhf_kit.models import resolve_model
from rlhf_kit.plots import plot_curves
from rlhf_kit.run_directory import RunDirectory
from rlhf_kit.tokenization import (
    as_text,
    encode_demonstrations,
    load_tokenizer,
    prepare_tokenizer,
)
from rlhf_kit.types import PreferencePair

run = RunDirectory.open(run_dir, preset_name="toy")
config = preset("toy", data__rows=[rows, rows, rows])

# %% [markdown]
# ## 1. A file of your own, with a broken line
#
# Line 3 is not JSON, line 4 has nothing to choose from. Both are refused with
# their line; the other two are read.

# %%
good = {
    "prompt": "Why is it cold?",
    "chosen": "It is winter.",
    "rejected": ".",
}
lines = [
    json.dumps(good),
    json.dumps({**good, "prompt": "Why is it warm?"}),
    json.dumps(good)[:-9],
    json.dumps({**good, "rejected": good["chosen"]}),
]
file = run.path / "data" / "mine.jsonl"
file.parent.mkdir(parents=True, exist_ok=True)
file.write_text("\n".join(lines) + "\n")
mine = load_source(SourceConfig(str(file)), "reward")
assert (mine.report.read, len(mine)) == (4, 2)

# %% [markdown]
# `rlhf-kit data check mine.jsonl` says the same before a run, for all stages.
#
# ## 2. A small weight for the toy world
#
# With weights 0.1 : 1 : 1 the toy world is due every twenty-first row. The
# files run out first, the smallest of two equally weighted ones before the
# other; from there on what is left shares all places, by its weights. At the
# end the toy world alone is left, however small its weight is: weights decide
# the order, not how much there is.

# %%
sizes, weights = [1000, 400, 200], [0.1, 1.0, 1.0]
names = ["toy world", "file of 400", "file of 200"]
order = [source for source, _ in interleave(sizes, weights)]
curve = [
    {"step": n} | {x: order[:n].count(i) / n for i, x in enumerate(names)}
    for n in range(20, len(order) + 1, 20)
]
ends = [max(i for i, s in enumerate(order) if s == k) for k in range(3)]
for name, end in zip(names, ends, strict=True):
    print(f"{name:12} last row at place {end}")
assert ends[2] < ends[1] < ends[0] == len(order) - 1
plot_curves(curve, {"share of the first n rows": names}, xlabel="n")

# %% [markdown]
# ## 3. One letter more
#
# The hash knows no likeness. A prompt with one letter changed is placed
# anew, in proportion to the shares 2 : 4 : 4: with probability
# $0.2^2 + 0.4^2 + 0.4^2 = 0.36$ it stays with its twin, so 64 % of twins are
# parted.


# %%
def stage_of(text):
    message = {"role": "user", "content": text}
    return split_of(PreferencePair((message,)).prompt_id, config.data.split)


questions = [
    row["prompt"][-1]["content"]
    for row in toy_world.prompts(2000, seed=0, split="train")
]
parted = [stage_of(q) != stage_of(q.rstrip("?.!") + " ?") for q in questions]
share = sum(parted) / len(parted)
print(f"{share:.1%} of twins are in another stage than their question")
assert abs(share - 0.64) < 0.05


# %% [markdown]
# One could hash a *normalised* text: case, spaces and punctuation taken out.
# These twins then stay together. It costs prompts that mean different things
# (`May` and `may`, `Let's eat, Grandma`), and helps little: a paraphrase has
# another hash still. Real near-duplicates need n-grams or MinHash, a look at
# all rows, and a place of a row then depends on the other rows. The kit keeps
# the exact hash, which needs nothing but the row, and *reports* what is
# alike: `rlhf-kit data check FILES --output manifest.json` counts normalised
# twins and shared 8-grams.


# %%
def letters(text):
    kept = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c if c.isalnum() else " " for c in kept).split())


twins = [(letters(q), letters(q.rstrip("?.!") + " ?")) for q in questions]
assert all(stage_of(one) == stage_of(other) for one, other in twins)

# %% [markdown]
# ## 4. Larger mega-batches

# %%
tokenizer = load_tokenizer(resolve_model(config.actor_model))
prepare_tokenizer(tokenizer)
blend = Blend(config.data, config.seed)
train = encode_demonstrations(tokenizer, blend["sft"], config.data)
lengths = [row.length for row in train.rows]


def padding(batches):
    width = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    return 1 - sum(lengths[i] for b in batches for i in b) / width


def neighbours(batches):
    """Pairs of rows that share a batch."""
    return {(i, j) for b in batches for i in b for j in b if i < j}


# %%
shares = {}
print("mega_batch  PAD    together again in the next epoch")
for mega in (1, 4, 16, 64):
    epochs = [
        length_bucketed_batches(
            lengths, batch_size, seed=1, epoch=epoch, mega_batch=mega
        )
        for epoch in (0, 1)
    ]
    shares[mega] = padding(epochs[0])
    one, two = map(neighbours, epochs)
    again = len(one & two) / len(one)
    print(f"{mega:10}  {shares[mega]:5.1%}  {again:5.1%}")
if rows >= 1000:
    assert shares[64] < shares[4] < shares[1]

# %% [markdown]
# From 16 on there is little left to save, since one mega-batch then is half
# of these rows or more. What grows is how often the same rows meet: sorted
# by length as a whole, batches are nearly the same in every epoch, and each
# one's gradient is that of one length. Shuffled rows give gradients whose
# noise is independent, which is what the learning rate was chosen for.
#
# ## 5. Learning the prompts too

# %%
texts = as_text(train.rows)
responses = sum(row.length - row.prompt_length for row in train.rows)
# The first token of a text has no token before it that could predict it.
everything = sum(row.length - max(row.prompt_length, 1) for row in texts)
print(f"{responses} tokens count, and {everything} with the prompts")
print(f"{everything / responses:.2f} times as many")
assert everything > responses
assert all(row.prompt_length == 0 for row in texts)

# %% [markdown]
# It suits text that is no dialogue (pretraining, the mixture loss of notebook
# 04), very few or very short responses, or a model that shall write users'
# turns itself. For a chat model it spends gradient on questions that nobody
# will ask it to write.
