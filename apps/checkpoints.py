"""The checkpoints of a run directory, by opaque ids: nothing a browser sends is ever a path."""

from __future__ import annotations

import contextlib
import re
import secrets
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf_kit.chat import local_model
from rlhf_kit.checkpoint import MARKER, is_complete
from rlhf_kit.config import RunConfig, from_dict, require
from rlhf_kit.pipeline import EXPORTS, read_record
from rlhf_kit.trust import check_model_directory

LABELS = {"sft": "SFT", "final": "final", "ema": "EMA"}
STEP = re.compile(r"step-(\d{1,12})")


@dataclass(frozen=True)
class Checkpoint:
    """One model that may be chosen."""

    id: str
    """Opaque and random; the same for a name as long as the server runs."""
    name: str
    """`base`, `sft`, `final`, `ema`, `step-00000020`; `model` where one directory was given."""
    label: str
    """For people, English: "SFT", "final", "EMA", "PPO step 20", "base (toy_world)"."""
    step: int | None
    """PPO iteration of a periodic export."""
    complete: bool
    """False while it is being written: shown, not to be chosen."""


class Checkpoints:
    """Scans `root`, a run directory or one HF model directory."""

    def __init__(self, root: str | Path) -> None:
        """ValueError with one sentence where `root` is neither."""
        root = Path(root).expanduser()
        require(root.is_dir(), f"there is no directory {root}")
        self.root = root.resolve(strict=True)
        self.is_run = not (self.root / "config.json").is_file()
        self.config: RunConfig | None = None
        """The run's configuration; None where one model was given."""
        self._ids: dict[str, str] = {}
        self._found: dict[str, Checkpoint] = {}
        self._paths: dict[str, Path] = {}
        self._base: Path | None = None
        self._lock = threading.Lock()
        if self.is_run:
            require(
                (self.root / "run.json").is_file(),
                f"{root} holds neither a model (config.json) nor a run (run.json)",
            )
            self.config = from_dict(read_record(self.root)["config"])
            with contextlib.suppress(ValueError):  # a run may outlive its base model
                self._base = local_model(self.config.actor_model)
        require(
            any(checkpoint.complete for checkpoint in self.list()),
            f"{root} holds no finished model yet; try again when the SFT stage is done",
        )

    def list(self) -> list[Checkpoint]:
        """What is there now, in the order base, sft, steps, final, ema; scans again each time."""
        with self._lock:
            found = []
            for name, label, step, path in self._scan():
                id = self._ids.setdefault(name, secrets.token_urlsafe(9))
                whole = name in ("base", "model") or is_complete(path)
                self._found[id] = Checkpoint(id, name, label, step, whole)
                self._paths[id] = path
                found.append(self._found[id])
            return found

    def _scan(self) -> Iterator[tuple[str, str, int | None, Path]]:
        """(name, label, step, path) of all that is there, whole or not."""
        if self.config is None:
            yield "model", self.root.name, None, self.root
            return
        if self._base is not None:
            # the last part alone: a directory's place is nobody's business
            yield "base", f"base ({Path(self.config.actor_model).name})", None, self._base
        steps = []
        exports = self.root / "ppo" / "exports"
        for path in exports.iterdir() if exports.is_dir() else ():
            if match := STEP.fullmatch(path.name):
                steps.append((int(match[1]), path))
        parts = [(name, label, None, self.root / EXPORTS[name]) for name, label in LABELS.items()]
        parts[1:1] = [(p.name, f"PPO step {step}", step, p) for step, p in sorted(steps)]
        for name, label, step, path in parts:
            if (path / "config.json").is_file() or is_complete(path):
                yield name, label, step, path

    def get(self, id: object) -> Checkpoint:
        """ValueError for an id this server did not give out."""
        found = self._found.get(id) if isinstance(id, str) else None
        require(found is not None, "there is no such checkpoint; choose one from the list")
        assert found is not None
        return found

    def named(self, name: object) -> Checkpoint:
        """By name, for `?a=ema&b=final`; ValueError where there is none of that name."""
        for checkpoint in self.list():
            if checkpoint.name == name:
                return checkpoint
        raise ValueError("this run has no checkpoint of that name; choose one from the list")

    def default(self) -> Checkpoint:
        """The one a chat begins with: final, else the latest there is."""
        return self.default_pair()[1]

    def default_pair(self) -> tuple[Checkpoint, Checkpoint]:
        """EMA and final where they are there, else the two latest (or the same one twice)."""
        whole = [checkpoint for checkpoint in self.list() if checkpoint.complete]
        by_name = {checkpoint.name: checkpoint for checkpoint in whole}
        if {"final", "ema"} <= by_name.keys():
            return by_name["ema"], by_name["final"]
        last = by_name.get("final", whole[-1])
        others = [checkpoint for checkpoint in whole if checkpoint is not last]
        return (others[-1] if others else last), last

    # ---- for loading, on the server alone

    def directory(self, id: object) -> Path:
        """Where a checkpoint lies, looked at again and trusted; ValueError where it is not."""
        checkpoint = self.get(id)
        path = self._paths[checkpoint.id]
        if checkpoint.name in ("base", "model"):
            return trusted(path, root=None, label=checkpoint.label)
        require(is_complete(path), f"{checkpoint.label} is not finished; try again later")
        return trusted(path, root=self.root, label=checkpoint.label)

    def reward_directory(self) -> Path | None:
        """The run's reward model; None where it has none."""
        path = self.root / EXPORTS["reward"]
        if self.config is None or not is_complete(path):
            return None
        return trusted(path, root=self.root, label="the reward model")

    def stamp(self, id: object) -> str:
        """Changes when a checkpoint is written again: of its files, without reading weights."""
        return stamp(self._paths[self.get(id).id])


def trusted(path: Path, *, root: Path | None, label: str) -> Path:
    """`path` with links followed, once it lies under `root` and passes `check_model_directory`."""
    try:
        real = path.resolve(strict=True)
    except OSError:
        raise ValueError(f"{label} is not there any more; choose another checkpoint") from None
    require(
        root is None or real.is_relative_to(root),
        f"{label} is a link that leaves the run directory: it is not loaded",
    )
    try:
        check_model_directory(real, root=root, verify=True)
    except ValueError as error:
        text = without_places(str(error), {real: label, root or real: "the run directory"})
        raise ValueError(text) from None
    return real


def without_places(text: str, names: Mapping[Path, str]) -> str:
    """A sentence without where directories lie, which is nobody's business."""
    for path, name in names.items():
        text = text.replace(str(path), name)
    return text


def stamp(path: Path) -> str:
    """Names, sizes and times of the files that make a model."""
    files = [path / MARKER, path / "config.json", *sorted(path.glob("*.safetensors"))]
    return " ".join(
        f"{file.name}:{info.st_size}:{info.st_mtime_ns}"
        for file in files
        if file.is_file() and (info := file.stat())
    )
