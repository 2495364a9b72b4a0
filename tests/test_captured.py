"""The host's side of captured decoding, without a GPU: replays that lag, buckets, gaps refilled.

A captured step is played by running it; what the host sees of it is one step old, as on a GPU.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_decode import EOS, PAD, compare, llama, prompts

from rlhf_kit.config import GenerationConfig
from rlhf_kit.hybrid_engine import compiled_layers, decode, step
from rlhf_kit.hybrid_engine.attention import STEP_NAME, attach, own_attention
from rlhf_kit.hybrid_engine.decode import Decoder
from rlhf_kit.hybrid_engine.slots import ALIVE


class LateSeen:
    """`decode._Seen` with a lag: what step n left is known once step n + 1 was started."""

    def __init__(self, state: torch.Tensor, *, lag: bool) -> None:
        self.state, self.lag = state, lag
        self.taken: list[list[int]] = []

    def note(self, step: int) -> None:
        self.taken.append(self.state[ALIVE].tolist())
        assert len(self.taken) == step

    def look(self) -> tuple[float, list[int]]:
        if not self.lag:
            return float("inf"), self.state[ALIVE].tolist()
        if len(self.taken) < 2:
            return 0, [1] * self.state.shape[1]
        return len(self.taken) - 1, self.taken[-2]


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Decoders capture on the CPU too; the numbers of rows they captured, in order."""
    captured: list[int] = []

    def capture(self: step.Step, n: int, config: GenerationConfig) -> Any:
        captured.append(n)
        self._captures.warm.add(self._kind(n, config))

        def replay() -> None:
            with own_attention(self.model, STEP_NAME), attach(self.model, self.cache):
                self._run(n, config)

        return SimpleNamespace(replay=replay)

    monkeypatch.setattr(compiled_layers, "BACKEND", "eager")
    monkeypatch.setattr(compiled_layers, "_compiled_forwards", {})
    torch._dynamo.reset()
    monkeypatch.setattr(step.Step, "_capture", capture)
    monkeypatch.setattr(step, "BUCKETS", (2, 3, 5, 8))
    monkeypatch.setattr(decode, "_Seen", LateSeen)
    return captured


def decoders() -> tuple[Decoder, Decoder]:
    model = llama()
    return tuple(
        Decoder(model, eos_token_ids=EOS, pad_token_id=PAD, captured=captured)
        for captured in (True, False)
    )  # type: ignore[return-value]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("slots", [1, 3, 8, 64])
def test_ragged_responses_are_those_of_the_plain_loop(
    slots: int, temperature: float, sizes: list[int]
) -> None:
    captured, plain = decoders()
    config = GenerationConfig(max_new_tokens=12, temperature=temperature, slots=slots)
    batch = prompts(rows=40)
    compare(plain.generate(batch, config), captured.generate(batch, config))
    assert set(sizes) <= {1, 2, 3, 5, 8, 16, 24, 32, 40}  # buckets, or all slots there are


def test_steps_and_cache_are_kept_until_they_are_released(sizes: list[int]) -> None:
    captured, plain = decoders()
    config = GenerationConfig(max_new_tokens=10, slots=5)
    captured.generate(prompts(rows=20), config)
    kept, made = captured._kept, len(sizes)
    for rows, longest in ((20, 8), (7, 5)):  # other batches that fit in
        batch = prompts(rows=rows, longest=longest)
        compare(plain.generate(batch, config), captured.generate(batch, config))
    assert captured._kept is kept and len(sizes) == made
    captured.release()
    captured.generate(prompts(rows=20), config)
    assert captured._kept is not kept and len(sizes) > made


def test_a_new_cache_captures_all_that_the_one_before_needed_ahead_of_its_first_step(
    sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    captured, _ = decoders()
    config = GenerationConfig(max_new_tokens=10, slots=5)
    captured.generate(prompts(rows=20), config)
    before = sorted(sizes, reverse=True)
    assert len(before) > 1
    captured.release()
    sizes.clear()
    at_a_step: list[int] = []
    run = step.Step._run

    def noted(self: step.Step, n: int, config: GenerationConfig) -> None:
        at_a_step.append(len(sizes))
        run(self, n, config)

    monkeypatch.setattr(step.Step, "_run", noted)
    captured.generate(prompts(rows=20), config)
    assert sizes[0] == 5 and sizes == before
    assert set(at_a_step) == {len(before)}
    captured.release()
    captured.generate(prompts(rows=20), GenerationConfig(max_new_tokens=11, slots=5))
    assert at_a_step[-1] > at_a_step[0] + 1  # another length: each when it is needed


def test_what_was_captured_reads_the_weights_as_they_are_now(sizes: list[int]) -> None:
    captured, plain = decoders()
    config = GenerationConfig(max_new_tokens=8, temperature=0.0, slots=8)
    before = captured.generate(prompts(), config)
    made = len(sizes)
    with torch.no_grad():
        captured.model.lm_head.weight[11] += 3.0
    after = captured.generate(prompts(), config)
    assert len(sizes) == made and not torch.equal(before.response_ids, after.response_ids)
    compare(plain.generate(prompts(), config), after)


def test_steps_are_captured_anew_where_a_weight_has_moved(sizes: list[int]) -> None:
    captured, plain = decoders()
    config = GenerationConfig(max_new_tokens=8, temperature=0.0, slots=8)
    captured.generate(prompts(), config)
    made = len(sizes)
    weight = captured.model.lm_head.weight
    weight.data = weight.data.clone()
    compare(plain.generate(prompts(), config), captured.generate(prompts(), config))
    assert len(sizes) > made


def test_fewer_slots_than_were_kept_take_less_memory(sizes: list[int]) -> None:
    captured, _ = decoders()
    for slots in (8, 4):  # as after memory ran out
        captured.generate(prompts(rows=20), GenerationConfig(max_new_tokens=8, slots=slots))
        assert captured._kept is not None and captured._kept.cache.slots == slots


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_gpu
def test_caches_and_captured_steps_come_and_go_without_memory_growing() -> None:
    decoder = Decoder(llama().cuda(), eos_token_ids=EOS, pad_token_id=PAD)
    config = GenerationConfig(max_new_tokens=10, slots=16)
    batch, reserved = prompts(rows=40).to("cuda"), []
    for _ in range(12):
        decoder.generate(batch, config)
        decoder.release()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] == reserved[2]


@needs_gpu
def test_captures_find_memory_where_all_there_is_lies_cached() -> None:
    decoder = Decoder(llama().cuda(), eos_token_ids=EOS, pad_token_id=PAD)
    config = GenerationConfig(max_new_tokens=10, slots=16, temperature=0.0)
    batch = prompts(rows=40).to("cuda")
    before = decoder.generate(batch, config)
    other = Decoder(decoder.model, eos_token_ids=EOS, pad_token_id=PAD)  # has no memory yet
    torch.cuda.empty_cache()
    block, another = (torch.empty(2**30, dtype=torch.uint8, device="cuda") for _ in range(2))
    del block, another
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    try:
        after = other.generate(batch, config)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(before.response_ids, after.response_ids)
