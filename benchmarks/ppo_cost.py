"""What do the mixture loss and the average take of a PPO iteration? Seconds and bytes of one run.

    python benchmarks/ppo_cost.py MODELS OUTPUT [ITERATIONS]

`MODELS` is a run with a SFT and a reward model; settings are its own, with the actor learning from
the first iteration. Seconds are the processor's, which other load on the machine hardly touches,
and what is timed is timed inside one run: its parts saw the same machine.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ppo_run import PPORun
from torch import Tensor

from rlhf_kit import pipeline


def timed(seconds: dict[str, float], part: str, owner: Any, method: str) -> None:
    """From now on, add what this method of `owner` takes to `seconds[part]`."""
    plain = getattr(owner, method)

    def call(*arguments: Any, **named: Any) -> Any:
        start = time.process_time()
        try:
            return plain(*arguments, **named)
        finally:
            seconds[part] += time.process_time() - start

    setattr(owner, method, call)


def kept_bytes(forward: Callable[[], Any], weights: set[int]) -> int:
    """Of the tensors that a forward pass keeps for the backward pass, without the weights."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    assert result is not None  # alive until here, and so is all that it keeps
    return sum(size for place, size in kept.items() if place not in weights)


def size_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure(run: PPORun) -> dict[str, Any]:
    """All iterations, the first one (which warms up) not counted; then bytes."""
    trainer, module = run.trainer, run.engine.actor.module
    mixture, average = trainer.mixture, run.averages["ema"]
    assert mixture is not None
    average.beside = []  # the engine's average alone
    seconds: dict[str, float] = defaultdict(float)
    timed(seconds, "average", average, "update")
    timed(seconds, "mixture", mixture, "backward")
    timed(seconds, "mixture", mixture, "gradient")  # and the policy's, which it is weighed against
    timed(seconds, "mixture", trainer, "_policy_gradient")
    for iteration, prompt_batch in enumerate(run.loader):
        if iteration == 1:
            seconds.clear()
            begin = time.process_time()
        experience = trainer.generate_experience(prompt_batch)
        trainer.train_rlhf(experience)
    whole = time.process_time() - begin
    plain = whole - seconds["mixture"] - seconds["average"]
    rows = experience.rows(torch.arange(run.args.ppo.minibatch_size))
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    text = mixture._texts(run.args.ppo.micro_batch_size)[0]
    return {
        "iterations": len(run.loader) - 1,
        "seconds": {"plain": plain, **seconds},
        "share": {part: seconds[part] / plain for part in ("mixture", "average")},
        "bytes": {
            "weights": size_of(module.parameters()),
            "average": size_of(average._averages),
            "kept for the policy loss": kept_bytes(
                lambda: trainer._policy(module, rows, 1.0), weights
            ),
            "kept for the mixture loss": kept_bytes(
                lambda: mixture._loss(module, text, 1.0), weights
            ),
        },
        "commit": pipeline.commit(),
    }


def main(models: str, output: str, iterations: str = "12") -> None:
    settings = {"ppo__iterations": int(iterations), "ppo__critic_warmup_iterations": 0}
    pipeline.write_json(Path(output), measure(PPORun(Path(models), settings)))


if __name__ == "__main__":
    main(*sys.argv[1:])
