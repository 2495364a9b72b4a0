"""`rlhf-kit train --deployment-type`: where the three stages run, with settings that fit there.

A stage runs as `rlhf-kit launch` would run its notebook, or on one GPU in one process. Under SLURM
each stage is a job that waits for the one before.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_kit import cluster, launch_command, pipeline, run_flags
from rlhf_kit.config import RunConfig, preset, require
from rlhf_kit.hostfile import require_reachable

if TYPE_CHECKING:
    from rlhf_kit.fitting import Fitting
    from rlhf_kit.hybrid_engine.device import Device

TYPES = ("single_gpu", "single_node", "multi_node")
KEPT = (
    "deployment_type num_gpus num_ranks hostfile slurm master_addr master_port nodes sbatch"
).split() + list(launch_command.SBATCH_OPTIONS)
"""Options that run.json keeps, so that `--resume` alone starts the same."""


def add(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "deployment",
        "With --deployment-type, ZeRO stage, LoRA, gradient checkpointing, offloading, micro-batch "
        "and slots are chosen from the memory plan; what --set gives stands.",
    )
    group.add_argument(
        "--deployment-type",
        choices=TYPES,
        help="one GPU, all GPUs of this host, or many hosts (--hostfile or --slurm)",
    )
    run_flags.add_device(group)
    launch_command.add_place(group)


@dataclass(frozen=True)
class Deployment:
    """Where the stages of a run are started."""

    arguments: argparse.Namespace
    directory: Path
    """The run's."""

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Deployment | None:
        """None without `--deployment-type`; ValueError for options that do not go with it."""
        kind = arguments.deployment_type
        given = _given(arguments, *KEPT[1:], "gpu", "gpu_memory", "dry_run")
        words = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        require(kind is not None or not given, f"{words} can only be used with --deployment-type")
        if kind is None:
            return None
        far = arguments.slurm or arguments.hostfile is not None
        require(
            far == (kind == "multi_node"),
            "multi_node needs --hostfile F or --slurm: which hosts are there"
            if kind == "multi_node"
            else f"--hostfile and --slurm are for multi_node, and this is {kind}",
        )
        require(
            kind != "single_gpu"
            or (arguments.num_gpus in (None, 0, 1) and _given(arguments, *KEPT[2:]) == []),
            "single_gpu is one process, and takes --num-gpus 0 or 1 at most; use single_node",
        )
        return cls(arguments, arguments.output_dir)

    def to_dict(self) -> dict[str, Any]:
        """What `recall` reads."""
        return {name: getattr(self.arguments, name) for name in KEPT}

    @property
    def on_cpu(self) -> bool:
        return self.arguments.num_gpus == 0

    @property
    def is_alone(self) -> bool:
        """In one process, without a launcher."""
        return self.arguments.deployment_type == "single_gpu" and not self.on_cpu

    @property
    def ranks(self) -> int:
        return 1 if self.is_alone else self.launch(pipeline.STAGES[0][0]).ranks

    def check(self) -> None:
        """ValueError where this cannot be started from here."""
        if self.is_alone:
            require(
                cluster.visible_gpus() > 0,
                "no GPU is visible on this host; add --num-gpus 0 to run on its CPU, or plan for "
                "another with --dry-run --gpu h100",
            )
            return
        cluster.require_startable(self.launch(pipeline.STAGES[0][0]))
        if self.arguments.hostfile is not None:
            require_reachable(self.arguments.hostfile)

    # ---- its stages

    def launch(self, name: str, *, after: str | None = None) -> cluster.Plan:
        """How the launcher starts a stage; under SLURM, `after` another job has ended well."""
        arguments = argparse.Namespace(**vars(self.arguments))
        if after is not None:
            waits = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
            arguments.sbatch = [*arguments.sbatch, *waits]
        job = cluster.Job.of(pipeline.NOTEBOOKS / f"{name}.py", [f"--run_dir={self.directory}"])
        named = arguments.gpu is not None or arguments.gpu_memory is not None
        elsewhere = arguments.dry_run and named and arguments.num_gpus is not None
        return launch_command.planned(job, arguments, elsewhere=elsewhere)

    def run_stage(self, name: str, directory: Path) -> int:
        """As `pipeline.train` runs it."""
        if self.is_alone:
            return pipeline.run_stage(name, directory)
        return cluster.start(self.launch(name))

    def left(self) -> list[str]:
        """The stages that are not done."""
        stages = [name for name, _ in pipeline.STAGES]
        return [name for name in stages if not pipeline.is_done(name, self.directory)]

    def submit(self) -> None:
        """Hand the stages that are left over to SLURM, each to wait for the one before."""
        after = None
        for name in self.left():
            after = cluster.submit(self.launch(name, after=after))
            print(f"{name}: job {after}", flush=True)

    def preview(self) -> str:
        """What would be written and run, stage by stage."""
        texts, before = [], None
        for name in self.left():
            if self.is_alone:
                script = str(pipeline.NOTEBOOKS / f"{name}.py")
                command = shlex.join([sys.executable, script, f"--run_dir={self.directory}"])
                texts.append(f"# would run:\n{command}")
            else:
                job = f"JOB-OF-{before}" if before and self.arguments.slurm else None
                texts.append(str(self.launch(name, after=job)))
            before = name
        return "\n\n".join(texts)


