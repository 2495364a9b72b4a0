"""The command `rlhf-kit launch`: its options, and which of them go together."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from rlhf_kit import cluster
from rlhf_kit.config import require
from rlhf_kit.hostfile import require_reachable
from rlhf_kit.parameters import help_text, parameters_of

SBATCH_OPTIONS = ("partition", "time", "account")


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    parser = command(
        "launch",
        launch,
        "run one notebook on many GPUs: here, on the hosts of a hostfile, or as a SLURM job",
        add_help=False,
        usage="rlhf-kit launch NOTEBOOK [options] [-- --NAME value ...]",
    )
    parser.add_argument("notebook", nargs="?", help="a .py (py:percent) or .ipynb")
    parser.add_argument(
        "-h", "--help", action="store_true", help="with NOTEBOOK, its parameters as well"
    )
    add_place(parser)
    parser.set_defaults(parser=parser)


def add_place(parser: argparse._ActionsContainer) -> None:
    """Where ranks are started."""
    parser.add_argument(
        "--num-gpus", type=int, metavar="N", help="GPUs of each host; default: all; 0: the CPU"
    )
    parser.add_argument(
        "--num-ranks", type=int, metavar="N", help="with --num-gpus 0: ranks of each host"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--hostfile", metavar="F", help="lines of 'host slots=8', as DeepSpeed's")
    where.add_argument("--slurm", action="store_true", help="write a batch script and submit it")
    parser.add_argument("--master-addr", metavar="A", help="hostfile: default: its first host")
    parser.add_argument("--master-port", type=int, metavar="P", help="hostfile: default: 29500")
    parser.add_argument("--nodes", type=int, metavar="N", help="SLURM: default: 1")
    for option in SBATCH_OPTIONS:
        parser.add_argument(f"--{option}", metavar=option[0].upper(), help="SLURM: as sbatch's")
    parser.add_argument(
        "--sbatch",
        metavar="OPTION",
        action="append",
        default=[],
        help="SLURM: any other of sbatch's, as in --sbatch=--qos=high; repeatable",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run, do nothing")


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The kit's own words, and those behind `--`, which are the launched notebook's."""
    words = list(words)
    if words[:1] != ["launch"] or "--" not in words:
        return words, []
    place = words.index("--")
    return words[:place], words[place + 1 :]


def launch(arguments: argparse.Namespace) -> int:
    notebook = arguments.notebook
    require(arguments.help or notebook, "name a notebook to launch; rlhf-kit launch --help")
    if arguments.help:
        arguments.parser.print_help()
        if notebook:
            print(f"\n{help_text(notebook, parameters_of(notebook))}")
        return 0
    plan = planned(cluster.Job.of(notebook, arguments.flags), arguments)
    if arguments.dry_run:
        print(plan)
        return 0
    if arguments.hostfile is not None:
        require_reachable(arguments.hostfile)
    return cluster.start(plan)


def planned(
    job: cluster.Job, arguments: argparse.Namespace, *, elsewhere: bool = False
) -> cluster.Plan:
    """What these options start; ValueError for one that does not go with the others.

    `elsewhere`: as a host with so many GPUs would start it, to be looked at here.
    """
    gpus, ranks = arguments.num_gpus, arguments.num_ranks
    require(gpus is None or gpus >= 0, f"--num-gpus must be 0 or more, not {gpus}")
    require(ranks is None or ranks >= 1, f"--num-ranks must be 1 or more, not {ranks}")
    require(
        ranks is None or gpus == 0,
        "--num-ranks is for ranks on the CPU; add --num-gpus 0, or use --num-gpus alone",
    )
    for names, chosen, way in (
        (("nodes", *SBATCH_OPTIONS, "sbatch"), arguments.slurm, "--slurm"),
        (("master_addr", "master_port"), arguments.hostfile is not None, "--hostfile"),
    ):
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name)]
        require(chosen or not given, f"{', '.join(given)} can only be used with {way}")
    if arguments.slurm:
        given = [(name, getattr(arguments, name)) for name in SBATCH_OPTIONS]
        options = [f"--{name}={value}" for name, value in given if value]
        return cluster.on_slurm(
            job,
            nodes=1 if arguments.nodes is None else arguments.nodes,
            num_gpus=gpus,
            num_ranks=ranks,
            options=[*options, *arguments.sbatch],
        )
    if arguments.hostfile is None:
        return cluster.on_this_host(job, num_gpus=gpus, num_ranks=ranks, elsewhere=elsewhere)
    require(ranks is None, "with --hostfile, each slot is a rank; leave --num-ranks out")
    return cluster.on_hosts(
        job,
        arguments.hostfile,
        num_gpus=gpus,
        master_addr=arguments.master_addr,
        master_port=arguments.master_port or cluster.MASTER_PORT,
    )
