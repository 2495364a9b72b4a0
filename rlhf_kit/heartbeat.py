"""Signs of life: one file a host in the log directory, by which others notice that it is gone.

    DIR/alive-ID-RANK.json    {"rank", "host", "beat"}, of the first rank of each host

A host without power says nothing, and nobody who waits for it in a collective is told. Silence is
counted in looks, not in seconds: who could not look either, because the whole job was suspended or
the file system hung for all, accuses nobody.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path

TIMEOUT_VARIABLE = "RLHF_KIT_HOST_TIMEOUT"
"""Seconds of silence after which a host counts as lost, 45 unless set; 0 never."""
BEAT = 5.0
"""Seconds between two signs of life."""


class Heartbeat:
    """This host's signs of life, and what it sees of the other hosts'."""

    def __init__(self, directory: Path, identity: str):
        self.rank = int(os.environ["RANK"])
        self.timeout = float(os.environ.get(TIMEOUT_VARIABLE, 45))
        self._pattern = f"alive-{identity}-*.json"
        self._own = directory / f"alive-{identity}-{self.rank}.json"
        self._seen: dict[Path, tuple[str, int]] = {}
        """Of each other host: what it last said, and how many looks ago that was new."""
        self._beats = 0
        self._next = 0.0
        here = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
        first_here = os.environ.get("LOCAL_RANK", "0") == "0"
        self._on = self.timeout > 0 and first_here and int(os.environ["WORLD_SIZE"]) > here

    def beat(self) -> tuple[int, str] | None:
        """Give a sign of life when it is due; the rank and name of a host that has been silent."""
        now = time.monotonic()
        if not self._on or now < self._next:
            return None
        self._next = now + BEAT
        self._beats += 1
        line = {"rank": self.rank, "host": socket.gethostname(), "beat": self._beats}
        # Where nothing can be written or read for a while, nothing is known.
        with contextlib.suppress(OSError):
            self._own.write_text(json.dumps(line), encoding="utf-8")
            return self._look()

    def _look(self) -> tuple[int, str] | None:
        silent = None
        for path in self._own.parent.glob(self._pattern):
            if path == self._own:
                continue
            try:
                said = path.read_text(encoding="utf-8")
            except FileNotFoundError:  # it has ended
                continue
            before, looks = self._seen.get(path, ("", 0))
            self._seen[path] = (said, looks + 1 if said == before else 0)
            if self._seen[path][1] * BEAT >= self.timeout:
                with contextlib.suppress(ValueError):  # cut off in the middle of a word
                    known = json.loads(said)
                    silent = known["rank"], known["host"]
        return silent

    def end(self) -> None:
        """Say no more, without being missed."""
        with contextlib.suppress(OSError):
            self._own.unlink(missing_ok=True)
