"""Log once, read anywhere: JSON lines, TensorBoard, a console line; then the plots.

Every number a run logs goes through `MetricsLog` into `metrics.jsonl`, one strict JSON object a
line. Plots, reports and notebooks read that file and nothing else. `docs/metrics.md` explains
each key once.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_kit import distributed, faults
from rlhf_kit.config import require
from rlhf_kit.faults import Action, record
from rlhf_kit.training_state import State

FILE_NAME = "metrics.jsonl"
CONSOLE_SECONDS = 5.0
"""Lines of a summary without a bar come no closer than this."""
RESERVED = ("step", "time", "nonfinite")
GIB = 2**30


class MetricsLog:
    """Writes `directory/metrics.jsonl` and TensorBoard events; does nothing off rank 0.

    A line is `{"step": 3, "time": <unix seconds>, "objective/kl": 1.2, ...}` and is flushed at
    once. JSON has no NaN or infinity: such a value is written as null, and the line says which
    under `"nonfinite": {key: "nan" | "inf" | "-inf"}`; the console says so the first time.

    directory: created when missing.
    tensorboard: also write scalars for `tensorboard --logdir directory`.
    console: keys of the one-line summary; none prints nothing.
    purge_step: forget what was logged from this step on, as a resumed run logs it again (0
        starts anew); None appends.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        tensorboard: bool = True,
        console: Sequence[str] = (),
        purge_step: int | None = None,
    ) -> None:
        self.path = Path(directory) / FILE_NAME
        self.console = tuple(console)
        self._tensorboard = tensorboard
        self._purge_step = purge_step
        self._file: Any = None
        self._writer: Any = None
        self._step = 0
        self._waiting = b""
        """Lines that are not yet on disk."""
        self._full = False
        self._reported: set[str] = set()
        self._next_line = 0.0

    def __call__(self, step: int, values: Mapping[str, Any], *, bar: Any = None) -> None:
        """Log numbers (or one-element tensors) of one step.

        bar: a tqdm bar that shows the summary as its postfix; without one, or where it is
        disabled as in a log file, the summary is a line of its own, which bars elsewhere survive.
        """
        if not distributed.is_main_rank():
            return
        numbers = {key: _number(key, value) for key, value in values.items()}
        if self._file is None:
            self._open(step)
        self._waiting += _line(step, numbers).encode() + b"\n"
        self._write(step)
        with self._tracking(step):
            if self._writer is not None:
                for key, value in numbers.items():
                    self._writer.add_scalar(key, value, global_step=step)
        self._show(step, numbers, bar)

    def rewind(self, purge_step: int) -> None:
        """Forget what was logged from this step on, as training goes back to before it.

        Faults stay on record, as they did happen, unless training starts anew with step 0.
        """
        self.close()
        self._purge_step = purge_step
        if purge_step == 0 and distributed.is_main_rank():
            (self.path.parent / faults.FILE_NAME).unlink(missing_ok=True)

    def close(self) -> None:
        """Close both files; logging again reopens them."""
        if self._file is not None:
            self._write(self._step)
            if self._waiting:
                lines = self._waiting.count(b"\n")
                self._say("metrics", "drop", f"the last {lines} lines of {self.path} are lost")
            self._file.close()
        with self._tracking(self._step):
            if self._writer is not None:
                self._writer.close()
        self._file = self._writer = None
        self._waiting = b""
        self._purge_step = None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, step: int) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _repair(self.path, self._purge_step)
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise ValueError(
                f"{self.path} can't be written ({error.strerror}); free the disk or the "
                "directory, or choose another run_dir"
            ) from None
        with self._tracking(step):
            if self._tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(self.path.parent), purge_step=self._purge_step)

    def _write(self, step: int) -> None:
        """What waits, to the last byte; on a full disk it waits for the next step.

        A run is worth more than its log, and a line torn by the end of the disk is completed.
        """
        self._step = step
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self._full = False
        except OSError as error:
            if not self._full:
                self._say(
                    "metrics",
                    "warn",
                    f"{self.path} can't be written ({error.strerror}): training goes on, and "
                    "metrics wait in memory for the disk to be freed",
                )
            self._full = True

    @contextmanager
    def _tracking(self, step: int) -> Iterator[None]:
        """Where the tracker raises, whatever it is, it is dropped and training goes on."""
        try:
            yield
        except Exception as error:
            self._step, self._writer, self._tensorboard = step, None, False
            self._say(
                "tracker",
                "drop",
                f"TensorBoard failed ({type(error).__name__}: {error}) and is left out from here "
                f"on; {self.path} has all metrics",
            )

    def _say(self, fault: str, action: Action, sentence: str) -> None:
        from tqdm.auto import tqdm

        tqdm.write(f"step {self._step}: {sentence}")
        record(self.path.parent, self._step, fault, action, sentence)

    def _show(self, step: int, numbers: Mapping[str, float], bar: Any) -> None:
        from tqdm.auto import tqdm

        for key, value in numbers.items():
            if not math.isfinite(value) and key not in self._reported:
                self._reported.add(key)
                tqdm.write(f"step {step}: {key} is {value}")
        text = summary(numbers, self.console)
        if text and bar is not None and not bar.disable:
            bar.set_postfix_str(text)
        elif text and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + CONSOLE_SECONDS
            tqdm.write(f"step {step}  {text}")


def summary(values: Mapping[str, float], keys: Sequence[str]) -> str:
    """The chosen keys that have values, as one line."""
    return "  ".join(f"{key} {values[key]:.4g}" for key in keys if key in values)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a metrics file (or of the one in a directory), as they were logged.

    A torn last line, as a killed run leaves it, is dropped. A broken line before that raises
    ValueError.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _parse(line)
        if row is None and number == len(lines):
            break
        require(row is not None, f"line {number} of {path} is not a JSON object; repair the file")
        rows.append(row)
    return rows


