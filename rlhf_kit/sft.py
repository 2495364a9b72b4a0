"""Stage 1: supervised fine-tuning on demonstrations, with the loss on responses only.

Shapes: B batch, T sequence tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from rlhf_kit import distributed, fingerprint
from rlhf_kit.config import SFTConfig
from rlhf_kit.faults import Faults
from rlhf_kit.functional import language_model_loss
from rlhf_kit.hybrid_engine.training import TrainingEngine
from rlhf_kit.models import position_ids
from rlhf_kit.tokenization import Encoded, SFTBatch, collate_sft
from rlhf_kit.training_state import State


def language_model_forward(model: Callable[..., Any], batch: SFTBatch) -> torch.Tensor:
    """Logits [B, T, V] of a right-padded batch by a causal LM, or an engine around one."""
    return model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=position_ids(batch.attention_mask),
        use_cache=False,
    ).logits


class SFTTrainer:
    """`step(rows)` trains on the rows of one global batch, `evaluate(rows)` gives their loss."""

    def __init__(
        self,
        engine: TrainingEngine,
        config: SFTConfig,
        *,
        pad_token_id: int,
        faults: Faults | None = None,
    ):
        """`faults` says what to do when something breaks; None takes the defaults."""
        self.engine = engine
        self.config = config
        self.pad_token_id = pad_token_id
        self.faults = faults or Faults()
        self.faults.place = [(engine, "steps_done")]
        self.micro_batch_size = config.micro_batch_size

    def _batches(self, rows: Sequence[Encoded], size: int) -> list[SFTBatch]:
        """This rank's micro-batches, on the device; rows without loss make the shares even."""
        row = min(rows, key=lambda row: row.length)
        shared = distributed.filled(rows, replace(row, prompt_length=row.length))
        return [
            collate_sft(part, pad_token_id=self.pad_token_id).to(self.engine.device)
            for part in distributed.micro_batches(shared, size)
        ]

    def _loss_tokens(self, rows: Sequence[Encoded]) -> float:
        """Response tokens of the global batch: what every token's loss is divided by."""
        batches = self._batches(rows, self.micro_batch_size)
        count = sum(int(batch.loss_mask[:, 1:].sum()) for batch in batches)
        return float(distributed.all_sum(torch.tensor(float(count), device=self.engine.device)))

    def step(self, rows: Sequence[Encoded]) -> dict[str, float]:
        """One optimiser step; the metrics are means over all response tokens of the batch."""
        self.engine.train()
        self.faults.step = self.engine.steps_done + 1
        tokens = self._loss_tokens(rows)
        total, self.micro_batch_size = self.faults.within_memory(
            "training",
            self.micro_batch_size,
            lambda size: self._backward(self._batches(rows, size), tokens),
            lower="sft.micro_batch_size",
            undo=self.engine.drop_gradients,
            whole=self.engine.config.zero_stage < 3,
        )
        metrics = {
            "loss/train": float(distributed.all_sum(total)),
            "data/fingerprint": fingerprint.of_batch(
                [row.prompt_length, *row.input_ids] for row in rows
            ),
        }
        info = self.faults.step_if_finite(metrics, self.engine)
        if info is None:
            return {**metrics, "faults/skipped": 1.0}
        return {**metrics, "optim/lr": info.learning_rate, "optim/grad_norm": info.grad_norm}

    def _backward(self, batches: Sequence[SFTBatch], tokens: float) -> torch.Tensor:
        """Add the gradients of this rank's micro-batches; its share of the loss."""
        total = torch.zeros((), device=self.engine.device)
        for batch in batches:
            loss = language_model_loss(
                language_model_forward(self.engine, batch),
                batch.input_ids,
                batch.loss_mask,
                denominator=tokens,
            )
            self.faults.backward(self.engine, loss)
            total += loss.detach()
        return total

    @torch.no_grad()
    def evaluate(self, rows: Sequence[Encoded]) -> float:
        """Mean loss a response token over `rows`, weighted by tokens and not by batches."""
        self.engine.eval()
        tokens = self._loss_tokens(rows)

        def loss(size: int) -> torch.Tensor:
            total = torch.zeros((), device=self.engine.device)
            for batch in self._batches(rows, size):
                logits = language_model_forward(self.engine, batch)
                total += language_model_loss(
                    logits, batch.input_ids, batch.loss_mask, denominator=tokens
                )
            return total

        total, self.micro_batch_size = self.faults.within_memory(
            "evaluating",
            self.micro_batch_size,
            loss,
            lower="sft.micro_batch_size",
            undo=self.engine.drop_gradients,
            whole=self.engine.config.zero_stage < 3,
        )
        return float(distributed.all_sum(total))

    def state(self) -> State:
        """The engine's, and what faults have changed. The next rows follow from the steps."""
        return {
            "engine": self.engine.state(),
            "faults": self.faults.state(),
            "micro_batch_size": self.micro_batch_size,
        }

    def load_state(self, state: State) -> None:
        self.engine.load_state(state["engine"])
        self.faults.load_state(state["faults"])
        # Lowered since, by memory that ran out before a roll-back: it would run out again.
        self.micro_batch_size = min(self.micro_batch_size, state["micro_batch_size"])
