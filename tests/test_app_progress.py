"""The run's numbers, and conversations that a reload finds again."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from app_runs import ask, write_run
from safetensors.torch import load_file

from apps import history as history_module
from apps.history import History
from apps.limits import Limits
from apps.workbench import Workbench


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("progress"))


@pytest.fixture
def bench(finished: Path, tmp_path: Path) -> Iterator[Workbench]:
    opened = Workbench(shutil.copytree(finished, tmp_path / "run"))
    yield opened
    opened.close()


# ---- progress


def test_weight_distances_are_those_worked_by_hand(bench: Workbench):
    # the models differ in 32 entries, by 0.125 a name: norm 1/8 * sqrt(32) = 0.7071
    found = {(d.a, d.b): d for d in bench.progress.distances()}
    step = math.sqrt(32) / 8
    assert {pair: d.l2 for pair, d in found.items()} == {
        ("step-00000004", "sft"): pytest.approx(step),
        ("final", "sft"): pytest.approx(2 * step),
        ("ema", "sft"): pytest.approx(3 * step),
        ("ema", "final"): pytest.approx(step),
    }
    weights = load_file(bench.checkpoints.root / "sft/final/model.safetensors")
    norm = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in weights.values()))
    entries = sum(tensor.numel() for tensor in weights.values())
    distance = found["final", "sft"]
    assert distance.relative == pytest.approx(2 * step / norm)
    assert distance.bf16_equal == pytest.approx(1 - 32 / entries)


def test_an_average_that_stalled_in_bf16_shows(bench: Workbench):
    from safetensors.torch import save_file

    from apps.progress import weight_distances

    root = bench.checkpoints.root
    weights = load_file(root / "sft/final/model.safetensors")
    moved = {name: tensor * (1 + 1e-6) for name, tensor in weights.items()}
    save_file(moved, root / "ppo/ema/model.safetensors", metadata={"format": "pt"})
    l2, relative, equal = weight_distances(root / "ppo/ema", root / "sft/final")
    assert l2 > 0 and relative == pytest.approx(1e-6, rel=0.1) and 0.99 < equal <= 1


def test_a_row_a_checkpoint_with_what_the_report_and_the_votes_say(bench: Workbench):
    mean = {"mean": 0.5, "low": 0.25, "high": 0.75}
    report = {"gold": {"sft": mean, "ema": mean}, "proxy": {"final": mean}, "kl": {"final": 2.5}}
    (bench.checkpoints.root / "report.json").write_text(json.dumps(report))
    for verdict in ("a", "a", "tie", "b"):
        pair = (bench.checkpoints.named(name).id for name in ("final", "sft"))
        both = list(bench.arena.compare(*pair, ask(), session="s", max_new_tokens=2))[-1]
        bench.arena.vote(both.comparison, verdict, session="s")
    rows = {row.name: row for row in bench.progress.rows()}
    assert list(rows) == ["base", "sft", "step-00000004", "final", "ema"]
    assert rows["sft"].gold == rows["ema"].gold == rows["final"].proxy == (0.5, 0.25, 0.75)
    assert rows["final"].gold is None and rows["final"].kl == 2.5 and rows["ema"].kl is None
    assert rows["final"].votes == 4 and rows["ema"].votes == 0
    rate = rows["final"].win_rate
    assert rate is not None and rate[0] == 0.625 and rate[1] < 0.625 < rate[2]
    assert rows["sft"].to_sft == 0 and rows["base"].to_sft is None
    assert rows["final"].to_sft == pytest.approx(math.sqrt(2))
    assert rows["step-00000004"].step == 4 and rows["step-00000004"].measured_score is None


def test_a_checkpoint_that_is_not_trusted_has_a_row_without_a_distance(bench: Workbench):
    weights = bench.checkpoints.root / "ppo/final/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    rows = {row.name: row for row in bench.progress.rows()}
    assert rows["final"].to_sft is None and rows["ema"].to_sft is not None


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"gold": {"sft": 5}}', '{"gold": null}'])
def test_a_report_that_is_none_is_no_report(bench: Workbench, text: str):
    (bench.checkpoints.root / "report.json").write_text(text)
    assert all(row.gold is None for row in bench.progress.rows())


def test_scores_on_held_out_prompts_are_measured_on_request(bench: Workbench):
    chosen = bench.checkpoints.named("final").id
    steps = list(bench.progress.measure(session="s", checkpoint=chosen, prompts=2))
    assert steps == [(0, 2, "final"), (1, 2, "final"), (2, 2, "")]
    rows = {row.name: row for row in bench.progress.rows()}
    assert rows["final"].measured_prompts == 2 and rows["sft"].measured_prompts == 0
    assert rows["final"].measured_score is not None and rows["final"].measured_kl is not None

    steps = list(bench.progress.measure(session="s", prompts=1))
    assert [done for done, _, _ in steps] == [0, 1, 2, 3, 4, 5]
    rows = {row.name: row for row in bench.progress.rows()}
    assert {row.measured_prompts for row in rows.values()} == {1} and rows["sft"].measured_kl == 0


def test_a_measurement_can_be_stopped_and_its_size_is_limited(bench: Workbench):
    measuring = bench.progress.measure(session="s", prompts=64)
    next(measuring)
    measuring.close()
    assert all(row.measured_prompts == 0 for row in bench.progress.rows())
    for prompts in (0, 65, "8", None):
        with pytest.raises(ValueError, match="the number of prompts must be a whole number from"):
            next(bench.progress.measure(session="s", prompts=prompts))


# ---- history


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path, Limits())


TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "a\u2028b\x85c\nd"},
    {"role": "assistant", "content": "\U0001f600 \ud800 <img src=x>", "tokens": 5},
]


def test_a_conversation_comes_back_as_it_was(history: History, tmp_path: Path):
    key = history.new_key()
    history.save(key, "chat", TALK, checkpoint="ema", seed=3)
    again = History(tmp_path, Limits()).load(key, "chat")
    whole = [TALK[0], {**TALK[1], "content": "\U0001f600 \ufffd <img src=x>"}]
    assert again == {"checkpoint": "ema", "seed": 3, "messages": whole}
    assert [json.loads(line) for line in history.jsonl(key, "chat").splitlines()] == whole
    assert history.load(key, "compare") is None and history.jsonl(key, "compare") == ""
    history.save(key, "chat", TALK[:1])
    assert history.load(key, "chat") == {"messages": TALK[:1]}
    history.forget(key, "chat")
    assert history.load(key, "chat") is None


def test_no_listing_of_the_directory_gives_a_key_and_others_cannot_read_it(
    history: History, tmp_path: Path
):
    key = history.new_key()
    history.save(key, "chat", TALK)
    (file,) = (tmp_path / "app/history").iterdir()
    assert key not in file.name and file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("key", ["../../../etc/passwd", "", None, "x" * 33, "/" * 32, ["k"]])
def test_a_key_is_no_path(history: History, tmp_path: Path, key: Any):
    for use in (history.save, history.forget):
        with pytest.raises(ValueError, match="this browser's key is none of this server's"):
            use(key, "chat", *[TALK] * (use == history.save))
    with pytest.raises(ValueError, match="a history is chat or compare"):
        history.save(history.new_key(), "../votes", TALK)
    assert history.load(key, "chat") is None and history.jsonl(key, "chat") == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("messages", "about", "message"),
    [
        ([{"role": "user", "content": "x"}] * 401, {}, "401 messages are too many to keep"),
        ([{"role": "user", "content": "x" * 200_001}], {}, "may have 200,000 characters"),
        ([{"role": "user", "content": "x" * 200_000}] * 4, {}, "too long to be kept"),
        ([{"role": "system", "content": "x"}], {}, "needs the role user or assistant"),
        (["x"], {}, "needs the role user or assistant"),
        ([{"role": "user", "content": None}], {}, "a message must be text"),
        (TALK, {"system": "x" * 20_001}, "the settings are too long"),
        (TALK, {"seed": math.nan}, "only texts and numbers can be kept"),
        (TALK, {"path": Path("/")}, "only texts and numbers can be kept"),
    ],
)
def test_what_is_kept_has_limits(history: History, messages: Any, about: Any, message: str):
    with pytest.raises(ValueError, match=message):
        history.save(history.new_key(), "chat", messages, **about)


def test_the_conversations_not_touched_for_longest_leave_first(
    history: History, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(history_module, "MOST_FILES", 3)
    keys = [history.new_key() for _ in range(4)]
    for age, key in enumerate(keys[:3]):
        history.save(key, "chat", TALK)
        os.utime(history._path(key, "chat"), (age, age))
    history.save(keys[3], "chat", TALK)
    assert [history.load(key, "chat") is not None for key in keys] == [False, True, True, True]


def test_a_file_that_is_no_history_is_no_error(history: History):
    key = history.new_key()
    history.save(key, "chat", TALK)
    for text in ("", "{", "[]\n", '{"no": 1}\n'):
        history._path(key, "chat").write_text(text)
        assert history.load(key, "chat") is None
