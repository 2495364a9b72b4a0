"""What can be done where a run does not fit into memory: choices, each tried by planning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from typing import Any

from rlhf_kit.config import RunConfig, override
from rlhf_kit.hybrid_engine.memory import Plan

LORA_RANK = 64
LORA_RATE = 10
"""Adapters learn best at about ten times the rate of full fine-tuning (Schulman et al. 2025,
'LoRA without regret')."""
FEWEST_LOGITS = 128
FEWEST_SLOTS = 8
ENGINES = ("actor_engine", "critic_engine")
MICRO = ("sft__micro_batch_size", "reward__micro_batch_size", "ppo__micro_batch_size")
RATES = ("sft__optimizer__learning_rate", "ppo__actor_optimizer__learning_rate")


@dataclass(frozen=True)
class Choice:
    """Settings, as `config.override` takes them, and what they cost."""

    changes: Mapping[str, Any]
    price: str
    together: bool = False
    """Whether its settings are of use only all together."""


def setting(config: RunConfig, key: str) -> Any:
    """The value under a key of `config.override`."""
    return reduce(getitem, key.split("__"), config.to_dict())


def choices(config: RunConfig, ranks: int) -> Iterator[list[Choice]]:
    """From what costs least; alternatives of one kind from the smallest change to the largest.

    A kind keeps its place: it is empty where it is not for this run.
    """
    yield _halved(config, ["memory__logprob_chunk"], FEWEST_LOGITS, "hardly anything")
    yield _halved(config, ["generation__slots"], FEWEST_SLOTS, "generating takes longer")
    yield _halved(config, MICRO, 1, "smaller matrix products take longer in all")
    yield _engines(config, "gradient_checkpointing", True, "training takes a third longer")
    unmerged = Choice({"actor_engine__lora__merge": False}, "generating takes longer")
    yield [unmerged] if config.actor_engine.lora.rank else []
    yield [Choice({"memory__offload_idle": True}, "copies to and from the host, each iteration")]
    yield [zero_3(config)] if ranks > 1 else []
    adapters = [] if config.actor_engine.lora.rank else [lora(config)]
    yield [*adapters, shared_base(config)]
    yield _engines(config, "offload_optimizer", True, "AdamW steps on the CPU: some seconds each")
    yield [Choice({"ppo__ema__enabled": False}, "no average of the actor is exported")]


def lora(config: RunConfig) -> Choice:
    rates = {key: LORA_RATE * setting(config, key) for key in RATES}
    return Choice(
        {"actor_engine__lora__rank": LORA_RANK, **rates},
        f"adapters train instead of all weights, at {LORA_RATE} times the rate",
        together=True,
    )


def shared_base(config: RunConfig) -> Choice:
    """Adapters for all four roles; the reward model then is one of the SFT model's too."""
    rank = config.actor_engine.lora.rank or LORA_RANK
    base = {} if config.actor_engine.lora.rank else lora(config).changes
    changes = {
        **base,
        "critic_engine__lora__rank": config.critic_engine.lora.rank or rank,
        "reward__init_from": "sft",
        "memory__shared_base": True,
    }
    price = "the reward model is an adapter of the SFT model, as large as the actor"
    return Choice(changes, price, together=True)


def zero_3(config: RunConfig) -> Choice:
    changes: dict[str, Any] = {f"{engine}__zero_stage": 3 for engine in ENGINES}
    if config.ppo.mixture.kind == "grad_norm_ratio":
        changes["ppo__mixture__kind"] = "none"  # it needs whole gradients
    return Choice(changes, "weights travel between GPUs for every pass", together=True)


def that_fit(config: RunConfig, memory: float, ranks: int) -> list[Choice]:
    """Of each kind the smallest change that alone makes the run fit into so many GiB."""
    found = []
    for kind in choices(config, ranks):
        changed = [(choice, other) for choice in kind if (other := applied(config, choice.changes))]
        # Where the largest change is not enough, none is.
        if changed and Plan.of(changed[-1][1], ranks=ranks).fits(memory):
            fits = (c for c, other in changed if Plan.of(other, ranks=ranks).fits(memory))
            found.append(next(fits))
    return found


def applied(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig | None:
    """The configuration with these changes; None where they do not go together, or are none."""
    try:
        changed = override(config, **changes)
    except ValueError:
        return None
    return None if changed == config else changed


def _halved(config: RunConfig, keys: Sequence[str], least: int, price: str) -> list[Choice]:
    values = {key: setting(config, key) for key in keys}
    found = []
    while max(values.values()) > least:
        values = {key: max(value // 2, least) for key, value in values.items()}
        changed = {k: v for k, v in values.items() if v < setting(config, k)}
        found.append(Choice(changed, price))
    return found


def _engines(config: RunConfig, field: str, value: Any, price: str) -> list[Choice]:
    """The actor's engine, or both."""
    names = [f"{engine}__{field}" for engine in ENGINES]
    names = [name for name in names if setting(config, name) != value]
    return [Choice(dict.fromkeys(names[: n + 1], value), price) for n in range(len(names))]
