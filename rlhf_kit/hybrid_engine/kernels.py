"""Triton kernels of decoding: attention over the slots, sampling, bookkeeping, prompts stored.

Shapes: K prompts, P the longest of them, N rows being decoded, H query heads, Hkv key/value heads,
G = H / Hkv, D head size of queries and keys, E of values, C the most tokens a block of the cache
holds, X splits of the context, V vocabulary, W parts of the vocabulary.

Decoding reads every weight and every cached key and value once a token and does little with
them: the bytes are the time. So attention reads each row's own length and no more, serves the G
queries of a head from one read, and splits the context where rows and heads are too few to fill
the chip (Dao et al. 2023, "Flash-Decoding"); sampling reads the logits once, and of one block
twice. Sums are fp32, those over the vocabulary fp64.

Everything runs on a CPU too, through Triton's interpreter (`TRITON_INTERPRET=1`, set before this
file is imported).
"""

# Kernels are called in a language of their own, which type checkers do not know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

VOCABULARY_BLOCK = 1024
"""Logits a program of the first sampling kernel reads."""
SPLIT_TOKENS = 32
"""Fewer cached tokens than this are not worth a program of their own."""


def tiles(programs: int, grouped: bool) -> tuple[int, int, int]:
    """Tokens read at once, warps, and loads in flight for the matrix units, 0 to do without them.

    The fastest of those timed on an H200 (`benchmarks/limits.py --sweep`). With few programs each
    has to keep more bytes in flight.
    """
    if not grouped:
        if programs <= 2048:
            return (128, 2, 0) if programs <= 1024 else (32, 1, 0)
        return 64, 2, 3  # takes less power, which is what limits the clock by then
    if programs <= 64:
        return 64, 2, 2
    if programs <= 256:
        return 128, 4, 3
    return (32, 1, 4) if programs <= 1024 else (64, 4, 3)


