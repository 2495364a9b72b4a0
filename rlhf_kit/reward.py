"""Stage 2: the reward model, a last-token Bradley-Terry classifier.

Shapes: B pairs, T sequence tokens. A batch of pairs is one forward of 2B rows: chosen, rejected.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_kit import distributed, fingerprint
from rlhf_kit.config import RewardConfig
from rlhf_kit.distributed import derive_seed
from rlhf_kit.faults import Faults
from rlhf_kit.functional import pairwise_loss
from rlhf_kit.guarded_steps import GuardedSteps
from rlhf_kit.hybrid_engine.training import TrainingEngine
from rlhf_kit.models import ValueModel
from rlhf_kit.tokenization import Encoded, EncodedPair, collate_pairs, collate_scored
from rlhf_kit.training_state import State


def last_token_scores(values: Tensor, last_index: Tensor) -> Tensor:
    """[B, T] values and [B] index of each row's last token -> [B] scores."""
    return values.gather(1, last_index.unsqueeze(1)).squeeze(1)


def prompt_batches(
    rows: Sequence[EncodedPair], batch_size: int, *, seed: int, epoch: int
) -> list[list[int]]:
    """Index lists of about `batch_size` pairs; all pairs of one prompt fall into one batch.

    Pairs of a prompt are correlated, and spread over steps they are fitted several times
    (InstructGPT, appendix C.2). Prompts of similar length share a batch, batches come in random
    order. A batch holds at most `batch_size` pairs unless one prompt alone has more.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[row.prompt_id].append(index)
    chance = random.Random(derive_seed("pairs", seed, epoch))
    units = list(groups.values())
    chance.shuffle(units)
    batches: list[list[int]] = []
    span = 16 * batch_size
    for start in range(0, len(units), span):
        window = sorted(units[start : start + span], key=lambda unit: rows[unit[0]].length)
        batch: list[int] = []
        for unit in window:
            if batch and len(batch) + len(unit) > batch_size:
                batches.append(batch)
                batch = []
            batch = [*batch, *unit]
        batches.append(batch)
    chance.shuffle(batches)
    return batches


class RewardTrainer:
    """`step(rows)` trains on one batch of pairs; `compare` and `scores` evaluate."""

    def __init__(
        self,
        engine: TrainingEngine,
        config: RewardConfig,
        *,
        pad_token_id: int,
        faults: Faults | None = None,
    ):
        """`faults` says what to do when something breaks; None takes the defaults."""
        assert isinstance(engine.module, ValueModel)
        self.engine = engine
        self.config = config
        self.pad_token_id = pad_token_id
        self.faults = faults or Faults()
        self.steps = GuardedSteps(
            engine,
            self.faults,
            micro_batch_size=config.micro_batch_size,
            setting="reward.micro_batch_size",
        )

    def _pair_scores(self, rows: Sequence[EncodedPair]) -> tuple[Tensor, Tensor]:
        """Scores [B] of the chosen and of the rejected responses, from one forward."""
        batch = collate_pairs(rows, pad_token_id=self.pad_token_id).to(self.engine.device)
        values = self.engine(batch.input_ids)  # padded on the right: no mask
        chosen, rejected = last_token_scores(values, batch.last_index).chunk(2)
        return chosen, rejected

    def step(self, rows: Sequence[EncodedPair]) -> dict[str, float]:
        """One optimiser step on the pairs of one global batch."""
        self.steps.begin()
        totals = self.steps.within_memory("training", lambda size: self._backward(rows, size))
        summed = distributed.all_sum(torch.stack(list(totals.values())))
        metrics: dict[str, float] = dict(zip(totals, summed.tolist(), strict=True))
        metrics["data/fingerprint"] = fingerprint.of_batch(
            [row.chosen.prompt_length, *row.chosen.input_ids, *row.rejected.input_ids]
            for row in rows
        )
        return self.steps.end(metrics)

    def _backward(self, rows: Sequence[EncodedPair], size: int) -> dict[str, Tensor]:
        """Add the gradients of this rank's micro-batches; its share of the metrics."""
        totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.engine.device))
        left = len(rows[distributed.rank() :: distributed.world_size()])
        for part in distributed.micro_batches(distributed.filled(rows, rows[0]), size):
            chosen, rejected = self._pair_scores(part)
            count = min(len(part), left)  # a filler is scored, so that ranks meet, and left out
            left -= count
            loss, metrics = pairwise_loss(
                chosen[:count],
                rejected[:count],
                denominator=float(len(rows)),
                margin=self.config.margin,
                center_coef=self.config.center_coef,
            )
            self.steps.backward(loss)
            for key, value in {"loss/train": loss.detach(), **metrics}.items():
                totals[key] = totals[key] + value
        return totals

    @torch.no_grad()
    def margins(self, rows: Sequence[EncodedPair]) -> Tensor:
        """Score differences chosen - rejected [B], in the order of `rows`, on every rank."""
        self.engine.eval()

        def differences(size: int) -> Tensor:
            parts = []
            for start in range(0, len(rows), size):
                chosen, rejected = self._pair_scores(rows[start : start + size])
                parts.append(chosen - rejected)
            return torch.cat(parts).cpu()

        return self.steps.within_memory("evaluating", differences)

    def accuracy(self, rows: Sequence[EncodedPair]) -> dict[str, float]:
        """`eval/accuracy`, and `eval/accuracy/<kind>` for each kind of pair the source names."""
        right = (self.margins(rows) > 0).float()
        result = {"eval/accuracy": float(right.mean())}
        for kind in sorted({row.kind for row in rows} - {""}):
            chosen = torch.tensor([row.kind == kind for row in rows])
            result[f"eval/accuracy/{kind}"] = float(right[chosen].mean())
        return result

    @torch.no_grad()
    def normalisation(self, rows: Sequence[Encoded]) -> tuple[float, float]:
        """Mean and standard deviation of the scores of demonstrations.

        A Bradley-Terry model knows differences only, so its zero is arbitrary: PPO subtracts
        the mean and divides by the standard deviation (InstructGPT, appendix C.2 and C.4;
        Stiennon et al. 2020), which makes one kl_coef mean the same for any reward model.
        """
        self.engine.eval()

        def scored(size: int) -> Tensor:
            parts = []
            for start in range(0, len(rows), 2 * size):  # a pair is two rows
                part = rows[start : start + 2 * size]
                batch = collate_scored(part, pad_token_id=self.pad_token_id).to(self.engine.device)
                values = self.engine(batch.input_ids)  # padded on the right: no mask
                parts.append(last_token_scores(values, batch.last_index))
            return torch.cat(parts).double()

        scores = self.steps.within_memory("scoring demonstrations", scored)
        return float(scores.mean()), max(float(scores.std(unbiased=False)), 1e-6)

    def state(self) -> State:
        return self.steps.state()

    def load_state(self, state: State) -> None:
        self.steps.load_state(state)
