"""Micro-batches of a rollout: which rows pass through a model together, and how they lie there.

Shapes: B rows of a batch, P prompt, R response, T = P + R; b rows of a micro-batch, t its longest
row, N its response tokens.

A rollout has its prompts padded on the left and its responses on the right. In a micro-batch every
row starts at column 0 and is padded on the right alone. Padding then comes after all that counts,
where causal attention never looks: no mask, no positions, and the kernels for whole sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_kit import distributed

ROUND = 32
"""Micro-batches by tokens are a multiple of this wide: a GPU's libraries choose (and cuDNN even
builds) their kernels by shape, which takes longer than the pass when every shape is a new one."""
ROUND_ROWS = 16
"""Those of at least so many rows have a multiple of it, the last row coming again."""


@dataclass(frozen=True)
class MicroBatch:
    """Some rows of a batch, and where their tokens stand. All tensors on the batch's device."""

    rows: Tensor
    """[b] their places in the batch."""
    input_ids: Tensor
    """[b, t] from the first token of the prompt on; behind a row's last token stands anything.
    Further rows behind the b are copies, which nothing points to."""
    places: Tensor
    """[N] where the response tokens stand in the flattened `input_ids`, row by row."""
    slots: Tensor
    """[N] where they stand in the batch's flattened [B, R]."""
    lasts: Tensor
    """[b] where each row's last token stands in the flattened `input_ids`."""

    def of(self, values: Tensor) -> Tensor:
        """[N] the values [B, R] of this micro-batch's response tokens."""
        return values.flatten().index_select(0, self.slots)

    def spread(self, values: Tensor, response_length: int) -> Tensor:
        """[B, R] of [N] values, where all rows of the batch are in here; 0 elsewhere."""
        whole = values.new_zeros(len(self.rows) * response_length)
        return whole.index_copy(0, self.slots, values).view(-1, response_length)

    def before(self, values: Tensor) -> Tensor:
        """[N] of a model's values [b, t] those that were read before each response token."""
        return values.flatten().index_select(0, self.places - 1)


def micro_batches(
    sequences: Tensor,
    attention_mask: Tensor,
    response_length: int,
    *,
    size: int | None = None,
    by_tokens: bool = False,
    meet: bool = True,
    first: int = 0,
) -> list[MicroBatch]:
    """Cut [B, T] sequences, R = `response_length`, into micro-batches.

    Of `size` rows each, in their order, or `by_tokens` of at most `size` tokens (`within_tokens`);
    or all rows in one. Each row's tokens are in one piece, wherever it starts. Where ranks `meet`
    in the passes, all call this with as many rows each, and get as many parts. `first` is the
    place in the batch of the first row, where others precede.

    A GPU's host waits here once, for the lengths: nothing in what comes out makes it wait again.
    """
    prompt_columns = sequences.shape[1] - response_length
    starts, prompts, responses = torch.stack(
        [
            attention_mask.long().argmax(1),
            attention_mask[:, :prompt_columns].sum(1),
            attention_mask[:, prompt_columns:].sum(1),
        ]
    ).cpu()
    lengths = prompts + responses
    if by_tokens and size:
        groups = within_tokens(lengths.tolist(), size)
        if meet:
            most = distributed.all_max(torch.tensor(len(groups), device=sequences.device))
            groups = within_tokens(lengths.tolist(), size, at_least=int(most))
    else:
        places = torch.arange(len(sequences))
        groups = [part.tolist() for part in places.split(size or len(sequences))]
    made = []
    for group in groups:
        index = torch.as_tensor(group)
        count, width = responses[index], int(lengths[index].max())
        if by_tokens:  # no wider than the batch, which fits the model's positions
            width = min(rounded(width), sequences.shape[1])
        # Every response token's row within the micro-batch, and its number in its response.
        row = torch.arange(len(index)).repeat_interleave(count)
        number = torch.arange(len(row)) - (count.cumsum(0) - count)[row]
        columns = starts[index].unsqueeze(1) + torch.arange(width)
        index, columns, places, slots, lasts = (
            distributed.sent(tensor, sequences.device)
            for tensor in (
                index,
                columns.clamp(max=sequences.shape[1] - 1),
                row * width + prompts[index[row]] + number,
                (index[row] + first) * response_length + number,
                torch.arange(len(index)) * width + lengths[index] - 1,
            )
        )
        ids = sequences.index_select(0, index).gather(1, columns)
        if by_tokens:
            ids = torch.cat([ids, ids[-1:].expand(_copies(*ids.shape, size), -1)])
        made.append(MicroBatch(index + first, ids, places, slots, lasts))
    return made


def _copies(rows: int, width: int, tokens: int | None) -> int:
    """Rows to add to a group, which then still has at most `tokens` tokens."""
    more = -rows % ROUND_ROWS
    room = (rows + more) * width <= (tokens or 0)
    return more if rows > ROUND_ROWS and room else 0


def rounded(width: int) -> int:
    """The next multiple of ROUND."""
    return -(-width // ROUND) * ROUND


def within_tokens(lengths: Sequence[int], tokens: int, *, at_least: int = 1) -> list[list[int]]:
    """Rows in groups of at most `tokens` tokens, padding counted; a longer row goes alone.

    Longest first, rows of similar length together. `at_least` so many groups, for ranks that
    meet in every pass; there must be as many rows.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if groups and (len(groups[-1]) + 1) * rounded(lengths[groups[-1][0]]) <= tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    while len(groups) < at_least:
        place = max(range(len(groups)), key=lambda place: len(groups[place]))
        half = len(groups[place]) // 2
        groups[place : place + 1] = [groups[place][:half], groups[place][half:]]
    return groups
