"""What do logprobs of a large vocabulary cost: logits of all tokens at once, or a chunk at a time?

One head of D x V over N response tokens: the loss and its backward pass, with the gradient of the
hidden states and of the head (trained) or of the hidden states alone (frozen, as under LoRA), and
the forward alone (scored, as for old and ref logprobs). Peak memory is what the pass adds to its
inputs: on a GPU the allocator's peak, on a CPU the growth of a forked process's resident memory.
Seconds are the fastest of some rounds, on a CPU the processor's, which other load hardly touches.

    python benchmarks/logprobs.py [--tokens 2048] [--width 768] [--vocabulary 50272]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_kit.functional import token_logprobs
from rlhf_kit.pipeline import commit
from rlhf_kit.token_logprobs import chunked_logprobs

RESULT = Path(__file__).parent / "results" / "logprobs.json"
CHUNKS = (256, 1024, 4096)
WORK = ("trained", "frozen", "scored")


def logprobs(hidden: Tensor, weight: Tensor, ids: Tensor, chunk: int | None) -> Tensor:
    """[N] by chunks, or from all logits at once where `chunk` is None."""
    if chunk is None:
        return token_logprobs(F.linear(hidden, weight)[None], ids[None])[0]
    return chunked_logprobs(hidden, weight, ids, chunk=chunk)[:, 0]


def passes(arguments: argparse.Namespace, work: str, chunk: int | None) -> dict[str, float]:
    """Bytes and seconds of one pass; called in a process of its own on a CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    torch.manual_seed(1)
    n, d, v = arguments.tokens, arguments.width, arguments.vocabulary
    hidden = torch.randn(n, d, device=device, dtype=dtype).requires_grad_(work != "scored")
    weight = (torch.randn(v, d, device=device, dtype=dtype) / d**0.5).requires_grad_(
        work == "trained"
    )
    ids = torch.randint(v, (n,), device=device)
    small = slice(0, 8)
    logprobs(hidden[small], weight, ids[small], chunk)  # loads what the first call loads
    before = peak(device, reset=True)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds = []
    for _ in range(arguments.rounds):
        hidden.grad = weight.grad = None
        start = clock()
        loss = logprobs(hidden, weight, ids, chunk).sum()
        if loss.requires_grad:
            loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    return {"bytes": peak(device) - before, "seconds": min(seconds)}


def peak(device: torch.device, *, reset: bool = False) -> int:
    """Bytes of the highest mark so far; with `reset`, of now where the device can tell."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_a_process(run: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What `run` returns, from a forked process, whose high-water mark is its own."""
    if torch.cuda.is_available():
        return run()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, json.dumps(run()).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        found = pipe.read()
    os.waitpid(child, 0)
    return json.loads(found)


def main() -> None:
    parser = argparse.ArgumentParser(description="logprobs from whole logits and by chunks")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=50272)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bf16", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    report: dict[str, Any] = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": gpu or f"{platform.processor() or platform.machine()}, one thread",
        "torch": torch.__version__,
        "commit": commit(),
        **vars(arguments),
    }
    for work in WORK:
        report[work] = {}
        for chunk in (None, *CHUNKS):
            with torch.set_grad_enabled(work != "scored"):
                found = in_a_process(lambda w=work, c=chunk: passes(arguments, w, c))
            report[work][str(chunk or "whole")] = found
            print(
                f"{work:8s} {str(chunk or 'whole'):6s} {found['bytes'] / 1e6:8.0f} MB "
                f"{found['seconds']:7.3f} s"
            )
    name = f"{'gpu' if gpu else 'cpu'} {'bf16' if arguments.bf16 else 'fp32'}"
    reports = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    RESULT.write_text(json.dumps({**reports, name: report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
