"""Splits by content, weights, and the order of an epoch."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_kit.blending import (
    Blend,
    epoch_order,
    fingerprint,
    held_out,
    interleave,
    length_bucketed_batches,
    split_of,
    tempered,
)
from rlhf_kit.config import DataConfig, SourceConfig, preset
from rlhf_kit.types import STAGES, PreferencePair

SMALL = settings(derandomize=True, max_examples=40, deadline=None)


def prompt_id(text: str) -> str:
    return PreferencePair(({"role": "user", "content": text},)).prompt_id


def write_pairs(path: Path, prompts: list[str], tag: str = "") -> str:
    rows = [
        {"prompt": prompt, "chosen": f"yes {i}{tag}", "rejected": f"no {i}{tag}"}
        for i, prompt in enumerate(prompts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(*sources: SourceConfig, **changes: object) -> DataConfig:
    return DataConfig(sources=sources, **changes)  # type: ignore[arg-type]


# Splits


@SMALL
@given(st.text(min_size=1), st.tuples(*[st.floats(0, 100)] * 3).filter(any))
def test_every_prompt_falls_into_one_split_and_never_into_an_empty_one(
    text: str, split: tuple[float, float, float]
):
    stage = split_of(prompt_id(text), split)
    assert split[STAGES.index(stage)] > 0


def test_split_shares_are_those_of_the_config():
    ids = [prompt_id(f"prompt {i}") for i in range(20_000)]
    counts = Counter(split_of(i, (2, 4, 4)) for i in ids)
    # Three standard errors of a share of .4 in 20,000 draws are .0104.
    assert counts["sft"] / 20_000 == pytest.approx(0.2, abs=0.0104)
    assert counts["reward"] / 20_000 == pytest.approx(0.4, abs=0.0104)
    inside = [i for i in ids if split_of(i, (2, 4, 4)) == "ppo"]
    share = sum(held_out(i, 0.05) for i in inside) / len(inside)
    assert share == pytest.approx(0.05, abs=0.0075)


def test_the_bounds_of_the_splits_are_where_the_shares_put_them():
    assert split_of("0" * 24, (1, 1, 2)) == "sft"
    assert split_of("3" + "f" * 23, (1, 1, 2)) == "sft"
    assert split_of("4" + "0" * 23, (1, 1, 2)) == "reward"
    assert split_of("8" + "0" * 23, (1, 1, 2)) == "ppo"
    assert split_of("f" * 24, (1, 1, 2)) == "ppo"
    assert split_of("f" * 24, (1, 0.1, 0)) == "reward"
    assert held_out("f" * 13 + "0" * 11, 0.01) and not held_out("0" * 13 + "f" * 11, 0.99)


@settings(derandomize=True, max_examples=15, deadline=None)
@given(
    first=st.lists(st.integers(0, 40), min_size=30, max_size=60),
    second=st.lists(st.integers(0, 40), min_size=30, max_size=60),
    seed=st.integers(0, 5),
    swap=st.booleans(),
)
def test_no_prompt_is_in_two_splits_however_sources_repeat_and_overlap(
    tmp_path_factory: pytest.TempPathFactory,
    first: list[int],
    second: list[int],
    seed: int,
    swap: bool,
):
    folder = tmp_path_factory.mktemp("blend")
    sources = [
        SourceConfig(write_pairs(folder / "a.jsonl", [f"p {i}" for i in first], "a"), weight=2),
        SourceConfig(write_pairs(folder / "b.jsonl", [f"p {i}" for i in second], "b")),
    ]
    blend = Blend(config(*(sources[::-1] if swap else sources), eval_share=0.2), seed)
    seen: dict[str, str] = {}
    for stage in STAGES:
        try:
            parts = {stage: blend[stage], f"{stage} evaluation": blend.evaluation(stage)}
        except ValueError as error:  # so few prompts that a split is empty
            assert "no rows are left" in str(error)
            continue
        for name, rows in parts.items():
            for row in rows:
                assert seen.setdefault(row.prompt_id, name) == name


def test_splits_do_not_depend_on_the_seed_or_the_order_of_rows(tmp_path: Path):
    prompts = [f"prompt {i}" for i in range(200)]
    forward = SourceConfig(write_pairs(tmp_path / "forward.jsonl", prompts))
    backward = SourceConfig(write_pairs(tmp_path / "backward.jsonl", prompts[::-1]))
    one, other = Blend(config(forward), 1), Blend(config(backward), 2)
    for stage in STAGES:
        assert {row.prompt_id for row in one[stage]} == {row.prompt_id for row in other[stage]}


# Weights


def test_interleaving_keeps_the_weights_in_every_prefix_and_repeats_nothing():
    order = list(interleave([6, 2], [3.0, 1.0]))
    assert order == [(0, 0), (0, 1), (0, 2), (1, 0), (0, 3), (0, 4), (0, 5), (1, 1)]
    assert list(interleave([1, 3], [9.0, 1.0])) == [(0, 0), (1, 0), (1, 1), (1, 2)]
    assert list(interleave([0, 0], [1.0, 1.0])) == []


def test_a_capped_blend_has_the_shares_of_its_weights(tmp_path: Path):
    sources = [
        SourceConfig(write_pairs(tmp_path / "a.jsonl", [f"a {i}" for i in range(400)]), weight=3),
        SourceConfig(write_pairs(tmp_path / "b.jsonl", [f"b {i}" for i in range(400)]), weight=1),
    ]
    blend = Blend(config(*sources, rows=(0, 80, 0)), 1)
    assert len(blend["reward"]) == 80
    counts = Counter(Path(row.source).name for row in blend["reward"])
    assert counts == {"a.jsonl": 60, "b.jsonl": 20}
    first_half = Counter(Path(row.source).name for row in blend["reward"][:40])
    assert first_half == {"a.jsonl": 30, "b.jsonl": 10}


def test_a_source_that_runs_out_falls_short_and_the_blend_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    small = write_pairs(tmp_path / "small.jsonl", [f"a {i}" for i in range(20)])
    large = write_pairs(tmp_path / "large.jsonl", [f"b {i}" for i in range(200)])
    blend = Blend(config(SourceConfig(small, weight=9), SourceConfig(large)), 1)
    responses = [(row.source, row.chosen) for row in blend["ppo"]]
    assert len(set(responses)) == len(responses)
    assert f"rows of {small} are" in capsys.readouterr().out
    described = blend.manifest()["stages"]["ppo"]  # type: ignore[index]
    assert sum(part["rows"] for part in described["sources"]) == len(responses)
    assert described["sources"][0]["rows"] == sum(name == small for name, _ in responses)


def test_max_rows_caps_one_source_and_a_cap_holds_evaluation_in_proportion(tmp_path: Path):
    path = write_pairs(tmp_path / "a.jsonl", [f"a {i}" for i in range(1000)])
    whole = Blend(config(SourceConfig(path), eval_share=0.2), 1)
    assert len(Blend(config(SourceConfig(path, max_rows=7)), 1)["sft"]) == 7
    half = len(whole["ppo"]) // 2
    capped = Blend(config(SourceConfig(path), eval_share=0.2, rows=(0, 0, half)), 1)
    assert capped["ppo"] == whole["ppo"][:half]
    ratio = len(capped.evaluation("ppo")) / len(whole.evaluation("ppo"))
    assert ratio == pytest.approx(0.5, abs=0.02)


def test_a_source_of_demonstrations_gives_the_other_stages_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    messages = [
        {
            "messages": [
                {"role": "user", "content": f"m {i}"},
                {"role": "assistant", "content": "yes"},
            ]
        }
        for i in range(50)
    ]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in messages))
    pairs = SourceConfig(write_pairs(tmp_path / "p.jsonl", [f"p {i}" for i in range(50)]))
    blend = Blend(config(SourceConfig(str(path)), pairs), 1)
    assert {Path(row.source).name for row in blend["sft"]} == {"m.jsonl", "p.jsonl"}
    assert {Path(row.source).name for row in blend["reward"]} == {"p.jsonl"}
    assert "no rejected" in capsys.readouterr().out
    stages = blend.manifest()["stages"]
    assert stages["reward"]["sources_without_rows"] == [str(path)]  # type: ignore[index]
    with pytest.raises(ValueError, match="no rejected"):
        Blend(config(SourceConfig(str(path))), 1)["reward"]


def test_a_small_source_with_repeats_keeps_its_share_until_the_large_one_ends():
    # Weights 1 and 1, three rows and one: the one comes again for as long as the others are new.
    order = list(interleave([3, 1], [1.0, 1.0], [1, 3]))
    assert order == [(0, 0), (1, 0), (0, 1), (1, 0), (0, 2)]
    # At most twice: then the large source goes on alone.
    assert list(interleave([4, 1], [1.0, 1.0], [1, 2])) == [
        *[(0, 0), (1, 0), (0, 1), (1, 0)],
        *[(0, 2), (0, 3)],
    ]
    # A source by itself has nothing to keep a share of.
    assert list(interleave([2], [1.0], [5])) == [(0, 0), (0, 1)]


@SMALL
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    seed=st.integers(0, 9),
    repeats=st.lists(st.integers(1, 4), min_size=5, max_size=5),
)
def test_interleaving_gives_every_row_and_none_oftener_than_it_may(
    sizes: list[int], seed: int, repeats: list[int]
):
    weights = [1.0 + (seed * (i + 1)) % 4 for i in range(len(sizes))]
    order = list(interleave(sizes, weights, repeats[: len(sizes)]))
    counts = Counter(order)
    assert set(counts) == {(i, row) for i, size in enumerate(sizes) for row in range(size)}
    assert all(count <= repeats[source] for (source, _), count in counts.items())
    # The rule in words: who is furthest behind its share gives next.
    taken = [0] * len(sizes)
    for source, row in order:
        left = [i for i, size in enumerate(sizes) if taken[i] < size * repeats[i]]
        assert source == min(left, key=lambda i: ((taken[i] + 1) / weights[i], i))
        assert row == taken[source] % sizes[source]
        taken[source] += 1


def test_a_temperature_evens_the_shares_out(tmp_path: Path):
    assert tempered([8.0, 2.0], 1) == [8.0, 2.0]
    flat, square = tempered([8.0, 2.0], 2), tempered([8.0, 2.0], 0.5)
    assert flat[1] / flat[0] == pytest.approx(0.5)  # sqrt(2 / 8)
    assert square[1] / square[0] == pytest.approx(1 / 16)
    assert all(0 < weight <= 1 for weight in tempered([1e9, 1e-9], 1e-3))
    sources = [
        SourceConfig(
            write_pairs(tmp_path / f"{name}.jsonl", [f"{name} {i}" for i in range(300)]), w
        )
        for name, w in (("a", 9.0), ("b", 1.0))
    ]
    blend = Blend(config(*sources, rows=(0, 80, 0), temperature=2.0), 1)
    counts = Counter(Path(row.source).name for row in blend["reward"])
    assert counts == {"a.jsonl": 60, "b.jsonl": 20}  # 9 : 1 has become 3 : 1
    assert blend.manifest()["temperature"] == 2.0


def test_repeated_rows_are_in_the_blend_and_never_in_evaluation(tmp_path: Path):
    small = SourceConfig(
        write_pairs(tmp_path / "small.jsonl", [f"s {i}" for i in range(30)]), repeat=50
    )
    large = SourceConfig(write_pairs(tmp_path / "large.jsonl", [f"l {i}" for i in range(300)]))
    blend = Blend(config(small, large, eval_share=0.2), 1)
    counts = Counter(Path(row.source).name for row in blend["ppo"])
    assert abs(counts["small.jsonl"] - counts["large.jsonl"]) <= 1
    assert max(Counter(row.prompt_id for row in blend["ppo"]).values()) > 1
    held = [row.prompt_id for row in blend.evaluation("ppo")]
    assert len(set(held)) == len(held)


# The blend as a whole


def test_a_blend_depends_on_the_configuration_and_the_seed_alone(tmp_path: Path):
    source = SourceConfig(write_pairs(tmp_path / "a.jsonl", [f"a {i}" for i in range(100)]))
    one, again, other = (Blend(config(source), seed) for seed in (1, 1, 2))
    assert one["ppo"] == again["ppo"] != other["ppo"]
    assert one.manifest()["stages"] == again.manifest()["stages"]
    one["sft"], again["reward"], other["ppo"]
    digests = [b.manifest()["stages"]["ppo"]["digest"] for b in (one, again, other)]  # type: ignore
    assert digests[0] == digests[1] != digests[2]
    assert json.loads(json.dumps(one.manifest())) == one.manifest()


def test_the_toy_world_fills_every_stage_from_its_own_split_and_every_family():
    from rlhf_kit.toy_world.tasks import FAMILY_WEIGHTS, parse

    blend = Blend(config(SourceConfig("toy_world"), rows=(1500, 100, 1500)), 1)
    assert [len(blend[stage]) for stage in STAGES] == [1500, 100, 1500]
    assert [len(blend.evaluation(stage)) for stage in STAGES] == [75, 5, 75]
    ids = {stage: {row.prompt_id for row in blend[stage]} for stage in STAGES}
    assert not ids["sft"] & ids["ppo"] and not ids["sft"] & ids["reward"]
    assert all(parse(list(row.prompt)).split() == "train" for row in blend["ppo"])
    assert all(parse(list(row.prompt)).split() == "validation" for row in blend.evaluation("ppo"))
    for stage in ("sft", "ppo"):
        assert {parse(list(row.prompt)).family for row in blend[stage]} == set(FAMILY_WEIGHTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": (1.0, 1.0, 0.0)}, "leaves nothing for stage ppo: raise its share"),
        ({"sources": (SourceConfig("toy_world"),) * 2}, "toy_world is named twice"),
        ({}, "set data.rows for stage ppo"),
        ({"split": (1.0, 1.0, 1e-12), "rows": (1, 1, 1)}, "ppo too small a share of the toy"),
    ],
)
def test_a_blend_that_cannot_be_made_says_why(changes: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        Blend(DataConfig(**changes), 1)["ppo"]  # type: ignore[arg-type]


def test_an_unknown_stage_is_named():
    with pytest.raises(ValueError, match="must be one of sft, reward, ppo, not 'rlhf'"):
        Blend(DataConfig(), 1)["rlhf"]  # type: ignore[index]


def test_a_split_without_rows_says_what_to_raise(tmp_path: Path):
    only = next(f"p {i}" for i in range(99) if split_of(prompt_id(f"p {i}"), (1, 1, 1)) == "ppo")
    blend = Blend(config(SourceConfig(write_pairs(tmp_path / "a.jsonl", [only])), eval_share=0), 1)
    with pytest.raises(ValueError, match="no rows are left for stage sft"):
        blend["sft"]


# The order of an epoch


@SMALL
@given(
    lengths=st.lists(st.integers(1, 300), max_size=70),
    batch_size=st.integers(1, 9),
    mega_batch=st.integers(1, 5),
    epoch=st.integers(0, 3),
    drop_last=st.booleans(),
)
def test_bucketed_batches_hold_every_row_once(
    lengths: list[int], batch_size: int, mega_batch: int, epoch: int, drop_last: bool
):
    batches = length_bucketed_batches(
        lengths, batch_size, seed=1, epoch=epoch, drop_last=drop_last, mega_batch=mega_batch
    )
    rows = [row for batch in batches for row in batch]
    assert len(set(rows)) == len(rows)
    rest = len(lengths) % batch_size
    assert len(rows) == len(lengths) - (rest if drop_last else 0)
    full = batches[:-1] if rest and not drop_last else batches
    assert all(len(batch) == batch_size for batch in full)


def test_bucketed_batches_hold_rows_of_similar_length_in_a_random_order():
    lengths = [i % 100 for i in range(640)]
    batches = length_bucketed_batches(lengths, 8, seed=1, epoch=0, mega_batch=80)
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
    assert max(spread) <= 2  # 640 rows sorted, each length 6 or 7 times, cut into eights
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert longest != sorted(longest)
    again = length_bucketed_batches(lengths, 8, seed=1, epoch=0, mega_batch=80)
    later = length_bucketed_batches(lengths, 8, seed=1, epoch=1, mega_batch=80)
    assert batches == again != later


def test_an_epochs_order_is_a_permutation_of_its_own():
    orders = [epoch_order(50, seed=3, epoch=epoch) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1]
    assert orders[0] == epoch_order(50, seed=3, epoch=0) != epoch_order(50, seed=4, epoch=0)


def test_fingerprints_tell_sequences_apart():
    assert fingerprint(["ab", "c"]) == fingerprint(iter(["ab", "c"]))
    assert len({fingerprint(ids) for ids in (["ab", "c"], ["c", "ab"], ["a", "bc"], [1, 2])}) == 4


def test_fingerprints_are_those_of_the_joined_ids():
    import hashlib

    joined = hashlib.blake2b(b"ab\nc\n7", digest_size=4).hexdigest()
    assert fingerprint(["ab", "c", 7]) == joined
    assert fingerprint([]) == hashlib.blake2b(b"", digest_size=4).hexdigest()


def test_the_toy_presets_blend_is_the_one_that_committed_figures_were_made_with():
    """Another order of rows is another experiment: then every figure is to be made anew."""
    data = dataclasses.replace(preset("toy").data, rows=(200, 200, 200))
    blend = Blend(data, 1)
    assert [len(blend[stage]) for stage in STAGES] == [200, 200, 200]
    stages = blend.manifest()["stages"]
    digests = {stage: stages[stage]["digest"] for stage in STAGES}  # type: ignore[index]
    assert digests == {"sft": "59ae72c4", "reward": "4350bf88", "ppo": "5bc2576d"}


def test_the_order_of_a_blend_of_files_is_as_pinned(tmp_path: Path):
    sources = [
        SourceConfig(write_pairs(tmp_path / f"{name}.jsonl", [f"{name} {i}" for i in range(n)]), w)
        for name, n, w in (("a", 100, 3.0), ("b", 40, 0.7), ("c", 10, 1.0))
    ]
    blend = Blend(config(*sources, rows=(0, 50, 0), eval_share=0.1), 4)
    assert [len(blend[stage]) for stage in STAGES] == [26, 50, 59]
    stages = blend.manifest()["stages"]
    digests = {stage: stages[stage]["digest"] for stage in STAGES}  # type: ignore[index]
    assert digests == {"sft": "d7eb1d3b", "reward": "2f9d61bb", "ppo": "2f118e61"}
