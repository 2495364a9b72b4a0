"""The kill test, small: real processes, killed while they save, train and export."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_killed_stages_go_on_to_the_same_last_bit(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "benchmarks/kill_test.py", "--kills=3", "--aims=save,loop,export"]
        + [f"--output={tmp_path / 'result.json'}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["kills"] == result["equal"] == 3
    assert result["by_stage"] == {"sft": 1, "reward": 1, "ppo": 1}
    assert all(trial["rows"] > 0 for trial in result["trials"]), "killed while training"
