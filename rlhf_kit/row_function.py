"""Rows from a Python function of the user's own: `file.py:function` or `module:function`.

The function takes nothing and yields (or returns) mappings. It is the user's own code, it is run,
and that is said; a mistake in it is reported with its file and line.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_kit.config import require
from rlhf_kit.distributed import print_main

FUNCTION = re.compile(r"(?P<where>.+\.py|[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)")


def read(source: str) -> Iterator[tuple[str, Any]]:
    """(place, row) of every row. ValueError where the function is missing or fails."""
    match = FUNCTION.fullmatch(source)
    assert match is not None
    where, name = match["where"], match["name"]
    if where.endswith(".py"):
        require(Path(where).expanduser().is_file(), f"file {where} does not exist")
    print_main(f"data source {source}: running your function {name} of {where}")
    rows, number = _run(source, where, name), 0
    while True:
        number += 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit() in the user's code is a mistake as well
            raise ValueError(_its_error(source, error)) from error
        yield f"row {number}", row


def _run(source: str, where: str, name: str) -> Iterator[Any]:
    function = getattr(_module(where), name, None)
    if not callable(function):
        raise AttributeError(f"{where} has no function {name}")
    yield from function()  # pyright: ignore[reportGeneralTypeIssues]


def _module(where: str) -> Any:
    if not where.endswith(".py"):
        if "" not in sys.path:  # the command's own directory stands first, not the user's
            sys.path.insert(0, "")
        return importlib.import_module(where)
    path = Path(where).expanduser()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _its_error(source: str, error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    where, line = place.filename, place.lineno
    if isinstance(error, SyntaxError):
        where, line = error.filename or where, error.lineno
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    at = "" if where == __file__ else f" at {where}, line {line}"
    return f"data source {source}: your function failed{at}: {type(error).__name__}: {reason}"
