"""How fast is a blend of a million rows made and read, and does its memory stay flat?

Five files of generated pairs (two JSON Lines, one of them packed by gzip, two more as CSV and
Parquet) are blended for all three stages: every row is read, checked, given to a split by its
prompt's hash, stored and shuffled, once for each stage. Then rows are read back in a random
order. Each size runs in a process of its own, whose peak resident memory the system reports.

    python benchmarks/blend_million.py [--rows 100000 1000000]
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from random import Random
from typing import Any

RESULT = Path(__file__).parent / "results" / "blend_million.json"
WORDS = (
    "how can we dry the boots near a warm lamp without harm to leather that was wet since "
    "morning while rain fell on roof and garden put them slowly into some quiet corner"
).split()
KINDS = ("a.jsonl", "b.jsonl", "c.jsonl.gz", "d.csv", "e.parquet")
WEIGHTS = (5.0, 4.0, 3.0, 2.0, 1.0)
READS = 100_000


def pairs(n: int, seed: int) -> Iterator[dict[str, str]]:
    """n rows of about 450 bytes; a tenth of the prompts is in every file."""
    chance, shared = Random(seed), Random(0)

    def text(words: int, chance: Random = chance) -> str:
        return " ".join(chance.choices(WORDS, k=words))

    for i in range(n):
        prompt = f"{text(15, shared)} {i}?" if i % 10 == 0 else f"{text(15)} {seed} {i}?"
        yield {"prompt": prompt, "chosen": text(35), "rejected": text(25) + " no"}


def write(folder: Path, rows: int) -> None:
    """Five files of rows / 5 rows each."""
    import pyarrow
    from pyarrow import parquet

    for seed, name in enumerate(KINDS, 1):
        made, path = pairs(rows // len(KINDS), seed), folder / name
        if name.endswith(".parquet"):
            schema = pyarrow.schema({k: pyarrow.string() for k in ("prompt", "chosen", "rejected")})
            with parquet.ParquetWriter(path, schema) as writer:
                while batch := [row for _, row in zip(range(10_000), made, strict=False)]:
                    writer.write_table(pyarrow.Table.from_pylist(batch, schema))
        elif name.endswith(".csv"):
            with path.open("w", newline="") as file:
                table = csv.DictWriter(file, ("prompt", "chosen", "rejected"))
                table.writeheader()
                table.writerows(made)
        else:
            with gzip.open(path, "wt", 1) if name.endswith(".gz") else path.open("w") as file:
                file.writelines(json.dumps(row) + "\n" for row in made)


def blend(folder: Path) -> dict[str, Any]:
    """Make and read the blend in this process; seconds, rows and peak memory."""
    from rlhf_kit.blending import Blend
    from rlhf_kit.config import DataConfig, SourceConfig
    from rlhf_kit.types import STAGES

    sources = tuple(
        SourceConfig(str(folder / name), weight=weight)
        for name, weight in zip(KINDS, WEIGHTS, strict=True)
    )
    made = Blend(DataConfig(sources=sources), seed=1)
    start = time.perf_counter()
    rows = {stage: len(made[stage]) + len(made.evaluation(stage)) for stage in STAGES}
    seconds = time.perf_counter() - start
    chance = Random(1)
    start = time.perf_counter()
    for _ in range(READS):
        part = made["reward"]
        assert part[chance.randrange(len(part))].rejected
    reading = time.perf_counter() - start
    return {
        "rows": rows,
        "blend_seconds": seconds,
        "reads_per_second": READS / reading,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def measure(rows: int) -> dict[str, Any]:
    """The same in a fresh process, and rows a second: each row passes once for each stage."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Another process, so that this one's memory, which a child inherits, stays small.
        subprocess.run([sys.executable, __file__, "--write", name, str(rows)], check=True)
        size = sum(path.stat().st_size for path in folder.iterdir())
        command = [sys.executable, __file__, "--blend", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
    return {
        "rows": rows,
        "files_mib": size / 2**20,
        "by_stage": found["rows"],
        "blend_seconds": found["blend_seconds"],
        "rows_per_second": 3 * rows / found["blend_seconds"],
        "reads_per_second": found["reads_per_second"],
        "peak_mib": found["peak_mib"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--blend", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        return write(Path(arguments.write[0]), int(arguments.write[1]))
    if arguments.blend:
        print(json.dumps(blend(Path(arguments.blend))))
        return None
    sizes = [measure(rows) for rows in arguments.rows]
    for size in sizes:
        print(
            f"{size['rows']:>9,} rows ({size['files_mib']:.0f} MiB of files): "
            f"{size['rows_per_second']:,.0f} rows/s, {size['reads_per_second']:,.0f} random "
            f"reads/s, peak memory {size['peak_mib']:.0f} MiB"
        )
    grown = (sizes[-1]["peak_mib"] - sizes[0]["peak_mib"]) * 2**20
    more = sizes[-1]["rows"] - sizes[0]["rows"]
    report = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "sizes": sizes,
        "bytes_of_memory_a_further_row": grown / more if more else None,
    }
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    if more:
        print(f"{grown / more:.0f} bytes of memory for each further row")


if __name__ == "__main__":
    main()
