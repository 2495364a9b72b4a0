"""Stage 1: supervised fine-tuning on demonstrations, with the loss on responses only.

Shapes: B batch, T sequence tokens, V vocabulary, N tokens that count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from rlhf_kit import distributed, fingerprint
from rlhf_kit.config import MemoryConfig, SFTConfig
from rlhf_kit.faults import Faults
from rlhf_kit.guarded_steps import GuardedSteps
from rlhf_kit.hybrid_engine.training import TrainingEngine
from rlhf_kit.models import position_ids
from rlhf_kit.token_logprobs import chosen_logprobs
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


class Text(NamedTuple):
    """Right-padded rows on the device, and which of their tokens the loss counts.

    A causal model needs no mask for them: padding comes after every token that counts.
    """

    input_ids: torch.Tensor
    """[B, T]"""
    places: torch.Tensor
    """[N] where the tokens that count stand in the flattened ids."""

    @classmethod
    def of(cls, batch: SFTBatch, device: torch.device) -> Text:
        """Of a batch on the CPU: a GPU that searched for places would make its host wait."""
        mask = batch.loss_mask.clone()
        mask[:, 0] = False  # nothing stands before it that could predict it
        return cls(batch.input_ids.to(device), mask.flatten().nonzero().squeeze(1).to(device))


def loss_tokens(rows: Sequence[Encoded]) -> float:
    """How many tokens of a global batch count: what every token's loss is divided by."""
    return float(sum(row.length - max(row.prompt_length, 1) for row in rows))


def text_loss(
    model: Callable[..., Any], text: Text, *, denominator: float, chunk: int
) -> torch.Tensor:
    """`language_model_loss` by a causal LM (or an engine around one), `chunk` logits at a time."""
    logprobs, _ = chosen_logprobs(model, text.input_ids, text.places, chunk=chunk)
    return -logprobs.sum() / denominator


class SFTTrainer:
    """`step(rows)` trains on the rows of one global batch, `evaluate(rows)` gives their loss."""

    def __init__(
        self,
        engine: TrainingEngine,
        config: SFTConfig,
        *,
        pad_token_id: int,
        faults: Faults | None = None,
        logprob_chunk: int = MemoryConfig.logprob_chunk,
    ):
        """`faults` says what to do when something breaks; None takes the defaults.

        `logprob_chunk` is `memory.logprob_chunk` of the run's configuration.
        """
        self.engine = engine
        self.logprob_chunk = logprob_chunk
        self.config = config
        self.pad_token_id = pad_token_id
        self.faults = faults or Faults()
        self.steps = GuardedSteps(
            engine,
            self.faults,
            micro_batch_size=config.micro_batch_size,
            setting="sft.micro_batch_size",
        )

    def _texts(self, rows: Sequence[Encoded], size: int) -> list[Text]:
        """This rank's micro-batches, on the device; rows without loss make the shares even."""
        row = min(rows, key=lambda row: row.length)
        shared = distributed.filled(rows, replace(row, prompt_length=row.length))
        return [
            Text.of(collate_sft(part, pad_token_id=self.pad_token_id), self.engine.device)
            for part in distributed.micro_batches(shared, size)
        ]

    def _loss(self, text: Text, tokens: float) -> torch.Tensor:
        return text_loss(self.engine, text, denominator=tokens, chunk=self.logprob_chunk)

    def step(self, rows: Sequence[Encoded]) -> dict[str, float]:
        """One optimiser step; the metrics are means over all response tokens of the batch."""
        self.steps.begin()
        tokens = loss_tokens(rows)
        total = self.steps.within_memory(
            "training", lambda size: self._backward(self._texts(rows, size), tokens)
        )
        return self.steps.end(
            {
                "loss/train": float(distributed.all_sum(total)),
                "data/fingerprint": fingerprint.of_batch(
                    [row.prompt_length, *row.input_ids] for row in rows
                ),
            }
        )

    def _backward(self, texts: Sequence[Text], tokens: float) -> torch.Tensor:
        """Add the gradients of this rank's micro-batches; its share of the loss."""
        total = torch.zeros((), device=self.engine.device)
        for text in texts:
            loss = self._loss(text, tokens)
            self.steps.backward(loss)
            total += loss.detach()
        return total

    @torch.no_grad()
    def evaluate(self, rows: Sequence[Encoded]) -> float:
        """Mean loss a response token over `rows`, weighted by tokens and not by batches."""
        self.engine.eval()
        tokens = loss_tokens(rows)

        def loss(size: int) -> torch.Tensor:
            total = torch.zeros((), device=self.engine.device)
            for text in self._texts(rows, size):
                total += self._loss(text, tokens)
            return total

        total = self.steps.within_memory("evaluating", loss)
        return float(distributed.all_sum(total))

    def state(self) -> State:
        return self.steps.state()

    def load_state(self, state: State) -> None:
        self.steps.load_state(state)
