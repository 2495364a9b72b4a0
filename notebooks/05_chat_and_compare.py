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
# # 05 Chat and compare
#
# A run leaves four models behind: the base model, the SFT model, the final
# actor and its average (EMA). We talk to one of them, read them side by side,
# judge blindly, and then measure: win rates with intervals, distances of
# weights, and what each nat of KL has bought.
#
# | preset | hardware | minutes | peak memory |
# |---|---|---|---|
# | toy | two CPU cores | 0.1 | 0.5 GiB |
#
# All four models are in memory at once.

# %% tags=["parameters"]
preset: str = "toy"  # toy, consumer, cluster or a recipe
run_dir: str = "runs/notebooks"  # the run whose models are compared
prompts: int = 128  # held-out prompts that every model answers
temperature: float = 0.7  # of the chat; 0 is greedy
max_new_tokens: int = 44  # longest answer of the chat
seed: int = 0  # of the chat and the blind order

# %%
from rlhf_kit import launch

launch.read_flags(globals())

# %%
import html
import math

import numpy as np
import torch
from rlhf_kit.chat import ChatSession
from rlhf_kit.config import GenerationConfig
from rlhf_kit.distributed import derive_seed, local_device, print_main
from rlhf_kit.evaluate import (
    Actor,
    Scorer,
    blend_data,
    is_toy_world,
    logprobs,
    model_directories,
    prompt_batches,
    toy_world_data,
)
from rlhf_kit.launch import in_notebook
from rlhf_kit.measure import evaluate_actor, weight_distance
from rlhf_kit.models import load_causal_lm, resolve_model
from rlhf_kit.plots import plot_frontier, plot_histogram
from rlhf_kit.run_directory import RunDirectory
from rlhf_kit.statistics import bootstrap_interval, win_rate
from rlhf_kit.tokenization import (
    CHAT_TEMPLATE,
    collate_prompts,
    decode_response,
    encode_prompt,
    load_tokenizer,
    prepare_tokenizer,
    render_prompt,
)
from rlhf_kit.types import PreferencePair

run = RunDirectory.open(
    run_dir, preset_name=preset, evaluation__prompts=prompts
)
config = run.config


# %%
def table(**columns):
    """Print columns of equal length, their names on top."""
    texts = []
    for name, column in columns.items():
        cells = [f"{v:.3f}" if type(v) is float else str(v) for v in column]
        texts.append([name, *cells])
    widths = [max(map(len, column)) for column in texts]
    for line in zip(*texts, strict=True):
        cells = zip(line, widths, strict=True)
        print_main("  ".join(cell.rjust(width) for cell, width in cells))


# %% [markdown]
# ## Theory on one screen
#
# Two models $a$ and $b$ answer the same $N$ prompts; $g_i$ is what a judge
# thinks of response $i$. The **win rate** counts, and a tie is half a win:
#
# $$w = \frac1N \sum_i \big([g^a_i > g^b_i] + \tfrac12 [g^a_i = g^b_i]\big)$$
#
# Other prompts would have given another $w$. The **bootstrap** (Efron 1979)
# asks how other: draw $N$ of our $N$ prompts with replacement, again and
# again, and keep the middle 95 % of the means. If the interval holds 0.5, we
# have not seen a difference.
#
# How far a model has gone from the SFT model can be said in two ways. In
# **behaviour**, by the KL, estimated from its own samples; in **weights**, by
# a relative distance:
#
# $$\text{KL} \approx \frac1N \sum_i \sum_t
# \log\frac{\pi(a_{i,t})}{\pi_{sft}(a_{i,t})} \qquad
# \text{distance} = \frac{\lVert\theta - \theta_{sft}\rVert}
# {\lVert\theta_{sft}\rVert}$$
#
# A model is worth what it gains *for its KL*: the reward over $\sqrt{KL}$ is
# the frontier on which such models are compared (Gao et al. 2023).
#
# | symbol | variable |
# |---|---|
# | $g$, the judge's view | `results[name].gold["total"]`, toy world only |
# | the reward model's view | `results[name].proxy` |
# | $w$ and its interval | `win_rate(a, b).rate` |
# | KL, one a response | `results[name].kl` |
# | distance of weights | `weight_distance(a, b)["relative_l2"]` |

