"""Launch a notebook on many ranks: on this host, on the hosts of a hostfile, or as a SLURM job.

Everything is checked and written down first, as a `Plan`: the files (the notebook as a script,
its parameters as a recipe, for SLURM a batch script) and one command. `--dry-run` shows the plan,
`start` carries it out. Each rank is a `rank_process`, started by DeepSpeed's launcher.

    DIR/notebooks/NN_name.py, .yaml    what runs, with which parameters
    DIR/notebooks/NN_name.ipynb        the notebook as the main rank executed it
    DIR/logs/NN_name/rank-K.log        all that rank K printed
"""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_kit.config import require
from rlhf_kit.hostfile import check_environment_files, read_hostfile
from rlhf_kit.parameters import Value, parameters_of, parse_flags
from rlhf_kit.rank_process import LAUNCHERS_DEVICES, NO_DEVICES, report

PLAIN = re.compile(r"[\w@%+=:,./-]+")
"""What every shell on the way to another host leaves as it is."""
MASTER_PORT = 29500
SAVE_BEFORE_END = 600
"""Seconds before a SLURM job's time is over at which it is asked to save."""


@dataclass(frozen=True)
class Job:
    """A notebook with its parameters, and where its run directory keeps what belongs to it."""

    notebook: Path
    values: Mapping[str, Value]
    directory: Path
    """The run's, absolute."""

    @classmethod
    def of(cls, notebook: str | Path, words: Sequence[str]) -> Job:
        """ValueError where a flag is unknown or a value of another type."""
        notebook = Path(notebook)
        parameters = parameters_of(notebook)
        values = parse_flags(parameters, words)
        defaults = {p.name: p.default for p in parameters}
        run_dir = values.get("run_dir", defaults.get("run_dir")) or f"runs/{notebook.stem}"
        return cls(notebook, values, Path(str(run_dir)).absolute())

    @property
    def script(self) -> Path:
        return self.directory / "notebooks" / f"{self.notebook.stem}.py"

    @property
    def recipe(self) -> Path:
        return self.script.with_suffix(".yaml")

    @property
    def logs(self) -> Path:
        return self.directory / "logs" / self.notebook.stem

    def files(self) -> dict[Path, str]:
        """The script and the recipe: what waits in a queue must not change meanwhile."""
        import yaml

        recipe = yaml.safe_dump(dict(self.values), sort_keys=False, allow_unicode=True)
        return {self.script: _script_of(self.notebook), self.recipe: recipe}

    def rank_words(self, identity: str, devices: str) -> list[str]:
        """What follows the launcher's own options."""
        words = [] if devices == LAUNCHERS_DEVICES else [f"--devices={devices}"]
        where = [str(self.logs), identity, str(self.script), f"--config={self.recipe}"]
        return ["--module", "rlhf_kit.rank_process", *words, *where]


def _script_of(notebook: Path) -> str:
    if notebook.suffix != ".ipynb":
        return notebook.read_text(encoding="utf-8")
    import jupytext

    return jupytext.writes(jupytext.read(notebook), fmt="py:percent")


@dataclass(frozen=True)
class Plan:
    """All that a launch writes and runs."""

    job: Job
    files: Mapping[Path, str]
    command: Sequence[str]
    ranks: int
    """In all."""
    identity: str = ""
    """Names this launch's failure file; empty where a batch job names it."""
    environment: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"# would write {self.job.script}, {self.job.notebook} as a script"]
        for path, text in self.files.items():
            if path != self.job.script:
                lines += [f"# would write {path}:", text.rstrip("\n")]
        variables = [f"{name}={shlex.quote(text)}" for name, text in self.environment.items()]
        return "\n".join([*lines, "# would run:", " ".join([*variables, shlex.join(self.command)])])


# ---- plans


