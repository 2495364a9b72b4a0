"""A reward model that is not trained here: what it thinks of rollouts and of pairs.

Shapes: B batch, N pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_kit.config import RunConfig
from rlhf_kit.distributed import local_device
from rlhf_kit.models import ValueModel, load_scorer, saved_normalisation
from rlhf_kit.reward import last_token_scores
from rlhf_kit.tokenization import (
    decode_response,
    encode_scored,
    load_tokenizer,
    prepare_tokenizer,
    same_tokenizer,
)
from rlhf_kit.types import PreferencePair, Rollout


class Scorer:
    """A reward model in its directory, on rollouts and on pairs: the proxy, or a held-out one."""

    def __init__(self, directory: Path, config: RunConfig, actor_tokenizer: Any) -> None:
        self.tokenizer = load_tokenizer(directory)
        prepare_tokenizer(self.tokenizer)
        self.actor_tokenizer = actor_tokenizer
        self.shares_tokenizer = same_tokenizer(actor_tokenizer, self.tokenizer)
        scorer = load_scorer(str(directory), self.tokenizer, dtype=config.critic_engine.dtype)
        self.mean, self.std = saved_normalisation(scorer)
        self.model = ValueModel(scorer).eval()
        self.model.to(local_device())
        self.max_length = config.data.max_length
        self.rows = config.ppo.micro_batch_size

    def normalised(self, rollout: Rollout, rows: int | None = None) -> Tensor:
        """[B] scores in standard deviations of the demonstrations' scores, 0 their mean.

        `rows` go into a forward pass at once; None takes ppo.micro_batch_size.
        """
        self.rows = rows or self.rows
        if self.shares_tokenizer:
            last = rollout.prompts.input_ids.shape[1] + rollout.response_mask.sum(-1) - 1
            scores = self._forward(rollout.sequences, rollout.attention_mask, last)
        else:
            texts = [
                decode_response(self.actor_tokenizer, ids[mask].tolist())
                for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)
            ]
            scores = self._texts(rollout.prompts.dialogues, texts, rollout.ended.tolist())
        return (scores - self.mean) / self.std

    def pairs(self, pairs: Sequence[PreferencePair]) -> tuple[Tensor, Tensor]:
        """Raw scores [N] of the chosen and [N] of the rejected responses."""
        dialogues, ended = [pair.prompt for pair in pairs], [True] * len(pairs)
        chosen = self._texts(dialogues, [pair.chosen or "" for pair in pairs], ended)
        rejected = self._texts(dialogues, [pair.rejected or "" for pair in pairs], ended)
        return chosen, rejected

    def _texts(
        self, dialogues: Sequence[Any], responses: Sequence[str], ended: Sequence[bool]
    ) -> Tensor:
        batch = encode_scored(self.tokenizer, dialogues, responses, ended, self.max_length)
        return self._forward(batch.input_ids, batch.attention_mask, batch.last_index)

    @torch.no_grad()
    def _forward(self, input_ids: Tensor, attention_mask: Tensor, last_index: Tensor) -> Tensor:
        """[B] scores at `last_index`, a few rows at a time."""
        device = local_device()
        parts = [
            last_token_scores(self.model(ids.to(device), mask.to(device)), last.to(device))
            for ids, mask, last in zip(
                *(x.split(self.rows) for x in (input_ids, attention_mask, last_index)), strict=True
            )
        ]
        return torch.cat(parts)
