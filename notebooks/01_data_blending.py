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
# # 01 Data blending
#
# Three stages learn from the same few sources of text, and none may see the
# prompts of another. This notebook follows the data from raw rows to the
# tensors of a training step: schemas, splits, weights, the chat template,
# masks, padding. Name your own file in `data`, and it is about your file.
#
# | preset | hardware | minutes | peak memory |
# |---|---|---|---|
# | toy | two CPU cores | 0.1 | 0.5 GiB |

# %% tags=["parameters"]
preset: str = "toy"  # toy, consumer, cluster or a recipe
run_dir: str = "runs/notebooks"  # where example files and manifest go
seed: int | None = None  # decides what is drawn, and its order
data: str | None = None  # your own source: a file, or owner/name on the hub
toy_weight: float = 2.0  # weight of the toy world; each other source has 1
rows: int = 1000  # training rows of each stage
batch_size: int = 32  # rows a batch, where padding is measured
actor_model: str | None = None  # the model whose tokenizer is used

# %%
from rlhf_kit import launch

launch.read_flags(globals())

# %%
import dataclasses
import hashlib
import json
from collections import Counter
from pathlib import Path
from random import Random

import torch
from rlhf_kit import distributed
from rlhf_kit.blending import (
    Blend,
    epoch_order,
    interleave,
    length_bucketed_batches,
    split_of,
)
from rlhf_kit.config import SourceConfig
from rlhf_kit.datasets import (
    SCHEMAS,
    NotForThisStage,
    detect_schema,
    load_source,
)
from rlhf_kit.hybrid_engine.training import start_deepspeed
from rlhf_kit.models import load_causal_lm, position_ids, resolve_model
from rlhf_kit.plots import plot_curves, plot_histogram
from rlhf_kit.run_directory import RunDirectory

# %%
from rlhf_kit.tokenization import (
    collate_prompts,
    collate_sft,
    encode_demonstrations,
    encode_dialogue,
    encode_prompt,
    keep_fitting,
    load_tokenizer,
    prepare_tokenizer,
    render_prompt,
)
from rlhf_kit.types import STAGES, PreferencePair

# %%
start_deepspeed()  # joins the other ranks, where there are any
print_main = distributed.print_main
run = RunDirectory.open(
    run_dir, preset_name=preset, seed=seed, actor_model=actor_model
)
config = run.config
folder = run.path / "data"

# %% [markdown]
# ## On one screen
#
# *Splits.* The prompt's text is hashed to a number $u \in [0, 1)$. Stage $j$
# owns an interval whose length is its share $s_j / \sum s$. Nothing else
# decides: not the place of the row, not its source, not the seed.
#
# *Blend.* Source $i$ should give the share $w_i / \sum w$ of every prefix of
# the data. The $k$-th row of a source is *due* at time $k / w_i$; rows come
# in the order in which they are due.
#
# *Padding.* Rows of a batch are as long as its longest. The share of tokens
# that are computed for nothing is
#
# $$ 1 - \frac{\sum_{b}\sum_{i \in b} \ell_i}
# {\sum_{b} |b| \max_{i \in b} \ell_i} $$
#
# | symbol | variable |
# |---|---|
# | $u$ | from `pair.prompt_id` |
# | $s_j$ | `data.split`, for `sft`, `reward`, `ppo` |
# | $w_i$ | `SourceConfig.weight` |
# | $\ell_i$ | tokens of row $i$ |
# | $b$ | a batch of row numbers |

# %% [markdown]
# ## Three ways to write the same row
#
# Public datasets come in three shapes. The kit reads each into one record, a
# `PreferencePair`: a prompt, and up to two responses. It tells the shapes
# apart by their columns.

# %%
QUESTION, GOOD, BAD = "How do I dry the boots?", "Put them in the sun.", "No."


def hh(prompt: str, response: str) -> str:
    """A dialogue as text, in the form of HH-RLHF (Bai et al. 2022)."""
    return f"\n\nHuman: {prompt}\n\nAssistant: {response}"


