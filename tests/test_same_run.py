"""The same run on 1, 2 and 4 ranks: the same rows in every step, and the same weights.

Seven processes, forked from one that has imported everything, train tiny models by all three
stages: batches that no number of ranks divides, two epochs of PPO, the mixture loss, the average.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import copied, prompt_rows, run_ranks

from rlhf_kit import distributed, fingerprint, preflight
from rlhf_kit.checkpoint import export
from rlhf_kit.config import (
    DataConfig,
    EngineConfig,
    OptimizerConfig,
    RewardConfig,
    RunConfig,
    SFTConfig,
    preset,
)
from rlhf_kit.hybrid_engine.partitions import gathered
from rlhf_kit.hybrid_engine.training import TrainingEngine
from rlhf_kit.models import ValueModel, load_causal_lm, load_scorer
from rlhf_kit.ppo import PPOTrainer
from rlhf_kit.reward import RewardTrainer, prompt_batches
from rlhf_kit.rlhf_engine import RLHFEngine
from rlhf_kit.rollout import PromptLoader
from rlhf_kit.run_directory import RunDirectory
from rlhf_kit.sft import SFTTrainer
from rlhf_kit.tokenization import (
    as_text,
    encode_demonstrations,
    encode_pairs,
    load_tokenizer,
)

WORLDS = (1, 2, 4)
STAGES: dict[int, dict[str, tuple[int, ...]]] = {
    1: {"sft": (0,), "reward": (0,), "ppo": (0,)},
    2: {"sft": (2,), "reward": (0, 1, 2, 3), "ppo": (1,)},
    4: {"sft": (3,), "reward": (3,), "ppo": (0,)},
}
"""ZeRO stages that are tried on so many ranks; all are compared with stage 0 on one. What is not
here, SFT on two ranks in test_training.py and PPO in test_distributed.py try."""
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, eps=1e-3, weight_decay=0.1)
# An eps far above the gradients' rounding keeps Adam from making steps of it.


def sft(directory: str, stage: int) -> dict[str, Any]:
    tokenizer = load_tokenizer(directory)
    rows = encode_demonstrations(tokenizer, prompt_rows(24), DataConfig()).rows
    model = load_causal_lm(directory, tokenizer, dtype="fp32")
    engine = TrainingEngine(model, EngineConfig(zero_stage=stage), OPTIMIZER, total_steps=3)
    trainer = SFTTrainer(engine, SFTConfig(micro_batch_size=2), pad_token_id=tokenizer.pad_token_id)
    metrics = [trainer.step(rows[start:end]) for start, end in ((0, 8), (8, 15), (15, 16))]
    metrics.append({"loss/eval": trainer.evaluate(rows[16:21])})
    with gathered(engine.module.parameters()):
        return {"metrics": metrics, "weights": copied(engine.module)}


def reward(directory: str, stage: int, output: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    tokenizer = load_tokenizer(directory)
    pairs = encode_pairs(tokenizer, prompt_rows(19), DataConfig()).rows
    plan = prompt_batches(pairs, 7, seed=1, epoch=0)
    assert sorted(map(len, plan)) == [5, 7, 7]
    distributed.seed_everything(3)  # the head is new
    engine = TrainingEngine(
        ValueModel(load_scorer(directory, tokenizer)),
        EngineConfig(zero_stage=stage),
        OPTIMIZER,
        total_steps=len(plan),
    )
    trainer = RewardTrainer(
        engine, RewardConfig(micro_batch_size=2), pad_token_id=tokenizer.pad_token_id
    )
    metrics = [trainer.step([pairs[i] for i in batch]) for batch in plan]
    metrics.append(trainer.accuracy(pairs[:3]))
    export(engine.module.scorer, tokenizer, output)
    distributed.barrier()
    return {"metrics": metrics, "weights": load_file(output / "model.safetensors")}


def ppo_settings(directory: str, scorer: str, stage: int) -> RunConfig:
    return preset(
        "toy",
        actor_model=directory,
        reward_model=scorer,
        actor_engine__zero_stage=stage,
        critic_engine__zero_stage=stage,
        generation__max_new_tokens=8,
        ppo__batch_size=8,
        ppo__minibatch_size=4,
        ppo__micro_batch_size=4,  # more than a minibatch's share on 2 and 4 ranks
        ppo__epochs=2,
        ppo__iterations=2,
        ppo__critic_warmup_iterations=0,
        ppo__max_approx_kl=0.0,
        ppo__ema__decay=0.5,
        ppo__mixture__kind="coef",
        ppo__mixture__ptx_coef=0.1,
        ppo__mixture__batch_ratio=1.0,
        ppo__actor_optimizer=OPTIMIZER.__dict__ | {"learning_rate": 1e-3},
        ppo__critic_optimizer=OPTIMIZER.__dict__ | {"learning_rate": 1e-3},
    )


def ppo(directory: str, scorer: str, stage: int) -> dict[str, Any]:
    args = ppo_settings(directory, scorer, stage)
    tokenizer = load_tokenizer(directory)
    engine = RLHFEngine(
        actor_model_name_or_path=directory,
        critic_model_name_or_path=scorer,
        tokenizer=tokenizer,
        num_total_iters=2,
        args=args,
    )
    texts = as_text(encode_demonstrations(tokenizer, prompt_rows(16), DataConfig()).rows)
    trainer = PPOTrainer(engine=engine, args=args, mixture_rows=texts)
    loader = PromptLoader(tokenizer, prompt_rows(16), batch_size=8, iterations=2, seed=1)
    metrics = [trainer.step(trainer.generate_experience(prompts)) for prompts in loader]
    weights = {}
    assert engine.ema is not None
    with gathered(engine.actor.module.parameters()):
        weights |= {f"actor.{k}": v for k, v in copied(engine.actor.module).items()}
    with gathered(engine.critic.module.parameters()):
        weights |= {f"critic.{k}": v for k, v in copied(engine.critic.module).items()}
    with engine.ema.swapped_in(), gathered(engine.actor.module.parameters()):
        weights |= {f"ema.{k}": v for k, v in copied(engine.actor.module).items()}
    return {"metrics": metrics, "weights": weights}


def one_rank(directory: str, scorer: str, output: Path) -> None:
    """All that one process does."""
    world = distributed.world_size()
    config = ppo_settings(directory, scorer, 0)
    preflight.check(RunDirectory(output / "run", config, time.monotonic()))
    train: dict[str, Callable[[int], dict[str, Any]]] = {
        "sft": lambda stage: sft(directory, stage),
        "reward": lambda stage: reward(directory, stage, output / f"reward{world}-{stage}"),
        "ppo": lambda stage: ppo(directory, scorer, stage),
    }
    found = {
        f"{training} {stage}": train[training](stage)
        for training, stages in STAGES[world].items()
        for stage in stages
    }
    if distributed.is_main_rank():
        torch.save(found, output / f"{world}.pt")


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, model_dir: Callable[..., str], reward_dir: str
) -> dict[int, dict[str, Any]]:
    """What each number of ranks found."""
    output = tmp_path_factory.mktemp("same_run")
    for world in WORLDS:
        run_ranks(world, one_rank, model_dir(), reward_dir, output)
    return {world: torch.load(output / f"{world}.pt") for world in WORLDS}


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("training", ["sft", "reward", "ppo"])
def test_any_number_of_ranks_and_any_zero_stage_gives_the_run_of_one(
    training: str, world: int, found: dict[int, dict[str, Any]]
):
    one = found[1][f"{training} 0"]
    for stage in STAGES[world][training]:
        other = found[world][f"{training} {stage}"]
        for mine, theirs in zip(one["metrics"], other["metrics"], strict=True):
            assert mine.get("data/fingerprint") == theirs.get("data/fingerprint"), stage
            assert mine.keys() == theirs.keys()
            for key in mine.keys() - {k for k in mine if k.startswith(("phase/", "perf/"))}:
                # Sums of another order: 2e-4 of a loss, at most.
                assert theirs[key] == pytest.approx(mine[key], rel=2e-4, abs=2e-5), (stage, key)
        assert one["weights"].keys() == other["weights"].keys()
        for key, weight in one["weights"].items():
            torch.testing.assert_close(other["weights"][key], weight, atol=2e-5, rtol=0)


def test_every_step_of_a_run_has_rows_of_its_own(found: dict[int, dict[str, Any]]):
    for training, steps in (("sft 0", 3), ("reward 0", 3), ("ppo 0", 2)):
        rows = [m["data/fingerprint"] for m in found[1][training]["metrics"][:steps]]
        assert len(set(rows)) == steps and all(0 <= n < 2**32 for n in rows)


# ---- the numbers themselves


def test_a_fingerprint_is_known_once_and_for_all():
    # blake2b of 64-bit little-endian integers, 4 bytes: from `b2sum -l 32`, read little-endian.
    assert fingerprint.of_row([]) == int.from_bytes(bytes.fromhex("1271cf25"), "little")
    assert fingerprint.of_row([1, 2]) != fingerprint.of_row([2, 1])
    one, other = fingerprint.of_row([1, 2]), fingerprint.of_row([3])
    assert fingerprint.of_batch([[1, 2], [3]]) == (one + other) % 2**32


def test_the_settings_number_tells_what_is_trained_and_not_how_it_is_shared_out():
    number = fingerprint.of_config(preset("toy"))
    how = {
        "actor_engine__zero_stage": 3,
        "actor_engine__offload_parameters": True,
        "critic_engine__gradient_checkpointing": True,
        "ppo__micro_batch_size": 8,
        "generation__slots": 8,
        "checkpoint__every_steps": 7,
    }
    assert fingerprint.of_config(preset("toy", **how)) == number
    for name, value in {
        "seed": 2,
        "actor_engine__dtype": "bf16",
        "ppo__kl__coef": 0.2,
        "ppo__minibatch_size": 16,
        "data__sources": [{"name": "toy_world", "weight": 2.0}],
    }.items():
        assert fingerprint.of_config(preset("toy", **{name: value})) != number, name
