"""The flags that describe a run, of every command that takes them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from rlhf_kit.config import PRESETS, require
from rlhf_kit.parameters import yaml_value


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=PRESETS, help="the settings to start from")
    parser.add_argument("--actor-model", metavar="M", help="hub name or directory of the actor")
    parser.add_argument(
        "--reward-model",
        metavar="M",
        help="what the reward model starts from; default: the SFT model",
    )
    parser.add_argument(
        "--data",
        metavar="NAME[=WEIGHT]",
        action="append",
        default=[],
        help="a data source; repeat it for a blend",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="decides order, sampling and start")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="settings",
        help="any other setting, as in ppo.kl.coef=0.1; repeatable",
    )


def add_device(parser: argparse._ActionsContainer) -> None:
    """The GPU to plan for."""
    parser.add_argument(
        "--gpu", metavar="NAME", help="h200, h100, a100, a100-40, a6000, 4090 or 3090"
    )
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="of one GPU")


def changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """What they say about a configuration, as `config.override` takes it."""
    values: dict[str, Any] = {
        "actor_model": arguments.actor_model,
        "reward_model": arguments.reward_model,
        "seed": arguments.seed,
    }
    if arguments.data:
        values["data__sources"] = [_source(text) for text in arguments.data]
    values = {name: value for name, value in values.items() if value is not None}
    for setting in arguments.settings:
        name, equals, text = setting.partition("=")
        require(bool(name and equals), f"write --set name=value, not {setting!r}")
        key, value = name.replace(".", "__"), yaml_value(text)
        require(key not in values, f"{name} is set twice")
        require(value is not None, f"--set {name} needs a value; null cannot be set here")
        values[key] = value
    if arguments.reward_model is not None:
        values.setdefault("reward__init_from", "base")  # else the model named would go unread
    return values


def flag(key: str, value: Any) -> str:
    """The words of a change, as `changes` reads them."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    text = text.lower() if isinstance(value, bool) else text
    return f"--set {key.replace('__', '.')}={text}"


def flags(changes: Mapping[str, Any]) -> str:
    """The words of all of them."""
    return " ".join(flag(*change) for change in changes.items())


def _source(text: str) -> dict[str, Any]:
    """`name[=weight]` as the fields of a SourceConfig."""
    name, equals, weight = text.rpartition("=")
    if not equals:
        return {"name": text}
    try:
        return {"name": name, "weight": float(weight)}
    except ValueError:
        message = f"the weight of data source {name} must be a number, not {weight!r}"
        raise ValueError(message) from None
