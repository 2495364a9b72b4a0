"""Notebooks as programs: run one as a script, or execute it and write its twin.

The `.py` (py:percent) is a notebook's source. `run_notebook` runs it as a script in a process
of its own, `execute_notebook` in a kernel; `write_twin` does the latter for the `.ipynb` that
stands beside the source, with its outputs and nothing that changes from one run to the next.
`python -m rlhf_kit.launch notebooks/*.py` writes all twins, with `--check` it compares sources.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from rlhf_kit.parameters import Value, check_values, help_text, parameters_of, parse_flags

LOG_VARIABLE = "RLHF_KIT_LOG"
RECORD_VARIABLE = "RLHF_KIT_RECORD"
"""The .ipynb that the main rank of a launch writes; unset on all other ranks."""
ROOT = Path(__file__).resolve().parent.parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
PAIRING = {
    "cell_metadata_filter": "tags,-all",
    "formats": "ipynb,py:percent",
    "notebook_metadata_filter": "kernelspec,jupytext,-all",
}


def in_notebook() -> bool:
    """Whether this process is a kernel: a place for tables, colours and plots."""
    kernel: Any = sys.modules.get("ipykernel.kernelapp")  # others only import it
    return kernel is not None and kernel.IPKernelApp.initialized()


def keeps_figures() -> bool:
    """Whether the figures of this process are seen: in a kernel, and on a launch's main rank."""
    return in_notebook() or RECORD_VARIABLE in os.environ


