"""The plan's bytes, against what DeepSpeed allocates on a CPU and against sums by hand."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from rlhf_kit import deepspeed_config
from rlhf_kit.config import EngineConfig, OptimizerConfig, RunConfig, preset
from rlhf_kit.hybrid_engine import memory
from rlhf_kit.hybrid_engine.device import Device, device
from rlhf_kit.hybrid_engine.dry_run import Model
from rlhf_kit.hybrid_engine.memory import GIB, Plan, engine_memory
from rlhf_kit.hybrid_engine.timing import operations, seconds
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


# ---- what DeepSpeed holds


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "fp32"), (1, "bf16"), (2, "bf16"), (2, "fp32"), (3, "bf16")]
)
def test_an_engine_takes_what_deepspeed_allocates(
    stage: int, dtype: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(deepspeed_config, "REDUCE_BUCKET", BUCKET)
    monkeypatch.setattr(memory, "REDUCE_BUCKET", BUCKET)
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


# ---- a run


@pytest.fixture
def run(tmp_path: Any) -> Callable[..., RunConfig]:
    """The consumer preset with a tiny actor and a reward model half as wide."""
    for name, hidden in (("actor", 256), ("scorer", 128)):
        opt(5, hidden).save_pretrained(tmp_path / name)

    def config(**changes: Any) -> RunConfig:
        return preset(
            "consumer",
            **{
                "actor_model": str(tmp_path / "actor"),
                "reward_model": str(tmp_path / "scorer"),
                "reward__init_from": "base",
                "data__max_prompt_length": 24,
                "generation__max_new_tokens": 40,
                "data__max_length": 64,
                **changes,
            },
        )

    return config


def moment(plan: Plan, stage: str, name: str) -> memory.Moment:
    (found,) = [m for m in plan.moments if (m.stage, m.name) == (stage, name)]
    return found


def test_ppo_holds_four_models_two_optimisers_and_the_average(run: Callable[..., RunConfig]):
    plan = Plan.of(run())
    actor, critic = plan.actor.sizes.total, plan.critic.sizes.total
    terms = moment(plan, "ppo", "generate").terms
    resident = {
        "actor": 2 * actor,
        "actor fp32 masters": 4 * actor,
        "actor AdamW moments": 8 * actor,
        "ref": 2 * actor,
        "EMA": 4 * actor,
        "critic": 2 * critic,
        "critic fp32 masters": 4 * critic,
        "critic AdamW moments": 8 * critic,
        "reward model": 2 * critic,
        # 64 slots of 24 + 40 tokens, in 5 layers keys and values of 256 elements, bf16.
        "KV cache": 64 * 64 * 5 * 2 * 256 * 2,
    }
    assert resident.items() <= terms.items()
    assert {name for name, size in terms.items() if size} - resident.keys() == {"activations"}


def test_adapters_need_no_ref_and_the_average_is_of_them(run: Callable[..., RunConfig]):
    plan = Plan.of(run(actor_engine__lora__rank=8))
    terms = moment(plan, "ppo", "score").terms
    assert terms["ref"] == 0
    assert terms["EMA"] == 4 * plan.actor.sizes.adapters
    assert terms["actor AdamW moments"] == 8 * plan.actor.sizes.adapters


def test_while_the_critic_warms_up_the_actor_has_no_optimiser_states(
    run: Callable[..., RunConfig],
):
    first = Plan.of(run(ppo__critic_warmup_iterations=1), first=True)
    assert moment(first, "ppo", "score").terms["critic AdamW moments"] == 0
    # A second optimiser step in the iteration finds the moments of the first.
    assert moment(first, "ppo", "train critic").terms["critic AdamW moments"] > 0
    assert moment(first, "ppo", "train critic").terms["actor AdamW moments"] == 0
    assert "train actor" not in [m.name for m in first.moments]
    later = Plan.of(run(ppo__critic_warmup_iterations=1))
    assert moment(later, "ppo", "train actor").terms["actor AdamW moments"] > 0


def test_a_smaller_micro_batch_takes_as_much_less(run: Callable[..., RunConfig]):
    def activations(rows: int) -> int:
        return moment(Plan.of(run(sft__micro_batch_size=rows)), "sft", "train").terms["activations"]

    assert activations(8) == pytest.approx(2 * activations(4), rel=0.01)


def test_a_run_fits_with_cudas_own_memory_and_what_the_allocator_loses(
    run: Callable[..., RunConfig],
):
    plan = Plan.of(run())
    peak = max(m.peak for m in plan.moments)
    need = (peak * 1.05 + 0.5 * GIB) / GIB
    assert plan.fits(need + 0.001) and not plan.fits(need - 0.001)
    assert plan.fullest.peak == peak == max(plan.peaks("ppo").values())
    assert list(plan.peaks("ppo")) == ["load", "generate", "score", "train"]


# ---- time


def test_seconds_by_hand(run: Callable[..., RunConfig]):
    # A GPU of a billion bytes and operations a second, of which 0.7 and 0.5 are reached.
    gpu = Device("slow", 24, 1, 0.001, 1)
    config = run(ppo__mixture__kind="none", actor_engine__gradient_checkpointing=False)
    plan = Plan.of(config)
    found = seconds(plan, gpu)
    sizes, rows = plan.actor.sizes, 128
    scores = 2 * 5 * 256 * 64  # of a token: 64 / 2 keys on average, and as many values
    forward = 2 * sizes.matrices + scores
    assert operations(plan.actor, rows, 64) == rows * 64 * forward
    head = 40 * 2 * 512 * 256  # of a row's responses
    trained = rows * (3 * 64 * forward + 4 * head) / 0.5e9
    assert found["ppo", "train actor"] == pytest.approx(trained)
    assert found["ppo", "actor step"] == pytest.approx(2 * 70 * sizes.total / 0.7e9)
    # Two waves of 64 slots decode 40 tokens, with 24 + 20 tokens in the cache.
    read = 2 * (sizes.matrices + 512 * 256) + 64 * 44 * 2 * 2 * 5 * 256
    prefill = rows * (24 * (2 * sizes.matrices + 2 * 5 * 256 * 24) + 2 * 512 * 256) / 0.5e9
    work = 64 * (2 * sizes.matrices + 2 * 5 * 256 + 2 * 512 * 256) / 0.5e9
    decode = 2 * 40 * max(read / 0.7e9, work)
    assert found["ppo", "generate"] == pytest.approx(prefill + decode)


def test_a_gpu_is_known_by_name_by_memory_or_by_both():
    assert device("h100").memory == 79.1
    assert device("h100", 40).memory == 40 and device("h100", 40).flops == 989
    assert device(memory=24).bandwidth == device("3090").bandwidth
    with pytest.raises(ValueError, match="there is no GPU h900 in the table: choose one of 3090"):
        device("h900")
    with pytest.raises(ValueError, match="--gpu-memory must be positive"):
        device(memory=-1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_one_must_be_named():
    with pytest.raises(ValueError, match="no GPU is visible here; name the one to plan for"):
        device()
