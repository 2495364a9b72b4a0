"""Four roles on one frozen base: actor, critic and reward model are adapters, the ref is none.

Shapes: B batch, T sequence tokens.

The base is the actor's start, the SFT model. The reward model was trained as an adapter of the
same weights, with a score head; the critic begins as a copy of both. So four models take the
memory of one, and what is trained are some millions of numbers.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf_kit.adapters import (
    LORA,
    Adapter,
    AdapterSwitch,
    base_checksum,
    load_into,
    read_adapter,
)
from rlhf_kit.config import LoRAConfig, RunConfig, require
from rlhf_kit.models import ValueModel, add_lora, resolve_model, saved_normalisation
from rlhf_kit.trust import check_model_directory


class _Borrower(nn.Module):
    """A module that computes with another one and does not count it among its parts."""

    def __init__(self, model: Any):
        super().__init__()
        self._borrowed = (model,)  # torch takes no tuple for a part

    @property
    def whole(self) -> Any:
        """What is borrowed, whole."""
        return self._borrowed[0]

    def train(self, mode: bool = True) -> _Borrower:
        self.whole.train(mode)
        return super().train(mode)

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        """For the model, and so for all that share it."""
        self.whole.gradient_checkpointing_enable(**settings)


class Role(_Borrower):
    """One model of several on a base: it holds the parameters it trains, and borrows the rest.

    DeepSpeed, which handles all that a module holds, so never meets the base or another role's
    adapter. The parameters keep the names they have in the whole.
    """

    def __init__(
        self,
        model: nn.Module,
        switch: AdapterSwitch,
        adapter: str,
        held: Mapping[str, nn.Parameter],
    ):
        """`model` computes, with `adapter` in use; `held` by names."""
        super().__init__(model)
        self._switch = switch
        self._adapter = adapter
        for name, parameter in held.items():
            *path, leaf = name.split(".")
            place: nn.Module = self
            for part in path:
                if part not in place._modules:
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            place.register_parameter(leaf, parameter)

    def chosen(self) -> contextlib.AbstractContextManager[None]:
        """Inside, this role's adapter computes; gradient checkpointing needs it in backward."""
        return self._switch.chosen(self._adapter)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.chosen():
            return self.whole(*args, **kwargs)


class _Scorer(_Borrower):
    """A score head of its own over a causal LM's base, in the form `ValueModel` reads."""

    def __init__(self, model: Any, score: nn.Linear):
        super().__init__(model)
        self.score = score

    @property
    def base_model(self) -> Any:
        return self.whole.base_model


@dataclass(frozen=True)
class SharedBase:
    """The three roles, and the switch whose `chosen(None)` is the ref."""

    actor: Role
    critic: Role
    reward: Role
    switch: AdapterSwitch
    score_mean: float
    score_std: float


def share_base(model: Any, reward_directory: str, args: RunConfig) -> SharedBase:
    """Put the adapters of all roles into `model`, a causal LM, in place, and freeze it.

    ValueError where the reward model has no adapter, or one of another base or shape.
    """
    from transformers import AutoConfig

    path = Path(resolve_model(reward_directory))
    if path.is_dir():
        check_model_directory(path, verify=True)
    adapter = read_adapter(path)
    require(
        adapter is not None,
        f"memory.shared_base needs a reward model that was trained as an adapter of the actor's "
        f"base, and {reward_directory} has none; train it with critic_engine.lora.rank, or turn "
        "memory.shared_base off",
    )
    assert adapter is not None
    require(
        adapter.base == base_checksum(model),
        f"the reward model in {reward_directory} is an adapter of other weights (or of another "
        f"dtype) than {args.actor_model}, the actor's; train it from these, or turn "
        "memory.shared_base off",
    )
    lora = args.critic_engine.lora
    require(
        (lora.rank, lora.alpha) == (adapter.rank, adapter.alpha),
        f"critic_engine.lora has rank {lora.rank} and alpha {lora.alpha}, and the reward model in "
        f"{reward_directory} {adapter.rank} and {adapter.alpha}; set critic_engine.lora to these",
    )
    mean, std = saved_normalisation(AutoConfig.from_pretrained(path, local_files_only=True))
    return with_roles(model, adapter, args, where=reward_directory, mean=mean, std=std)


def with_roles(
    model: Any, adapter: Adapter, args: RunConfig, *, where: str, mean: float, std: float
) -> SharedBase:
    """The roles on `model`; `adapter` is the reward model's and, as a copy, the critic's.

    `mean` and `std` are the reward model's normalisation, `where` is its name in a ValueError.
    """
    with warnings.catch_warnings():  # peft warns of a second adapter, which is the point here
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        add_lora(model, args.actor_engine.lora, name="actor")
        for name in ("critic", "reward"):
            add_lora(model, _like(adapter), name=name)
            load_into(model, adapter, name, where=where)
    switch = AdapterSwitch(model, resting="actor")
    dtype = next(model.base_model.parameters()).dtype
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if found := LORA.search(name):
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(found[2] != "reward")
    critic = ValueModel(_Scorer(model, _head(adapter, dtype)), mean=mean, std=std)
    reward = ValueModel(_Scorer(model, _head(adapter, dtype))).requires_grad_(False)
    trained = _adapter_of(model, "critic") | dict(critic.named_parameters())
    return SharedBase(
        actor=Role(model, switch, "actor", _adapter_of(model, "actor")),
        critic=Role(critic, switch, "critic", trained),
        reward=Role(reward, switch, "reward", dict(reward.named_parameters())),
        switch=switch,
        score_mean=mean,
        score_std=std,
    )


def _like(adapter: Adapter) -> LoRAConfig:
    return LoRAConfig(adapter.rank, adapter.alpha, 0.0, ",".join(adapter.target_modules))


def _head(adapter: Adapter, dtype: torch.dtype) -> nn.Linear:
    weight = adapter.head["weight"]
    head = nn.Linear(weight.shape[1], 1, bias="bias" in adapter.head, dtype=dtype)
    head.load_state_dict(adapter.head)
    return head


def _adapter_of(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    return {
        key: parameter
        for key, parameter in model.named_parameters()
        if (found := LORA.search(key)) and found[2] == name
    }
