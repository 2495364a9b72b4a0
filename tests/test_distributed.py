"""Ranks, seeds and reductions in one process; and PPO on two ranks against one.

Two ranks run this file as a program, through torchrun.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import copied, prompt_rows

from rlhf_kit import distributed
from rlhf_kit.config import DataConfig, RunConfig, override, preset
from rlhf_kit.hybrid_engine.partitions import gathered
from rlhf_kit.ppo import PPOTrainer
from rlhf_kit.rlhf_engine import RLHFEngine
from rlhf_kit.rollout import PromptLoader
from rlhf_kit.tokenization import as_text, encode_demonstrations, load_tokenizer

CASES: dict[str, dict[str, Any]] = {
    "zero0": {},
    "zero2": {"actor_engine__zero_stage": 2, "critic_engine__zero_stage": 1},
    "zero3": {
        "actor_engine__zero_stage": 3,
        "critic_engine__zero_stage": 3,
        "ppo__mixture__kind": "coef",
        "ppo__mixture__ptx_coef": 0.1,
    },
    "zero3-tp2": {
        "actor_engine__zero_stage": 3,
        "actor_engine__generation_tp": 2,
        "ppo__mixture__kind": "none",
    },
}


def test_one_process_needs_no_ranks():
    x = torch.tensor([1.0, 2.0])
    assert distributed.all_sum(x) is x and distributed.all_max(x) is x
    assert distributed.world_size() == 1 and distributed.is_main_rank()
    assert distributed.gather_objects({"a": 1}) == [{"a": 1}]
    assert distributed.all_any(True) and not distributed.all_any(False)
    distributed.barrier()


def test_seeds_depend_on_every_part_and_on_nothing_else():
    seeds = {distributed.derive_seed("x", i, j) for i in range(20) for j in range(20)}
    assert len(seeds) == 400 and all(0 <= seed < 2**63 for seed in seeds)
    # Known once, the same on every machine and in every process.
    assert distributed.derive_seed("x", 1) == distributed.derive_seed("x", 1)
    assert distributed.derive_seed("x", 1) != distributed.derive_seed("x", "1")


def test_seeding_makes_initialisation_repeat():
    drawn = []
    for _ in range(2):
        distributed.seed_everything(5)
        drawn.append((random.random(), torch.rand(3).tolist()))
    assert drawn[0] == drawn[1]


def test_ranks_share_a_batch_without_gap_or_overlap(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(distributed.micro_batches(range(12), 3))
    assert [[len(part) for part in share] for share in shares] == [[3, 1]] * 3
    assert sorted(x for share in shares for part in share for x in part) == list(range(12))
    with pytest.raises(ValueError, match="11 rows can't be shared evenly by 3 ranks"):
        distributed.micro_batches(range(11), 3)


def test_only_the_main_rank_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    distributed.print_main("one", 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    distributed.print_main("three")
    assert capsys.readouterr().out == "one 2\n"


# PPO on two ranks ---------------------------------------------------------------------------


def settings(actor: str, reward: str, case: str) -> RunConfig:
    values = {
        "actor_model": actor,
        "reward_model": reward,
        "generation__max_new_tokens": 8,
        "ppo__batch_size": 8,
        "ppo__minibatch_size": 8,
        "ppo__micro_batch_size": 2,
        "ppo__iterations": 2,
        "ppo__critic_warmup_iterations": 0,
        "ppo__max_approx_kl": 0.0,
        "ppo__actor_optimizer__learning_rate": 1e-4,
        **CASES[case],
    }
    return preset("toy", **values)


def ppo(actor: str, reward: str, case: str) -> dict[str, Any]:
    """Two iterations; the metrics, and the weights of actor and critic."""
    args = settings(actor, reward, case)
    if distributed.world_size() == 1:
        args = override(args, actor_engine__generation_tp=1)
    tokenizer = load_tokenizer(actor)
    engine = RLHFEngine(
        actor_model_name_or_path=actor,
        critic_model_name_or_path=reward,
        tokenizer=tokenizer,
        num_total_iters=2,
        args=args,
    )
    texts = as_text(encode_demonstrations(tokenizer, prompt_rows(16), DataConfig()).rows)
    trainer = PPOTrainer(engine=engine, args=args, mixture_rows=texts)
    loader = PromptLoader(tokenizer, prompt_rows(16), batch_size=8, iterations=2, seed=1)
    metrics = [trainer.step(trainer.generate_experience(prompts)) for prompts in loader]
    models = []
    for module in (engine.actor.module, engine.critic.module):
        with gathered(module.parameters()):
            models.append(copied(module))
    tokens = {name: phase["tokens"] for name, phase in trainer.phases.to_dict().items()}
    return {"metrics": metrics, "models": models, "tokens": tokens}


def test_two_ranks_do_ppo_as_one_does(
    model_dir: Callable[..., str], reward_dir: str, tmp_path: Path
):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", __file__, model_dir(), reward_dir, str(tmp_path)]
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    for case in CASES:
        one, two = ppo(model_dir(), reward_dir, case), torch.load(tmp_path / f"{case}.pt")
        assert one["tokens"] == two["tokens"]
        for mine, theirs in zip(one["metrics"], two["metrics"], strict=True):
            assert mine.keys() == theirs.keys()
            for key in mine.keys() - {k for k in mine if k.startswith(("phase/", "perf/"))}:
                assert theirs[key] == pytest.approx(mine[key], rel=2e-3, abs=2e-5), (case, key)
        for mine, theirs in zip(one["models"], two["models"], strict=True):
            for key in mine:  # two steps of 1e-4 and 5e-4: a few percent of one
                torch.testing.assert_close(theirs[key], mine[key], atol=5e-5, rtol=0)


if __name__ == "__main__":
    for name in CASES:
        found = ppo(sys.argv[1], sys.argv[2], name)
        if distributed.is_main_rank():
            torch.save(found, Path(sys.argv[3]) / f"{name}.pt")
    distributed.barrier()
