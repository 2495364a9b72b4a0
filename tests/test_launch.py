"""A notebook's parameters, its flags, and its three ways to run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rlhf_kit import launch
from rlhf_kit.parameters import Parameter, check_values, help_text, parameters_of, parse_flags

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
# Where results go;
# made if missing.
run_dir: str = "runs/demo"
iterations: int = 60  # rollout and update rounds
kl_coef: float | None = None  # None takes the preset's
fast: bool = False  # skip the slow part

# %%
from rlhf_kit import launch

launch.read_flags(globals())

# %%
import sys

print(f"{run_dir} {iterations} {kl_coef} {fast}")
print("a warning", file=sys.stderr)
if iterations == 3:
    raise ValueError("three rounds are too few")
if iterations == 4:
    raise RuntimeError("boom")
"""


@pytest.fixture
def notebook(tmp_path: Path) -> Path:
    path = tmp_path / "01_demo.py"
    path.write_text(NOTEBOOK)
    return path


def cell(tmp_path: Path, source: str) -> Path:
    path = tmp_path / "nb.py"
    path.write_text(f'# %% tags=["parameters"]\n{source}\n\n# %%\nx = 1  # not a parameter\n')
    return path


# ---- the parameters cell


def test_parameters_are_read_with_type_default_comment_and_line(notebook: Path):
    assert parameters_of(notebook) == (
        Parameter("run_dir", str, False, "runs/demo", "Where results go; made if missing.", 15),
        Parameter("iterations", int, False, 60, "rollout and update rounds", 16),
        Parameter("kl_coef", float, True, None, "None takes the preset's", 17),
        Parameter("fast", bool, False, False, "skip the slow part", 18),
    )


def test_both_forms_of_a_notebook_have_the_same_parameters(notebook: Path):
    import jupytext

    twin = notebook.with_suffix(".ipynb")
    jupytext.write(jupytext.read(notebook), twin)
    ours, theirs = parameters_of(notebook), parameters_of(twin)
    assert [p.line for p in theirs] == [3, 4, 5, 6]  # in the cell, not in the file
    assert [(p.name, p.kind, p.default, p.help) for p in ours] == [
        (p.name, p.kind, p.default, p.help) for p in theirs
    ]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("rate = 1.0  # untyped", "line 2: a parameters cell holds lines like"),
        ("import os", "line 2: a parameters cell holds lines like"),
        ("a: int = 1  # one\n\nb: list = []  # no", "line 4: the type of b must be bool, int"),
        ("rate: float = 1 / 3  # computed", "line 2: the default of rate must be a literal"),
        ("rate: float = 0.5", "line 2: rate needs a comment"),
        ("n: int = 1.5  # float", "line 2: n must be of type int, not 1.5"),
        ("n: int = True  # bool", "line 2: n must be of type int, not True"),
        ("n: int = None  # missing", "line 2: n must be of type int, not None"),
        ("n: int = 1  # one\nn: int = 2  # two", "line 3: n is assigned twice"),
        ("config: str = 'x'  # taken", "line 2: config is a reserved name"),
        ("n: int = = 1", "line 2: the parameters cell is not Python"),
    ],
)
def test_a_bad_parameters_cell_is_refused_with_its_line(tmp_path: Path, source: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        parameters_of(cell(tmp_path, source))
    assert "nb.py, line" in str(caught.value)


def test_a_notebook_without_a_parameters_cell_is_refused(tmp_path: Path):
    (tmp_path / "nb.py").write_text("# %%\nx: int = 1  # one\n")
    with pytest.raises(ValueError, match="has 0 cells tagged parameters"):
        parameters_of(tmp_path / "nb.py")
    with pytest.raises(ValueError, match="there is no notebook"):
        parameters_of(tmp_path / "other.py")


# ---- flags and recipes


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["--iterations", "5", "--kl_coef=1e-3"], {"iterations": 5, "kl_coef": 0.001}),
        (["--kl-coef", "-1", "--run-dir=a=b"], {"kl_coef": -1.0, "run_dir": "a=b"}),
        (["--kl_coef", "none", "--run_dir", "none"], {"kl_coef": None, "run_dir": "none"}),
        (["--fast"], {"fast": True}),
        (["--fast", "--no-fast"], {"fast": False}),
        (["--local_rank=3", "--local-rank", "1"], {}),
    ],
)
def test_flags_become_values_of_their_type(notebook: Path, words: list[str], values: dict):
    assert parse_flags(parameters_of(notebook), words) == values


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--iteration", "5"], "unknown parameter iteration; did you mean iterations?"),
        (["--zzz", "5"], "unknown parameter zzz; --help lists those there are"),
        (["--iterations", "5.5"], "--iterations must be of type int, not '5.5'"),
        (["--iterations", "none"], "--iterations must be of type int, not 'none'"),
        (["--iterations"], "--iterations needs a value"),
        (["--iterations", "--fast"], "--iterations needs a value"),
        (["5"], "cannot place '5': write --name value"),
        (["--config", "missing.yaml"], "there is no recipe missing.yaml"),
    ],
)
def test_a_wrong_flag_is_refused_in_one_sentence(notebook: Path, words: list[str], message: str):
    with pytest.raises(ValueError) as caught:
        parse_flags(parameters_of(notebook), words)
    assert str(caught.value) == message


