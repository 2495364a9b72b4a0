"""The memory of every phase of a run before anything is allocated, and its time.

A `Moment` is the fullest one of a phase on one GPU, as a sum of named terms. What passes take comes
from `dry_run`; what DeepSpeed holds is counted here, from its code (0.19.8, runtime/zero). Lengths
are the longest that the settings allow, so shorter rows take less.

Shapes: P prompt, R response, T = P + R sequence tokens.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from rlhf_kit.config import EngineConfig, LoRAConfig, RunConfig
from rlhf_kit.deepspeed_config import REDUCE_BUCKET
from rlhf_kit.hybrid_engine.decode import PROMPT_TOKENS
from rlhf_kit.hybrid_engine.dry_run import Model, Pass, Sizes, read_config
from rlhf_kit.types import Stage

Role = Literal["actor", "critic"]
Terms = dict[str, int]
"""Bytes, by what takes them."""
GIB = 2**30
CONTEXT = int(0.5 * GIB)
"""What CUDA takes outside torch's allocator."""
NCCL = int(0.7 * GIB)
"""Its buffers, with more than one rank; outside the allocator too."""
FRAGMENTATION = 0.05
"""Memory that the allocator holds and cannot use, as a share of the peak."""
WORKSPACE = 2 * 32 * 2**20
"""cuBLAS's: 32 MiB on Hopper (aten/src/ATen/cuda/CublasHandlePool.cpp), for the thread of the
forward and that of the backward pass."""
SAMPLER = 24
"""Bytes a logit while sampling: fp32 logprobs and their exponentials, fp64 cumulative sums."""
FLAT_BUCKET = 500_000_000
"""Gradient elements that DeepSpeed flattens at once where it does not shard."""
ZERO_3_LIVE = 1_000_000_000
"""Elements that ZeRO-3 keeps gathered at most (stage3_max_live_parameters), and steps at once
(sub_group_size)."""


class EngineMemory(NamedTuple):
    """Bytes of one trained model on one GPU."""

    weights: int
    masters: int = 0
    """fp32 weights; none where the weights are fp32 and DeepSpeed does not shard."""
    moments: int = 0
    """AdamW's two, from its first step on."""
    buffers: int = 0
    """Of gradients, always there."""
    gradients: int = 0
    """Between two backward passes of a step."""
    arriving: int = 0
    """More than that while a backward pass runs."""
    gathered: int = 0
    """Weights that ZeRO-3 has put together for a pass."""
    first_step: int = 0
    """Gradients, their copies and the moments at the fullest moment of the first step."""
    step: int = 0
    """The same of every later one."""
    loading: int = 0
    """Besides the weights, while DeepSpeed takes them over."""
    host: int = 0
    """In the memory of the host."""


