"""Ids -> batches; from here also all that makes ids: one door for every stage.

Masks come from lengths, never from ids. What this file gives on is made in chat_template.py
(text -> ids) and encoded_rows.py (pairs -> rows that fit).

Shapes: B batch, P prompt tokens, R response tokens, T = P + R.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rlhf_kit.chat_template import (
    CHAT_TEMPLATE,
    RefusedDialogue,
    TokenizerReport,
    decode_response,
    encode_prompt,
    encode_response,
    load_tokenizer,
    prepare_tokenizer,
    render_prompt,
    same_tokenizer,
    stop_token_ids,
)
from rlhf_kit.encoded_rows import (
    Encoded,
    EncodedPair,
    Fitting,
    as_text,
    encode_demonstrations,
    encode_dialogue,
    encode_pairs,
    keep_fitting,
)
from rlhf_kit.types import Message, PreferencePair, PromptBatch

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "CHAT_TEMPLATE",
    "Encoded",
    "EncodedPair",
    "Fitting",
    "PairBatch",
    "RefusedDialogue",
    "SFTBatch",
    "ScoreBatch",
    "TokenizerReport",
    "as_text",
    "collate_pairs",
    "collate_prompts",
    "collate_scored",
    "collate_sft",
    "decode_response",
    "encode_demonstrations",
    "encode_dialogue",
    "encode_pairs",
    "encode_prompt",
    "encode_response",
    "encode_scored",
    "keep_fitting",
    "load_tokenizer",
    "prepare_tokenizer",
    "render_prompt",
    "same_tokenizer",
    "stop_token_ids",
]


@dataclass(frozen=True)
class _Batch:
    input_ids: Tensor
    """[B, T] token ids, padded on the right."""
    attention_mask: Tensor
    """[B, T] bool, True on prompt and response tokens."""

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str) -> Self:
        """The same batch with its tensors on `device`."""
        moved = {
            name: value.to(device) for name, value in vars(self).items() if torch.is_tensor(value)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class SFTBatch(_Batch):
    """Right-padded dialogues for the next-token loss."""

    loss_mask: Tensor
    """[B, T] bool, True on the tokens to be predicted: the response's, its EOS included."""


@dataclass(frozen=True)
class ScoreBatch(_Batch):
    """Right-padded dialogues for a reward model, which reads its score at `last_index`."""

    last_index: Tensor
    """[B] int64, the position of the last token, EOS where the response has ended."""
    shortened: int = 0
    """Rows that lost their beginning because they did not fit."""


@dataclass(frozen=True)
class PairBatch(ScoreBatch):
    """B pairs as 2B dialogues: rows 0 to B - 1 are the chosen, B to 2B - 1 the rejected."""

    prompt_ids: tuple[str, ...] = ()
    """B content hashes of the prompts."""
    kinds: tuple[str, ...] = ()
    """B names of what the two responses differ in; empty where the source does not say."""


def _pad(
    sequences: Sequence[Sequence[int]], pad_token_id: int, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """ids and mask [B, T], T the longest sequence's length. The mask comes from lengths."""
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), pad_token_id, dtype=torch.int64)
    mask = torch.zeros((len(sequences), width), dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        place = slice(width - len(sequence), None) if left else slice(len(sequence))
        ids[row, place] = torch.tensor(sequence, dtype=torch.int64)
        mask[row, place] = True
    return ids, mask


def collate_sft(rows: Sequence[Encoded], *, pad_token_id: int) -> SFTBatch:
    """Dialogues for the next-token loss, which counts from `prompt_length` on."""
    ids, mask = _pad([row.input_ids for row in rows], pad_token_id)
    prompt_lengths = torch.tensor([row.prompt_length for row in rows])
    is_response = torch.arange(ids.shape[1]) >= prompt_lengths.unsqueeze(1)
    return SFTBatch(ids, mask, mask & is_response)


def collate_scored(rows: Sequence[Encoded], *, pad_token_id: int) -> ScoreBatch:
    """Dialogues to be scored at their last token."""
    ids, mask = _pad([row.input_ids for row in rows], pad_token_id)
    return ScoreBatch(ids, mask, mask.sum(dim=1) - 1)


def collate_pairs(rows: Sequence[EncodedPair], *, pad_token_id: int) -> PairBatch:
    """Preference pairs, all chosen above all rejected, so that one forward pass sees both."""
    dialogues = [row.chosen for row in rows] + [row.rejected for row in rows]
    scored = collate_scored(dialogues, pad_token_id=pad_token_id)
    return PairBatch(
        scored.input_ids,
        scored.attention_mask,
        scored.last_index,
        prompt_ids=tuple(row.prompt_id for row in rows),
        kinds=tuple(row.kind for row in rows),
    )


def collate_prompts(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[PreferencePair], *, seeds: Sequence[int]
) -> PromptBatch:
    """Prompts padded on the left, so that all responses begin at position P.

    Args:
        seeds: the sampling seed of each row.
    """
    assert len(seeds) == len(rows), "one seed a row"
    sequences = [encode_prompt(tokenizer, row.prompt) for row in rows]
    ids, mask = _pad(sequences, cast(int, tokenizer.pad_token_id), left=True)
    dialogues = tuple(row.prompt for row in rows)
    return PromptBatch(ids, mask, torch.tensor(seeds, dtype=torch.int64), dialogues)


def encode_scored(
    tokenizer: PreTrainedTokenizerBase,
    dialogues: Sequence[Sequence[Message]],
    responses: Sequence[str],
    ended: Sequence[bool],
    max_length: int,
) -> ScoreBatch:
    """Rollouts written anew for a reward model that has another tokenizer than the actor.

    A response that has not ended gets no EOS. A sequence over `max_length` loses its beginning,
    the oldest turns, because the score is read at its end; such rows are counted in `shortened`.
    """
    rows, shortened = [], 0
    for dialogue, response, has_ended in zip(dialogues, responses, ended, strict=True):
        prompt_ids = encode_prompt(tokenizer, dialogue)
        response_ids = encode_response(tokenizer, dialogue, response)
        ids = prompt_ids + (response_ids if has_ended else response_ids[:-1])
        shortened += len(ids) > max_length
        rows.append(Encoded(ids[-max_length:], 0))
    batch = collate_scored(rows, pad_token_id=cast(int, tokenizer.pad_token_id))
    return replace(batch, shortened=shortened)
