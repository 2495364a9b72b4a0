"""One rank of a launched notebook: its log, and its end when another rank has failed.

A launcher starts `python -m rlhf_kit.rank_process DIRECTORY ID SCRIPT [--NAME value ...]` once a
rank, with RANK and the like set. This process needs no torch: it starts the notebook's script in
a child, writes all that the child prints to DIRECTORY/rank-K.log (the main rank's to the screen
as well) and watches DIRECTORY/failure-ID.json. The first rank that fails writes that file; within
seconds of it every other one ends, on whatever host, in whatever collective it waits.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from rlhf_kit.cell_runner import (
    FAILURE_VARIABLE,
    GOOD_ENDINGS,
    note_failure,
)
from rlhf_kit.heartbeat import Heartbeat
from rlhf_kit.launch import LOG_VARIABLE, RECORD_VARIABLE
from rlhf_kit.pipeline import ending

POLL, GRACE = 0.5, 5.0
"""Seconds between two looks at the failure file; seconds to end by oneself once it is there."""
STOPPED_FOR = 30.0
"""Seconds that a rank may be stopped (SIGSTOP) until it counts as hung."""
LAST_LINES = 25
ENDED = "== ended"
INNERMOST_FIRST = "(most recent call first):"
LOST = 3
"""The exit code of `faults`; a rank that lost another one ends with it."""
NO_DEVICES, LAUNCHERS_DEVICES = "none", "launcher"


def supervise(directory: Path, identity: str, script: Path, flags: list[str], devices: str) -> int:
    """Run the script as this rank; its exit code, 128 + n where signal n ended it."""
    rank, launcher = int(os.environ["RANK"]), os.getppid()
    failure = directory / f"failure-{identity}.json"
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / f"rank-{rank}.log", "a", encoding="utf-8") as log:
        environment = _environment(log.name, rank, failure, script, devices)
        where = f"rank {rank} of {os.environ['WORLD_SIZE']} on {socket.gethostname()}"
        print(
            f"== {time.strftime('%Y-%m-%d %H:%M:%S')} {script.name} {where}", file=log, flush=True
        )
        # Inherited, until the script can save: a request to save kills by default.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        child = subprocess.Popen(
            [sys.executable, "-u", "-m", "rlhf_kit.cell_runner", str(script), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        asked: set[int] = set()
        _pass_on_signals(child, asked)
        screen = sys.stdout if rank == 0 else None
        tee = threading.Thread(target=_tee, args=(child.stdout, screen, log))
        tee.start()
        heartbeat = Heartbeat(directory, identity)
        code = _wait(child, failure, log, launcher, heartbeat)
        heartbeat.end()
        tee.join()
    if code < 0:
        code = 128 - code
    stopped = code - 128 in asked
    if code not in GOOD_ENDINGS and not stopped:
        note_failure(failure, code, None)
    return code


def _environment(log: str, rank: int, failure: Path, script: Path, devices: str) -> dict[str, str]:
    ranks_here = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", 1)))
    environment = {
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // ranks_here, 1)),
        **os.environ,
        "MPLBACKEND": "Agg",
        "PYTHONUNBUFFERED": "1",
        LOG_VARIABLE: log,
        FAILURE_VARIABLE: str(failure),
    }
    if rank == 0:
        environment[RECORD_VARIABLE] = str(script.with_suffix(".ipynb"))
    if devices != LAUNCHERS_DEVICES:  # the launcher counts from 0, whatever a scheduler gave us
        environment["CUDA_VISIBLE_DEVICES"] = "" if devices == NO_DEVICES else devices
    return environment


def _pass_on_signals(child: subprocess.Popen, asked: set[int]) -> None:
    def pass_on(number: int, _: Any) -> None:
        asked.add(number)
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGUSR1, pass_on)
    # A terminal sends Ctrl-C to the child as well.
    signal.signal(signal.SIGINT, lambda number, _: asked.add(number))


def _tee(pipe: IO[bytes], screen: IO[str] | None, log: IO[str]) -> None:
    """Pass on what comes at once; log whole lines, a progress bar as it stood at the end."""
    line = b""
    while chunk := os.read(pipe.fileno(), 65536):
        if screen is not None:
            with contextlib.suppress(OSError):  # a reader that has seen enough ends no training
                os.write(screen.fileno(), chunk)
        *complete, line = (line + chunk).split(b"\n")
        _log(complete, log)
    _log([line] if line else [], log)


def _log(lines: list[bytes], log: IO[str]) -> None:
    texts = [line.rsplit(b"\r", 1)[-1].decode("utf-8", "replace") for line in lines]
    with contextlib.suppress(OSError):  # a full disk
        log.writelines(f"{text}\n" for text in texts)
        log.flush()


def _wait(
    child: subprocess.Popen, failure: Path, log: IO[str], launcher: int, heartbeat: Heartbeat
) -> int:
    """The child's exit code, after ending it where another rank or the launcher is gone."""
    reason, looks = "", 0
    while not reason and child.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(POLL)
        looks = looks + 1 if _is_stopped(child) else 0
        silent = heartbeat.beat()
        if looks * POLL >= STOPPED_FOR:
            reason = f"it was stopped (SIGSTOP) and did not go on for {STOPPED_FOR:g} s"
            note_failure(failure, LOST, reason)
        elif silent is not None:
            reason = "another host is silent"
            said = (
                f"nothing was heard of its host for {heartbeat.timeout:g} s: it is down, or does "
                "not reach the run directory any more"
            )
            note_failure(failure, LOST, said, *silent)
        elif failure.exists():
            reason = "another rank has failed"
        elif os.getppid() != launcher:
            reason = "the launcher is gone"
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(GRACE)
    if child.poll() is None:
        child.send_signal(signal.SIGUSR2)  # says where it stands
        child.send_signal(signal.SIGCONT)  # to hear it, where it was stopped
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(POLL)
        child.kill()
    elif not reason or child.returncode != -signal.SIGTERM:  # by itself
        return child.returncode
    child.wait()
    _log([f"{ENDED}, because {reason}; the lines above say where it stood".encode()], log)
    return 1


