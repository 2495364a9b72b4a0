"""Products of few rows with a weight, in Triton.

Shapes: N rows, K input features, O output features, X parts of the sum over K.

With few rows the bytes of the weight are the time, and a weight is read at the memory's speed only
while every multiprocessor reads: a matrix of 2,048 outputs is work for 32 of 132. So the sum over
K is cut into parts ("split-K"), and the last program of a tile to end adds them up, always in the
same order. cuBLAS starts a kernel of its own for that.

Everything runs on a CPU too, through Triton's interpreter (`TRITON_INTERPRET=1`).
"""

# Kernels are called in a language of their own, which type checkers do not know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kit.hybrid_engine.kernels import fitted
from rlhf_kit.hybrid_engine.linears import TILE_INPUTS

OUTPUTS, ROWS = 64, 64
"""Outputs and rows of a tile; 16 rows where there are no more."""
PROGRAMS = 160
"""No more parts than keep the programs to this many: one to each multiprocessor, roughly."""
COUNTERS = 2**16
"""Tiles whose parts may be counted at the same time."""


@triton.jit(do_not_specialize=["rows", "has_bias", "adds"])  # each kind takes a second to compile
def _linear(
    input, weight, bias, out, scratch, counters,
    rows, outputs, inputs, share, i_row, least, has_bias, adds,
    NP: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """One tile of outputs, one of rows, one part of the sum."""
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    n = tl.program_id(1) * NP + tl.arange(0, NP)
    part, k = tl.program_id(2), tl.arange(0, BK)
    in_o, in_n = o < outputs, n < rows
    # What is read in place of outputs and rows beyond the last is not stored.
    weight += tl.where(in_o, o, 0).to(tl.int64)[:, None] * inputs + k[None, :]
    input += tl.where(in_n, n, 0)[:, None] * i_row + k[None, :]
    acc = tl.zeros([BO, NP], tl.float32)
    end = tl.minimum((part + 1) * share, inputs)
    for at in tl.range(part * share, end, BK, num_stages=STAGES):
        w = tl.load(weight + at)
        x = tl.load(input + at)
        acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    at = n[None, :] * outputs + o[:, None]
    inside = in_o[:, None] & in_n[None, :]
    last = True
    if PARTS > 1:
        tl.store(scratch + part * rows * outputs + at, acc, mask=inside)
        tl.debug_barrier()  # all of it stored, before it counts
        counter = counters + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        last = tl.atomic_add(counter, 1, sem="acq_rel") == PARTS - 1
        if last:
            acc = tl.zeros([BO, NP], tl.float32)
            for i in tl.static_range(PARTS):
                # Past the first cache, which may hold what stood there before.
                acc += tl.load(scratch + i * rows * outputs + at, mask=inside, cache_modifier=".cg")
            tl.store(counter, 0)
    if last:
        b = tl.load(bias + o, mask=in_o & (has_bias != 0), other=0.0)
        acc += b.to(tl.float32)[:, None]
        acc = tl.maximum(acc, least, propagate_nan=tl.PropagateNan.ALL)
        before = tl.load(out + at, mask=inside & (adds != 0), other=0.0)
        acc += before.to(tl.float32)
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


def tile_of(rows: int, element_size: int, device: torch.device) -> tuple[int, int, int]:
    """Rows of a tile, inputs read at once, and loads in flight."""
    height, stages = (16, 6) if rows <= 16 else (ROWS, 4)
    return height, *fitted(TILE_INPUTS, stages, (OUTPUTS + height) * element_size, device)


def parts_of(tiles: int, inputs: int) -> int:
    """Parts X that a sum over `inputs` is cut into where there are `tiles`: 1, 2 or 4."""
    parts = 1
    while parts < 4 and tiles * parts * 2 <= PROGRAMS and inputs >= parts * 4 * TILE_INPUTS:
        parts *= 2
    return parts


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    relu: bool = False,
    parts: int = 0,
    out: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """`F.linear` of input [N, K] with weight [O, K] and bias [O], then ReLU where asked: [N, O].

    It goes into `out`, contiguous, or with `add` is added to what stands there. K is a multiple
    of 128, the weight contiguous, the input's last stride 1; sums are fp32. `parts` of the sum,
    0 chooses by the number of tiles.
    """
    (rows, inputs), outputs = input.shape, weight.shape[0]
    assert weight.is_contiguous() and input.stride(1) == 1 and inputs % TILE_INPUTS == 0
    if out is None:
        out = input.new_empty(rows, outputs)
    height, block, stages = tile_of(rows, input.element_size(), input.device)
    tiles, row_tiles = triton.cdiv(outputs, OUTPUTS), triton.cdiv(rows, height)
    parts = parts or parts_of(tiles * row_tiles, inputs)
    scratch, counters = input, input
    if parts > 1:
        scratch = input.new_empty(parts, rows, outputs, dtype=torch.float32)
        counters = _counters(input.device, tiles * row_tiles)
    _linear[(tiles, row_tiles, parts)](
        input, weight, weight if bias is None else bias, out, scratch, counters,
        rows, outputs, inputs, triton.cdiv(inputs // TILE_INPUTS, parts) * TILE_INPUTS,
        input.stride(0), 0.0 if relu else -math.inf, int(bias is not None), int(add),
        NP=height, BO=OUTPUTS, BK=block, STAGES=stages, PARTS=parts, num_warps=4,
    )  # fmt: skip
    return out


_kept: dict[torch.device, tuple[Tensor, int]] = {}


def _counters(device: torch.device, tiles: int) -> Tensor:
    """Zeros [tiles] int32, which a kernel leaves as zeros.

    Taken in turn from memory that is kept, so that kernels that run at the same time, in graphs
    captured long before, count in different places.
    """
    memory, begin = _kept.get(device, (None, 0))
    if memory is None:
        memory = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    if begin + tiles > COUNTERS:
        begin = 0
    _kept[device] = memory, begin + tiles
    return memory[begin : begin + tiles]
