"""The settings of a stage as flat dicts: what decides the training, and what its last bits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_kit import distributed
from rlhf_kit.checkpoint import is_complete, read_marker
from rlhf_kit.fingerprint import NOT_WHAT_BUT_HOW
from rlhf_kit.run_directory import RunDirectory
from rlhf_kit.types import STAGES, Stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOT_TRAINING = ("checkpoint", "evaluation", "faults", "monitor")
"""Settings that decide neither."""


def training_settings(
    run: RunDirectory,
    stage: Stage,
    data: Sequence[Iterable[object]],
    tokenizer: PreTrainedTokenizerBase | None,
) -> dict[str, Any]:
    """All that decides what is trained, one value a dotted name: equal, the same training."""
    settings = {name: value for name, value in _config(run) if not _is_how(name)}
    for name in STAGES[: STAGES.index(stage)]:  # the models that this stage starts from
        path = run.model(name)
        settings[f"{name} model"] = read_marker(path)["seal"] if is_complete(path) else None
    settings["rows of data"] = [_digest(map(repr, rows)) for rows in data]
    if tokenizer is not None:
        words = sorted(tokenizer.get_vocab().items())
        settings["tokenizer"] = _digest(map(repr, [*words, tokenizer.chat_template]))
    return settings


def sharing(run: RunDirectory) -> dict[str, Any]:
    """How the work is shared out and kept in memory: equal, the same last bit."""
    how = {name: value for name, value in _config(run) if _is_how(name)}
    return {"ranks": distributed.world_size(), **how}


def _config(run: RunDirectory) -> Iterator[tuple[str, Any]]:
    config = {key: v for key, v in run.config.to_dict().items() if key not in NOT_TRAINING}
    return _dotted(json.loads(json.dumps(config)))


def _is_how(name: str) -> bool:
    return not NOT_WHAT_BUT_HOW.isdisjoint(name.split("."))


def _dotted(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()[:16]
