"""The notebooks and their solutions: their shape, their twins, and that they run when small."""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import jupytext
import pytest

from rlhf_kit.launch import execute_notebook, twin_differs
from rlhf_kit.parameters import parameters_of

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
SOURCES = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.py"))
SOLUTIONS = sorted((NOTEBOOKS / "solutions").glob("[0-9][0-9]_*.py"))
SMOKE: dict[str, dict[str, Any]] = {
    "00_follow_one_row": {},
    "01_data_blending": {"rows": 200},
    "02_sft": {"rows": 256},
    "03_reward_model": {"rows": 256},
    "04_ppo": {"iterations": 6},
    "05_chat_and_compare": {"prompts": 16},
    "06_hybrid_engine": {"rows": 12},
    "07_over_optimisation": {
        "pairs": 64,
        "iterations": 2,
        "evaluate_every": 1,
        "prompts": 16,
        "samples": 4,
        "demonstrations": 256,
    },
}
"""Small enough for a test; every notebook's own defaults are the toy preset's."""
SMOKE_SOLUTIONS: dict[str, dict[str, Any]] = {
    "00_follow_one_row": {"steps": 2},
    "01_data_blending": {"rows": 100, "batch_size": 8},
    "02_sft": {"rows": 64, "prompts": 8},
    "03_reward_model": {"rows": 64, "tests": 64},
    "04_ppo": {"iterations": 2, "batch_size": 8},
    "05_chat_and_compare": {"prompts": 16},
    "06_hybrid_engine": {"rows": 8},
    "07_over_optimisation": {
        "pairs": 16,
        "iterations": 1,
        "batch_size": 8,
        "evaluate_every": 1,
        "prompts": 8,
    },
}


def name_of(path: Path) -> str:
    return str(path.relative_to(NOTEBOOKS).with_suffix(""))


every_notebook = pytest.mark.parametrize("source", SOURCES, ids=name_of)
every_solution = pytest.mark.parametrize("source", SOLUTIONS, ids=name_of)
every_one = pytest.mark.parametrize("source", SOURCES + SOLUTIONS, ids=name_of)


def test_the_notebooks_of_the_course_are_all_there():
    assert [path.stem for path in SOURCES] == sorted(SMOKE)
    assert [path.stem for path in SOLUTIONS] == sorted(SMOKE_SOLUTIONS)


@every_solution
def test_every_exercise_of_a_notebook_has_its_solution(source: Path):
    notebook = (NOTEBOOKS / source.name).read_text(encoding="utf-8")
    exercises = notebook.partition("## Exercises")[2].partition("\n# ## ")[0]
    asked = re.findall(r"^# (\d+)\. ", exercises, re.MULTILINE)
    solved = re.findall(r"^# ## (\d+)\. ", source.read_text(encoding="utf-8"), re.MULTILINE)
    assert asked and solved == asked
    assert f"solutions/{source.stem}.ipynb" in exercises


@every_one
def test_a_notebook_has_one_typed_parameters_cell_with_the_run_directory(source: Path):
    names = [parameter.name for parameter in parameters_of(source)]
    assert "run_dir" in names


@every_one
def test_cells_are_short_and_hold_no_magics(source: Path):
    cells = [cell for cell in jupytext.read(source).cells if cell.cell_type == "code"]
    lengths = [sum(map(bool, map(str.strip, c.source.splitlines()))) for c in cells]
    assert max(lengths) <= 40
    assert statistics.median(lengths) <= 12
    for cell in cells:
        assert not any(line.startswith(("%", "!")) for line in cell.source.splitlines())
        assert "import *" not in cell.source


@every_one
def test_the_twin_beside_a_notebook_has_the_same_source_and_was_executed(source: Path):
    assert twin_differs(source) is None
    twin = jupytext.read(source.with_suffix(".ipynb"))
    code = [cell for cell in twin.cells if cell.cell_type == "code"]
    assert any(cell.outputs for cell in code), "run `make notebooks`"
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run that the scripts fill in order, as a pipeline does."""
    return tmp_path_factory.mktemp("scripts") / "run"


@every_one
def test_a_notebook_runs_as_a_script_after_the_ones_before_it(source: Path, run_dir: Path):
    values = (SMOKE if source in SOURCES else SMOKE_SOLUTIONS)[source.stem]
    flags = [f"--{name}={value}" for name, value in values.items()]
    done = subprocess.run(
        [sys.executable, str(source), f"--run_dir={run_dir}", *flags],
        capture_output=True,
        text=True,
        cwd=run_dir.parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@every_notebook
def test_a_notebook_runs_alone_in_a_kernel(source: Path, tmp_path: Path):
    output = tmp_path / "executed.ipynb"
    execute_notebook(source, {**SMOKE[source.stem], "run_dir": str(tmp_path / "run")}, output)
    cells = [cell for cell in jupytext.read(output).cells if cell.cell_type == "code"]
    assert any(cell.outputs for cell in cells)
