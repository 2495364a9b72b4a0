"""How long the phases of a plan take: operations and bytes over what is reached of a GPU's rates.

An estimate to compare settings by: it counts no padding, no start of a kernel and no Python, and
every row is as long as it may be.

Shapes: P prompt, R response, T = P + R sequence tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_kit.config import EngineConfig
from rlhf_kit.hybrid_engine.device import DISK_RATE, HOST_RATE, REACHED, Device
from rlhf_kit.hybrid_engine.dry_run import Model
from rlhf_kit.hybrid_engine.memory import Plan

STEP_BYTES = 70
"""Read and written for a trained parameter by an optimiser step: its norm in fp64 18, a flat copy
4, cast 6, clipped 8, AdamW 28, cast back 6."""
HOST_STEP_BYTES = 120
"""The same by torch's AdamW on a CPU: some ten passes over fp32 tensors."""

Seconds = dict[tuple[str, str], float]


def seconds(plan: Plan, device: Device) -> Seconds:
    """By stage and name of a moment: of a step in SFT and reward, of an iteration in PPO."""
    clock, config = _Clock(plan, device), plan.config
    actor, critic = (plan.actor, config.actor_engine), (plan.critic, config.critic_engine)
    length = config.data.max_length
    rows, pairs = plan.local(config.sft.batch_size), plan.local(config.reward.batch_size)
    result: Seconds = {
        ("sft", "load"): plan.actor.bytes / DISK_RATE,
        ("sft", "train"): clock.train(*actor, rows, length, length, config.sft.micro_batch_size),
        ("sft", "step"): clock.step(*actor),
        ("reward", "load"): plan.critic.bytes / DISK_RATE,
        ("reward", "train"): clock.train(
            *critic, 2 * pairs, length, 0, 2 * config.reward.micro_batch_size
        ),
        ("reward", "step"): clock.step(*critic),
    }
    ppo, response = config.ppo, config.generation.max_new_tokens
    sequence = config.data.max_prompt_length + response
    rows = plan.local(ppo.batch_size)
    models = [plan.actor, plan.critic, plan.critic]  # ref, critic, reward model
    models += [plan.actor] if ppo.old_logprobs != "rollout" else []
    policy = clock.train(*actor, rows, sequence, response, ppo.micro_batch_size)
    if ppo.mixture.kind != "none":
        texts = plan.local(ppo.batch_size * ppo.mixture.batch_ratio)
        policy += clock.train(*actor, texts, length, length, ppo.micro_batch_size)
    value = clock.train(*critic, rows, sequence, 0, ppo.micro_batch_size)
    return result | {
        ("ppo", "load"): 2 * (plan.actor.bytes + plan.critic.bytes) / DISK_RATE,
        ("ppo", "generate"): clock.generate(rows),
        ("ppo", "score"): sum(clock.forward(m, rows, sequence, response) for m in models),
        ("ppo", "train critic"): ppo.epochs * value,
        ("ppo", "critic step"): plan.ppo.steps * clock.step(*critic),
        ("ppo", "train actor"): ppo.epochs * policy,
        ("ppo", "actor step"): plan.ppo.steps * clock.step(*actor),
    }


def operations(model: Model, rows: int, length: int) -> float:
    """Of a forward pass without the head: two a weight and token, and attention, half of it masked.

    Scores and weighted values are two products of T queries with T / 2 keys on average.
    """
    sizes, tokens = model.sizes, rows * length
    return 2 * (sizes.matrices + sizes.adapters) * tokens + 2 * sizes.queries * length * tokens


@dataclass(frozen=True)
class _Clock:
    plan: Plan
    device: Device

    @property
    def flops(self) -> float:
        return self.device.flops * 1e12 * REACHED["flops"]

    @property
    def bandwidth(self) -> float:
        return self.device.bandwidth * 1e9 * REACHED["bandwidth"]

    def others(self, size: float) -> float:
        """Seconds until a rank has what the others hold of `size` bytes that are shared out."""
        link = self.device.link * 1e9 * REACHED["link"]
        return size * (1 - 1 / self.plan.ranks) / link

    def forward(self, model: Model, rows: int, length: int, logits: int) -> float:
        head = 2 * model.sizes.head * rows * logits
        return (operations(model, rows, length) + head) / self.flops

    def train(
        self, model: Model, engine: EngineConfig, rows: int, length: int, logits: int, micro: int
    ) -> float:
        """Forward and backward passes; weights of other places are fetched meanwhile."""
        again = model.checkpointing
        grows = 1 if model.lora.rank else 2  # no gradients of frozen weights
        head = 2 * model.sizes.head * rows * logits * (2 + grows)  # logits are computed twice
        work = operations(model, rows, length) * (1 + again + grows) + head
        passes = -(-rows // micro)
        fetched = 0.0
        if engine.zero_stage == 3:
            fetched = self.others(model.bytes)
        if engine.offload_parameters:
            fetched = max(fetched, model.bytes / self.plan.ranks / HOST_RATE)
        # A sum over ranks travels twice: once to be added up, once back.
        summed = 2 * self.others(model.element_size * model.sizes.trained)
        sums = passes if engine.zero_stage >= 2 else 1
        return max(work / self.flops, (2 + again) * passes * fetched) + sums * summed

    def step(self, model: Model, engine: EngineConfig) -> float:
        mine = model.sizes.trained / self.plan.ranks
        published = self.others(model.element_size * model.sizes.trained)
        if engine.offload_optimizer:
            return mine * (HOST_STEP_BYTES + 2 * model.element_size) / HOST_RATE + published
        return mine * STEP_BYTES / self.bandwidth + published

    def generate(self, rows: int) -> float:
        """Prompts, then for every token of a response all weights and the cache of its rows."""
        config, model = self.plan.config, self.plan.actor
        prompt, response = config.data.max_prompt_length, config.generation.max_new_tokens
        slots = min(config.generation.slots, rows)
        sizes, parts = model.sizes, config.actor_engine.generation_tp
        cached = slots * (prompt + response / 2) * model.element_size * sizes.kv
        weights = sizes.matrices + sizes.adapters + sizes.head
        read = (model.element_size * weights / parts + cached) / self.bandwidth
        work = (operations(model, slots, 1) + 2 * sizes.head * slots) / self.flops
        gathered = self.others(model.bytes) if config.actor_engine.zero_stage == 3 else 0.0
        prefill = self.forward(model, rows, prompt, 1)
        return gathered + prefill + rows / slots * response * max(read, work)
