"""The Triton kernels, run by Triton's interpreter, against float64 in plain torch.

Shapes: N rows, H query heads, Hkv key/value heads, S slots, C the most tokens a slot holds,
D head size of keys, E of values, V vocabulary.
"""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from rlhf_kit.hybrid_engine import kernels
from rlhf_kit.hybrid_engine.sampling import draw, log_distribution
from rlhf_kit.hybrid_engine.slots import ALIVE, AT, BLOCK, LENGTH, ROW, TOKEN, Slots

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter multiplies bf16 matrices as if their bits were integers.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16


def expected_attention(query, key, value, keys, values, lengths, scale, window, softcap):
    """[N, H, E] one row and head at a time, in float64, over the tokens themselves."""
    heads, rows, _ = query.shape
    groups = heads // key.shape[0]
    out = torch.zeros(rows, heads, value.shape[2], dtype=torch.float64)
    for n in range(rows):
        for h in range(heads):
            g, length = h // groups, int(lengths[n])
            k = torch.cat([keys[n, g, :length], key[g, n][None]]).double()
            v = torch.cat([values[n, g, :length], value[g, n][None]]).double()
            if window:
                k, v = k[-window:], v[-window:]
            scores = k @ query[h, n].double() * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            out[n, h] = scores.softmax(0) @ v
    return out


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double().cpu() - expected.cpu()).norm() / expected.norm())


SHAPES = [
    # rows, heads, kv heads, D, E, longest, window, softcap, splits
    (3, 4, 4, 16, 16, 40, 0, 0.0, 1),
    (3, 4, 4, 16, 16, 40, 0, 0.0, 4),
    (2, 6, 2, 16, 16, 70, 0, 0.0, 1),
    (2, 6, 2, 16, 16, 150, 0, 0.0, 3),
    (2, 4, 1, 24, 8, 70, 0, 0.0, 2),
    (2, 3, 3, 20, 40, 40, 0, 0.0, 1),
    (3, 4, 2, 16, 16, 80, 7, 0.0, 2),
    (3, 4, 4, 16, 16, 80, 33, 2.5, 1),
    (2, 32, 1, 16, 16, 20, 0, 2.0, 0),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["single", "half"])
def test_attention_over_slots_equals_float64_and_stores_the_new_token(shape, dtype):
    rows, heads, kv_heads, size, value_size, longest, window, softcap, splits = shape
    slots, capacity = rows + 2, longest + 3
    chance = torch.Generator().manual_seed(hash(shape) % 1000)

    def random(*dims: int) -> torch.Tensor:
        return torch.randn(*dims, generator=chance).to(DEVICE, dtype)

    # As models hand them over: transposed views of [N, H, D], some of a wider tensor.
    query = random(rows, heads, size + 8)[..., :size].transpose(0, 1)
    key = random(rows, kv_heads, size).transpose(0, 1)
    value = random(rows, kv_heads, value_size).transpose(0, 1)
    keys, values = (
        random(slots, kv_heads, capacity, size),
        random(slots, kv_heads, capacity, value_size),
    )
    lengths = torch.randint(0, longest, (rows,), generator=chance).to(DEVICE)
    lengths[0], lengths[1] = longest, 0
    before = keys.clone(), values.clone()
    blocks = torch.randperm(slots, generator=chance)[:rows].to(DEVICE)
    there = keys[blocks].cpu(), values[blocks].cpu()
    expected = expected_attention(
        query.cpu(), key.cpu(), value.cpu(), *there, lengths, 0.3, window, softcap
    )
    out = kernels.attend(
        query, key, value, keys, values, lengths, blocks,
        scale=0.3, window=window, softcap=softcap, splits=splits,
    )  # fmt: skip
    assert out.shape == (rows, heads, value_size) and out.dtype == dtype
    assert relative_error(out, expected) < (1e-5 if dtype == torch.float32 else 1e-2)
    for block, old, new in ((keys, before[0], key), (values, before[1], value)):
        for n in range(rows):
            old[int(blocks[n]), :, int(lengths[n])] = new[:, n]
        assert torch.equal(block, old)


@pytest.mark.parametrize("tile", [(16, 2, 3), (32, 1, 1), (32, 2, 0)], ids=str)
def test_one_query_a_head_is_the_same_with_and_without_matrix_units(tile, monkeypatch):
    monkeypatch.setattr(kernels, "tiles", lambda programs, grouped: tile)
    test_attention_over_slots_equals_float64_and_stores_the_new_token(SHAPES[5], HALF)


def test_tiles_are_cut_to_a_gpus_shared_memory(monkeypatch):
    cuda = torch.device("cuda", 7)
    sizes = {"hopper": 227 * 1024, "ada": 99 * 1024}
    fit = {}
    for name, size in sizes.items():
        monkeypatch.setattr(kernels, "_shared_bytes", lambda device, size=size: size)
        heads_of_128 = kernels.fitted(128, 3, 2 * 128 * 2, cuda)
        fit[name] = heads_of_128, kernels.fitted(128, 6, (64 + 16) * 2, cuda)
    assert fit["hopper"] == ((128, 3), (128, 6))  # 192 and 120 KiB of 203
    assert fit["ada"] == ((64, 2), (128, 3))  # 64 and 60 KiB of 75
    assert kernels.fitted(16, 2, 10**6, cuda) == (16, 2)  # no smaller