# %% [markdown]
# ## 1. What the run holds
#
# A model that is missing is replaced by the one it would have come from, and
# the next lines say so. Missing ones come from notebooks 02 (SFT), 03 (reward
# model) and 04 (final, EMA).

# %%
found = model_directories(run.path, config)
directories = {"base": found["base"]}
for name, instead in (("sft", "base"), ("final", "sft"), ("ema", "final")):
    directories[name] = found.get(name, directories[instead])
    if name not in found:
        print_main(f"no {name} model in {run.path}: using {instead} instead")
tokenizer = load_tokenizer(resolve_model(directories["sft"]))
prepare_tokenizer(tokenizer)

# %%
loaded = {}
for directory in set(directories.values()):
    model = load_causal_lm(
        directory, tokenizer, dtype=config.actor_engine.dtype
    )
    model = model.to(local_device()).eval()
    loaded[directory] = Actor(model, tokenizer, config.ppo.micro_batch_size)
actors = {name: loaded[path] for name, path in directories.items()}
size = sum(p.numel() for p in actors["final"].model.parameters())
print_main(f"{len(loaded)} models of {size:,} parameters each")

# %% [markdown]
# ## 2. What the model is shown
#
# A chat model continues a text. The chat template writes the dialogue as that
# text, up to the point where the assistant's turn begins. By hand, for a
# dialogue of three turns:

# %%
dialogue = [
    {"role": "user", "content": "How much is 7 plus 3?"},
    {"role": "assistant", "content": "The answer is 10."},
    {"role": "user", "content": "Now take away 4."},
]


def draft_prompt(messages):
    """What the kit's own template writes."""
    text = ""
    for message in messages:
        if message["role"] == "user":
            text += f"Human: {message['content']}\n\n"
        else:
            eos = tokenizer.eos_token
            text += f"Assistant: {message['content']}{eos}\n\n"
    return (tokenizer.bos_token or "") + text + "Assistant:"


print_main(draft_prompt(dialogue))
if tokenizer.chat_template == CHAT_TEMPLATE.read_text():
    assert draft_prompt(dialogue) == render_prompt(tokenizer, dialogue)

# %% [markdown]
# As we can see, the whole history is in the prompt: the model itself remembers
# nothing between two turns. Its own earlier turn ends with EOS, as it did in
# training. A template that differs from the one of training by a single space
# asks a question in a language the model has not learnt; that is why it is
# saved with every model.
#
# ## 3. Token by token
#
# `Decoder.stream` gives each token when it is sampled. It is the same
# sampling as in training, so a stream and a batch with equal seeds agree.

# %%
greedy = GenerationConfig(
    max_new_tokens=max_new_tokens, temperature=0.0, slots=1
)
ids = encode_prompt(tokenizer, dialogue)
stream = list(actors["final"].decoder.stream(ids, greedy, seed=seed))
table(
    token=[repr(tokenizer.decode([token.id])) for token in stream],
    logprob=[token.logprob for token in stream],
    probability=[math.exp(token.logprob) for token in stream],
)

# %%
batch = collate_prompts(
    tokenizer, [PreferencePair(tuple(dialogue))], seeds=[seed]
)
rollout = actors["final"].generate(batch, greedy)
generated = rollout.response_ids[0, rollout.response_mask[0]]
assert generated.tolist() == [token.id for token in stream]
print_main(decode_response(tokenizer, generated))

# %% [markdown]
# ## 4. A conversation
#
# `ChatSession` keeps the dialogue, streams whole characters, and lets the
# oldest turns go when the context is full. The second question makes sense
# only after the first.

# %%
chatting = GenerationConfig(
    max_new_tokens=max_new_tokens, temperature=temperature, slots=1
)


def converse(name, questions):
    """Ask one model, turn by turn, and print the answers as they come."""
    session = ChatSession(
        tokenizer,
        actors[name].decoder.stream,
        context=config.data.max_length,
        generation=chatting,
        seed=seed,
    )
    for question in questions:
        answer = "".join(session.reply(question))
        print_main(f"{'you':>6}: {question}\n{name:>6}: {answer}")


QUESTIONS = ("How much is 7 plus 3?", "Now take away 4.")
for name in actors:
    converse(name, QUESTIONS)
    print_main()

# %% [markdown]
# What you should see: the base model does not converse, it writes on. From
# SFT on, the models answer and stop. What PPO adds is in the manner and, with
# luck, in the substance. One conversation proves nothing; hence the rest of
# this notebook.
#
# To chat yourself, use a terminal. It is the same session, with input:

