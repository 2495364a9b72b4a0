"""Micro-batches of a rollout: where their tokens stand, what padding they compute, who meets whom.

Shapes: B batch, P prompt, R response, T = P + R; t the longest row of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import copied

from rlhf_kit import distributed
from rlhf_kit.config import RunConfig
from rlhf_kit.invariants import check_first_batch
from rlhf_kit.micro_batches import micro_batches, within_tokens
from rlhf_kit.mixture import MixtureLoss
from rlhf_kit.ppo import PPOTrainer
from rlhf_kit.rlhf_engine import RLHFEngine
from rlhf_kit.tokenization import Encoded
from rlhf_kit.types import PromptBatch

PROMPTS, RESPONSES = (3, 1, 2), (1, 4, 2)
"""Lengths of three rows of P = 3 and R = 4."""


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [3, 7] that name their row and place, 0 on padding; and the mask."""
    ids = torch.zeros(3, 7, dtype=torch.int64)
    for row, (p, r) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        ids[row, 3 - p : 3 + r] = 10 * (row + 1) + torch.arange(p + r)
    return ids, ids > 0


def test_rows_move_to_the_first_column_and_their_tokens_are_found_again():
    ids, mask = batch()
    first, last = micro_batches(ids, mask, 4, size=2)
    assert first.input_ids[0, :4].tolist() == [10, 11, 12, 13]
    assert first.input_ids[1].tolist() == [20, 21, 22, 23, 24]
    assert first.input_ids.flatten()[first.places].tolist() == [13, 21, 22, 23, 24]
    assert first.slots.tolist() == [0, 4, 5, 6, 7]  # [B, R] = [3, 4]
    assert first.input_ids.flatten()[first.lasts].tolist() == [13, 24]
    assert last.input_ids.tolist() == [[30, 31, 32, 33]] and last.rows.tolist() == [2]
    assert torch.equal(last.of(ids[:, 3:]), torch.tensor([32, 33]))


def test_values_are_read_before_each_token_and_spread_over_the_responses():
    ids, mask = batch()
    (micro,) = micro_batches(ids, mask, 4)
    read = micro.before(micro.input_ids)
    expected = [[12, 0, 0, 0], [20, 21, 22, 23], [31, 32, 0, 0]]
    assert micro.spread(read, 4).tolist() == expected


def test_a_part_of_a_batch_knows_its_places_in_the_whole():
    ids, mask = batch()
    (micro,) = micro_batches(ids[1:], mask[1:], 4, first=1)
    assert micro.rows.tolist() == [1, 2]
    assert torch.equal(micro.of(ids[:, 3:]), ids[1:, 3:][mask[1:, 3:]])


def test_rows_padded_on_the_right_are_cut_as_well():
    ids = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]])
    (micro,) = micro_batches(ids, ids > 0, 1)
    assert micro.input_ids.flatten()[micro.lasts].tolist() == [3, 7]


def test_groups_hold_as_many_tokens_as_they_may_and_no_more():
    lengths = [5, 300, 7, 120, 121, 6]
    groups = within_tokens(lengths, 260)
    assert groups == [[1], [4, 3], [2, 5, 0]]  # 300 alone; 2 x 128; 3 x 32
    assert sorted(sum(groups, [])) == list(range(6))
    assert within_tokens([33] * 4, 128) == [[0, 1], [2, 3]]
    assert within_tokens([33] * 4, 127) == [[0], [1], [2], [3]]


