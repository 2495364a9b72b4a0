"""The rows being decoded, on the device: what each slot holds, and the responses so far.

Shapes: S slots, K slots sampled for at once, B rows of the batch, R longest response, V vocabulary.

A step reads and writes these tensors and nothing of the host, so that it can be captured once
and replayed: sampling, the test for the end and the step forward all happen on the device. A slot
that ended has `alive` 0 and length 0, and decodes on without effect until it is filled again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_kit.config import GenerationConfig
from rlhf_kit.distributed import sent
from rlhf_kit.hybrid_engine.sampling import draw, log_distribution, uniforms

TOKEN, LENGTH, ROW, AT, ALIVE, BLOCK = range(6)
"""Rows of `Slots.state`: the token to feed, the tokens in the cache before it, the row of the
batch, the place in its response that is sampled next, 1 while the row has not ended, and the
block of the cache that holds its keys and values."""


class Slots:
    """State [6, S] of the slots, and the responses [B, R] they write."""

    def __init__(
        self,
        slots: int,
        rows: int,
        limit: int,
        *,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        device: torch.device,
    ) -> None:
        self.state = torch.zeros(6, slots, dtype=torch.long, device=device)
        self.order = torch.arange(slots, device=device)
        self.response_ids = torch.full((rows, limit), pad_token_id, device=device)
        self.logprobs = torch.zeros(rows, limit, device=device)
        self.uniform = torch.zeros(rows, limit, dtype=torch.float64, device=device)
        self.produced = torch.zeros(rows, dtype=torch.long, device=device)
        """[B] tokens of each response so far."""
        self.ended = torch.zeros(rows, dtype=torch.long, device=device)
        """[B] 1 where the response ended by an EOS."""
        self.eos = torch.tensor(list(eos_token_ids), device=device)
        self.pad_token_id = pad_token_id

    def begin(self, seeds: Tensor) -> None:
        """Forget the last batch; rows sample with `seeds` [b], b <= B."""
        self.state.zero_()
        self.state[BLOCK] = self.order
        self.response_ids.fill_(self.pad_token_id)
        self.logprobs.zero_()
        self.produced.zero_()
        self.ended.zero_()
        places = torch.arange(self.uniform.shape[1], device=seeds.device)
        self.uniform[: len(seeds)] = uniforms(seeds, places)

    def fill(self, slots: Tensor, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Put rows whose prompts, of `lengths` tokens, are in the cache into `slots` [K]."""
        k, device = len(rows), self.state.device
        new = torch.tensor([[0] * k, list(lengths), list(rows), [0] * k, [1] * k])
        self.state[:BLOCK, slots] = sent(new, device)

    def move(self, source: Tensor, target: Tensor) -> None:
        """Move slots [K] into free ones, all but their blocks; those they leave are free then."""
        self.state[:BLOCK, target] = self.state[:BLOCK, source]
        self.state[LENGTH, source] = 0
        self.state[ALIVE, source] = 0

    def swap_blocks(self, source: Tensor, target: Tensor) -> None:
        """Let slots [K] and [K] have each other's blocks."""
        both, other = torch.cat([source, target]), torch.cat([target, source])
        self.state[BLOCK, both] = self.state[BLOCK, other]

    def sample(self, logits: Tensor, slots: Tensor, config: GenerationConfig) -> None:
        """Sample for `slots` [K] from their logits [K, V] and move them on.

        Logits of a prompt's last token or of a decoded one: the place in the response says which.
        """
        if logits.is_cuda:
            token, logprob = self._sample_fused(logits, slots, config)
        else:
            token, logprob = self._sample(logits, slots, config)
        self._advance(token, logprob, slots, config)

    def _sample(
        self, logits: Tensor, slots: Tensor, config: GenerationConfig
    ) -> tuple[Tensor, Tensor]:
        row, at = self.state[ROW, slots], self.state[AT, slots]
        forbidden = None
        if config.min_new_tokens:
            forbidden = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
            forbidden[:, self.eos] = (at < config.min_new_tokens)[:, None]
        logprobs = log_distribution(
            logits,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            forbidden=forbidden,
        )
        return draw(logprobs, self.uniform[row, at] if config.temperature > 0 else None)

    def _sample_fused(
        self, logits: Tensor, slots: Tensor, config: GenerationConfig
    ) -> tuple[Tensor, Tensor]:
        cut = 0 < config.top_k < logits.shape[1] or config.top_p < 1
        if cut or config.temperature == 0:
            return self._sample(logits, slots, config)
        from rlhf_kit.hybrid_engine import kernels

        return kernels.sample(
            logits,
            slots,
            self.state,
            self.uniform,
            self.eos,
            temperature=config.temperature,
            min_new_tokens=config.min_new_tokens,
        )

    def _advance(
        self, token: Tensor, logprob: Tensor, slots: Tensor, config: GenerationConfig
    ) -> None:
        limit = config.max_new_tokens
        if token.is_cuda:
            from rlhf_kit.hybrid_engine import kernels

            kernels.advance(
                slots,
                self.state,
                token,
                logprob,
                self.response_ids,
                self.logprobs,
                self.produced,
                self.ended,
                self.eos,
                limit=limit,
            )
        else:
            self.advance(token, logprob, slots, limit)

    def advance(self, token: Tensor, logprob: Tensor, slots: Tensor, limit: int) -> None:
        """Write down a token and its logprob for each of `slots` [K] that is alive."""
        _, length, row, at, alive, _ = self.state[:, slots]
        living = alive.bool()
        is_eos = (token[:, None] == self.eos).any(dim=1)
        written = row[living], at[living]
        self.response_ids[written] = token[living]
        self.logprobs[written] = logprob[living]
        self.produced[row[living]] = at[living] + 1
        self.ended[row[living]] = is_eos[living].long()
        goes_on = living & ~is_eos & (at + 1 < limit)
        # The first token of a response comes from its prompt, which is all in the cache.
        length = length + (at > 0)
        zero = torch.zeros_like(at)
        self.state[TOKEN, slots] = token
        self.state[LENGTH, slots] = torch.where(goes_on, length, zero)
        self.state[AT, slots] = torch.where(goes_on, at + 1, zero)
        self.state[ALIVE, slots] = goes_on.long()