def on_this_host(
    job: Job, *, num_gpus: int | None, num_ranks: int | None, elsewhere: bool = False
) -> Plan:
    """Ranks on this host's GPUs, or with `num_gpus` 0 as many as `num_ranks` on its CPU.

    `elsewhere`: not to be started here, so that nothing need be visible.
    """
    environment: dict[str, str] = {}
    if num_gpus == 0:
        ranks, devices = num_ranks or 1, NO_DEVICES
        environment["DS_ACCELERATOR"] = "cpu"
    else:
        visible = num_gpus or 1 if elsewhere else visible_gpus()
        require(
            visible > 0,
            "no GPU is visible on this host; add --num-gpus 0 --num-ranks 2 to run on its CPU",
        )
        ranks = visible if num_gpus is None else num_gpus
        require(
            ranks <= visible,
            f"--num-gpus is {ranks}, but only {visible} visible on this host; lower it, or look at "
            "CUDA_VISIBLE_DEVICES",
        )
        devices = os.environ.get("CUDA_VISIBLE_DEVICES") or LAUNCHERS_DEVICES
    identity = _identity()
    command = [
        *_python("deepspeed.launcher.launch"),
        f"--world_info={_world_info({'localhost': ranks})}",
        "--master_addr=127.0.0.1",
        f"--master_port={_free_port()}",
        "--no_local_rank",
        "--log_level=critical",
        *job.rank_words(identity, devices),
    ]
    return Plan(job, job.files(), command, ranks, identity, environment)


def on_hosts(
    job: Job,
    hostfile: str | Path,
    *,
    num_gpus: int | None,
    master_addr: str | None = None,
    master_port: int = MASTER_PORT,
) -> Plan:
    """Ranks on every slot of a hostfile, by DeepSpeed's runner over pdsh and ssh.

    With `num_gpus` that many slots a host; 0 runs a rank a slot on the hosts' CPUs.
    """
    hosts = read_hostfile(hostfile)
    check_environment_files()
    for host, slots in hosts.items():
        require(
            not num_gpus or num_gpus <= slots,
            f"--num-gpus is {num_gpus}, but {hostfile} gives {host} {slots} slots; lower it",
        )
    _require_plain_paths(job)
    identity = _identity()
    command = [
        *_python("deepspeed.launcher.runner"),
        f"--hostfile={hostfile}",
        "--force_multi",
        "--no_ssh_check",
        f"--master_addr={master_addr or next(iter(hosts))}",
        f"--master_port={master_port}",
        "--no_local_rank",
        *([f"--num_gpus={num_gpus}"] if num_gpus else []),
        *job.rank_words(identity, NO_DEVICES if num_gpus == 0 else LAUNCHERS_DEVICES),
    ]
    # The runner reads it, and hands on to the other hosts what begins with PYTHON.
    environment = {"DS_ACCELERATOR": "cpu"} if num_gpus == 0 else {}
    ranks = sum(num_gpus or slots for slots in hosts.values())
    return Plan(job, job.files(), command, ranks, identity, environment)


def on_slurm(
    job: Job,
    *,
    nodes: int,
    num_gpus: int | None,
    num_ranks: int | None = None,
    options: Sequence[str] = (),
) -> Plan:
    """A SLURM job of one DeepSpeed launcher a node; `options` are sbatch's (`--partition=gpu`)."""
    require(num_gpus is not None, "--slurm needs --num-gpus: how many GPUs of each node to ask for")
    require(nodes >= 1, "--nodes must be at least 1")
    for option in options:
        require(
            option.startswith("--") and "\n" not in option,
            f"write --sbatch=--name=value, not {option!r}",
        )
    _require_plain_paths(job)
    ranks = num_gpus or num_ranks or 1
    world = _world_info({f"node{number}": ranks for number in range(nodes)})
    batch = job.script.with_suffix(".sbatch")
    launcher = [
        *_python("deepspeed.launcher.launch"),
        f"--world_info={world}",
        '--node_rank="$SLURM_NODEID"',
        '--master_addr="$MASTER_ADDR"',
        '--master_port="$MASTER_PORT"',
        "--no_local_rank",
        "--log_level=critical",
        *job.rank_words(
            '"$RUN"', '"${CUDA_VISIBLE_DEVICES:-launcher}"' if num_gpus else NO_DEVICES
        ),
    ]
    header = [
        f"--job-name={job.notebook.stem}",
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        *([f"--gpus-per-node={num_gpus}"] if num_gpus else []),
        f"--chdir={Path.cwd()}",
        f"--output={job.logs}/slurm-%j.log",
        f"--signal=USR1@{SAVE_BEFORE_END}",
        *options,
    ]
    text = SBATCH.format(
        header="\n".join(f"#SBATCH {option}" for option in header),
        accelerator="" if num_gpus else "export DS_ACCELERATOR=cpu\n",
        launcher=" ".join(word if '"$' in word else shlex.quote(word) for word in launcher),
        report=shlex.join([*_python("rlhf_kit.rank_process"), "--report", str(job.logs)]),
    )
    return Plan(job, {**job.files(), batch: text}, ["sbatch", str(batch)], nodes * ranks)