def engine_memory(
    sizes: Sizes, engine: EngineConfig, ranks: int, *, accumulates: bool
) -> EngineMemory:
    """What DeepSpeed and AdamW keep; `accumulates` where a step has several backward passes."""
    b = 4 if engine.dtype == "fp32" else 2
    stage = max(engine.zero_stage, 1) if engine.dtype == "bf16" else engine.zero_stage
    trained, weights, bucket = sizes.trained, b * sizes.total, b * REDUCE_BUCKET
    mine, matrices = math.ceil(trained / ranks), math.ceil(sizes.trained_matrices / ranks)
    if stage == 0:  # AdamW on the weights themselves; gradients are flattened to be reduced
        flat = 4 * min(trained, FLAT_BUCKET)
        return EngineMemory(
            weights,
            moments=8 * trained,
            gradients=4 * trained,
            first_step=4 * trained + max(flat, 8 * trained),
            step=(4 + 8) * trained + flat,
        )
    held = EngineMemory(weights, masters=4 * mine, moments=8 * mine)
    own = b * mine  # its gradients
    # What does not fit into the bucket is reduced alone; either is copied for it.
    copied = b * max(min(REDUCE_BUCKET, trained), sizes.largest)
    if stage == 3:
        # Biases and norms stay whole.
        whole, share = b * sizes.vectors, -(-weights // ranks)
        held = held._replace(
            weights=whole + (0 if engine.offload_parameters else share),
            buffers=bucket + own,
            gathered=b * min(sizes.total, ZERO_3_LIVE),
            loading=max(weights, 8 * mine),
        )
        flattened, waiting = min(mine, ZERO_3_LIVE), 0
    else:
        # ZeRO-1 makes its bucket early. ZeRO-2 gathers each backward pass in a new set before it
        # is added to the first.
        held = held._replace(
            gradients=b * trained + bucket if stage == 1 else own,
            arriving=bucket + copied + own * accumulates if stage == 2 else 0,
            loading=max(b * trained, 8 * mine),
        )
        flattened, waiting = matrices, own
    if engine.offload_optimizer:
        # Gradients leave as they come, in ZeRO-1 at the step, through a buffer for the largest.
        gradients = held.gradients if stage == 1 else 0
        step = gradients + (b + 8) * sizes.largest
        return held._replace(
            masters=0,
            moments=0,
            buffers=bucket if stage == 3 else b * sizes.largest,
            gradients=gradients,
            arriving=bucket + copied if stage == 2 else 0,
            first_step=step,
            step=step,
            loading=weights if stage == 3 else b * trained,
            host=(16 + b + b * accumulates + b * engine.offload_parameters) * mine,
        )
    # Groups of parameters one after the other: flattened, cast to fp32, stepped. The first has
    # all matrices; the gradients that it came from are freed with the last.
    cast = (b + (4 if b == 2 else 0)) * flattened
    norm = 8 * min(sizes.largest, mine)  # in fp64, of one parameter after the other
    reducing = held.gradients + copied if stage == 1 else 0
    before = waiting + max(cast, norm, reducing)
    first = max(before, waiting + (4 + 8) * flattened)
    return held._replace(first_step=first, step=held.moments + before)


class Moment(NamedTuple):
    """The fullest one of a phase, or of a part of it, on one GPU."""

    stage: Stage
    phase: str
    """As `metrics.Phases` calls it, or `load`."""
    name: str
    terms: Terms

    @property
    def peak(self) -> int:
        """Bytes, as `torch.cuda.max_memory_allocated` counts them."""
        return sum(self.terms.values()) + WORKSPACE


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
        return [*self._sft(), *self._reward(), *self._ppo()]

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
        return max(math.ceil(rows / self.ranks), 1)

    def engine(self, role: Role, *, accumulates: bool) -> EngineMemory:
        model, engine = self.actor, self.config.actor_engine
        if role == "critic":
            model, engine = self.critic, self.config.critic_engine
        return engine_memory(model.sizes, engine, self.ranks, accumulates=accumulates)

    def _sft(self) -> Iterator[Moment]:
        config = self.config.sft
        local = self.local(config.batch_size)
        rows = min(config.micro_batch_size, local)
        run = self.actor.text(rows, self.config.data.max_length, self.config.memory.logprob_chunk)
        engine = self.engine("actor", accumulates=local > rows)
        yield from self._alone("sft", "actor", engine, run)

    def _reward(self) -> Iterator[Moment]:
        config = self.config.reward
        local = self.local(config.batch_size)
        pairs = min(config.micro_batch_size, local)
        run = self.critic.pairs(pairs, self.config.data.max_length)
        engine = self.engine("critic", accumulates=local > pairs)
        yield from self._alone("reward", "reward model", engine, run)

    def _alone(self, stage: Stage, name: str, engine: EngineMemory, run: Pass) -> Iterator[Moment]:
        """A stage that trains one model."""
        held = _held(name, engine, moments=not self.first)
        yield Moment(stage, "load", "load", _loading(name, engine))
        yield Moment(stage, "train", "train", held | _training(name, engine, run))
        yield Moment(stage, "train", "step", held | _stepping(name, engine, self.first))

    def _ppo(self) -> Iterator[Moment]:
        config, prompt = self.config.ppo, self.config.data.max_prompt_length
        response, chunk = self.config.generation.max_new_tokens, self.config.memory.logprob_chunk
        minibatch, steps = self.local(config.minibatch_size), self.steps
        micro = min(config.micro_batch_size, minibatch)
        texts = 0
        if config.mixture.kind != "none":
            texts = min(micro, self.local(config.minibatch_size * config.mixture.batch_ratio))
        actor = self.engine("actor", accumulates=minibatch > micro or texts > 0)
        critic = self.engine("critic", accumulates=minibatch > micro)
        learns = not (self.first and config.critic_warmup_iterations)

        def held(moments: bool) -> Terms:
            both = _held("critic", critic, moments) | _held("actor", actor, moments and learns)
            return both | self._frozen()

        def moment(phase: str, name: str, *terms: Terms) -> Moment:
            return Moment("ppo", phase, name, functools.reduce(operator.or_, terms))

        begun = held(moments=not self.first)
        actors = _held("actor", actor, moments=False)
        yield moment("load", "load", actors, self._frozen(), _loading("critic", critic))
        yield moment("generate", "generate", begun, self._generating(actor))
        yield moment("score", "score", begun, self._scoring(micro, actor, critic))
        # AdamW's moments come with its first step, and remain.
        single = self.first and steps == 1
        begun = held(moments=not single)
        waiting = {"actor gradients": actor.gradients * (learns and minibatch > micro)}
        value = self.critic.value(micro, prompt, response)
        yield moment("train", "train critic", begun, waiting, _training("critic", critic, value))
        waiting = {"actor gradients": actor.gradients * learns}
        yield moment("train", "critic step", begun, waiting, _stepping("critic", critic, single))
        if learns:
            passes = [self.actor.policy(micro, prompt, response, chunk)]
            if texts:
                passes.append(self.actor.text(texts, self.config.data.max_length, chunk))
            waiting = {"critic gradients": critic.gradients}
            policy = max(passes, key=lambda run: run.peak)
            yield moment("train", "train actor", begun, waiting, _training("actor", actor, policy))
            begun |= _held("critic", critic, moments=True)
            yield moment("train", "actor step", begun, _stepping("actor", actor, single))

    @property
    def steps(self) -> int:
        """Optimiser steps of a PPO iteration."""
        ppo = self.config.ppo
        return ppo.epochs * ppo.batch_size // ppo.minibatch_size

    def _frozen(self) -> Terms:
        """In PPO: what no step changes, and the average."""
        actor, reward = (replace(m, lora=LoRAConfig()) for m in (self.actor, self.critic))
        averaged = self.actor.sizes.trained
        if self.config.actor_engine.zero_stage == 3:
            averaged = self.local(averaged)
        held_out = self.config.monitor.reward_model is not None  # taken to be as large
        return {
            "ref": 0 if self.actor.lora.rank else actor.bytes,
            "reward model": reward.bytes,
            "held-out reward model": reward.bytes * held_out,
            "EMA": 4 * averaged * self.config.ppo.ema.enabled,
        }

    def _generating(self, actor: EngineMemory) -> Terms:
        """The KV cache, and a pass over as many prompts as go into one at a time."""
        generation, prompt = self.config.generation, self.config.data.max_prompt_length
        rows, sizes = self.local(self.config.ppo.batch_size), self.actor.sizes
        slots = min(generation.slots, rows)
        together = min(slots, max(PROMPT_TOKENS // prompt, 1))
        run = self.actor.prompts(together, prompt)
        whole = self.config.actor_engine.zero_stage == 3
        return {
            "KV cache": self.kv_bytes * slots * (prompt + generation.max_new_tokens),
            "gathered actor": self.actor.bytes * whole,
            "activations": max(run.peak, SAMPLER * sizes.vocabulary * slots),
        }

    def _scoring(self, micro: int, actor: EngineMemory, critic: EngineMemory) -> Terms:
        prompt, response = self.config.data.max_prompt_length, self.config.generation.max_new_tokens
        rows, length = self.local(self.config.ppo.batch_size), prompt + response
        chunk = self.config.memory.logprob_chunk
        passes = (
            self.critic.values(rows, length),  # the reward model reads all rows at once
            self.critic.values(micro, length),
            self.actor.logprobs(micro, prompt, response, chunk),
        )
        return {
            "gathered weights": max(actor.gathered, critic.gathered),
            "activations": max(run.peak for run in passes),
        }

    @property
    def kv_bytes(self) -> int:
        """Keys and values of a token."""
        return self.actor.element_size * self.actor.sizes.kv

    @property
    def host_bytes(self) -> int:
        """In the memory of the host, for each of its GPUs, while PPO runs."""
        roles: tuple[Role, ...] = ("actor", "critic")
        return sum(self.engine(role, accumulates=True).host for role in roles)


def _model(name: str, engine: EngineConfig, *, scorer: bool) -> Model:
    settings = read_config(name).to_json_string(use_diff=False)
    return Model(settings, scorer, engine.dtype, engine.lora, engine.gradient_checkpointing)


def _held(name: str, engine: EngineMemory, moments: bool) -> Terms:
    return {
        name: engine.weights,
        f"{name} fp32 masters": engine.masters,
        f"{name} AdamW moments": engine.moments * moments,
        f"{name} gradient buffers": engine.buffers,
    }


def _loading(name: str, engine: EngineMemory) -> Terms:
    return {name: engine.weights, f"{name}, taken over": engine.loading}


def _training(name: str, engine: EngineMemory, run: Pass) -> Terms:
    return {
        f"{name} gradients": engine.gradients,
        "gradients on their way": engine.arriving,
        "gathered weights": engine.gathered,
        "activations": run.kept,
        "temporaries": run.peak - run.kept,
    }


def _stepping(name: str, engine: EngineMemory, first: bool) -> Terms:
    """Gradients and what AdamW's step makes of them."""
    taken = engine.first_step if first else engine.step - engine.moments
    return {f"{name} gradients and copies": taken}
