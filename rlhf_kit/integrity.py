"""Complete or absent: how a directory, or a small file, is written so that a crash never halves it.

    with integrity.writing(target, details) as temporary:   # beside it: the same file system
        ...                                                 # write files into it
    # now on disk: `seal` wrote sizes and SHA-256 of all files, last; `publish` renamed it

Neither safetensors nor torch notices a flipped bit or a tail of zeros, hence the SHA-256.
Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rlhf_kit.config import require

MANIFEST = "manifest.json"
SLACK = 1.2
"""Times what is going to be written must be free: other programs write too."""
FOREIGN_SECONDS = 24 * 3600
"""After this long a temporary directory of another computer is taken for abandoned."""
HOST = re.sub(r"[^\w.]", "_", platform.node())
ASIDE = re.compile(r"\.(?P<target>.+)\.(?P<kind>tmp|old)-(?P<host>[\w.]*)-(?P<pid>\d+)")
_writing: set[Path] = set()
"""Temporary directories that this process has begun and is not yet done with."""


# ---- a directory


@contextmanager
def writing(target: Path, details: Mapping[str, Any], *, name: str = MANIFEST) -> Iterator[Path]:
    """A temporary directory that becomes `target` at the end, or nothing where writing fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target.parent)
    unfinished = temporary(target)
    try:
        yield unfinished
        seal(unfinished, details, name=name)
        publish(unfinished, target)
    except BaseException:
        discard(unfinished)
        raise


def temporary(target: Path) -> Path:
    """A new, empty directory beside `target`, whose name says who writes it."""
    path = _aside(target, "tmp")
    _writing.add(path)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def seal(directory: Path, details: Mapping[str, Any], *, name: str = MANIFEST) -> None:
    """Bring all files to the disk and write the manifest, which makes the directory complete.

    The manifest holds `details`, `size` and `sha256` of every file, and a `seal`: the SHA-256 of
    all that. Files become readable to all, which those of safetensors are not.
    """
    found = _files(directory)
    for path in found.values():
        path.chmod(0o644)
        _sync(path)
    content = {
        **details,
        "size": {file: path.stat().st_size for file, path in found.items()},
        "sha256": {file: sha256(path) for file, path in found.items()},
    }
    content["seal"] = _seal_of(content)
    path = directory / name
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    path.chmod(0o644)
    _sync(path)
    for inner in {directory, *(path.parent for path in found.values())}:
        _sync(inner)


def publish(sealed: Path, target: Path) -> None:
    """Rename a sealed directory into place; what was there is moved aside first, then removed.

    A crash in between leaves the old one aside, and `recover` puts it back.
    """
    target = target.resolve()  # through a link, not over it
    old = _aside(target, "old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(sealed, target)
    _sync(target.parent)
    _writing.discard(sealed)
    if old.exists():
        os.rename(old, sealed)  # half removed it must never be put back
        shutil.rmtree(sealed, ignore_errors=True)


def remove(directory: Path) -> None:
    """Take a directory away at once, then delete its files; OSError where that can't be."""
    doomed = _aside(directory, "tmp")
    os.rename(directory.resolve(), doomed)
    shutil.rmtree(doomed)


def verify(directory: Path, *, name: str = MANIFEST) -> dict[str, Any]:
    """The manifest of a complete directory whose files are what they were when it was sealed.

    ValueError names the first that is missing, changed, cut, added or no plain file.
    """
    manifest = read_manifest(directory, name=name)
    found = _files(directory, but=name)
    for file, digest in manifest["sha256"].items():
        path = found.pop(file, None)
        require(path is not None, f"{directory}: {file} is missing")
        assert path is not None
        size = path.stat().st_size
        require(
            size == manifest["size"].get(file),
            f"{directory}: {file} has {size} bytes, not {manifest['size'].get(file)}",
        )
        require(sha256(path) == digest, f"{directory}: {file} was changed after it was written")
    require(not found, f"{directory}: {next(iter(found), '')} does not belong there")
    return manifest


def read_manifest(directory: Path, *, name: str = MANIFEST) -> dict[str, Any]:
    """The manifest, itself intact; the files are not looked at."""
    path = directory / name
    try:
        content = json.loads(path.read_bytes())
    except OSError:
        raise ValueError(f"{directory} is not complete: it has no {name}") from None
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.get("seal") != _seal_of(content):
        raise ValueError(f"{path} is broken or was changed after it was written")
    return content


def recover(parent: Path) -> None:
    """Undo what writers left behind who died: remove what they began, put back what they moved."""
    parent = parent.resolve()
    for path in sorted(parent.glob(".*")):
        name = ASIDE.fullmatch(path.name)
        if name is None or path in _writing or not _abandoned(path, name["host"], int(name["pid"])):
            continue
        if name["kind"] == "old" and not (parent / name["target"]).exists():
            os.rename(path, parent / name["target"])
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def discard(unfinished: Path) -> None:
    """Give up a directory that `temporary` gave."""
    shutil.rmtree(unfinished, ignore_errors=True)
    _writing.discard(unfinished)


# ---- a small file


def write_file(path: Path, text: str) -> None:
    """Write a file whole or not at all, and bring it to the disk; a link's target, not the link."""
    path = path.resolve()
    require(path.is_file() or not path.exists(), f"{path} is no plain file; choose another")
    partial = _aside(path, "tmp")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    _sync(path.parent)


# ---- what both need


def require_space(directory: Path, size: int) -> None:
    """ValueError unless `size` bytes, and a fifth more, are free where `directory` lies."""
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    require(
        free >= SLACK * size,
        f"{directory} has {free / 2**30:.1f} GiB free and {SLACK * size / 2**30:.1f} GiB are "
        "needed; free some space",
    )


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _files(directory: Path, *, but: str = "") -> dict[str, Path]:
    """Every file below a directory by its relative name, sorted; ValueError for a link."""

    def walk(folder: Path) -> Iterator[Path]:
        for path in sorted(folder.iterdir()):
            require(not path.is_symlink(), f"{path} is a link, not a file; put the file there")
            if path.is_dir():
                yield from walk(path)
            else:
                yield path

    found = {path.relative_to(directory).as_posix(): path for path in walk(directory)}
    return {name: path for name, path in found.items() if name != but}


def _seal_of(content: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _aside(target: Path, kind: str) -> Path:
    target = target.resolve()
    return target.with_name(f".{target.name}.{kind}-{HOST}-{os.getpid()}")


def _abandoned(path: Path, host: str, pid: int) -> bool:
    """Whether the process in a temporary's name is gone, or is this one, which is done with it."""
    if host != HOST:
        with suppress(OSError):
            return time.time() - path.stat().st_mtime > FOREIGN_SECONDS
        return False
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False
