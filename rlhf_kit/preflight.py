"""What all ranks check together before any model is loaded.

A cluster's faults show late and far from their cause: a node with another transformers, a
directory that only looks shared, a GPU that two ranks use. `check` finds them in seconds, and says
in one sentence each what is wrong and on which host and rank.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf_kit import distributed, fingerprint
from rlhf_kit.checkpoint import is_complete
from rlhf_kit.config import require
from rlhf_kit.hybrid_engine.shards import shards
from rlhf_kit.hybrid_engine.tensor_parallel import require_hosts
from rlhf_kit.hybrid_engine.training import start_deepspeed
from rlhf_kit.models import resolve_model
from rlhf_kit.pipeline import versions
from rlhf_kit.run_directory import RunDirectory

SHARED_SECONDS = 10.0
"""How long a file of the main rank may take to be seen by others (network file systems cache)."""
STATE_BYTES = 12
"""A checkpoint's bytes a trained parameter: the weight and AdamW's two moments, in fp32."""
SAME = ("rlhf-kit", "python", "torch", "transformers", "deepspeed")


@dataclass(frozen=True)
class Rank:
    """What one rank finds on its host."""

    rank: int
    host: str
    versions: dict[str, str]
    device: str
    """Which GPU it would use, by its hardware's number, or cpu."""
    problem: str
    """What alone is wrong with this rank's devices or models; empty where nothing is."""
    models: dict[str, str]
    """Setting -> hash of the model's config.json and the sizes of its weights."""
    free_memory: int
    """Bytes of the host's memory that are free."""

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host}"


def check(run: RunDirectory) -> None:
    """Compare all ranks, and print one line on the main rank; all ranks must call it.

    ValueError, the same on every rank, names the first thing that is wrong.
    """
    start = time.monotonic()
    start_deepspeed()
    names = _models(run)
    together = run.config.actor_engine.generation_tp
    ranks: list[Rank] = distributed.gather_objects(_look_around(names, together))
    main = ranks[0]
    for each in ranks:
        require(not each.problem, f"{each.name}: {each.problem}")
    for each in ranks:
        _require_equal(each, main)
    _require_own_devices(ranks)
    sizes = {name: _parameters(Path(resolve_model(model))) for name, model in names.items()}
    _require_memory(ranks, sum(sizes.values()))
    _require_shared(ranks, run.path)
    _on_all(ranks, lambda: _require_disk(run, sizes) if distributed.is_main_rank() else None)
    _require_sum(ranks)
    hosts = len({each.host for each in ranks})
    device = main.device.partition(" ")[0]
    distributed.print_main(
        f"pre-flight: {len(ranks)} rank{'s' * (len(ranks) > 1)} on {hosts} host"
        f"{'s' * (hosts > 1)} ({device}) agree; settings {fingerprint.of_config(run.config):08x}; "
        f"{time.monotonic() - start:.1f} s"
    )


def _models(run: RunDirectory) -> dict[str, str]:
    """The models to be loaded: the run's own where they are trained, else their bases."""
    trained = {name: str(run.model(name)) for name in ("sft", "reward")}
    actor = trained["sft"] if is_complete(trained["sft"]) else run.config.actor_model
    base = run.config.reward_model if run.config.reward.init_from == "base" else actor
    return {
        "actor_model": actor,
        "reward_model": trained["reward"] if is_complete(trained["reward"]) else base,
    }


# ---- one rank alone


def _look_around(names: dict[str, str], together: int) -> Rank:
    """`together` ranks of a host generate together."""
    models, problem = {}, ""
    device = "cpu"
    try:
        device = _device()
        models = {name: _model(name, model) for name, model in names.items()}
        if together > 1:
            require_hosts(together)
            _require_splits(names["actor_model"], together)
    except (ValueError, OSError, RuntimeError) as error:
        problem = str(error)
    return Rank(
        rank=distributed.rank(),
        host=socket.gethostname(),
        versions=versions(),
        device=device,
        problem=problem,
        models=models,
        free_memory=_free_memory(),
    )


def _device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    require(
        local < count,
        f"it is number {local + 1} on its host, which shows {count} GPUs to it; start fewer ranks "
        "a host, or look at CUDA_VISIBLE_DEVICES",
    )
    found = torch.cuda.get_device_properties(local)
    return f"cuda {found.name} {getattr(found, 'uuid', local)}"


def _model(setting: str, name: str) -> str:
    """A hash that two copies of a model directory share; of a name on the hub, the name."""
    directory = Path(resolve_model(name))
    if not directory.is_dir():
        return name
    try:
        config = (directory / "config.json").read_bytes()
        files = sorted(directory.glob("*.safetensors"))
        for file in files:  # readable, without reading it all
            file.open("rb").close()
    except OSError as error:
        where = error.filename or directory
        raise ValueError(f"{setting}: {where} can't be read ({error.strerror})") from None
    digest = hashlib.sha256(config)
    digest.update(repr([(file.name, file.stat().st_size) for file in files]).encode())
    return digest.hexdigest()


def _require_splits(name: str, ranks: int) -> None:
    """Build the actor without its weights, to see whether they can be split; not for hub names."""
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = Path(resolve_model(name))
    if directory.is_dir():
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(directory, local_files_only=True)
            shards(AutoModelForCausalLM.from_config(config), 0, ranks)