def test_a_recipe_has_the_parameters_as_keys_and_a_flag_wins(notebook: Path, tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("iterations: 7\nkl_coef: 1e-3\nfast: true\n")
    values = parse_flags(parameters_of(notebook), ["--iterations=9", f"--config={recipe}"])
    assert values == {"iterations": 9, "kl_coef": 0.001, "fast": True}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iteration: 7", "unknown parameter iteration; did you mean iterations?"),
        ("iterations: seven", "iterations must be of type int, not 'seven'"),
        ("- 1", "must hold lines of 'name: value'"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_a_wrong_recipe_is_refused(notebook: Path, tmp_path: Path, text: str, message: str):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_flags(parameters_of(notebook), ["--config", str(recipe)])


def test_values_from_python_are_checked_and_not_converted(notebook: Path):
    parameters = parameters_of(notebook)
    assert check_values(parameters, {"kl_coef": 1}) == {"kl_coef": 1.0}
    with pytest.raises(ValueError, match="iterations must be of type int, not '5'"):
        check_values(parameters, {"iterations": "5"})


def test_help_lists_names_types_defaults_and_comments(notebook: Path):
    text = help_text(notebook, parameters_of(notebook))
    assert "--iterations  int, default 60\n      rollout and update rounds" in text
    assert "--fast, --no-fast  bool, default False" in text
    assert "--kl_coef  float | None, default None" in text


# ---- as a script


def script(path: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, path, *words], capture_output=True, text=True)


def test_a_script_takes_its_flags_from_its_own_parameters_cell(notebook: Path):
    done = script(notebook, "--iterations=5", "--fast", "--local_rank=0")
    assert (done.returncode, done.stdout) == (0, "runs/demo 5 None True\n")


def test_a_script_refuses_a_wrong_flag_with_exit_code_2(notebook: Path):
    done = script(notebook, "--iteration=5")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown parameter iteration; did you mean iterations?\n"


def test_a_script_lists_its_flags(notebook: Path):
    done = script(notebook, "--help")
    assert done.returncode == 0 and "rollout and update rounds" in done.stdout


def test_an_import_and_a_kernel_leave_the_parameters_alone(notebook: Path, monkeypatch):
    namespace = {"__name__": "elsewhere", "__file__": str(notebook), "iterations": 1}
    monkeypatch.setattr(sys, "argv", ["x", "--iterations=5"])
    launch.read_flags(namespace)
    kernel = {"__name__": "__main__", "get_ipython": None, "iterations": 1}
    launch.read_flags(kernel)
    assert namespace["iterations"] == kernel["iterations"] == 1


def test_a_notebook_runs_in_a_process_and_its_output_is_logged(notebook: Path, tmp_path, capfd):
    log = tmp_path / "logs" / "01.log"
    values = {"run_dir": "-x y", "kl_coef": None, "fast": True}
    assert launch.run_notebook(notebook, values, log=log) == 0
    out, err = capfd.readouterr()
    assert (out, err) == ("-x y 60 None True\n", "a warning\n")
    first, *rest = log.read_text().splitlines()
    assert first.startswith("== 20") and first.endswith(
        "01_demo.py --run_dir=-x y --kl_coef=None --fast"
    )
    assert sorted(rest) == ["-x y 60 None True", "a warning"]


def test_an_ipynb_runs_as_a_script_too(notebook: Path, tmp_path: Path, capfd):
    import jupytext

    twin = notebook.with_suffix(".ipynb")
    jupytext.write(jupytext.read(notebook), twin)
    assert launch.run_notebook(twin, {"iterations": 8}, log=tmp_path / "log") == 0
    assert capfd.readouterr().out == "runs/demo 8 None False\n"


def test_a_refused_input_is_one_sentence_on_screen_and_a_traceback_in_the_log(
    notebook: Path, tmp_path: Path, capfd
):
    log = tmp_path / "log"
    assert launch.run_notebook(notebook, {"iterations": 3}, log=log) == 2
    assert capfd.readouterr().err == "a warning\nerror: three rounds are too few\n"
    assert "Traceback" in log.read_text() and "01_demo.py" in log.read_text()


def test_any_other_failure_shows_where_it_rose(notebook: Path, tmp_path: Path, capfd):
    assert launch.run_notebook(notebook, {"iterations": 4}, log=tmp_path / "log") == 1
    assert "RuntimeError: boom" in capfd.readouterr().err


def test_nothing_starts_when_a_value_does_not_fit(notebook: Path, tmp_path: Path):
    log = tmp_path / "logs" / "log"
    with pytest.raises(ValueError, match="did you mean iterations"):
        launch.run_notebook(notebook, {"iteration": 3}, log=log)
    assert not log.parent.exists()


def test_a_progress_bar_is_logged_as_it_stood_at_the_end(tmp_path: Path, capfd):
    path = cell(tmp_path, "n: int = 1  # one")
    path.write_text(
        path.read_text() + 'print("10%\\r50%\\r100% done")\nprint("h\\u00e9", end="")\n'
    )
    assert launch.run_notebook(path, {}, log=tmp_path / "log") == 0
    assert "10%\r50%\r100% done\nh\u00e9" in capfd.readouterr().out
    assert (tmp_path / "log").read_text().splitlines()[1:] == ["100% done", "h\u00e9"]


def test_sigterm_reaches_the_notebook(tmp_path: Path):
    path = cell(tmp_path, "n: int = 1  # one")
    path.write_text(path.read_text() + 'import time\nprint("up", flush=True)\ntime.sleep(60)\n')
    log = tmp_path / "log"

    def end_it():
        while not log.exists() or "up" not in log.read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=end_it)
    thread.start()
    assert launch.run_notebook(path, {}, log=log) == -signal.SIGTERM
    thread.join()


