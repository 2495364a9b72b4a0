"""Rows on disk: the same rows, the same order, whatever has been written where."""

from __future__ import annotations

import tempfile
from array import array
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_kit import row_store
from rlhf_kit.row_store import BlendedRows, RowStore
from rlhf_kit.types import PreferencePair


def pair(text: str, chosen: str | None = None, kind: str = "") -> PreferencePair:
    prompt = ({"role": "system", "content": "短く"}, {"role": "user", "content": text})
    return PreferencePair(prompt, chosen, None, kind, "s")  # type: ignore[arg-type]


def filled(rows: list[PreferencePair]) -> RowStore:
    store = RowStore("s")
    for row in rows:
        store.append(row)
    return store


@settings(derandomize=True, max_examples=30, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=20), max_size=30),
    most=st.none() | st.integers(0, 40),
    limit=st.integers(0, 400),
)
def test_a_store_gives_back_what_a_shuffled_list_would(
    texts: list[str], most: int | None, limit: int
):
    rows = [pair(text, chosen=text or None, kind=text[:1]) for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_store, "IN_MEMORY", limit)  # some rows, or all, go to the file
        store = filled(rows)
    assert list(store) == rows
    store.shuffle(7, most)
    Random(7).shuffle(rows)
    assert list(store) == rows[:most]
    assert store[2:9:3] == rows[:most][2:9:3]


def test_a_negative_place_counts_from_the_end_and_one_beyond_it_is_an_error():
    store = filled([pair("a"), pair("b")])
    assert store[-1] == pair("b")
    with pytest.raises(IndexError):
        store[2]


def test_a_full_disk_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(row_store, "IN_MEMORY", 10)
    monkeypatch.setattr(row_store.os, "pwrite", full)
    with pytest.raises(ValueError, match=f"{tempfile.gettempdir()} .No space left.*TMPDIR"):
        filled([pair("a")])


def test_a_blend_is_a_sequence_whose_slices_and_selections_are_blends():
    one, two = [pair("a"), pair("b")], [pair("c")]
    blend = BlendedRows([one, two], array("H", [0, 1, 0, 1]), array("q", [1, 0, 0, 0]))
    expected = [pair("b"), pair("c"), pair("a"), pair("c")]
    assert blend == expected and list(blend) == expected and len(blend) == 4
    assert blend[-2] == pair("a") and blend[1:3] == expected[1:3]
    assert isinstance(blend[1:3], BlendedRows)
    assert blend.take([3, 0]) == [pair("c"), pair("b")]
    assert blend != expected[:3] and blend != expected[::-1] and blend != "b"
