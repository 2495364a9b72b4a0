"""Sampling on the device, from a counter-based source of randomness.

Shapes: N rows being decoded, B rows of the batch, R response tokens, V vocabulary.

A token depends on its row's seed, its position in the response and the row's logits, and on
nothing else: not on the batch around it, the slot it sits in or the tokens drawn before. The
uniform number of (seed, position) is SplitMix64's (Steele, Lea, Flood 2014, figure 15), whose
state is `seed + position * GOLDEN`; the token is where the inverted cumulative distribution
crosses it, so one number a token is enough.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_BITS = 52
"""Random bits a number. With 53, `u * total` could round up to the total itself."""


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """Independent uniform numbers in [0, 1), one for each seed and response position.

    seeds [B] int64, positions [R] int64 -> [B, R] float64, the same on every device.
    """
    # The seed is scrambled first: neighbouring seeds would otherwise share shifted sequences.
    state = _splitmix64(seeds)[:, None] + (positions[None, :] + 1) * _signed(_GOLDEN)
    bits = _shift_right(_splitmix64(state), 64 - _BITS)
    return bits.to(torch.float64) * 2.0**-_BITS


def log_distribution(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    forbidden: Tensor | None = None,
) -> Tensor:
    """fp32 log-probabilities [N, V] of the distribution that tokens are sampled from.

    logits [N, V] any dtype; `forbidden`, bool, broadcasts to [N, V] and is True on tokens of
    probability zero. The order is temperature, forbidden tokens, top-k, top-p (Holtzman et al.
    2020), and what is left is normalised again. Temperature 0 stands for greedy decoding, where
    top-k and top-p change nothing; its log-probabilities are those of temperature 1.
    """
    logits = logits.float()
    if temperature not in (0, 1):
        logits = logits / temperature
    if forbidden is not None:
        logits = logits.masked_fill(forbidden, -torch.inf)
    if temperature > 0 and 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if temperature > 0 and top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(dim=-1)
        # A token stays while the likelier ones together have not reached top_p.
        outside = probs.cumsum(dim=-1) - probs >= top_p
        outside[:, 0] = False
        logits = logits.masked_fill(outside.scatter(1, index, outside), -torch.inf)
    return logits.log_softmax(dim=-1)


def draw(logprobs: Tensor, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token a row and its log-probability, both [N].

    logprobs [N, V] as `log_distribution` returns them; uniform [N] float64 in [0, 1), or None
    for the likeliest token. A token of probability zero is never drawn.
    """
    if uniform is None:
        best = logprobs.max(dim=-1)
        return best.indices, best.values
    # Sums of a large vocabulary need float64 to keep the rare tokens at the end apart.
    cdf = logprobs.exp().cumsum(dim=-1, dtype=torch.float64)
    token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)
    token = token.clamp_(max=logprobs.shape[-1] - 1)  # logits that are not numbers end up here
    return token[:, 0], logprobs.gather(1, token)[:, 0]


def _splitmix64(x: Tensor) -> Tensor:
    """SplitMix64's output function on int64 tensors, whose products wrap as unsigned ones do."""
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """A logical shift; `>>` on int64 copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