def turns(prompt: str, response: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": response},
    ]


# %%
examples = [
    {"chosen": hh(QUESTION, GOOD), "rejected": hh(QUESTION, BAD)},
    {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD},
    {"messages": turns(QUESTION, GOOD)},
]
ids = set()
for example in examples:
    schema = detect_schema(example, example)
    record = SCHEMAS[schema](example)
    ids.add(record.prompt_id)
    print_main(f"{schema:10s} {sorted(example)}")
    print_main(f"{'':10s} chosen {record.chosen!r}, {record.rejected!r}")
assert len(ids) == 1  # one prompt, whatever it was written as

# %% [markdown]
# As we can see, the record is the same, and so is the prompt's id: a hash of
# roles and contents. A list of messages has no rejected response, so it can
# serve SFT and PPO, and not the reward model.
#
# ## A source is a name and a weight
#
# A source is a file, a directory, a dataset on the hub, or the toy world.
# Here we write three small files. They overlap, as public datasets do: many
# are remixes of each other. The first has every prompt twice, since two
# pairs for one prompt are common.

# %%
VERBS = (
    "dry clean store repair paint measure carry lift open fold "
    "wash polish wrap move label count sort hide draw tune"
).split()
THINGS = (
    "boots kettle basket ladder lamp blanket window violin drum chair "
    "table mirror carpet bottle barrel wagon bell fence shelf piano"
).split()
STEPS = (
    "Start slowly.",
    "Keep the parts in order.",
    "Use a soft cloth, and a little water where it does not help.",
    "Ask somebody for help if it is heavy.",
)

# %%
questions = [f"How do I {verb} the {x}?" for verb in VERBS for x in THINGS]
answers = [" ".join(STEPS[: 1 + i % 4]) for i in range(len(questions))]
known = list(zip(questions, answers, strict=True))
Random(0).shuffle(known)
files = {
    "hh": [
        {"chosen": hh(q, a), "rejected": hh(q, bad)}
        for q, a in known[:260]
        for bad in ("No.", "Figure it out yourself.")
    ],
    "preference": [
        {"prompt": q, "chosen": a, "rejected": "Why?"} for q, a in known[150:]
    ],
    "messages": [{"messages": turns(q, a)} for q, a in known[100:300]],
}

# %%
broken = [
    {"chosen": hh("Hi!", "Hello!"), "rejected": hh("Hi!", "Hello!")},
    {"chosen": hh("Hi!", "Hello!"), "rejected": hh("Hey!", "Hello!")},
    {"chosen": hh("Hi!", "Hello!"), "rejected": hh("Hi!", "")},
]
files["preference"].append({"prompt": " ", "chosen": "Hello!"})
if distributed.is_main_rank():
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in {**files, "broken": files["hh"][:9] + broken}.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        torn = '{"chosen": "\n' if name == "broken" else ""  # not JSON
        (folder / f"{name}.jsonl").write_text(text + torn)
distributed.barrier()

# %% [markdown]
# Reading a source checks every row. A row that cannot be used is refused,
# counted and reported with the place where it first happened. Nothing is
# repaired by guessing, and nothing disappears in silence. A fourth file has
# nine good rows and four broken ones:

# %%
loaded = load_source(SourceConfig(str(folder / "broken.jsonl")), "reward")
print_main(f"{loaded.report.read} rows read, {len(loaded)} are good")
assert (loaded.report.read, len(loaded)) == (13, 9)
assert set(loaded.report.refused.values()) == {1}

# %%
try:
    load_source(SourceConfig(str(folder / "messages.jsonl")), "reward")
except NotForThisStage as error:
    print_main("refused as a whole:", error)

# %% [markdown]
# ## Splitting, first draft: by index
#
# SFT, the reward model and PPO should train on different prompts. A reward
# model scores best what it was trained on; in PPO it should be asked about
# prompts that are new to it, as it will be in life.
#
# The draft does what several published codes do: shuffle the rows of each
# dataset, and cut them 2 : 4 : 4 by index.


