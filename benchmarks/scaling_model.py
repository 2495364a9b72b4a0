"""A PPO step on paper: operations and bytes against rates and links, from one GPU to 64.

The work is the announcement's of DeepSpeed Chat: OPT actors with a 350M critic and reward model,
prompts and responses of 256 tokens, 1,024 pairs an iteration, 131.9k pairs in all, adapters (LoRA)
trained with gradient checkpointing, weights sharded by ZeRO-3, generation on weights gathered into
tensor-parallel groups. Nothing is measured here but what ASSUMED says.

    python benchmarks/scaling_model.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass

PAIRS, BATCH, PROMPT, RESPONSE = 131_900, 1_024, 256, 256
MICRO = 16
"""Rows a forward pass of one GPU, as in the published 13B recipe."""
CRITIC = 0.35e9
ASSUMED = {
    "matrix products reach, of the peak": 0.5,
    "decoding reaches, of the memory bandwidth": 0.7,
    "links reach, of their rate": 0.8,
}
COMPUTE, MEMORY, LINKS = ASSUMED.values()
ALL_REDUCE = 20e-6
"""Seconds of latency of a small all-reduce inside a host."""


@dataclass(frozen=True)
class GPU:
    """One GPU: vendors' figures, per second."""

    name: str
    memory: float
    """Bytes."""
    flops: float
    """Dense bf16."""
    bandwidth: float
    """Bytes of memory read."""
    nvlink: float
    """Bytes to other GPUs of its host, one way."""
    network: float
    """Bytes to other hosts: its share of the host's adapters, one way."""


@dataclass(frozen=True)
class Actor:
    """A decoder with full multi-head attention."""

    name: str
    parameters: float
    layers: int
    hidden: int
    group: int
    """GPUs that generate together, each with a part of every weight."""

    @property
    def kv_bytes(self) -> float:
        """Keys and values of one token, bf16."""
        return 2 * self.layers * self.hidden * 2


A100_40 = GPU("A100-40G", 40e9, 312e12, 1.555e12, 300e9, 25e9)
A100 = GPU("A100-80G", 80e9, 312e12, 2.039e12, 300e9, 25e9)
H200 = GPU("H200", 141e9, 989e12, 4.8e12, 450e9, 50e9)
OPT_13B = Actor("13B", 13e9, 40, 5120, 2)
OPT_66B = Actor("66B", 66e9, 64, 9216, 8)


@dataclass(frozen=True)
class Step:
    """Seconds of one iteration, by what they go into."""

    gather: float
    """Weights of all shards into the groups that generate."""
    generate: float
    score: float
    train: float
    rows: int
    """Rows that a group decodes at once."""

    @property
    def seconds(self) -> float:
        return self.gather + self.generate + self.score + self.train

    @property
    def hours(self) -> float:
        """All pairs, once."""
        return PAIRS / BATCH * self.seconds / 3600


def step(actor: Actor, gpu: GPU, count: int) -> Step | None:
    """One iteration on `count` GPUs, eight a host; None where the weights leave no room."""
    weights, tokens = 2 * actor.parameters, PROMPT + RESPONSE
    group = min(actor.group, count)
    link = (gpu.nvlink if count <= 8 else gpu.network) * LINKS
    flops = gpu.flops * COMPUTE

    # Actor and ref are sharded over all, the gathered copy over the group, the small ones whole.
    resident = 2 * weights / count + weights / group + 3 * 2 * CRITIC + 4e9
    room = (0.95 * gpu.memory - resident) * group
    rows_here = math.ceil(BATCH * group / count)
    rows = min(rows_here, int(room / (tokens * actor.kv_bytes)))
    if rows < 1:
        return None

    gather = weights * (1 - group / count) / group / link
    read = weights + rows * (PROMPT + RESPONSE / 2) * actor.kv_bytes
    decode = max(
        read / group / (gpu.bandwidth * MEMORY), 2 * actor.parameters * rows / group / flops
    )
    if group > 1:  # two sums a layer
        decode += actor.layers * 2 * (ALL_REDUCE + rows * actor.hidden * 2 / (gpu.nvlink * LINKS))
    waves = rows_here / rows
    prefill = 2 * actor.parameters * PROMPT * rows_here / group / flops
    generate = waves * RESPONSE * decode + prefill

    # Each pass fetches the shards of all others; what is fetched hides behind what is computed.
    mine = BATCH / count
    passes = math.ceil(mine / MICRO)
    fetch = weights * (1 - 1 / count) / link
    forward = 2 * tokens * mine / flops

    def overlapped(compute: float, fetches: int) -> float:
        return max(compute, passes * fetches * fetch)

    small = 4 * forward * CRITIC  # reward model and critic score, the critic trains
    score = overlapped(forward * actor.parameters, 1) + forward * CRITIC * 2
    # Forward, again for the checkpoints, and the gradient of activations; adapters cost little.
    train = overlapped(3 * forward * actor.parameters, 2) + small
    return Step(gather, generate, score, train, rows)


ANNOUNCED = (
    (OPT_13B, A100_40, 8, 10.8),
    (OPT_13B, A100, 8, 9.0),
    (OPT_66B, A100, 8, 50.4),
    (OPT_13B, A100, 64, 1.25),
    (OPT_66B, A100, 64, 7.5),
)
"""Actor, GPU, how many, hours of step 3."""


def tables() -> str:
    lines = [
        "| actor | GPUs | announced | on paper | announced / paper |",
        "|---|---|---|---|---|",
    ]
    for actor, gpu, count, hours in ANNOUNCED:
        found = step(actor, gpu, count)
        assert found is not None
        lines.append(
            f"| {actor.name} | {count} {gpu.name} | {hours:g} h | {found.hours:.2g} h | "
            f"{hours / found.hours:.1f} |"
        )
    head = "| actor | GPUs | rows a group | gather | generate | score | train | seconds | "
    lines += ["", head + "pairs/s a GPU | hours | of 8 GPUs' speed |", "|---" * 11 + "|"]
    for actor in (OPT_13B, OPT_66B):
        for gpu in (A100, H200):
            eight = step(actor, gpu, 8)
            assert eight is not None
            for count in (1, 8, 16, 32, 64):
                found = step(actor, gpu, count)
                if found is None:
                    lines.append(f"| {actor.name} | {count} {gpu.name} | no room" + " |" * 9)
                    continue
                speed = BATCH / found.seconds / count
                parts = (found.gather, found.generate, found.score, found.train, found.seconds)
                share = eight.seconds * 8 / (found.seconds * count)
                lines.append(
                    f"| {actor.name} | {count} {gpu.name} | {found.rows} | "
                    + " | ".join(f"{part:.1f}" for part in parts)
                    + f" | {speed:.2f} | {found.hours:.2g} | {share:.0%} |"
                )
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
