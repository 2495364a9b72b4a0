"""Does the app stand eight users at once? Errors, waiting, and memory over time.

Starts the real app on a run directory in a process of its own and talks to it over HTTP. A third
of the users are scripts (the API's `/call/chat`), a third chat in pages, a third compare in pages
with scores and token colours, as the browser calls Gradio's queue. Every user asks, reads the
stream, thinks for a moment and asks again; one question in eight is given up in the middle, as by
a closed page; after three turns a page is left and another one opened. At the end everybody has
left and one more question has to be answered at once: the queue is not stuck.

Before the clock runs, there are as many conversations and comparisons as the app remembers, so
that memory is seen full. It is flat where the 95 % interval of its slope, over the last two thirds
of the run, ends below one percent in ten minutes. The exit code is 1 after an error, a stuck
answer or growth.

    python benchmarks/app_load.py RUN_DIR [--users 8] [--minutes 10]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from app_users import KINDS, Seen, Site, User

from rlhf_kit.pipeline import commit

RESULT = Path(__file__).parent / "results" / "app_load.json"
REMEMBERED = 256
"""Pages and scripts that the app remembers: MOST in apps/sessions.py."""
COMPARISONS = 128
"""Comparisons that it remembers, with answers and scores: kept in apps/limits.py."""
BLOCKS, STUDENT_8 = 10, 2.306
"""Means that the slope is fitted to, and the 97.5 % quantile of Student's t for 8 degrees of
freedom. Means of 40 s and more are independent of each other, single samples are not."""
FLAT = 0.01
"""Share of the memory that it may grow by in ten minutes."""


@dataclass(frozen=True)
class Sample:
    """The server's process at one moment."""

    seconds: float
    rss_mb: float
    threads: int
    files: int


@contextlib.contextmanager
def server(run_dir: Path) -> Iterator[tuple[str, int]]:
    """The app in a process of its own: its address and process id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "rlhf_kit.cli", "app", str(run_dir), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if "http://" in line), None)
        if line is None:
            raise SystemExit(f"the app did not start; exit code {process.wait()}")
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait(30)


def watch(pid: int, begin: float, until: float, samples: list[Sample]) -> None:
    while time.monotonic() < until:
        samples.append(look(pid, time.monotonic() - begin))
        time.sleep(1)


def look(pid: int, seconds: float) -> Sample:
    status = Path(f"/proc/{pid}/status").read_text()
    values = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    rss = int(values["VmRSS"].split()[0]) / 1024
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return Sample(round(seconds, 1), round(rss, 1), int(values["Threads"]), files)


def growth(samples: Sequence[Sample]) -> dict[str, Any]:
    """The least-squares slope of memory over the last two thirds, with its 95 % interval."""
    late = samples[len(samples) // 3 :]
    size = len(late) // BLOCKS
    if size == 0:
        raise SystemExit("the run is too short for a slope")
    blocks = [late[i * size : (i + 1) * size] for i in range(BLOCKS)]
    x = [statistics.fmean(s.seconds for s in block) / 600 for block in blocks]
    y = [statistics.fmean(s.rss_mb for s in block) for block in blocks]
    line = statistics.linear_regression(x, y)
    spread = sum((b - line.slope * a - line.intercept) ** 2 for a, b in zip(x, y, strict=True))
    middle = statistics.fmean(x)
    error = (spread / (BLOCKS - 2) / sum((a - middle) ** 2 for a in x)) ** 0.5
    high, mean = line.slope + STUDENT_8 * error, statistics.fmean(y)
    return {
        "from_second": late[0].seconds,
        "mean_mb": round(mean, 1),
        "mb_per_10_minutes": round(line.slope, 2),
        "interval_95": [round(line.slope - STUDENT_8 * error, 2), round(high, 2)],
        "is_flat": high < FLAT * mean,
    }


def fill(site: Site, users: int) -> Seen:
    """Chat and compare until the app remembers as much as it ever does."""
    seen = Seen()

    def until(answers: int, kind: str, users: int) -> None:
        def done() -> bool:
            return len(seen.seconds[kind]) >= answers or bool(seen.errors + seen.stuck)

        numbers = [KINDS.index(kind) + i * len(KINDS) for i in range(users)]
        with ThreadPoolExecutor(users) as pool:
            list(pool.map(lambda number: User(number, site, seen).run(done), numbers))

    until(3 * REMEMBERED, "chat", users)  # a page has three turns
    # A comparison is two answers at once, and the app refuses more than 16.
    until(COMPARISONS, "compare", max(users // 2, 1))
    return seen


def quantiles(values: list[float]) -> dict[str, float | None]:
    if not values:
        return dict.fromkeys(("p50", "p95", "max"))
    ordered = sorted(values)
    return {
        "p50": round(statistics.median(ordered), 3),
        "p95": round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 3),
        "max": round(ordered[-1], 3),
    }


def measure(run_dir: Path, users: int, seconds: float) -> dict[str, Any]:
    samples = list[Sample]()
    question = [{"role": "user", "content": "Hi!"}], ("", 0.9, 0.95, 16, 0)
    with server(run_dir) as (address, pid):
        site = Site(address)
        for checkpoint in site.checkpoints:  # imports and first loads are no part of the question
            list(site.ask(checkpoint, *question))
        filled = fill(site, users)
        seen = Seen(errors=filled.errors, stuck=filled.stuck)
        begin = time.monotonic()
        until = begin + seconds
        threads = [
            threading.Thread(
                target=User(number, site, seen).run, args=(lambda: time.monotonic() > until,)
            )
            for number in range(users)
        ]
        threads.append(threading.Thread(target=watch, args=(pid, begin, until, samples)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.monotonic() - begin
        begin = time.monotonic()
        list(site.ask(site.checkpoints[-1], *question))
        last = time.monotonic() - begin
    return {
        "users": users,
        "seconds": round(took, 1),
        "answers": {kind: len(found) for kind, found in seen.seconds.items()},
        "given_up": len(seen.given_up),
        "errors": seen.errors,
        "stuck": seen.stuck,
        "first_token_seconds": quantiles(seen.first_token),
        "answer_seconds": {kind: quantiles(found) for kind, found in seen.seconds.items()},
        "tokens_per_second": round(sum(seen.tokens) / took, 1),
        "answer_seconds_when_all_have_left": round(last, 3),
        "memory": growth(samples),
        "threads": [min(s.threads for s in samples), max(s.threads for s in samples)],
        "open_files": [min(s.files for s in samples), max(s.files for s in samples)],
        "rss_mb_every_10_seconds": [
            round(statistics.fmean(s.rss_mb for s in samples[i : i + 10]))
            for i in range(0, len(samples), 10)
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    result = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("gradio", "torch", "transformers")},
        **measure(arguments.run_dir, arguments.users, 60 * arguments.minutes),
    }
    text = json.dumps(result, indent=2)
    # lists of numbers on one line each
    text = re.sub(r"\[\s+([-\d.,\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    arguments.output.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0 if result["memory"]["is_flat"] and not result["errors"] + result["stuck"] else 1


if __name__ == "__main__":
    sys.exit(main())
