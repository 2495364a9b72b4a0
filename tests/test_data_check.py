"""`rlhf-kit data check` and `preview`: findings, exit codes, and no file that ends in a traceback.

Ten broken files lie in tests/data/broken; what is said of each is written here.
"""

from __future__ import annotations

import gzip
import json
import os
import pty
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rlhf_kit.cli import main
from rlhf_kit.config import DataConfig
from rlhf_kit.data_check import histogram
from rlhf_kit.data_command import _tokenizer
from rlhf_kit.data_preview import preview, visible, wants_colour

DATA = Path(__file__).parent / "data"
SHARED = Path(os.environ.get("RLHF_KIT_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
REAL_PAIRS = SHARED / "hh-rlhf-harmless" / "pairs.jsonl.gz"


def lines(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def row(i: int = 0, **changes: Any) -> dict[str, Any]:
    return {"prompt": f"Why {i}?", "chosen": "Because.", "rejected": "No, no, no.", **changes}


def data(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code and what was printed, errors included."""
    code = main(["data", *words])
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    return code, printed.out + printed.err


# What check says


def test_a_good_file_is_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, printed = data(capsys, "check", lines(tmp_path / "a.jsonl", *map(row, range(30))))
    assert code == 0
    assert "30 read, 30 usable; 30 distinct prompts" in printed
    assert "serves   sft 30, reward 30, ppo 30" in printed
    assert "finding" not in printed and "verdict: good (exit code 0)" in printed


def test_findings_name_their_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "a.jsonl"
    lines(
        path,
        row(0),
        row(1, chosen=""),
        row(0),
        row(0, chosen="No, no, no.", rejected="Because."),
        row(2, prompt="WHY   0?"),
        row(3, prompt="Hi\n\nHuman: a\n\nAssistant: b\n\nHuman: c"),
        row(4, rejected=None),
        *map(row, range(10, 40)),
    )
    with path.open("a") as file:
        file.write("{torn\n[1]\n")
    code, printed = data(capsys, "check", str(path))
    assert code == 1
    for finding in (
        "1 row refused: not JSON (line 38)",
        "1 row refused: not a JSON object (line 39)",
        "1 row refused: empty response (line 2)",
        "1 row equal to an earlier row: it counts that often (line 3)",
        "1 row opposite to an earlier row, with chosen and rejected exchanged (line 4)",
        "1 row with a dialogue as text inside a prompt, read as one turn of the user (line 6)",
        "1 prompts differ from another in case or spaces alone",
    ):
        assert f"  finding  {finding}\n" in printed
    assert printed.count("finding  ") == 7
    assert "serves   sft 36, reward 35, ppo 36" in printed


def test_lengths_are_warned_of_and_limits_can_be_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = lines(
        tmp_path / "a.jsonl",
        *(row(i, prompt="why " * 40 + str(i), chosen="so " * 60) for i in range(20)),
        *(row(i) for i in range(5)),
    )
    code, printed = data(capsys, "check", path, "--max-prompt-length", "30", "--max-length", "60")
    assert code == 1
    assert "80% of the prompts are longer than data.max_prompt_length 30" in printed
    assert "80% of the rows are longer than data.max_length 60" in printed
    assert "the chosen response is the longer one in 80% of the pairs" in printed


def test_a_split_without_a_row_is_a_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, printed = data(capsys, "check", lines(tmp_path / "a.jsonl", row()))
    assert code == 1 and printed.count("would get no row: give more data") == 2


def test_several_files_are_checked_one_by_one_and_the_worst_decides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    good = lines(tmp_path / "good.jsonl", *map(row, range(30)))
    other = lines(tmp_path / "other.jsonl", *map(row, range(25, 60)))
    manifest = tmp_path / "manifest.json"
    code, printed = data(capsys, "check", f"{good}=2", other, "--output", str(manifest))
    assert code == 0
    assert "5 prompts are in more than one of these sources" in printed
    assert "0 prompts in two splits" in printed
    stages = json.loads(manifest.read_text())["stages"]
    assert [part["weight"] for part in stages["ppo"]["sources"]] == [2.0, 1.0]
    code, printed = data(capsys, "check", good, str(tmp_path / "none.jsonl"), other)
    assert code == 2 and "30 read" in printed and "35 read" in printed
    assert f"unusable file {tmp_path}/none.jsonl does not exist" in printed


def test_every_kind_of_file_is_read_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    import pyarrow
    from pyarrow import parquet

    rows = [row(i, chosen='said "so",\nor 中文 あ') for i in range(12)]
    lines(tmp_path / "a.jsonl", *rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    cells = [f'{r["prompt"]},"said ""so"",\nor 中文 あ","{r["rejected"]}"' for r in rows]
    (tmp_path / "e.csv").write_text(
        "\n".join(["\ufeffprompt,chosen,rejected", *cells]) + "\n", encoding="utf-8"
    )
    code = f"import json\ndef rows():\n    yield from json.loads({json.dumps(rows)!r})\n"
    (tmp_path / "own.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    names = ["a.jsonl", "b.json", "c.jsonl.gz", "d.parquet", "e.csv", "own.py:rows", "own:rows"]
    shown = set()
    for name in names:
        _, checked = data(capsys, "check", name)
        assert "12 read, 12 usable; 12 distinct prompts" in checked, name
        assert ("running your function rows of own" in checked) == ("own" in name)
        _, printed = data(capsys, "preview", name, "--rows", "1", "--stage", "sft")
        shown.add("\n".join(printed.splitlines()[-3:]))
    assert len(shown) == 1
    assert "12 prompts are in more than one" in data(capsys, "check", *names[:2])[1]


@pytest.mark.skipif(not REAL_PAIRS.exists(), reason="set RLHF_KIT_SHARED_DATA to the real data")
def test_the_real_pairs_have_their_four_odd_rows_named(capsys: pytest.CaptureFixture[str]):
    code, printed = data(capsys, "check", str(REAL_PAIRS), "--rows", "1230")
    assert code == 1
    assert "2 rows refused: empty response (line 1160, 1204)" in printed
    assert "different prompts (line 1223)" in printed


# Ten broken files

BROKEN = {
    "all_rows_refused.jsonl": (2, "none of its 3 rows can be used (1 x not JSON, 1 x empty prompt"),
    "cut_off.jsonl.gz": (2, "cannot be unpacked"),
    "empty.jsonl": (2, "is empty"),
    "latin1.csv": (2, "is not UTF-8; save it as UTF-8"),
    "no_parquet.parquet": (2, "is no readable Parquet"),
    "odd_cells.csv": (1, "1 row refused: another number of cells than the header has (line 3)"),
    "one_object.json": (2, "is one JSON object; write a list of rows, or a row a line"),
    "open_quote.csv": (2, "line 3: unexpected end of data"),
    "utf16.jsonl": (2, "is UTF-16; save it as UTF-8"),
    "wrong_columns.jsonl": (2, "found the columns answer, question; expected prompt"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_with_a_broken_file_is_one_sentence(
    capsys: pytest.CaptureFixture[str], name: str
):
    code, sentence = BROKEN[name]
    found, printed = data(capsys, "check", str(DATA / "broken" / name))
    assert found == code and sentence in " ".join(printed.split())
    found, printed = data(capsys, "preview", str(DATA / "broken" / name))
    assert found == (2 if code == 2 else 0)
    if found:
        assert printed.startswith("error: ") and sentence in printed


def test_there_are_ten_broken_files():
    assert sorted(path.name for path in (DATA / "broken").iterdir()) == sorted(BROKEN)
    assert len(BROKEN) == 10


# What else a user can get wrong


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nothing.jsonl"], "file nothing.jsonl does not exist"),
        (["a.txt"], "file a.txt is none of .jsonl"),
        (["pandas"], "neither toy_world, nor a local path, nor owner/name"),
        (["local/jsonfile"], "write the path of the file itself"),
        (["toy_world"], "toy_world is generated: there is no file to check"),
        (["good.jsonl=much"], "must be a positive number, not 'much'"),
        (["good.jsonl=-1"], "must be a positive number, not '-1'"),
        (["good.jsonl", "--rows", "0"], "--rows must be at least 1, not 0"),
        (["good.jsonl", "--max-length", "9"], "max_prompt_length must be positive and below"),
        (["good.jsonl", "--tokenizer", "./none"], "does not exist"),
        (["good.jsonl", "--output", "no/such/m.json"], "no/such/m.json cannot be written"),
        (["bad.py:rows"], "your function failed at .*bad.py, line 4: KeyError: 'x'"),
        (["bad.py:other"], "bad.py has no function other"),
        (["bad.py:number"], "your function failed: TypeError: 'int' object"),
        (["bad.py:leaves"], "your function failed at .*bad.py, line 10: SystemExit"),
        (["bad.py:refuses"], "your function failed at .*bad.py, line 12: ValueError: mine"),
        (["none.py:rows"], "file none.py does not exist"),
        (["torn.py:rows"], "your function failed at .*torn.py, line 1: SyntaxError"),
        (["no_module_of_this_name:rows"], "ModuleNotFoundError"),
        (["bad.py:texts"], "none of its 2 rows can be used .2 x not a JSON object"),
        ([chr(0)], "neither toy_world, nor a local path"),
        (["a" * 5000], "neither toy_world, nor a local path"),
    ],
)
def test_each_mistake_has_its_sentence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    sentence: str,
):
    import re

    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "good.jsonl", *map(row, range(30)))
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "torn.py").write_text("def rows(:\n")
    (tmp_path / "bad.py").write_text(
        "def rows():\n"
        "    yield {'prompt': 'a'}\n"
        "    empty = {}\n"
        "    yield empty['x']\n"
        "def number():\n"
        "    return 3\n"
        "def texts():\n"
        "    return ['a', 'b']\n"
        "def leaves():\n"
        "    raise SystemExit(1)\n"
        "def refuses():\n"
        "    raise ValueError('mine')\n"
    )
    code, printed = data(capsys, "check", *words)
    assert code == 2
    assert re.search(sentence, printed), printed
    assert all(len(line) < 6000 for line in printed.splitlines())


def test_a_broken_dataset_directory_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "dataset_info.json").write_text("{")
    code, printed = data(capsys, "check", str(tmp_path))
    assert code == 2 and "cannot be read" in printed


# Preview


def test_preview_marks_what_each_stage_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = lines(
        tmp_path / "a.jsonl",
        row(chosen="Because.", rejected="No."),
        {"prompt": "Who?", "chosen": "I."},
        {"prompt": "Where?"},
        row(chosen=""),
    )
    code, printed = data(capsys, "preview", path, "--rows", "9")
    assert code == 0
    prompt = "<|bos|>Human: Why 0?\n\nAssistant:"
    assert (
        f"--- line 1\nchosen:\n{prompt} Because.[[<|eos|>]]\nrejected:\n{prompt} No.[[<|eos|>]]"
        in (printed)
    )
    assert "--- line 2\n<|bos|>Human: Who?\n\nAssistant:[[ I.<|eos|>]]" in printed
    assert "--- line 3\n<|bos|>Human: Where?\n\nAssistant:\n" in printed
    assert "refused 1 of 4 rows: empty response (first: line 4)" in printed
    code, printed = data(capsys, "preview", path, "--stage", "sft", "--rows", "1")
    assert f"{prompt}[[ Because.<|eos|>]]" in printed and "rejected" not in printed
    code, printed = data(capsys, "preview", path, "--max-prompt-length", "3", "--stage", "ppo")
    assert "a run drops this row: its prompt has" in printed


def test_preview_says_where_a_response_is_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = lines(tmp_path / "a.jsonl", {"prompt": "Who?", "chosen": "so " * 99})
    _, printed = data(capsys, "preview", path, "--max-prompt-length", "30", "--max-length", "40")
    assert "<|eos|>]]\n(cut to data.max_length 40)" in printed


def test_nothing_in_a_row_moves_the_cursor_and_joined_characters_stay_whole():
    assert visible("a\x1b[2J\x07\rb\u202ec\x9b\ufeff") == ("a\\x1b[2J\\x07\\rb\\u202ec\\x9b\\ufeff")
    assert visible("日本\n\tक्‍ष 👩‍🔬") == "日本\n\tक्‍ष 👩‍🔬"


@pytest.mark.parametrize("no_color", ["", "1"])
def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch, no_color: str):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    outside, inside = pty.openpty()
    with os.fdopen(inside, "w") as terminal, os.fdopen(outside):
        assert wants_colour(terminal) == (not no_color)
    with open(os.devnull, "w") as file:
        assert not wants_colour(file)


def test_in_colour_what_counts_is_green_and_nothing_is_in_brackets(tmp_path: Path):
    path = lines(tmp_path / "a.jsonl", {"prompt": "Who?", "chosen": "I."})
    *_, shown = preview(path, _tokenizer("toy_world"), DataConfig(), rows=1, colour=True)
    prompt = "<|bos|>Human: Who?\n\nAssistant:"
    assert shown == f"\x1b[2m{prompt}\x1b[0m\x1b[1;32m I.<|eos|>\x1b[0m"


def test_the_histogram_counts_every_row_once():
    assert histogram([]) == []
    shown = histogram([1, 15, 16, 300, 9999])
    assert [line.split()[-1] for line in shown] == "2 1 0 0 0 1 0 0 0 1".split()
    assert "#" * 40 in shown[0] and "4096 and more" in shown[-1]


# Any file at all

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
names = st.sampled_from(
    "prompt chosen rejected messages conversations instruction input output kind role "
    "content from value".split()
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
    max_leaves=8,
)
rows_of_any_kind = st.lists(st.dictionaries(names, values, max_size=5) | values, max_size=6)
contents = (
    st.binary(max_size=200)
    | rows_of_any_kind.map(lambda rows: json.dumps(rows).encode())
    | rows_of_any_kind.map(lambda rows: b"\n".join(json.dumps(r).encode() for r in rows))
    | st.text("prompt,chosen\"\n'\r\t; é中\x00", max_size=80).map(lambda text: text.encode())
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@example(b'{"prompt": "a"}\n' * 3, ".jsonl")
@example(b"PAR1\x00\x00PAR1", ".parquet")
@example(b"\x1f\x8b\x08\x00", ".jsonl.gz")
@example(b'{"prompt": ' + b"[" * 5000, ".json")
@example(b'[{"prompt": 1' + b"0" * 5000 + b"}]", ".json")
@example(b"prompt,prompt\na,b", ".csv")
@example(b"prompt\n\x00", ".csv")
@given(
    contents,
    st.sampled_from([".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".csv.gz", ""]),
)
def test_no_file_ends_in_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, suffix: str
):
    path = tmp_path / f"any{suffix}"
    path.write_bytes(content)
    code, printed = data(capsys, "check", str(path))
    assert code in (0, 1, 2) and f"(exit code {code})" in printed
    assert (code == 2) == ("unusable" in printed)
    seen, printed = data(capsys, "preview", str(path))
    assert seen == (2 if code == 2 else 0)
    assert bool(printed.strip()) and (seen == 0 or printed.startswith("error: "))
