"""Launching on many ranks: what is refused, what is planned, and what really starts.

Launchers are the real ones; other hosts and SLURM are played by scripts of the names that DeepSpeed
and the batch script call (pdsh, ssh, sbatch, srun, scontrol), all on this host.
"""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_kit import cli, cluster
from rlhf_kit.hostfile import read_hostfile

NOTEBOOK = """\
# %% tags=["parameters"]
run_dir: str = "."  # where results go
iterations: int = 60  # rounds
name: str = "none"  # anything

# %%
from rlhf_kit import launch

launch.read_flags(globals())

# %%
import os

rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
place = os.environ["LOCAL_RANK"], os.environ.get("CUDA_VISIBLE_DEVICES")
print(f"rank {rank} of {ranks}, {place}: {iterations} {name}", flush=True)
from pathlib import Path
import time

standing = Path(run_dir, "standing")
if iterations == 13 and rank == 1:
    while not standing.exists():
        time.sleep(0.02)
    os.kill(os.getpid(), 9)
while iterations in (13, 14):
    standing.touch()
    time.sleep(0.02)
"""
FAKES = {
    # pdsh: the command on every host, with its number for %n, as many at once.
    "pdsh": """
import subprocess, sys
hosts = sys.argv[sys.argv.index("-w") + 1].split(",")
words = " ".join(sys.argv[sys.argv.index("-w") + 2 :])
runs = [subprocess.Popen(["sh", "-c", words.replace("%n", str(n))]) for n in range(len(hosts))]
sys.exit(max(run.wait() for run in runs))
""",
    "ssh": """
import sys
sys.exit("gone" in sys.argv)
""",
    # sbatch: runs the batch script, as job 7 of two nodes.
    "sbatch": """
import os, subprocess, sys
os.environ |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[0-1]"}
sys.exit(subprocess.call(["bash", sys.argv[1]]))
""",
    # At once: who reads it takes the first line and is gone.
    "scontrol": r"import os; os.write(1, b'127.0.0.1\nnode1\n')",
    "srun": """
import os, subprocess, sys
words = [word for word in sys.argv[1:] if not word.startswith("--")]
runs = [subprocess.Popen(words, env={**os.environ, "SLURM_NODEID": str(n)}) for n in range(2)]
sys.exit(max(run.wait() for run in runs))
""",
}


@pytest.fixture
def notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "01_demo.py"
    path.write_text(NOTEBOOK)
    return path


@pytest.fixture
def other_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "bin"
    directory.mkdir()
    for name, source in FAKES.items():
        (directory / name).write_text(f"#!{sys.executable}\n{source}")
        (directory / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")


def logs(directory: Path) -> list[str]:
    """What each rank printed, without the line that names it."""
    found = sorted((directory / "logs" / "01_demo").glob("rank-*.log"))
    return [log.read_text().split("\n", 1)[1] for log in found]


# ---- what is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a notebook to launch; rlhf-kit launch --help"),
        (["x.py"], "there is no notebook"),
        (["01_demo.py", "--", "--iteration", "5"], "unknown parameter iteration; did you mean"),
        (["01_demo.py", "--", "--iterations", "x"], "--iterations must be of type int, not 'x'"),
        (["01_demo.py"], "no GPU is visible on this host; add --num-gpus 0 --num-ranks 2"),
        (["01_demo.py", "--num-gpus", "-1"], "--num-gpus must be 0 or more, not -1"),
        (["01_demo.py", "--num-gpus=0", "--num-ranks=0"], "--num-ranks must be 1 or more, not 0"),
        (["01_demo.py", "--num-ranks=2"], "--num-ranks is for ranks on the CPU; add --num-gpus 0"),
        (["01_demo.py", "--nodes=2", "--time=1"], "--nodes, --time can only be used with --slurm"),
        (["01_demo.py", "--slurm", "--master-port=1"], "--master-port can only be used with --ho"),
        (["01_demo.py", "--slurm"], "--slurm needs --num-gpus: how many GPUs of each node"),
        (["01_demo.py", "--slurm", "--num-gpus=2"], "there is no sbatch on this host"),
        (["01_demo.py", "--slurm", "--num-gpus=2", "--sbatch=x"], "write --sbatch=--name=value"),
        (["01_demo.py", "--hostfile", "hosts"], "there is no hostfile hosts"),
    ],
)
def test_a_launch_that_can_not_work_is_one_sentence_and_starts_nothing(
    words: list[str], message: str, notebook: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.setattr(cluster, "visible_gpus", lambda: 0)
    monkeypatch.setattr(subprocess, "Popen", None)
    assert cli.main(["launch", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}") and err.count("\n") == 1
    assert [path.name for path in notebook.parent.iterdir()] == [notebook.name]


def test_no_more_gpus_than_are_visible_are_asked_for(
    notebook: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cluster, "visible_gpus", lambda: 2)
    job = cluster.Job.of(notebook, [])
    with pytest.raises(ValueError, match="--num-gpus is 3, but only 2 visible on this host"):
        cluster.on_this_host(job, num_gpus=3, num_ranks=None)
    # A scheduler's choice of devices reaches the ranks, though the launcher counts from 0.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    command = cluster.on_this_host(job, num_gpus=None, num_ranks=None).command
    (world,) = (word for word in command if word.startswith("--world_info="))
    assert json.loads(base64.urlsafe_b64decode(world.partition("=")[2])) == {"localhost": [0, 1]}
    assert "--devices=4,5" in command


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=2\nb slots\n", "hosts, line 2: write 'host slots=8', not 'b slots'"),
        ("a slots=2 b\n", "hosts, line 1: write 'host slots=8', not 'a slots=2 b'"),
        ("a slots=0\n", "hosts, line 1: write 'host slots=8', not 'a slots=0'"),
        ("a slots=2\n\n# b\na slots=1\n", "hosts, line 4: a is named twice"),
        ("# nobody\n", "the hostfile hosts names no host; write lines like 'host slots=8'"),
    ],
)
def test_a_broken_hostfile_is_refused_with_its_line(text: str, message: str, notebook: Path):
    Path("hosts").write_text(text)
    with pytest.raises(ValueError) as caught:
        read_hostfile("hosts")
    assert str(caught.value) == message


