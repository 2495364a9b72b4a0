"""The kernels of one decode step on a GPU: how often each runs, how long, and the time between.

    python benchmarks/step_profile.py [--model opt-1.3b] [--batches 16 64 256]

As `decode.py` decodes: prompts of 256 tokens, 256 new ones, bf16, random weights. Medians over the
20 steps in the middle, where the context is half grown.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from decode import NEW, PROMPT, engine_around
from shapes import causal_lm, environment, prompts
from torch.profiler import ProfilerActivity, profile

from rlhf_kit.config import GenerationConfig

STEPS = 20


def kernels_of_steps(engine: Any, batch: int, vocabulary: int) -> list[list[Any]]:
    """The kernels of each step in the middle, in order."""
    rows = prompts(batch, PROMPT, vocabulary).to(engine.device)
    generation = GenerationConfig(max_new_tokens=NEW, min_new_tokens=NEW, slots=batch)
    engine.generate(rows, generation)  # compiles
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        engine.generate(rows, generation)
        torch.cuda.synchronize()
    events = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    ends = [i + 1 for i, event in enumerate(events) if "_advance" in event.name]  # a step's last
    steps = [events[begin:end] for begin, end in pairwise(ends)]
    first = (len(steps) - STEPS) // 2
    return steps[first : first + STEPS]


def summary(steps: list[list[Any]]) -> dict[str, Any]:
    """Microseconds: of a step, between its kernels, and of each kind of kernel."""
    times = defaultdict[str, list[float]](list)
    for step in steps:
        for event in step:
            times[event.name[:80]].append(event.time_range.end - event.time_range.start)
    last = [step[-1].time_range.end for step in steps]
    step_us = statistics.median(b - a for a, b in pairwise(last))
    busy = sum(sum(spent) for spent in times.values()) / len(steps)
    kinds = [
        {
            "kernel": name,
            "times": len(spent) / len(steps),
            "us": statistics.median(spent),
            "us_a_step": sum(spent) / len(steps),
        }
        for name, spent in times.items()
    ]
    kinds.sort(key=lambda kind: -kind["us_a_step"])
    return {"step_us": step_us, "between_us": step_us - busy, "kernels": kinds}


def main() -> None:
    parser = argparse.ArgumentParser(description="the kernels of one decode step")
    parser.add_argument("--model", default="opt-1.3b")
    parser.add_argument("--batches", nargs="+", type=int, default=[16, 64, 256])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/step_profile.json"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here, and the kernels of a step are those of a GPU")
    model = causal_lm(args.model, device="cuda", dtype=torch.bfloat16)
    engine = engine_around(model)
    results: dict[str, Any] = {**environment(), "model": args.model, "batches": {}}
    for batch in args.batches:
        found = summary(kernels_of_steps(engine, batch, model.config.vocab_size))
        results["batches"][str(batch)] = found
        print(f"{batch} rows: {found['step_us']:.0f} us, {found['between_us']:.0f} between kernels")
        for kind in found["kernels"]:
            print(f"  {kind['times']:5.1f} x {kind['us']:7.2f} us  {kind['kernel']}", flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
