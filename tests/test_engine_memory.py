"""What an engine holds, against what DeepSpeed allocates on a CPU and against sums by hand."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import transformers

from rlhf_kit import deepspeed_config
from rlhf_kit.config import EngineConfig, OptimizerConfig
from rlhf_kit.hybrid_engine import engine_memory as counted
from rlhf_kit.hybrid_engine.dry_run import Model
from rlhf_kit.hybrid_engine.engine_memory import engine_memory
from rlhf_kit.hybrid_engine.training import TrainingEngine
from rlhf_kit.hybrid_engine.watch import Watch
from rlhf_kit.models import DTYPES
from rlhf_kit.token_logprobs import chosen_logprobs

BUCKET = 200_000
"""Elements; smaller than the real one, as is the model."""


def opt(layers: int = 2, hidden: int = 256, **fields: Any) -> transformers.OPTConfig:
    return transformers.OPTConfig(
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        vocab_size=512,
        max_position_embeddings=64,
        dropout=0.0,
        **fields,
    )


def text_of(config: Any) -> str:
    return config.to_json_string(use_diff=False)


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "fp32"), (1, "bf16"), (2, "bf16"), (2, "fp32"), (3, "bf16")]
)
def test_an_engine_takes_what_deepspeed_allocates(
    stage: int, dtype: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(deepspeed_config, "REDUCE_BUCKET", BUCKET)
    monkeypatch.setattr(counted, "REDUCE_BUCKET", BUCKET)
    planned = Model(text_of(opt()), False, dtype)
    config = EngineConfig(zero_stage=stage, dtype=dtype)
    expected = engine_memory(planned.sizes, config, 1, accumulates=True)
    run = planned.text(2, 32, 64)
    held = expected.weights + expected.masters + expected.buffers
    model = transformers.AutoModelForCausalLM.from_config(opt(), dtype=DTYPES[dtype])
    ids, places = torch.zeros(2, 32, dtype=torch.long), torch.arange(1, 64)
    with Watch(device="cpu") as watch:
        for parameter in model.parameters():
            parameter.view(-1)  # an operation, so that its storage is seen
        del parameter
        engine = TrainingEngine(model, config, OptimizerConfig(learning_rate=1e-3), total_steps=2)
        gc.collect()
        assert_near(watch.live, held)
        assert_near(watch.peak, expected.weights + expected.loading)
        for moments, step in ((0, expected.first_step), (expected.moments, expected.step)):
            watch.peak = 0
            for _ in range(2):
                logprobs, _ = chosen_logprobs(engine, ids, places, chunk=64)
                engine.backward(logprobs.mean())
            del logprobs
            gc.collect()
            during = expected.gradients + expected.arriving + expected.gathered + run.peak
            assert_near(watch.live, held + moments + expected.gradients)
            assert 0.8 < watch.peak / (held + moments + during) < 1.02
            watch.peak = 0
            engine.step()
            gc.collect()
            assert_near(watch.peak, held + step)
            assert_near(watch.live, held + expected.moments)


def assert_near(measured: int, expected: int) -> None:
    """Within what the allocator rounds up, and a bucket not quite full."""
    assert measured == pytest.approx(expected, rel=0.02)


def test_parameters_and_ranks_share_an_optimiser_by_hand():
    # Ten million parameters, none of them in a bucket's way.
    sizes = Model(text_of(opt())).sizes._replace(
        embeddings=0, matrices=9_000_000, vectors=1_000_000, head=0, tied=True, adapters=0,
        trained_matrices=9_000_000, trained_vectors=1_000_000, largest=1_000_000,
    )  # fmt: skip
    two = engine_memory(sizes, EngineConfig(zero_stage=2, dtype="bf16"), 2, accumulates=True)
    assert (two.weights, two.masters, two.moments) == (20e6, 20e6, 40e6)
    assert (two.gradients, two.gathered, two.buffers) == (10e6, 0, 0)
    # The bucket of 50 million elements, a copy of the ten million in it, a second set.
    assert two.arriving == 100e6 + 20e6 + 10e6
    # Gradients, and of 4.5 million elements of matrices a flat copy and its cast to fp32.
    assert two.step == 40e6 + 10e6 + 4.5e6 * 6
    # In the first step the moments of the matrices come while their fp32 gradients are there.
    assert two.first_step == 10e6 + 4.5e6 * 12
    three = engine_memory(sizes, EngineConfig(zero_stage=3, dtype="bf16"), 2, accumulates=True)
    assert (three.weights, three.gathered) == (10e6 + 2e6, 20e6)
    assert three.buffers == 100e6 + 10e6
    assert three.step == 40e6 + 5e6 * 6


def test_an_offloaded_optimiser_leaves_weights_and_a_way_out():
    sizes = Model(text_of(opt())).sizes
    engine = EngineConfig(zero_stage=2, dtype="bf16", offload_optimizer=True)
    found = engine_memory(sizes, engine, 1, accumulates=True)
    assert (found.masters, found.moments, found.gradients) == (0, 0, 0)
    assert found.step == (2 + 8) * sizes.largest
    # fp32 masters, gradients and moments; bf16 weights on their way back, and gradients so far.
    assert found.host == (4 + 4 + 8 + 2 + 2) * sizes.total
