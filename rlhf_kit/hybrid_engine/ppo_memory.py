"""The memory of a PPO iteration: four models, two optimisers and the average, and where they are.

Shapes: P prompt, R response, T = P + R sequence tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace

from rlhf_kit.config import LoRAConfig, RunConfig
from rlhf_kit.hybrid_engine.decode import PROMPT_TOKENS, ROOM
from rlhf_kit.hybrid_engine.dry_run import Model
from rlhf_kit.hybrid_engine.engine_memory import EngineMemory, engine_memory
from rlhf_kit.hybrid_engine.moments import (
    Moment,
    Terms,
    adamw,
    gradients,
    held,
    loading,
    masters,
    share,
    stepping,
    training,
)

FROZEN = {"ref", "reward model", "held-out reward model"}
MOMENTS = {adamw("actor"), adamw("critic")}
STATES = {*MOMENTS, masters("actor"), masters("critic"), "EMA"}


@dataclass(frozen=True)
class PPOMemory:
    """Of one GPU of `ranks`."""

    config: RunConfig
    actor: Model
    critic: Model
    ranks: int
    first: bool
    """Of the first iteration alone."""

    def moments(self) -> Iterator[Moment]:
        """In the order of an iteration."""
        idle = self.config.memory.offload_idle
        new = MOMENTS if self.first else set()
        loaded = loading("critic", self._critic_engine)
        yield self._moment("load", "load", MOMENTS | {masters("critic")}, loaded)
        away = new | (FROZEN | STATES | {"critic"} if idle else set())
        yield self._moment("generate", "generate", away, self._cache, self._generating())
        yield max(self._scoring(away), key=lambda moment: moment.peak)

        # AdamW's moments come with its first step and stay. What waits elsewhere comes with a
        # step of its engine, and stays for the iteration.
        single = self.steps == 1
        away = (new if single else set()) | (FROZEN if idle else set())
        away |= STATES if idle and single else set()
        learns = not (self.first and self.config.ppo.critic_warmup_iterations)
        yield from self._training(away if learns else away | {adamw("actor")}, learns)

    @property
    def steps(self) -> int:
        """Optimiser steps of an iteration."""
        ppo = self.config.ppo
        return ppo.epochs * ppo.batch_size // ppo.minibatch_size

    @property
    def host_bytes(self) -> int:
        """In the memory of the host: what is offloaded, and what waits there now and then."""
        waiting = sum(self._resident.get(name, 0) for name in FROZEN | STATES | {"critic"})
        engines = self._actor_engine.host + self._critic_engine.host
        return engines + waiting * self.config.memory.offload_idle

    # ---- the phases

    def _moment(self, phase: str, name: str, away: Set[str], *terms: Terms) -> Moment:
        there = {key: size for key, size in self._resident.items() if key not in away}
        if self.config.actor_engine.keep_cache:
            there |= self._cache
        for more in terms:
            there |= more
        return Moment("ppo", phase, name, there)

    def _generating(self) -> Terms:
        """A pass over as many prompts as go into one at a time, or a step of all slots."""
        sizes, b = self.actor.sizes, self.actor.element_size
        together = min(self._slots, max(PROMPT_TOKENS // self._prompt, 1))
        whole = self.config.actor_engine.zero_stage == 3 and self._tp == 1
        return {
            "gathered actor": self.actor.bytes * whole,
            "activations": max(
                self.actor.prompts(together, self._prompt).peak,
                b * sizes.vocabulary * self._slots,
            ),
        }

    def _scoring(self, away: Set[str]) -> Iterator[Moment]:
        """One model after the other; of those that wait elsewhere, the one that is asked."""
        lengths = (self._prompt, self._response)
        logprobs = self.actor.logprobs(self._micro, *lengths, self._chunk).peak
        values = self.critic.values(self._micro, sum(lengths)).peak
        gathered = {"actor": self._actor_engine.gathered, "critic": self._critic_engine.gathered}
        asked = {"actor": set(), "ref": {"ref"}, "critic": {"critic"}}
        asked["reward model"] = FROZEN - {"ref"} | {"critic"}
        for name, there in asked.items():
            peak = logprobs if name in ("actor", "ref") else values
            passing = {"gathered weights": gathered.get(name, 0), "activations": peak}
            yield self._moment("score", "score", away - there, passing)

    def _training(self, away: Set[str], learns: bool) -> Iterator[Moment]:
        """Micro-batches pass through critic and actor in turn; then the two step."""
        actor, critic = self._actor_engine, self._critic_engine
        lengths, several = (self._prompt, self._response), self._minibatch > self._micro
        first = self.first and self.steps == 1
        of_actor = {gradients("actor"): actor.gradients * learns}
        of_critic = {gradients("critic"): critic.gradients}
        value = training("critic", critic, self.critic.value(self._micro, *lengths))
        before = of_actor if several else {}
        yield self._moment("train", "train critic", away, before, value)
        if learns:
            passes = [self.actor.policy(self._micro, *lengths, self._chunk)]
            if self._texts:
                length = self.config.data.max_length
                passes.append(self.actor.text(self._texts, length, self._chunk))
            policy = training("actor", actor, max(passes, key=lambda run: run.peak))
            yield self._moment("train", "train actor", away, of_critic, policy)
        away = away - {masters("critic")} - (set() if first else {adamw("critic")})
        step = stepping("critic", critic, first=first)
        yield self._moment("train", "critic step", away, of_actor, step)
        if learns:
            away = away - {adamw("critic"), masters("actor")}
            away -= set() if first else {adamw("actor")}
            step = stepping("actor", actor, first=first)
            yield self._moment("train", "actor step", away, step)

    # ---- what there is

    @functools.cached_property
    def _resident(self) -> Terms:
        """From the first iteration's end on."""
        plain, reward = (replace(m, lora=LoRAConfig()) for m in (self.actor, self.critic))
        found = held("actor", self._actor_engine) | held("critic", self._critic_engine)
        if self.config.memory.shared_base:
            found |= {"base": plain.bytes, "reward model": self._critic_engine.weights}
        else:
            found |= {"ref": 0 if self.actor.lora.rank else plain.bytes}
            found |= {"reward model": reward.bytes}
        if self.config.monitor.reward_model is not None:  # taken to be as large
            found |= {"held-out reward model": reward.bytes}
        averaged = self.actor.sizes.trained
        if self.config.actor_engine.zero_stage == 3:
            averaged = share(averaged, self.ranks)
        return found | {"EMA": 4 * averaged * self.config.ppo.ema.enabled}

    @functools.cached_property
    def _cache(self) -> Terms:
        """What generation keeps from call to call, or for one."""
        engine, sizes = self.config.actor_engine, self.actor.sizes
        tokens = -(-(self._prompt + self._response) // ROOM) * ROOM
        merges = engine.lora.rank and engine.lora.merge and engine.zero_stage < 3 and self._tp == 1
        return {
            "KV cache": self.actor.element_size * sizes.kv * self._slots * tokens,
            "merged adapters": self.actor.element_size * sizes.matrices * bool(merges),
            "part of the actor": self.actor.bytes // self._tp * (self._tp > 1),
        }

    @functools.cached_property
    def _actor_engine(self) -> EngineMemory:
        several = self._minibatch > self._micro or self._texts > 0
        return self._engine("actor", several)

    @functools.cached_property
    def _critic_engine(self) -> EngineMemory:
        return self._engine("critic", self._minibatch > self._micro)

    def _engine(self, role: str, accumulates: bool) -> EngineMemory:
        model: Model = getattr(self, role)
        engine = getattr(self.config, f"{role}_engine")
        found = engine_memory(model.sizes, engine, self.ranks, accumulates=accumulates)
        if self.config.memory.shared_base:  # then it holds what it trains, and borrows the base
            own = model.element_size * model.sizes.trained
            found = found._replace(weights=found.weights - model.bytes + own)
        return found

    # ---- sizes of passes

    @property
    def _prompt(self) -> int:
        return self.config.data.max_prompt_length

    @property
    def _response(self) -> int:
        return self.config.generation.max_new_tokens

    @property
    def _chunk(self) -> int:
        return self.config.memory.logprob_chunk

    @property
    def _tp(self) -> int:
        return self.config.actor_engine.generation_tp

    @property
    def _slots(self) -> int:
        return min(self.config.generation.slots, share(self.config.ppo.batch_size, self.ranks))

    @property
    def _minibatch(self) -> int:
        return share(self.config.ppo.minibatch_size, self.ranks)

    @property
    def _micro(self) -> int:
        return min(self._rows(self._prompt + self._response), self._minibatch)

    @property
    def _texts(self) -> int:
        """Rows of text in a micro-batch of the mixture loss."""
        ppo = self.config.ppo
        if ppo.mixture.kind == "none":
            return 0
        texts = share(ppo.minibatch_size * ppo.mixture.batch_ratio, self.ranks)
        return min(self._rows(self.config.data.max_length), texts)

    def _rows(self, length: int) -> int:
        """Of so many tokens each, in a micro-batch."""
        tokens = self.config.ppo.micro_batch_tokens
        return max(tokens // length, 1) if tokens else self.config.ppo.micro_batch_size
