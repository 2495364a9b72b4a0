"""One rank of a launched notebook: what it records, and how it ends when another one fails.

Ranks are started as a launcher would, by their variables, but without one: nothing here needs
torch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_kit import heartbeat, rank_process
from rlhf_kit.heartbeat import Heartbeat

NOTEBOOK = """\
# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A notebook

# %% tags=["parameters"]
fault: str = "none"  # what goes wrong, on rank 1
rounds: int = 60  # how many

# %%
from rlhf_kit import launch

launch.read_flags(globals())

# %%
import os
import pickle
import sys
import time

rank = int(os.environ["RANK"])
print(f"rank {rank}: {rounds} rounds", flush=True)
print("a warning", file=sys.stderr)


# %%
class Picture:
    def _repr_png_(self):
        return b"png"


picture = pickle.loads(pickle.dumps(Picture()))
picture if launch.keeps_figures() else print("no figures")

# %%
picture;

# %%
from pathlib import Path

FAULTS = ("error", "refused", "killed", "stopped")
standing = Path(__file__).with_name("standing")
while rank == 1 and fault in FAULTS and not standing.exists():
    time.sleep(0.02)
if fault == "error" and rank == 1:
    raise RuntimeError("boom")
if fault == "refused" and rank == 1:
    raise ValueError("sixty rounds are too many")
if fault == "killed" and rank == 1:
    os.kill(os.getpid(), 9)


def frozen():
    os.kill(os.getpid(), 19)  # SIGSTOP


if fault == "stopped" and rank == 1:
    frozen()

# %%
if fault == "save":
    print("waiting", flush=True)
    import signal

    sys.exit(128 + signal.sigwait([signal.SIGTERM]))


def busy():
    standing.touch()
    while True:
        time.sleep(60)


if fault != "none":
    busy()
