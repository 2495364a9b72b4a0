"""The memory of every phase of a run, before anything is allocated.

A `Moment` is the fullest one of a phase on one GPU, as a sum of named terms. What passes take comes
from `dry_run`, what DeepSpeed holds from `engine_memory`. Lengths are the longest that the settings
allow, so shorter rows take less.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from rlhf_kit.config import EngineConfig, RunConfig
from rlhf_kit.hybrid_engine.dry_run import Model, Pass, read_config
from rlhf_kit.hybrid_engine.engine_memory import engine_memory
from rlhf_kit.hybrid_engine.moments import Moment, held, loading, share, stepping, training
from rlhf_kit.hybrid_engine.ppo_memory import PPOMemory
from rlhf_kit.types import Stage

GIB = 2**30
CONTEXT = int(0.5 * GIB)
"""What CUDA takes outside torch's allocator."""
NCCL = int(0.7 * GIB)
"""Its buffers, with more than one rank; outside the allocator too."""
FRAGMENTATION = 0.05
"""Memory that the allocator holds and cannot use, as a share of the peak."""


@dataclass(frozen=True)
class Plan:
    """What a run on `ranks` GPUs takes of each of them."""

    config: RunConfig
    actor: Model
    critic: Model
    """The reward model is of the same architecture."""
    ranks: int = 1
    first: bool = False
    """Of the first step or iteration alone: AdamW's moments come with its first step, and nothing
    of the actor is trained while the critic warms up."""

    @classmethod
    def of(cls, config: RunConfig, *, ranks: int = 1, first: bool = False) -> Plan:
        """From the settings of a run; reads the configurations of its models, and no weights."""
        scorer = config.actor_model if config.reward.init_from == "sft" else config.reward_model
        actor = _model(config.actor_model, config.actor_engine, scorer=False)
        return cls(config, actor, _model(scorer, config.critic_engine, scorer=True), ranks, first)

    @functools.cached_property
    def moments(self) -> list[Moment]:
        """Of all stages, in the order of a run."""
        return [*self._sft(), *self._reward(), *self.ppo.moments()]

    @property
    def ppo(self) -> PPOMemory:
        return PPOMemory(self.config, self.actor, self.critic, self.ranks, self.first)

    @property
    def fullest(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.peak)

    @property
    def needed(self) -> int:
        """Bytes that a GPU must have: the allocator loses some, and is not alone."""
        allocated = int(self.fullest.peak * (1 + FRAGMENTATION))
        return allocated + CONTEXT + NCCL * (self.ranks > 1)

    def fits(self, memory: float) -> bool:
        """Whether every moment finds room in a GPU of so many GiB."""
        return self.needed <= memory * GIB

    def peaks(self, stage: Stage) -> dict[str, int]:
        """Bytes at the fullest moment of each phase, by its name in `metrics.Phases`."""
        moments = [moment for moment in self.moments if moment.stage == stage]
        return {
            phase: max(m.peak for m in moments if m.phase == phase)
            for phase in dict.fromkeys(m.phase for m in moments)
        }

    def local(self, rows: float) -> int:
        """Of so many rows, those of one rank."""
        return share(rows, self.ranks)

    def _sft(self) -> Iterator[Moment]:
        config, length = self.config.sft, self.config.data.max_length
        rows = min(config.micro_batch_size, self.local(config.batch_size))
        run = self.actor.text(rows, length, self.config.memory.logprob_chunk)
        several = self.local(config.batch_size) > rows
        yield from self._alone("sft", self.actor, self.config.actor_engine, run, several)

    def _reward(self) -> Iterator[Moment]:
        config, length = self.config.reward, self.config.data.max_length
        pairs = min(config.micro_batch_size, self.local(config.batch_size))
        run = self.critic.pairs(pairs, length)
        several = self.local(config.batch_size) > pairs
        yield from self._alone("reward", self.critic, self.config.critic_engine, run, several)

    def _alone(
        self, stage: Stage, model: Model, engine: EngineConfig, run: Pass, several: bool
    ) -> Iterator[Moment]:
        """A stage that trains one model."""
        name = "actor" if stage == "sft" else "reward model"
        found = engine_memory(model.sizes, engine, self.ranks, accumulates=several)
        there = held(name, found._replace(moments=0) if self.first else found)
        yield Moment(stage, "load", "load", loading(name, found))
        yield Moment(stage, "train", "train", there | training(name, found, run))
        yield Moment(stage, "train", "step", there | stepping(name, found, first=self.first))


def _model(name: str, engine: EngineConfig, *, scorer: bool) -> Model:
    settings = read_config(name).to_json_string(use_diff=False)
    return Model(settings, scorer, engine.dtype, engine.lora, engine.gradient_checkpointing)
