"""Stopped and resumed is the same as never stopped, under every ZeRO stage and rank count.

Two ranks run this file as a program, through torchrun.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import prompt_rows, small_tokenizer, tiny_model
from torch import Tensor

from rlhf_kit import distributed
from rlhf_kit.config import (
    DataConfig,
    EMAConfig,
    EngineConfig,
    FaultConfig,
    LoRAConfig,
    OptimizerConfig,
    SFTConfig,
    preset,
)
from rlhf_kit.ema import EMA
from rlhf_kit.faults import RolledBack, TrainingStopped
from rlhf_kit.hybrid_engine.training import TrainingEngine
from rlhf_kit.models import add_lora
from rlhf_kit.ppo import PPOTrainer
from rlhf_kit.rlhf_engine import RLHFEngine
from rlhf_kit.rollout import PromptLoader
from rlhf_kit.sft import SFTTrainer
from rlhf_kit.tokenization import Encoded, as_text, encode_demonstrations, load_tokenizer
from rlhf_kit.training_state import Fragment, State
from rlhf_kit.types import PromptBatch

# Adam divides by the gradient's size: with a small eps it would turn the rounding of tiny
# gradients, which differs between numbers of ranks, into steps of their own.
OPTIMIZER = OptimizerConfig(
    learning_rate=3e-3,
    eps=1e-3,
    schedule="linear",
    warmup_ratio=0.2,
    weight_decay=0.1,
    max_grad_norm=0.5,
)
HALF = 3


@dataclass
class Whole:
    """A `Stored` in memory, made of all ranks' fragments of one tensor."""

    fragments: list[Fragment]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.fragments[0].shape

    def read(self, start: int, length: int) -> Tensor:
        found = torch.full((length,), float("nan"))
        for fragment in self.fragments:
            first = max(start, fragment.start)
            last = min(start + length, fragment.start + len(fragment.data))
            if first < last:
                assert found[first - start : last - start].isnan().all(), "saved twice"
                found[first - start : last - start] = fragment.data[
                    first - fragment.start : last - fragment.start
                ]
        assert not found.isnan().any(), "not saved"
        return found


def copied(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, Fragment):
        return Fragment(state.data.cpu().clone(), state.start, state.shape)
    return state.cpu().clone() if isinstance(state, Tensor) else state


def saved(state: State) -> list[State]:
    """The states of all ranks, on all ranks, as they are now."""
    return distributed.gather_objects(copied(state))


def restored(states: Sequence[Any]) -> Any:
    """What this rank gets back: as training_state.py says."""
    main = states[0]
    if isinstance(main, dict):
        keys = {key: None for state in states for key in state}
        return {key: restored([state[key] for state in states if key in state]) for key in keys}
    if isinstance(main, Fragment):
        return Whole(list(states))
    if isinstance(main, Tensor):
        return states[distributed.rank()] if len(states) == distributed.world_size() else None
    return main


def leaves(states: Sequence[Any], path: str = "") -> dict[str, Any]:
    """Path -> whole tensor or plain value of the states of all ranks."""
    if isinstance(states[0], dict):
        keys = {key: None for state in states for key in state}
        return {
            name: value
            for key in keys
            for name, value in leaves(
                [state[key] for state in states if key in state], f"{path}/{key}"
            ).items()
        }
    if isinstance(states[0], Fragment):
        whole = Whole(list(states))
        return {path: whole.read(0, torch.Size(whole.shape).numel())}
    return {path: states[0]}


def assert_same(one: Sequence[State], other: Sequence[State]) -> None:
    """All ranks' states are equal to the last bit."""
    ones, others = leaves(one), leaves(other)
    assert ones.keys() == others.keys()
    for name, value in ones.items():
        if name.startswith("/phases"):
            continue  # seconds
        same = torch.equal(value, others[name]) if torch.is_tensor(value) else value == others[name]
        assert same, name


