"""Run a notebook's script cell by cell, and keep the executed notebook, outputs and figures.

`python -m rlhf_kit.cell_runner SCRIPT [--NAME value ...]` does what `python SCRIPT` does, in one
namespace called `__main__`. Where RECORD_VARIABLE names a file, what each cell prints to stdout and
the value of its last line (a figure, say) are written there as a notebook, after every cell, so
that a run that is killed leaves as much as it came to. There is no kernel.
"""

from __future__ import annotations

import ast
import base64
import faulthandler
import json
import os
import signal
import socket
import sys
import time
import traceback
import types
from pathlib import Path
from typing import Any

from rlhf_kit.launch import KERNEL
from rlhf_kit.parameters import parameters_of, parse_flags

RECORD_VARIABLE = "RLHF_KIT_RECORD"
"""The .ipynb to write; unset on all ranks but the main one."""
FAILURE_VARIABLE = "RLHF_KIT_FAILURE"
"""The file by which the first rank that fails tells the others."""
GOOD_ENDINGS = (0, 130, 143)
"""Exit codes that are no failure: done, or stopped by SIGINT or SIGTERM after saving."""
PATIENCE = 5.0
"""Seconds that a rank which lost another one leaves to that one's own last words."""


def note_failure(path: Path, code: int, sentence: str | None) -> None:
    """Say which rank failed, unless another one was first."""
    line = {
        "rank": int(os.environ.get("RANK", 0)),
        "host": socket.gethostname(),
        "code": code,
        "sentence": sentence,
    }
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError:  # another rank was first, or nothing can be written any more
        pass


class _Copied:
    """stdout, and what was written to it since the cell began."""

    def __init__(self, stream: Any):
        self.stream = stream
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def run(script: Path, words: list[str], record: Path | None) -> None:
    """Run all cells; what a cell raises is raised, after the notebook was written."""
    import jupytext
    import nbformat.v4 as v4

    notebook = jupytext.read(script)
    notebook.metadata = {"kernelspec": KERNEL, "rlhf_kit": _circumstances()}
    text, place = script.read_text(encoding="utf-8"), 0
    main = types.ModuleType("__main__")
    main.__file__ = str(script)
    sys.modules["__main__"] = main  # where pickle looks for what a notebook defines
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    for cell in [cell for cell in notebook.cells if cell.cell_type == "code"]:
        found = text.find(cell.source, place)
        place = place if found < 0 else found
        line = text.count("\n", 0, place)
        copied = _Copied(sys.stdout)
        try:
            if record is not None:
                sys.stdout = copied
            value = _value_of(cell.source, script, line, main.__dict__)
            if record is not None and value is not None:
                cell.outputs.append(v4.new_output("execute_result", _views(value)))
        except BaseException as error:
            lines = traceback.format_exception(*_without_us(error))
            cell.outputs.append(
                v4.new_output(
                    "error", ename=type(error).__name__, evalue=str(error), traceback=lines
                )
            )
            raise
        finally:
            sys.stdout = copied.stream
            if copied.text:
                printed = v4.new_output("stream", name="stdout", text=copied.text)
                cell.outputs.insert(0, printed)
            if record is not None:
                _write(notebook, record)
        if record is not None and "parameters" in cell.metadata.get("tags", ()):
            given = parse_flags(parameters_of(script), words)
            source = "\n".join(f"{name} = {value!r}" for name, value in given.items())
            used = v4.new_code_cell(f"# Given on the command line\n{source}", id="given")
            used.metadata["tags"] = ["injected-parameters"]
            notebook.cells.insert(notebook.cells.index(cell) + 1, used)
    if record is not None:
        notebook.metadata["rlhf_kit"]["finished"] = _now()
        _write(notebook, record)


def _value_of(source: str, script: Path, line: int, namespace: dict[str, Any]) -> Any:
    """Execute a cell; the value of its last line as a kernel shows it, or None."""
    tree = ast.parse(source, str(script))
    ast.increment_lineno(tree, line)  # so that a traceback names lines of the file
    last = None
    end = tree.body[-1] if tree.body else None
    if isinstance(end, ast.Expr) and not source.rstrip().endswith(";"):
        last = ast.Expression(end.value)
        del tree.body[-1]
    exec(compile(tree, str(script), "exec"), namespace)
    return None if last is None else eval(compile(last, str(script), "eval"), namespace)


def _views(value: Any) -> dict[str, str]:
    """A value as a notebook keeps it, by MIME type."""
    views = {"text/plain": repr(value)}
    if hasattr(value, "_repr_html_") and (html := value._repr_html_()):
        views["text/html"] = html
    if hasattr(value, "_repr_png_") and (png := value._repr_png_()):
        views["image/png"] = base64.b64encode(png).decode()
    return views


def _write(notebook: Any, record: Path) -> None:
    import nbformat

    partial = record.with_suffix(".partial")
    partial.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    os.replace(partial, record)


def _circumstances() -> dict[str, Any]:
    return {
        "ranks": int(os.environ.get("WORLD_SIZE", 1)),
        "host": socket.gethostname(),
        "started": _now(),
    }


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _without_us(error: BaseException) -> tuple[type[BaseException], BaseException, Any]:
    """An error and its traceback from the notebook's own frame on."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return type(error), error.with_traceback(trace), trace


def _in_words(error: Exception, failure: Path) -> tuple[int, str | None]:
    """The exit code an error ends with, and its sentence where it has one."""
    if isinstance(error, ValueError):  # the user's to mend
        return 2, str(error)
    if "torch" not in sys.modules:
        return 1, None
    from rlhf_kit.faults import STOPPED, TrainingStopped, explain

    sentence = explain(error)
    if sentence is None:
        return 1, None
    if not isinstance(error, TrainingStopped):
        # It lost another rank, whose own process is about to say why.
        deadline = time.monotonic() + PATIENCE
        while not failure.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    return STOPPED, sentence


def main(words: list[str]) -> None:
    script, *flags = words
    sys.argv = words
    # What hangs can still be asked where it stands, in C code too.
    faulthandler.register(signal.SIGUSR2)
    failure = os.environ.get(FAILURE_VARIABLE)
    record = os.environ.get(RECORD_VARIABLE)
    try:
        run(Path(script), flags, Path(record) if record else None)
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        if failure and code not in GOOD_ENDINGS:
            note_failure(Path(failure), code, None)
        raise
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if failure:
            code, sentence = _in_words(error, Path(failure))
            note_failure(Path(failure), code, sentence)
        sys.excepthook(*_without_us(error))  # may end the program with a code of its own
        sys.exit(1)


if __name__ == "__main__":
    # Under its own name, so that what it holds outlives `__main__`, which the notebook takes.
    from rlhf_kit import cell_runner

    cell_runner.main(sys.argv[1:])
