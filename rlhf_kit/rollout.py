"""From prompts to rollouts to the experience PPO learns from.

Shapes: B batch, R response tokens, T = P + R.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rlhf_kit import distributed
from rlhf_kit import functional as f
from rlhf_kit.blending import epoch_order
from rlhf_kit.config import PPOConfig, require
from rlhf_kit.distributed import derive_seed
from rlhf_kit.micro_batches import MicroBatch, micro_batches
from rlhf_kit.rlhf_engine import RLHFEngine
from rlhf_kit.tokenization import collate_prompts, decode_response
from rlhf_kit.training_state import State
from rlhf_kit.types import Experience, PreferencePair, PromptBatch, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptLoader:
    """One left-padded batch of prompts an iteration: this rank's share of the global batch.

    Rows come in a fresh order every pass over them. A row's sampling seed depends on the run's
    seed, the iteration and its place in the global batch, so that neither prompts nor samples
    depend on the number of ranks.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[PreferencePair],
        *,
        batch_size: int,
        iterations: int,
        seed: int,
    ):
        """`batch_size` prompts an iteration over all ranks; ValueError with fewer rows."""
        require(
            len(rows) >= batch_size,
            f"ppo.batch_size is {batch_size}, but only {len(rows)} prompts are left; lower it",
        )
        self.tokenizer = tokenizer
        self.rows = rows
        self.batch_size = batch_size
        self.iterations = iterations
        self.seed = seed

    def __len__(self) -> int:
        return self.iterations

    def __iter__(self) -> Iterator[PromptBatch]:
        return (self[iteration] for iteration in range(self.iterations))

    def __getitem__(self, iteration: int) -> PromptBatch:
        """The batch of an iteration, from 0, whatever came before: a resumed run asks for it."""
        epoch, position = divmod(iteration, len(self.rows) // self.batch_size)
        order = epoch_order(len(self.rows), seed=self.seed, epoch=epoch)
        start = position * self.batch_size
        places = range(start, start + self.batch_size)
        places = places[distributed.rank() :: distributed.world_size()]
        return collate_prompts(
            self.tokenizer,
            [self.rows[order[place]] for place in places],
            seeds=[derive_seed("sample", self.seed, iteration, p) for p in places],
        )


class Opinions(NamedTuple):
    """What the four models say about a rollout."""

    raw_score: Tensor
    """[B] as the reward model gives it."""
    old_logprobs: Tensor
    """[B, R] of the actor."""
    ref_logprobs: Tensor
    """[B, R] of the ref."""
    values: Tensor
    """[B, R] of the critic."""


@torch.no_grad()
def ask_models(
    rollout: Rollout, models: RLHFEngine, config: PPOConfig, *, temperature: float, size: int
) -> Opinions:
    """One sweep of all models over this rank's rows, `size` rows (or tokens) at once.

    Every model reads the same micro-batches, those of the first epoch's minibatches to come. One
    model is done with all before the next begins: adapters change hands once, and where memory is
    short only one model need be on the device.
    """
    rows, response_length = rollout.response_mask.shape
    sequences, attention_mask = rollout.sequences, rollout.attention_mask
    by_tokens = config.micro_batch_tokens > 0
    minibatch = config.minibatch_size // distributed.world_size()
    parts: list[MicroBatch] = []
    for first in range(0, rows, minibatch):
        place = slice(first, first + minibatch)
        parts += micro_batches(
            sequences[place],
            attention_mask[place],
            response_length,
            size=size,
            by_tokens=by_tokens,
            first=first,
        )

    def each(ask: Callable[[MicroBatch], Tensor]) -> Tensor:
        """[B, R] of what `ask` says of each micro-batch's [N] response tokens."""
        answers = torch.zeros(rows, response_length, device=sequences.device)
        for micro in parts:
            answers.view(-1).index_copy_(0, micro.slots, ask(micro))
        return answers

    def logprobs(model: Any) -> Tensor:
        return each(lambda micro: models.logprobs(model, micro, temperature)[0])

    models.actor.eval()
    models.critic.eval()
    old_logprobs = rollout.logprobs
    if config.old_logprobs != "rollout":
        old_logprobs = logprobs(models.actor)
    with models.ref() as ref:
        ref_logprobs = logprobs(ref)
    values = each(lambda micro: micro.before(models.critic(micro.input_ids)))
    return Opinions(
        models.scores(rollout, parts, size=size, by_tokens=by_tokens),
        old_logprobs,
        ref_logprobs,
        values,
    )


@torch.no_grad()
def make_experience(
    rollout: Rollout,
    models: RLHFEngine,
    config: PPOConfig,
    *,
    kl_coef: float,
    temperature: float,
    opinions: Opinions | None = None,
) -> tuple[Experience, dict[str, float]]:
    """Score a rollout and turn it into per-token rewards, advantages and returns.

    Old logprobs and values are computed in the micro-batches of the first minibatches to come,
    row for row, so that the first ratio is 1 to the last bit. Returns the experience of this
    rank's rows and the metrics of all ranks' rows. `opinions` are `ask_models`'s, None asks now.
    """
    mask = rollout.response_mask
    raw_score, old_logprobs, ref_logprobs, values = opinions or ask_models(
        rollout,
        models,
        config,
        temperature=temperature,
        size=config.micro_batch_tokens or config.micro_batch_size,
    )
    score = f.shape_score(
        raw_score,
        rollout.ended,
        mean=models.score_mean if config.normalize_score else 0.0,
        std=models.score_std if config.normalize_score else 1.0,
        clip=config.score_clip,
        missing_eos_score=config.missing_eos_score,
    )
    rewards = f.token_rewards(score, old_logprobs, ref_logprobs, mask, kl_coef=kl_coef)
    advantages, returns = f.gae(rewards, values, mask, gamma=config.gamma, lam=config.lam)
    mean, std = f.mean_and_std(distributed.all_sum(f.moments(advantages, mask)))
    if config.whiten_advantages:
        advantages = f.whiten(advantages, mask, mean=mean, std=std)
    experience = Experience(
        sequences=rollout.sequences,
        attention_mask=rollout.attention_mask,
        response_mask=mask,
        rollout_logprobs=rollout.logprobs,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        values=values,
        score=score,
        rewards=rewards,
        advantages=advantages,
        returns=returns,
    )
    metrics = _rollout_metrics(rollout, experience, raw_score)
    return experience, {**metrics, "advantage/mean": mean, "advantage/std": std}


def rollout_state(rollout: Rollout, experience: Experience) -> State:
    """A rollout that is still to be learnt from: this rank's tensors, for as many ranks."""
    return {
        "experience": dict(vars(experience)),
        "ended": rollout.ended,
        "seeds": rollout.prompts.seeds,
    }


def restored_rollout(
    state: State, prompts: PromptBatch, device: torch.device
) -> tuple[Rollout, Experience] | None:
    """What `rollout_state` saved, where it was sampled from these prompts; all ranks call it.

    None for other prompts, and on another number of ranks. Sampling again gives the same: seeds
    belong to the rows.
    """
    sequences: Tensor | None = state["experience"]["sequences"]
    seeds: Tensor | None = state["seeds"]
    prompt_length = prompts.input_ids.shape[1]
    other = (
        sequences is None
        or seeds is None
        or not torch.equal(seeds.cpu(), prompts.seeds.cpu())
        or not torch.equal(sequences[:, :prompt_length].cpu(), prompts.input_ids.cpu())
    )
    if distributed.all_any(other, device):
        return None
    tensors = {name: tensor.to(device) for name, tensor in state["experience"].items()}
    experience = Experience(**tensors)
    rollout = Rollout(
        prompts.to(device),
        experience.sequences[:, prompt_length:],
        experience.response_mask,
        experience.rollout_logprobs,
        state["ended"].to(device),
    )
    return rollout, experience


def _rollout_metrics(
    rollout: Rollout, experience: Experience, raw_score: Tensor
) -> dict[str, float]:
    """Means over the responses, or the response tokens, of all ranks."""
    mask = experience.response_mask
    k1 = f.kl_k1(experience.old_logprobs, experience.ref_logprobs)
    k3 = f.kl_k3(experience.old_logprobs, experience.ref_logprobs)
    gap = (experience.rollout_logprobs - experience.old_logprobs).abs()
    residuals = f.moments(experience.returns - experience.values, mask)
    returns = f.moments(experience.returns, mask)
    ended = rollout.ended.float().sum()
    sums = {
        "objective/kl": f.masked_sum(k1, mask),
        "objective/kl_k3": f.masked_sum(k3, mask),
        "objective/score_raw": raw_score.sum(),
        "objective/score": experience.score.sum(),
        "objective/reward_sum": f.masked_sum(experience.rewards, mask),
        "response/length": mask.sum(),
        "response/eos_rate": ended,
        "response/truncated_rate": len(experience) - ended,
        # An EOS alone is a response of one token.
        "response/empty_rate": (rollout.ended & (mask.sum(-1) <= 1)).sum(),
        "objective/score_std": raw_score.double().square().sum(),
    }
    totals = torch.stack([value.double() for value in sums.values()])
    rows = torch.tensor([float(len(experience))], dtype=torch.float64, device=totals.device)
    tokens = mask.sum().double().reshape(1)
    gap_sum = f.masked_sum(gap, mask).double().reshape(1)
    totals = distributed.all_sum(torch.cat([totals, rows, tokens, gap_sum])).tolist()
    *totals, rows_total, tokens_total, gap_total = totals
    largest = torch.where(mask, gap, torch.zeros_like(gap)).max()
    means = {key: total / rows_total for key, total in zip(sums, totals, strict=True)}
    spread = means["objective/score_std"] - means["objective/score_raw"] ** 2
    means["objective/score_std"] = max(spread, 0.0) ** 0.5
    return {
        **means,
        "value/explained_variance": f.explained_variance(
            distributed.all_sum(residuals), distributed.all_sum(returns)
        ),
        "engine/logprob_gap_mean": gap_total / max(tokens_total, 1.0),
        "engine/logprob_gap_max": float(distributed.all_max(largest)),
    }


def write_samples(
    path: Path,
    iteration: int,
    rollout: Rollout,
    experience: Experience,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int = 4,
) -> None:
    """Append the first `count` dialogues of rank 0, with score and KL, as JSON lines to be read.

    Iteration 1 starts the file anew. A mean hides what a policy has learnt to say for its score.
    """
    if not distributed.is_main_rank():
        return
    kl = f.kl_k1(experience.old_logprobs, experience.ref_logprobs) * experience.response_mask
    with path.open("w" if iteration == 1 else "a", encoding="utf-8") as file:
        for row in range(min(count, len(experience))):
            ids = rollout.response_ids[row, rollout.response_mask[row]]
            line: dict[str, Any] = {
                "iteration": iteration,
                "prompt": rollout.prompts.dialogues[row],
                "response": decode_response(tokenizer, ids.tolist()),
                "score": float(experience.score[row]),
                "kl": float(kl[row].sum()),
                "ended": bool(rollout.ended[row]),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
