"""The command line: what it refuses, and a run of three stages with stand-ins for the notebooks."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_kit import cli, pipeline
from rlhf_kit.config import from_dict, toy

STAGE = """\
# %% tags=["parameters"]
run_dir: str = ""  # the run

# %%
import json
import os
import time
from pathlib import Path

from rlhf_kit import config, launch

launch.read_flags(globals())

# %%
settings = config.from_dict(json.loads(Path(run_dir, "run.json").read_text())["config"])
print("{name} with seed", settings.seed, flush=True)
mode = os.environ.get("{name}")
if mode == "refuse":
    raise ValueError("the data has no preferences")
if mode == "fail":
    raise RuntimeError("boom")
if mode == "kill":
    os.kill(os.getpid(), 9)
if mode == "wait":
    time.sleep(60)
if mode and mode.isdigit():
    raise SystemExit(int(mode))
for done in {files} if mode != "forget" else []:
    Path(run_dir, done).parent.mkdir(parents=True, exist_ok=True)
    Path(run_dir, done).write_text("{{}}")
"""


@pytest.fixture(autouse=True)
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three notebooks that only say that they are done, and a report of one line."""
    notebooks = tmp_path / "kit" / "notebooks"
    notebooks.mkdir(parents=True)
    for name, files in pipeline.STAGES:
        (notebooks / f"{name}.py").write_text(STAGE.format(name=name, files=files))
    monkeypatch.setattr(pipeline, "NOTEBOOKS", notebooks)
    fake = types.ModuleType("rlhf_kit.report")
    fake.build = lambda run_dir: f"report of {run_dir}"  # type: ignore[attr-defined]
    fake.print_terminal = print  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rlhf_kit.report", fake)


def start(directory: Path, *words: str) -> int:
    return cli.main(["train", "--preset", "toy", "--output-dir", str(directory), *words])


def record_of(directory: Path) -> dict:
    return json.loads((directory / "run.json").read_text())


# ---- train


def test_a_run_goes_through_all_stages_and_ends_with_its_report(tmp_path: Path, capfd):
    run = tmp_path / "run"
    words = ["--seed", "7", "--set", "ppo.kl.coef=1e-1", "--set=data.rows=[9, 9, 9]"]
    assert start(run, *words, "--data", "toy_world=2", "--data", "Some/data") == 0
    out = capfd.readouterr().out
    stages = ["02_sft with seed 7", "03_reward_model with seed 7", "04_ppo with seed 7"]
    assert [line for line in out.splitlines() if "with seed" in line] == stages
    assert f"report of {run}" in out and "of training in all" in out

    record = record_of(run)
    config = from_dict(record["config"])
    assert (config.seed, config.ppo.kl.coef, config.data.rows) == (7, 0.1, (9, 9, 9))
    assert [(s.name, s.weight) for s in config.data.sources] == [("toy_world", 2), ("Some/data", 1)]
    assert list(record["stages"]) == ["02_sft", "03_reward_model", "04_ppo"]
    assert record["started"] <= record["finished"]
    assert record["versions"]["torch"] and record["seed"] == 7
    assert (run / "logs" / "04_ppo.log").is_file()
    assert not list(run.glob("*.partial"))


def test_a_directory_in_use_is_refused_and_left_as_it_is(tmp_path: Path, capsys):
    run = tmp_path / "run"
    assert start(run) == 0
    before = record_of(run)
    assert start(run) == 2
    assert capsys.readouterr().err == (
        f"error: {run} already holds a run; pass --resume to go on with it, or choose another\n"
    )
    assert record_of(run) == before

    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    assert start(other) == start(other, "--resume") == 2
    assert "is in use and holds no run" in capsys.readouterr().err
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]


def test_a_finished_run_shows_its_report_again(tmp_path: Path, capfd):
    run = tmp_path / "run"
    assert start(run, "--resume") == 0  # nothing there: a new run
    capfd.readouterr()
    assert start(run, "--resume") == 0
    out = capfd.readouterr().out
    assert "holds a finished run" in out and f"report of {run}" in out and "seed" not in out
    assert cli.main(["report", str(run)]) == 0


