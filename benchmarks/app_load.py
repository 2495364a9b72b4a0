"""Does the app stand eight users at once? Errors, waiting, and memory over time.

Starts the real app on a run directory in a process of its own and talks to it through its HTTP
API, as Gradio's Python client does. Every user asks, reads the stream, thinks for a moment and
asks again; one question in eight is given up in the middle, as by a closed page. At the end
everybody has left and one more question has to be answered at once: the queue is not stuck.

    python benchmarks/app_load.py RUN_DIR [--users 8] [--minutes 10]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rlhf_kit import toy_world
from rlhf_kit.pipeline import commit

RESULT = Path(__file__).parent / "results" / "app_load.json"
PATIENCE = 120.0
"""Seconds without a new event after which an answer counts as stuck."""
SAMPLE_SECONDS = 5.0


@dataclass
class Talk:
    """What the users saw, over all of them; lists are appended to from many threads."""

    first_token: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    given_up: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)


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


def user(number: int, address: str, checkpoints: list[str], until: float, talk: Talk) -> None:
    """Ask, read, think, ask again."""
    from gradio_client import Client

    rng = random.Random(number)
    prompts = toy_world.prompts(200, seed=number, split="validation")
    client = Client(address, verbose=False)
    messages: list[dict[str, str]] = []
    while time.monotonic() < until:
        question = prompts[rng.randrange(len(prompts))]["prompt"][-1]
        messages = [*messages, {"role": "user", "content": question["content"]}]
        gives_up = rng.random() < 1 / 8
        try:
            text = ask(
                client, rng.choice(checkpoints), messages, rng.randrange(1000), gives_up, talk
            )
        except TimeoutError:
            talk.stuck.append(f"user {number}: no event for {PATIENCE:g} s")
            text = ""
        except Exception as error:  # whatever a user would see
            talk.errors.append(f"{type(error).__name__}: {str(error)[:200]}")
            text = ""
        # three turns, then a new dialogue; an unanswered question is not kept
        over = not text or len(messages) >= 5
        messages = [] if over else [*messages, {"role": "assistant", "content": text}]
        time.sleep(rng.random() / 2)
    client.close()


def ask(
    client: Any,
    checkpoint: str,
    messages: list[dict[str, str]],
    seed: int,
    gives_up: bool,
    talk: Talk,
) -> str:
    """One question: the answer, or "" where the user gave up in the middle."""
    begin = time.monotonic()
    first = None
    events, last = 0, {}
    job = client.submit(checkpoint, messages, "", 0.9, 0.95, 128, seed, api_name="/chat")
    stuck = threading.Timer(PATIENCE, job.cancel)
    stuck.start()
    try:
        for event in job:
            events, last = events + 1, event
            if first is None and event["tokens"]:
                first = time.monotonic() - begin
                if gives_up:
                    job.cancel()
                    talk.given_up.append(first)
                    return ""
    finally:
        stuck.cancel()
    if time.monotonic() - begin >= PATIENCE:
        raise TimeoutError
    if first is None or not last.get("reason"):
        raise RuntimeError(f"the answer had no end: {job.exception() or last}")
    talk.first_token.append(first)
    talk.seconds.append(time.monotonic() - begin)
    talk.tokens.append(last["tokens"])
    talk.events.append(events)
    return last["text"]


def watch(pid: int, begin: float, until: float, samples: list[Sample]) -> None:
    while time.monotonic() < until:
        samples.append(look(pid, time.monotonic() - begin))
        time.sleep(SAMPLE_SECONDS)


def look(pid: int, seconds: float) -> Sample:
    status = Path(f"/proc/{pid}/status").read_text()
    values = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    rss = int(values["VmRSS"].split()[0]) / 1024
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return Sample(round(seconds, 1), round(rss, 1), int(values["Threads"]), files)


def slope(samples: list[Sample]) -> float:
    """MB a minute of the least-squares line through the second half."""
    late = samples[len(samples) // 2 :]
    if len(late) < 2:
        return 0.0
    return statistics.linear_regression(
        [s.seconds / 60 for s in late], [s.rss_mb for s in late]
    ).slope


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
    from gradio_client import Client

    talk, samples = Talk(), list[Sample]()
    with server(run_dir) as (address, pid):
        client = Client(address, verbose=False)
        checkpoints = [c["id"] for c in client.predict(api_name="/checkpoints") if c["complete"]]
        for checkpoint in checkpoints:  # imports and first loads are no part of the question
            ask(client, checkpoint, [{"role": "user", "content": "Hi!"}], 0, False, Talk())
        begin = time.monotonic()
        until = begin + seconds
        threads = [
            threading.Thread(target=user, args=(n, address, checkpoints, until, talk))
            for n in range(users)
        ]
        threads.append(threading.Thread(target=watch, args=(pid, begin, until, samples)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.monotonic() - begin
        after = Talk()
        ask(client, checkpoints[-1], [{"role": "user", "content": "Hi!"}], 0, False, after)
        samples.append(look(pid, time.monotonic() - begin))
        client.close()
    rss = [sample.rss_mb for sample in samples]
    return {
        "users": users,
        "seconds": round(took, 1),
        "answers": len(talk.seconds),
        "given_up": len(talk.given_up),
        "errors": talk.errors,
        "stuck": talk.stuck,
        "first_token_seconds": quantiles(talk.first_token + talk.given_up),
        "answer_seconds": quantiles(talk.seconds),
        "tokens_per_second": round(sum(talk.tokens) / took, 1),
        "events_per_answer": round(statistics.fmean(talk.events or [0]), 1),
        "first_token_seconds_when_all_have_left": quantiles(after.first_token)["max"],
        "rss_mb": {
            "first": rss[0],
            "last": rss[-1],
            "peak": max(rss),
            "slope_mb_per_minute": round(slope(samples), 2),
        },
        "threads": [min(s.threads for s in samples), max(s.threads for s in samples)],
        "open_files": [min(s.files for s in samples), max(s.files for s in samples)],
        "samples": [vars(sample) for sample in samples],
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
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in result.items() if k != "samples"}, indent=2))
    good = not result["errors"] and not result["stuck"]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