# %% tags=["interactive"]
print_main(f"rlhf-kit chat {resolve_model(directories['ema'])}")

# %% [markdown]
# ## 5. The same prompts for everybody
#
# Held-out prompts, sampled at temperature 1, with the same seeds for every
# model. In the toy world they come from the *validation* split: look at it as
# often as you like, and leave the test split to the report. A judge that
# training never saw gives the gold score; the reward model gives the proxy
# score. Without a toy world there is only the proxy.

# %%
if is_toy_world(config):
    held_out = toy_world_data(config, "validation")
else:
    held_out = blend_data(config, tokenizer)
batches = prompt_batches(tokenizer, held_out.prompts)
torch.manual_seed(config.seed)  # for the head of an untrained reward model
scorer = Scorer(resolve_model(run.scorer()), config, tokenizer)
sampling = GenerationConfig(
    max_new_tokens=config.generation.max_new_tokens,
    slots=config.generation.slots,
)


def sft_logprobs(rollout):
    return logprobs(actors["sft"].model, rollout, actors["sft"].rows)


# %%
measured = {
    path: evaluate_actor(
        actor.generate_for_kl,
        batches,
        sampling,
        decode=lambda ids: decode_response(tokenizer, ids),
        score=scorer.normalised,
        judge=held_out.judge,
        ref_logprobs=sft_logprobs,
    )
    for path, actor in loaded.items()
}
results = {name: measured[path] for name, path in directories.items()}
judged_by = "gold" if held_out.judge else "proxy"
verdicts = {
    name: r.gold["total"] if held_out.judge else r.proxy
    for name, r in results.items()
}

# %%
table(
    model=list(results),
    **{judged_by: [float(v.mean()) for v in verdicts.values()]},
    proxy_score=[float(r.proxy.mean()) for r in results.values()],
    kl=[float(r.kl.mean()) for r in results.values()],
    length=[float(r.length.mean()) for r in results.values()],
    ended=[float(r.ended.mean()) for r in results.values()],
)
assert results["sft"].kl.max() == results["sft"].kl.min() == 0

# %% [markdown]
# What you should see: the gold score climbs from base to SFT to final, and
# the EMA is close to the final model. The KL of the SFT model to itself is 0
# to the last bit: one forward scores its samples twice. PPO's models are a
# few nats away.
#
# The base model may get a surprisingly high *proxy* score. The reward model
# has only ever compared answers; it says nothing sensible about a text that
# is none. A proxy can be trusted where it was trained.
#
# Means hide what matters, so read some:


# %%
def asked(row):
    """The turns of a prompt, in one line."""
    return " | ".join(m["content"] for m in held_out.prompts[row].prompt)


for row in range(min(5, prompts)):
    print_main(f"user: {asked(row)}")
    for name in ("final", "ema"):
        r = results[name]
        said = r.responses[row].replace("\n", " ")
        print_main(
            f"  {name:6} {judged_by} {verdicts[name][row]:.2f}"
            f"  proxy {r.proxy[row]:+.2f}  {said}"
        )

# %% [markdown]
# ## 6. A blind comparison
#
# Whoever knows which answer is the new model's finds it better. So the order
# is shuffled, and names are hidden. Decide for each prompt, A or B, before
# you run the cell after it.

# %%
contest = [
    ("final", "sft") if derive_seed("blind", seed, i) % 2 else ("sft", "final")
    for i in range(5, min(11, len(verdicts["sft"])))
]
for row, names in enumerate(contest, start=5):
    print_main(f"{row}. {asked(row)}")
    for letter, name in zip("AB", names, strict=True):
        said = results[name].responses[row].replace("\n", " ")
        print_main(f"   {letter}: {said}")

# %%
rows = range(5, 5 + len(contest))
table(
    prompt=list(rows),
    A=[a for a, _ in contest],
    B=[b for _, b in contest],
    A_score=[float(verdicts[contest[i - 5][0]][i]) for i in rows],
    B_score=[float(verdicts[contest[i - 5][1]][i]) for i in rows],
)

# %% [markdown]
# Did you and the judge agree? And did an opener such as "With pleasure!" give
# the new model away? Then you were no longer blind; people who judge for a
# living learn such signs as well. InstructGPT's labelers agreed with each
# other in about 73 % of cases (Ouyang et al. 2022, section 3.4).
#
# ## 7. Win rates, with what we do not know
#
# By hand first, for six prompts: count, and then let the bootstrap draw from
# the six outcomes.

