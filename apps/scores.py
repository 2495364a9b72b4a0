"""What reward model, SFT model and its own model say about an answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Scores:
    """Of one finished answer; None where the run lacks the model for it."""

    score: float | None
    """Reward model's score as PPO sees it: normalised, clipped, capped without EOS."""
    raw_score: float | None
    """Before that."""
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
    """What it adds to the text; special tokens by their names."""
    logprob: float
    """Under the answer's model, at its temperature."""
    sft_logprob: float | None


class Scoring:
    """Scores of answers, kept once computed; thread-safe."""

    def scores(self, answer: Any) -> Scores:
        """By an answer's id. ValueError: unknown or forgotten, not finished yet, empty, or one
        of a blind comparison without a vote (KL would give the model away)."""
        raise NotImplementedError

    def tokens(self, answer: Any) -> list[TokenScore]:
        """The response token by token; same errors."""
        raise NotImplementedError
