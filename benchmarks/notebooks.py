"""How long does each notebook of the course take, and how much memory?

    python benchmarks/notebooks.py [--solutions]

Each runs alone as a script, with its own defaults, which are the toy preset's, in an empty run
directory: so 04 first makes what it needs of 02 and 03. One after the other, on all cores.
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


def measure(notebook: Path, folder: Path) -> dict[str, Any]:
    """Minutes, and the largest resident memory of one of its processes."""
    begin = time.monotonic()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(notebook), f"--run_dir={folder / 'run'}"], stdout=log, stderr=log
        )
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{notebook.name} failed: {(folder / 'log').read_text()[-2000:]}")
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
    for notebook in found:
        name = str(notebook.relative_to(pipeline.NOTEBOOKS).with_suffix(""))
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = measure(notebook, Path(folder))
        print(
            f"{name:32} {figures[name]['minutes']:5.1f} min  {figures[name]['peak_gib']:4.1f} GiB"
        )
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