SBATCH = """\
#!/bin/bash
{header}
set -u
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
RUN=slurm-$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}
export MASTER_ADDR MASTER_PORT RUN
{accelerator}# In single quotes, so that each node puts in its own SLURM_NODEID. USR1 asks the ranks
# to save; the launcher between must not die of it.
srun --kill-on-bad-exit=1 --cpu-bind=none bash -c 'trap "" USR1; exec {launcher}'
code=$?
{report} "$RUN"
exit $code
"""


# ---- what plans are made of


def _require_plain_paths(job: Job) -> None:
    for path in (Path.cwd(), job.script, Path(sys.executable)):
        require(
            PLAIN.fullmatch(str(path)) is not None,
            f"{path} can't be passed to other hosts' shells; use a path of letters, digits and "
            "'_-./' only",
        )


def visible_gpus() -> int:
    """GPUs that this process could use."""
    import torch

    return torch.cuda.device_count()


def _python(module: str) -> list[str]:
    return [sys.executable, "-u", "-m", module]


def _world_info(ranks: Mapping[str, int]) -> str:
    """DeepSpeed's `--world_info`: the device numbers of each host, as base64 of JSON."""
    devices = {host: list(range(count)) for host, count in ranks.items()}
    return base64.urlsafe_b64encode(json.dumps(devices).encode()).decode()


def _identity() -> str:
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- carrying a plan out


def require_startable(plan: Plan) -> None:
    """ValueError where the command of a plan is not there."""
    require(
        plan.command[0] != "sbatch" or shutil.which("sbatch") is not None,
        "there is no sbatch on this host; submit from a login node of the SLURM cluster, or look "
        "at --dry-run",
    )


def submit(plan: Plan) -> str:
    """Write the files and hand the batch job over to SLURM; its number."""
    _write(plan)
    program, *words = plan.command
    done = subprocess.run([program, "--parsable", *words], stdout=subprocess.PIPE, text=True)
    require(done.returncode == 0, f"{plan.job.notebook.stem} was not submitted: sbatch refused it")
    return done.stdout.strip().partition(";")[0]


def _write(plan: Plan) -> None:
    require_startable(plan)
    plan.job.logs.mkdir(parents=True, exist_ok=True)
    for path, text in plan.files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def start(plan: Plan) -> int:
    """Write the files, run the command and wait for it; its exit code."""
    _write(plan)
    launcher = subprocess.Popen(plan.command, env={**os.environ, **plan.environment})
    asked: list[int] = []  # exit codes of what asked us to stop

    def pass_on(number: int, _: Any) -> None:
        asked.append(128 + number)
        launcher.send_signal(number)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        code = _wait(launcher, asked)
    finally:
        signal.signal(signal.SIGTERM, before)
    if not plan.identity:  # a batch job: it has only been submitted
        return 1 if code else 0
    if failed := report(plan.job.logs, plan.identity):
        return failed
    if asked:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return asked[0]
    if code:
        print(f"error: the launcher ended with exit code {code}", file=sys.stderr)
        return 1
    print(f"The executed notebook is {plan.job.script.with_suffix('.ipynb')}.", flush=True)
    return 0


def _wait(launcher: subprocess.Popen, asked: list[int]) -> int:
    """A terminal has sent Ctrl-C to the ranks as well, which may be saving."""
    while True:
        try:
            return launcher.wait()
        except KeyboardInterrupt:
            asked.append(130)
            print("\nwaiting for the ranks to end", file=sys.stderr)
