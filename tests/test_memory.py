"""The plan of a run: what is on a GPU in each phase, and how long it takes, by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_engine_memory import opt

from rlhf_kit.config import RunConfig, preset
from rlhf_kit.hybrid_engine.device import Device, device
from rlhf_kit.hybrid_engine.memory import GIB, Plan
from rlhf_kit.hybrid_engine.moments import Moment
from rlhf_kit.hybrid_engine.timing import operations, seconds


@pytest.fixture
def run(tmp_path: Any) -> Callable[..., RunConfig]:
    """The consumer preset, all models on the device, with tiny ones; the scorer half as wide."""
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
                "memory__offload_idle": False,
                "memory__logprob_chunk": 1024,
                **changes,
            },
        )

    return config


def moment(plan: Plan, stage: str, name: str) -> Moment:
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
    assert "critic AdamW moments" not in moment(first, "ppo", "score").terms
    # A second optimiser step in the iteration finds the moments of the first.
    found = moment(first, "ppo", "train critic").terms
    assert found["critic AdamW moments"] == 8 * first.critic.sizes.total
    assert "actor AdamW moments" not in found
    assert "train actor" not in [m.name for m in first.moments]
    later = Plan.of(run(ppo__critic_warmup_iterations=1))
    assert moment(later, "ppo", "train actor").terms["actor AdamW moments"] > 0


def test_what_idles_waits_in_the_memory_of_the_host(run: Callable[..., RunConfig]):
    there = Plan.of(run())
    away = Plan.of(run(memory__offload_idle=True, ppo__minibatch_size=128))
    actor, critic = away.actor.sizes.total, away.critic.sizes.total

    def models(name: str) -> set[str]:
        others = {"activations", "temporaries", "gathered weights", "KV cache"}
        return {k for k, v in moment(away, "ppo", name).terms.items() if v} - others

    assert models("generate") == {"actor"}
    assert models("train critic") == {
        "actor",
        "critic",
        "critic gradients",
        "gradients on their way",
        "actor gradients",
    }
    # With one step an iteration, states come one after the other, and the average last.
    assert models("critic step") == {
        "actor",
        "critic",
        "critic fp32 masters",
        "critic AdamW moments",
        "critic gradients and copies",
        "actor gradients",
    }
    assert models("actor step") >= {"critic AdamW moments", "actor AdamW moments"}
    assert "EMA" not in models("actor step")
    assert away.fullest.peak < there.fullest.peak
    assert away.ppo.host_bytes == 14 * critic + 2 * critic + 12 * actor + 2 * actor + 4 * actor


def test_four_roles_on_one_base_hold_it_once(run: Callable[..., RunConfig]):
    changes = {f"{engine}_engine__lora__rank": 8 for engine in ("actor", "critic")}
    plan = Plan.of(run(reward__init_from="sft", memory__shared_base=True, **changes))
    terms = moment(plan, "ppo", "generate").terms
    adapters = plan.actor.sizes.adapters
    assert terms["base"] == 2 * (plan.actor.sizes.total - adapters)
    assert terms["actor"] == 2 * adapters
    assert terms["critic"] == terms["reward model"] == 2 * (adapters + 256)  # and a head
    assert "ref" not in terms
    # Generation adds the adapters into a copy of what they adapt.
    assert terms["merged adapters"] == 2 * plan.actor.sizes.matrices


def test_a_micro_batch_of_tokens_has_as_many_rows_as_fit(run: Callable[..., RunConfig]):
    rows, tokens = (
        Plan.of(run(**{f"ppo__micro_batch_{unit}": n}))
        for unit, n in (("size", 4), ("tokens", 4 * 64 + 63))
    )
    assert moment(rows, "ppo", "train actor") == moment(tokens, "ppo", "train actor")


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
