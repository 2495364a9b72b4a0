"""What each idea of the decoding loop is worth: OPT-1.3B, from the naive loop to the final one.

    python benchmarks/ideas.py [--model opt-1.3b] [--batch 64]

Prompts of 256 tokens, tokens a second of the decoding alone, bf16, random weights. The naive loop
reads the whole sequence again for every token; its figure comes from a few tokens at the average
length. Notebook 06 explains the steps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from decode import PROMPT, dtype_of, engine_around, median_seconds, synchronize
from shapes import causal_lm, environment, prompts

from rlhf_kit.config import GenerationConfig
from rlhf_kit.hybrid_engine import compiled_layers, linears, step
from rlhf_kit.hybrid_engine.decode import Decoder

NEW = 64


@torch.no_grad()
def naive(model: Any, batch: int) -> float:
    ids = prompts(batch, PROMPT + NEW // 2, model.config.vocab_size).input_ids.to(model.device)

    def run() -> None:
        for _ in range(3):
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
            logits.float().softmax(-1).multinomial(1)

    run()
    return 3 * batch / median_seconds(run)


def with_cache(model: Any, batch: int) -> float:
    """transformers' `generate` with its own growing cache."""
    ids = prompts(batch, PROMPT, model.config.vocab_size).input_ids.to(model.device)
    mask = torch.ones_like(ids)

    @torch.no_grad()
    def generate(new: int) -> None:
        model.generate(
            input_ids=ids, attention_mask=mask, min_new_tokens=new, max_new_tokens=new,
            do_sample=True, temperature=1.0, top_k=0, pad_token_id=1,
        )  # fmt: skip

    return rate(generate, batch)


def ours(model: Any, batch: int, *, captured: bool) -> float:
    decoder = Decoder(model, eos_token_ids=[2], pad_token_id=1, captured=captured)
    rows = prompts(batch, PROMPT, model.config.vocab_size).to(model.device)

    def generate(new: int) -> None:
        decoder.generate(
            rows, GenerationConfig(max_new_tokens=new, min_new_tokens=new, slots=batch)
        )

    return rate(generate, batch)


def rate(generate: Callable[[int], Any], batch: int) -> float:
    """Tokens a second, the prompts taken off."""
    for new in (1, NEW):
        generate(new)
        synchronize()
    seconds = median_seconds(lambda: generate(NEW)) - median_seconds(lambda: generate(1))
    return batch * (NEW - 1) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="opt-1.3b")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/ideas.json"))
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = causal_lm(args.model, device=device, dtype=dtype_of(device))
    found: dict[str, float] = {}

    def note(idea: str, tokens_per_second: float) -> None:
        found[idea] = tokens_per_second
        print(f"{idea:60s} {tokens_per_second:10,.0f} tokens/s", flush=True)

    note("every token reads the whole sequence", naive(model, args.batch))
    note("a cache that grows (transformers)", with_cache(model, args.batch))
    note("a cache in slots, masked attention", ours(model, args.batch, captured=False))
    if device == "cuda":
        layers = step.compiled_layers
        step.compiled_layers = lambda model: nullcontext()
        note(
            "attention over each row's own length, CUDA graphs",
            ours(model, args.batch, captured=True),
        )
        step.compiled_layers = layers
        names = ("fold_scale", "fuse_relu", "fuse_sum", "join_linears")
        rewrites = {name: getattr(compiled_layers, name) for name in names}
        few, linears.FEW = linears.FEW, 0
        for name in names:
            setattr(compiled_layers, name, lambda *_: None)
        note("what is pointwise compiled into few kernels", ours(model, args.batch, captured=True))
        for name, rewrite in rewrites.items():
            setattr(compiled_layers, name, rewrite)
        compiled_layers._compiled_forwards.clear()
        engine = engine_around(model)
        note(
            "one product for queries, keys and values; ReLU and sum inside their products",
            ours(engine.module, args.batch, captured=True),
        )
        linears.FEW = few
        note(
            "products of few rows in a kernel of ours, their sums in parts",
            ours(engine.module, args.batch, captured=True),
        )
    result = {**environment(), "model": args.model, "batch": args.batch, "tokens_per_second": found}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