# %%
def split_by_index(pairs: list[PreferencePair], seed: int) -> dict:
    """The draft: rows of one source, cut by their place."""
    order = Random(seed).sample(pairs, len(pairs))
    first, second = len(order) * 2 // 10, len(order) * 6 // 10
    return {
        "sft": order[:first],
        "reward": order[first:second],
        "ppo": order[second:],
    }


# %%
def leak(splits: dict[str, list[PreferencePair]]) -> dict[str, float]:
    """Share of a stage's prompts that another stage trains on."""
    prompts = {s: {p.prompt_id for p in splits[s]} for s in STAGES}
    shares = {}
    for stage, own in prompts.items():
        others = set().union(*(prompts[s] for s in STAGES if s != stage))
        shares[stage] = len(own & others) / max(len(own), 1)
    return shares


# %%
names = [data] if data else [str(folder / f"{n}.jsonl") for n in files]
sources = tuple(SourceConfig(name) for name in names)
read = [list(load_source(source, "ppo").pairs) for source in sources]
for source, pairs in zip(sources, read, strict=True):
    distinct = len({pair.prompt_id for pair in pairs})
    name = Path(source.name).name
    print_main(f"{name:16s} {len(pairs)} rows, {distinct} prompts")

# %%
by_index: dict[str, list[PreferencePair]] = {s: [] for s in STAGES}
for pairs in read:
    for stage, part in split_by_index(pairs, seed=1).items():
        by_index[stage] += part
for stage, share in leak(by_index).items():
    count = len(by_index[stage])
    print_main(f"{stage:6s} {count:4d} rows, {share:4.0%} seen elsewhere")
if not data:
    assert leak(by_index)["ppo"] > 0.5

# %% [markdown]
# As we can see, most prompts are in more than one stage. The cut was
# disjoint in *rows*, and rows are the wrong thing to count: one source
# repeats a prompt, and two sources share it.
#
# ## Splitting, as the library does it: by content
#
# The prompt itself says where it belongs. Here are four prompts, with the
# hash, the number that is read from it, and the stage.


# %%
def split_draft(messages: tuple, shares: tuple) -> tuple[str, float, str]:
    """Hash, place in [0, 1) and stage of a prompt."""
    text = json.dumps(
        [[m["role"], m["content"]] for m in messages], ensure_ascii=False
    )
    digest = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
    place = int(digest[:13], 16) / 2**52
    sft, reward = shares[0] / sum(shares), sum(shares[:2]) / sum(shares)
    stage = "sft" if place < sft else "reward" if place < reward else "ppo"
    return digest, place, stage


# %%
split = config.data.split
for question in questions[:4]:
    message = {"role": "user", "content": question}
    digest, place, stage = split_draft((message,), split)
    print_main(f"{digest[:13]}  {place:.3f}  {stage:6s}  {question}")

# %%
every = [pair for pairs in read for pair in pairs]
by_content: dict[str, list[PreferencePair]] = {s: [] for s in STAGES}
for pair in every:
    digest, _, stage = split_draft(pair.prompt, split)
    assert digest == pair.prompt_id
    assert stage == split_of(pair.prompt_id, split)
    by_content[stage].append(pair)
for stage, share in leak(by_content).items():
    part = len(by_content[stage]) / len(every)
    print_main(f"{stage:6s} {part:4.0%} of rows, {share:4.0%} seen elsewhere")
assert set(leak(by_content).values()) == {0.0}

# %% [markdown]
# The leak is 0, by construction. The shares come out near 20, 40 and 40
# percent, not exactly: that is the price, and it shrinks with more prompts.
# There is a second gain: adding a source moves no row to another stage, so a
# model trained last week stays a fair judge of the new blend.
#
# Other bits of the same hash hold back `eval_share` of each split for
# evaluation.

# %% [markdown]
# ## Weights, and what becomes of them
#
# A weight is a wish for a share of the data. The draft gives each row the
# time when it is due, and sorts. With weights 2 : 1 the first source should
# come twice as often, from the first row on.


