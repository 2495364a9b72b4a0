"""Numbers that name data and settings: equal in two logs, equal runs.

Each is an integer below 2^32. A batch's is the sum of its rows' modulo 2^32, so that ranks which
hold a part of the batch each can add theirs up.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Mapping
from typing import Any

from rlhf_kit.config import RunConfig

BELOW = 2**32
NOT_WHAT_BUT_HOW = frozenset(
    "checkpoint zero_stage offload_optimizer offload_parameters gradient_checkpointing "
    "micro_batch_size micro_batch_tokens slots cache logprob_chunk generation_tp keep_cache "
    "cuda_graphs merge offload_idle".split()
)
"""Settings that share out, keep or repeat the work, and change no result but its rounding."""


def of_row(ids: Iterable[int]) -> int:
    """The number of one row: token ids, and whatever else tells it from others (64 bits each)."""
    return _number(array("q", ids).tobytes())


def of_batch(rows: Iterable[Iterable[int]]) -> int:
    """The number of a batch; the order of its rows does not count."""
    return sum(map(of_row, rows)) % BELOW


def of_config(config: RunConfig) -> int:
    """The number of all settings that decide what a run trains, and not how it is shared out."""
    return _number(json.dumps(_what(config.to_dict()), sort_keys=True).encode())


def _what(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: _what(v) for key, v in value.items() if key not in NOT_WHAT_BUT_HOW}


def _number(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=4).digest(), "little")
