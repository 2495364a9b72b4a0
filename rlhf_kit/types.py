"""The records that travel through the pipeline, and the two seams of a rollout.

Shapes: B batch, P prompt tokens, R response tokens, T = P + R, V vocabulary.

Position convention, used everywhere: response token r (0 <= r < R) stands at sequence
position P + r and is predicted at position P + r - 1. `logprobs[:, r]` and `values[:, r]`
therefore belong to the state *before* token r, and index the same r as `response_mask`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypedDict

if TYPE_CHECKING:  # `import rlhf_kit` stays light
    import torch

    from rlhf_kit.config import GenerationConfig

Stage = Literal["sft", "reward", "ppo"]
STAGES: tuple[Stage, ...] = ("sft", "reward", "ppo")


class Message(TypedDict):
    """One turn of a dialogue."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class PreferencePair:
    """One raw row of any dataset: a prompt and one or two responses to it.

    A source of demonstrations fills `chosen` alone, a source of prompts neither.
    """

    prompt: tuple[Message, ...]
    """The dialogue up to and including the user's last turn."""
    chosen: str | None = None
    """The demonstration, or the preferred response. No leading or trailing space."""
    rejected: str | None = None
    """The other response, where the source has preferences."""
    kind: str = ""
    """What the two responses differ in, where the source says so; for reports per kind."""
    source: str = ""
    """The name of the dataset it comes from."""

    @property
    def prompt_id(self) -> str:
        """A content hash of the prompt alone: what splits are cut by, and logs name rows by."""
        turns = [[message["role"], message["content"]] for message in self.prompt]
        return hashlib.blake2b(
            json.dumps(turns, ensure_ascii=False).encode("utf-8", "surrogatepass"), digest_size=12
        ).hexdigest()


@dataclass(frozen=True)
class PromptBatch:
    """Left-padded prompts, ready for generation."""

    input_ids: torch.Tensor
    """[B, P] token ids, padded on the left."""
    attention_mask: torch.Tensor
    """[B, P] bool, True on prompt tokens."""
    seeds: torch.Tensor
    """[B] int64, one sampling seed a row: it samples alike in any batch and on any rank."""
    dialogues: tuple[tuple[Message, ...], ...]
    """B prompts as text, for a reward model with another tokenizer and for the gold judge."""

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device) -> PromptBatch:
        """The same prompts with their tensors on `device`."""
        return PromptBatch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.seeds.to(device),
            self.dialogues,
        )


@dataclass(frozen=True)
class Rollout:
    """What generation returned: prompts, sampled responses and how likely each token was."""

    prompts: PromptBatch
    response_ids: torch.Tensor
    """[B, R] token ids, right-padded after the first EOS."""
    response_mask: torch.Tensor
    """[B, R] bool, True up to and including the first EOS. Made from lengths, never from ids."""
    logprobs: torch.Tensor
    """[B, R] fp32, of the sampled tokens at the sampling temperature; 0 elsewhere."""
    ended: torch.Tensor
    """[B] bool, True where the response ends with EOS rather than at the length limit."""

    @property
    def sequences(self) -> torch.Tensor:
        """[B, T] prompt and response ids."""
        import torch

        return torch.cat([self.prompts.input_ids, self.response_ids], dim=1)

    @property
    def attention_mask(self) -> torch.Tensor:
        """[B, T] bool, True on prompt and response tokens."""
        import torch

        return torch.cat([self.prompts.attention_mask, self.response_mask], dim=1)


@dataclass(frozen=True)
class Experience:
    """All that PPO needs about a rollout. Frozen: nothing is edited after it is made."""

    sequences: torch.Tensor
    """[B, T] prompt and response ids."""
    attention_mask: torch.Tensor
    """[B, T] bool, True on prompt and response tokens."""
    response_mask: torch.Tensor
    """[B, R] bool, True on response tokens, the EOS included."""
    rollout_logprobs: torch.Tensor
    """[B, R] as the generation engine computed them while it sampled."""
    old_logprobs: torch.Tensor
    """[B, R] of the actor before this iteration's updates; the denominator of the ratio."""
    ref_logprobs: torch.Tensor
    """[B, R] of the frozen SFT model."""
    values: torch.Tensor
    """[B, R] of the critic before this iteration's updates."""
    score: torch.Tensor
    """[B] the reward model's scalar, normalised and clipped as the config says."""
    rewards: torch.Tensor
    """[B, R] per-token rewards: KL penalty, and the score on the last token."""
    advantages: torch.Tensor
    """[B, R] GAE, whitened over the masked tokens of all ranks."""
    returns: torch.Tensor
    """[B, R] targets of the critic, from unwhitened advantages."""

    def __len__(self) -> int:
        return self.sequences.shape[0]

    def rows(self, index: torch.Tensor) -> Experience:
        """The experience of the rows in `index` [b], a 1-D integer tensor."""
        return Experience(
            **{name: getattr(self, name)[index] for name in self.__dataclass_fields__}
        )


class Generate(Protocol):
    """How rollouts are sampled; the hybrid engine is one, a fake in a test another."""

    def __call__(self, prompts: PromptBatch, generation: GenerationConfig) -> Rollout: ...


class Score(Protocol):
    """How responses are judged: a rollout in, raw scores [B] out."""

    def __call__(self, rollout: Rollout) -> torch.Tensor: ...
