"""Exports: a HF directory that plain transformers loads, complete or absent.

Files are written to a temporary directory beside the target, which is one rename away from it.
`export.json` comes last: it marks the export complete and carries the SHA-256 of every file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import nn

from rlhf_kit import distributed, integrity
from rlhf_kit.adapters import FOLDER, save_adapter
from rlhf_kit.config import require
from rlhf_kit.hybrid_engine.partitions import gathered
from rlhf_kit.models import has_adapters, merged_state_dict, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKER = "export.json"


def is_complete(directory: str | Path) -> bool:
    """Whether `directory` holds an export that was finished."""
    return (Path(directory) / MARKER).is_file()


def read_marker(directory: str | Path) -> dict[str, Any]:
    """The contents of export.json; ValueError where the export is missing or unfinished."""
    require(
        is_complete(directory),
        f"{directory} holds no finished export; run the stage that writes it first",
    )
    return integrity.read_manifest(Path(directory), name=MARKER)


def verify(directory: str | Path) -> None:
    """ValueError naming the first file of an export that is missing, added or changed."""
    read_marker(directory)
    try:
        integrity.verify(Path(directory), name=MARKER)
    except ValueError as error:
        raise ValueError(f"{error}; export it again") from None


def export(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    *,
    details: Mapping[str, Any] | None = None,
) -> Path:
    """Write `model` (a transformers model, also inside an engine) with its tokenizer.

    Adapters are merged into a copy; the live weights stay untouched. The one in use also goes
    into `adapter/`, by itself. All ranks must call it.
    `details` go into export.json.
    """
    target = Path(directory)
    with gathered(model.parameters()):
        state = merged_state_dict(model) if has_adapters(model) else model.state_dict()
        if distributed.is_main_rank():
            # contiguous clones: parameters of a ZeRO buffer are views of one large storage
            state = {key: tensor.detach().cpu().clone() for key, tensor in state.items()}
            _require_place(target, sum(tensor.nbytes for tensor in state.values()))
            try:
                with integrity.writing(target, details or {}, name=MARKER) as temporary:
                    _save_pretrained(model, state, temporary)
                    if has_adapters(model):
                        save_adapter(model, temporary / FOLDER)
                    tokenizer.save_pretrained(temporary)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{target} could not be written: {error}") from error
    distributed.barrier()
    return target


def _require_place(target: Path, size: int) -> None:
    require(
        is_complete(target) or not target.exists() or not any(target.iterdir()),
        f"{target} holds other files than an export; move them, or export elsewhere",
    )
    integrity.require_space(target, size)


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
