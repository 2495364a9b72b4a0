"""What reward model, SFT model and its own model say about an answer.

Shapes: R response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from apps.generation import Answer, Generation
from rlhf_kit import functional as f
from rlhf_kit.chat import LoadedModel
from rlhf_kit.config import PPOConfig, require
from rlhf_kit.models import response_logits
from rlhf_kit.types import PromptBatch, Rollout


@dataclass(frozen=True)
class Scores:
    """Of one finished answer; None where the run lacks the model for it."""

    score: float | None
    """Reward model's score as PPO sees it: normalised, clipped, capped without EOS."""
    raw_score: float | None
    """In standard deviations of the demonstrations' scores, before clip and cap."""
    kl: float | None
    """KL to SFT, k1: sum over the response of log p - log p_sft, at the answer's temperature."""
    kl_k3: float | None
    """The same with the k3 estimator, which is never negative."""
    length: int
    """Tokens, EOS included."""
    logprob: float
    """Sum of the response's logprobs under its own model."""
    temperature: float
    """Of these logprobs; 1 for a greedy answer. top-p is left out of them."""
    notes: tuple[str, ...]
    """Why something is None, a sentence each."""


@dataclass(frozen=True)
class TokenScore:
    """One response token, for colouring."""

    id: int
    text: str
    """What it adds to the text ("" where a character is not whole yet)."""
    logprob: float
    """Under the answer's model, at its temperature."""
    sft_logprob: float | None


class Scoring:
    """Scores of answers, kept with them once computed; thread-safe."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.pool = generation.pool

    def scores(self, answer: Any) -> Scores:
        """By an answer's id. ValueError: unknown or forgotten, not finished yet, empty, or one
        of a blind comparison without a vote (KL would give the model away)."""
        return self._measured(answer)[0]

    def tokens(self, answer: Any) -> list[TokenScore]:
        """The response token by token; same errors."""
        return self._measured(answer)[1]

    def _measured(self, id: Any) -> tuple[Scores, list[TokenScore]]:
        answer = self.generation.answer(id)
        require(not answer.blind, "vote first: scores would give the two models away")
        require(bool(answer.reason), "wait until the answer is finished")
        require(bool(answer.ids) and answer.reason != "error", "there is no answer to score")
        if answer.measured is None:
            answer.measured = self._measure(answer)
        return answer.measured

    def _measure(self, answer: Answer) -> tuple[Scores, list[TokenScore]]:
        from rlhf_kit.tokenization import same_tokenizer

        checkpoints, seconds = self.pool.checkpoints, self.generation.limits.wait_seconds
        temperature = answer.settings.temperature or 1.0
        require(
            checkpoints.stamp(answer.checkpoint) == answer.stamp,
            f"{answer.label} was written anew since this answer; ask again",
        )
        notes: list[str] = []
        with self.pool.actor(answer.checkpoint, seconds=seconds) as lease:
            tokenizer = lease.value.tokenizer
            own = self._logprobs(lease.value, answer, temperature)
            texts = token_texts(tokenizer, answer.ids)
        ref = None
        sft = next((c for c in checkpoints.list() if c.name == "sft" and c.complete), None)
        if sft is None:
            notes.append("There is no SFT model here, so there is no KL.")
        else:
            with self.pool.actor(sft.id, seconds=seconds) as lease:
                if same_tokenizer(tokenizer, lease.value.tokenizer):
                    ref = self._logprobs(lease.value, answer, temperature)
                else:
                    notes.append("The SFT model has another tokenizer, so there is no KL.")
        score = raw = None
        if checkpoints.reward_directory() is None:
            notes.append("There is no reward model here, so there is no score.")
        else:
            raw = self._raw_score(answer, tokenizer, own)
            assert checkpoints.config is not None
            score = shaped(raw, answer.reason == "end", checkpoints.config.ppo)
        scores = Scores(
            score=score,
            raw_score=raw,
            kl=None if ref is None else float(f.kl_k1(own, ref).sum()),
            kl_k3=None if ref is None else float(f.kl_k3(own, ref).sum()),
            length=len(answer.ids),
            logprob=float(own.sum()),
            temperature=temperature,
            notes=tuple(notes),
        )
        ref_list = [None] * len(answer.ids) if ref is None else ref.tolist()
        tokens = [
            TokenScore(*row) for row in zip(answer.ids, texts, own.tolist(), ref_list, strict=True)
        ]
        return scores, tokens

    @torch.no_grad()
    def _logprobs(self, loaded: LoadedModel, answer: Answer, temperature: float) -> torch.Tensor:
        """[R] fp32 logprobs of the response, by a plain forward, as PPO computes them."""
        length, model = len(answer.ids), loaded.decoder.model
        ids = torch.tensor([[*answer.prompt_ids, *answer.ids]], device=self.pool.device)
        with self.pool.turn():
            logits = response_logits(model, ids, torch.ones_like(ids, dtype=torch.bool), length)
            found = f.token_logprobs(logits, ids[:, -length:], temperature=temperature)
        return found[0].cpu()

    @torch.no_grad()
    def _raw_score(self, answer: Answer, tokenizer: Any, logprobs: torch.Tensor) -> float:
        """The reward model's score of the answer to its dialogue, normalised as it was saved."""
        ids = torch.tensor([[*answer.prompt_ids]], device=self.pool.device)
        response = torch.tensor([answer.ids], device=self.pool.device)
        rollout = Rollout(
            prompts=PromptBatch(
                input_ids=ids,
                attention_mask=torch.ones_like(ids, dtype=torch.bool),
                seeds=torch.zeros(1, dtype=torch.long),
                dialogues=(kept_dialogue(answer),),
            ),
            response_ids=response,
            response_mask=torch.ones_like(response, dtype=torch.bool),
            logprobs=logprobs[None],
            ended=torch.tensor([answer.reason == "end"]),
        )
        seconds = self.generation.limits.wait_seconds
        with self.pool.reward(tokenizer, seconds=seconds) as lease, self.pool.turn():
            return float(lease.value.normalised(rollout))


def kept_dialogue(answer: Answer) -> tuple[Any, ...]:
    """The messages that the model read: without those that no longer fitted."""
    first = 1 if answer.dialogue[0]["role"] == "system" else 0
    return (*answer.dialogue[:first], *answer.dialogue[first + answer.dropped :])


def shaped(normalised: float, ended: bool, config: PPOConfig) -> float:
    """A normalised score as PPO uses it: clipped, and capped where the answer has no end."""
    score = f.shape_score(
        torch.tensor([normalised]),
        torch.tensor([ended]),
        clip=config.score_clip,
        missing_eos_score=config.missing_eos_score,
    )
    return float(score)


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; special tokens by their names."""
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(tokenizer.backend_tokenizer, id) or "" for id in ids]
