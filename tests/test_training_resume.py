"""Stopped and resumed is the same as never stopped, under every ZeRO stage and rank count.

Two ranks run this file as a program, through torchrun.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import prompt_rows, small_tokenizer, tiny_model
from torch import Tensor

from rlhf_kit import distributed
from rlhf_kit.config import (
    DataConfig,
    EMAConfig,
    EngineConfig,
    LoRAConfig,
    OptimizerConfig,
    SFTConfig,
)
from rlhf_kit.ema import EMA
from rlhf_kit.hybrid_engine.training import TrainingEngine
from rlhf_kit.models import add_lora
from rlhf_kit.sft import SFTTrainer
from rlhf_kit.tokenization import Encoded, encode_demonstrations
from rlhf_kit.training_state import Fragment, State

OPTIMIZER = OptimizerConfig(
    learning_rate=3e-3, schedule="linear", warmup_ratio=0.2, weight_decay=0.1, max_grad_norm=0.5
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
        same = torch.equal(value, others[name]) if torch.is_tensor(value) else value == others[name]
        assert same, name


@dataclass
class Run:
    """An SFT run on tiny models, with an average."""

    trainer: SFTTrainer
    ema: EMA
    rows: list[Encoded]

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


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_a_run_stopped_halfway_goes_on_to_the_last_bit(case: dict[str, Any]):
    straight = Run.start(**case)
    first = straight.train(HALF)
    middle = saved(straight.state())
    second = straight.train(HALF)

    resumed = Run.start(**case, seed=1)
    assert not torch.equal(*(next(iter(run.weights().values())) for run in (straight, resumed)))
    resumed.load_state(restored(middle))
    assert_same(middle, saved(resumed.state()))
    assert resumed.train(HALF) == second != first
    assert_same(saved(straight.state()), saved(resumed.state()))
