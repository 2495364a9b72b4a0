"""What splits share: nothing by hash, near-equal prompts and n-grams counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_kit.blending import Blend, held_out, split_of
from rlhf_kit.config import DataConfig, SourceConfig
from rlhf_kit.split_manifest import ngram_leaks, normalised, split_manifest, words
from rlhf_kit.types import STAGES, PreferencePair


def prompt(text: str) -> PreferencePair:
    return PreferencePair(({"role": "user", "content": text},), "yes", "no")


def write(path: Path, prompts: list[str]) -> SourceConfig:
    rows = [{"prompt": p, "chosen": f"y{i}", "rejected": f"n{i}"} for i, p in enumerate(prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(str(path))


def test_case_spaces_and_width_make_no_difference():
    assert normalised(" Ｈow\n DO  I?") == normalised("how do i?") == "how do i?"
    assert words(prompt("Don't PANIC, 東京タワー 2!")) == [
        *["don", "t", "panic"],
        *["東", "京", "タ", "ワ", "ー", "2"],
    ]


def test_prompts_that_differ_in_case_alone_are_counted(tmp_path: Path):
    data = DataConfig(eval_share=0.3)

    def part(text: str) -> tuple[str, bool]:
        found = prompt(text).prompt_id
        return split_of(found, data.split), held_out(found, data.eval_share)

    lower = [f"prompt number {i}" for i in range(60)]
    moved = [text for text in lower if part(text) != part(text.upper())]
    # Two that are evaluated with, and with nothing trained on, are no leak.
    leaks = [t for t in moved if not (part(t)[1] and part(t.upper())[1])]
    assert leaks and len(leaks) < len(moved)
    source = write(tmp_path / "a.jsonl", lower + [text.upper() for text in lower])
    manifest = split_manifest(Blend(DataConfig(sources=(source,), eval_share=0.3), 1))
    assert manifest["leaks"]["exact"] == 0
    assert manifest["leaks"]["normalised"] == len(leaks)
    assert sum(manifest["leaks"]["between"].values()) == len(leaks)
    assert manifest["leaks"]["evaluations"] == len(moved) - len(leaks)
    json.dumps(manifest)  # plain values, for a file


@settings(derandomize=True, max_examples=10, deadline=None)
@given(
    first=st.lists(st.integers(0, 60), min_size=40, max_size=70),
    second=st.lists(st.integers(0, 60), min_size=40, max_size=70),
    reverse=st.booleans(),
    weight=st.sampled_from([0.2, 1.0, 5.0]),
    repeat=st.integers(1, 3),
)
def test_no_exact_leak_under_duplication_reordering_blending_and_repeats(
    tmp_path_factory: pytest.TempPathFactory,
    first: list[int],
    second: list[int],
    reverse: bool,
    weight: float,
    repeat: int,
):
    folder = tmp_path_factory.mktemp("leaks")
    one = write(folder / "a.jsonl", [f"p {i}" for i in (first[::-1] if reverse else first)])
    two = write(folder / "b.jsonl", [f"p {i}" for i in second])
    sources = (SourceConfig(one.name, weight=weight, repeat=repeat), two)
    blend = Blend(DataConfig(sources=sources, eval_share=0.3), 1)
    try:
        assert split_manifest(blend)["leaks"]["exact"] == 0
    except ValueError as error:  # so few prompts that a split is empty
        assert "no rows are left" in str(error)


def test_a_prompt_that_was_trained_on_and_evaluated_would_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from rlhf_kit import blending

    source = write(tmp_path / "a.jsonl", [f"p {i % 40}" for i in range(120)])
    coin = iter(range(10**6))
    monkeypatch.setattr(blending, "held_out", lambda *_: next(coin) % 2 == 0)  # by row, not by hash
    manifest = split_manifest(Blend(DataConfig(sources=(source,)), 1))
    assert manifest["leaks"]["exact"] > 0


def test_ngram_leaks_by_hand():
    common = "one two three four five six seven eight"
    found = ngram_leaks(
        {
            "sft": [prompt(f"please {common} nine"), prompt("ten eleven")],
            "sft evaluation": [
                prompt(f"{common} and more"),  # eight words in common
                prompt("one two three four five six seven nine"),  # only seven in a row
                prompt("Ten ELEVEN!"),  # short, and whole in a training prompt
                prompt("ten twelve"),
                prompt("..."),  # no word at all: not counted
            ],
            "ppo": [prompt("twelve and ten twelve")],
            "ppo evaluation": [],
        }
    )
    assert found == {
        "sft": {"sft": 2 / 4, "ppo": 1 / 4, "any": 3 / 4},
        "ppo": {"sft": 0.0, "ppo": 0.0, "any": 0.0},
    }


def test_a_stage_without_a_share_is_left_out(tmp_path: Path):
    source = write(tmp_path / "a.jsonl", [f"p {i}" for i in range(50)])
    manifest = split_manifest(Blend(DataConfig(sources=(source,), split=(1, 0, 0)), 1))
    assert set(manifest["stages"]) == {"sft"} != set(STAGES)
    assert manifest["leaks"]["exact"] == 0 and set(manifest["leaks"]["ngram"]) == {"sft"}