@dataclass
class Run:
    """An SFT run on tiny models, with an average."""

    trainer: SFTTrainer
    ema: EMA
    rows: Sequence[Encoded]

    @classmethod
    def start(cls, *, lora: int = 0, seed: int = 0, **engine: Any) -> Run:
        """Tiny models with adapters of rank `lora`; another `seed` starts at other weights."""
        tokenizer: Any = small_tokenizer()
        config = EngineConfig(lora=LoRAConfig(rank=lora), **engine)
        model = tiny_model("llama", tokenizer, eos_scale=1.0)
        if config.dtype == "bf16":
            model = model.bfloat16()
        torch.manual_seed(7 + seed)
        if lora:
            add_lora(model, config.lora)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.02 * torch.randn_like(parameter)
        trainer = SFTTrainer(
            TrainingEngine(model, config, OPTIMIZER, total_steps=2 * HALF),
            SFTConfig(micro_batch_size=2),
            pad_token_id=tokenizer.pad_token_id,
        )
        rows = encode_demonstrations(tokenizer, prompt_rows(16), DataConfig()).rows
        return cls(trainer, EMA(trainer.engine.module, EMAConfig(decay=0.9)), rows)

    def train(self, steps: int) -> list[dict[str, float]]:
        history = []
        for _ in range(steps):
            first = 2 * self.trainer.engine.steps_done
            metrics = self.trainer.step(self.rows[first : first + 4])
            history.append({**metrics, "ema/decay": self.ema.update()})
        return history

    def state(self) -> State:
        return {"sft": self.trainer.state(), "ema": self.ema.state()}

    def load_state(self, state: State) -> None:
        self.trainer.load_state(state["sft"])
        self.ema.load_state(state["ema"])

    def weights(self) -> dict[str, Tensor]:
        """The trained weights that the next forward reads."""
        import deepspeed

        named = list(self.trainer.engine.module.named_parameters())
        with deepspeed.zero.GatheredParameters([p for _, p in named]):
            return {n: p.detach().clone() for n, p in named if p.requires_grad}


CASES: list[dict[str, Any]] = [
    {"zero_stage": stage, "dtype": dtype, "lora": lora}
    for stage in (0, 1, 2, 3)
    for dtype in ("fp32", "bf16")
    for lora in (0, 4)
]
CASES += [
    {"zero_stage": 2, "dtype": "bf16", "offload_optimizer": True},
    {"zero_stage": 3, "dtype": "fp32", "offload_optimizer": True, "offload_parameters": True},
]


def halves(case: dict[str, Any]) -> tuple[list[State], list[dict[str, float]]]:
    """Stops a run halfway and resumes it; returns the state there and the second half's metrics."""
    straight = Run.start(**case)
    first = straight.train(HALF)
    middle = saved(straight.state())
    second = straight.train(HALF)

    resumed = Run.start(**case, seed=1)
    assert not torch.equal(*(next(iter(run.weights().values())) for run in (straight, resumed)))
    resumed.load_state(restored(middle))
    assert_same(middle, saved(resumed.state()))
    masters = leaves(middle)
    for name, weight in resumed.weights().items():
        master = masters[f"/sft/engine/weights/{name}"]
        assert torch.equal(weight.cpu().flatten(), master.to(weight.dtype)), name
    assert resumed.train(HALF) == second != first
    assert_same(saved(straight.state()), saved(resumed.state()))
    for one, other in zip(straight.weights().values(), resumed.weights().values(), strict=True):
        assert torch.equal(one, other)

    # Rolled back, after a backward pass without a step.
    trainer = straight.trainer
    trainer._backward(trainer._texts(straight.rows[:4], 2), tokens=9.0)
    straight.load_state(restored(middle))
    assert straight.train(HALF) == second
    return middle, second


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_a_run_stopped_halfway_goes_on_to_the_last_bit(case: dict[str, Any]):
    halves(case)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_state_from_before_the_first_step_is_complete_and_disturbs_nothing(stage: int):
    straight = Run.start(zero_stage=stage)
    expected = straight.train(HALF)
    watched = Run.start(zero_stage=stage)
    first = saved(watched.state())
    resumed = Run.start(zero_stage=stage, seed=1)
    resumed.load_state(restored(first))
    assert watched.train(HALF) == resumed.train(HALF) == expected


@pytest.mark.parametrize(("ours", "theirs"), [(0, 4), (4, 0), (4, 2)])
def test_a_state_of_other_trained_weights_is_refused_and_nothing_changes(ours: int, theirs: int):
    run = Run.start(lora=ours)
    before = saved(run.state())
    with pytest.raises(ValueError, match="trained weights are not this model's.*LoRA settings"):
        run.load_state(restored(saved(Run.start(lora=theirs).state())))
    assert_same(before, saved(run.state()))


def test_sizes_that_memory_has_lowered_stay_low_after_a_resume_and_after_a_roll_back():
    before, low = Run.start(), Run.start()
    low.trainer.steps.micro_batch_size = 1
    resumed = Run.start()
    resumed.load_state(restored(saved(low.state())))
    assert resumed.trainer.steps.micro_batch_size == 1 < before.trainer.steps.micro_batch_size
    low.load_state(restored(saved(before.state())))
    assert low.trainer.steps.micro_batch_size == 1