# %%
def interleave_draft(sizes, weights):
    """(source, row) of all rows, in the order in which they are due."""
    due = [
        ((k + 1) / weight, source, k)
        for source, (n, weight) in enumerate(zip(sizes, weights, strict=True))
        for k in range(n)
    ]
    return [(source, k) for _, source, k in sorted(due)]


order = interleave_draft([6, 4], [2, 1])
print_main(" ".join(f"{'ab'[source]}{k}" for source, k in order))
for sizes, weights in (([6, 4], [2, 1]), ([9, 1, 5], [1.0, 0.5, 3.0])):
    assert interleave_draft(sizes, weights) == list(interleave(sizes, weights))

# %% [markdown]
# As we can see, source `a` runs out after six rows, and `b` goes on alone.
# No row is repeated to keep a share; the kit says so instead. Now the blend
# of this run: the toy world and the files.

# %%
blend_config = dataclasses.replace(
    config.data,
    sources=(SourceConfig("toy_world", weight=toy_weight), *sources),
    rows=(rows, rows, rows),
)
blend = Blend(blend_config, config.seed)
for stage in STAGES:
    found = Counter(Path(pair.source).name for pair in blend[stage])
    print_main(f"{stage:6s} {dict(found)}\n")

# %% [markdown]
# What you should see: the files are small. Where one runs out, a printed line
# says by how much it falls short of its weight. `messages.jsonl` has no
# pairs and gives the reward stage nothing.
#
# How fast a source runs out is best seen as a curve: the share of each
# source in the first n rows, in the blend and in a plain shuffled
# concatenation of the same rows.


