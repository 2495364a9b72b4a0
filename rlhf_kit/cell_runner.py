"""Run a notebook's script cell by cell, and keep the executed notebook, outputs and figures.

`python -m rlhf_kit.cell_runner SCRIPT [--NAME value ...]` does what `python SCRIPT` does, in one
namespace called `__main__`. Where RECORD_VARIABLE names a file, what each cell prints to stdout and
the value of its last line (a figure, say) are written there as a notebook, after every cell, so
that a run that is killed leaves as much as it came to. There is no kernel.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import faulthandler
import json
import os
import re
import signal
import socket
import sys
import time
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_kit.launch import KERNEL, LOG_VARIABLE, RECORD_VARIABLE
from rlhf_kit.parameters import CELL, parameters_of, parse_flags

FAILURE_VARIABLE = "RLHF_KIT_FAILURE"
"""The file by which the first rank that fails tells the others."""
GOOD_ENDINGS = (0, 130, 143)
"""Exit codes that are no failure: done, or stopped by SIGINT or SIGTERM after saving."""
NO_CODE = re.compile(r"\[(markdown|md|raw)\]")
PATIENCE = 5.0
"""Seconds that a rank which lost another one leaves to that one's own last words."""


def note_failure(
    path: Path, code: int, sentence: str | None, rank: int | None = None, host: str | None = None
) -> None:
    """Say which rank failed, this one unless another is named, and unless another was first."""
    line = {
        "rank": int(os.environ.get("RANK", 0)) if rank is None else rank,
        "host": host or socket.gethostname(),
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


def code_cells(text: str) -> list[tuple[int, str]]:
    """The code of a py:percent file, cell by cell: how many lines stand before it, its source."""
    lines = text.splitlines(keepends=True)
    markers = [number for number, line in enumerate(lines) if CELL.match(line)]
    cells = []
    for start, end in zip([-1, *markers], [*markers, len(lines)], strict=True):
        source = "".join(lines[start + 1 : end])
        is_code = not NO_CODE.search(lines[start]) if start >= 0 else bool(ast.parse(source).body)
        if is_code:
            cells.append((start + 1, source))
    return cells


def run(script: Path, words: list[str], record: Path | None) -> None:
    """Run all cells; what a cell raises is raised, after the notebook was written."""
    text = script.read_text(encoding="utf-8")
    main = types.ModuleType("__main__")
    main.__file__ = str(script)
    sys.modules["__main__"] = main  # where pickle looks for what a notebook defines
    book = Record(script, words, record) if record is not None else None
    for number, (line, source) in enumerate(code_cells(text)):
        with book.cell(number) if book is not None else contextlib.nullcontext():
            value = _value_of(source, script, line, main.__dict__)
            if book is not None:
                book.show(value)
    if book is not None:
        book.finish()


class Record:
    """The executed notebook of the main rank."""

    def __init__(self, script: Path, words: list[str], path: Path):
        import jupytext

        self.path = path
        self.notebook = jupytext.read(script)
        self.notebook.metadata = {"kernelspec": KERNEL, "rlhf_kit": _circumstances()}
        for number, cell in enumerate(self.notebook.cells):
            cell.id = f"cell-{number}"
        self.cells = [cell for cell in self.notebook.cells if cell.cell_type == "code"]
        self.outputs: list[Any] = []
        self._note_parameters(script, words)

    def _note_parameters(self, script: Path, words: list[str]) -> None:
        """A cell behind the parameters cell, as papermill writes it."""
        import nbformat.v4 as v4

        place = next(
            (
                number
                for number, cell in enumerate(self.notebook.cells)
                if "parameters" in cell.metadata.get("tags", ())
            ),
            None,
        )
        if place is None:
            return
        try:
            given = parse_flags(parameters_of(script), words)
        except ValueError:  # the notebook itself will say so
            return
        source = "\n".join(f"{name} = {value!r}" for name, value in given.items())
        cell = v4.new_code_cell(f"# Given on the command line\n{source}", id="given")
        cell.metadata["tags"] = ["injected-parameters"]
        self.notebook.cells.insert(place + 1, cell)

    @contextlib.contextmanager
    def cell(self, number: int) -> Iterator[None]:
        """While the code cell of this number runs: keep what it prints and raises."""
        import nbformat.v4 as v4

        stream, self.outputs = sys.stdout, []
        sys.stdout = copied = _Copied(stream)
        try:
            yield
        except BaseException as error:
            lines = traceback.format_exception(*_without_us(error))
            kind = type(error).__name__
            self.outputs.append(
                v4.new_output("error", ename=kind, evalue=str(error), traceback=lines)
            )
            raise
        finally:
            sys.stdout = stream
            if copied.text:
                self.outputs.insert(0, v4.new_output("stream", name="stdout", text=copied.text))
            self.cells[number].outputs = self.outputs
            self.cells[number].execution_count = number + 1
            self._write()

    def show(self, value: Any) -> None:
        import nbformat.v4 as v4

        if value is not None:
            self.outputs.append(v4.new_output("execute_result", _views(value)))

    def finish(self) -> None:
        self.notebook.metadata["rlhf_kit"]["finished"] = _now()
        self._write()

    def _write(self) -> None:
        import nbformat

        partial = self.path.with_suffix(".partial")
        partial.write_text(nbformat.writes(self.notebook) + "\n", encoding="utf-8")
        os.replace(partial, self.path)


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
    # What hangs can still be asked where it stands, in C code too; a launcher asks by SIGTERM.
    log = os.environ.get(LOG_VARIABLE)
    trace = open(log, "a", encoding="utf-8") if log else sys.stderr  # noqa: SIM115, to the end
    faulthandler.register(signal.SIGUSR2, file=trace, all_threads=False)
    faulthandler.register(signal.SIGTERM, file=trace, all_threads=False, chain=True)
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
