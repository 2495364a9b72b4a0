"""What must hold on the first batch of every PPO run; a failure is one readable diagnosis.

Each of these has silently ruined somebody's run: a ratio that is not 1 before the first update,
an EOS that is masked, a prompt that ends otherwise than in training, an average that never moved.
Shapes: B batch, P prompt, R response, T = P + R.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rlhf_kit import distributed
from rlhf_kit.functional import last_token_index
from rlhf_kit.hybrid_engine.self_test import TOLERANCE
from rlhf_kit.ppo import PPOTrainer
from rlhf_kit.tokenization import encode_prompt
from rlhf_kit.types import Experience, Rollout


class InvariantError(ValueError):
    """A check of the first batch failed; the message says which, with the numbers."""


@dataclass(frozen=True)
class Check:
    """One invariant and what was found."""

    name: str
    passed: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.passed else 'FAIL'} {self.name}: {self.detail}"


def report(checks: Sequence[Check]) -> None:
    """Print all checks on rank 0; InvariantError where one failed on any rank."""
    for check in checks:
        distributed.print_main(check)
    failed = [check for check in checks if not check.passed]
    if distributed.all_any(bool(failed), distributed.local_device()):
        raise InvariantError(
            "; ".join(f"{check.name}: {check.detail}" for check in failed)
            or "another rank's check of the first batch failed, see its log"
        )


def check_first_batch(trainer: PPOTrainer, experience: Experience) -> list[Check]:
    """The invariants that hold before the first update; call it once, after the first rollout."""
    rollout = trainer.last_rollout
    assert rollout is not None, "generate_experience comes first"
    checks = [
        _first_ratio(trainer, experience),
        _zero_kl(trainer, experience),
        _padding(trainer, experience),
        _engines_agree(trainer, experience),
        _prompt_end(trainer, rollout),
    ]
    return [*checks, *_score_on_last_token(trainer, rollout, experience)]


def check_after_first_step(trainer: PPOTrainer) -> list[Check]:
    """That the average moved with the first optimiser step, and less far than the weights."""
    ema = trainer.engine.ema
    if ema is None or trainer.iteration <= trainer.config.critic_warmup_iterations:
        return []
    distance = ema.distance()
    passed = ema.updates > 0 and 0 < distance < 1
    return [Check("the EMA follows the weights", passed, f"relative distance {distance:.2e}")]


def _exact(trainer: PPOTrainer) -> bool:
    """Whether old logprobs, the ref's and those of training come from the same operations."""
    return trainer.config.old_logprobs != "rollout"


def _first_ratio(trainer: PPOTrainer, experience: Experience) -> Check:
    """Old and new logprobs of the first micro-batch come from one function, so rho is 1."""
    engine, minibatch = trainer.engine, trainer.config.minibatch_size // distributed.world_size()
    rows = experience.rows(torch.arange(min(minibatch, len(experience))))
    micro = trainer.micro_batches(rows, trainer.micro_batch)[0]
    engine.actor.train()
    now = engine.logprobs(engine.actor.module, micro, trainer.generation.temperature)[0].detach()
    engine.actor.eval()
    gap = (now - micro.of(rows.old_logprobs)).abs().max()
    limit = 0.0 if _exact(trainer) else TOLERANCE[trainer.args.actor_engine.dtype]
    return Check(
        "the first ratio is 1",
        float(gap) <= limit,
        f"largest |log ratio| {float(gap):.2e}, allowed {limit:g}",
    )


def _zero_kl(trainer: PPOTrainer, experience: Experience) -> Check:
    gap = (experience.old_logprobs - experience.ref_logprobs) * experience.response_mask
    largest = float(gap.abs().max())
    limit = 1e-5 if _exact(trainer) else TOLERANCE[trainer.args.actor_engine.dtype]
    return Check(
        "KL is 0 while the actor equals the ref",
        largest <= limit,
        f"largest |log pi - log ref| {largest:.2e}, allowed {limit:g}",
    )


def _padding(trainer: PPOTrainer, experience: Experience) -> Check:
    """Three more columns of padding on the left change no logprob."""
    rows = experience.rows(torch.arange(min(4, len(experience))))
    length = rows.response_mask.shape[1]
    pad = trainer.engine.pad_token_id
    temperature = trainer.generation.temperature
    plain = trainer.engine.actor_logprobs(rows.sequences, rows.attention_mask, length, temperature)
    padded = trainer.engine.actor_logprobs(
        F.pad(rows.sequences, (3, 0), value=pad),
        F.pad(rows.attention_mask, (3, 0), value=False),
        length,
        temperature,
    )
    gap = float(((plain - padded) * rows.response_mask).abs().max())
    limit = TOLERANCE[trainer.args.actor_engine.dtype]
    return Check(
        "left padding changes nothing",
        gap <= limit,
        f"largest difference of logprobs {gap:.2e}, allowed {limit:g}",
    )


def _engines_agree(trainer: PPOTrainer, experience: Experience) -> Check:
    gap = (experience.rollout_logprobs - experience.old_logprobs) * experience.response_mask
    largest = float(gap.abs().max())
    limit = TOLERANCE[trainer.args.actor_engine.dtype]
    return Check(
        "generation and training agree",
        largest <= limit,
        f"largest difference of logprobs {largest:.2e}, allowed {limit:g}",
    )


def _prompt_end(trainer: PPOTrainer, rollout: Rollout) -> Check:
    """Every prompt ends with the ids that the template puts before an answer."""
    tokenizer = trainer.engine.tokenizer
    ends = [
        encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in ("Hi.", "Why?")
    ]
    common = 0
    while ends[0][-1 - common] == ends[1][-1 - common]:
        common += 1
    tail = torch.tensor(ends[0][-common:], device=rollout.prompts.input_ids.device)
    same = (rollout.prompts.input_ids[:, -common:] == tail).all(1)
    return Check(
        "prompts end as the template says",
        bool(same.all()),
        f"{int(same.sum())} of {len(same)} end with {tokenizer.decode(tail.tolist())!r}",
    )


def _score_on_last_token(
    trainer: PPOTrainer, rollout: Rollout, experience: Experience
) -> list[Check]:
    """EOS is inside the mask, and the score sits on the last token and nowhere else."""
    last = last_token_index(experience.response_mask)
    at_last = rollout.response_ids.gather(1, last.unsqueeze(1)).squeeze(1)
    stop = torch.tensor(trainer.engine.actor.decoder.eos_token_ids, device=at_last.device)
    is_stop = torch.isin(at_last, stop)
    trained = bool((is_stop == rollout.ended).all())
    kl = experience.old_logprobs - experience.ref_logprobs
    without_kl = experience.rewards + trainer.kl_coef * kl * experience.response_mask
    expected = torch.zeros_like(without_kl).scatter(
        1, last.unsqueeze(1), experience.score.unsqueeze(1).to(without_kl.dtype)
    )
    gap = float((without_kl - expected).abs().max())
    return [
        Check(
            "EOS is a trained action",
            trained,
            f"{int(rollout.ended.sum())} of {len(last)} responses ended, {int(is_stop.sum())} "
            "have EOS as their last token under the mask",
        ),
        Check(
            "the score sits on the last token",
            gap < 1e-4,
            f"largest deviation of rewards without KL {gap:.2e}",
        ),
    ]
