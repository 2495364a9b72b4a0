"""All that the page needs, from one run directory."""

from __future__ import annotations

from pathlib import Path

from apps.checkpoints import Checkpoints
from apps.generation import Generation
from apps.history import History
from apps.limits import Limits
from apps.progress import Progress
from apps.scores import Scoring
from apps.votes import Arena


class Workbench:
    """Opened once at start: `Workbench(run_dir)`; close it at the end."""

    limits: Limits
    checkpoints: Checkpoints
    generation: Generation
    scoring: Scoring
    arena: Arena
    history: History
    progress: Progress
    data: Path
    """Where votes and history are written: the run directory, or runs/app/NAME for a model."""

    def __init__(self, run_dir: str | Path, *, limits: Limits | None = None) -> None:
        """ValueError with one sentence where `run_dir` is neither a run nor a model."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop every answer and free the device."""
        raise NotImplementedError