def test_micro_batches_by_tokens_have_few_widths():
    lengths = torch.randint(1, 200, (64,), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(200) < lengths.unsqueeze(1)
    parts = micro_batches(mask.long(), mask, 1, size=400, by_tokens=True)
    assert {m.input_ids.shape[1] for m in parts} <= {32, 64, 96, 128, 160, 192, 200}
    for micro in parts:
        assert micro.input_ids.flatten()[micro.lasts].eq(1).all()


def test_micro_batches_by_tokens_have_few_numbers_of_rows_and_copies_count_for_nothing():
    lengths = torch.tensor([30] * 37 + [10] * 3)
    mask = torch.arange(64) < lengths[:, None]
    sequences = torch.arange(40)[:, None] * 100 + torch.arange(64)
    parts = micro_batches(sequences, mask, 60, size=64 * 32, by_tokens=True)
    assert [len(part.input_ids) for part in parts] == [48]  # 40 rows, and 8 that come again
    assert torch.equal(parts[0].input_ids[40:], parts[0].input_ids[39:40].expand(8, -1))
    assert len(parts[0].rows) == len(parts[0].lasts) == 40
    assert len(parts[0].places) == 37 * 26 + 3 * 6 and int(parts[0].places.max()) < 40 * 32
    # Where there is no room for copies, and where rows are few, there are none.
    (tight,) = micro_batches(sequences, mask, 60, size=40 * 32, by_tokens=True)
    few = micro_batches(sequences[:5], mask[:5], 60, size=64 * 32, by_tokens=True)
    assert len(tight.input_ids) == 40 and len(few[0].input_ids) == 5


def test_ranks_make_as_many_groups_as_the_one_that_needs_most(monkeypatch: pytest.MonkeyPatch):
    assert within_tokens([2] * 8, 256, at_least=3) == [[0, 1], [2, 3], [4, 5, 6, 7]]
    assert within_tokens([2, 2], 64, at_least=2) == [[0], [1]]
    ids, mask = batch()
    monkeypatch.setattr(distributed, "all_max", lambda mine: mine + 1)  # another rank needs more
    assert len(micro_batches(ids, mask, 4, size=99, by_tokens=True)) == 2
    assert len(micro_batches(ids, mask, 4, size=99, by_tokens=True, meet=False)) == 1


def test_ragged_rows_cost_less_padding_by_tokens_than_by_rows():
    lengths = torch.randint(1, 513, (64,), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(512) < lengths.unsqueeze(1)
    by_rows = micro_batches(mask.long(), mask, 1, size=8)
    by_tokens = micro_batches(mask.long(), mask, 1, size=8 * 512, by_tokens=True)
    real = int(lengths.sum())
    computed = [sum(m.input_ids.numel() for m in parts) for parts in (by_rows, by_tokens)]
    assert max(m.input_ids.numel() for m in by_tokens) <= 8 * 512
    assert real / computed[0] < 0.65 and real / computed[1] > 0.8
    assert len(by_tokens) < len(by_rows)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_first_ratio_is_one_to_the_last_bit_in_every_group_of_tokens(
    dtype: str,
    build: Callable[[RunConfig], RLHFEngine],
    tiny_args: Callable[..., RunConfig],
    prompts: Callable[..., PromptBatch],
):
    args = tiny_args(
        ppo__micro_batch_tokens=60, actor_engine__dtype=dtype, actor_engine__zero_stage=2
    )
    trainer = PPOTrainer(engine=build(args), args=args)
    experience = trainer.generate_experience(prompts())
    checks = {check.name: check for check in check_first_batch(trainer, experience)}
    assert checks["the first ratio is 1"].passed
    trainer.engine.actor.train()
    for rows in torch.arange(8).split(4):
        minibatch = experience.rows(rows)
        parts = trainer.micro_batches(minibatch, 60)
        assert len(parts) > 1
        for micro in parts:
            _, metrics = trainer._policy(trainer.engine.actor, minibatch, 1.0, micro)
            assert float(metrics["policy/ratio_mean"]) == len(micro.places)
            assert float(metrics["policy/approx_kl"]) == 0


@pytest.mark.parametrize("tokens", [30, 60, 10_000])
def test_any_number_of_tokens_at_once_gives_the_same_step(
    tokens: int,
    build: Callable[[RunConfig], RLHFEngine],
    tiny_args: Callable[..., RunConfig],
    prompts: Callable[..., PromptBatch],
):
    ends = []
    for count in (0, tokens):
        args = tiny_args(ppo__micro_batch_tokens=count, ppo__actor_optimizer__eps=1e-2)
        texts = [Encoded([1 + i, *range(3, 9 + i)], 0) for i in range(5)]
        trainer = PPOTrainer(engine=build(args), args=args, mixture_rows=None)
        trainer.mixture = MixtureLoss(
            texts,
            trainer.engine,
            tiny_args(ppo__mixture__kind="coef", ppo__micro_batch_tokens=count),
        )
        metrics = trainer.step(trainer.generate_experience(prompts()))
        ends.append((metrics, copied(trainer.engine.actor.module)))
    (rows, weights), (by_tokens, others) = ends
    for key in ("policy/loss", "value/loss", "mixture/loss", "objective/entropy"):
        assert by_tokens[key] == pytest.approx(rows[key], rel=1e-4, abs=1e-6)
    for key, value in weights.items():
        torch.testing.assert_close(others[key], value, atol=2e-6, rtol=0)


def test_memory_that_runs_out_halves_the_tokens(
    build: Callable[[RunConfig], RLHFEngine],
    tiny_args: Callable[..., RunConfig],
    prompts: Callable[..., PromptBatch],
    monkeypatch: pytest.MonkeyPatch,
):
    args = tiny_args(ppo__micro_batch_tokens=800)
    trainer = PPOTrainer(engine=build(args), args=args)
    score, sizes = trainer.engine.scores, []

    def short(*inputs: Any, size: int, **how: Any) -> torch.Tensor:
        sizes.append(size)
        if size > 200:
            raise torch.OutOfMemoryError
        return score(*inputs, size=size, **how)

    monkeypatch.setattr(trainer.engine, "scores", short)
    trainer.generate_experience(prompts())
    assert sizes == [800, 400, 200] and trainer.micro_batch_tokens == 200
    assert trainer.state()["micro_batch_tokens"] == 200