def read_flags(namespace: dict[str, Any]) -> None:
    """Set a notebook's parameters from the command line when it runs as a script.

    Inside a kernel and in an import nothing happens. Bad flags end the program with one
    sentence and exit code 2.
    """
    script = namespace.get("__name__") in ("__main__", "__mp_main__") and "__file__" in namespace
    if not script or (in_notebook() and "get_ipython" in namespace):
        return
    os.environ["MPLBACKEND"] = "Agg"
    # Outside of a loop that saves there is nothing to save; by default this signal kills.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    path = namespace["__file__"]
    try:
        parameters = parameters_of(path)
        if {"--help", "-h"} & set(sys.argv[1:]):
            print(help_text(path, parameters))
            sys.exit(0)
        namespace |= parse_flags(parameters, sys.argv[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if LOG_VARIABLE in os.environ:
        sys.excepthook = _end_in_one_sentence


def _end_in_one_sentence(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """A ValueError is the user's to mend: one sentence on screen, where it rose in the log."""
    if issubclass(kind, KeyboardInterrupt):
        sys.exit(130)
    if not issubclass(kind, ValueError):
        return sys.__excepthook__(kind, error, trace)
    with open(os.environ[LOG_VARIABLE], "a", encoding="utf-8") as log:
        traceback.print_exception(kind, error, trace, file=log)
    # Not sys.stderr: torch.distributed wraps this hook and swallows what is written there.
    print(f"error: {error}", file=sys.__stderr__, flush=True)
    sys.exit(2)


# ---- as a script, in a process of its own


def run_notebook(path: str | Path, values: Mapping[str, Any], *, log: str | Path) -> int:
    """Run a notebook as a script with this interpreter; its exit code (negative: a signal).

    Its output appears here as it comes and is appended to `log`. ValueError before anything
    starts where a value does not fit the notebook's parameters.
    """
    path, log = Path(path), Path(log)
    words = [_word(k, v) for k, v in check_values(parameters_of(path), values).items()]
    environment = {
        # Threads that wait by spinning make a busy machine many times slower, and a quiet one
        # hardly faster.
        "OMP_WAIT_POLICY": "PASSIVE",
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "MPLBACKEND": "Agg",
        "COLUMNS": str(shutil.get_terminal_size().columns),
        LOG_VARIABLE: str(log.resolve()),
    }
    with (
        _script(path) as script,
        _opened(log) as record,
        _passing_on_signals() as hand_over,
    ):
        record.write(f"== {time.strftime('%Y-%m-%d %H:%M:%S')} {path.name} {' '.join(words)}\n")
        record.flush()
        child = subprocess.Popen(
            [sys.executable, str(script), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
        hand_over(child)
        tee = threading.Thread(target=_tee, args=(child, record))
        tee.start()
        try:
            return child.wait()
        except KeyboardInterrupt:
            _wait(child, path.name)
            raise
        finally:
            tee.join()


def _opened(log: Path) -> IO[str]:
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        return open(log, "a", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{log} can't be written ({error.strerror}); choose another") from None


def _word(name: str, value: Value) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}={value}"


@contextlib.contextmanager
def _script(path: Path) -> Iterator[Path]:
    """`path` itself, or an .ipynb written as a script for as long as it runs."""
    if path.suffix != ".ipynb":
        yield path
        return
    import jupytext

    with tempfile.TemporaryDirectory() as directory:
        script = Path(directory, path.stem + ".py")
        jupytext.write(jupytext.read(path), script, fmt="py:percent")
        yield script


def _tee(child: subprocess.Popen, log: IO[str]) -> None:
    """Pass on what comes, at once; log whole lines, a progress bar as it stood at the end.

    stderr is read before stdout and passed on after it, so that all that was printed before an
    error stands before it.
    """
    outputs = [_Output(child.stdout, sys.stdout, log), _Output(child.stderr, sys.stderr, log)]
    with selectors.DefaultSelector() as ready:
        for output in outputs:
            ready.register(output.pipe, selectors.EVENT_READ, output)
        while ready.get_map():
            ready.select()
            chunks = {output: output.read() for output in reversed(outputs)}
            for output in list(outputs):
                if chunks[output] == b"":
                    ready.unregister(output.pipe)
                    outputs.remove(output)
                if (chunk := chunks[output]) is not None:
                    output.write(chunk)


class _Output:
    """One of a child's pipes, the stream it goes to, and the line it is in the middle of."""

    def __init__(self, pipe: Any, screen: IO[str], log: IO[str]):
        self.pipe, self.screen, self.log, self.line = pipe, screen, log, ""
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        os.set_blocking(pipe.fileno(), False)

    def read(self) -> bytes | None:
        """What has come, b"" at the end, None while there is nothing."""
        try:
            return os.read(self.pipe.fileno(), 65536)
        except BlockingIOError:
            return None

    def write(self, chunk: bytes) -> None:
        text = self.decoder.decode(chunk, final=not chunk)
        self.screen.write(text)
        self.screen.flush()
        *complete, self.line = (self.line + text).split("\n")
        if not chunk and self.line:
            complete.append(self.line)
        self.log.writelines(line.rsplit("\r", 1)[-1] + "\n" for line in complete)
        self.log.flush()


@contextlib.contextmanager
def _passing_on_signals() -> Iterator[Callable[[subprocess.Popen], None]]:
    """SIGTERM and SIGUSR1 reach the notebook, once it was handed over, and not this process."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda child: None
        return

    def hand_over(child: subprocess.Popen) -> None:
        for number in before:
            signal.signal(number, lambda number, _: child.send_signal(number))

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    # The child inherits that SIGUSR1 is ignored: it ends nothing that can't save yet.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        yield hand_over
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(child: subprocess.Popen, name: str) -> None:
    """A terminal has sent Ctrl-C to the child as well, which may be saving."""
    try:
        print(f"\nwaiting for {name} to end; Ctrl-C again ends it at once", file=sys.stderr)
        child.wait()
    except KeyboardInterrupt:
        child.kill()
        child.wait()


# ---- in a kernel


def execute_notebook(path: str | Path, values: Mapping[str, Any], output: str | Path) -> None:
    """Execute a notebook in a kernel with these parameters and write it, outputs included.

    The kernel works in the notebook's directory, as JupyterLab does. A cell that fails raises
    papermill's PapermillExecutionError; `output` then holds the notebook as far as it came.
    """
    import jupytext
    import papermill

    path = Path(path)
    values = check_values(parameters_of(path), values)
    notebook = jupytext.read(path)
    notebook.metadata["kernelspec"] = KERNEL
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, path.stem + ".ipynb")
        jupytext.write(notebook, source)
        papermill.execute_notebook(
            source, output, values, kernel_name="python3", cwd=path.parent, progress_bar=False
        )


def write_twin(path: str | Path) -> Path:
    """Execute a source with its own parameters and write the `.ipynb` beside it."""
    import nbformat

    twin = Path(path).with_suffix(".ipynb")
    with tempfile.TemporaryDirectory() as directory:
        executed = Path(directory, twin.name)
        execute_notebook(path, {}, executed)
        notebook = nbformat.read(executed, as_version=4)
    text = nbformat.writes(_without_noise(notebook))
    partial = twin.with_suffix(".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, twin)
    return twin


def _without_noise(notebook: Any) -> Any:
    """Keep what a reader wants: no timings, random ids, progress bars, warnings or own paths."""
    notebook.metadata = {"jupytext": PAIRING, "kernelspec": KERNEL}
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        tags = cell.metadata.get("tags")
        cell.metadata = {"tags": tags} if tags else {}
        if cell.cell_type != "code":
            continue
        outputs, cell.outputs = cell.outputs, []
        for out in outputs:
            if out.output_type == "stream":
                if out.name == "stderr":
                    continue
                out.text = out.text.replace(f"{ROOT}{os.sep}", "")
                if cell.outputs and cell.outputs[-1].output_type == "stream":
                    cell.outputs[-1].text += out.text
                    continue
            cell.outputs.append(out)
    return notebook


def twin_differs(path: str | Path) -> str | None:
    """Where a source and its twin first differ in their cells, in one sentence; None if equal."""
    import jupytext

    path = Path(path)
    twin = path.with_suffix(".ipynb")
    if not twin.exists():
        return f"{twin} is missing: run make notebooks"
    pair = [
        [(c.cell_type, c.source.strip(), c.metadata.get("tags", [])) for c in nb.cells]
        for nb in (jupytext.read(path), jupytext.read(twin))
    ]
    for number, (ours, theirs) in enumerate(zip(*pair, strict=False), start=1):
        if ours != theirs:
            first = ours[1].partition("\n")[0] or "an empty cell"
            return f"{twin} differs from its source in cell {number} ({first}): run make notebooks"
    if len(pair[0]) != len(pair[1]):
        return f"{twin} has {len(pair[1])} cells, its source {len(pair[0])}: run make notebooks"
    return None


def main(words: Sequence[str] | None = None) -> int:
    """Write the twin of each source named, or with --check only compare; the exit code."""
    words = list(sys.argv[1:] if words is None else words)
    check = "--check" in words
    sources = sorted({Path(w).with_suffix(".py") for w in words if w != "--check"})
    failures = []
    for source in sources:
        start = time.monotonic()
        if not check:
            try:
                print(f"{write_twin(source)}  {time.monotonic() - start:.0f} s", flush=True)
            except Exception as error:  # the other notebooks are executed all the same
                failures.append(f"{source} failed: {error}")
        elif difference := twin_differs(source):
            failures.append(difference)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
