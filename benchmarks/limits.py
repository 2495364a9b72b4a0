"""What one decode step of OPT-1.3B can reach on this GPU, part by part, each in a CUDA graph.

    python benchmarks/limits.py [--sweep]

Matrix products (cuBLAS, and ours where there are few rows; all of a step, and each by itself),
attention (ours, and torch's at the exact length), sampling (ours, and unfused). `--sweep` also
times other tile sizes of the attention kernel.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from decode import copy_bandwidth
from shapes import environment

from rlhf_kit.hybrid_engine import kernels, linear_kernels
from rlhf_kit.hybrid_engine.linears import FEW
from rlhf_kit.hybrid_engine.slots import Slots

HIDDEN, LAYERS, VOCABULARY = 2048, 24, 50272
CONTEXT, CAPACITY = 384, 512
WEIGHTS = {
    "opt-1.3b": ((6144, 2048), (2048, 2048), (8192, 2048), (2048, 8192)),
    "llama-3.2-1b": ((3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)),
    "qwen2.5-1.5b": ((2048, 1536), (1536, 1536), (17920, 1536), (1536, 8960)),
}
"""Outputs and inputs of a layer's products: queries, keys and values in one, as up and gate."""
SHAPES = {
    "opt-1.3b": (32, 32, 64, 24),
    "llama-3.2-1b": (32, 8, 64, 16),
    "qwen2.5-1.5b": (12, 2, 128, 28),
}
"""Query heads, key/value heads, head size, layers."""