# %%
def shares(pairs: list[PreferencePair], how: str) -> list[dict]:
    """The share of each source in the first n rows, for growing n."""
    seen = [Path(pair.source).name for pair in pairs]
    every = max(len(pairs) // 40, 1)
    return [
        {"step": n}
        | {f"{name} {how}": seen[:n].count(name) / n for name in set(seen)}
        for n in range(every, len(pairs) + 1, every)
    ]


# %%
mixed = list(blend["ppo"])
concatenated = Random(config.seed).sample(mixed, len(mixed))
kinds = {"blended": mixed, "concatenated": concatenated}
curves = [row for how, pairs in kinds.items() for row in shares(pairs, how)]
in_order = [Path(source.name).name for source in blend_config.sources]
plot_curves(
    curves,
    {name: [f"{name} {how}" for how in kinds] for name in in_order},
    xlabel="first n rows",
    columns=2,
)

# %% [markdown]
# What you should see: blended, every share starts at its weight (0.4 for the
# toy world at weight 2, 0.2 for each file) and keeps it until a source runs
# out. Concatenated, the weights do not matter: a large source is large. A
# run that stops early has seen what its weights ask for only in a blend.

# %% [markdown]
# ## The chat template, and what the loss sees
#
# A model reads ids. The chat template writes a dialogue as one text, and the
# tokenizer cuts it. Prompt and response are encoded apart and joined as ids,
# so the response has the very ids that generation would sample. SFT learns
# the response alone: its tokens are green (in a script: in brackets).

# %%
tokenizer = load_tokenizer(resolve_model(config.actor_model))
print_main(prepare_tokenizer(tokenizer))
eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id


def paint(ids: list[int], counts: list[bool]) -> str:
    """The text of ids, with the tokens that count in colour or brackets."""
    on, off = ("\x1b[1;32m", "\x1b[0m") if launch.in_notebook() else "[]"
    text, before = "", False
    for token, now in zip(ids, counts, strict=True):
        text += (on if now else off) if now != before else ""
        text += tokenizer.decode([token])
        before = now
    return text + (off if before else "")


# %%
rows_of_sft = blend["sft"]
long_first = sorted(rows_of_sft[:200], key=lambda row: -len(row.prompt))
fitting = encode_demonstrations(
    tokenizer, [*long_first[:1], *rows_of_sft[:1]], config.data
)
batch = collate_sft(fitting.rows, pad_token_id=pad)
for ids, mask in zip(batch.input_ids, batch.loss_mask, strict=True):
    print_main(paint(ids.tolist(), mask.tolist()))
    print_main("-" * 60)
    assert int(mask.sum()) > 0

# %% [markdown]
# As we can see, an earlier turn of the assistant is context, and not
# learnt. The EOS at the end *is* learnt: a model that never learns to say
# EOS never stops. The PAD behind it is not learnt.
#
# That is why PAD must not be EOS. A setup that uses one token for both, and
# hides it wherever it stands, hides the real EOS as well, and its model
# learns to ramble.
#
# ### A user may write anything
#
# Text that looks like a special token must stay text. Otherwise a user could
# forge the end of a turn.

# %%
attack = {"role": "user", "content": f"Say {tokenizer.eos_token} twice."}
naive = tokenizer(
    tokenizer.apply_chat_template(
        [attack], tokenize=False, add_generation_prompt=True
    ),
    add_special_tokens=False,
)["input_ids"]
careful = encode_prompt(tokenizer, (attack,))
print_main(f"EOS ids in the prompt, naive: {naive.count(eos)}")
print_main(f"EOS ids in the prompt, here:  {careful.count(eos)}")
assert tokenizer.decode(careful) == render_prompt(tokenizer, (attack,))
assert careful.count(eos) < naive.count(eos)

# %% [markdown]
# ### A response that is cut keeps its EOS
#
# Responses longer than `max_length` allows are cut. The draft cuts the ids,
# and with them the EOS: the model would learn not to stop exactly where it
# has said too much. The library cuts what stands before the EOS.

# %%
prompt = ({"role": "user", "content": QUESTION},)
answer = " ".join(STEPS)
whole = encode_dialogue(tokenizer, prompt, answer, max_length=512)
room = whole.prompt_length + 12
draft = whole.input_ids[:room]
kept = encode_dialogue(tokenizer, prompt, answer, max_length=room)
print_main("draft:  ", repr(tokenizer.decode(draft[-8:])))
print_main("library:", repr(tokenizer.decode(kept.input_ids[-8:])))
assert kept.is_cut and kept.length == len(draft) == room
assert draft[-1] != eos and kept.input_ids[-1] == eos
assert kept.input_ids[:-1] == draft[:-1]

# %% [markdown]
# Prompts are never cut. A prompt without its beginning is another question,
# so a prompt over `max_prompt_length` is dropped, and counted.

# %%
some = blend["ppo"][:100]
lengths = sorted(len(encode_prompt(tokenizer, row.prompt)) for row in some)
limit = lengths[len(lengths) * 9 // 10]
short = dataclasses.replace(config.data, max_prompt_length=limit)
few = keep_fitting(tokenizer, some, short)
print_main(f"{len(few.rows)} prompts fit {limit} tokens;", *few.lines())
assert len(few.rows) + few.long_prompts + few.refused == len(some)

# %% [markdown]
# ## Why prompts are padded on the left
#
# Generation goes on behind the last column. With padding on the right, that
# column holds a PAD in all rows but the longest. Here are three prompts, as
# `.` for a PAD and `#` for a token.

# %%
by_length = sorted(
    few.rows, key=lambda row: len(encode_prompt(tokenizer, row.prompt))
)
three = [by_length[0], by_length[len(by_length) // 2], by_length[-1]]
left = collate_prompts(tokenizer, three, seeds=[0, 0, 0])
encoded = [encode_prompt(tokenizer, row.prompt) for row in three]

# %%
P = left.input_ids.shape[1]
right_ids = torch.tensor([ids + [pad] * (P - len(ids)) for ids in encoded])
right_mask = torch.arange(P) < torch.tensor([[len(i)] for i in encoded])
for mine, theirs in zip(left.attention_mask, right_mask, strict=True):
    picture = ["".join(".#"[int(x)] for x in m) for m in (mine, theirs)]
    print_main("   ".join(picture))

# %%
model = load_causal_lm(config.actor_model, tokenizer, dtype="fp32")


@torch.no_grad()
def next_logits(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B, V] logits behind the last column of [B, P] prompts."""
    positions = position_ids(mask)
    return model(
        input_ids=ids, attention_mask=mask, position_ids=positions
    ).logits[:, -1]


# %%
alone = torch.cat(
    [
        next_logits(ids, torch.ones_like(ids, dtype=torch.bool))
        for ids in (torch.tensor([row]) for row in encoded)
    ]
)
with_left = next_logits(left.input_ids, left.attention_mask)
with_right = next_logits(right_ids, right_mask)
for how, logits in (("left", with_left), ("right", with_right)):
    error = (logits - alone).abs().amax(dim=1)
    shown = "  ".join(f"{e:9.6f}" for e in error.tolist())
    print_main(f"padded on the {how:5s}, error of the logits: {shown}")
torch.testing.assert_close(with_left, alone, atol=1e-3, rtol=0)

# %% [markdown]
# What you should see: on the left the logits are those of each prompt by
# itself, up to rounding. On the right only the longest row is correct; the
# others continue after a PAD. Two things make it work: positions are counted
# from the mask (`position_ids`), not from the column, and masks are made
# from lengths. Batches for SFT and the reward model are padded on the right;
# nothing is generated from them, so both sides would do.

# %% [markdown]
# ## Batches of equal length
#
# A batch is as wide as its longest row. Rows of similar length belong
# together. Eight rows show it, in batches of two:


# %%
def pad_share(batches: list[list[int]], lengths: list[int]) -> float:
    """Tokens computed for nothing, as a share of all tokens."""
    width = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    return 1 - sum(lengths[i] for b in batches for i in b) / width


small = [3, 9, 4, 10, 3, 9, 5, 10]
plain = [[0, 1], [2, 3], [4, 5], [6, 7]]
bucketed = length_bucketed_batches(small, 2, seed=1, epoch=0)
for name, batches in (("in order", plain), ("bucketed", bucketed)):
    widths = [[small[i] for i in batch] for batch in batches]
    print_main(f"{name}: {widths} pads {pad_share(batches, small):.0%}")
assert abs(pad_share(plain, small) - (1 - 53 / 76)) < 1e-9
assert pad_share(bucketed, small) < pad_share(plain, small)

# %% [markdown]
# Sorting all rows would save most, and would show the model short rows
# first, or the same neighbours in every epoch. The library shuffles, cuts
# into mega-batches of sixteen batches, sorts inside each, and shuffles the
# batches. Measured on the demonstrations of this blend:

# %%
train = encode_demonstrations(tokenizer, rows_of_sft, config.data)
print_main(len(train.rows), "demonstrations", *train.lines())
lengths = [row.length for row in train.rows]
n, size, seeds = len(lengths), batch_size, {"seed": config.seed, "epoch": 0}
shuffled = epoch_order(n, **seeds)
in_length = sorted(range(n), key=lambda i: lengths[i])
orders = {
    "shuffled": [shuffled[i : i + size] for i in range(0, n, size)],
    "bucketed": length_bucketed_batches(lengths, size, **seeds),
    "sorted": [in_length[i : i + size] for i in range(0, n, size)],
}

# %%
longest = config.data.max_length
saved = {"max_length": 1 - sum(lengths) / (n * longest)}
saved |= {name: pad_share(b, lengths) for name, b in orders.items()}
for name, share in saved.items():
    print_main(f"{name:10s} {share:6.1%} of the tokens are PAD")
assert sorted(i for b in orders["bucketed"] for i in b) == list(range(n))
if n >= 8 * size:
    assert saved["bucketed"] < saved["shuffled"] < saved["max_length"]

# %%
plot_histogram(
    {
        "prompt": [row.prompt_length for row in train.rows],
        "response": [row.length - row.prompt_length for row in train.rows],
    },
    label="tokens",
    of="rows",
)

# %% [markdown]
# What you should see: padding everything to `max_length` wastes most of the
# work, shuffled batches a good part, bucketed batches a few percent. Sorting
# saves hardly more. The wider the histogram, the more there is to save.

# %% [markdown]
# ## The manifest: what was this model trained on?
#
# `manifest` describes what was read: rows, shares, refusals, and a digest of
# the rows in their order. Equal digests mean equal data.

# %%
manifest = blend.manifest()
if distributed.is_main_rank():
    target = folder / "manifest.json"
    target.write_text(json.dumps(manifest, indent=1))
for stage, told in manifest["stages"].items():
    print_main(f"{stage}: {told['rows']} rows, digest {told['digest']}")
    for source in told["sources"]:
        print_main(
            f"   {Path(source['name']).name:17s} weight {source['weight']}",
            f"share {source['share']:.2f}",
            f"refused {sum(source['refused'].values())}",
        )


# %% [markdown]
# The digest depends on the sources, the configuration and the seed.


# %%
def digest(seed: int) -> str:
    """The digest of a hundred prompts of the toy world."""
    only_toy = dataclasses.replace(
        blend_config, sources=blend_config.sources[:1], rows=(0, 0, 100)
    )
    again = Blend(only_toy, seed)
    assert len(again["ppo"]) == 100
    return again.manifest()["stages"]["ppo"]["digest"]


print_main(digest(1), digest(1), digest(2))
assert digest(1) == digest(1) != digest(2)

# %% [markdown]
# ## Checks

# %%
parts = {stage: list(blend[stage]) for stage in STAGES}
assert set(leak(parts).values()) == {0.0}
assert all(len(part) <= rows for part in parts.values())
assert all(row.input_ids[-1] == eos for row in train.rows)
for row in train.rows[:50]:
    assert row.input_ids.count(pad) == 0
print_main("no prompt is in two stages, every response ends with EOS")

# %% [markdown]
# ## Exercises
#
# [Solutions](solutions/01_data_blending.ipynb).
#
# 1. Write a JSON Lines file of your own with a prompt, a chosen and a
#    rejected response a line, and pass it as `data`. Break a line on
#    purpose. *Hint: the report names the line.*
# 2. Set `toy_weight` to 0.1 and look at the left plot. Which source runs out
#    first, and what happens to the others' shares after that?
# 3. Change one letter of a question in `messages.jsonl`. Can the question
#    now be in another stage than its twin in `hh.jsonl`? What would you hash
#    to prevent it, and what would that cost?
# 4. Call `length_bucketed_batches` with `mega_batch` 1, 4, 16 and 64, and
#    plot the share of PAD. Why not always 64? *Hint: look at the lengths of
#    one batch after another.*
# 5. Make SFT learn the prompts as well (`as_text` in
#    `rlhf_kit.tokenization`). How many more tokens count? When would you
#    want that? *Hint: notebook 04 does, in the mixture loss.*
#
# ## Your data in a run, and on a cluster
#
# Sources are named once, when a run starts; its stages find them in
# `run.json`:
#
#     rlhf-kit train --preset consumer --data mine.jsonl=2 \
#         --data Anthropic/hh-rlhf=1 --output-dir runs/mine
#     deepspeed --num_gpus 8 notebooks/04_ppo.py --run_dir runs/mine
#
# Order and splits depend on the seed and the text alone, never on the number
# of GPUs.
#
# ## What to read next
#
# Notebook 02 trains on the first split. `rlhf_kit/blending.py` and
# `rlhf_kit/tokenization.py` are the library behind this page.
#
# - Bai et al. 2022, *Training a helpful and harmless assistant with
#   reinforcement learning from human feedback*, arXiv 2204.05862.
# - Ouyang et al. 2022, *Training language models to follow instructions with
#   human feedback*, arXiv 2203.02155, appendix A: three data sets, split by
#   user and deduplicated, for the same reason as here.