def history(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one key, sorted by step; where a step was logged twice, the later."""
    points = {row["step"]: row[key] for row in rows if key in row}
    steps = sorted(points)
    return steps, [points[step] for step in steps]


@dataclass
class Phase:
    """What one phase has used so far."""

    seconds: float = 0.0
    tokens: int = 0
    peak_bytes: int = 0
    """Most GPU memory in torch's allocator; 0 without a GPU."""

    def add(self, use: Phase) -> None:
        self.seconds += use.seconds
        self.tokens += use.tokens
        self.peak_bytes = max(self.peak_bytes, use.peak_bytes)


class Phases:
    """Seconds and tokens by phase: `with phases("generate") as phase: ...; phase.tokens += n`.

    On a GPU also the most memory allocated, for which torch's own peaks begin anew with each
    phase; `peak_memory` has those of the whole process.

    Phases must not nest, or their shares would count time twice. Tokens are what the caller says
    they are; a run on many ranks passes the sum over ranks.
    """

    def __init__(self) -> None:
        self.totals: dict[str, Phase] = {}
        self._lap: dict[str, Phase] = {}
        self._inside: str | None = None

    @contextmanager
    def __call__(self, name: str, *, tokens: int = 0) -> Iterator[Phase]:
        require(self._inside is None, f"phase {name} starts inside phase {self._inside}")
        self._inside, use = name, Phase(tokens=tokens)
        _synchronize()
        _new_peak()
        start = time.perf_counter()
        try:
            yield use
        finally:
            _synchronize()
            use.seconds += time.perf_counter() - start
            use.peak_bytes = _new_peak()
            self._inside = None
            for phases in (self.totals, self._lap):
                phases.setdefault(name, Phase()).add(use)

    def lap(self) -> dict[str, float]:
        """`phase/<name>/seconds` since the last lap, ready to be logged; and `peak_gib`."""
        lap, self._lap = self._lap, {}
        values = {f"phase/{name}/seconds": phase.seconds for name, phase in lap.items()}
        peaks = {f"phase/{n}/peak_gib": p.peak_bytes / GIB for n, p in lap.items() if p.peak_bytes}
        return values | peaks

    def shares(self) -> dict[str, float]:
        """Each phase's share of all seconds; they sum to 1."""
        total = sum(phase.seconds for phase in self.totals.values())
        return {
            name: phase.seconds / total if total else 0.0 for name, phase in self.totals.items()
        }

    def tokens_per_second(self) -> dict[str, float]:
        """Of every phase that counted tokens."""
        return {
            name: phase.tokens / phase.seconds
            for name, phase in self.totals.items()
            if phase.tokens and phase.seconds
        }

    def to_dict(self) -> dict[str, dict[str, float]]:
        """`{name: {"seconds": ..., "tokens": ..., "peak_bytes": ...}}`, for a summary.json."""
        return {
            name: {key: value for key, value in vars(phase).items() if key != "peak_bytes" or value}
            for name, phase in self.totals.items()
        }

    def state(self) -> State:
        """What was used until now, so that a resumed run sums up all of itself."""
        laps = {name: vars(phase).copy() for name, phase in self._lap.items()}
        return {"totals": self.to_dict(), "lap": laps}

    def load_state(self, state: State) -> None:
        self.totals = {name: Phase(**used) for name, used in state["totals"].items()}
        self._lap = {name: Phase(**used) for name, used in state["lap"].items()}


def _synchronize() -> None:
    """Wait for the GPU: kernels run behind the clock, and would be billed to the next phase."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


_peaks = {"allocated": 0, "reserved": 0}
"""Bytes, before torch's own peaks were last begun anew."""


def _new_peak() -> int:
    """The most bytes allocated since the last call; 0 without a GPU."""
    import torch

    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return 0
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    _peaks["allocated"] = max(_peaks["allocated"], allocated)
    _peaks["reserved"] = max(_peaks["reserved"], reserved)
    torch.cuda.reset_peak_memory_stats()
    return allocated


def peak_memory() -> dict[str, int]:
    """The most bytes that this process had `allocated`, and `reserved`, on its GPU; 0 without."""
    _new_peak()
    return dict(_peaks)


def _number(key: str, value: Any) -> float | int:
    require(key not in RESERVED, f"metric {key!r} has a reserved name; choose another")
    try:
        value = value.item() if hasattr(value, "item") else value
        return value if isinstance(value, int) else float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"metric {key} must be one number, not {value!r}") from error


def _line(step: int, numbers: Mapping[str, float]) -> str:
    nonfinite = {key: str(value) for key, value in numbers.items() if not math.isfinite(value)}
    row: dict[str, Any] = {"step": int(step), "time": round(time.time(), 3)}
    row |= {key: None if key in nonfinite else value for key, value in numbers.items()}
    if nonfinite:
        row["nonfinite"] = nonfinite
    return json.dumps(row, allow_nan=False)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    return row | {key: float(text) for key, text in row.pop("nonfinite", {}).items()}


def _repair(path: Path, purge_step: int | None) -> None:
    """Drop a torn last line, which would swallow the next one, and the rows to be logged again."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines()
    keep = [
        line
        for line, row in zip(lines, map(_parse, lines), strict=True)
        if row is not None and (purge_step is None or row["step"] < purge_step)
    ]
    content = b"".join(line + b"\n" for line in keep)
    if content != path.read_bytes():
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(content)
        temporary.replace(path)
