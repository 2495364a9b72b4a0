"""Which rows share a batch, and where their padding stands, changes no loss.

A tiny causal LM and a tiny reward model, rows of any lengths; every loss is compared with that of
one row at a time without any padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_kit.batch_order import length_bucketed_batches
from rlhf_kit.functional import language_model_loss, pairwise_loss
from rlhf_kit.models import ValueModel, load_causal_lm, load_scorer, position_ids
from rlhf_kit.reward import last_token_scores, prompt_batches
from rlhf_kit.sft import language_model_forward
from rlhf_kit.tokenization import Encoded, EncodedPair, SFTBatch, collate_pairs, collate_sft

SMALL = settings(
    derandomize=True,
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
CLOSE = {"rel": 2e-5, "abs": 1e-6}
PAD, EOS = 0, 2  # a row may hold both: masks come from lengths

tokens = st.lists(st.integers(0, 60), min_size=1, max_size=9)
dialogues = st.tuples(tokens, tokens).map(
    lambda parts: Encoded([*parts[0], *parts[1], EOS], len(parts[0]))
)
pairs = st.tuples(tokens, tokens, tokens, st.integers(0, 2)).map(
    lambda parts: EncodedPair(
        Encoded([*parts[0], *parts[1], EOS], len(parts[0])),
        Encoded([*parts[0], *parts[2], EOS], len(parts[0])),
        prompt_id=str(parts[3]),
    )
)


def in_batches(rows: list[Any], order: list[list[int]]) -> list[list[Any]]:
    return [[rows[i] for i in batch] for batch in order]


def wider(batch: Any, pad: int, extra: int) -> dict[str, Any]:
    """Ids and masks of a batch with `extra` more columns of padding on the right."""
    size = (len(batch), extra)
    more = {"input_ids": torch.full(size, pad)}
    for name in ("attention_mask", "loss_mask"):
        if hasattr(batch, name):
            more[name] = torch.zeros(size, dtype=torch.bool)
    return {name: torch.cat([getattr(batch, name), part], 1) for name, part in more.items()}


@SMALL
@given(
    rows=st.lists(dialogues, min_size=1, max_size=7),
    size=st.integers(1, 4),
    seed=st.integers(0, 3),
    pad=st.integers(0, 60),
    extra=st.integers(0, 5),
)
def test_sft_order_padding_length_and_pad_id_change_no_loss(
    model_dir: Callable[..., str],
    tokenizer: Any,
    rows: list[Encoded],
    size: int,
    seed: int,
    pad: int,
    extra: int,
):
    model = _cached(load_causal_lm, model_dir, tokenizer)
    count = float(sum(len(row.input_ids) - row.prompt_length for row in rows))

    def loss(batches: list[list[Encoded]], pad: int, extra: int) -> float:
        total = 0.0
        for part in batches:
            batch = SFTBatch(**wider(collate_sft(part, pad_token_id=pad), pad, extra))
            logits = language_model_forward(model, batch)
            found = language_model_loss(logits, batch.input_ids, batch.loss_mask, denominator=count)
            total += float(found)
        return total

    alone = loss([[row] for row in rows], PAD, 0)
    lengths = [row.length for row in rows]
    bucketed = length_bucketed_batches(lengths, size, seed=seed, epoch=0)
    assert loss(in_batches(rows, bucketed), pad, extra) == pytest.approx(alone, **CLOSE)
    assert loss([rows[::-1]], pad, extra) == pytest.approx(alone, **CLOSE)


@SMALL
@given(rows=st.lists(dialogues, min_size=1, max_size=5), pad=st.integers(0, 60))
def test_the_side_of_the_padding_changes_no_sft_loss(
    model_dir: Callable[..., str], tokenizer: Any, rows: list[Encoded], pad: int
):
    model = _cached(load_causal_lm, model_dir, tokenizer)
    right = collate_sft(rows, pad_token_id=pad)
    width = right.input_ids.shape[1]
    # Each row is turned so far that its padding stands on the left.
    turn = torch.stack([(torch.arange(width) - (width - row.length)) % width for row in rows])
    left = SFTBatch(
        **{
            name: getattr(right, name).gather(1, turn)
            for name in ("input_ids", "attention_mask", "loss_mask")
        }
    )
    losses = [
        float(
            language_model_loss(
                language_model_forward(model, batch),
                batch.input_ids,
                batch.loss_mask,
                denominator=1.0,
            )
        )
        for batch in (right, left)
    ]
    assert losses[1] == pytest.approx(losses[0], **CLOSE)


@SMALL
@given(
    rows=st.lists(pairs, min_size=1, max_size=6),
    size=st.integers(1, 4),
    seed=st.integers(0, 3),
    pad=st.integers(0, 60),
)
def test_reward_model_order_and_padding_change_no_loss(
    model_dir: Callable[..., str],
    tokenizer: Any,
    rows: list[EncodedPair],
    size: int,
    seed: int,
    pad: int,
):
    model = _cached(_reward_model, model_dir, tokenizer)

    def loss(batches: list[list[EncodedPair]], pad: int) -> float:
        total = 0.0
        for part in batches:
            batch = collate_pairs(part, pad_token_id=pad)
            values = model(batch.input_ids, batch.attention_mask)
            chosen, rejected = last_token_scores(values, batch.last_index).chunk(2)
            found, _ = pairwise_loss(
                chosen, rejected, denominator=float(len(rows)), margin=0.1, center_coef=0.01
            )
            total += float(found)
        return total

    alone = loss([[row] for row in rows], PAD)
    bucketed = prompt_batches(rows, size, seed=seed, epoch=0)
    assert loss(in_batches(rows, bucketed), pad) == pytest.approx(alone, **CLOSE)
    assert loss([rows[::-1]], pad) == pytest.approx(alone, **CLOSE)


def test_positions_count_tokens_wherever_the_padding_stands():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
    assert position_ids(mask).tolist() == [[0, 0, 0, 1], [0, 1, 1, 1]]


def _reward_model(name: str, tokenizer: Any) -> ValueModel:
    return ValueModel(load_scorer(name, tokenizer))


_models: dict[Any, Any] = {}


def _cached(load: Callable[..., Any], model_dir: Callable[..., str], tokenizer: Any) -> Any:
    """One model of each kind for all examples; without gradients."""
    if load not in _models:
        torch.manual_seed(0)
        _models[load] = load(model_dir(), tokenizer).eval().requires_grad_(False)
    return _models[load]