def graph_ms(run: Callable[[], Any], repeats: int = 20) -> float:
    """Median milliseconds of a replay."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[5:])


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02


def products(batches: list[int]) -> dict[str, Any]:
    layers = [[random(*shape) for shape in WEIGHTS["opt-1.3b"]] for _ in range(LAYERS)]
    head = random(VOCABULARY, HIDDEN)
    nbytes = head.nbytes + sum(w.nbytes for layer in layers for w in layer)
    found = {}
    for batch in batches:
        x = random(batch, HIDDEN)

        def run(linear: Callable[..., Any], x: torch.Tensor = x) -> torch.Tensor:
            for qkv, out, up, down in layers:
                x = linear(linear(x, qkv)[:, :HIDDEN], out)
                x = linear(linear(x, up), down)
            return F.linear(x, head)

        kinds: dict[str, Callable[..., Any]] = {"cublas": F.linear}
        if batch <= FEW:
            kinds["ours"] = linear_kernels.linear
        found[str(batch)] = {}
        for name, linear in kinds.items():
            ms = graph_ms(lambda linear=linear: run(linear))
            found[str(batch)][name] = {"ms": ms, "bytes_per_second": 1e3 * nbytes / ms}
            line = f"products, batch {batch}, {name}: {ms:.3f} ms"
            print(f"{line}, {nbytes / ms / 1e6:,.0f} GB/s", flush=True)
    return found


def each_product(batches: list[int]) -> dict[str, Any]:
    """Microseconds of each product of a layer, among others whose weights it cannot find cached."""
    found: dict[str, Any] = {}
    for outputs, inputs in sorted({shape for shapes in WEIGHTS.values() for shape in shapes}):
        weights = [random(outputs, inputs) for _ in range(LAYERS)]
        for batch in batches:
            x, sums = random(batch, inputs), random(batch, outputs)

            def cublas(weights: Any = weights, x: Any = x, sums: Any = sums) -> None:
                for weight in weights:
                    torch.addmm(sums, x, weight.T, out=sums)

            def ours(weights: Any = weights, x: Any = x, sums: Any = sums) -> None:
                for weight in weights:
                    linear_kernels.linear(x, weight, out=sums, add=True)

            us = {run.__name__: 1e3 * graph_ms(run) / LAYERS for run in (cublas, ours)}
            found[f"{outputs}x{inputs}, {batch} rows"] = us
            print(
                f"{outputs} x {inputs}, {batch} rows: cublas {us['cublas']:.2f} us, "
                f"ours {us['ours']:.2f}",
                flush=True,
            )
    return found


def attention(name: str, batch: int, sweep: bool) -> dict[str, Any]:
    heads, kv_heads, size, layers = SHAPES[name]
    query, key, value = (
        random(heads, batch, size),
        random(kv_heads, batch, size),
        random(kv_heads, batch, size),
    )
    caches = [
        (random(batch, kv_heads, CAPACITY, size), random(batch, kv_heads, CAPACITY, size))
        for _ in range(layers)
    ]
    lengths = torch.full((batch,), CONTEXT, device="cuda")
    blocks = torch.arange(batch, device="cuda")
    nbytes = layers * 2 * batch * kv_heads * CONTEXT * size * 2

    def ours(splits: int = 0) -> None:
        for keys, values in caches:
            kernels.attend(
                query, key, value, keys, values, lengths, blocks, scale=0.1, splits=splits
            )

    def sdpa() -> None:
        q = query.transpose(0, 1)[:, :, None]
        for keys, values in caches:
            F.scaled_dot_product_attention(
                q, keys[:, :, :CONTEXT], values[:, :, :CONTEXT], enable_gqa=heads != kv_heads
            )

    found: dict[str, Any] = {"ours_ms": graph_ms(ours), "sdpa_ms": graph_ms(sdpa)}
    found["ours_bytes_per_second"] = 1e3 * nbytes / found["ours_ms"]
    line = f"attention {name}, batch {batch}: ours {found['ours_ms']:.3f} ms, "
    print(
        f"{line}{found['ours_bytes_per_second'] / 1e9:,.0f} GB/s; sdpa {found['sdpa_ms']:.3f}",
        flush=True,
    )
    if sweep:
        before, rows = kernels.tiles, []
        for block, warps, stages, splits in itertools.product(
            (32, 64, 128), (1, 2, 4), (0, 1, 2, 3, 4), (1, 2, 4, 8)
        ):
            many = batch * kv_heads * splits > 2048 and splits > 1
            if many or (heads > kv_heads and stages == 0):
                continue
            kernels.tiles = lambda *_, tile=(block, warps, stages): tile
            try:
                ms = graph_ms(lambda splits=splits: ours(splits), 10)
            except Exception as error:  # a tile too large for this GPU
                print(type(error).__name__, block, warps, stages)
                continue
            rows.append((ms, block, warps, stages, splits))
        kernels.tiles = before
        found["sweep"] = sorted(rows)[:8]
        print(
            "  best (ms, block, warps, stages, splits):", *sorted(rows)[:5], sep="\n   ", flush=True
        )
    return found


def sampling(batch: int) -> dict[str, float]:
    slots = Slots(batch, batch, 8, eos_token_ids=[2], pad_token_id=1, device=torch.device("cuda"))
    slots.begin(torch.arange(batch, device="cuda"))
    slots.fill(slots.order, list(range(batch)), [4] * batch)
    logits = 100 * random(batch, VOCABULARY)

    def ours() -> None:
        kernels.sample(
            logits, slots.order, slots.state, slots.uniform, slots.eos,
            temperature=1.0, min_new_tokens=0,
        )  # fmt: skip

    def unfused() -> None:
        logprobs = logits.float().log_softmax(-1)
        noise = -torch.log(torch.empty_like(logprobs).exponential_())
        logprobs.gather(-1, (logprobs + noise).argmax(-1, keepdim=True))

    found = {"ours_ms": graph_ms(ours), "unfused_ms": graph_ms(unfused)}
    print(f"sampling, batch {batch}: {found}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", nargs="+", type=int, default=[16, 64, 256])
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/limits.json"))
    args = parser.parse_args()
    bandwidth = copy_bandwidth()
    a, b = random(8192, 8192), random(8192, 8192)
    flops = 2 * 8192**3 / (graph_ms(lambda: a @ b) / 1e3)
    print(f"copy {bandwidth / 1e9:,.0f} GB/s, products {flops / 1e12:,.0f} TFLOP/s", flush=True)
    results = {
        **environment(),
        "copy_bytes_per_second": bandwidth,
        "flops": flops,
        "products": products(args.batches),
        "each_product": each_product([batch for batch in args.batches if batch <= FEW]),
        "attention": {
            name: {str(b): attention(name, b, args.sweep and b != 64) for b in args.batches}
            for name in SHAPES
        },
        "sampling": {str(b): sampling(b) for b in args.batches},
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
