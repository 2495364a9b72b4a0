"""Complete or absent: every corruption is refused by name, every crash leaves old or new."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_training import die, forked

from rlhf_kit import integrity


def write(target: Path, content: bytes = b"weights" * 1000) -> Path:
    with integrity.writing(target, {"step": 3}) as temporary:
        (temporary / "a.bin").write_bytes(content)
        (temporary / "b.bin").write_bytes(content[::-1])
        (temporary / "inner").mkdir()
        (temporary / "inner" / "c.json").write_text("{}")
    return target


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    return write(tmp_path / "parent" / "sealed")


def test_a_sealed_directory_verifies_and_carries_its_details(sealed: Path):
    manifest = integrity.verify(sealed)
    assert manifest["step"] == 3 and manifest["size"]["a.bin"] == 7000
    assert set(manifest["sha256"]) == {"a.bin", "b.bin", "inner/c.json"}
    # sha256sum of b"{}", by another program
    assert manifest["sha256"]["inner/c.json"] == (
        "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    )
    assert [path.name for path in sealed.parent.iterdir()] == ["sealed"]


def test_files_can_be_read_by_all_whatever_wrote_them(tmp_path: Path):
    with integrity.writing(tmp_path / "x", {}) as temporary:
        (temporary / "private").write_bytes(b"1")
        (temporary / "private").chmod(0o600)  # as safetensors does
    assert (tmp_path / "x" / "private").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "x" / "manifest.json").stat().st_mode & 0o777 == 0o644


def change(name: str, edit: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda d: (d / name).write_bytes(edit((d / name).read_bytes()))


def flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def swap(directory: Path) -> None:
    one, other = (directory / "a.bin").read_bytes(), (directory / "b.bin").read_bytes()
    (directory / "a.bin").write_bytes(other)
    (directory / "b.bin").write_bytes(one)


def stale_manifest(directory: Path) -> None:
    older = write(directory.parent / "older", b"weighty" * 1000)
    shutil.copy(older / "manifest.json", directory)


def link(directory: Path) -> None:
    (directory / "a.bin").rename(directory.parent / "moved")
    (directory / "a.bin").symlink_to(directory.parent / "moved")


def grow_details(directory: Path) -> None:
    path = directory / "manifest.json"
    path.write_text(path.read_text().replace('"step": 3', '"step": 9'))


CORRUPTIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "torn": (change("a.bin", lambda c: c[:4096] + bytes(2904)), "a.bin was changed after"),
    "zero tail": (change("b.bin", lambda c: c[:-512] + bytes(512)), "b.bin was changed after"),
    "bit flip": (change("a.bin", lambda c: flip(c, 5000)), "a.bin was changed after"),
    "truncation": (change("a.bin", lambda c: c[:4096]), "a.bin has 4096 bytes, not 7000"),
    "empty": (change("inner/c.json", lambda c: b""), "inner/c.json has 0 bytes, not 2"),
    "missing shard": (lambda d: (d / "b.bin").unlink(), "b.bin is missing"),
    "swapped shards": (swap, "a.bin was changed after"),
    "extra file": (lambda d: (d / "d.bin").touch(), "d.bin does not belong there"),
    "stale manifest": (stale_manifest, "a.bin was changed after"),
    "link": (link, "a.bin is a link, not a file"),
    "manifest cut": (change("manifest.json", lambda c: c[:50]), "manifest.json is broken"),
    "manifest flipped": (change("manifest.json", lambda c: flip(c, 30)), "manifest.json is broken"),
    "manifest edited": (grow_details, "manifest.json is broken or was changed"),
    "manifest a list": (change("manifest.json", lambda c: b"[]"), "manifest.json is broken"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "is not complete: it has no"),
}


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_every_corruption_is_refused_by_the_name_of_the_file(sealed: Path, kind: str):
    corrupt, message = CORRUPTIONS[kind]
    corrupt(sealed)
    with pytest.raises(ValueError, match=message) as caught:
        integrity.verify(sealed)
    assert str(sealed) in str(caught.value)


# Crashes -----------------------------------------------------------------------------------


def calls_until_death(monkeypatch: pytest.MonkeyPatch, name: str, count: int) -> None:
    """This process is killed at the `count`th call of os.<name> from now on."""
    real, left = getattr(os, name), [count]

    def dying(*arguments: object, **keywords: object) -> object:
        left[0] -= 1
        if left[0] == 0:
            die()
        return real(*arguments, **keywords)

    monkeypatch.setattr(os, name, dying)


@pytest.mark.parametrize(("call", "most"), [("fsync", 12), ("rename", 4), ("rmdir", 4)])
def test_a_kill_at_any_point_leaves_the_old_directory_or_the_new_one(
    sealed: Path, monkeypatch: pytest.MonkeyPatch, call: str, most: int
):
    old, outcomes = integrity.verify(sealed)["sha256"], []
    for count in range(1, most + 1):

        def overwrite(count: int = count) -> None:
            calls_until_death(monkeypatch, call, count)
            write(sealed, b"new" * 999)

        outcomes.append(forked(overwrite))
        integrity.recover(sealed.parent)
        found = integrity.verify(sealed)["sha256"]
        assert found == old or found["a.bin"] != old["a.bin"]
        assert [path.name for path in sealed.parent.iterdir()] == ["sealed"]
        shutil.rmtree(sealed)
        write(sealed)
    assert outcomes[0] == -9 and outcomes[-1] == 0, "every call of a save was the last one once"


def test_what_a_killed_writer_moved_aside_is_put_back(
    sealed: Path, monkeypatch: pytest.MonkeyPatch
):
    def overwrite() -> None:
        calls_until_death(monkeypatch, "rename", 2)  # the old one is aside, the new one not there
        write(sealed, b"new" * 999)

    assert forked(overwrite) == -9
    assert not sealed.exists()
    integrity.recover(sealed.parent)
    assert integrity.verify(sealed)["size"]["a.bin"] == 7000


def test_a_failing_write_leaves_nothing_and_the_old_one_whole(sealed: Path):
    with pytest.raises(RuntimeError), integrity.writing(sealed, {}) as temporary:
        (temporary / "a.bin").write_bytes(b"half")
        raise RuntimeError
    integrity.verify(sealed)
    assert [path.name for path in sealed.parent.iterdir()] == ["sealed"]


def test_only_dead_writers_are_cleared_up_after(tmp_path: Path):
    mine = integrity.temporary(tmp_path / "mine")
    (dead := tmp_path / f".dead.tmp-{integrity.HOST}-{2**22 + 1}").mkdir()  # above every pid
    (alive := tmp_path / f".alive.tmp-{integrity.HOST}-{os.getppid()}").mkdir()
    (far := tmp_path / ".far.tmp-another.host-1").mkdir()
    (old := tmp_path / ".old.tmp-another.host-1").mkdir()
    os.utime(old, (0, 0))
    (tmp_path / f".note.tmp-{integrity.HOST}-{2**22 + 1}").write_text("a small file")
    (other := tmp_path / ".ipynb_checkpoints").mkdir()
    integrity.recover(tmp_path)
    assert set(tmp_path.iterdir()) == {mine, alive, far, other} and not dead.exists()
    integrity.discard(mine)
    assert not mine.exists()


def test_a_link_leads_to_where_the_directory_is_written(tmp_path: Path):
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "name").symlink_to(tmp_path / "disk" / "real")
    write(tmp_path / "name")
    assert (tmp_path / "name").is_symlink()
    integrity.verify(tmp_path / "disk" / "real")
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]


# A small file, and the disk ----------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_small_file_is_old_or_new_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
):
    path = tmp_path / "run.json"
    integrity.write_file(path, "old")

    def overwrite() -> None:
        calls_until_death(monkeypatch, call, 1)
        integrity.write_file(path, "new")

    assert forked(overwrite) == -9
    assert path.read_text() == "old"
    integrity.write_file(path, "new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o444 == 0o444
    integrity.recover(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_small_file_is_written_through_a_link_and_never_over_a_device(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    integrity.write_file(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "text"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is no plain file"):
        integrity.write_file(tmp_path / "pipe", "text")


def test_a_small_file_that_fails_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    integrity.write_file(tmp_path / "x", "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        integrity.write_file(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_fifth_more_than_what_is_written_must_be_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    gibibyte = 2**30
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=12 * gibibyte))
    integrity.require_space(tmp_path / "not" / "yet", 10 * gibibyte)
    with pytest.raises(ValueError, match=r"12\.0 GiB free and 13\.2 GiB are needed"):
        integrity.require_space(tmp_path, 11 * gibibyte)


def test_the_manifest_is_plain_json_for_other_programs(sealed: Path):
    content = json.loads((sealed / "manifest.json").read_text())
    assert set(content) == {"step", "size", "sha256", "seal"}
