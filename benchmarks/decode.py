"""Generation: transformers' `generate` and ours, side by side, over the weights being trained.

    python benchmarks/decode.py [--models opt-1.3b qwen2.5-1.5b llama-3.2-1b] [--batches 16 64 256]
    python benchmarks/decode.py --models --plot docs/images/decode.png     # draws, measures nothing

Prompts of 256 random tokens, 256 new tokens each, sampled at temperature 1, bf16, random
weights. Ours generates from the parameters of a HybridEngine (ZeRO-1), the others from a plain
model. For each: tokens a second over the whole call, and over decoding alone: the time of
reading the prompts is taken off, which for transformers is that of one plain forward. The floor
is what reading every weight and every cached key and value once a token would take at this
device's own copy bandwidth, measured first. Models that are not asked for keep what the file says
of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from shapes import causal_lm, environment, prompts

from rlhf_kit.config import EngineConfig, GenerationConfig, OptimizerConfig
from rlhf_kit.hybrid_engine.engine import HybridEngine
from rlhf_kit.models import disable_dropout, response_logits
from rlhf_kit.plots import plot_step_times

PROMPT, NEW, REPEATS = 256, 256, 2


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy far larger than any cache."""
    size = 2**31 if torch.cuda.is_available() else 2**24
    a = torch.randn(
        size, device="cuda" if torch.cuda.is_available() else "cpu", dtype=torch.bfloat16
    )
    b = torch.empty_like(a)
    times = []
    for _ in range(8):
        synchronize()
        begin = time.perf_counter()
        b.copy_(a)
        synchronize()
        times.append(time.perf_counter() - begin)
    return 2 * a.nbytes / statistics.median(times[2:])


def floor_seconds(model: Any, batch: int, bandwidth: float) -> float:
    """Seconds of one decode step at the device's bandwidth, the context half grown."""
    config = model.config.get_text_config()
    weights = {p.data_ptr(): p.nbytes for p in model.parameters()}
    embedding = model.get_input_embeddings().weight
    if embedding.data_ptr() != model.get_output_embeddings().weight.data_ptr():
        del weights[embedding.data_ptr()]  # rows of it are looked up, no more
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    context = batch * (PROMPT + NEW / 2)
    cached = context * config.num_hidden_layers * kv_heads * size * 2 * embedding.element_size()
    return (sum(weights.values()) + cached) / bandwidth


def median_seconds(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(REPEATS):
        synchronize()
        begin = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def timed(generate: Callable[[], Any], read_prompts: Callable[[], Any]) -> dict[str, float]:
    """Seconds of the first call, of later ones, and of their prompts alone."""
    begin = time.perf_counter()
    generate()
    synchronize()
    first = time.perf_counter() - begin
    read_prompts()
    return {
        "first": first,
        "prompt": median_seconds(read_prompts),
        "total": median_seconds(generate),
    }


def figures(seconds: dict[str, float], batch: int, floor: float) -> dict[str, float]:
    decoding = (seconds["total"] - seconds["prompt"]) / (NEW - 1)
    return {
        "tokens_per_second": batch * NEW / seconds["total"],
        "decode_tokens_per_second": batch / decoding,
        "decode_step_ms": 1e3 * decoding,
        "share_of_floor": floor / decoding,
        "prompt_seconds": seconds["prompt"],
        "first_call_seconds": seconds["first"],
    }


@torch.no_grad()
def plain(model: Any, batch: int, vocabulary: int, **kwargs: Any) -> dict[str, float]:
    ids = prompts(batch, PROMPT, vocabulary).input_ids.to(model.device)
    mask = torch.ones_like(ids)
    return timed(
        lambda: model.generate(
            input_ids=ids, attention_mask=mask, min_new_tokens=NEW, max_new_tokens=NEW,
            do_sample=True, temperature=1.0, top_k=0, pad_token_id=1, **kwargs,
        ),
        lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1),
    )  # fmt: skip


def ours(engine: HybridEngine, batch: int, vocabulary: int) -> dict[str, float]:
    rows = prompts(batch, PROMPT, vocabulary).to(engine.device)
    captured = list[float]()

    def generate(new: int) -> None:
        config = GenerationConfig(max_new_tokens=new, min_new_tokens=new, slots=batch)
        engine.generate(rows, config)
        captured.append(engine.last_stats.capture_seconds)

    seconds = timed(lambda: generate(NEW), lambda: generate(1))
    return {**seconds, "captured": sum(captured)}


