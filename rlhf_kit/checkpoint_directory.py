"""The checkpoints of one stage on disk: which there are, which is whole, which are kept.

    DIR/<stage>/checkpoints/step-00000020/   manifest.json, state.json, rank-0.safetensors, ...
    DIR/<stage>/checkpoints/latest           the newest one's name: for readers, never believed
    DIR/<stage>/checkpoints/refused-step-…   did not verify, and was moved aside

Directories of other names are nobody's business here. Only the main rank calls any of this.
"""

from __future__ import annotations

import fcntl
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf_kit import integrity
from rlhf_kit.config import CheckpointConfig, require

FORMAT = 1
"""Of what a checkpoint holds; another one is refused."""
STEP = re.compile(r"step-\d{8,}")
REFUSED = re.compile(r"refused-step-\d{8,}")
LATEST = "latest"
_held: dict[Path, int] = {}
"""Directories locked by this process, and their open file descriptors."""


class CheckpointDirectory:
    """`settings` decide what is trained: a checkpoint with others is another training's."""

    def __init__(
        self,
        path: Path,
        config: CheckpointConfig,
        settings: Mapping[str, Any],
        *,
        best: Callable[..., Path] = max,
    ):
        """`best` is max or min: of the metric in the manifests."""
        self.path = path
        self.config = config
        self.settings = settings
        self.best = best

    def prepare(self) -> None:
        """Make it, take away what dead writers left.

        ValueError where nothing can be written, or while another process trains the same stage.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _lock(self.path.parent.resolve())
            integrity.recover(self.path)
            integrity.discard(integrity.temporary(self.path / "probe"))
        except OSError as error:
            raise ValueError(
                f"{self.path} can't be written ({error.strerror}); choose another run_dir"
            ) from None

    def release(self) -> None:
        """Let other processes train this stage."""
        number = _held.pop(self.path.parent.resolve(), None)
        if number is not None:
            os.close(number)

    def step_path(self, step: int) -> Path:
        return self.path / f"step-{step:08d}"

    def steps(self) -> list[Path]:
        """Directories named as checkpoints are, whole or not, the newest first."""
        found = [path for path in self.path.glob("step-*") if STEP.fullmatch(path.name)]
        return sorted((p for p in found if p.is_dir()), key=lambda p: int(p.name[5:]), reverse=True)

    def begin(self, step: int, size: int) -> Path:
        """A temporary directory for a checkpoint of `size` bytes; ValueError without room."""
        integrity.require_space(self.path, size)
        try:
            return integrity.temporary(self.step_path(step))
        except OSError as error:
            raise ValueError(f"{self.path} can't be written ({error.strerror})") from None

    def complete(self, unfinished: Path, step: int, details: Mapping[str, Any]) -> None:
        """Seal it, put it in its place, point at it, and delete those that are not kept."""
        stamp = {"format": FORMAT, "step": step, "settings": self.settings}
        integrity.seal(unfinished, {**stamp, **details})
        integrity.publish(unfinished, self.step_path(step))
        integrity.write_file(self.path / LATEST, f"{self.step_path(step).name}\n")
        self.prune()

    def prune(self) -> None:
        """Delete all but the newest and the best; one that can't be deleted stays."""
        paths = self.steps()
        keep = set(paths[: self.config.keep_last])
        metrics = {path: _metric(path) for path in paths}
        rated = [path for path in paths if metrics[path] is not None]
        if self.config.keep_best and rated:
            keep.add(self.best(rated, key=lambda path: metrics[path]))
        for path in paths:
            if path not in keep:
                with suppress(OSError):
                    integrity.remove(path)

    def newest(self, say: Callable[[str], None]) -> Path | None:
        """The newest whole one; `say` hears which were refused, and why.

        ValueError where it belongs to a training with other settings.
        """
        for path in self.steps():
            try:
                manifest = integrity.verify(path)
            except ValueError as error:
                say(f"refused: {error}")
                aside = path.with_name(f"refused-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(path, aside)
                continue
            self._require_same(path, manifest)
            return path
        return None

    def _require_same(self, path: Path, manifest: Mapping[str, Any]) -> None:
        saved = {"format": manifest.get("format"), **manifest.get("settings", {})}
        ours = {"format": FORMAT, **self.settings}
        for key in dict.fromkeys([*ours, *saved]):
            require(
                saved.get(key) == ours.get(key),
                f"{path} is of an unfinished training with other settings: {key} was "
                f"{saved.get(key)!r} and is {ours.get(key)!r}; set it back to go on, or start "
                "anew with resume=False (as a flag: --no-resume)",
            )

    def clear(self) -> bool:
        """Delete every checkpoint, refused ones too; whether there were any."""
        steps = self.steps()
        refused = [path for path in self.path.glob("refused-*") if REFUSED.fullmatch(path.name)]
        for path in [*steps, *refused]:
            integrity.remove(path)
        (self.path / LATEST).unlink(missing_ok=True)
        with suppress(OSError):  # anything else in it keeps it
            self.path.rmdir()
        return bool(steps)


def _lock(stage: Path) -> None:
    """Hold a stage's directory until it is released, or this process ends."""
    if stage in _held:
        return
    number = os.open(stage, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(number)
        raise ValueError(
            f"another process is training in {stage}; wait for it, or choose another run_dir"
        ) from None
    except OSError:  # a file system without locks
        os.close(number)
        return
    _held[stage] = number


def _metric(path: Path) -> float | None:
    """What its training had reached; None where that is unknown or no number."""
    try:
        metric = integrity.read_manifest(path).get("metric")
    except ValueError:
        return None
    return metric if isinstance(metric, int | float) and math.isfinite(metric) else None
