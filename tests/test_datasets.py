"""Rows of every schema, and every way a source can be wrong. No network: the hub is a fake."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from rlhf_kit.blending import Blend
from rlhf_kit.config import DataConfig, SourceConfig
from rlhf_kit.datasets import (
    FIRST_ROWS,
    NotForThisStage,
    RefusedRow,
    Report,
    detect_schema,
    hh_rlhf,
    load_source,
    messages,
    preference,
    stream_source,
)
from rlhf_kit.models import resolve_model
from rlhf_kit.row_schemas import alpaca, sharegpt
from rlhf_kit.row_store import BlendedRows
from rlhf_kit.tokenization import encode_prompt, keep_fitting, load_tokenizer
from rlhf_kit.types import PreferencePair

DATA = Path(__file__).parent / "data"
REPOSITORY = Path(__file__).parents[1]
SHARED = Path(os.environ.get("RLHF_KIT_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
REAL_PAIRS = SHARED / "hh-rlhf-harmless" / "pairs.jsonl.gz"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write_lines(path: Path, *rows: object) -> SourceConfig:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return SourceConfig(str(path))


GOOD = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}


# One row


def test_hh_rlhf_splits_whole_dialogues_into_prompt_turns_and_two_responses():
    row = {
        "chosen": "\n\nHuman: Hi.\n\nAssistant: Hello!\n\nHuman: Two\nlines?\n\nAssistant: Yes. ",
        "rejected": "\n\nHuman: Hi.\n\nAssistant: Hello!\n\nHuman: Two\nlines?\n\nAssistant: No.",
    }
    assert hh_rlhf(row) == PreferencePair(
        prompt=(user("Hi."), assistant("Hello!"), user("Two\nlines?")),
        chosen="Yes.",
        rejected="No.",
    )


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("\n\nHuman: A?\n\nAssistant:", "\n\nHuman: A?\n\nAssistant: b", "empty response"),
        ("\n\nHuman: \n\nAssistant: a", "\n\nHuman: \n\nAssistant: b", "empty prompt"),
        ("\n\nHuman: A?\n\nAssistant: b", "\n\nHuman: A?\n\nAssistant: b ", "equal chosen"),
        ("\n\nHuman: A?\n\nAssistant: b", "\n\nHuman: B?\n\nAssistant: c", "different prompts"),
        ("\n\nHuman: A?", "\n\nHuman: A?", "no assistant turn"),
        ("\n\nAssistant: a", "\n\nAssistant: b", "empty prompt"),
        ("plain", "text", "no user turn"),
        ("", "", "no assistant turn"),
        ("\n\nHuman: \ud83d\n\nAssistant: a", "\n\nHuman: \ud83d\n\nAssistant: b", "Unicode"),
    ],
)
def test_hh_rlhf_refuses_a_row_it_cannot_use(chosen: str, rejected: str, reason: str):
    with pytest.raises(RefusedRow, match=reason):
        hh_rlhf({"chosen": chosen, "rejected": rejected})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": " Why? ", "chosen": "Because.\n", "rejected": "No."},
        {"prompt": [user("Why?")], "chosen": "Because.", "rejected": [assistant("No.")]},
        {
            "prompt": "Why?",
            "chosen": [user("Why?"), assistant("Because.")],
            "rejected": [user("Why?"), assistant("No.")],
        },
        {
            "chosen": [user("Why?"), assistant("Because.")],
            "rejected": [user("Why?"), assistant("No.")],
        },
        {"prompt": "\n\nHuman: Why?\n\nAssistant:", "chosen": " Because.", "rejected": " No."},
    ],
)
def test_preference_reads_texts_and_messages_alike(row: dict[str, object]):
    assert preference(row) == PreferencePair((user("Why?"),), "Because.", "No.")


def test_preference_keeps_a_system_message_and_earlier_turns():
    prompt = [{"role": "system", "content": "Be brief."}, user("1?"), assistant("1."), user("2?")]
    assert preference({"prompt": prompt, "chosen": "2."}).prompt == tuple(prompt)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "", "chosen": "a"}, "empty prompt"),
        ({"prompt": [assistant("a")], "chosen": "a"}, "no user turn"),
        ({"prompt": [user("a"), assistant("b")], "chosen": "c"}, "does not end with a user turn"),
        ({"prompt": [{"role": "human", "content": "a"}]}, "role other than"),
        ({"prompt": [{"from": "human", "value": "a"}]}, "without role and content"),
        ({"prompt": 7}, "no messages"),
        ({"prompt": "a", "chosen": [user("a"), user("b")]}, "no assistant turn"),
        ({"prompt": "a", "chosen": [user("b"), assistant("c")]}, "repeats another prompt"),
        ({"chosen": "a", "rejected": "b"}, "missing column prompt"),
    ],
)
def test_preference_refuses_a_row_it_cannot_use(row: dict[str, object], reason: str):
    with pytest.raises(RefusedRow, match=reason):
        preference(row)


def test_messages_takes_the_last_assistant_turn_as_the_demonstration():
    row = {"messages": [user("1?"), assistant("1."), user("2?"), assistant("2.")]}
    assert messages(row) == PreferencePair((user("1?"), assistant("1."), user("2?")), "2.")
    with pytest.raises(RefusedRow, match="no assistant turn"):
        messages({"messages": [user("1?")]})


@pytest.mark.parametrize(
    ("row", "prompt", "chosen"),
    [
        ({"instruction": " Sum. ", "input": "1 2", "output": "3\n"}, "Sum.\n\n1 2", "3"),
        ({"instruction": "Name one.", "input": "", "output": "One."}, "Name one.", "One."),
        ({"instruction": "翻译。", "input": None, "output": "译。"}, "翻译。", "译。"),
        ({"instruction": "訳して。", "output": "訳。"}, "訳して。", "訳。"),
    ],
)
def test_alpaca_joins_instruction_and_input(row: dict[str, object], prompt: str, chosen: str):
    assert detect_schema(row, row) == "alpaca"
    assert alpaca(row) == PreferencePair((user(prompt),), chosen)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": None, "output": "a"}, "missing column instruction"),
        ({"instruction": " ", "input": "x", "output": "a"}, "empty prompt"),
        ({"instruction": "a", "input": [], "output": "a"}, "input is not text"),
        ({"instruction": "a", "input": "", "output": ""}, "empty response"),
        ({"instruction": "a", "input": ""}, "missing column output"),
    ],
)
def test_alpaca_refuses_a_row_it_cannot_use(row: dict[str, object], reason: str):
    with pytest.raises(RefusedRow, match=reason):
        alpaca(row)


def test_sharegpt_keeps_turns_and_a_system_message():
    turns = [
        ("system", "短く。"),
        ("human", "1?"),
        ("gpt", "1."),
        ("human", "二？"),
        ("gpt", "二。"),
    ]
    row = {"id": "x", "conversations": [{"from": who, "value": text} for who, text in turns]}
    assert detect_schema(row, row) == "sharegpt"
    system = {"role": "system", "content": "短く。"}
    expected = PreferencePair((system, user("1?"), assistant("1."), user("二？")), "二。")  # type: ignore[arg-type]
    assert sharegpt(row) == expected


@pytest.mark.parametrize(
    ("conversations", "reason"),
    [
        (None, "missing column conversations"),
        ([], "no messages where messages are expected"),
        ("text", "no messages where messages are expected"),
        ([{"from": "human", "value": "a"}], "no assistant turn at the end"),
        ([{"from": "human", "value": None}], "a turn without from and value"),
        ([{"from": "bing", "value": "a"}], "a turn from another than human"),
        ([{"from": ["human"], "value": "a"}], "a turn from another than human"),
        ([{"from": "gpt", "value": "a"}], "empty prompt"),
        ([{"from": "human", "value": ""}, {"from": "gpt", "value": "a"}], "empty prompt"),
    ],
)
def test_sharegpt_refuses_a_row_it_cannot_use(conversations: object, reason: str):
    with pytest.raises(RefusedRow, match=reason):
        sharegpt({"conversations": conversations})


# Files


def test_columns_that_come_late_are_found(tmp_path: Path):
    rows = [{"prompt": f"{i}?"} for i in range(FIRST_ROWS + 5)] + [GOOD]
    source = write_lines(tmp_path / "late.jsonl", *rows)
    loaded = load_source(source, "reward")
    assert len(loaded) == 1 and loaded.report.read == FIRST_ROWS + 6
    with pytest.raises(NotForThisStage, match="no rejected"):
        load_source(source, "reward", rows=FIRST_ROWS + 5)


def test_rows_come_one_by_one_and_the_rest_is_not_read(tmp_path: Path):
    rows = [{"prompt": f"{i}?"} for i in range(3 * FIRST_ROWS)]
    source, report = write_lines(tmp_path / "a.jsonl", *rows), Report("a")
    stream = stream_source(source, "ppo", report)
    assert next(stream).prompt == (user("0?"),)
    assert report.read == FIRST_ROWS


def test_reading_a_large_file_keeps_it_out_of_memory(tmp_path: Path):
    import tracemalloc

    rows = [{"prompt": f"{i} " + "why " * 1000} for i in range(4000)]
    source = write_lines(tmp_path / "large.jsonl", *rows)  # 16 MB
    del rows
    config = DataConfig(sources=(source,), split=(0, 0, 1), eval_share=0.5)
    tracemalloc.start()
    blend = Blend(config, 1)["ppo"]
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(blend) > 1800
    assert kept < 3e6 and peak < 9e6  # a megabyte a store, and the first thousand rows


def test_those_that_fit_of_a_blend_are_places_in_it_and_not_copies(tmp_path: Path):
    rows = [{"prompt": "why " * (i % 9) + str(i)} for i in range(60)]
    source = write_lines(tmp_path / "a.jsonl", *rows)
    config = DataConfig(sources=(source,), split=(0, 0, 1), max_prompt_length=25)
    blend = Blend(config, 1)["ppo"]
    tokenizer = load_tokenizer(resolve_model("toy_world"))
    fitting = keep_fitting(tokenizer, blend, config)
    assert isinstance(fitting.rows, BlendedRows)
    fits = [row for row in blend if len(encode_prompt(tokenizer, row.prompt)) <= 25]
    assert fitting.rows == fits and fitting.long_prompts == len(blend) - len(fits) > 0


def test_a_file_of_dialogues_is_recognised_by_its_columns():
    rows = load_source(SourceConfig(str(DATA / "hh_rlhf.jsonl")), "reward")
    assert len(rows) == 10 and not rows.report.refused
    assert [len(pair.prompt) for pair in rows.pairs] == [1, 1, 3, 1, 1, 1, 3, 1, 1, 1]
    assert rows.pairs[3].chosen == "The Danube."
    assert rows.pairs[3].source.endswith("hh_rlhf.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_json_lines_json_lists_and_packed_files_hold_the_same_rows(tmp_path: Path, name: str):
    row = {**GOOD, "kind": "tone"}
    text = json.dumps([row, row]) if ".json" in Path(name).suffixes else f"{json.dumps(row)}\n" * 2
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    rows = load_source(SourceConfig(str(tmp_path / name)), "reward")
    assert [(pair.chosen, pair.kind) for pair in rows.pairs] == [("Because.", "tone")] * 2
    assert load_source(SourceConfig(str(tmp_path)), "ppo").pairs[0].prompt == (user("Why?"),)


def test_a_dataset_saved_by_the_datasets_library_is_read_from_its_directory(tmp_path: Path):
    import datasets

    saved = datasets.Dataset.from_list([GOOD, {**GOOD, "rejected": None}])
    saved.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict(train=saved).save_to_disk(str(tmp_path / "splits"))
    for name in ("plain", "splits"):
        rows = load_source(SourceConfig(str(tmp_path / name)), "reward")
        assert len(rows) == 1
        assert rows.report.first == {"missing column rejected": "row 2"}
    with pytest.raises(ValueError, match="no split test, only train"):
        load_source(SourceConfig(str(tmp_path / "splits")), "reward", split="test")


def test_refused_rows_are_counted_printed_and_named_by_their_first_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source = write_lines(
        tmp_path / "mixed.jsonl",
        GOOD,
        '{"prompt": "cut off',
        "",
        {**GOOD, "prompt": " "},
        "[1, 2]",
        {**GOOD, "chosen": "No."},
        {"prompt": "Why?", "chosen": "Because."},
        {**GOOD, "prompt": ""},
    )
    rows = load_source(source, "reward")
    assert len(rows) == 1
    assert rows.report.read == 7
    assert rows.report.refused == {
        "not JSON": 1,
        "not a JSON object": 1,
        "empty prompt": 2,
        "equal chosen and rejected": 1,
        "missing column rejected": 1,
    }
    assert rows.report.first["not JSON"] == "line 2"
    assert rows.report.first["empty prompt"] == "line 4"
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 5
    assert f"{source.name}: refused 2 of 7 rows: empty prompt (first: line 4)" in printed


def test_bytes_that_are_no_text_cost_one_row(tmp_path: Path):
    path = tmp_path / "bytes.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "\xff\xfe"}\n')
    assert load_source(SourceConfig(str(path)), "ppo").report.refused == {"not JSON": 1}


def test_a_prompt_alone_serves_ppo_and_nothing_else(tmp_path: Path):
    source = write_lines(tmp_path / "prompts.jsonl", {"prompt": "Why?"})
    assert load_source(source, "ppo").pairs[0].chosen is None
    with pytest.raises(NotForThisStage, match="has no chosen, which stage sft needs"):
        load_source(source, "sft")


def test_demonstrations_serve_sft_and_ppo_but_no_reward_model(tmp_path: Path):
    row = {"messages": [user("Why?"), assistant("Because.")]}
    source = write_lines(tmp_path / "demonstrations.jsonl", row)
    assert load_source(source, "sft").pairs[0].chosen == "Because."
    assert len(load_source(source, "ppo")) == 1
    with pytest.raises(NotForThisStage, match="no rejected"):
        load_source(source, "reward")


def test_a_null_in_the_first_row_hides_no_schema(tmp_path: Path):
    good = {"chosen": "\n\nHuman: A?\n\nAssistant: b", "rejected": "\n\nHuman: A?\n\nAssistant: c"}
    rows = load_source(write_lines(tmp_path / "a.jsonl", {**good, "chosen": None}, good), "reward")
    assert len(rows) == 1
    assert rows.report.first == {"missing column chosen": "line 1"}


# Bad input


@pytest.mark.parametrize("name", ["no/such/file.jsonl", "./nothing", "data.json", "/nowhere"])
def test_a_missing_file_is_said_to_be_missing(name: str):
    with pytest.raises(ValueError, match=f"^file {name} does not exist$"):
        load_source(SourceConfig(name), "sft")


def test_wrong_columns_are_named_with_those_expected(tmp_path: Path):
    source = write_lines(tmp_path / "odd.jsonl", {"question": "Why?", "answer": "Because."})
    with pytest.raises(ValueError, match="found the columns answer, question; expected prompt"):
        load_source(source, "sft")


def test_an_empty_dataset_is_said_to_be_empty(tmp_path: Path):
    with pytest.raises(ValueError, match="is empty"):
        load_source(write_lines(tmp_path / "empty.jsonl"), "sft")
    with pytest.raises(ValueError, match="holds no .jsonl"):
        (tmp_path / "bare").mkdir()
        load_source(SourceConfig(str(tmp_path / "bare")), "sft")


def test_a_source_without_a_single_good_row_is_an_error_with_the_reasons(tmp_path: Path):
    source = write_lines(
        tmp_path / "bad.jsonl", {**GOOD, "prompt": ""}, "{", {**GOOD, "chosen": ""}
    )
    message = "none of its 3 rows can be used .1 x not JSON, 1 x empty prompt, 1 x empty response"
    with pytest.raises(ValueError, match=message):
        load_source(source, "reward")
    with pytest.raises(ValueError, match="none of its 2 rows can be used .2 x not JSON"):
        load_source(write_lines(tmp_path / "text.jsonl", "some", "text"), "sft")


def test_a_broken_archive_is_said_to_be_broken(tmp_path: Path):
    for i, data in enumerate((b"no gzip", gzip.compress(b"x" * 1000)[:-20])):
        path = tmp_path / f"{i}.jsonl.gz"
        path.write_bytes(data)
        with pytest.raises(ValueError, match="cannot be unpacked"):
            load_source(SourceConfig(str(path)), "sft")


# The hub, faked


def test_a_hub_name_is_asked_for_with_its_revision(monkeypatch: pytest.MonkeyPatch):
    import datasets

    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or [GOOD]
    )
    rows = load_source(SourceConfig("someone/pairs@v2"), "reward")
    assert rows.pairs[0].source == "someone/pairs@v2"
    assert asked == [(("someone/pairs",), {"split": "train", "revision": "v2"})]


def test_the_hub_is_never_asked_for_a_local_path_or_a_bare_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    (tmp_path / "owner").mkdir()
    write_lines(tmp_path / "owner" / "name.jsonl", GOOD)
    monkeypatch.chdir(tmp_path)
    assert len(load_source(SourceConfig("owner/name.jsonl"), "reward")) == 1
    assert len(load_source(SourceConfig("owner"), "reward")) == 1
    with pytest.raises(ValueError, match="neither toy_world, nor a local path, nor owner/name"):
        load_source(SourceConfig("pandas"), "reward")


def test_what_the_hub_refuses_becomes_one_sentence(monkeypatch: pytest.MonkeyPatch):
    import datasets

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route to the hub\nand a page of advice")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match="no local path and cannot be .*: no route to the hub$"):
        load_source(SourceConfig("someone/pairs"), "reward")


# The toy world and real data


def test_the_stage_decides_what_the_toy_world_draws():
    sft, reward, ppo = (
        load_source(SourceConfig("toy_world"), stage, seed=1, rows=20).pairs
        for stage in ("sft", "reward", "ppo")
    )
    assert all(pair.chosen and pair.rejected is None for pair in sft)
    assert all(pair.chosen and pair.rejected and pair.kind for pair in reward)
    assert all(pair.chosen is None and pair.prompt[-1]["role"] == "user" for pair in ppo)
    assert load_source(SourceConfig("toy_world"), "ppo", seed=1, rows=20).pairs == ppo
    assert load_source(SourceConfig("toy_world"), "ppo", seed=2, rows=20).pairs != ppo
    with pytest.raises(ValueError, match="how many rows"):
        load_source(SourceConfig("toy_world"), "sft")


@pytest.mark.skipif(not REAL_PAIRS.exists(), reason="set RLHF_KIT_SHARED_DATA to the real data")
def test_real_pairs_are_read_and_the_four_odd_ones_refused():
    rows = load_source(SourceConfig(str(REAL_PAIRS)), "reward")
    assert len(rows) == 1796
    assert rows.report.refused == {
        "empty response": 2,
        "chosen and rejected have different prompts": 2,
    }