@pytest.mark.usefixtures("other_hosts")
def test_hosts_are_checked_before_anything_starts(notebook: Path, capsys: Any):
    Path("hosts").write_text("alpha slots=2  # fast\ngone slots=4\n")
    assert read_hostfile("hosts") == {"alpha": 2, "gone": 4}
    launch = ["launch", str(notebook), "--hostfile", "hosts"]
    assert cli.main([*launch, "--num-gpus=3"]) == 2
    assert "--num-gpus is 3, but hosts gives alpha 2 slots" in capsys.readouterr().err
    assert cli.main(launch) == 2
    assert "error: ssh does not log in to gone without a password" in capsys.readouterr().err
    Path(".deepspeed_env").write_text("NCCL_DEBUG=INFO\n\n")
    assert cli.main(launch) == 2
    assert ".deepspeed_env, line 2: write NAME=value, not ''" in capsys.readouterr().err
    assert not Path("logs").exists()


# ---- what is planned


def test_the_help_lists_the_notebooks_own_parameters(notebook: Path, capsys: Any):
    assert cli.main(["launch", str(notebook), "--help"]) == 0
    out = capsys.readouterr().out
    assert "--hostfile F" in out and "--iterations  int, default 60\n      rounds" in out


def test_a_slurm_job_is_shown_as_it_would_be_written_and_nothing_is(notebook: Path, capsys: Any):
    words = "--slurm --num-gpus 2 --nodes 2 --partition gpu --time 1:00:00 --account lab --dry-run"
    own = ["--iterations", "5", "--name", "it's"]
    code = cli.main(["launch", str(notebook), *words.split(), "--sbatch=--qos=high", "--", *own])
    assert code == 0
    shown = capsys.readouterr().out.replace(str(notebook.parent), "DIR")
    expected = Path(__file__).parent / "data" / "launch_slurm.txt"
    assert shown.replace(sys.executable, "PYTHON") == expected.read_text()
    assert [path.name for path in notebook.parent.iterdir()] == [notebook.name]


@pytest.mark.parametrize("way", [["--hostfile", "hosts"], ["--slurm", "--num-gpus", "1"]])
def test_a_path_that_a_shell_would_take_apart_is_refused(
    way: list[str], notebook: Path, capsys: Any
):
    Path("hosts").write_text("alpha slots=1\n")
    words = ["launch", str(notebook), *way, "--dry-run", "--", "--run_dir", "it's here"]
    assert cli.main(words) == 2
    assert "it's here/notebooks/01_demo.py can't be passed to other" in capsys.readouterr().err