def test_resume_goes_on_with_the_stage_that_failed(tmp_path: Path, capfd, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setenv("03_reward_model", "fail")
    assert start(run) == 1
    err = capfd.readouterr().err
    assert "error: 03_reward_model stopped with exit code 1; its last lines:" in err
    assert err.endswith(f"  RuntimeError: boom\nThe whole log is {run}/logs/03_reward_model.log.\n")
    assert list(record_of(run)["stages"]) == ["02_sft"]

    monkeypatch.delenv("03_reward_model")
    assert cli.main(["train", "--output-dir", str(run), "--resume"]) == 0
    out = capfd.readouterr().out
    assert "02_sft: done before" in out and "02_sft with" not in out
    assert list(record_of(run)["stages"]) == ["02_sft", "03_reward_model", "04_ppo"]


@pytest.mark.parametrize("code", [130, 143])
def test_a_stage_that_was_asked_to_stop_is_no_failure(tmp_path: Path, capfd, monkeypatch, code):
    run = tmp_path / "run"
    monkeypatch.setenv("03_reward_model", str(code))
    assert start(run) == code
    err = capfd.readouterr().err
    assert err == f"stopped; go on with: rlhf-kit train --output-dir {run} --resume\n"
    assert list(record_of(run)["cut_short"]) == ["03_reward_model"]


def test_the_time_of_a_stage_counts_all_its_starts(tmp_path: Path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setenv("02_sft", "143")
    assert start(run) == 143
    record = record_of(run)
    record["cut_short"]["02_sft"] = 1000.0
    pipeline.write_json(run / "run.json", record)
    monkeypatch.delenv("02_sft")
    assert start(run, "--resume") == 0
    assert 1000 <= record_of(run)["stages"]["02_sft"]["seconds"] < 1100
    assert record_of(run)["cut_short"] == {}


def test_what_a_stage_has_written_stays_when_a_later_start_is_refused(tmp_path: Path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setenv("02_sft", "143")
    assert start(run) == 143
    saved = run / "sft" / "checkpoints" / "step-00000010"
    saved.mkdir(parents=True)
    monkeypatch.setenv("02_sft", "refuse")
    assert start(run, "--resume") == 2
    assert saved.is_dir() and (run / "run.json").is_file()


def test_a_stage_without_its_summary_is_not_done(tmp_path: Path, capfd):
    run = tmp_path / "run"
    assert start(run) == 0
    record = record_of(run)
    pipeline.write_json(run / "run.json", {**record, "finished": None})
    (run / "ppo" / "summary.json").unlink()  # killed between the export and the summary
    assert start(run, "--resume") == 0
    out = capfd.readouterr().out
    assert "03_reward_model: done before" in out and "04_ppo: done before" not in out


def test_a_run_that_cannot_be_written_is_refused_in_one_sentence(tmp_path: Path, capsys):
    (tmp_path / "file").write_text("")
    assert start(tmp_path / "file" / "run") == 2
    err = capsys.readouterr().err
    assert "can't be made (Not a directory); choose another" in err and err.count("\n") == 1


def test_resume_refuses_other_settings(tmp_path: Path, capsys, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setenv("02_sft", "fail")
    assert start(run, "--seed", "3") == 1
    for words in (["--seed", "4"], ["--set", "ppo.epochs=2"]):
        assert start(run, "--resume", *words) == 2
        assert "was started with other settings" in capsys.readouterr().err
    assert cli.main(["train", "--preset=cluster", "--output-dir", str(run), "--resume"]) == 2
    assert start(run, "--resume", "--seed", "3") == 1  # the same settings, named again


@pytest.mark.parametrize(
    ("mode", "code", "message"),
    [
        ("forget", 2, "error: 02_sft ended without writing"),
        ("kill", 1, "error: 02_sft was ended by SIGKILL, as it happens when memory runs out"),
    ],
)
def test_a_stage_that_does_not_end_well_says_why(tmp_path, capfd, monkeypatch, mode, code, message):
    monkeypatch.setenv("02_sft", mode)
    assert start(tmp_path / "run") == code
    err = capfd.readouterr().err
    assert message in err and "Traceback" not in err
    assert record_of(tmp_path / "run")["finished"] is None


def test_input_that_the_first_stage_refuses_leaves_nothing_behind(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("02_sft", "refuse")
    assert start(tmp_path / "run") == 2
    assert capfd.readouterr().err == "error: the data has no preferences\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name the settings to start from: --preset toy|consumer|cluster"),
        (["--preset=toy", "--set", "ppo.kl.coeff=1"], "unknown setting ppo.kl.coeff"),
        (["--preset=toy", "--set", "ppo.kl.coef=x"], "ppo.kl.coef must be of type float, not 'x'"),
        (["--preset=toy", "--set", "ppo.kl.coef"], "write --set name=value, not 'ppo.kl.coef'"),
        (["--preset=toy", "--set", "seed=null"], "--set seed needs a value"),
        (["--preset=toy", "--set", "seed=[1"], "cannot read the value '[1': it is not valid YAML"),
        (["--preset=toy", "--seed=1", "--set", "seed=2"], "seed is set twice"),
        (["--preset=toy", "--data", "a=b"], "the weight of data source a must be a number"),
        (["--preset=toy", "--data", "a=-1"], "the weight of data source a must be positive"),
        (["--preset=toy", "--set", "ppo.batch_size=33"], "33 is not a multiple of 32"),
    ],
)
def test_wrong_settings_are_one_sentence_and_nothing_is_written(tmp_path, capsys, words, message):
    run = tmp_path / "run"
    assert cli.main(["train", "--output-dir", str(run), *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not run.exists()


def test_without_a_checkout_train_says_so(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "NOTEBOOKS", tmp_path / "nowhere")
    assert start(tmp_path / "run") == 2
    assert "there are no notebooks in" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_ctrl_c_ends_the_run_and_names_the_way_on(tmp_path: Path):
    run = tmp_path / "run"
    code = (
        "import sys; from pathlib import Path; from rlhf_kit import cli, pipeline\n"
        f"pipeline.NOTEBOOKS = Path({str(pipeline.NOTEBOOKS)!r})\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "train", "--preset=toy", "--output-dir", str(run)],
        env={**os.environ, "02_sft": "wait"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    log = run / "logs" / "02_sft.log"
    while not log.exists() or "with seed" not in log.read_text():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == (
        "\nwaiting for 02_sft.py to end; Ctrl-C again ends it at once\n"
        f"\ninterrupted; go on with: rlhf-kit train --output-dir {run} --resume\n"
    )
    assert list(record_of(run)["cut_short"]) == ["02_sft"]


# ---- the rest


def test_run_takes_one_notebook_and_its_flags(tmp_path: Path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "nb.py"
    path.write_text(
        '# %% tags=["parameters"]\nn: int = 1  # how many\n\n'
        "# %%\nfrom rlhf_kit import launch\n\nlaunch.read_flags(globals())\nprint(n + 1)\n"
    )
    assert cli.main(["run", "nb.py", "--n", "41"]) == 0
    assert capfd.readouterr().out == "42\n"
    assert "42" in (tmp_path / "runs" / "logs" / "nb.log").read_text()
    assert cli.main(["run", "nb.py", "--help"]) == 0
    assert "--n  int, default 1\n      how many" in capfd.readouterr().out
    assert cli.main(["run", "nb.py", "--m", "1"]) == 2
    assert cli.main(["run", "missing.py"]) == 2
    assert capfd.readouterr().err.splitlines() == [
        "error: unknown parameter m; --help lists those there are",
        "error: there is no notebook 'missing.py', or it is not UTF-8",
    ]


def test_report_and_chat_refuse_a_directory_that_is_none(tmp_path: Path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    (tmp_path / "run.json").write_text("{}")
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "is not the record of a run" in capsys.readouterr().err
    assert cli.main(["chat", str(tmp_path / "none")]) == 2
    assert "there is no directory" in capsys.readouterr().err
    assert cli.main(["chat", str(tmp_path), "--top-p", "2"]) == 2
    assert capsys.readouterr().err == "error: top_p must be above 0 and at most 1\n"


def test_the_app_gets_what_the_command_line_says(tmp_path: Path, monkeypatch, capsys):
    kit = pipeline.NOTEBOOKS.parent
    (kit / "apps").mkdir(parents=True)
    (kit / "apps" / "chat.py").touch()
    given = []

    def serve(run_dir: Path, **settings: object) -> int:
        given.append((run_dir, settings))
        return 0

    monkeypatch.setitem(sys.modules, "apps.chat", SimpleNamespace(main=serve))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    words = ["--port", "8000", "--host", "0.0.0.0", "--share", "--language", "zh"]
    assert cli.main(["app", str(tmp_path), *words]) == 0
    assert cli.main(["app", str(tmp_path)]) == 0
    assert given == [
        (tmp_path, {"host": "0.0.0.0", "port": 8000, "share": True, "language": "zh"}),
        (tmp_path, {"host": "127.0.0.1", "port": None, "share": False, "language": None}),
    ]
    assert cli.main(["app", str(tmp_path), "--port", "99999"]) == 2
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["app", str(tmp_path)]) == 2
    (kit / "apps" / "chat.py").unlink()
    assert cli.main(["app", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: --port must be from 1 to 65535, not 99999",
        "error: the app needs Gradio, which is not installed: pip install -e '.[app]'",
        f"error: there is no app in {kit}; start it from a checkout of the repository, "
        "installed with pip install -e .",
    ]


@pytest.mark.parametrize(
    "words", [["fly"], [], ["train", "--presets=toy"], ["train", "--seed=x", "--output-dir=d"]]
)
def test_a_wrong_command_line_is_one_sentence(words: list[str], capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1


def test_a_config_survives_run_json(tmp_path: Path):
    pipeline.write_json(tmp_path / "c.json", toy().to_dict())
    assert from_dict(json.loads((tmp_path / "c.json").read_text())) == toy()