def test_sigusr1_reaches_the_notebook_and_ends_nothing(tmp_path: Path, capfd):
    path = cell(tmp_path, "n: int = 1  # one")
    path.write_text(
        path.read_text()
        + "import os, signal, time\n"
        + "ignored = signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN\n"
        + "heard = []\nsignal.signal(signal.SIGUSR1, lambda *_: heard.append(1))\n"
        + "os.kill(os.getppid(), signal.SIGUSR1)\n"
        + "while not heard: time.sleep(0.01)\nprint('heard', ignored)\n"
    )
    before = signal.getsignal(signal.SIGUSR1)
    assert launch.run_notebook(path, {}, log=tmp_path / "log") == 0
    assert capfd.readouterr().out == "heard True\n"
    assert signal.getsignal(signal.SIGUSR1) is before


def test_after_ctrl_c_it_waits_until_a_second_one_ends_the_notebook(tmp_path: Path, capfd):
    """The notebook interrupts its parent as a terminal would, and then saves for too long."""
    path = cell(tmp_path, "n: int = 1  # one")
    path.write_text(
        path.read_text()
        + "import os, signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        + "os.kill(os.getppid(), signal.SIGINT)\n"
        + "while 'waiting for' not in open(os.environ['SAID']).read(): time.sleep(0.01)\n"
        + "os.kill(os.getppid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    said = tmp_path / "said"
    code = (
        "import sys; from rlhf_kit import launch\n"
        f"launch.run_notebook({str(path)!r}, {{}}, log={str(tmp_path / 'log')!r})"
    )
    with said.open("w") as file:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "SAID": str(said)},
            stderr=file,
            timeout=50,
        )
    assert done.returncode == -signal.SIGINT
    assert f"waiting for {path.name} to end; Ctrl-C again ends it at once" in said.read_text()


def test_a_log_that_cannot_be_written_is_refused_before_anything_starts(notebook: Path, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"log can't be written \(.*\); choose another"):
        launch.run_notebook(notebook, {}, log=tmp_path / "file" / "log")


# ---- in a kernel


def test_a_twin_holds_outputs_and_no_noise_and_equals_its_source(notebook: Path, capsys):
    assert "is missing" in str(launch.twin_differs(notebook))
    assert launch.main([str(notebook)]) == 0
    twin = notebook.with_suffix(".ipynb")
    assert launch.twin_differs(notebook) is None
    assert launch.main(["--check", str(notebook)]) == 0
    cells = json.loads(twin.read_text())["cells"]
    assert [c["id"] for c in cells] == ["cell-0", "cell-1", "cell-2", "cell-3"]
    assert [c["metadata"] for c in cells] == [{}, {"tags": ["parameters"]}, {}, {}]
    assert cells[3]["outputs"] == [
        {"name": "stdout", "output_type": "stream", "text": ["runs/demo 60 None False\n"]}
    ]

    notebook.write_text(notebook.read_text().replace("a warning", "another"))
    capsys.readouterr()
    assert launch.main(["--check", str(twin)]) == 1
    assert "differs from its source in cell 4 (import sys)" in capsys.readouterr().err


def test_a_notebook_takes_parameters_in_a_kernel(notebook: Path, tmp_path: Path):
    output = tmp_path / "out" / "executed.ipynb"
    launch.execute_notebook(notebook, {"iterations": 2, "kl_coef": 1}, output)
    assert "runs/demo 2 1.0 False" in output.read_text()
    with pytest.raises(ValueError, match="unknown parameter"):
        launch.execute_notebook(notebook, {"x": 2}, output)