def _free_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return 0
    amounts = dict(line.split(":", 1) for line in lines)
    return int(amounts["MemAvailable"].split()[0]) * 1024


def _parameters(directory: Path) -> int:
    """Parameters of a model directory, by the heads of its safetensors; 0 for a hub name."""
    total = 0
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            head = json.loads(file.read(length))
        total += sum(math.prod(t["shape"]) for name, t in head.items() if name != "__metadata__")
    return total


# ---- all together


def _require_equal(each: Rank, main: Rank) -> None:
    for package in SAME:
        ours, theirs = main.versions[package], each.versions[package]
        require(
            ours == theirs,
            f"{each.name} has {package} {theirs}, but {main.name} has {ours}; install the same "
            "on all hosts",
        )
    for setting, model in each.models.items():
        require(
            model == main.models[setting],
            f"{each.name} finds another {setting} than {main.name} under the same name; copy one "
            "to all hosts, or use a shared directory",
        )
    same = each.device.startswith("cuda") == main.device.startswith("cuda")
    require(same, f"{each.name} uses {each.device}, but {main.name} {main.device}")


def _require_own_devices(ranks: Sequence[Rank]) -> None:
    users: dict[tuple[str, str], Rank] = {}
    for each in ranks:
        if each.device != "cpu":
            other = users.setdefault((each.host, each.device), each)
            require(
                other is each,
                f"{each.name} would use the same GPU as {other.name}; look at CUDA_VISIBLE_DEVICES",
            )


def _require_memory(ranks: Sequence[Rank], parameters: int) -> None:
    """Each rank of a host loads the weights on its CPU first, at two bytes at least."""
    for host in {each.host for each in ranks}:
        here = [each for each in ranks if each.host == host]
        need, free = 2 * parameters * len(here), min(each.free_memory for each in here)
        require(
            not free or need <= free,
            f"{here[0].name}: loading the models takes {need / 1e9:.0f} GB of memory for the "
            f"{len(here)} rank{'s' * (len(here) > 1)} of this host, and {free / 1e9:.0f} GB are "
            "free; use a host with more, or fewer ranks on it",
        )


def _on_all(ranks: Sequence[Rank], act: Callable[[], None]) -> None:
    """`act` on every rank; the first rank's error is a ValueError on all."""
    problem = ""
    try:
        act()
    except (ValueError, OSError) as error:
        problem = str(error)
    for each, said in zip(ranks, distributed.gather_objects(problem), strict=True):
        require(not said, f"{each.name}: {said}")


def _require_shared(ranks: Sequence[Rank], directory: Path) -> None:
    """What the main rank writes to the run's directory, all ranks see."""
    path = directory / f".preflight-{distributed.gather_objects(secrets.token_hex(8))[0]}"

    def write() -> None:
        if distributed.is_main_rank():
            try:
                directory.mkdir(parents=True, exist_ok=True)
                path.touch()
            except OSError as error:
                reason = f"{directory} can't be written ({error.strerror})"
                raise ValueError(f"{reason}; choose another run_dir") from None

    def look() -> None:
        deadline = time.monotonic() + SHARED_SECONDS
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        require(
            path.exists(),
            f"it does not see what {ranks[0].name} writes to {directory.absolute()}; choose a "
            "run_dir on a file system that all hosts share",
        )

    _on_all(ranks, write)
    try:
        _on_all(ranks, look)
    finally:
        if distributed.is_main_rank():
            path.unlink(missing_ok=True)


def _require_disk(run: RunDirectory, parameters: dict[str, int]) -> None:
    """Room for two exports of the actor, one of the reward model, and for the checkpoints."""
    config = run.config
    engines = {"actor_model": config.actor_engine, "reward_model": config.critic_engine}
    saves = config.checkpoint.every_steps > 0 or config.checkpoint.every_minutes > 0
    checkpoints = (config.checkpoint.keep_last + config.checkpoint.keep_best + 1) * saves
    need = 0
    for name, engine in engines.items():
        exports = 2 if name == "actor_model" else 1
        need += parameters[name] * exports * (2 if engine.dtype == "bf16" else 4)
        if not engine.lora.rank:  # adapters are small
            need += parameters[name] * checkpoints * STATE_BYTES
    free = shutil.disk_usage(run.path).free
    require(
        need <= free,
        f"{run.path} has {free / 1e9:.0f} GB free, and models and checkpoints may take "
        f"{need / 1e9:.0f} GB; make room, lower checkpoint.keep_last, or choose another run_dir",
    )


def _require_sum(ranks: Sequence[Rank]) -> None:
    """An all-reduce over the ranks' own devices gives the right sum."""
    mine = torch.full((1024,), float(distributed.rank() + 1), device=distributed.local_device())
    total = distributed.all_sum(mine)
    right = len(ranks) * (len(ranks) + 1) / 2
    wrong = bool((total != right).any())
    for each, said in zip(ranks, distributed.gather_objects(wrong), strict=True):
        require(
            not said,
            f"{each.name} gets a wrong sum of {right:.0f} over all ranks; look at its GPU and "
            "network (NCCL_DEBUG=INFO says more)",
        )