# %%
first = [0.90, 0.40, 1.00, 0.75, 0.20, 0.80]
second = [0.70, 0.40, 0.55, 0.80, 0.20, 0.30]
outcomes = [
    1.0 if a > b else 0.5 if a == b else 0.0
    for a, b in zip(first, second, strict=True)
]
rng = np.random.default_rng(0)
means = [
    np.mean([outcomes[i] for i in rng.integers(6, size=6)])
    for _ in range(1000)
]
low, high = np.quantile(means, [0.025, 0.975])
print_main(f"{np.mean(outcomes):.3f}, 95 % between {low:.3f} and {high:.3f}")
rate = win_rate(first, second).rate
assert math.isclose(rate.mean, float(np.mean(outcomes)))
assert math.isclose(rate.low, low) and math.isclose(rate.high, high)

# %% [markdown]
# Four of six sounds convincing, and the interval says that we know next to
# nothing. It shrinks with $1/\sqrt{N}$: about 0.09 to either side at 128
# prompts, 0.04 at 512, which the report uses. Now the models:

# %%
pairs = [("sft", "base"), ("final", "sft"), ("ema", "sft"), ("ema", "final")]
wins = {
    f"{a} against {b}": win_rate(verdicts[a], verdicts[b]) for a, b in pairs
}
table(
    pair=list(wins),
    wins=[w.wins for w in wins.values()],
    ties=[w.ties for w in wins.values()],
    losses=[w.losses for w in wins.values()],
    rate=[w.rate.mean for w in wins.values()],
    low=[w.rate.low for w in wins.values()],
    high=[w.rate.high for w in wins.values()],
    difference=[w.difference.mean for w in wins.values()],
)

# %% [markdown]
# What you should see: each stage wins clearly against the one before. EMA
# and final mostly tie: the learning rate falls to a tenth, so the last
# weights hardly move and their average is close by. The average is an
# insurance. It pays where the last steps were noisy, and costs one copy of
# the weights.

# %%
scores = {name: results[name].proxy for name in ("sft", "final", "ema")}
label = "proxy score (reward model)"
plot_histogram(scores, label=label) if in_notebook() else None

# %% [markdown]
# What you should see: PPO moves the distribution to the right, empties the
# left tail and makes it narrow, because responses become alike. A peak of its
# own far on the right is often a phrase that the reward model always pays
# for: look for it in the samples.
#
# ## 8. What PPO changed, token by token
#
# Each token of a response that the final model sampled: was it likelier under
# the final model (blue) or under the SFT model (orange)? The sum over the
# tokens is this response's estimate of the KL. Three responses: one with the
# median KL, one where nine of ten are lower, and the largest.


# %%
def coloured(tokens, values, scale=2.0):
    """Tokens on a ground of blue (positive) or orange (negative), as HTML."""
    spans = []
    for token, value in zip(tokens, values, strict=True):
        colour = "0, 114, 178" if value > 0 else "213, 94, 0"
        alpha = 0.75 * min(abs(value) / scale, 1.0)
        text = html.escape(token).replace("\n", "&#9166; ")
        spans.append(
            f'<span title="{value:+.2f} nats" style="white-space: pre-wrap; '
            f'background: rgba({colour}, {alpha:.2f})">{text}</span>'
        )
    return f"<p>{''.join(spans)}</p>"


def show_tokens(tokens, values):
    """Colours in a kernel, numbers in a script."""
    if in_notebook():
        from IPython.display import HTML, display

        display(HTML(coloured(tokens, values)))
    else:
        marked = zip(tokens, values, strict=True)
        print_main(" ".join(f"{token!r} {x:+.1f}" for token, x in marked))


# %%
def compare_tokens(row):
    """The tokens that the final model samples, and their log-ratios."""
    number, place = divmod(row, len(batches[0]))
    batch = collate_prompts(
        tokenizer,
        [held_out.prompts[row]],
        seeds=[int(batches[number].seeds[place])],
    )
    rollout = actors["final"].generate_for_kl(batch, sampling)
    ratio = (rollout.logprobs - sft_logprobs(rollout))[0].tolist()
    ids = rollout.response_ids[0].tolist()
    return [tokenizer.decode([i]) for i in ids], ratio


