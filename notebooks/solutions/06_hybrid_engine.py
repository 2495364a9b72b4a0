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
# # Solutions to 06 The hybrid engine

# %% tags=["parameters"]
preset: str = "toy"  # toy, consumer, cluster or a recipe
run_dir: str = "runs/notebooks"  # a run whose SFT model answers, if it has one
rows: int = 32  # prompts that are answered at once
max_new_tokens: int = 44  # longest answer
seed: int = 1  # of the sampling

# %%
from rlhf_kit import launch

launch.read_flags(globals())

# %%
import torch
from rlhf_kit.blending import Blend
from rlhf_kit.config import GenerationConfig
from rlhf_kit.distributed import local_device, print_main
from rlhf_kit.encoded_rows import keep_fitting
from rlhf_kit.evaluate import model_directories
from rlhf_kit.hybrid_engine.decode import Decoder
from rlhf_kit.hybrid_engine.sampling import draw, log_distribution, uniforms
from rlhf_kit.models import load_causal_lm, resolve_model
from rlhf_kit.run_directory import RunDirectory
from rlhf_kit.tokenization import (
    collate_prompts,
    load_tokenizer,
    prepare_tokenizer,
    stop_token_ids,
)

run = RunDirectory.open(run_dir, preset_name=preset, seed=seed)
found = model_directories(run.path, run.config)
start = resolve_model(found.get("sft", found["base"]))
tokenizer = load_tokenizer(start)
prepare_tokenizer(tokenizer)
model = load_causal_lm(start, tokenizer).to(local_device()).eval()
data = run.config.data
prompts = keep_fitting(tokenizer, Blend(data, seed)["ppo"], data).rows[:rows]
batch = collate_prompts(tokenizer, prompts, seeds=range(len(prompts)))
decoder = Decoder(
    model,
    eos_token_ids=stop_token_ids(tokenizer, model),
    pad_token_id=tokenizer.pad_token_id,
)

# %% [markdown]
# ## 1. Tokens read
#
# Token $t$ of the answer is sampled after reading $P + t - 1$ tokens, so the
# naive loop reads $\sum_{t=1}^{R} (P + t - 1) = RP + R(R-1)/2$ of them. The
# cached one reads the prompt once and then each token of the answer but the
# last, which nobody needs to read: $P + R - 1$.

# %%
greedy = GenerationConfig(max_new_tokens=max_new_tokens, temperature=0)
rollout = decoder.generate(batch.to(local_device()), greedy)
P = batch.attention_mask.sum(1).tolist()
R = rollout.response_mask.sum(1).tolist()
naive = sum(r * p + r * (r - 1) // 2 for p, r in zip(P, R, strict=True))
cached = sum(p + r - 1 for p, r in zip(P, R, strict=True))
stats = decoder.last_stats
counted = stats.prompt_tokens + stats.row_steps
print_main(f"naive {naive}, cached {cached}; the decoder counted {counted}")
assert counted == cached

# %% [markdown]
# ## 2. The floor
#
# With one row the weights dominate: the cache of 64 tokens is small beside
# them. With 256 rows every one brings its own keys and values, and they do.

# %%
text = model.config.get_text_config()
weights = sum(p.nbytes for p in model.parameters())
kv_heads = getattr(text, "num_key_value_heads", text.num_attention_heads)
head = getattr(text, "head_dim", text.hidden_size // text.num_attention_heads)
size = next(model.parameters()).element_size()
token = 2 * text.num_hidden_layers * kv_heads * head * size
for B in (1, 256):
    cache = B * 64 * token
    floor = (weights + cache) / 100e9
    print_main(
        f"batch {B:3d}: weights {weights / 1e6:.1f} MB, cache "
        f"{cache / 1e6:.1f} MB, floor {1e6 * floor:.0f} us"
    )

# %% [markdown]
# ## 3. Slots
#
# One slot is never empty, but its steps are as many as all tokens together,
# and a step has a fixed cost beside its rows. With as many slots as rows none
# is refilled, and the last long answer keeps all others company: slots times
# steps grow again.

# %%
for slots in (1, 4, 8, 16, len(prompts)):
    sampling = GenerationConfig(max_new_tokens=max_new_tokens, slots=slots)
    decoder.generate(batch.to(local_device()), sampling)
    stats = decoder.last_stats
    print_main(
        f"{stats.slots:3d} slots: {stats.steps:4d} steps, product "
        f"{stats.slots * stats.steps:5d}, {stats.occupancy:.0%} busy"
    )
    assert 0 < stats.occupancy <= 1

# %% [markdown]
# ## 4. Two seeds
#
# Independent draws agree with probability $\sum_v p_v^2$.

# %%
n, logits = 4000, torch.tensor([2.0, 1.0, 0.0, 0.0])
logprobs = log_distribution(logits.expand(n, 4), temperature=1.0)
numbers = uniforms(torch.arange(n), torch.tensor([0, 1]))
first, second = (draw(logprobs, numbers[:, i])[0] for i in range(2))
agree = float((first == second).float().mean())
expected = float(logits.softmax(0).square().sum())
print_main(f"agree {agree:.3f}, expected {expected:.3f}")
assert abs(agree - expected) < 0.04
