"""Generation of OPT-13B's shape on one GPU and on two that share every weight.

    torchrun --nproc-per-node 2 benchmarks/two_gpus.py [--model opt-13b] [--batch 64]

The same prompts, `--batch` in all: one rank decodes them alone from the whole model, then both
decode them together (tensor parallelism), each from its half. 256 prompt tokens, 128 new ones,
bf16, random weights, adapters on a frozen base under ZeRO-1. Whole PPO steps on two GPUs are
cases of `ppo_step.py`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from decode import PROMPT, dtype_of, median_seconds
from shapes import causal_lm, environment, prompts

from rlhf_kit import distributed
from rlhf_kit.config import EngineConfig, GenerationConfig, LoRAConfig, OptimizerConfig
from rlhf_kit.hybrid_engine.engine import HybridEngine
from rlhf_kit.hybrid_engine.training import start_deepspeed
from rlhf_kit.models import add_lora

NEW = 128


def engine_of(name: str, ranks: int) -> HybridEngine:
    """`ranks` generate together; adapters are merged into what they generate from."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = causal_lm(name, device=device, dtype=dtype_of(device))
    lora = LoRAConfig(rank=8)
    add_lora(model, lora)
    engine = HybridEngine(
        model,
        EngineConfig(
            zero_stage=1,
            dtype="bf16" if device == "cuda" else "fp32",
            lora=lora,
            generation_tp=ranks,
            keep_cache=True,
        ),
        OptimizerConfig(),
        total_steps=1,
        eos_token_ids=[2],
        pad_token_id=1,
    )
    engine.eval()
    return engine


def rate(engine: HybridEngine, batch: int, ranks: int, vocabulary: int) -> dict[str, float]:
    """Tokens a second of decoding alone, and over the whole call; all ranks call it."""
    rows = prompts(batch // ranks, PROMPT, vocabulary, seed=1 + distributed.rank())
    rows = rows.to(engine.device)

    def generate(new: int) -> Any:
        config = GenerationConfig(max_new_tokens=new, min_new_tokens=new, slots=batch // ranks)
        return engine.generate(rows, config)

    seconds = {}
    for new in (1, NEW):
        generate(new)
        seconds[new] = median_seconds(lambda new=new: generate(new))
    return {
        "decode_tokens_per_second": batch * (NEW - 1) / (seconds[NEW] - seconds[1]),
        "tokens_per_second": batch * NEW / seconds[NEW],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="opt-13b")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/two_gpus.json"))
    args = parser.parse_args()
    start_deepspeed()
    engine = engine_of(args.model, 1)
    vocabulary = engine.module.config.vocab_size  # type: ignore[union-attr]
    one = rate(engine, args.batch, 1, vocabulary)  # both ranks alone, each on its GPU
    del engine
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    two = rate(engine_of(args.model, 2), args.batch, 2, vocabulary)
    speed_up = two["decode_tokens_per_second"] / one["decode_tokens_per_second"]
    distributed.print_main(f"one {one}, two {two}: {speed_up:.2f} times")
    if distributed.is_main_rank():
        result = {**environment(), "model": args.model, "batch": args.batch}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({**result, "one": one, "two": two}, indent=1) + "\n")


if __name__ == "__main__":
    main()
