"""Two hundred switches between generating and training: memory stays, and so does the speed.

    python benchmarks/switches.py [--switches 200]

OPT-350M's shape, bf16, ZeRO-1: 32 prompts of 64 tokens, 32 new tokens, one optimiser step on
them; once with everything of generation freed for training, once with it kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from decode import dtype_of, synchronize
from shapes import causal_lm, environment, prompts

from rlhf_kit.config import EngineConfig, GenerationConfig, OptimizerConfig
from rlhf_kit.hybrid_engine.engine import HybridEngine
from rlhf_kit.token_logprobs import chosen_logprobs


def measure(name: str, switches: int, keep: bool) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    model = causal_lm(name, device=device, dtype=dtype_of(device))
    vocabulary = model.config.vocab_size
    engine = HybridEngine(
        model,
        EngineConfig(zero_stage=1, dtype="bf16" if cuda else "fp32", keep_cache=keep),
        OptimizerConfig(learning_rate=1e-5),
        total_steps=switches,
        eos_token_ids=[2],
        pad_token_id=1,
    )
    generation = GenerationConfig(max_new_tokens=32, min_new_tokens=32, slots=32)
    seconds, training, generating, reserved = [], [], [], []
    for number in range(switches):
        batch = prompts(32, 64, vocabulary, seed=number + 1).to(engine.device)
        synchronize()
        begin = time.perf_counter()
        engine.eval()
        rollout = engine.generate(batch, generation)
        if cuda:
            generating.append(torch.cuda.memory_allocated())
        engine.train()
        rows, width = rollout.sequences.shape
        places = torch.arange(rows * width, device=engine.device).view(rows, width)[:, 64:]
        logprobs, _ = chosen_logprobs(engine, rollout.sequences, places.flatten(), chunk=1024)
        engine.backward(-logprobs.mean())
        engine.step()
        del rollout, logprobs
        synchronize()
        seconds.append(time.perf_counter() - begin)
        if cuda:
            training.append(torch.cuda.memory_allocated())
            reserved.append(torch.cuda.memory_reserved())
    settled = seconds[5:]
    fifth = max(1, len(settled) // 5)
    parts = [settled[at : at + fifth] for at in range(0, len(settled), fifth)][:5]
    found = {
        "first_seconds": seconds[0],
        "seconds_by_fifths": [statistics.median(part) for part in parts],
        "fastest_by_fifths": [min(part) for part in parts],  # what else the host does aside
        "training_bytes": training[2::20],
        "generating_bytes": generating[2::20],
        "reserved_bytes": reserved[2::20],
        "training_growth_bytes": training[-1] - training[2] if cuda else 0,
        "generating_growth_bytes": generating[-1] - generating[2] if cuda else 0,
        "reserved_growth_bytes": reserved[-1] - reserved[2] if cuda else 0,
    }
    print(f"keep_cache {keep}: {found}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--switches", type=int, default=200)
    parser.add_argument("--model", default="opt-350m")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/switches.json"))
    args = parser.parse_args()
    results: dict[str, Any] = {**environment(), "switches": args.switches, "model": args.model}
    for keep in (False, True):
        results["kept" if keep else "freed"] = measure(args.model, args.switches, keep)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
