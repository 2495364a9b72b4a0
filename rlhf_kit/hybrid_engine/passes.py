"""The passes of a run over modules on the meta device: the losses that train, and what only reads.

Shapes: B rows, P prompt, R response, T = P + R sequence tokens, H heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_kit import functional as f
from rlhf_kit.hybrid_engine.watch import Fused, attending
from rlhf_kit.token_logprobs import chosen_logprobs


def ids(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.long, device="meta")


def _mask(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool, device="meta")


def _chosen(
    module: Any, rows: int, prompt: int, response: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """Logprobs and entropies [B * R] of the responses, of rows that need no mask."""
    places = ids(rows * response)
    return chosen_logprobs(module, ids(rows, prompt + response), places, chunk=chunk, entropy=True)


def policy(module: Any, rows: int, prompt: int, response: int, chunk: int) -> Tensor:
    logprobs, _ = _chosen(module, rows, prompt, response, chunk)
    old, mask = torch.zeros_like(logprobs), _mask(rows * response)
    return f.policy_loss(logprobs, old, old, mask, clip_ratio=0.2, denominator=1.0)[0]


def text(module: Any, rows: int, length: int, chunk: int) -> Tensor:
    return -chosen_logprobs(module, ids(rows, length), ids(rows * length), chunk=chunk)[0].sum()


def value(module: Any, rows: int, prompt: int, response: int) -> Tensor:
    read = module(ids(rows, prompt + response)).flatten()
    read = read.index_select(0, ids(rows * response))
    old, mask = torch.zeros_like(read), _mask(rows * response)
    return f.value_loss(read, old, old, mask, value_clip=0.2, denominator=1.0)[0]


def pairs(module: Any, pairs: int, length: int) -> Tensor:
    read = module(ids(2 * pairs, length), _mask(2 * pairs, length))
    chosen, rejected = read[:, -1].chunk(2)
    return f.pairwise_loss(chosen, rejected, denominator=1.0)[0]


@torch.no_grad()
def logprobs(module: Any, rows: int, prompt: int, response: int, chunk: int) -> Tensor:
    return _chosen(module, rows, prompt, response, chunk)[0]


@torch.no_grad()
def values(module: Any, rows: int, length: int) -> Tensor:
    return module(ids(rows, length))


@torch.no_grad()
def prompts(module: Any, rows: int, length: int) -> Tensor:
    def attend(
        _: Any, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any
    ) -> tuple[Tensor, None]:
        # Copies padded to the longest prompt go in, one without padding comes out.
        padded = query.clone(), key.clone(), value.clone()
        return Fused.apply(*padded, None).clone().transpose(1, 2), None

    with attending(module, attend):
        return module(
            input_ids=ids(1, rows * length),
            position_ids=ids(1, rows * length),
            use_cache=False,
            logits_to_keep=ids(rows),
        ).logits
