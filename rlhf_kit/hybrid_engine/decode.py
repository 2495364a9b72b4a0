"""The generation loop: a KV-cached decoder over the live parameters of a transformers model.

Shapes: B batch, P prompt, R response, V vocabulary, S slots, N rows being decoded (N <= S),
K prompts read at once, M packed tokens.

A step decodes one token of each of the first N slots; rows that end leave, waiting prompts take
their slots, and when none waits the last rows move into the gaps. So a response costs its own
length, whatever the longest one in the batch.

On a GPU the host never waits for the step it has just started: it looks at the slots as the step
before left them, and refills them while the GPU works. A row that ended costs one step more.

What a row samples depends on its prompt, its seed and the weights. Slots, order and padding
change at most the rounding of a matrix product, as any change of batch size does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf_kit.config import GenerationConfig, require
from rlhf_kit.distributed import sent
from rlhf_kit.hybrid_engine.attention import (
    PromptPlan,
    TokenPlan,
    check_layers,
    check_length,
    check_model,
    own_attention,
)
from rlhf_kit.hybrid_engine.kv_cache import KVCache
from rlhf_kit.hybrid_engine.merged_adapters import MergedAdapters
from rlhf_kit.hybrid_engine.slots import ALIVE, LENGTH, TOKEN, Slots
from rlhf_kit.hybrid_engine.step import Captures, Step, forward
from rlhf_kit.types import PromptBatch, Rollout

PROMPT_TOKENS = 16384
"""Prompt tokens a forward pass, at most (a longer prompt goes alone)."""
REFILL_SHARE = 4
"""Waiting prompts enter when a slot in this many is free: a forward pass has a fixed cost."""
ROOM = 64
"""A cache that is kept has a length that is a multiple of this: batches are not equally long."""


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
    capture_seconds: float
    """Time in compiling and capturing steps."""
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

    On a GPU cache, buffers and captured steps are kept from call to call, until `release`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        captured: bool | None = None,
        merge_adapters: bool = False,
    ) -> None:
        """`captured` replays each step as a CUDA graph; None does so wherever there is a GPU.

        `merge_adapters` decodes from a copy of the weights with LoRA added, made anew by every
        call: fewer products a step, for a second copy of the adapted weights.
        """
        self.model = _without_adapter_wrapper(model)
        self.pad_token_id = pad_token_id
        self.eos_token_ids = tuple(eos_token_ids)
        self.captured = captured
        self.merged = MergedAdapters(self.model) if merge_adapters else None
        self.last_stats: DecodeStats | None = None
        self._kept: Step | None = None
        self._captures = Captures()
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
        merged = self.merged.refreshed() if self.merged is not None else nullcontext()
        with own_attention(self.model), merged:
            while run.waiting or run.occupied:
                run.admit()
                if run.occupied:
                    run.step()
                run.retire()
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
        return self._stream(_Run(self, prompts, generation, alone=True))

    def _stream(self, run: _Run) -> Iterator[Token]:
        at = 0
        while run.waiting or run.occupied:
            with torch.no_grad(), own_attention(self.model):
                run.admit() if run.waiting else run.step()
                run.retire()
            _check_finite(run.slots.logprobs[0, at])
            yield Token(int(run.slots.response_ids[0, at]), float(run.slots.logprobs[0, at]))
            at += 1

    def release(self) -> None:
        """Free the KV cache, captured steps and merged weights; the next call makes them again."""
        self._kept = None
        if self.merged is not None:
            self.merged.release()

    def _step(self, rows: int, longest: int, generation: GenerationConfig) -> Step:
        """A step with room for all of this: the one that was kept, or a new one."""
        limit, slots = generation.max_new_tokens, min(generation.slots, max(1, rows))
        device = self.model.get_input_embeddings().weight.device
        captured = device.type == "cuda" if self.captured is None else self.captured
        kept = self._kept
        if kept is not None and captured:
            fits = (
                slots <= kept.cache.slots <= generation.slots
                and kept.cache.max_len >= longest
                and kept.slots.response_ids.shape[0] >= rows
                and kept.slots.response_ids.shape[1] >= limit
            )
            if fits:
                kept.check_addresses()
                return kept
        self._kept = kept = None
        if captured:  # with room for batches a little longer than the first
            longest = -(-longest // ROOM) * ROOM
        step = Step(
            self.model,
            KVCache(slots, longest),
            Slots(
                slots,
                rows,
                limit,
                eos_token_ids=self.eos_token_ids,
                pad_token_id=self.pad_token_id,
                device=device,
            ),
            captured=captured,
            captures=self._captures,
        )
        if captured:
            self._kept = step
        return step


class _Run:
    """One call's state. Tensors live on the device, the lists here mirror them on the host."""

    def __init__(
        self,
        decoder: Decoder,
        prompts: PromptBatch,
        generation: GenerationConfig,
        *,
        alone: bool = False,
    ) -> None:
        """`alone`: share nothing with the decoder's other calls, and capture nothing."""
        self.model = decoder.model
        self.prompts = prompts
        self.generation = generation
        mask = prompts.attention_mask.bool()
        self.prompt_len: list[int] = mask.sum(dim=1).tolist()
        require(min(self.prompt_len, default=1) > 0, "a prompt of the batch has no tokens")
        rows, limit = len(prompts), generation.max_new_tokens
        longest = max(self.prompt_len, default=0) + limit
        check_length(self.model, longest)
        if alone:
            decoder = Decoder(
                decoder.model,
                eos_token_ids=decoder.eos_token_ids,
                pad_token_id=decoder.pad_token_id,
                captured=False,
            )
        self.decode = decoder._step(rows, longest, generation)
        self.cache, self.slots = self.decode.cache, self.decode.slots
        device = self.slots.state.device
        self.packed = prompts.input_ids[mask].to(device)
        self.offsets = [0]
        for length in self.prompt_len:
            self.offsets.append(self.offsets[-1] + length)
        self.slots.begin(prompts.seeds.to(device))

        # Rows of like length share a pass over prompts and, later, the span of a step.
        self.waiting = sorted(range(rows), key=lambda row: self.prompt_len[row])
        self.row: list[int | None] = [None] * min(self.cache.slots, max(1, rows))
        """The row of the batch in each slot; None in a free one."""
        self.block = list(range(len(self.row)))
        """The block of the cache that each slot has."""
        self.since = [0] * len(self.row)
        """The first step of a slot's row in it: what was seen before was of another row."""
        self.entered = [0] * rows
        """The first step that decodes a row."""
        self.occupied = 0
        self.seen = _Seen(self.slots.state, lag=self.decode.captured)
        self.prompt_passes = self.steps = self.row_steps = 0
        self.prompt_seconds = 0.0
        self.captured_before = self.decode.capture_seconds

    def admit(self) -> None:
        """Take waiting prompts into the free slots, longest first, once enough are free."""
        free = len(self.row) - self.occupied
        if not self.waiting or (self.occupied and free < max(1, len(self.row) // REFILL_SHARE)):
            return
        begin = time.perf_counter()
        gaps = [slot for slot, row in enumerate(self.row) if row is None]
        while self.waiting and gaps:
            rows: list[int] = []
            tokens = 0
            while self.waiting and len(rows) < len(gaps):
                tokens += self.prompt_len[self.waiting[-1]]
                if rows and tokens > PROMPT_TOKENS:
                    break
                rows.append(self.waiting.pop())
            self._read_prompts(rows, gaps[: len(rows)])
            del gaps[: len(rows)]
        self.prompt_seconds += time.perf_counter() - begin
        if not self.seen.lag:
            self.retire()  # an EOS may be the first token

    def step(self) -> None:
        """Decode one token of every occupied slot, and of the gaps between them."""
        n = 1 + max(slot for slot, row in enumerate(self.row) if row is not None)
        if self.decode.captured:
            self.decode(n, self.generation)
        else:
            span = self._span(row for row in self.row[:n] if row is not None)
            token, length = self.slots.state[TOKEN, :n], self.slots.state[LENGTH, :n]
            logits = forward(self.model, token, length, TokenPlan(self.cache, length, span))
            self.slots.sample(logits, self.slots.order[:n], self.generation)
        self.steps += 1
        self.row_steps += self.occupied
        self.seen.note(self.steps)

    def retire(self) -> None:
        """Free the slots of rows that were seen to have ended; move rows into the gaps."""
        step, alive = self.seen.look()
        for slot, row in enumerate(self.row):
            if row is None:
                continue
            # One token from its prompt, one from each step since: what is full needs no looking.
            full = self.steps - self.entered[row] + 2 >= self.generation.max_new_tokens
            if full or (step >= self.since[slot] and not alive[slot]):
                self.row[slot] = None
                self.occupied -= 1
        last = 1 + max((slot for slot, row in enumerate(self.row) if row is not None), default=-1)
        refilled_soon = self.waiting and self.decode.captured
        if not refilled_soon and self.decode.rows(self.occupied) < self.decode.rows(last):
            self._close_gaps(last)

    def _close_gaps(self, last: int) -> None:
        """Move rows from the end of the first `last` slots into the gaps before them."""
        into = [slot for slot in range(self.occupied) if self.row[slot] is None]
        out = [slot for slot in range(self.occupied, last) if self.row[slot] is not None]
        if not out:
            return
        source, target = (sent(torch.tensor(x), self.slots.state.device) for x in (out, into))
        self.slots.move(source, target)
        by_swapping = self.decode.captured  # there the kernel finds each slot's block
        if by_swapping:
            self.slots.swap_blocks(source, target)
        else:
            span = self._span(row for slot in out if (row := self.row[slot]) is not None)
            self.cache.move(source, target, span)
        for i, j in zip(into, out, strict=True):
            self.row[i], self.row[j] = self.row[j], None
            if by_swapping:
                self.block[i], self.block[j] = self.block[j], self.block[i]
            self.since[i] = self.steps + 1

    def _span(self, rows: Iterable[int]) -> int:
        """At least the tokens that these rows have in the cache after the next step."""
        return max(self.prompt_len[row] + self.steps + 1 - self.entered[row] for row in rows) + 1

    def rollout(self) -> Rollout:
        """The responses, cut to the longest, on the device of the prompts."""
        home, rows, slots = self.prompts.input_ids.device, len(self.prompts), self.slots
        lengths = slots.produced[:rows].to(home)
        longest = int(lengths.max()) if rows else 0
        logprobs = slots.logprobs[:rows, :longest].to(home, copy=True)
        _check_finite(logprobs)
        return Rollout(
            prompts=self.prompts,
            response_ids=slots.response_ids[:rows, :longest].to(home, copy=True),
            response_mask=torch.arange(longest, device=home) < lengths[:, None],
            logprobs=logprobs,
            ended=slots.ended[:rows].to(home).bool(),
        )

    def stats(self, seconds: float) -> DecodeStats:
        return DecodeStats(
            prompt_tokens=sum(self.prompt_len),
            new_tokens=int(self.slots.produced[: len(self.prompts)].sum()),
            prompt_passes=self.prompt_passes,
            steps=self.steps,
            row_steps=self.row_steps,
            slots=len(self.row),
            cache_bytes=self.cache.nbytes(),
            prompt_seconds=self.prompt_seconds,
            capture_seconds=self.decode.capture_seconds - self.captured_before,
            seconds=seconds,
        )

    def _read_prompts(self, rows: list[int], slots: list[int]) -> None:
        """Run the prompts of `rows` into `slots`, and sample the first token of each."""
        device = self.packed.device
        into = sent(torch.tensor(slots), device)
        blocks = sent(torch.tensor([self.block[slot] for slot in slots]), device)
        lengths = torch.tensor([self.prompt_len[row] for row in rows])
        begins = torch.tensor([self.offsets[row] for row in rows])
        ends = lengths.cumsum(0)
        at = torch.arange(int(lengths.max()))
        inside = at < lengths[:, None]
        source = sent((begins[:, None] + at)[inside], device)
        pad = (ends - lengths)[:, None] + at.minimum(lengths[:, None] - 1)
        unpad = inside.flatten().nonzero()[:, 0]
        positions = at.expand_as(inside)[inside]
        plan = PromptPlan(
            self.cache,
            len(slots),
            blocks,
            None if inside.all() else sent(pad, device),
            sent(unpad, device),
        )
        tokens, positions = self.packed[source], sent(positions, device)
        keep = sent(ends - 1, device)
        if self.decode.captured and self.cache.layers:
            logits = self.decode.read(tokens, positions, plan, keep)
        else:  # the first prompts show whether the model can be decoded
            logits = forward(self.model, tokens, positions, plan, keep)
            check_layers(self.model, self.cache)
        self.slots.fill(into, rows, lengths.tolist())
        self.prompt_passes += 1
        self.slots.sample(logits, into, self.generation)
        for slot, row in zip(slots, rows, strict=True):
            self.row[slot] = row
            self.since[slot] = self.entered[row] = self.steps + 1
        self.occupied += len(rows)


class _Seen:
    """Which slots are alive: as they are, or with a `lag` of one step, without waiting for it."""

    def __init__(self, state: Tensor, *, lag: bool) -> None:
        self.state = state
        self.step = 0
        self.lag = lag
        if lag:
            self.copies = [torch.zeros(state.shape[1], dtype=torch.long).pin_memory()] * 2
            self.copies[1] = self.copies[1].clone().pin_memory()
            self.events = [torch.cuda.Event(), torch.cuda.Event()]

    def note(self, step: int) -> None:
        """Take down what step number `step`, just started, will leave."""
        self.step = step
        if self.lag:
            self.copies[step % 2].copy_(self.state[ALIVE], non_blocking=True)
            self.events[step % 2].record()

    def look(self) -> tuple[float, list[int]]:
        """A step, and 1 for each slot that was alive after it."""
        if not self.lag:
            return math.inf, self.state[ALIVE].tolist()
        before = self.step - 1
        if before < 1:
            return 0, [1] * self.state.shape[1]
        self.events[before % 2].synchronize()
        return before, self.copies[before % 2].tolist()


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