def _is_stopped(child: subprocess.Popen) -> bool:
    """Whether the child is stopped now, by a signal; a debugger's hold is another state."""
    look = os.WSTOPPED | os.WNOHANG | os.WNOWAIT
    with contextlib.suppress(ChildProcessError):
        return os.waitid(os.P_PID, child.pid, look) is not None
    return False


def report(directory: Path, identity: str) -> int:
    """Say on stderr which rank failed first, and how; the exit code of all, 0 where none did."""
    try:
        failure = json.loads((directory / f"failure-{identity}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0
    rank, code = failure["rank"], failure["code"]
    who = f"rank {rank} on {failure['host']}"
    if failure["sentence"]:
        # What the main rank says is on the screen already.
        if rank and f"error: {failure['sentence']}" not in _last_lines(directory / "rank-0.log"):
            print(f"error: {who}: {failure['sentence']}", file=sys.stderr)
        if code == LOST:
            _report_hung(directory)
    else:
        words = ending(128 - code if code > 128 else code)
        print(f"error: {who} {words}, before all others; its last lines:", file=sys.stderr)
        for line in _last_lines(directory / f"rank-{rank}.log"):
            print(f"  {line}", file=sys.stderr)
    if code != 2:  # a refusal is its sentence, and of a run that never began nothing stays
        print(f"The logs of all ranks are in {directory}.", file=sys.stderr)
    return code if code in (2, 3) else 1


def _report_hung(directory: Path) -> None:
    """Show where the ranks stood that did not end by themselves when another one had failed."""
    for log in sorted(directory.glob("rank-*.log"), key=lambda path: int(path.stem[5:])):
        lines = _last_lines(log)
        if not lines or not lines[-1].startswith(ENDED):
            continue
        heads = [number for number, line in enumerate(lines) if line.endswith(INNERMOST_FIRST)]
        print(f"{log.stem.replace('-', ' ')} stood here:", file=sys.stderr)
        for line in lines[heads[-1] + 1 if heads else 0 : -1][:3]:
            print(f"  {line}", file=sys.stderr)


def _last_lines(log: Path) -> list[str]:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("== 2")]
    return lines[starts[-1] + 1 if starts else 0 :][-LAST_LINES:]


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m rlhf_kit.rank_process")
    parser.add_argument("--devices", default=LAUNCHERS_DEVICES)
    parser.add_argument("--report", action="store_true", help="only say which rank failed first")
    parser.add_argument("directory", type=Path)
    parser.add_argument("identity")
    parser.add_argument("script", type=Path, nargs="?")
    parser.add_argument("flags", nargs=argparse.REMAINDER)
    given = parser.parse_args(words)
    if given.report:
        return report(given.directory, given.identity)
    return supervise(given.directory, given.identity, given.script, given.flags, given.devices)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
