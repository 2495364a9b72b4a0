"""The fullest moment of a phase, as a sum of named terms, and the terms of any trained model."""

from __future__ import annotations

import math
from typing import NamedTuple

from rlhf_kit.hybrid_engine.dry_run import Pass
from rlhf_kit.hybrid_engine.engine_memory import EngineMemory
from rlhf_kit.types import Stage

Terms = dict[str, int]
"""Bytes, by what takes them."""
WORKSPACE = 2 * 32 * 2**20
"""cuBLAS's: 32 MiB on Hopper (aten/src/ATen/cuda/CublasHandlePool.cpp), for the thread of the
forward and that of the backward pass."""


class Moment(NamedTuple):
    """The fullest one of a phase, or of a part of it, on one GPU."""

    stage: Stage
    phase: str
    """As `metrics.Phases` calls it, or `load`."""
    name: str
    terms: Terms

    @property
    def peak(self) -> int:
        """Bytes, as `torch.cuda.max_memory_allocated` counts them."""
        return sum(self.terms.values()) + WORKSPACE


def share(rows: float, ranks: int) -> int:
    """Of so many rows, those of one rank."""
    return max(math.ceil(rows / ranks), 1)


def masters(name: str) -> str:
    return f"{name} fp32 masters"


def adamw(name: str) -> str:
    return f"{name} AdamW moments"


def held(name: str, engine: EngineMemory) -> Terms:
    """What is there from AdamW's first step on, whatever happens."""
    return {
        name: engine.weights,
        masters(name): engine.masters,
        adamw(name): engine.moments,
        f"{name} gradient buffers": engine.buffers,
    }


def loading(name: str, engine: EngineMemory) -> Terms:
    """While DeepSpeed takes a model over."""
    return {name: engine.weights, f"{name}, taken over": engine.loading}


def training(name: str, engine: EngineMemory, run: Pass) -> Terms:
    """A forward and backward pass, and the gradients of those before."""
    return {
        gradients(name): engine.gradients,
        "gradients on their way": engine.arriving,
        "gathered weights": engine.gathered,
        "activations": run.kept,
        "temporaries": run.peak - run.kept,
    }


def gradients(name: str) -> str:
    return f"{name} gradients"


def stepping(name: str, engine: EngineMemory, *, first: bool) -> Terms:
    """Gradients, and what an optimiser step makes of them; in the first the moments too."""
    taken = engine.first_step if first else engine.step - engine.moments
    return {f"{name} gradients and copies": taken}
