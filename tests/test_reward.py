"""The reward trainer: batches by prompt, accuracy by kind, and what PPO subtracts later.

Shapes: B pairs, T sequence tokens.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import prompt_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_kit.config import DataConfig, EngineConfig, OptimizerConfig, RewardConfig
from rlhf_kit.hybrid_engine.training import TrainingEngine
from rlhf_kit.models import ValueModel, load_scorer
from rlhf_kit.reward import RewardTrainer, last_token_scores, prompt_batches
from rlhf_kit.tokenization import Encoded, EncodedPair, encode_pairs


@pytest.fixture(scope="module")
def pairs(tokenizer: Any) -> list[EncodedPair]:
    return encode_pairs(tokenizer, prompt_rows(10), DataConfig()).rows


@pytest.fixture
def trainer(model_dir: Callable[..., str], tokenizer: Any) -> Callable[..., RewardTrainer]:
    def make(stage: int = 0, **config: Any) -> RewardTrainer:
        torch.manual_seed(6)
        engine = TrainingEngine(
            ValueModel(load_scorer(model_dir(), tokenizer)),
            EngineConfig(zero_stage=stage),
            OptimizerConfig(learning_rate=3e-3, schedule="constant"),
            total_steps=20,
        )
        config = RewardConfig(**{"micro_batch_size": 4, **config})
        return RewardTrainer(engine, config, pad_token_id=tokenizer.pad_token_id)

    return make


def score_alone(trainer: RewardTrainer, row: Encoded) -> float:
    scorer = trainer.engine.module.scorer
    return scorer(input_ids=torch.tensor([row.input_ids])).logits.item()


def test_the_score_is_read_at_each_rows_own_last_token():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert last_token_scores(values, torch.tensor([2, 0])).tolist() == [3.0, 4.0]


def test_margins_keep_the_order_of_the_rows(
    pairs: list[EncodedPair], trainer: Callable[..., RewardTrainer]
):
    reward = trainer()
    expected = [score_alone(reward, p.chosen) - score_alone(reward, p.rejected) for p in pairs]
    torch.testing.assert_close(reward.margins(pairs), torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_accuracy_is_counted_by_kind(
    pairs: list[EncodedPair], trainer: Callable[..., RewardTrainer]
):
    reward = trainer()
    reward.margins = lambda rows: torch.tensor([1.0, -1.0, 2.0, 0.0] + [3.0] * 6)  # type: ignore
    found = reward.accuracy(pairs)  # kinds alternate: short, long, short, ...
    assert found == {
        "eval/accuracy": pytest.approx(0.8),
        "eval/accuracy/short": 1.0,
        "eval/accuracy/long": pytest.approx(0.6),
    }


@pytest.mark.parametrize("stage", [0, 3])
def test_micro_batches_of_pairs_add_up_and_the_model_learns_them(
    stage: int, pairs: list[EncodedPair], trainer: Callable[..., RewardTrainer]
):
    whole, parts = trainer(stage, micro_batch_size=10), trainer(stage, micro_batch_size=3)
    one, other = whole.step(pairs), parts.step(pairs)
    assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    for _ in range(19):
        parts.step(pairs)
    assert parts.accuracy(pairs)["eval/accuracy"] == 1.0


def test_the_metrics_of_a_step_are_means_over_pairs(
    pairs: list[EncodedPair], trainer: Callable[..., RewardTrainer]
):
    reward = trainer()
    chosen = [score_alone(reward, pair.chosen) for pair in pairs]
    rejected = [score_alone(reward, pair.rejected) for pair in pairs]
    metrics = reward.step(pairs)
    right = sum(a > b for a, b in zip(chosen, rejected, strict=True))
    assert metrics["reward/accuracy"] == pytest.approx(right / 10)
    assert metrics["reward/chosen"] == pytest.approx(sum(chosen) / 10, rel=1e-4)
    assert metrics["reward/rejected"] == pytest.approx(sum(rejected) / 10, rel=1e-4)


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=30),
    batch_size=st.integers(1, 8),
    epoch=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_prompts_are_never_split_and_no_batch_is_too_large(
    sizes: list[int], batch_size: int, epoch: int
):
    row = Encoded([1, 2, 3], 1)
    rows = [EncodedPair(row, row, str(i)) for i, size in enumerate(sizes) for _ in range(size)]
    batches = prompt_batches(rows, batch_size, seed=1, epoch=epoch)
    seen = Counter(index for batch in batches for index in batch)
    assert max(seen.values(), default=1) == 1
    assert len(seen) == len(rows)
    home: dict[str, int] = {}
    for number, batch in enumerate(batches):
        prompts = {rows[index].prompt_id for index in batch}
        assert len(batch) <= batch_size or len(prompts) == 1
        for name in prompts:
            assert home.setdefault(name, number) == number


def test_batches_come_in_another_order_every_epoch(pairs: list[EncodedPair]):
    first, again, second = (prompt_batches(pairs, 3, seed=1, epoch=epoch) for epoch in (0, 0, 1))
    assert first == again != second


def test_rows_of_similar_length_share_a_batch(pairs: list[EncodedPair]):
    rows = [dataclasses.replace(pairs[i % 10], prompt_id=str(i)) for i in range(40)]
    batches = prompt_batches(rows, 8, seed=1, epoch=0)
    spread = [max(rows[i].length for i in b) - min(rows[i].length for i in b) for b in batches]
    whole = max(row.length for row in rows) - min(row.length for row in rows)
    assert sum(spread) / len(spread) < 0.5 * whole


def test_scores_of_a_constant_model_do_not_divide_by_zero(
    pairs: list[EncodedPair], trainer: Callable[..., RewardTrainer]
):
    reward = trainer()
    with torch.no_grad():
        reward.engine.module.scorer.score.weight.zero_()
    mean, std = reward.normalisation([pair.chosen for pair in pairs])
    assert mean == 0.0 and std > 0
