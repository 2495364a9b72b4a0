"""The linear layers of compiled layers, as operators: what to multiply how, for how many rows.

Shapes: N rows, H input size, O output size, O_i of one of several layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Where a product is faster in our kernel than in cuBLAS (`benchmarks/limits.py`, `each_product`).
FEW = 64
"""At most so many rows."""
LEAST_BYTES = 16 * 2**20
"""With more than 16 rows, no smaller a weight: what is small is read in no time."""
MOST_OUTPUTS = 10240
"""No more outputs: they keep all multiprocessors reading anyway."""
TILE_INPUTS = 128
"""Inputs of a tile of our kernel: it multiplies by whole tiles."""


@torch.library.custom_op("rlhf_kit::linears", mutates_args=())
def linears(input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """`F.linear` of one input [..., H] with several weights [O_i, H]: [..., sum of O_i].

    One product where the weights adjoin. ZeRO keeps the matrices of a model one behind the
    other, so those of an attention's queries, keys and values are one matrix already.
    """
    sizes = [len(weight) for weight in weights]
    rows = input.flatten(0, -2)
    out = input.new_empty(rows.shape[0], sum(sizes))
    whole = _adjoining(weights)
    present = [bias for bias in biases if bias is not None]
    if whole is not None and len(present) in (0, len(biases)):
        bias = _adjoining(present) if present else None
        _linear(rows, whole, torch.cat(present) if present and bias is None else bias, out)
    else:
        for weight, bias, part in zip(weights, biases, out.split(sizes, dim=1), strict=True):
            _linear(rows, weight, bias, part)
    return out.unflatten(0, input.shape[:-1])


@linears.register_fake
def _(input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    return input.new_empty(*input.shape[:-1], sum(len(weight) for weight in weights))


@torch.library.custom_op("rlhf_kit::linear_relu", mutates_args=())
def linear_relu(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """ReLU of `F.linear` [..., O], from input [..., H], weight [O, H] and bias [O]."""
    rows = input.flatten(0, -2)
    if _by_hand(rows, weight):
        out = _kernels().linear(rows, weight, bias, relu=True)
    else:  # cuBLAS applies it on the way out
        out = torch.ops.aten._addmm_activation(bias, rows, weight.T)
    return out.unflatten(0, input.shape[:-1])


@linear_relu.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return input.new_empty(*input.shape[:-1], len(weight))


@torch.library.custom_op("rlhf_kit::add_linear", mutates_args=("sums",))
def add_linear(sums: Tensor, input: Tensor, weight: Tensor) -> None:
    """Add input [..., H] times weight [O, H] to sums [..., O]."""
    out, rows = sums.view(-1, len(weight)), input.flatten(0, -2)
    if _by_hand(rows, weight) and out.is_contiguous():
        _kernels().linear(rows, weight, out=out, add=True)
    else:
        torch.addmm(out, rows, weight.T, out=out)


def _by_hand(rows: Tensor, weight: Tensor) -> bool:
    """Whether our kernel multiplies these: where it is faster, in 16 bits, by whole tiles."""
    few = len(rows) <= (FEW if weight.nbytes >= LEAST_BYTES else 16)
    faster = rows.is_cuda and few and len(weight) <= MOST_OUTPUTS
    half = weight.dtype in (torch.bfloat16, torch.float16) and rows.dtype == weight.dtype
    fits = weight.is_contiguous() and weight.shape[1] % TILE_INPUTS == 0 and rows.stride(1) == 1
    return faster and half and fits


def _kernels() -> Any:
    from rlhf_kit.hybrid_engine import linear_kernels  # needs Triton, which CPUs need not have

    return linear_kernels


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if _by_hand(input, weight) and out.is_contiguous():
        _kernels().linear(input, weight, bias, out=out)
    elif bias is None:
        torch.mm(input, weight.T, out=out)
    else:
        torch.addmm(bias, input, weight.T, out=out)


def _adjoining(parts: Sequence[Tensor]) -> Tensor | None:
    """The tensor whose rows those of `parts` are, where they stand one behind the other."""
    first = parts[0]
    end = first.data_ptr()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and part.is_contiguous() and part.data_ptr() == end):
            return None
        end += part.nbytes
    shape = (sum(len(part) for part in parts), *first.shape[1:])
    return first.as_strided(shape, first.stride())