@torch.no_grad()
def parity(engine: HybridEngine, vocabulary: int) -> dict[str, float]:
    """Logprobs of what ours sampled against two of transformers' attentions, in nats."""
    config = GenerationConfig(max_new_tokens=64, slots=16)
    rollout = engine.generate(prompts(16, 64, vocabulary).to(engine.device), config)
    model: Any = engine.module
    before, found = model.config._attn_implementation, {}
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        logits = response_logits(
            model, rollout.sequences, rollout.attention_mask, rollout.response_ids.shape[1]
        )
        logprobs = logits.float().log_softmax(-1)
        found[name] = logprobs.gather(-1, rollout.response_ids[..., None])[..., 0]
    model.set_attn_implementation(before)
    mask = rollout.response_mask
    gap = (rollout.logprobs - found["sdpa"])[mask].abs()
    spread = (found["eager"] - found["sdpa"])[mask].abs()
    return {
        "ours_to_sdpa_mean": float(gap.mean()),
        "ours_to_sdpa_max": float(gap.max()),
        "eager_to_sdpa_mean": float(spread.mean()),
        "eager_to_sdpa_max": float(spread.max()),
    }


PARITY: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 1024, "word_embed_proj_dim": 256},
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 1024},
    **{
        kind: {"intermediate_size": 512, "num_key_value_heads": 2, "head_dim": 64}
        for kind in ("llama", "mistral", "qwen2", "qwen3", "gemma")
    },
}
"""Small models of eight architectures."""


def parity_of(kind: str) -> dict[str, float]:
    import transformers

    config = transformers.AutoConfig.for_model(
        kind, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, vocab_size=2048,
        max_position_embeddings=512, **PARITY[kind],
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.06)
    disable_dropout(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = parity(engine_around(model.to(device, dtype_of(device))), 2048)
    print(f"{kind}: {found}", flush=True)
    return found


def dtype_of(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def engine_around(model: Any) -> HybridEngine:
    cuda = model.device.type == "cuda"
    engine = HybridEngine(
        model,
        EngineConfig(zero_stage=1, dtype="bf16" if cuda else "fp32", keep_cache=True),
        OptimizerConfig(),
        total_steps=10,
        eos_token_ids=[2],
        pad_token_id=1,
    )
    engine.eval()
    return engine


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(name: str, batches: list[int], peers: list[str], bandwidth: float) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = causal_lm(name, device=device, dtype=dtype_of(device))
    vocabulary = model.config.vocab_size
    rows: dict[str, Any] = {str(b): {} for b in batches}
    for peer in peers:
        kwargs = {"cache_implementation": "static"} if peer == "static" else {}
        for batch in batches:
            floor = floor_seconds(model, batch, bandwidth)
            seconds = plain(model, batch, vocabulary, **kwargs)
            rows[str(batch)][f"transformers_{peer}"] = figures(seconds, batch, floor)
            report(name, batch, f"transformers {peer}", rows[str(batch)][f"transformers_{peer}"])
        torch.compiler.reset()
        free()
    engine = engine_around(model)
    for batch in batches:
        floor = floor_seconds(engine.module, batch, bandwidth)
        seconds = ours(engine, batch, vocabulary)
        rows[str(batch)]["ours"] = figures(seconds, batch, floor)
        rows[str(batch)]["ours"]["captured"] = seconds["captured"]
        report(name, batch, "ours", rows[str(batch)]["ours"])
    found = parity(engine, vocabulary)
    print(f"{name}: {found}", flush=True)
    return {"batches": rows, "parity": found}


def report(name: str, batch: int, who: str, row: dict[str, float]) -> None:
    print(
        f"{name} batch {batch:4d} {who:22s} {row['tokens_per_second']:9,.0f} tokens/s, decoding "
        f"alone {row['decode_tokens_per_second']:9,.0f} ({row['decode_step_ms']:.2f} ms a step, "
        f"{row['share_of_floor']:.0%} of the floor), prompts {row['prompt_seconds']:.3f} s, "
        f"first call {row['first_call_seconds']:.1f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["opt-1.3b", "qwen2.5-1.5b", "llama-3.2-1b"])
    parser.add_argument("--batches", nargs="+", type=int, default=[16, 64, 256])
    parser.add_argument("--peers", nargs="*", default=["static"], choices=["static", "dynamic"])
    parser.add_argument("--parity", action="store_true", help="also small models of 8 kinds")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/decode.json"))
    parser.add_argument("--plot", type=Path, help="also draw all that the output holds")
    args = parser.parse_args()
    if args.plot is not None and args.models and "static" not in args.peers:
        parser.error("--plot draws transformers' static cache beside ours: leave it among --peers")
    results: dict[str, Any] = {"models": {}}
    if args.output.is_file():
        results = json.loads(args.output.read_text())

    def keep() -> None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1) + "\n")

    if args.models:
        bandwidth = copy_bandwidth()
        print(f"copy {bandwidth / 1e9:,.0f} GB/s", flush=True)
        origin = {**environment(), "copy_bytes_per_second": bandwidth}
        for name in args.models:
            found = measure(name, args.batches, args.peers, bandwidth)
            results["models"][name] = {**origin, **found}
            keep()
            free()
    if args.parity:
        results["parity"] = {**environment(), "kinds": {kind: parity_of(kind) for kind in PARITY}}
        keep()
    if args.plot is not None:
        plot_step_times(results, args.plot)


if __name__ == "__main__":
    main()
