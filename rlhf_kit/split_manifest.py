"""What the splits of a blend share: by hash nothing, in other words perhaps something.

Splits are cut by the exact text of a prompt, so no prompt is in two of them. A prompt that
differs in case or spaces alone is another text, and may be in another split; so may one that
quotes another. This file counts them: exactly, after normalisation, and by n-grams.
"""

from __future__ import annotations

import json
import re
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_kit.blending import Blend
from rlhf_kit.config import DataConfig
from rlhf_kit.types import STAGES, PreferencePair

NGRAM = 8
"""Words in a row that two prompts must share; a shorter prompt must be shared as a whole."""
# A word, or one character of a script that is written without spaces.
WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
    r"|[^\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+"
)


def normalised(text: str) -> str:
    """Without differences of case, spaces and compatible characters (NFKC)."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def split_manifest(blend: Blend) -> dict[str, Any]:
    """`Blend.manifest` of all stages, and what their prompts share, as plain values.

    `leaks` holds, in distinct prompts: `exact`, training prompts that another stage trains on or
    any stage is evaluated with, 0 by construction; `normalised`, the same after `normalised`;
    `between`, which parts share how many of these; `evaluations`, prompts that two stages are
    evaluated with, which harms nothing (the toy world has some); `ngram`, for each stage's
    evaluation prompts the share that has an 8-gram in common with a training prompt of each
    stage, or of `any`.
    """
    parts: dict[str, Sequence[PreferencePair]] = {}
    for stage in STAGES:
        if blend.config.split[STAGES.index(stage)]:
            parts[stage] = blend[stage]
            parts[f"{stage} evaluation"] = blend.evaluation(stage)
    exact = {name: _hashes(rows, as_is=True) for name, rows in parts.items()}
    near = {name: _hashes(rows, as_is=False) for name, rows in parts.items()}
    return {
        **blend.manifest(),
        "leaks": {
            "exact": len(_leaked(exact)),
            "normalised": len(_leaked(near)),
            "between": {
                f"{one} / {two}": count
                for one, two in combinations(near, 2)
                if (one in STAGES or two in STAGES) and (count := len(_both(near[one], near[two])))
            },
            "evaluations": len(_repeated([near[name] for name in near if name not in STAGES])),
            "ngram": ngram_leaks(parts),
        },
    }


def write_manifest(config: DataConfig, file: Path) -> None:
    """Blend `config`, print what the splits share, and write the manifest. ValueError for users."""
    manifest = split_manifest(Blend(config, seed=1))
    try:
        file.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{file} cannot be written: {error.strerror or error}") from error
    leaks = manifest["leaks"]
    print(
        f"{file}: {leaks['exact']} prompts in two splits, {leaks['normalised']} more or less equal "
        "ones (case and spaces apart)"
    )
    for stage, shares in leaks["ngram"].items():
        print(
            f"  {stage}: {shares['any']:.1%} of the evaluation prompts share {NGRAM} words in a "
            "row with a training prompt"
        )


def _hashes(rows: Sequence[PreferencePair], *, as_is: bool) -> np.ndarray:
    """One number for each distinct prompt, eight bytes each; sorted."""
    found = array("Q")
    for row in rows:
        if as_is:
            found.append(int(row.prompt_id[:16], 16))
        else:
            turns = (f"{message['role']}: {message['content']}" for message in row.prompt)
            found.append(_hash(normalised("\n".join(turns))))
    return np.unique(np.frombuffer(found, dtype=np.uint64)) if found else np.empty(0, np.uint64)


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def _leaked(parts: dict[str, np.ndarray]) -> np.ndarray:
    train = [hashes for name, hashes in parts.items() if name in STAGES]
    evaluation = [hashes for name, hashes in parts.items() if name not in STAGES]
    crossed = _both(np.unique(np.concatenate(train)), np.unique(np.concatenate(evaluation)))
    return np.union1d(_repeated(train), crossed)


def _both(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    return np.intersect1d(one, two, assume_unique=True)


def _repeated(parts: list[np.ndarray]) -> np.ndarray:
    """What is in more than one of them."""
    found, counts = np.unique(np.concatenate(parts), return_counts=True)
    return found[counts > 1]


def words(prompt: PreferencePair) -> list[str]:
    """The words of a dialogue's user turns, normalised; single characters of Chinese, Japanese."""
    text = "\n".join(m["content"] for m in prompt.prompt if m["role"] == "user")
    return WORD.findall(normalised(text))


def _grams(found: list[str], n: int) -> Iterator[int]:
    for start in range(len(found) - n + 1):
        yield _hash(" ".join(found[start : start + n]))


def ngram_leaks(parts: dict[str, Sequence[PreferencePair]]) -> dict[str, dict[str, float]]:
    """Share of each stage's distinct evaluation prompts with an n-gram in training prompts."""
    wanted: dict[str, dict[int, set[int]]] = {}  # prompt ids -> its grams, by evaluation part
    lengths: set[int] = set()
    every: set[int] = set()
    for name, rows in parts.items():
        if not name.endswith(" evaluation"):
            continue
        wanted[name] = {}
        for row in rows:
            found = words(row)
            n = min(NGRAM, len(found))
            if n:
                grams = set(_grams(found, n))
                wanted[name][int(row.prompt_id[:16], 16)] = grams
                lengths.add(n)
                every |= grams
    # Of each training part, the grams that an evaluation prompt has as well: a small set.
    seen = {
        name: {
            gram
            for row in rows
            for found in [words(row)]
            for n in lengths
            for gram in _grams(found, n)
            if gram in every
        }
        for name, rows in parts.items()
        if name in STAGES
    }
    seen["any"] = set().union(*seen.values())
    return {
        name.removesuffix(" evaluation"): {
            stage: _share(sum(not grams.isdisjoint(there) for grams in prompts.values()), prompts)
            for stage, there in seen.items()
        }
        for name, prompts in wanted.items()
    }


def _share(count: int, prompts: Sequence[Any] | dict[Any, Any]) -> float:
    return count / len(prompts) if prompts else 0.0