def test_what_lies_behind_a_rows_end_is_never_read():
    chance = torch.Generator().manual_seed(5)
    query, key, value = (torch.randn(4, 2, 16, generator=chance).to(DEVICE) for _ in range(3))
    keys, values = (torch.randn(2, 4, 64, 16, generator=chance).to(DEVICE) for _ in range(2))
    lengths, blocks = torch.tensor([5, 33], device=DEVICE), torch.arange(2, device=DEVICE)
    for n, length in enumerate(lengths.tolist()):
        keys[n, :, length:], values[n, :, length:] = torch.nan, torch.nan
    for splits in (1, 4):
        out = kernels.attend(
            query, key, value, keys, values, lengths, blocks, scale=0.25, splits=splits
        )
        assert bool(out.isfinite().all())


def slots_of(rows: int, limit: int, *, eos=(5, 7)) -> Slots:
    slots = Slots(rows + 1, rows, limit, eos_token_ids=eos, pad_token_id=0, device=DEVICE)
    slots.begin(torch.arange(100, 100 + rows, device=DEVICE))
    slots.fill(torch.arange(1, rows + 1, device=DEVICE), list(range(rows)), [4] * rows)
    return slots


@pytest.mark.parametrize("vocabulary", [11, 1024, 2500])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_tokens_and_logprobs_are_those_of_the_inverted_distribution(
    vocabulary, temperature
):
    rows = 24
    slots = slots_of(rows, 4)
    chance = torch.Generator().manual_seed(vocabulary)
    logits = (3 * torch.randn(rows, vocabulary, generator=chance)).to(DEVICE)
    where = torch.arange(1, rows + 1, device=DEVICE)
    token, logprob = kernels.sample(
        logits, where, slots.state, slots.uniform, slots.eos,
        temperature=temperature, min_new_tokens=0,
    )  # fmt: skip
    expected = log_distribution(logits.double(), temperature=temperature)
    wanted, wanted_logprob = draw(expected, slots.uniform[:, 0])
    assert torch.equal(token, wanted)
    assert torch.allclose(logprob.double(), wanted_logprob.double(), atol=2e-6)


def test_a_number_close_to_one_draws_the_last_token_that_can_be_drawn():
    slots = slots_of(2, 1)
    slots.uniform[:] = 1 - 2.0**-52
    logits = torch.full((2, 1500), -torch.inf, device=DEVICE)
    logits[:, [3, 9, 1100]] = torch.tensor([0.0, 1.0, -2.0], device=DEVICE)
    token, logprob = kernels.sample(
        logits, torch.tensor([1, 2], device=DEVICE), slots.state, slots.uniform, slots.eos,
        temperature=1.0, min_new_tokens=0,
    )  # fmt: skip
    assert token.tolist() == [1100, 1100]
    expected = -2 - math.log(1 + math.e + math.exp(-2))
    assert logprob.tolist() == pytest.approx([expected] * 2, abs=1e-6)


def test_eos_is_not_drawn_before_min_new_tokens_and_the_rest_is_normalised_again():
    slots = slots_of(24, 4, eos=(1, 2))
    logits = torch.tensor([0.0, 3.0, 2.0, 1.0], device=DEVICE).expand(24, 4).contiguous()
    where = torch.arange(1, 25, device=DEVICE)
    for banned in (True, False):
        token, logprob = kernels.sample(
            logits, where, slots.state, slots.uniform, slots.eos,
            temperature=1.0, min_new_tokens=int(banned),
        )  # fmt: skip
        assert bool(((token == 1) | (token == 2)).any()) != banned
        if banned:
            ones = logprob[token == 3]
            assert ones.tolist() == pytest.approx([1 - math.log(1 + math.e)] * len(ones), abs=1e-6)


def test_advance_writes_what_the_plain_one_writes():
    chance = torch.Generator().manual_seed(8)
    ours, plain = slots_of(40, 6), slots_of(40, 6)
    where = torch.randperm(41, generator=chance)[:37].to(DEVICE)
    for _ in range(8):
        token = torch.randint(3, 30, (37,), generator=chance).to(DEVICE)
        logprob = torch.randn(37, generator=chance).to(DEVICE)
        plain.advance(token, logprob, where, 6)
        kernels.advance(
            where, ours.state, token, logprob, ours.response_ids, ours.logprobs,
            ours.produced, ours.ended, ours.eos, limit=6,
        )  # fmt: skip
        for name in ("state", "response_ids", "logprobs", "produced", "ended"):
            assert torch.equal(getattr(ours, name), getattr(plain, name)), name
    assert int(plain.state[ALIVE].sum()) <= 4  # the slots left out, at most
    assert 0 < int(plain.ended.sum()) < 37  # some ended by EOS, some at the limit


def test_advance_by_hand():
    slots = slots_of(3, 2)
    where = torch.tensor([1, 2, 3], device=DEVICE)
    for tokens in ([9, 5, 9], [8, 8, 7]):
        kernels.advance(
            where, slots.state, torch.tensor(tokens, device=DEVICE),
            torch.tensor([-1.0, -2.0, -3.0], device=DEVICE), slots.response_ids, slots.logprobs,
            slots.produced, slots.ended, slots.eos, limit=2,
        )  # fmt: skip
        if tokens == [9, 5, 9]:  # the prompt's 4 tokens are in the cache; the token is not yet
            assert slots.state[:BLOCK, 1:].tolist() == [
                [9, 5, 9],
                [4, 0, 4],
                [0, 1, 2],
                [1, 0, 1],
                [1, 0, 1],
            ]
    assert slots.response_ids.tolist() == [[9, 8], [5, 0], [9, 7]]
    assert slots.logprobs.tolist() == [[-1, -1], [-2, 0], [-3, -3]]
    assert slots.produced.tolist() == [2, 1, 2] and slots.ended.tolist() == [0, 1, 1]
    assert slots.state[[LENGTH, AT, ALIVE], 1:].eq(0).all() and slots.state[ROW, 1:].tolist() == [
        0,
        1,
        2,
    ]
    assert slots.state[TOKEN, 1:].tolist() == [8, 8, 7]
