"""Encoded rows on disk, under a name made of everything they depend on.

An entry is a directory of two plain arrays and a JSON file with their SHA-256. It is written
beside its place and moved there when it is whole, so that any number of ranks and processes may
share a cache: they never see half an entry, and of two that write the same one the first stays.
Nothing in it is pickled. Entries are never deleted; the directory may be, at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rlhf_kit.distributed import print_main
from rlhf_kit.types import PreferencePair

SOURCES = ("chat_template.py", "encoded_rows.py", "encoded_cache.py")
"""The code that decides what an encoded row is."""
PACKAGES = ("transformers", "tokenizers", "jinja2")
IDS, NUMBERS, MANIFEST = "ids.i32", "numbers.i64", "entry.json"


def key_parts(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Iterable[PreferencePair],
    settings: Mapping[str, object],
) -> dict[str, str]:
    """What encoded rows depend on, each as a hash: another part, another entry."""
    rows = hashlib.blake2b(digest_size=16)
    for pair in pairs:
        turns = [[message["role"], message["content"]] for message in pair.prompt]
        rows.update(json.dumps([turns, pair.chosen, pair.rejected, pair.kind]).encode() + b"\n")
    here = Path(__file__).parent
    code = [(here / name).read_text(encoding="utf-8") for name in SOURCES]
    code += [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return {
        "rows": rows.hexdigest(),
        "chat_template": _hash(str(tokenizer.chat_template)),
        "tokenizer": _hash(_tokenizer(tokenizer)),
        "settings": _hash(json.dumps(settings, sort_keys=True)),
        "code": _hash(json.dumps(code)),
    }


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: Any = sorted(tokenizer.get_vocab().items())
    if backend is not None:
        state = json.loads(backend.to_str())
        # What the last call asked for, not what the tokenizer is.
        state |= {"padding": None, "truncation": None}
    return json.dumps([type(tokenizer).__name__, tokenizer.special_tokens_map, state], default=str)


@dataclass(frozen=True)
class Entry:
    """Row i is `ids[numbers[i - 1][0] : numbers[i][0]]`, with the rest of `numbers[i]`."""

    ids: np.ndarray
    """[tokens] int32 of all rows, one after the other; mapped from the file, not read."""
    numbers: np.ndarray
    """[rows, 1 + k] int64: where the row ends, then k numbers the writer gave."""
    details: dict[str, Any]
    """What the writer said at the end."""

    def row(self, i: int) -> tuple[list[int], list[int]]:
        """The ids of a row, and its k numbers."""
        start = int(self.numbers[i - 1, 0]) if i else 0
        end, *numbers = self.numbers[i].tolist()
        return self.ids[start:end].tolist(), numbers


def find(directory: str | Path, parts: Mapping[str, str]) -> Entry | None:
    """The entry of this key; None where there is none, or it is damaged, which is said."""
    path = _path(directory, parts)
    if not path.exists():
        return None
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name in (IDS, NUMBERS):
            if _sha256(path / name) != manifest["sha256"][name]:
                raise ValueError(f"{name} was changed")
        details = manifest["details"]
        if _hash(json.dumps(details)) != manifest["hash"]:
            raise ValueError(f"{MANIFEST} was changed")
        ids = _mapped(path / IDS, "<i4")
        return Entry(ids, _mapped(path / NUMBERS, "<i8").reshape(-1, details["width"]), details)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        print_main(f"cache {path} is damaged ({error}); its rows are encoded again")
        aside = Path(tempfile.mkdtemp(prefix=".damaged-", dir=path.parent))
        with contextlib.suppress(OSError):  # another process was faster
            os.replace(path, aside / "entry")
        shutil.rmtree(aside, ignore_errors=True)
        return None


def write(
    directory: str | Path,
    parts: Mapping[str, str],
    rows: Iterable[tuple[Sequence[int], Sequence[int]]],
    details: Callable[[], dict[str, Any]],
) -> Entry:
    """Write the entry of this key and open it; `details` is asked after the last row.

    Args:
        rows: ids and k numbers of each row, k the same for all.

    Raises:
        ValueError: the directory cannot be written, or the disk is full.
    """
    path = _path(directory, parts)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=path.parent))
        temporary.chmod(0o755)  # mkdtemp makes it private, which a shared cache must not be
        end, width = 0, 1
        with (temporary / IDS).open("wb") as ids, (temporary / NUMBERS).open("wb") as numbers:
            for row_ids, row_numbers in rows:
                end += len(row_ids)
                width = 1 + len(row_numbers)
                ids.write(np.asarray(row_ids, dtype="<i4").tobytes())
                numbers.write(np.asarray([end, *row_numbers], dtype="<i8").tobytes())
        told = {"width": width, **details()}
        manifest = {
            "key": dict(parts),
            "details": told,
            "hash": _hash(json.dumps(told)),
            "sha256": {name: _sha256(temporary / name) for name in (IDS, NUMBERS)},
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        try:
            os.replace(temporary, path)
        except OSError:
            if not path.is_dir():  # otherwise another process has written the same rows
                raise
    except OSError as error:
        raise ValueError(
            f"data.cache {directory} cannot be written ({error.strerror or error}); name another "
            'directory, or "" for none'
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    entry = find(directory, parts)
    if entry is None:
        raise ValueError(f"cache {path} was damaged while it was written; name another data.cache")
    return entry


def _path(directory: str | Path, parts: Mapping[str, str]) -> Path:
    return Path(directory).expanduser() / _hash(json.dumps(dict(parts), sort_keys=True))


def _mapped(path: Path, dtype: str) -> np.ndarray:
    if not path.stat().st_size:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
