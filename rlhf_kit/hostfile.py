"""The hosts of a launch: DeepSpeed's hostfile and .deepspeed_env, read and checked before it does.

DeepSpeed's runner ends in a traceback where these are not as it wants them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rlhf_kit.config import require

HOST_LINE = re.compile(r"(\S+)\s+slots=(\d+)\s*(#.*)?")
ENVIRONMENT_LINE = re.compile(r"\s*[A-Za-z_]\w*\s*=.*")


def read_hostfile(path: str | Path) -> dict[str, int]:
    """Host -> slots, in the file's order; ValueError names the line that is not `host slots=N`."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        raise ValueError(f"there is no hostfile {path}") from None
    except UnicodeDecodeError:
        raise ValueError(f"the hostfile {path} is not text") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        match = HOST_LINE.fullmatch(line)
        if match is None or int(match[2]) == 0:
            raise ValueError(f"{path}, line {number}: write 'host slots=8', not {line!r}")
        require(match[1] not in hosts, f"{path}, line {number}: {match[1]} is named twice")
        hosts[match[1]] = int(match[2])
    require(bool(hosts), f"the hostfile {path} names no host; write lines like 'host slots=8'")
    return hosts


def check_environment_files() -> None:
    """DeepSpeed's runner ends in a traceback on a line of .deepspeed_env that is no assignment."""
    for directory in (Path.home(), Path.cwd()):
        path = directory / os.environ.get("DS_ENV_FILE", ".deepspeed_env")
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for number, line in enumerate(lines, start=1):
            require(
                ENVIRONMENT_LINE.fullmatch(line) is not None,
                f"{path}, line {number}: write NAME=value, not {line!r}; DeepSpeed takes no empty "
                "lines and no comments here",
            )


def require_reachable(hostfile: str | Path) -> None:
    """pdsh is here, and ssh logs in to every host by key; ValueError names those it does not."""
    require(
        shutil.which("pdsh") is not None,
        "--hostfile needs pdsh on this host; install it (apt install pdsh), or use --slurm",
    )
    missing = _unreachable(list(read_hostfile(hostfile)))
    require(
        not missing,
        f"ssh does not log in to {', '.join(missing)} without a password; set up keys, or take "
        f"it out of {hostfile}",
    )


def _unreachable(hosts: Sequence[str]) -> list[str]:

    def reached(host: str) -> bool:
        command = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", host, "true"]
        try:
            return subprocess.run(command, capture_output=True, timeout=30).returncode == 0
        except (OSError, subprocess.TimeoutExpired):
            return False

    with ThreadPoolExecutor(32) as pool:
        return [
            host for host, fine in zip(hosts, pool.map(reached, hosts), strict=True) if not fine
        ]
