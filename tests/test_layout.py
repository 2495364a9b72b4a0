"""Who may import whom, where heavy packages may enter, and which words are not ours."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "rlhf_kit"

# One line a rank. A file imports what stands above it, or before it on its own line.
RANKS = [
    "recipes config distributed functional types integrity signals training_state generators "
    "fingerprint",
    "parameters statistics trust toy_world row_schemas row_function hub_datasets data_files "
    "datasets batch_order row_store blending split_manifest chat_template encoded_cache "
    "encoded_rows tokenization data_preview data_check faults metrics plots",
    "models logprob_kernels token_logprobs micro_batches adapters shared_base deepspeed_config",
    "hybrid_engine guarded_steps memory_check checkpoint checkpoint_directory ema",
    "sft reward scorer rlhf_engine rollout mixture monitor",
    "ppo invariants",
    "measure results votes launch pipeline run_directory "
    "training_settings resume evaluate report_page report cell_runner "
    "heartbeat rank_process hostfile cluster launch_command preflight chat data_command "
    "run_flags choices fitting plan_command deployment cli",
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names.split()}
ORDER = {name: place for place, name in enumerate(RANK)}

DEEPSPEED = {"hybrid_engine", "checkpoint", "ema"}
HEAVY = {"transformers", "deepspeed", "peft", "datasets", "matplotlib", "gradio"}
VAGUE = {"util", "utils", "helper", "helpers", "common", "misc"}
NOT_OUR_WORDS = {
    "cliprange": "clip_ratio",
    "cliprange_value": "value_clip",
    "completions": "responses",
    "episode": "rollout",
    "kl_ctl": "kl_coef",
    "old_rewards": "rewards",
    "padding_mask": "attention_mask",
    "pi_old": "old_logprobs",
    "policy_model": "actor",
    "reward_score": "score",
    "rw_model": "reward_model",
    "trajectories": "rollouts",
    "trajectory": "rollout",
    "unsup_coef": "ptx_coef",
}


def sources(*directories: Path) -> list[Path]:
    return sorted(path for directory in directories for path in directory.rglob("*.py"))


def module_of(path: Path) -> str:
    """The first part below rlhf_kit: a file's name, or its package's."""
    return path.relative_to(LIBRARY).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """(dotted name, line, whether at import time); imports for type checkers do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.walk(node)
    }
    for_types = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}, line {node.lineno}: write imports in full"
            # `from rlhf_kit import models` names a module, `from rlhf_kit.models import x` too
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((name, node.lineno, id(node) not in inside) for name in names)


def outside(directory: str) -> list[Path]:
    return sources(
        *(ROOT / name for name in ("rlhf_kit", "notebooks", "apps") if name != directory)
    )


@pytest.mark.parametrize("path", sources(LIBRARY), ids=lambda p: str(p.relative_to(LIBRARY)))
def test_a_file_imports_only_what_stands_below_it(path: Path):
    module = module_of(path)
    if module == "__init__":
        return
    assert module in RANK, f"give {module} a place in RANKS"
    for name, line, _ in imports(path):
        package, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if package != "rlhf_kit" or target == module:
            continue
        if target not in RANK:
            assert not (LIBRARY / target).with_suffix(".py").exists(), f"no place for {target}"
            assert target == "__version__", f"{module}, line {line}: from rlhf_kit import {target}"
            continue
        assert ORDER[target] < ORDER[module], (
            f"{module} (rank {RANK[module]}), line {line}, imports {target} (rank {RANK[target]})"
        )


def test_only_the_engine_and_the_checkpoints_import_deepspeed_and_only_when_called():
    for path in outside(""):
        for name, line, at_import in imports(path):
            if name.split(".")[0] == "deepspeed":
                assert path.is_relative_to(LIBRARY) and module_of(path) in DEEPSPEED, (path, line)
                assert not at_import, f"{path}, line {line}: import deepspeed inside the function"


def test_only_apps_import_gradio():
    for path in outside("apps"):
        assert "gradio" not in {name.split(".")[0] for name, _, _ in imports(path)}, path


@pytest.mark.parametrize(("ours", "theirs"), [("notebooks", "apps"), ("apps", "notebooks")])
def test_notebooks_and_apps_never_import_each_other(ours: str, theirs: str):
    forbidden = {path.stem for path in sources(ROOT / theirs)} | {theirs}
    for path in sources(ROOT / ours):
        for name, line, _ in imports(path):
            assert name.split(".")[0] not in forbidden, (path, line)


def test_the_library_never_imports_notebooks_or_apps():
    for path in sources(LIBRARY):
        for name, line, _ in imports(path):
            assert name.split(".")[0] not in {"notebooks", "apps", "tests", "benchmarks"}, (
                path,
                line,
            )


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("rlhf_kit", HEAVY),
        ("rlhf_kit.cli", HEAVY | {"torch"}),
        ("rlhf_kit.config", HEAVY | {"torch"}),
    ],
)
def test_importing_the_package_stays_light(module: str, forbidden: set[str]):
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not forbidden & set(done.stdout.split())


def test_every_file_is_named_after_what_it_holds():
    assert not [path for path in outside("") if path.stem in VAGUE]


def names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        for field in ("id", "arg", "attr", "name"):
            name = getattr(node, field, None)
            if isinstance(name, str):
                yield name, getattr(node, "lineno", 0)


def test_identifiers_are_the_glossarys_words():
    for path in outside(""):
        for name, line in names(ast.parse(path.read_text(encoding="utf-8"))):
            better = NOT_OUR_WORDS.get(name)
            assert better is None, f"{path.relative_to(ROOT)}, line {line}: {name} -> {better}"
