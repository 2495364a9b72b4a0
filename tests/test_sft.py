"""The SFT trainer: loss on responses only, weighted by tokens; its optimiser in test_training.

Shapes: B batch, T sequence tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import copied, prompt_rows, same_weights

from rlhf_kit.config import DataConfig, EngineConfig, OptimizerConfig, SFTConfig
from rlhf_kit.hybrid_engine.training import TrainingEngine
from rlhf_kit.models import load_causal_lm
from rlhf_kit.sft import SFTTrainer
from rlhf_kit.tokenization import Encoded, as_text, encode_demonstrations


@pytest.fixture
def rows(tokenizer: Any) -> list[Encoded]:
    return encode_demonstrations(tokenizer, prompt_rows(12), DataConfig()).rows


@pytest.fixture
def trainer(model_dir: Callable[..., str], tokenizer: Any) -> Callable[..., SFTTrainer]:
    def make(micro: int = 4, **optimizer: Any) -> SFTTrainer:
        engine = TrainingEngine(
            load_causal_lm(model_dir(), tokenizer),
            EngineConfig(),
            OptimizerConfig(**{"learning_rate": 3e-3, "schedule": "constant", **optimizer}),
            total_steps=20,
        )
        config = SFTConfig(micro_batch_size=micro)
        return SFTTrainer(engine, config, pad_token_id=tokenizer.pad_token_id)

    return make


def by_hand(model: Any, rows: list[Encoded]) -> float:
    """The mean loss of response tokens, one unpadded row at a time."""
    losses = []
    for row in rows:
        ids = torch.tensor([row.input_ids])
        logits = model(input_ids=ids).logits[0]
        start = max(row.prompt_length, 1)
        losses.append(F.cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="none"))
    return float(torch.cat(losses).mean().detach())


@pytest.mark.parametrize("micro", [1, 5, 12])
def test_the_evaluation_loss_is_the_mean_over_response_tokens(
    micro: int, rows: list[Encoded], trainer: Callable[..., SFTTrainer]
):
    sft = trainer(micro)
    assert sft.evaluate(rows) == pytest.approx(by_hand(sft.engine.module, rows), rel=1e-5)


def test_text_of_the_mixture_loss_counts_every_token_but_the_first(
    rows: list[Encoded], trainer: Callable[..., SFTTrainer]
):
    sft = trainer()
    texts = as_text(rows)
    assert sft.evaluate(texts) == pytest.approx(by_hand(sft.engine.module, texts), rel=1e-5)


def test_the_loss_of_a_step_is_that_before_its_update(
    rows: list[Encoded], trainer: Callable[..., SFTTrainer]
):
    sft = trainer()
    before = sft.evaluate(rows)
    metrics = sft.step(rows)
    assert metrics["loss/train"] == pytest.approx(before, rel=1e-5)
    assert metrics["optim/grad_norm"] > 0 and metrics["optim/lr"] == 3e-3


def test_evaluation_changes_no_weight(rows: list[Encoded], trainer: Callable[..., SFTTrainer]):
    sft = trainer()
    before = copied(sft.engine.module)
    sft.evaluate(rows)
    assert same_weights(before, copied(sft.engine.module))


def test_prompt_tokens_change_what_is_read_but_carry_no_loss(
    rows: list[Encoded], trainer: Callable[..., SFTTrainer]
):
    sft = trainer()
    one = rows[0]
    everything_prompt = dataclasses.replace(one, prompt_length=len(one.input_ids) - 1)
    # Only the EOS is left to predict.
    assert sft.evaluate([everything_prompt]) == pytest.approx(
        by_hand(sft.engine.module, [everything_prompt]), rel=1e-5
    )


def test_the_model_learns_its_demonstrations_by_heart(
    rows: list[Encoded], trainer: Callable[..., SFTTrainer]
):
    sft = trainer(12)
    first = sft.evaluate(rows)
    for _ in range(20):
        sft.step(rows)
    assert sft.evaluate(rows) < 0.5 * first