# ---- what really starts


def test_a_notebook_runs_on_two_ranks_of_this_host(notebook: Path, capfd: Any):
    import jupytext

    twin = notebook.with_suffix(".ipynb")
    jupytext.write(jupytext.read(notebook), twin)
    own = ["--iterations=5", "--name", "$HOME it's", "--run_dir=out"]
    code = cli.main(["launch", str(twin), "--num-gpus=0", "--num-ranks=2", "--", *own])
    out, err = capfd.readouterr()
    result = notebook.parent / "out" / "notebooks" / "01_demo.ipynb"
    assert (code, err) == (0, "")
    assert out == (
        "rank 0 of 2, ('0', ''): 5 $HOME it's\n" + f"The executed notebook is {result}.\n"
    )
    assert (
        "rank 0 of 2, " in result.read_text() and 'name = \\"$HOME it\'s\\"' in result.read_text()
    )
    assert logs(Path("out")) == [f"rank {n} of 2, ('{n}', ''): 5 $HOME it's\n" for n in (0, 1)]
    # What ran can be run again, by hand.
    assert Path("out/notebooks/01_demo.yaml").read_text().startswith("iterations: 5\nname: ")


def test_a_killed_rank_ends_all_and_is_named(notebook: Path, capfd: Any):
    words = ["launch", str(notebook), "--num-gpus=0", "--num-ranks=2", "--", "--iterations=13"]
    assert cli.main(words) == 1
    err = capfd.readouterr().err
    assert err.splitlines()[0].startswith("error: rank 1 on ") and "was ended by SIGKILL" in err
    assert "  rank 1 of 2, ('1', ''): 13 none" in err.splitlines()


def test_ctrl_c_stops_all_ranks_and_is_no_failure(notebook: Path):
    words = ["launch", str(notebook), "--num-gpus=0", "--num-ranks=2", "--", "--iterations=14"]
    launch = subprocess.Popen(
        [sys.executable, "-m", "rlhf_kit.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # as a terminal's foreground job
    )
    assert launch.stdout is not None
    assert launch.stdout.readline().startswith("rank 0 of 2")
    while not all(log.endswith("14 none\n") for log in logs(Path())) or len(logs(Path())) < 2:
        assert launch.poll() is None
    os.killpg(launch.pid, signal.SIGINT)
    _, err = launch.communicate(timeout=60)
    assert launch.returncode == 130
    assert err.strip().splitlines()[-1] == (
        "stopped; the same command goes on from the last checkpoint"
    )


@pytest.mark.usefixtures("other_hosts")
def test_a_notebook_runs_on_the_hosts_of_a_hostfile(notebook: Path, capfd: Any):
    Path("hosts").write_text("alpha slots=1\nbeta slots=1\n")
    words = ["launch", str(notebook), "--hostfile=hosts", "--num-gpus=0", "--", "--iterations=5"]
    assert cli.main(words) == 0, capfd.readouterr().err
    starts = [f"rank {n} of 2, " for n in range(2)]
    assert [log[: len(start)] for log, start in zip(logs(Path()), starts, strict=True)] == starts
    assert all(log.endswith(", ''): 5 none\n") for log in logs(Path()))


@pytest.mark.usefixtures("other_hosts")
def test_a_slurm_job_gives_each_node_its_number_and_names_the_rank_that_failed(
    notebook: Path, capfd: Any
):
    words = "--slurm --num-gpus 0 --num-ranks 1 --nodes 2 -- --iterations 13"
    assert cli.main(["launch", str(notebook), *words.split()]) == 1
    out, err = capfd.readouterr()
    assert out.startswith("rank 0 of 2, ('0', ''): 13 none\n")
    assert err.startswith("error: rank 1 on ") and "('0', ''): 13 none\n" in err


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_plain_launchers_take_the_notebook_as_it_is(launcher: str, notebook: Path):
    command: dict[str, Callable[[], list[str]]] = {
        "torchrun": lambda: ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
        "deepspeed": lambda: ["deepspeed.launcher.runner", "--num_accelerators=2"],
    }
    words = [sys.executable, "-m", *command[launcher](), str(notebook), "--iterations=5"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    # Both ranks write to one pipe, where the ends of their lines may change places.
    assert sorted(re.findall(r"rank (\d) of 2, ", done.stdout)) == ["0", "1"]
    assert done.stdout.count(": 5 none") == 2
