"""The generation loop: a KV-cached decoder over the live parameters of a transformers model.

Shapes: B batch, P prompt, R response, V vocabulary, S slots, N rows being decoded (N <= S),
M packed tokens.

Rows occupy the first N of S slots. A step decodes one token of each; rows that end leave, the
rows behind them move up, and waiting prompts take the free slots. So a response costs its own
length, whatever the longest one in the batch.

What a row samples depends on its prompt, its seed and the weights. Slots, order and padding
change at most the rounding of a matrix product, as any change of batch size does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf_kit.config import GenerationConfig, require
from rlhf_kit.hybrid_engine.attention import (
    PromptPlan,
    TokenPlan,
    check_layers,
    check_length,
    check_model,
    own_attention,
)
from rlhf_kit.hybrid_engine.kv_cache import KVCache
from rlhf_kit.hybrid_engine.sampling import draw, log_distribution, uniforms
from rlhf_kit.types import PromptBatch, Rollout

PROMPT_TOKENS = 16384
"""Prompt tokens a forward pass, at most (a longer prompt goes alone)."""
REFILL_SHARE = 4
"""Waiting prompts enter when a slot in this many is free: a forward pass has a fixed cost."""


class Token(NamedTuple):
    """A sampled token and its log-probability."""

    id: int
    logprob: float


@dataclass(frozen=True)
class DecodeStats:
    """What the last `generate` did."""

    prompt_tokens: int
    """Tokens of the prompts, padding not counted."""
    new_tokens: int
    """Tokens of the responses, EOS included."""
    prompt_passes: int
    """Forward passes over prompts."""
    steps: int
    """Forward passes that decoded one token a row."""
    row_steps: int
    """Rows decoded, summed over the steps."""
    slots: int
    """Rows that could be decoded at once."""
    cache_bytes: int
    """Memory of the KV cache."""
    prompt_seconds: float
    """Time in passes over prompts (on a GPU, the time to queue them)."""
    seconds: float
    """Time of the whole call."""

    @property
    def tokens_per_second(self) -> float:
        """Response tokens a second, over the whole call."""
        return self.new_tokens / self.seconds

    @property
    def occupancy(self) -> float:
        """Share of the slots that were decoding, averaged over the steps."""
        return self.row_steps / max(1, self.steps * self.slots)


class Decoder:
    """Generates with `model`, a transformers causal LM or a peft model around one.

    Nothing is copied: every call reads the parameters as they are then. Every architecture
    that attends through transformers' attention interface works; another one is refused with a
    ValueError on its first prompt.
    """

    def __init__(
        self, model: nn.Module, *, eos_token_ids: Sequence[int], pad_token_id: int
    ) -> None:
        self.model = _without_adapter_wrapper(model)
        self.pad_token_id = pad_token_id
        self.eos_token_ids = tuple(eos_token_ids)
        self.last_stats: DecodeStats | None = None
        require(len(self.eos_token_ids) > 0, "name at least one EOS token id to stop at")
        check_model(self.model)
        vocabulary = self.model.config.get_text_config().vocab_size
        require(
            all(0 <= token < vocabulary for token in self.eos_token_ids),
            f"EOS token ids {self.eos_token_ids} are not all in the vocabulary of {vocabulary}",
        )

    @torch.no_grad()
    def generate(self, prompts: PromptBatch, generation: GenerationConfig) -> Rollout:
        """Sample one response a prompt; rows come back in the order of the prompts.

        R is the longest response. An EOS belongs to its response; behind it stand pad tokens.
        `logprobs` are those of the distribution sampled from: log-softmax of logits over
        temperature, and where an EOS came too early for `min_new_tokens` or top-k and top-p are
        on, of what they leave, normalised again. Greedy decoding reports temperature 1.

        Raises ValueError for an empty prompt, for sequences longer than the model's positions,
        for architectures that cannot be decoded here, and for logits that are not finite.
        """
        begin = time.perf_counter()
        run = _Run(self, prompts, generation)
        with own_attention(self.model):
            while run.waiting or run.active:
                run.admit()
                if run.active:
                    run.step()
        rollout = run.rollout()
        self.last_stats = run.stats(time.perf_counter() - begin)
        return rollout

    def stream(
        self, input_ids: Sequence[int] | Tensor, generation: GenerationConfig, *, seed: int
    ) -> Iterator[Token]:
        """Sample the response to one prompt [P] token by token, as `generate` would.

        Between two tokens the model is as it was, free for other use. Closing the iterator
        frees the cache.
        """
        ids = torch.as_tensor(input_ids, dtype=torch.long).reshape(1, -1)
        seeds = torch.tensor([seed], dtype=torch.long)
        prompts = PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), seeds, ((),))
        return self._stream(_Run(self, prompts, generation))

    def _stream(self, run: _Run) -> Iterator[Token]:
        while run.waiting or run.active:
            with torch.no_grad(), own_attention(self.model):
                run.admit() if run.waiting else run.step()
            at = run.produced[0] - 1
            _check_finite(run.logprobs[0, at])
            yield Token(int(run.response_ids[0, at]), float(run.logprobs[0, at]))


class _Run:
    """One call's state. Tensors live on the device, the lists here mirror them on the host."""

    def __init__(
        self, decoder: Decoder, prompts: PromptBatch, generation: GenerationConfig
    ) -> None:
        self.model = decoder.model
        self.pad_token_id = decoder.pad_token_id
        self.prompts = prompts
        self.generation = generation
        device = self.model.get_input_embeddings().weight.device

        mask = prompts.attention_mask.bool()
        self.prompt_len: list[int] = mask.sum(dim=1).tolist()
        require(min(self.prompt_len, default=1) > 0, "a prompt of the batch has no tokens")
        longest = max(self.prompt_len, default=0) + generation.max_new_tokens
        check_length(self.model, longest)
        self.packed = prompts.input_ids[mask].to(device)
        self.offsets = [0]
        for length in self.prompt_len:
            self.offsets.append(self.offsets[-1] + length)

        rows, limit = len(prompts), generation.max_new_tokens
        slots = min(generation.slots, max(1, rows))
        self.cache = KVCache(slots, longest)
        self.slot = torch.zeros(4, slots, dtype=torch.long, device=device)
        """Per slot: the token to feed, the tokens in the cache, the row, the response position."""
        self.response_ids = torch.full((rows, limit), self.pad_token_id, device=device)
        self.logprobs = torch.zeros(rows, limit, device=device)
        self.eos = torch.tensor(decoder.eos_token_ids, device=device)
        self.uniform: Tensor | None = None
        if generation.temperature > 0:
            seeds = prompts.seeds.to(device)
            self.uniform = uniforms(seeds, torch.arange(limit, device=device))

        # Rows of like length share a pass over prompts and, later, the span of a step.
        self.waiting = sorted(range(rows), key=lambda row: self.prompt_len[row])
        self.active: list[int] = []
        self.produced = [0] * rows
        self.ended = [False] * rows
        self.prompt_passes = self.steps = self.row_steps = 0
        self.prompt_seconds = 0.0

    def admit(self) -> None:
        """Take waiting prompts into the free slots, longest first, once enough are free."""
        free = self.cache.slots - len(self.active)
        if not self.waiting or (self.active and free < max(1, self.cache.slots // REFILL_SHARE)):
            return
        begin = time.perf_counter()
        while self.waiting and len(self.active) < self.cache.slots:
            rows: list[int] = []
            tokens = 0
            while self.waiting and len(self.active) + len(rows) < self.cache.slots:
                tokens += self.prompt_len[self.waiting[-1]]
                if rows and tokens > PROMPT_TOKENS:
                    break
                rows.append(self.waiting.pop())
            self._read_prompts(rows)
        self.prompt_seconds += time.perf_counter() - begin

    def step(self) -> None:
        """Decode one token of every active row."""
        n = len(self.active)
        token, length = self.slot[0, :n], self.slot[1, :n]
        span = 1 + max(self.prompt_len[row] + self.produced[row] - 1 for row in self.active)
        logits = self._forward(token, length, TokenPlan(self.cache, length, span))
        length += 1
        self.steps += 1
        self.row_steps += n
        self._sample(logits, 0)

    def rollout(self) -> Rollout:
        """The responses, cut to the longest, on the device of the prompts."""
        home = self.prompts.input_ids.device
        longest = max(self.produced, default=0)
        lengths = torch.tensor(self.produced, dtype=torch.long, device=home)
        logprobs = self.logprobs[:, :longest].to(home)
        _check_finite(logprobs)
        return Rollout(
            prompts=self.prompts,
            response_ids=self.response_ids[:, :longest].to(home),
            response_mask=torch.arange(longest, device=home) < lengths[:, None],
            logprobs=logprobs,
            ended=torch.tensor(self.ended, dtype=torch.bool, device=home),
        )

    def stats(self, seconds: float) -> DecodeStats:
        return DecodeStats(
            prompt_tokens=sum(self.prompt_len),
            new_tokens=sum(self.produced),
            prompt_passes=self.prompt_passes,
            steps=self.steps,
            row_steps=self.row_steps,
            slots=self.cache.slots,
            cache_bytes=self.cache.nbytes(),
            prompt_seconds=self.prompt_seconds,
            seconds=seconds,
        )

    def _read_prompts(self, rows: list[int]) -> None:
        """Run the prompts of `rows` into the slots behind the active ones, and sample."""
        first, device = len(self.active), self.packed.device
        lengths = torch.tensor([self.prompt_len[row] for row in rows])
        begins = torch.tensor([self.offsets[row] for row in rows])
        ends = lengths.cumsum(0)
        at = torch.arange(int(lengths.max()))
        inside = at < lengths[:, None]
        source = (begins[:, None] + at)[inside].to(device)
        pad = (ends - lengths)[:, None] + at.minimum(lengths[:, None] - 1)
        unpad = inside.flatten().nonzero()[:, 0]
        positions = at.expand_as(inside)[inside]
        plan = PromptPlan(self.cache, first, pad.to(device), unpad.to(device))
        logits = self._forward(
            self.packed[source], positions.to(device), plan, (ends - 1).to(device)
        )
        check_layers(self.model, self.cache)
        slots = slice(first, first + len(rows))
        self.slot[1, slots] = lengths.to(device)
        self.slot[2, slots] = torch.tensor(rows, device=device)
        self.slot[3, slots] = 0
        self.active += rows
        self.prompt_passes += 1
        self._sample(logits, first)

    def _forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        plan: PromptPlan | TokenPlan,
        keep: Tensor | None = None,
    ) -> Tensor:
        """The live model over M packed tokens; logits [M, V], or [N, V] of the tokens to keep."""
        options = {} if keep is None else {"logits_to_keep": keep}
        logits = self.model(
            input_ids=tokens[None],
            position_ids=positions[None],
            use_cache=False,
            plan=plan,
            **options,
        ).logits[0]
        return logits if keep is None or len(logits) == len(keep) else logits[keep]

    def _sample(self, logits: Tensor, first: int) -> None:
        """Sample for the slots from `first` on, write the tokens down, retire ended rows."""
        n = len(self.active)
        row, at = self.slot[2, first:n], self.slot[3, first:n]
        config = self.generation
        forbidden = None
        if any(self.produced[r] < config.min_new_tokens for r in self.active[first:]):
            forbidden = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
            forbidden[:, self.eos] = (at < config.min_new_tokens)[:, None]
        logprobs = log_distribution(
            logits,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            forbidden=forbidden,
        )
        uniform = None if self.uniform is None else self.uniform[row, at]
        token, logprob = draw(logprobs, uniform)
        self.response_ids[row, at] = token
        self.logprobs[row, at] = logprob
        self.slot[0, first:n] = token
        at += 1
        for r in self.active[first:]:
            self.produced[r] += 1
        self._retire(first, (token[:, None] == self.eos).any(dim=1).tolist())

    def _retire(self, first: int, is_eos: list[bool]) -> None:
        """Free the slots of rows that ended; rows behind move into the gaps."""
        gone = set()
        for slot, ended in enumerate(is_eos, first):
            row = self.active[slot]
            if ended or self.produced[row] == self.generation.max_new_tokens:
                self.ended[row] = ended
                gone.add(slot)
        if not gone:
            return
        left = len(self.active) - len(gone)
        target = [slot for slot in range(left) if slot in gone]
        source = [slot for slot in range(left, len(self.active)) if slot not in gone]
        if target:
            span = max(self.prompt_len[r] + self.produced[r] for r in self.active)
            into, out = (torch.tensor(x, device=self.slot.device) for x in (target, source))
            self.slot[:, into] = self.slot[:, out]
            self.cache.move(out, into, span)
            for i, j in zip(target, source, strict=True):
                self.active[i] = self.active[j]
        del self.active[left:]


def _without_adapter_wrapper(model: Any) -> Any:
    """The transformers model inside a peft model; adapters live in its layers and stay."""
    if not hasattr(model, "get_base_model"):
        return model
    kinds = [config for config in model.peft_config.values() if config.is_prompt_learning]
    require(not kinds, "prompt-learning adapters are not decoded here; use LoRA")
    return model.get_base_model()


class NotFinite(ValueError):
    """The model gives logits that are NaN or infinite."""


def _check_finite(logprobs: Tensor) -> None:
    if not bool(logprobs.isfinite().all()):
        raise NotFinite("the model's logits are not finite: look for an update that diverged")