# %%
by_kl = np.argsort(results["final"].kl)
places = [len(by_kl) // 2, 9 * len(by_kl) // 10, -1]
for row in (int(by_kl[place]) for place in places):
    tokens, ratio = compare_tokens(row)
    print_main(f"user: {asked(row)}   ({sum(ratio):+.2f} nats)")
    show_tokens(tokens, ratio)
    if config.actor_engine.dtype == "fp32":  # bf16 may sample other tokens
        assert abs(sum(ratio) - results["final"].kl[row]) < 0.1

# %% [markdown]
# As we can see, most tokens are plain: within a word, a phrase or a fact both
# models agree. PPO has moved a few decisions: how to open, whether to add a
# closing sentence, when to stop. There the colours are. A token in orange is
# one that PPO has learnt to avoid, and that was drawn all the same. Hold the
# mouse over a token to see its number.
#
# ## 9. Small steps in weights

# %%
distances = {
    f"{a} from {b}": weight_distance(
        actors[a].model.state_dict(), actors[b].model.state_dict()
    )
    for a, b in pairs
}
table(
    models=list(distances),
    relative_l2=[d["relative_l2"] for d in distances.values()],
    changed=[f"{d['changed']:.1%}" for d in distances.values()],
)

# %% [markdown]
# What you should see: every entry has changed, and by little. SFT moves the
# weights by about 5 % of their norm, PPO by another 3 %, and the average
# stands much closer to the final model than that. The gold score in the table
# of step 5 went up by half at the same time: small steps in weights, large
# ones in behaviour. This is why distance from the SFT model is measured, and
# paid for, in KL. A distance of exactly 0 is a warning: an average that never
# moved, or a stage that did not train.
#
# ## 10. What each nat has bought

# %%
points = [
    {
        "name": name,
        "kl": float(results[name].kl.mean()),
        "reward": interval.mean,
        "low": interval.low,
        "high": interval.high,
    }
    for name in ("sft", "final", "ema")
    for interval in [bootstrap_interval(verdicts[name])]
]
table(**{key: [point[key] for point in points] for key in points[0]})
plot_frontier(points) if in_notebook() else None

# %% [markdown]
# What you should see: SFT stands at 0, where the axis begins. Up is better,
# left is cheaper. EMA and final stand side by side, with overlapping
# intervals: a difference as small as theirs is not one. More training, or a
# smaller `kl_coef`, would move a point to the right. Whether also up is what
# notebook 07 asks.
#
# ## Checks

# %%
assert all(len(r.responses) == prompts for r in results.values())
same = win_rate(verdicts["sft"], verdicts["sft"]).rate
assert same.mean == same.low == same.high == 0.5
for r in results.values():
    assert np.isfinite(r.proxy).all() and np.isfinite(r.kl).all()
    assert (r.length <= config.generation.max_new_tokens).all()
if {"final", "ema"} <= found.keys():
    assert distances["ema from final"]["relative_l2"] > 0

# %% [markdown]
# ## Exercises
#
# [Solutions](solutions/05_chat_and_compare.ipynb).
#
# 1. Chat at temperature 0, 0.7 and 1.5. Which family of questions breaks
#    first? *Hint: arithmetic has one right token, greetings have many.*
# 2. Judge 20 prompts blindly, and compute how often you agree with the gold
#    score. Put an interval on it. *Hint: `bootstrap_interval`.*
# 3. Best of n: let the SFT model answer each prompt four times and keep the
#    answer with the highest proxy score. Its KL is at most
#    $\log n - (n-1)/n$ nats. Where does it stand on the frontier?
# 4. Halfway between two models: average the weights of SFT and final, load
#    them with `load_state_dict`, and add the point. Is it above the line that
#    connects the two?
# 5. Compare a model with itself under other seeds. Why is the win rate not
#    0.5, and what does its interval hold?
#
# ## As a script, and for the whole report
#
# One process is enough here; a launcher's other ranks would only repeat it.
#
#     python notebooks/05_chat_and_compare.py --run_dir runs/demo
#     rlhf-kit report runs/demo
#     rlhf-kit chat runs/demo --checkpoint ema
#
# ## What to read next
#
# Notebook 07 trains until the proxy score rises and the gold score falls.
# `docs/metrics.md` explains every key of the report.
