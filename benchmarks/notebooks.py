"""How long does each notebook of the course take, and how much memory?

    python benchmarks/notebooks.py [--solutions]

Each runs as a script with its own defaults, which are the toy preset's, one after the other on all
cores and in one run directory, as a reader's do: 04 trains the models of 02 and 03.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rlhf_kit import pipeline

RESULT = Path(__file__).parent / "results" / "notebooks.json"


def measure(notebook: Path, run_dir: Path) -> dict[str, Any]:
    """Minutes, and the largest resident memory of one of its processes."""
    begin = time.monotonic()
    command = [sys.executable, str(notebook), f"--run_dir={run_dir}"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
        if status:
            log.seek(0)
            raise SystemExit(f"{notebook.name} failed: {log.read()[-2000:]}")
    return {
        "minutes": round((time.monotonic() - begin) / 60, 2),
        "peak_gib": round(used.ru_maxrss / 2**20, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--solutions", action="store_true", help="those of the exercises too")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    found = sorted(pipeline.NOTEBOOKS.glob("[0-9]*.py"))
    if args.solutions:
        found += sorted((pipeline.NOTEBOOKS / "solutions").glob("[0-9]*.py"))
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for notebook in found:
            name = str(notebook.relative_to(pipeline.NOTEBOOKS).with_suffix(""))
            figure = figures[name] = measure(notebook, Path(folder) / "run")
            print(f"{name:32} {figure['minutes']:5.2f} min  {figure['peak_gib']:4.2f} GiB")
    result = {
        "notebooks": figures,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": pipeline.commit(),
        "versions": pipeline.versions(),
    }
    pipeline.write_json(args.output, result)


if __name__ == "__main__":
    main()