def recall(arguments: argparse.Namespace, record: Mapping[str, Any]) -> None:
    """Start the run of this record again where it ran, unless another place is named."""
    if not _given(arguments, *KEPT):
        for name, value in record.get("deployment", {}).items():
            if name in KEPT:
                setattr(arguments, name, value)


def _given(arguments: argparse.Namespace, *names: str) -> list[str]:
    """Those of the options that were given; a number may be 0."""
    values = {name: getattr(arguments, name) for name in names}
    return [name for name, v in values.items() if not (v is None or v is False or v == [])]


# ---- what fits there


def choose(
    deployment: Deployment, preset_name: str, changes: Mapping[str, Any]
) -> Mapping[str, Any]:
    """`changes`, and what the plan adds to them; each choice is printed with its reason.

    ValueError where nothing fits. On a CPU nothing is chosen.
    """
    config = preset(preset_name, **changes)
    ranks = deployment.ranks
    config.ppo.check_ranks(ranks)
    if deployment.on_cpu:
        print("on a CPU nothing is chosen: the preset's settings stand", flush=True)
        return changes

    from rlhf_kit.fitting import fit
    from rlhf_kit.hybrid_engine.device import device

    gpu = device(deployment.arguments.gpu, deployment.arguments.gpu_memory)
    print(f"planning for {ranks} x {gpu.name} with {gpu.memory:g} GiB ...", flush=True)
    found = fit(config, gpu.memory, ranks, changes.keys())
    if not found.fits:
        raise ValueError(_closest(found, gpu))
    print("\n".join(_lines(config, found, gpu)), flush=True)
    return {**changes, **_differences(config, found.config, changes.keys())}


def _closest(found: Fitting, gpu: Device) -> str:
    from rlhf_kit.hybrid_engine.memory import GIB

    plan, changes = found.plan, _differences(found.start, found.config, ())
    closest = f" with {run_flags.flags(changes)}" if changes else ""
    return (
        f"this does not fit into {found.ranks} x {gpu.name}, whatever is chosen: the closest needs "
        f"{plan.needed / GIB:.1f} GiB of {gpu.memory:g} at {plan.fullest.stage} "
        f"{plan.fullest.name}{closest}; use more or larger GPUs, a smaller model or shorter rows, "
        "or leave out what --set fixes"
    )


def _lines(config: RunConfig, found: Fitting, gpu: Device) -> Iterator[str]:
    from rlhf_kit.hybrid_engine.memory import GIB
    from rlhf_kit.plan_command import verdict

    taken = {key for choice in found.taken.values() for key in choice.changes}
    if room := _differences(config, found.config, taken):
        yield f"{run_flags.flags(room)}    # there is room, and the preset would save it"
    for choice, without in found.reasons():
        full = without.fullest
        yield (
            f"{run_flags.flags(choice.changes)}    # else {full.stage} {full.name} needs "
            f"{without.needed / GIB:.1f} GiB of {gpu.memory:g}; costs: {choice.price}"
        )
    yield from _shares(found.config, found.ranks)
    yield verdict(found.plan, gpu)


def _shares(config: RunConfig, ranks: int) -> Iterator[str]:
    """How the rows of a step are shared out; what is accumulated follows."""
    for stage, rows, micro in (
        ("sft", config.sft.batch_size, config.sft.micro_batch_size),
        ("reward", config.reward.batch_size, config.reward.micro_batch_size),
        ("ppo", config.ppo.minibatch_size, config.ppo.micro_batch_size),
    ):
        share = -(-rows // ranks)
        micro = min(micro, share)
        yield f"{stage}: {rows} rows a step = {ranks} ranks x {micro} rows x {-(-share // micro)}"


def _differences(old: RunConfig, new: RunConfig, but: Collection[str]) -> dict[str, Any]:
    """Settings of `new` that are others in `old`, by their keys in `config.override`."""

    def walk(a: Mapping[str, Any], b: Mapping[str, Any], above: str) -> Iterator[tuple[str, Any]]:
        for key, value in b.items():
            if isinstance(value, dict) and isinstance(a[key], dict):
                yield from walk(a[key], value, f"{above}{key}__")
            elif value != a[key] and f"{above}{key}" not in but:
                yield f"{above}{key}", value

    return dict(walk(old.to_dict(), new.to_dict(), ""))