def test_a_roll_back_counts_although_the_checkpoint_has_counted_none():
    run = Run.start()
    start, faults = saved(run.state()), run.trainer.faults

    def roll_back() -> int:
        run.load_state(restored(start))
        return 0

    faults.roll_back, faults.config = roll_back, FaultConfig(roll_backs=2)
    for _ in range(2):
        with pytest.raises(RolledBack):
            faults.act("kl", "roll_back", "the KL is large", "lower it")
    with pytest.raises(TrainingStopped, match="again"):
        faults.act("kl", "roll_back", "the KL is large", "lower it")
    resumed = Run.start()
    resumed.load_state(restored(saved(run.state())))
    assert resumed.trainer.faults.rolled_back == 2


# PPO ----------------------------------------------------------------------------------------


def ppo(actor: str, reward: str, **changes: Any) -> tuple[PPOTrainer, list[PromptBatch]]:
    """A trainer in which all that can change changes, and the prompts of four iterations."""
    values = {
        "actor_model": actor,
        "reward_model": reward,
        "generation__max_new_tokens": 8,
        "ppo__batch_size": 8,
        "ppo__minibatch_size": 4,
        "ppo__micro_batch_size": 2,
        "ppo__iterations": 4,
        "ppo__critic_warmup_iterations": 1,
        "ppo__kl__kind": "adaptive",
        "ppo__actor_optimizer__learning_rate": 1e-3,
        "ppo__mixture__kind": "grad_norm_ratio",
        "ppo__mixture__batch_ratio": 1.0,
    }
    args = preset("toy", **{**values, **changes})
    tokenizer: Any = load_tokenizer(actor)
    engine = RLHFEngine(
        actor_model_name_or_path=actor,
        critic_model_name_or_path=reward,
        tokenizer=tokenizer,
        num_total_iters=4,
        args=args,
    )
    texts = as_text(encode_demonstrations(tokenizer, prompt_rows(16), DataConfig()).rows)
    trainer = PPOTrainer(engine=engine, args=args, mixture_rows=texts)
    loader = PromptLoader(tokenizer, prompt_rows(16), batch_size=8, iterations=4, seed=1)
    return trainer, list(loader)


def no_times(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if not k.startswith(("phase/", "perf/"))}


def learn(trainer: PPOTrainer, prompts: PromptBatch) -> dict[str, float]:
    return trainer.step(trainer.generate_experience(prompts))


def ppo_halves(actor: str, reward: str, **changes: Any) -> tuple[list[State], dict[str, float]]:
    """Stops between the third rollout and its step; returns the state there, and its metrics."""
    straight, prompts = ppo(actor, reward, **changes)
    for batch in prompts[:2]:
        learn(straight, batch)
    experience = straight.generate_experience(prompts[2])
    middle = saved(straight.state())
    third, fourth = straight.step(experience), learn(straight, prompts[3])

    resumed, _ = ppo(actor, reward, **changes)
    resumed.load_state(restored(middle))
    assert resumed.phases.state() == middle[0]["phases"]
    # A look at other prompts, as a notebook takes before its loop, does not lose the rollout.
    look = resumed.generate_experience(prompts[0])
    assert torch.equal(look.sequences[:, : prompts[0].input_ids.shape[1]], prompts[0].input_ids)
    with patch.object(resumed.engine.actor, "generate", side_effect=AssertionError("sampled")):
        again = resumed.generate_experience(prompts[2])
    for name, tensor in vars(experience).items():
        assert torch.equal(tensor, getattr(again, name)), name
    rollout = resumed.last_rollout
    assert rollout is not None and rollout.prompts.dialogues == prompts[2].dialogues
    assert torch.equal(rollout.sequences, again.sequences)
    step = resumed.step(again)
    assert no_times(step) == no_times(third) and step.keys() == third.keys()
    assert no_times(learn(resumed, prompts[3])) == no_times(fourth) != no_times(third)
    assert_same(saved(straight.state()), saved(resumed.state()))
    return middle, third


PPO_CASES: list[dict[str, Any]] = [
    {"actor_engine__zero_stage": 0, "critic_engine__zero_stage": 2},
    {
        "actor_engine__zero_stage": 3,
        "critic_engine__zero_stage": 3,
        "actor_engine__lora__rank": 4,
        "critic_engine__lora__rank": 4,
        "ppo__mixture__kind": "coef",
    },
]


@pytest.mark.parametrize("case", PPO_CASES, ids=["plain", "zero3-lora"])
def test_ppo_stopped_between_rollout_and_step_goes_on_to_the_last_bit(
    case: dict[str, Any], model_dir: Callable[..., str], reward_dir: str
):
    middle, _ = ppo_halves(model_dir(), reward_dir, **case)
    state = middle[0]
    assert state["iteration"] == 2 and state["mixture"]["steps"] == 2
    assert state["kl_coef"] != preset("toy").ppo.kl.coef
    assert state["ema"]["updates"] == 2


