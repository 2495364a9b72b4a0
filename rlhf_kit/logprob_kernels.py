"""Triton kernels between the output head and logprobs: a chunk of logits is read once, or twice.

Shapes: N tokens of a chunk, V vocabulary.

In plain torch the softmax, the entropy and their gradient each pass over fp32 copies of the logits
many times, which takes longer than the head's matrix product. Here one program has one token:
forwards it goes over the bf16 logits once, with a running maximum (Milakov and Gimelshein 2018,
"Online normalizer calculation for softmax"); backwards the gradient takes the logits' place.
Sums are fp32.

Everything runs on a CPU too, through Triton's interpreter (`TRITON_INTERPRET=1`, set before this
file is imported).
"""

# Kernels are called in a language of their own, which type checkers do not know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Logits a program reads at once."""


@triton.jit
def _formed(x, factor, softcap, SOFTCAP: tl.constexpr):
    """softcap * tanh(factor * x / softcap), or factor * x."""
    x = x.to(tl.float32) * factor
    if SOFTCAP:
        twice = tl.exp(-2.0 * tl.abs(x) / softcap)
        size = softcap * (1.0 - twice) / (1.0 + twice)
        x = tl.where(x < 0, -size, size)
    return x


@triton.jit
def _logprobs(
    logits, ids, result, normalizers, V, factor, softcap, cold,
    BLOCK: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits += row.to(tl.int64) * V
    at = tl.arange(0, BLOCK)
    # The sums of share and of share * (x - top). A finite first maximum: 0 * inf is not 0.
    top, total, weighted = -3.0e38, 0.0, 0.0
    for start in range(0, V, BLOCK):
        inside = start + at < V
        x = tl.load(logits + start + at, mask=inside, other=0.0)
        x = _formed(x, factor, softcap, SOFTCAP) * cold
        new_top = tl.maximum(top, tl.max(tl.where(inside, x, -float("inf")), axis=0))
        share = tl.where(inside, tl.exp(x - new_top), 0.0)
        shrink = tl.exp(top - new_top)
        weighted = (weighted + (top - new_top) * total) * shrink
        weighted += tl.sum(share * tl.where(inside, x - new_top, 0.0), axis=0)
        total = total * shrink + tl.sum(share, axis=0)
        top = new_top
    chosen = _formed(tl.load(logits + tl.load(ids + row)), factor, softcap, SOFTCAP) * cold
    tl.store(result + row * 2, (chosen - top) - tl.log(total))
    tl.store(result + row * 2 + 1, tl.log(total) - weighted / total)
    tl.store(normalizers + row, top + tl.log(total))


@triton.jit
def _gradient(
    logits, ids, normalizers, outer, V, factor, softcap, cold,
    BLOCK: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits += row.to(tl.int64) * V
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < V
    y = _formed(tl.load(logits + at, mask=inside, other=0.0), factor, softcap, SOFTCAP)
    p = tl.exp(y * cold - tl.load(normalizers + row))
    hit = (at == tl.load(ids + row)).to(tl.float32)
    slope = factor
    if SOFTCAP:
        slope = factor * (1.0 - (y / softcap) * (y / softcap))
    grad = (hit - p) * tl.load(outer + row) * cold * slope
    tl.store(logits + at, grad.to(logits.dtype.element_ty), mask=inside)


def logprobs(
    logits: Tensor,
    ids: Tensor,
    result: Tensor,
    normalizers: Tensor,
    *,
    factor: float,
    softcap: float | None,
    temperature: float,
) -> None:
    """Logprobs of `ids` [N] and entropies in nats into `result` [N, 2], from the head's output.

    logits [N, V], contiguous, become softcap * tanh(factor * x / softcap), or factor * x, over
    `temperature`; `normalizers` [N] get their log-sum-exp. `result` and `normalizers` are fp32.
    """
    assert logits.is_contiguous() and result.is_contiguous()
    _logprobs[(len(ids),)](
        logits, ids, result, normalizers, logits.shape[1], factor, softcap or 1.0, 1 / temperature,
        BLOCK=BLOCK, SOFTCAP=softcap is not None, num_warps=8,
    )  # fmt: skip


def gradient(
    logits: Tensor,
    ids: Tensor,
    normalizers: Tensor,
    outer: Tensor,
    *,
    factor: float,
    softcap: float | None,
    temperature: float,
) -> Tensor:
    """The gradient of the sum of outer [N] times logprobs [N] in the head's output, in its place.

    All as `logprobs` has it; `outer` is fp32.
    """
    assert logits.is_contiguous()
    rows, vocabulary = logits.shape
    _gradient[(rows, triton.cdiv(vocabulary, BLOCK))](
        logits, ids, normalizers, outer.contiguous(), vocabulary, factor, softcap or 1.0,
        1 / temperature, BLOCK=BLOCK, SOFTCAP=softcap is not None, num_warps=8,
    )  # fmt: skip
    return logits
