"""The mixture loss: the pretraining objective inside PPO (InstructGPT's PPO-ptx).

InstructGPT multiplies the language model loss by 27.8 (equation 2 and appendix C.4). That number
belongs to its batch sizes and reward scale; elsewhere it drowns PPO or does nothing. The default
here measures both gradients now and then, and sets the weight so that the mixture's is a given
share of PPO's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_kit import distributed, fingerprint
from rlhf_kit.config import RunConfig, require
from rlhf_kit.functional import mixture_weight
from rlhf_kit.hybrid_engine.training import TrainingEngine
from rlhf_kit.micro_batches import within_tokens
from rlhf_kit.rlhf_engine import RLHFEngine
from rlhf_kit.sft import Text, loss_tokens, text_loss
from rlhf_kit.tokenization import Encoded, collate_sft
from rlhf_kit.training_state import State

MEASURE_EVERY = 10
"""Optimiser steps between two measurements of the gradient norms."""


def gradient_norm(gradients: Sequence[Tensor]) -> float:
    """Global norm of per-rank partial gradients, summed over ranks first."""
    flat = distributed.all_sum(torch.cat([g.flatten().float() for g in gradients]))
    return float(flat.norm())


def probe_parameters(engine: TrainingEngine) -> list[torch.nn.Parameter]:
    """The trained matrices of the last layer: where the two gradients are compared.

    A whole backward pass twice would double the cost of a step; the last layer's share of it is
    cheap, and both losses reach it through the same head.
    """
    trained = [
        (name, p) for name, p in engine.held.named_parameters() if p.requires_grad and p.dim() >= 2
    ]
    layers = [(int(part), p) for name, p in trained for part in name.split(".") if part.isdigit()]
    require(bool(layers), "the actor has no numbered layers to measure the mixture loss on")
    last = max(number for number, _ in layers)
    return [p for number, p in layers if number == last]


class MixtureLoss:
    """Draws text for each optimiser step and adds its weighted gradient to the actor's."""

    def __init__(self, rows: Sequence[Encoded], engine: RLHFEngine, args: RunConfig):
        self.rows = rows
        self.actor = engine.actor
        self.config = args.ppo.mixture
        self.seed = args.seed
        self.logprob_chunk = args.memory.logprob_chunk
        self.by_tokens = args.ppo.micro_batch_tokens > 0
        self.pad_token_id = engine.pad_token_id
        args.ppo.check_ranks(distributed.world_size())
        self.batch_size = args.ppo.mixture_rows
        self.steps = 0
        self.weight = self.config.ptx_coef if self.config.kind == "coef" else 0.0
        if self.config.kind == "grad_norm_ratio":
            require(
                self.actor.config.zero_stage < 3,
                "ppo.mixture.kind grad_norm_ratio needs whole gradients, which ZeRO-3 never has; "
                "set ppo.mixture.kind to coef, or actor_engine.zero_stage to 2",
            )

    def _drawn(self, step: int) -> list[Encoded]:
        """The texts of a step, of all ranks."""
        generator = torch.Generator().manual_seed(
            distributed.derive_seed("mixture", self.seed, step)
        )
        index = torch.randint(len(self.rows), (self.batch_size,), generator=generator)
        return [self.rows[i] for i in index.tolist()]

    def _texts(self, size: int) -> list[Text]:
        """This step's micro-batches of this rank, of `size` rows, or tokens as in PPO."""
        drawn = self._drawn(self.steps)
        parts = distributed.micro_batches(drawn, len(drawn) if self.by_tokens else size)
        if self.by_tokens:
            (mine,), ranks = parts, distributed.world_size()
            lengths = [[row.length for row in drawn[rank::ranks]] for rank in range(ranks)]
            most = max(len(within_tokens(of_rank, size)) for of_rank in lengths)
            groups = within_tokens(lengths[distributed.rank()], size, at_least=most)
            parts = [[mine[place] for place in group] for group in groups]
        return [
            Text.of(collate_sft(part, pad_token_id=self.pad_token_id), self.actor.device)
            for part in parts
        ]

    def fingerprint(self, steps: range) -> int:
        """The number of the texts of these steps."""
        return fingerprint.of_batch(row.input_ids for step in steps for row in self._drawn(step))

    def tokens(self) -> float:
        """Loss tokens of this step's text, over all ranks."""
        return loss_tokens(self._drawn(self.steps))

    def _loss(self, model: Callable[..., Any], text: Text, tokens: float) -> Tensor:
        return text_loss(model, text, denominator=tokens, chunk=self.logprob_chunk)

    def due(self) -> bool:
        """Whether the weight is to be measured now: on the first and every tenth step."""
        return self.config.kind == "grad_norm_ratio" and self.steps % MEASURE_EVERY == 0

    def gradient(self, probes: Sequence[Tensor], tokens: float, size: int) -> list[Tensor]:
        """This rank's part of the text's gradient on the probes, on the bare module."""
        total = [torch.zeros_like(p, dtype=torch.float32) for p in probes]
        for text in self._texts(size):
            loss = self._loss(self.actor.module, text, tokens)
            for sum_, grad in zip(total, torch.autograd.grad(loss, probes), strict=True):
                sum_ += grad
        return total

    def set_weight(self, policy: Sequence[Tensor], text: Sequence[Tensor]) -> None:
        """From this rank's parts of both gradients; all ranks call it."""
        norms = gradient_norm(text), gradient_norm(policy)
        if not all(map(math.isfinite, norms)):
            return  # this minibatch will be left out
        measured = mixture_weight(*norms, ratio=self.config.ratio)
        # Norms of single minibatches are noisy: move halfway, in the logarithm.
        self.weight = measured if not self.weight else (self.weight * measured) ** 0.5

    def backward(
        self, tokens: float, size: int, backward: Callable[[TrainingEngine, Tensor], None]
    ) -> Tensor:
        """Add the weighted gradient of one batch of text to the actor's; the rank's loss share.

        By `backward(actor, loss)`. `steps` goes on when the minibatch is done, as the text of a
        repeated one must be the same.
        """
        total = torch.zeros((), device=self.actor.device)
        for text in self._texts(size):
            loss = self._loss(self.actor, text, tokens)
            backward(self.actor, self.weight * loss)
            total += loss.detach()
        return total

    def state(self) -> State:
        """How many batches were drawn, which decides the next one, and the weight of now."""
        return {"steps": self.steps, "weight": self.weight}

    def load_state(self, state: State) -> None:
        self.steps, self.weight = state["steps"], state["weight"]