def test_ppo_stopped_after_a_step_samples_the_next_rollout(
    model_dir: Callable[..., str], reward_dir: str
):
    straight, prompts = ppo(model_dir(), reward_dir)
    learn(straight, prompts[0])
    straight.micro_batch_size, straight.faults.rolled_back = 1, 1
    straight.generation = dataclasses.replace(straight.generation, slots=3)
    state = straight.state()
    assert state["rollout"] is None
    assert set(state["phases"]["totals"]) == {"generate", "score", "train"}
    resumed, _ = ppo(model_dir(), reward_dir)
    resumed.load_state(restored(saved(state)))
    assert resumed.phases.to_dict() == straight.phases.to_dict()
    assert resumed.generation == straight.generation
    assert (resumed.micro_batch_size, resumed.faults.rolled_back) == (1, 1)
    assert no_times(learn(resumed, prompts[1])) == no_times(learn(straight, prompts[1]))


def test_ppo_with_an_average_needs_a_state_with_one(model_dir: Callable[..., str], reward_dir: str):
    with_average, _ = ppo(model_dir(), reward_dir)
    without, _ = ppo(model_dir(), reward_dir, ppo__ema__enabled=False)
    with pytest.raises(ValueError, match="the checkpoint holds no ema"):
        with_average.load_state(restored(saved(without.state())))


# Two ranks ----------------------------------------------------------------------------------

TWO_RANKS = [case for case in CASES if case["zero_stage"] != 1 and case.get("lora") != 4]
MOVES = [(1, 0, 2, 3), (1, 2, 2, 2), (2, 2, 2, 3), (2, 3, 1, 0), (2, 2, 1, 1), (2, 0, 1, 3)]
"""(ranks, stage) where a run is stopped, (ranks, stage) where it goes on."""


def on_disk(directory: Path, ranks: int, stage: int) -> Path:
    return directory / f"{ranks}-{stage}.pt"


def stopped(directory: Path, stage: int) -> None:
    """Half a run in fp32 on as many ranks as there are; rank 0 writes its state."""
    run = Run.start(zero_stage=stage)
    run.train(HALF)
    middle = saved(run.state())
    if distributed.is_main_rank():
        torch.save(middle, on_disk(directory, distributed.world_size(), stage))
    distributed.barrier()


def gone_on(directory: Path, move: tuple[int, int, int, int]) -> list[dict[str, float]]:
    """The second half of a run, from a state on disk."""
    run = Run.start(zero_stage=move[3], seed=1)
    run.load_state(restored(torch.load(on_disk(directory, *move[:2]), weights_only=False)))
    return run.train(HALF)


def two_ranks(directory: Path, actor: str, reward: str) -> None:
    """What every rank of the torchrun program does."""
    for case in TWO_RANKS:
        halves(case)
    for stage in (0, 2, 3):
        stopped(directory, stage)
    found: dict[str, Any] = {
        "moves": {move: gone_on(directory, move) for move in MOVES if move[2] == 2}
    }
    stages = {"actor_engine__zero_stage": 2, "critic_engine__zero_stage": 3}
    found["ppo"] = ppo_halves(actor, reward, **stages)
    if distributed.is_main_rank():
        torch.save(found, directory / "found.pt")
    distributed.barrier()


@pytest.fixture(scope="module")
def found(
    model_dir: Callable[..., str], reward_dir: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What two ranks found, after one rank had stopped its runs; and the directory of states."""
    directory = tmp_path_factory.mktemp("two-ranks")
    for stage in (0, 2):
        stopped(directory, stage)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", __file__, str(directory), model_dir(), reward_dir]
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    return {"directory": directory, **torch.load(directory / "found.pt", weights_only=False)}


def test_two_ranks_go_on_to_the_last_bit_and_other_ranks_and_stages_to_the_same_losses(
    found: dict[str, Any],
):
    straight = Run.start()
    straight.train(HALF)
    expected = straight.train(HALF)
    for move in MOVES:
        history = found["moves"].get(move) or gone_on(found["directory"], move)
        for metrics, right in zip(history, expected, strict=True):
            assert metrics == pytest.approx(right, rel=1e-5), move


def test_ppo_of_two_ranks_goes_on_on_one_and_samples_again(
    found: dict[str, Any], model_dir: Callable[..., str], reward_dir: str
):
    middle, expected = found["ppo"]
    trainer, prompts = ppo(model_dir(), reward_dir)
    trainer.load_state(restored(middle))
    metrics = learn(trainer, prompts[2])
    assert trainer.iteration == 3
    assert no_times(metrics) == pytest.approx(no_times(expected), rel=2e-3, abs=2e-5)


if __name__ == "__main__":
    two_ranks(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