def fitted(block: int, stages: int, row_bytes: int, device: torch.device) -> tuple[int, int]:
    """Rows of a tile and loads of it in flight, fewer where the GPU's shared memory asks for it.

    `row_bytes` of one row; 24 KiB stay free for what the compiler exchanges there. A Hopper has
    227 KiB, a consumer's Ada 99.
    """
    room = _shared_bytes(device) - 24 * 1024
    while block * stages * row_bytes > room and (stages > 2 or block > 16):
        block, stages = (block, stages - 1) if stages > 2 else (block // 2, stages)
    return block, stages


@cache
def _shared_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 2**30
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@triton.jit
def _capped(scores, softcap, SOFTCAP: tl.constexpr):
    """Gemma 2's softcap * tanh(scores / softcap), in exponentials."""
    if SOFTCAP:
        twice = tl.exp(-2.0 * tl.abs(scores) / softcap)
        size = softcap * (1.0 - twice) / (1.0 + twice)
        scores = tl.where(scores < 0, -size, size)
    return scores


@triton.jit
def _attend(
    query, key, value, keys, values, lengths, blocks, out, partial, stats,
    q_row, q_head, k_row, k_head, v_row, v_head,
    ks_block, ks_head, vs_block, vs_head,
    scale, window, softcap,
    G: tl.constexpr, GP: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, SOFTCAP: tl.constexpr, DOT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One row, one key/value head, one split: keep the new token, attend over it and the cache."""
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    length = tl.load(lengths + row).to(tl.int32)
    g, d, e = tl.arange(0, GP), tl.arange(0, DP), tl.arange(0, EP)
    in_g, in_d, in_e = g < G, d < D, e < E

    q_at = query + row * q_row + (head * G + g[:, None]) * q_head + d[None, :]
    q = tl.load(q_at, mask=in_g[:, None] & in_d[None, :], other=0.0)
    block = tl.load(blocks + row)
    keys += block * ks_block + head * ks_head
    values += block * vs_block + head * vs_head

    top = tl.full([GP], -float("inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, EP], tl.float32)
    if split == 0:  # the token itself: from registers, and into the cache for the next step
        k = tl.load(key + row * k_row + head * k_head + d, mask=in_d, other=0.0)
        v = tl.load(value + row * v_row + head * v_head + e, mask=in_e, other=0.0)
        tl.store(keys + length * D + d, k, mask=in_d)
        tl.store(values + length * E + e, v, mask=in_e)
        score = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], axis=1) * scale
        top = _capped(score, softcap, SOFTCAP)
        total += 1.0
        acc += v.to(tl.float32)[None, :]

    first = tl.where(window > 0, tl.maximum(length + 1 - window, 0), 0)
    share = tl.cdiv(tl.cdiv(length - first, SPLITS), BLOCK) * BLOCK
    begin = first + split * share
    end = tl.minimum(begin + share, length)
    # Loads for a matrix product are kept in flight; others are slower through shared memory.
    for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        k_at = keys + at[:, None] * D + d[None, :]
        k = tl.load(k_at, mask=inside[:, None] & in_d[None, :], other=0.0)
        if DOT:
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        else:  # one query a head: a matrix product would be 15/16 padding
            scores = tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1)[None, :] * scale
        scores = _capped(scores, softcap, SOFTCAP)
        scores = tl.where(inside[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp(scores - new_top[:, None])
        shrink = tl.exp(top - new_top)
        v_at = values + at[:, None] * E + e[None, :]
        v = tl.load(v_at, mask=inside[:, None] & in_e[None, :], other=0.0)
        if DOT:
            new = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        else:
            new = tl.sum(tl.trans(weights) * v.to(tl.float32), axis=0)[None, :]
        acc = acc * shrink[:, None] + new
        total = total * shrink + tl.sum(weights, axis=1)
        top = new_top

    at = (row * heads + head) * G + g
    if SPLITS == 1:
        result = (acc / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + at[:, None] * E + e[None, :], result, mask=in_g[:, None] & in_e[None, :])
    else:
        at = at * SPLITS + split
        tl.store(partial + at[:, None] * E + e[None, :], acc, mask=in_g[:, None] & in_e[None, :])
        tl.store(stats + at * 2, top, mask=in_g)
        tl.store(stats + at * 2 + 1, total, mask=in_g)


@triton.jit
def _combine(
    partial, stats, out, E: tl.constexpr, EP: tl.constexpr, SPLITS: tl.constexpr, XP: tl.constexpr
):
    """The splits of one row and head, weighted by what each has seen."""
    at = tl.program_id(0)
    x, e = tl.arange(0, XP), tl.arange(0, EP)
    in_x, in_e = x < SPLITS, e < E
    top = tl.load(stats + (at * SPLITS + x) * 2, mask=in_x, other=-float("inf"))
    total = tl.load(stats + (at * SPLITS + x) * 2 + 1, mask=in_x, other=0.0)
    weights = tl.exp(top - tl.max(top, axis=0))
    mask = in_x[:, None] & in_e[None, :]
    acc = tl.load(partial + (at * SPLITS + x[:, None]) * E + e[None, :], mask=mask, other=0.0)
    result = tl.sum(acc * weights[:, None], axis=0) / tl.sum(total * weights, axis=0)
    tl.store(out + at * E + e, result.to(out.dtype.element_ty), mask=in_e)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    blocks: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    splits: int = 0,
) -> Tensor:
    """Attention of one new token a row over its block; the token is stored behind it.

    query [H, N, D], key [Hkv, N, D], value [Hkv, N, E] of the new tokens, in any strides with
    the last one 1; keys [S, Hkv, C, D], values [S, Hkv, C, E] with S >= N, contiguous;
    lengths [N] int64, tokens of each row before the new one, whose position it becomes, below C;
    blocks [N] int64, where in keys and values each row is, no two of them the same.
    A token sees itself and, with a window, the `window - 1` tokens before it; 0 is no window and
    no softcap. `splits` of the context, 0 chooses by the number of rows and heads.
    Returns [N, H, E].
    """
    (heads, rows, size), (kv_heads, value_size) = query.shape, value.shape[::2]
    assert keys.is_contiguous() and values.is_contiguous() and query.stride(2) == 1
    assert key.stride(2) == 1 and value.stride(2) == 1
    assert lengths.shape == blocks.shape == (rows,)
    groups = heads // kv_heads
    programs = rows * kv_heads
    block, warps, stages = tiles(programs, groups > 1)
    dot = stages > 0
    if dot:
        padded = triton.next_power_of_2(size) + triton.next_power_of_2(value_size)
        row_bytes = padded * keys.element_size()
        block, stages = fitted(block, stages, row_bytes, query.device)
    if not splits:
        # Adding splits up takes a kernel of its own, which has to be worth it.
        enough, most = (64, 256) if dot else (512, 512)
        wanted = most // programs if programs <= enough else 1
        splits = min(triton.next_power_of_2(wanted), max(1, keys.shape[2] // SPLIT_TOKENS), 32)
    out = query.new_empty(rows, heads, value_size)
    partial = stats = out
    if splits > 1:
        partial = query.new_empty(rows, heads, splits, value_size, dtype=torch.float32)
        stats = query.new_empty(rows, heads, splits, 2, dtype=torch.float32)
    _attend[(rows, kv_heads, splits)](
        query, key, value, keys, values, lengths, blocks, out, partial, stats,
        query.stride(1), query.stride(0), key.stride(1), key.stride(0),
        value.stride(1), value.stride(0),
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        scale, window, softcap,
        G=groups, GP=max(16, triton.next_power_of_2(groups)) if dot else 1,
        D=size, DP=max(16, triton.next_power_of_2(size)),
        E=value_size, EP=max(16, triton.next_power_of_2(value_size)),
        BLOCK=block, SPLITS=splits, SOFTCAP=softcap > 0, DOT=dot,
        STAGES=stages or None, num_warps=warps,
    )  # fmt: skip
    if splits > 1:
        _combine[(rows * heads,)](
            partial,
            stats,
            out,
            E=value_size,
            EP=triton.next_power_of_2(value_size),
            SPLITS=splits,
            XP=triton.next_power_of_2(splits),
            num_warps=1,
        )
    return out


@triton.jit
def _store(
    new, cache, blocks, n_row, n_head, n_token, b_block, b_head,
    P, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at, d = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, DP)
    inside = (at < P)[:, None] & (d < D)[None, :]
    source = new + row * n_row + head * n_head + at[:, None] * n_token + d[None, :]
    target = cache + tl.load(blocks + row) * b_block + head * b_head + at[:, None] * D + d[None, :]
    tl.store(target, tl.load(source, mask=inside, other=0.0), mask=inside)


def store(new: Tensor, cache: Tensor, blocks: Tensor) -> None:
    """Put new [K, Hkv, P, D], in any strides, into `blocks` [K] int64.

    `cache` [S, Hkv, C, D], contiguous, P <= C. torch's `index_put` takes several times as long.
    """
    assert cache.is_contiguous()
    new = new if new.stride(3) == 1 else new.contiguous()
    rows, heads, length, size = new.shape
    tokens = 64
    _store[(rows, heads, triton.cdiv(length, tokens))](
        new, cache, blocks, *new.stride()[:3], *cache.stride()[:2],
        length, D=size, DP=triton.next_power_of_2(size), BLOCK=tokens, num_warps=4,
    )  # fmt: skip


@triton.jit
def _tempered(logits, at, inside, eos, banned, scale, EOS: tl.constexpr):
    """fp32 logits over temperature; -inf behind the end, and on `eos` tokens where banned."""
    x = tl.load(logits + at, mask=inside, other=-float("inf")).to(tl.float32) * scale
    for i in tl.static_range(EOS):
        x = tl.where(banned & (at == tl.load(eos + i)), -float("inf"), x)
    return x


@triton.jit
def _block_sums(
    logits, slots, state, eos, sums, S, V, stride, scale, min_new,
    BLOCK: tl.constexpr, EOS: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of exponentials of one block of one row's logits."""
    row, block = tl.program_id(0), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(state + 3 * S + tl.load(slots + row))
    logits += row.to(tl.int64) * stride
    x = _tempered(logits, at, at < V, eos, position < min_new, scale, EOS)
    top = tl.max(x, axis=0)
    # A block of nothing but banned tokens has no maximum to subtract.
    total = tl.sum(tl.where(x == -float("inf"), 0.0, tl.exp(x - top)), axis=0)
    where = (row * tl.num_programs(1) + block) * 2
    tl.store(sums + where, top)
    tl.store(sums + where + 1, total)


@triton.jit
def _draw(
    logits, slots, state, uniform, eos, sums, token_out, logprob_out,
    S, V, stride, R, scale, min_new,
    BLOCK: tl.constexpr, EOS: tl.constexpr, BLOCKS: tl.constexpr, WP: tl.constexpr,
):  # fmt: skip
    """Where a row's cumulative distribution crosses its uniform number."""
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    number, position = tl.load(state + 2 * S + slot), tl.load(state + 3 * S + slot)
    w = tl.arange(0, WP)
    where = (row * BLOCKS + w) * 2
    tops = tl.load(sums + where, mask=w < BLOCKS, other=-float("inf"))
    totals = tl.load(sums + where + 1, mask=w < BLOCKS, other=0.0)
    top = tl.max(tops, axis=0)
    mass = tl.where(totals > 0, totals * tl.exp(tops - top), 0.0).to(tl.float64)
    total = tl.sum(mass, axis=0)
    goal = tl.load(uniform + number * R + position) * total
    upto = tl.cumsum(mass, axis=0)
    # Rounding may leave the goal behind the last sum: then the last block with any mass has it.
    last = tl.max(tl.where(mass > 0, w, 0), axis=0)
    block = tl.minimum(tl.sum((upto <= goal).to(tl.int32), axis=0), last)
    before = tl.sum(tl.where(w < block, mass, 0.0), axis=0)

    v = tl.arange(0, BLOCK)
    at = block * BLOCK + v
    logits += row.to(tl.int64) * stride
    x = _tempered(logits, at, at < V, eos, position < min_new, scale, EOS)
    p = tl.where(x == -float("inf"), 0.0, tl.exp(x - top)).to(tl.float64)
    inner = before + tl.cumsum(p, axis=0)
    last = tl.max(tl.where(p > 0, v, 0), axis=0)
    # Never a token of probability zero: the first crossing is one that adds to the sum.
    found = tl.min(tl.where((inner > goal) & (p > 0), v, BLOCK), axis=0)
    found = tl.minimum(found, last)
    chosen = tl.sum(tl.where(v == found, x, 0.0), axis=0)
    tl.store(token_out + row, (block * BLOCK + found).to(tl.int64))
    tl.store(logprob_out + row, chosen - top - tl.log(total.to(tl.float32)))


def sample(
    logits: Tensor,
    slots: Tensor,
    state: Tensor,
    uniform: Tensor,
    eos: Tensor,
    *,
    temperature: float,
    min_new_tokens: int,
) -> tuple[Tensor, Tensor]:
    """One token and its fp32 log-probability for each row of logits [N, V], both [N].

    `slots` [N], `state` [6, S] as `slots.Slots` has it, `uniform` [rows, R] float64, `eos` the
    token ids that are banned before `min_new_tokens`. What is drawn is what `sampling.draw`
    draws from `sampling.log_distribution`, but for rounding at a boundary.
    """
    rows, vocabulary = logits.shape
    blocks = triton.cdiv(vocabulary, VOCABULARY_BLOCK)
    sums = logits.new_empty(rows, blocks, 2, dtype=torch.float32)
    token = torch.empty(rows, dtype=torch.long, device=logits.device)
    logprob = torch.empty(rows, dtype=torch.float32, device=logits.device)
    banned = len(eos) if min_new_tokens else 0
    _block_sums[(rows, blocks)](
        logits, slots, state, eos, sums, state.shape[1], vocabulary, logits.stride(0),
        1 / temperature, min_new_tokens,
        BLOCK=VOCABULARY_BLOCK, EOS=banned, num_warps=4,
    )  # fmt: skip
    _draw[(rows,)](
        logits, slots, state, uniform, eos, sums, token, logprob,
        state.shape[1], vocabulary, logits.stride(0), uniform.shape[1],
        1 / temperature, min_new_tokens,
        BLOCK=VOCABULARY_BLOCK, EOS=banned, BLOCKS=blocks, WP=triton.next_power_of_2(blocks),
        num_warps=4,
    )  # fmt: skip
    return token, logprob


@triton.jit
def _advance(
    slots, state, token, logprob, response_ids, logprobs, produced, ended, eos,
    S, R, limit, N, EOS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = n < N
    slot = tl.load(slots + n, mask=here, other=0)
    alive = tl.load(state + 4 * S + slot, mask=here, other=0) != 0
    row = tl.load(state + 2 * S + slot, mask=here, other=0)
    at = tl.load(state + 3 * S + slot, mask=here, other=0)
    length = tl.load(state + S + slot, mask=here, other=0)
    new = tl.load(token + n, mask=here, other=0)
    tl.store(response_ids + row * R + at, new, mask=alive)
    tl.store(logprobs + row * R + at, tl.load(logprob + n, mask=here, other=0.0), mask=alive)
    matches = tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(EOS):
        matches += (new == tl.load(eos + i)).to(tl.int32)
    is_eos = matches > 0
    tl.store(produced + row, at + 1, mask=alive)
    tl.store(ended + row, is_eos.to(tl.int64), mask=alive)
    alive = alive & (matches == 0) & (at + 1 < limit)
    tl.store(state + slot, new, mask=here)
    # A slot that is done has length 0: it costs no reading until it is filled again.
    tl.store(state + S + slot, tl.where(alive, length + (at > 0).to(tl.int64), 0), mask=here)
    tl.store(state + 3 * S + slot, tl.where(alive, at + 1, 0), mask=here)
    tl.store(state + 4 * S + slot, alive.to(tl.int64), mask=here)


def advance(
    slots: Tensor,
    state: Tensor,
    token: Tensor,
    logprob: Tensor,
    response_ids: Tensor,
    logprobs: Tensor,
    produced: Tensor,
    ended: Tensor,
    eos: Tensor,
    *,
    limit: int,
) -> None:
    """Write tokens down and move their slots on, in place: `slots.Slots.advance` in one launch."""
    block = 128
    _advance[(triton.cdiv(len(token), block),)](
        slots, state, token, logprob, response_ids, logprobs, produced, ended, eos,
        state.shape[1], response_ids.shape[1], limit, len(token),
        EOS=len(eos), BLOCK=block, num_warps=4,
    )  # fmt: skip
