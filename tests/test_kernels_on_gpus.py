"""The Triton kernels, compiled for GPUs that are not here: they fit each one's shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

COMPILE = """
import json, sys
import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rlhf_kit.hybrid_engine import kernels, linear_kernels

capability, kilobytes = map(int, sys.argv[1:])
kernels._shared_bytes = lambda device: 1024 * kilobytes
device = torch.device("cuda", 0)
TYPES = {
    "lengths": "*i64", "blocks": "*i64", "partial": "*fp32", "stats": "*fp32", "scratch": "*fp32",
    "counters": "*i32", "scale": "fp32", "softcap": "fp32", "least": "fp32",
}
HALVES = {"query", "key", "value", "keys", "values", "out", "input", "weight", "bias"}
ODD = {"rows", "window", "has_bias", "adds", "scale", "softcap", "least"}

def shared(kernel, warps, **constants):
    names = kernel.arg_names
    kinds = {n: TYPES.get(n, "*bf16" if n in HALVES else "i32") for n in names}
    source = ASTSource(
        fn=kernel,
        signature={**kinds, **dict.fromkeys(constants, "constexpr")},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, n in enumerate(names) if n not in constants and n not in ODD
        },
    )
    made = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    return made.metadata.shared

found = {}
for rows in (16, 64):
    height, block, stages = linear_kernels.tile_of(rows, 2, device)
    tile = {"NP": height, "BO": linear_kernels.OUTPUTS, "BK": block, "STAGES": stages}
    found[f"linear {tile}"] = shared(linear_kernels._linear, 4, PARTS=4, **tile)
for programs, groups, size in ((10000, 1, 64), (10000, 1, 128), (256, 6, 128), (256, 8, 256)):
    block, warps, stages = kernels.tiles(programs, groups > 1)
    block, stages = kernels.fitted(block, stages, 4 * size, device)
    tile = {"BLOCK": block, "STAGES": stages, "D": size, "E": size}
    found[f"attention of {groups} {tile}"] = shared(
        kernels._attend, warps, G=groups, GP=16, DP=size, EP=size, SPLITS=1, SOFTCAP=False,
        DOT=stages > 0, **tile,
    )
print(json.dumps(found))
"""


@pytest.mark.parametrize(("capability", "kilobytes"), [(90, 227), (89, 99)], ids=["H200", "4090"])
def test_the_kernels_fit_the_shared_memory_of(
    capability: int, kilobytes: int, tmp_path: Path
) -> None:
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", COMPILE, str(capability), str(kilobytes)]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=250)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert len(found) == 6
    assert all(nbytes <= 1024 * kilobytes for nbytes in found.values()), found
    assert max(found.values()) > 1024 * kilobytes / 3  # room is used, not only left
