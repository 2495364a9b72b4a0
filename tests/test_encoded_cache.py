"""The cache of encoded rows: what is in the key, who may write, and what damage does."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
from pathlib import Path

import pytest
from test_tokenization import CHATML, byte_tokenizer

from rlhf_kit import encoded_cache, encoded_rows
from rlhf_kit.config import DataConfig
from rlhf_kit.encoded_cache import key_parts
from rlhf_kit.tokenization import encode_demonstrations, encode_pairs
from rlhf_kit.types import PreferencePair

ROLES = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
KIT = byte_tokenizer(**ROLES)
SETTINGS: dict[str, object] = {"what": "pairs", "lengths": [60, 70]}


def pair(prompt: str, chosen: str = "yes", rejected: str = "no", kind: str = "") -> PreferencePair:
    return PreferencePair(({"role": "user", "content": prompt},), chosen, rejected, kind)


ROWS = [
    pair("a", kind="tone"),
    pair("b" * 60),  # too long
    pair("c", "a long response that is cut, " * 3, kind="facts"),
    pair("d", "日本", "中国"),
]


def config(folder: Path | str = "") -> DataConfig:
    return DataConfig(max_prompt_length=60, max_length=70, cache=str(folder))


def entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


@pytest.mark.parametrize("encode", [encode_pairs, encode_demonstrations])
def test_rows_out_of_the_cache_are_those_that_went_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encode: object
):
    assert callable(encode)
    plain = encode(KIT, ROWS, config())
    first = encode(KIT, ROWS, config(tmp_path))
    monkeypatch.setattr(encoded_rows, "encode_prompt", lambda *_: pytest.fail("encoded again"))
    again = encode(KIT, ROWS, config(tmp_path))
    for kept in (first, again):
        assert list(kept.rows) == plain.rows and kept.rows[-1] == plain.rows[-1]
        assert kept.rows[0:3:2] == plain.rows[0:3:2]
        assert kept.counts() == plain.counts() and kept.lines() == plain.lines()
    assert plain.long_prompts == 1 and plain.cut_responses == 1
    assert len(entries(tmp_path)) == 1


def test_each_part_of_the_key_is_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    base = key_parts(KIT, ROWS, SETTINGS)
    assert key_parts(byte_tokenizer(**ROLES), list(ROWS), dict(SETTINGS)) == base

    def changed(**parts: dict[str, str]) -> list[str]:
        (other,) = parts.values()
        return [name for name in base if other[name] != base[name]]

    for rows in (
        ROWS[:-1],
        ROWS[::-1],
        [*ROWS[:-1], pair("d", "日本", "中国", kind="x")],
        [*ROWS[:-1], pair("d", "日本 ", "中国")],
    ):
        assert changed(rows=key_parts(KIT, rows, SETTINGS)) == ["rows"]
    template = byte_tokenizer(template=CHATML, **ROLES)
    assert changed(template=key_parts(template, ROWS, SETTINGS)) == ["chat_template"]
    more = byte_tokenizer("<|more|>", **ROLES)
    assert changed(tokenizer=key_parts(more, ROWS, SETTINGS)) == ["tokenizer"]
    longer = {**SETTINGS, "lengths": [60, 71]}
    assert changed(settings=key_parts(KIT, ROWS, longer)) == ["settings"]
    monkeypatch.setattr(encoded_cache.importlib.metadata, "version", lambda _: "9.9")
    assert changed(code=key_parts(KIT, ROWS, SETTINGS)) == ["code"]
    monkeypatch.undo()
    for name in encoded_cache.SOURCES:
        source = Path(encoded_cache.__file__).with_name(name).read_text()
        (tmp_path / name).write_text(source)
    monkeypatch.setattr(encoded_cache, "__file__", str(tmp_path / "encoded_cache.py"))
    assert key_parts(KIT, ROWS, SETTINGS) == base
    for name in encoded_cache.SOURCES:
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text + "\n")
        assert changed(code=key_parts(KIT, ROWS, SETTINGS)) == ["code"]
        (tmp_path / name).write_text(text)


def test_what_a_tokenizer_was_last_asked_for_is_not_part_of_the_key():
    before = key_parts(KIT, ROWS, SETTINGS)
    KIT(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert key_parts(KIT, ROWS, SETTINGS) == before


def test_another_part_makes_another_entry(tmp_path: Path):
    encode_pairs(KIT, ROWS, config(tmp_path))
    encode_demonstrations(KIT, ROWS, config(tmp_path))
    encode_pairs(KIT, ROWS, dataclasses.replace(config(tmp_path), max_length=71))
    encode_pairs(KIT, ROWS[:-1], config(tmp_path))
    assert len(entries(tmp_path)) == 4
    encode_pairs(KIT, ROWS, config(tmp_path))
    assert len(entries(tmp_path)) == 4


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["ids.i32", "numbers.i64", "entry.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "removed"])
def test_a_damaged_entry_is_made_again_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, how: str
):
    plain = encode_pairs(KIT, ROWS, config(tmp_path))
    expected = list(plain.rows)
    (entry,) = entries(tmp_path)
    path = entry / name
    if how == "removed":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-30])
    elif name == "entry.json":
        path.write_text(path.read_text().replace('"long_prompts": 1', '"long_prompts": 2'))
    else:
        flip(path)
    assert list(encode_pairs(KIT, ROWS, config(tmp_path)).rows) == expected
    assert "is damaged" in capsys.readouterr().out
    assert list(encode_pairs(KIT, ROWS, config(tmp_path)).rows) == expected
    assert "is damaged" not in capsys.readouterr().out
    assert entries(tmp_path) == [entry]  # nothing is left lying about


def _write(folder: str, start: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    assert len(encode_pairs(KIT, ROWS * 20, config(folder)).rows) == 60


def test_processes_that_write_the_same_rows_at_once_do_not_harm_each_other(tmp_path: Path):
    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(3)
    writers = [fork.Process(target=_write, args=(str(tmp_path), start)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    (entry,) = entries(tmp_path)
    assert set(json.loads((entry / "entry.json").read_text())["sha256"]) == {
        "ids.i32",
        "numbers.i64",
    }
    assert (entry.stat().st_mode & 0o777) == 0o755


def test_a_place_where_nothing_can_be_written_is_one_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="data.cache .*file cannot be written .*name another"):
        encode_pairs(KIT, ROWS, config(tmp_path / "file"))


def test_rows_of_which_none_fits_are_an_error_with_the_cache_as_well(tmp_path: Path):
    for _ in range(2):
        with pytest.raises(ValueError, match="none of 1 rows fits"):
            encode_pairs(KIT, ROWS[1:2], config(tmp_path))
