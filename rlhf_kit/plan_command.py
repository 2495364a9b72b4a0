"""The command `rlhf-kit plan`: memory and time of a run before it is started."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rlhf_kit import run_flags
from rlhf_kit.config import preset, require

if TYPE_CHECKING:
    from rlhf_kit.hybrid_engine.device import Device
    from rlhf_kit.hybrid_engine.memory import Plan

TERMS = 6
"""Of the fullest moment, the largest that are shown."""


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    parser = command("plan", plan, "memory and time of every phase, before a run is started")
    run_flags.add(parser)
    run_flags.add_device(parser)
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="in all; default: 1")


def plan(arguments: argparse.Namespace) -> int:
    from rlhf_kit.choices import that_fit
    from rlhf_kit.hybrid_engine.device import device
    from rlhf_kit.hybrid_engine.memory import Plan

    ranks = arguments.num_gpus
    require(ranks >= 1, f"--num-gpus must be 1 or more, not {ranks}")
    config = preset(arguments.preset or "consumer", **run_flags.changes(arguments))
    gpu = device(arguments.gpu, arguments.gpu_memory)
    found = Plan.of(config, ranks=ranks)
    lines = [*_models(found), *_table(found, gpu), *_fullest(found), verdict(found, gpu)]
    print("\n".join(lines), flush=True)
    if not found.fits(gpu.memory):
        choices = that_fit(config, gpu.memory, ranks)
        print("any one of these makes it fit:" if choices else "no single choice makes it fit")
        for choice in choices:
            print(f"  {run_flags.flags(choice.changes)}    # {choice.price}")
    return 0


def _models(plan: Plan) -> Iterator[str]:
    models = {"actor": plan.actor}
    models["reward model and critic"] = plan.critic
    for name, model in models.items():
        sizes = model.sizes
        yield f"{name}: {sizes.total:,} parameters, {sizes.trained:,} of them trained"


def _table(plan: Plan, gpu: Device) -> Iterator[str]:
    from rlhf_kit.hybrid_engine.memory import GIB
    from rlhf_kit.hybrid_engine.timing import seconds

    each = "" if plan.ranks == 1 else f"on each of {plan.ranks} GPUs, "
    yield f"{each}{gpu.name} with {gpu.memory:g} GiB; a step of SFT or reward, an iteration of PPO:"
    yield f"{'stage':8}{'phase':16}{'peak GiB':>9}{'seconds':>10}"
    took = seconds(plan, gpu)
    for moment in plan.moments:
        passed = took[moment.stage, moment.name]
        yield f"{moment.stage:8}{moment.name:16}{moment.peak / GIB:9.1f}{passed:10.2g}"


def _fullest(plan: Plan) -> Iterator[str]:
    from rlhf_kit.hybrid_engine.memory import GIB

    fullest = plan.fullest
    yield f"fullest at {fullest.stage} {fullest.name}:"
    terms = sorted(fullest.terms.items(), key=lambda term: -term[1])[:TERMS]
    for name, size in [*terms, ("all else", fullest.peak - sum(size for _, size in terms))]:
        yield f"  {size / GIB:8.2f}  {name}"
    if host := plan.ppo.host_bytes * plan.ranks:
        yield f"the hosts keep {host / GIB:.1f} GiB in all"


def verdict(plan: Plan, gpu: Device) -> str:
    """Whether a run fits, in one sentence."""
    from rlhf_kit.hybrid_engine.memory import GIB

    fits = "it fits" if plan.fits(gpu.memory) else "it does not fit"
    return (
        f"{fits}: {plan.needed / GIB:.1f} GiB of {gpu.memory:g} are needed, with CUDA's own "
        "memory and what the allocator loses"
    )
