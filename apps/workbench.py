"""All that the page needs, from one run directory."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

from apps.checkpoints import Checkpoints
from apps.generation import Generation
from apps.history import History
from apps.limits import Limits
from apps.memory import keep_collections_short
from apps.pool import ModelPool
from apps.progress import Progress
from apps.scores import Scoring
from apps.votes import Arena


class Workbench:
    """Opened once at start: `Workbench(run_dir)`; close it at the end."""

    def __init__(
        self, run_dir: str | Path, *, limits: Limits | None = None, memory: int | None = None
    ) -> None:
        """ValueError with one sentence where `run_dir` is neither a run nor a model.

        `memory`: bytes that weights may take in all; by default what the device has free.
        """
        self.limits = limits or Limits()
        self.checkpoints = Checkpoints(run_dir)
        root = self.checkpoints.root
        self.data = root if self.checkpoints.is_run else Path("runs", "app", root.name)
        """Where votes and history are written: the run directory, or runs/app/NAME for a model."""
        self.pool = ModelPool(self.checkpoints, memory=memory)
        self.generation = Generation(self.pool, self.limits)
        self.scoring = Scoring(self.generation)
        self.arena = Arena(self.generation, self.scoring, self.data)
        self.history = History(self.data, self.limits)
        self.progress = Progress(self.generation, self.scoring, self.arena)

    def warm(self) -> None:
        """Load the default checkpoint in the background, so that the first answer need not wait."""

        def load() -> None:
            # whoever chooses it hears what is wrong with it
            with contextlib.suppress(ValueError), self.pool.actor(self.checkpoints.default().id):
                pass
            keep_collections_short()

        threading.Thread(target=load, name="warm", daemon=True).start()

    def close(self) -> None:
        """Stop every answer and free the device."""
        self.generation.close()
        self.pool.clear()