print("done")
"""
START = """\
import sys
import rlhf_kit.heartbeat as heartbeat
import rlhf_kit.rank_process as process
heartbeat.BEAT = 0.1
process.POLL, process.GRACE, process.STOPPED_FOR = 0.05, 0.3, 0.4
sys.exit(process.main(sys.argv[1:]))
"""


@pytest.fixture
def start(tmp_path: Path) -> Any:
    """Start one rank of two; their directory is tmp_path / "logs"."""
    script = tmp_path / "demo.py"
    script.write_text(NOTEBOOK)

    def rank(
        number: int, *flags: str, options: tuple[str, ...] = (), **variables: str
    ) -> subprocess.Popen:
        words = [*options, str(tmp_path / "logs"), "one", str(script), *flags]
        return subprocess.Popen(
            [sys.executable, "-c", START, *words],
            env={
                **os.environ,
                "RANK": str(number),
                "WORLD_SIZE": "2",
                "LOCAL_SIZE": "2",
                **variables,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return rank


def end_of(ranks: list[subprocess.Popen]) -> list[tuple[int, str]]:
    ends = []
    for rank in ranks:
        out, err = rank.communicate(timeout=60)
        assert err == "", err
        ends.append((rank.returncode, out))
    return ends


def test_every_rank_logs_and_the_main_one_records_the_notebook(start: Any, tmp_path: Path):
    ends = end_of([start(0, "--rounds=7"), start(1, "--rounds=7")])
    assert ends == [(0, "rank 0: 7 rounds\na warning\ndone\n"), (0, "")]
    first, *rest = (tmp_path / "logs" / "rank-1.log").read_text().splitlines()
    assert first.startswith("== 20") and " demo.py rank 1 of 2 on " in first
    assert rest == ["rank 1: 7 rounds", "a warning", "no figures", "done"]

    notebook = json.loads((tmp_path / "demo.ipynb").read_text())
    assert notebook["metadata"]["rlhf_kit"]["ranks"] == 2
    assert "finished" in notebook["metadata"]["rlhf_kit"]
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    given = cells[1]
    assert given["metadata"]["tags"] == ["injected-parameters"]
    assert "".join(given["source"]).endswith("rounds = 7")
    assert cells[3]["outputs"] == [
        {"name": "stdout", "output_type": "stream", "text": ["rank 0: 7 rounds\n"]}
    ]
    (picture,) = cells[4]["outputs"]
    assert picture["data"]["image/png"] == "cG5n"  # base64 of b"png"
    assert cells[5]["outputs"] == []  # its last line ends with a semicolon


@pytest.mark.parametrize(
    ("fault", "code", "first"),
    [
        ("error", 1, "rank 1 on {host} stopped with exit code 1, before all others; its last"),
        (
            "killed",
            137,
            "rank 1 on {host} was ended by SIGKILL, as it happens when memory runs out",
        ),
        ("refused", 2, "rank 1 on {host}: sixty rounds are too many"),
    ],
)
def test_the_first_rank_that_fails_ends_the_others_and_is_named(
    fault: str, code: int, first: str, start: Any, tmp_path: Path, capsys: Any
):
    (main, _), (other, _) = end_of([start(0, f"--fault={fault}"), start(1, f"--fault={fault}")])
    assert (main, other) == (1, code)
    assert rank_process.report(tmp_path / "logs", "one") == (2 if fault == "refused" else 1)
    err = capsys.readouterr().err
    assert err.startswith(f"error: {first.format(host=os.uname().nodename)}")
    where = f"The logs of all ranks are in {tmp_path / 'logs'}.\n"
    assert err.endswith(where) == (fault != "refused")
    if fault == "error":
        assert "rank-1" not in err and "RuntimeError: boom" in err and "cell_runner" not in err
    # The one that was ended says where it stood, in the notebook's own lines.
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    first = NOTEBOOK[: NOTEBOOK.index("    standing.touch()")].count("\n") + 1
    assert any(f'demo.py", line {first + i} in busy' in log for i in range(3)), log
    assert "== ended, because another rank has failed" in log
    # What it came to is there, without an end.
    notebook = json.loads((tmp_path / "demo.ipynb").read_text())
    assert "finished" not in notebook["metadata"]["rlhf_kit"]


def test_a_rank_that_is_stopped_ends_the_others_and_says_where_it_stood(
    start: Any, tmp_path: Path, capsys: Any
):
    (main, _), (other, _) = end_of([start(n, "--fault=stopped") for n in range(2)])
    assert (main, other) == (1, 1)
    assert rank_process.report(tmp_path / "logs", "one") == 3
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.startswith("error: rank 1 on ")
    assert first.endswith(": it was stopped (SIGSTOP) and did not go on for 0.4 s")
    where = rest.index("rank 1 stood here:") + 1
    assert "demo.py" in rest[where] and rest[where].endswith(" in frozen")


def test_a_rank_that_is_stopped_for_a_moment_goes_on(start: Any, tmp_path: Path):
    rank = start(0, "--fault=save")
    while rank.stdout.readline() != "waiting\n":
        assert rank.poll() is None
    (child,) = children(rank.pid)
    os.kill(child, signal.SIGSTOP)
    time.sleep(0.15)
    os.kill(child, signal.SIGCONT)
    time.sleep(0.5)
    rank.send_signal(signal.SIGTERM)
    assert rank.wait(30) == 143
    rank.communicate()


def children(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# ---- hosts


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Heartbeat]:
    """The heart of a host by its first rank, two ranks a host of six; it beats whenever asked."""
    monkeypatch.setattr(heartbeat, "BEAT", 15.0)  # three looks are 45 s
    monkeypatch.setattr(heartbeat.time, "monotonic", iter(range(0, 10**6, 15)).__next__)

    def host(rank: int) -> Heartbeat:
        names = {"RANK": rank, "LOCAL_RANK": rank % 2, "LOCAL_SIZE": 2, "WORLD_SIZE": 6}
        for name, value in names.items():
            monkeypatch.setenv(name, str(value))
        return Heartbeat(tmp_path, "one")

    return host


def test_a_host_that_falls_silent_is_named_and_one_that_ends_is_not(
    hosts: Callable[[int], Heartbeat],
):
    alpha, beta, gamma = hosts(0), hosts(2), hosts(4)
    for _ in range(5):
        assert [host.beat() for host in (alpha, beta, gamma)] == [None] * 3
    beta.end()
    said = [(alpha.beat(), alpha.beat(), gamma.beat()) for _ in range(5)]
    assert said == [(None, None, None)] * 5  # gamma is heard, beta is not missed
    # The first look of these finds something new.
    assert [alpha.beat() for _ in range(4)] == [None, None, None, (4, os.uname().nodename)]


def test_silence_is_counted_in_looks(hosts: Callable[[int], Heartbeat], tmp_path: Path):
    alpha, beta = hosts(0), hosts(2)
    assert beta.beat() is alpha.beat() is None
    for _ in range(1000):
        heartbeat.time.monotonic()  # all were suspended for hours
    assert beta.beat() is alpha.beat() is None
    (tmp_path / "alive-one-2.json").write_text("")  # beta is writing
    assert alpha.beat() is None


def test_only_the_first_rank_of_several_hosts_gives_signs(
    hosts: Callable[[int], Heartbeat], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    hosts(1).beat()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    Heartbeat(tmp_path, "one").beat()
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv(heartbeat.TIMEOUT_VARIABLE, "0")
    Heartbeat(tmp_path, "one").beat()
    assert not list(tmp_path.iterdir())


def test_a_silent_host_ends_the_ranks_of_the_others(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "alive-one-1.json").write_text('{"rank": 1, "host": "beta", "beat": 7}')
    monkeypatch.setenv(heartbeat.TIMEOUT_VARIABLE, "0.4")
    rank = start(0, "--fault=error", LOCAL_SIZE="1")  # waits for rank 1
    assert end_of([rank])[0][0] == 1
    assert rank_process.report(logs, "one") == 3
    assert capsys.readouterr().err.startswith(
        "error: rank 1 on beta: nothing was heard of its host for 0.4 s: it is down, or does"
    )
    assert not (logs / "alive-one-0.json").exists()


def test_a_rank_that_others_lost_is_shown_where_it_stood(tmp_path: Path, capsys: Any):
    (tmp_path / "failure-x.json").write_text(
        json.dumps({"rank": 0, "host": "a", "code": 3, "sentence": "rank 0 lost another rank"})
    )
    (tmp_path / "rank-0.log").write_text("== 2026 x\nerror: rank 0 lost another rank\n")
    (tmp_path / "rank-1.log").write_text(
        "== 2026 x\nThread 0x1 (most recent call first):\n" + "  File here\n" * 4 + "== ended\n"
    )
    assert rank_process.report(tmp_path, "x") == 3
    assert capsys.readouterr().err.splitlines() == [
        "rank 1 stood here:",
        *["    File here"] * 3,
        f"The logs of all ranks are in {tmp_path}.",
    ]


def test_a_rank_that_was_asked_to_stop_has_not_failed(start: Any, tmp_path: Path):
    rank = start(0, "--fault=save")
    while rank.stdout.readline() != "waiting\n":
        assert rank.poll() is None
    rank.send_signal(signal.SIGTERM)
    assert rank.wait(30) == 143
    rank.communicate()
    assert not list((tmp_path / "logs").glob("failure-*"))
    assert rank_process.report(tmp_path / "logs", "one") == 0


def test_a_rank_ends_when_its_launcher_is_gone(tmp_path: Path, start: Any):
    code = (  # a launcher that ends when its rank has begun
        "import pathlib, subprocess, sys, time\n"
        "subprocess.Popen(sys.argv[2:], stdout=sys.stdout, stderr=sys.stdout)\n"
        "log = pathlib.Path(sys.argv[1])\n"
        "while not log.exists() or 'rounds' not in log.read_text():\n"
        "    time.sleep(0.02)\n"
    )
    log = tmp_path / "logs" / "rank-1.log"
    script = tmp_path / "demo.py"
    words = [str(tmp_path / "logs"), "one", str(script), "--fault=wait"]
    launcher = subprocess.run(
        [sys.executable, "-c", code, str(log), sys.executable, "-c", START, *words],
        env={**os.environ, "RANK": "1", "WORLD_SIZE": "2"},
        stdout=subprocess.PIPE,  # read to its end, which comes when the rank is gone
        timeout=60,
        check=True,
    )
    assert launcher.stdout == b""
    assert "because the launcher is gone" in log.read_text()


@pytest.mark.parametrize(
    ("options", "seen"), [(("--devices=none",), ""), (("--devices=4,5",), "4,5"), ((), "0,1")]
)
def test_a_rank_sees_the_devices_it_was_given(
    options: tuple[str, ...], seen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # as a launcher that counts from 0
    monkeypatch.setenv("LOCAL_SIZE", "1000")
    devices = options[0].partition("=")[2] if options else rank_process.LAUNCHERS_DEVICES
    environment = rank_process._environment(
        "log", 0, tmp_path / "failure", tmp_path / "demo.py", devices
    )
    assert environment["CUDA_VISIBLE_DEVICES"] == seen
    assert environment["RLHF_KIT_RECORD"] == str(tmp_path / "demo.ipynb")
