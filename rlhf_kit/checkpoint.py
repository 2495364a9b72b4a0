"""Exports: a HF directory that plain transformers loads, complete or absent.

Files are written to a temporary directory beside the target and moved in at the end, so that
metrics that lie there stay. `export.json` comes last: it marks the export complete and carries
the SHA-256 of every file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from rlhf_kit import distributed
from rlhf_kit.config import require
from rlhf_kit.models import has_adapters, merged_state_dict, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKER = "export.json"


@contextlib.contextmanager
def _gathered(module: nn.Module) -> Iterator[None]:
    """Whole parameters on every rank, where ZeRO-3 has cut them into shards."""
    if not any(hasattr(p, "ds_id") for p in module.parameters()):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        yield


def is_complete(directory: str | Path) -> bool:
    """Whether `directory` holds an export that was finished."""
    return (Path(directory) / MARKER).is_file()


def read_marker(directory: str | Path) -> dict[str, Any]:
    """The contents of export.json; ValueError where the export is missing or unfinished."""
    require(
        is_complete(directory),
        f"{directory} holds no finished export; run the stage that writes it first",
    )
    return json.loads((Path(directory) / MARKER).read_text())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify(directory: str | Path) -> None:
    """ValueError naming the first file of an export that is missing or has other contents."""
    for name, digest in read_marker(directory)["sha256"].items():
        path = Path(directory) / name
        require(path.is_file(), f"{directory}: {name} is missing; export it again")
        require(_sha256(path) == digest, f"{directory}: {name} was changed after it was exported")


def export(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    *,
    details: Mapping[str, Any] | None = None,
) -> Path:
    """Write `model` (a transformers model, also inside an engine) with its tokenizer.

    Adapters are merged into a copy; the live weights stay untouched. All ranks must call it.
    `details` go into export.json.
    """
    target = Path(directory)
    temporary = target.with_name(f".{target.name}.tmp")
    with _gathered(model):
        state = merged_state_dict(model) if has_adapters(model) else model.state_dict()
        if distributed.is_main_rank():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            # contiguous clones: parameters of a ZeRO buffer are views of one large storage
            state = {key: tensor.detach().cpu().clone() for key, tensor in state.items()}
            _save_pretrained(model, state, temporary)
            tokenizer.save_pretrained(temporary)
            _finish(temporary, target, dict(details or {}))
    distributed.barrier()
    return target


def _save_pretrained(model: Any, state: dict, directory: Path) -> None:
    use_cache, model.config.use_cache = model.config.use_cache, True
    peft_loaded = getattr(model, "_hf_peft_config_loaded", False)
    model._hf_peft_config_loaded = False  # adapters are merged in `state`: save the whole model
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name in tied:
        state.pop(name, None)
    try:
        with quiet_transformers():
            model.save_pretrained(directory, state_dict=state)
    finally:
        model.config.use_cache = use_cache
        model._hf_peft_config_loaded = peft_loaded


def _finish(temporary: Path, target: Path, details: dict[str, Any]) -> None:
    files = sorted(p for p in temporary.iterdir() if p.is_file())
    for path in files:
        path.chmod(0o644)  # safetensors writes 0600, which a shared file system can't read
        with path.open("rb") as file:
            os.fsync(file.fileno())
    digests = {path.name: _sha256(path) for path in files}
    # From here on the target is marked unfinished, until every file is in its place.
    target.mkdir(parents=True, exist_ok=True)
    (target / MARKER).unlink(missing_ok=True)
    for stale in target.glob("*.safetensors*"):
        stale.unlink()
    for path in files:
        os.replace(path, target / path.name)
    (temporary / MARKER).write_text(json.dumps({**details, "sha256": digests}, indent=2) + "\n")
    os.replace(temporary / MARKER, target / MARKER)
    temporary.rmdir()
