"""A run's memory settings, chosen from its plan: room is used, and only what must be is given up.

The search starts where nothing is saved (`roomy`). While the run does not fit, it takes the
cheapest kind of choice that lowers what is needed. Then it takes back, from the dearest on, what
the later ones made unnecessary. What the user has set stands.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from rlhf_kit.choices import ENGINES, MICRO, Choice, applied, choices, setting
from rlhf_kit.config import MemoryConfig, RunConfig, override
from rlhf_kit.hybrid_engine.memory import Plan

SAVED = ("gradient_checkpointing", "offload_optimizer", "offload_parameters")


def roomy(config: RunConfig, ranks: int) -> dict[str, Any]:
    """The settings of a run that saves no memory, as far as they change no result."""
    batches = config.sft.batch_size, config.reward.batch_size, config.ppo.minibatch_size
    rows = [-(-rows // ranks) for rows in batches]
    return {
        **{f"{engine}__{field}": False for engine in ENGINES for field in SAVED},
        **{
            key: min(setting(config, key), 2)
            for key in (f"{engine}__zero_stage" for engine in ENGINES)
        },
        "memory__offload_idle": False,
        "memory__logprob_chunk": MemoryConfig().logprob_chunk,
        **dict(zip(MICRO, rows, strict=True)),
    }


@dataclass(frozen=True)
class Fitting:
    """Choices taken on the way from a roomy run to one that fits."""

    start: RunConfig
    memory: float
    """GiB of a GPU."""
    ranks: int
    fixed: Collection[str]
    """Settings that stand, by their keys in `config.override`."""
    taken: Mapping[int, Choice]
    """By their place in `choices.choices`, which is the order of cost."""

    @cached_property
    def config(self) -> RunConfig:
        changes: dict[str, Any] = {}
        for choice in self.taken.values():
            changes |= choice.changes
        return override(self.start, **changes)

    @cached_property
    def plan(self) -> Plan:
        return Plan.of(self.config, ranks=self.ranks)

    @property
    def fits(self) -> bool:
        return self.plan.fits(self.memory)

    def reasons(self) -> Iterator[tuple[Choice, Plan]]:
        """Each choice, with the plan of the run without it, which does not fit."""
        for place in sorted(self.taken):
            yield self.taken[place], self._without(place).plan

    def _with(self, place: int, choice: Choice) -> Fitting:
        earlier = self.taken[place].changes if place in self.taken else {}
        choice = replace(choice, changes={**earlier, **choice.changes})
        return replace(self, taken={**self.taken, place: choice})

    def _without(self, place: int) -> Fitting:
        return replace(self, taken={k: v for k, v in self.taken.items() if k != place})

    def _kinds(self) -> Iterator[tuple[int, list[Fitting]]]:
        """What could be taken next: of each kind, from the smallest change to the largest."""
        for place, kind in enumerate(choices(self.config, self.ranks)):
            left = [choice for each in kind if (choice := self._left(each)) is not None]
            further = [c for c in left if self._goes(applied(self.config, c.changes))]
            yield place, [self._with(place, choice) for choice in further]

    def _left(self, choice: Choice) -> Choice | None:
        """Of a choice, what no setting of the user's stands against."""
        free = {
            key: value
            for key, value in choice.changes.items()
            if not stands(key, self.fixed) or setting(self.config, key) == value
        }
        if len(free) < len(choice.changes) and choice.together:
            return None
        return replace(choice, changes=free)

    def _goes(self, config: RunConfig | None) -> bool:
        """Whether ranks can share a minibatch so; None is no change."""
        if config is None:
            return False
        share = config.ppo.minibatch_size // self.ranks
        by_tokens = config.ppo.micro_batch_tokens > 0
        return by_tokens or share % min(config.ppo.micro_batch_size, share) == 0

    def tightened(self) -> Fitting | None:
        """With the cheapest kind of choice that helps: enough of it, or all; None where none does.

        Of one that is not enough, the smallest change that lowers what is needed as far as any.
        """
        for _, kind in self._kinds():
            if enough := next((each for each in kind if each.fits), None):
                return enough
            best = min(kind, key=lambda each: each.plan.needed, default=self)
            if best.plan.needed < self.plan.needed:
                return best
        return None

    def loosened(self) -> Fitting:
        """Without the choices, or parts of them, that later ones made unnecessary."""
        found = self
        for place in sorted(self.taken, reverse=True):
            without = found._without(place)
            milder = next(kind for at, kind in without._kinds() if at == place)
            found = next((each for each in (without, *milder) if each.fits), found)
            for key in found.taken[place].changes if place in found.taken else ():
                found = found._eased(place, key, milder)
        return found

    def _eased(self, place: int, key: str, milder: Sequence[Fitting]) -> Fitting:
        """With one setting of a choice changed less than the others, or not, if that is enough."""
        choice = self.taken[place]
        if choice.together or len(choice.changes) == 1:
            return self
        rest = {k: v for k, v in choice.changes.items() if k != key}
        others = [each.taken[place].changes for each in milder]
        for less in ({}, *({key: other[key]} for other in others if key in other)):
            changes = replace(choice, changes={**rest, **less})
            eased = replace(self, taken={**self.taken, place: changes})
            if self._goes(eased.config) and eased.fits:
                return eased
        return self


def stands(key: str, fixed: Collection[str]) -> bool:
    """Whether the user has set it, alone or with all of its group."""
    return any(key == name or key.startswith(f"{name}__") for name in fixed)


def fit(config: RunConfig, memory: float, ranks: int, fixed: Collection[str]) -> Fitting:
    """Of the settings that fit into so many GiB those that cost least, or the closest to it."""
    free = {k: v for k, v in roomy(config, ranks).items() if not stands(k, fixed)}
    found = Fitting(override(config, **free), memory, ranks, fixed, {})
    while not found.fits:
        tighter = found.tightened()
        if tighter is None:
            return found
        found = tighter
    return found.loosened()
