"""The self-test of generation: the engine against plain transformers, before a run trusts it.

Shapes: B batch, P prompt, R response, V vocabulary.

A KV cache that is one position off writes fluent text and trains on wrong log-probabilities;
nothing else in a run would notice. So both ways answer a few prompts greedily, and one plain
forward over what the engine wrote gives the log-probabilities it must have seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_kit import distributed
from rlhf_kit.config import GenerationConfig
from rlhf_kit.hybrid_engine.engine import HybridEngine
from rlhf_kit.models import quiet_transformers, response_logits
from rlhf_kit.types import PromptBatch, Rollout

TOLERANCE = {"fp32": 1e-3, "bf16": 0.15}
"""Largest difference of logprobs between two ways to compute them, by dtype."""
LONGEST = 64
"""Response tokens a prompt, at most: enough to see a fault and to measure a speed."""
LONGEST_IN_SHARDS = 16
"""Where plain generation has to gather every layer for every token, because no rank may hold all of
them: ZeRO-3 with tensor-parallel generation."""
REPEATS = 3
"""Calls of each, of which the first one warms up and the fastest counts."""


class SelfTestError(ValueError):
    """Generation is not what the plain model does; the message has the numbers."""


@dataclass(frozen=True)
class SelfTest:
    """What the comparison found."""

    tokens_equal: bool
    """Every greedy token is plain generation's. False where a row went another way at a tie:
    two tokens that the plain model itself holds for equally likely, within the tolerance."""
    largest_logprob_gap: float
    """Largest |logprob of the engine - logprob of a plain forward| over all tokens, in nats."""
    speed_up: float
    """The engine's tokens a second over those of plain transformers, on the same prompts."""
    tokens_per_second: float
    """The engine's."""

    def __str__(self) -> str:
        tokens = "equal" if self.tokens_equal else "equal up to ties"
        return (
            f"generation against plain transformers: greedy tokens {tokens}, largest difference "
            f"of logprobs {self.largest_logprob_gap:.1e}, {self.tokens_per_second:,.0f} tokens/s, "
            f"{self.speed_up:.1f} times as fast"
        )


@torch.no_grad()
def self_test(engine: HybridEngine, prompts: PromptBatch, generation: GenerationConfig) -> SelfTest:
    """Answer a few prompts greedily with the engine and with transformers, and compare.

    Only the length limit of `generation` is used, and at most `LONGEST` of it. All ranks must
    call it, each with prompts of its own. Raises SelfTestError on every rank where one finds a
    token, a length or a logprob that differs by more than rounding.
    """
    in_shards = engine.parallel is not None and engine.config.zero_stage == 3
    greedy = GenerationConfig(
        max_new_tokens=min(generation.max_new_tokens, LONGEST_IN_SHARDS if in_shards else LONGEST),
        temperature=0.0,
        slots=generation.slots,
    )
    prompts = prompts.to(engine.device)
    engine.eval()
    rollout, seconds = _timed(lambda length: engine.generate(prompts, _cut(greedy, length)), greedy)
    with contextlib.nullcontext() if in_shards else engine._whole_parameters():
        with _plain_generation(engine, together=in_shards) as generate:
            repeats = 1 if in_shards else REPEATS
            plain, plain_seconds = _timed(lambda n: generate(prompts, n), greedy, repeats)
        module: Any = engine.module
        length = rollout.response_ids.shape[1]
        logits = response_logits(module, rollout.sequences, rollout.attention_mask, length)
    logprobs = logits.float().log_softmax(-1)
    rows = _rows(plain[:, prompts.input_ids.shape[1] :], engine.decoder.eos_token_ids)
    tolerance = TOLERANCE[engine.config.dtype]
    chosen = logprobs.gather(-1, rollout.response_ids.unsqueeze(-1)).squeeze(-1)
    gap = float((chosen - rollout.logprobs).masked_fill(~rollout.response_mask, 0.0).abs().max())
    fault = _first_fault(rollout, rows, logprobs, tolerance)
    if fault is None and gap > tolerance:
        fault = f"logprobs differ by up to {gap:.3g} nats, allowed {tolerance:g}"
    if distributed.all_any(fault is not None, engine.device):
        raise SelfTestError(
            f"generation is not what the plain model does: {fault or 'see the log of another rank'}"
        )
    ours = _responses(rollout)
    rate = sum(map(len, ours)) / seconds
    return SelfTest(ours == rows, gap, rate / (sum(map(len, rows)) / plain_seconds), rate)


def _cut(generation: GenerationConfig, length: int) -> GenerationConfig:
    return dataclasses.replace(generation, max_new_tokens=length)


def _timed(
    generate: Any, generation: GenerationConfig, repeats: int = REPEATS
) -> tuple[Any, float]:
    """The result of a call, and the seconds of the fastest of some calls: others share the CPU."""
    result, fastest = None, math.inf
    for _ in range(repeats):
        _synchronize()
        start = time.perf_counter()
        result = generate(generation.max_new_tokens)
        _synchronize()
        fastest = min(fastest, time.perf_counter() - start)
    return result, fastest


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextlib.contextmanager
def _plain_generation(engine: HybridEngine, *, together: bool) -> Iterator[Any]:
    """transformers' `generate` on the same module; (prompts, length) -> ids [B, P + length].

    `together`: ranks meet in every forward, so those that are done go on until all are.
    """
    from transformers import GenerationConfig as PlainConfig

    module: Any = engine.module

    def generate(prompts: PromptBatch, length: int) -> Tensor:
        return module.generate(
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask.long(),
            max_new_tokens=length,
            synced_gpus=together,
        )

    before = module.generation_config
    # Replaced, not passed: what a passed one leaves open (penalties) is taken from the model's.
    module.generation_config = PlainConfig(
        do_sample=False,
        use_cache=True,
        eos_token_id=list(engine.decoder.eos_token_ids),
        pad_token_id=engine.decoder.pad_token_id,
    )
    try:
        with quiet_transformers():
            yield generate
    finally:
        module.generation_config = before


def _responses(rollout: Rollout) -> list[list[int]]:
    return [
        ids[mask].tolist()
        for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)
    ]


def _rows(responses: Tensor, eos_token_ids: Sequence[int]) -> list[list[int]]:
    """Plain responses up to and including their first EOS."""
    rows = []
    for row in responses.tolist():
        ends = [place for place, token in enumerate(row) if token in eos_token_ids]
        rows.append(row[: ends[0] + 1] if ends else row)
    return rows


def _first_fault(
    rollout: Rollout, rows: Sequence[Sequence[int]], logprobs: Tensor, tolerance: float
) -> str | None:
    """Where the engine's tokens differ from `rows` other than at a tie; None if nowhere.

    logprobs [B, R, V] are the plain forward's over the engine's tokens: up to the first
    difference of a row both read the same tokens. Behind a tie a row is not compared.
    """
    for number, (ours, theirs) in enumerate(zip(_responses(rollout), rows, strict=True)):
        pairs = enumerate(zip(ours, theirs, strict=False))
        place = next((place for place, (a, b) in pairs if a != b), None)
        if place is None:
            if len(ours) == len(theirs):
                continue
            return (
                f"the response to prompt {number} has {len(ours)} tokens, plain generation's "
                f"{len(theirs)}"
            )
        at = logprobs[number, place]
        lost = float(at[theirs[place]] - at[ours[place]])
        if abs(lost) > tolerance:
            return (
                f"token {place} of the response to prompt {number} is {ours[place]}, plain "
                f"generation's is {theirs[place]}, likelier by {lost:.3g} nats"
            )
    return None
