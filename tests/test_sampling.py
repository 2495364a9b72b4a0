"""Shapes: N rows, V vocabulary."""

from __future__ import annotations

import pytest
import torch

from rlhf_kit.hybrid_engine.sampling import draw, log_distribution, uniforms

MASK = (1 << 64) - 1
PROBS = torch.tensor([0.05, 0.4, 0.0, 0.15, 0.1, 0.3])
LOGITS = PROBS.log()[None]


def splitmix64(state: int) -> int:
    """The reference implementation of Vigna's splitmix64.c, on Python integers."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def chi_square(tokens: torch.Tensor, probs: torch.Tensor) -> float:
    counts = torch.bincount(tokens, minlength=len(probs)).double()
    assert counts[probs == 0].sum() == 0
    expected = probs.double()[probs > 0] * len(tokens)
    return float(((counts[probs > 0] - expected) ** 2 / expected).sum())


def test_uniforms_are_splitmix64_of_seed_and_position() -> None:
    # The first outputs for seed 1234567 are published with the algorithm.
    assert splitmix64(1234567) == 6457827717110365317
    seeds = [0, 1, 2**63 - 1, -5]
    got = uniforms(torch.tensor(seeds), torch.arange(3))
    for i, seed in enumerate(seeds):
        # Scrambled without the increment, then one increment a position.
        start = splitmix64((seed - 0x9E3779B97F4A7C15) & MASK)
        for j in range(3):
            state = (start + j * 0x9E3779B97F4A7C15) & MASK
            assert got[i, j].item() == (splitmix64(state) >> 12) / 2**52


def test_uniforms_of_neighbouring_seeds_share_nothing() -> None:
    drawn = uniforms(torch.arange(200), torch.arange(200))
    assert drawn.unique().numel() == drawn.numel()
    assert drawn.min() >= 0 and drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 5 / 200 / 12**0.5
    rows = torch.corrcoef(drawn) - torch.eye(200)
    assert rows.abs().max() < 6 / 200**0.5


@pytest.mark.parametrize("axis", ["seeds", "positions"])
def test_tokens_follow_the_distribution(axis: str) -> None:
    many, one = torch.arange(20_000), torch.tensor([7])
    uniform = uniforms(many, one) if axis == "seeds" else uniforms(one, many)
    logprobs = log_distribution(LOGITS, temperature=1.0).expand(20_000, -1)
    tokens, logprob = draw(logprobs, uniform.flatten())
    assert chi_square(tokens, PROBS) < 18.47  # 4 degrees of freedom, p = 0.001
    torch.testing.assert_close(logprob, PROBS.log()[tokens])


def test_tokens_follow_the_filtered_distribution() -> None:
    uniform = uniforms(torch.arange(20_000), torch.tensor([0])).flatten()
    logprobs = log_distribution(LOGITS, temperature=0.5, top_k=3).expand(20_000, -1)
    # Temperature 0.5 squares the probabilities: 0.16, 0.09 and 0.0225 are left.
    probs = torch.tensor([0.0, 0.16, 0.0, 0.0225, 0.0, 0.09]) / 0.2725
    assert chi_square(draw(logprobs, uniform)[0], probs) < 13.82  # 2 degrees of freedom


def test_top_p_keeps_the_token_that_crosses_it() -> None:
    got = log_distribution(LOGITS, temperature=1.0, top_p=0.65).exp()
    torch.testing.assert_close(got, torch.tensor([[0, 4 / 7, 0, 0, 0, 3 / 7]]))
    got = log_distribution(LOGITS, temperature=1.0, top_p=0.75).exp()
    torch.testing.assert_close(got, torch.tensor([[0, 0.4, 0, 0.15, 0, 0.3]]) / 0.85)
    got = log_distribution(LOGITS, temperature=1.0, top_p=1e-6).exp()
    torch.testing.assert_close(got, torch.tensor([[0.0, 1, 0, 0, 0, 0]]))


def test_a_forbidden_token_leaves_its_probability_to_the_others() -> None:
    forbidden = torch.tensor([False, True, False, False, False, False])
    got = log_distribution(LOGITS, temperature=1.0, forbidden=forbidden).exp()
    torch.testing.assert_close(got, torch.tensor([[0.05, 0, 0, 0.15, 0.1, 0.3]]) / 0.6)


def test_greedy_takes_the_likeliest_token_at_temperature_one() -> None:
    logprobs = log_distribution(LOGITS, temperature=0.0, top_k=1, top_p=0.1)
    token, logprob = draw(logprobs, None)
    assert token.tolist() == [1]
    torch.testing.assert_close(logprob, torch.tensor([0.4]).log())


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-52])
def test_a_token_of_probability_zero_is_never_drawn(uniform: float) -> None:
    probs = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]])
    token, _ = draw(probs.log(), torch.tensor([uniform], dtype=torch.float64))
    assert token.item() == (1 if uniform == 0 else 3)


def test_bf16_logits_give_fp32_logprobs() -> None:
    got = log_distribution(torch.randn(2, 5).bfloat16(), temperature=0.7)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.exp().sum(1), torch.ones(2))
