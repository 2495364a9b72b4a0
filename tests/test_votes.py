"""Votes become preferences, and a reward model trains on them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rlhf_kit.blending import Blend
from rlhf_kit.checkpoint import is_complete
from rlhf_kit.cli import main
from rlhf_kit.config import SourceConfig, from_dict
from rlhf_kit.pipeline import NOTEBOOKS, open_run, read_record
from rlhf_kit.votes import preferences, read_votes


def vote(number: int, verdict: str = "a", **changes: Any) -> dict[str, Any]:
    """As the app writes it; `a_` and `b_` change a side."""
    sides = {
        side: {
            "checkpoint": name,
            "response": f"{side}{number}",
            "tokens": 2,
            "ended_by": "end",
            **{k[2:]: v for k, v in changes.items() if k.startswith(f"{side}_")},
        }
        for side, name in (("a", "ema"), ("b", "final"))
    }
    prompt = [{"role": "user", "content": f"Question {number}?"}]
    rest = {k: v for k, v in changes.items() if k[:2] not in ("a_", "b_")}
    return {"id": f"v{number}", "verdict": verdict, "prompt": prompt, **sides, **rest}


def write(path: Path, *votes: Any, end: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, votes)) + end, encoding="utf-8")
    return path


def test_a_torn_last_line_and_lines_that_are_no_votes_are_counted(tmp_path: Path):
    path = write(tmp_path / "votes.jsonl", vote(1), {"id": "x"}, [1], vote(2, "tie"))
    with path.open("a") as file:
        file.write(json.dumps(vote(3))[:40])
    votes, broken = read_votes(path)
    assert [v["id"] for v in votes] == ["v1", "v2"] and broken == 3
    assert read_votes(tmp_path / "gone") == ([], 0)


def test_the_last_line_of_a_vote_counts(tmp_path: Path):
    early = vote(1, a_response="a", a_ended_by="")
    path = write(tmp_path / "votes.jsonl", early, vote(2), vote(1, a_response="a whole answer"))
    votes, _ = read_votes(path)
    assert [(v["id"], v["a"]["response"]) for v in votes] == [
        ("v1", "a whole answer"),
        ("v2", "a2"),
    ]


def test_the_side_that_was_voted_for_is_the_chosen_one():
    result = preferences([vote(1, "a"), vote(2, "b")])
    assert [(p.prompt[0]["content"], p.chosen, p.rejected) for p in result.pairs] == [
        ("Question 1?", "a1", "b1"),
        ("Question 2?", "b2", "a2"),
    ]
    assert result.left_out == {}


def test_what_prefers_nothing_whole_is_left_out_and_counted():
    result = preferences(
        [
            vote(1, "tie"),
            vote(2, "both_bad"),
            vote(3, "both_bad"),
            vote(4, b_ended_by="stopped"),
            vote(5, a_ended_by=""),
            vote(6, a_response="same", b_response="same"),
            vote(7, b_response=" "),
            vote(8, prompt=["no message"]),
            vote(9, b_ended_by="length"),
        ]
    )
    assert [pair.chosen for pair in result.pairs] == ["a9"]
    assert result.votes == 9 and result.left_out == {
        "tie": 1,
        "both bad": 2,
        "an answer was not finished": 2,
        "equal chosen and rejected": 1,
        "empty response": 1,
        "a message without role and content": 1,
    }


def test_the_command_says_what_it_wrote_and_what_it_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write(tmp_path / "votes.jsonl", vote(1), vote(2, "tie"), vote(3, "b"), end="")
    assert main(["data", "from-votes", str(tmp_path)]) == 0
    path = tmp_path / "preferences.jsonl"
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: 2 pairs from 3 votes",
        "  1 left out: tie",
        f"Train on them with --data {path}",
    ]
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {
            "prompt": [{"role": "user", "content": f"Question {n}?"}],
            "chosen": chosen,
            "rejected": rejected,
        }
        for n, chosen, rejected in ((1, "a1", "b1"), (3, "b3", "a3"))
    ]
    assert main(["data", "from-votes", str(tmp_path)]) == 0, "its own file is written anew"


@pytest.mark.parametrize(
    ("votes", "output", "message"),
    [
        (None, None, "there are no votes in"),
        ([], None, "none of 0 votes in"),
        ([vote(1, "tie")], None, "prefers a whole answer to another (1 left out: tie)"),
        ([vote(1)], "there.jsonl", "exists already; choose another name or delete it"),
        ([vote(1)], "votes.jsonl", "exists already"),
        ([vote(1)], "new.csv", "name the output *.jsonl, not new.csv"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], votes: Any, output: Any, message: str
):
    if votes is not None:
        write(tmp_path / "votes.jsonl", *votes)
    (tmp_path / "there.jsonl").touch()
    words = ["data", "from-votes", str(tmp_path)]
    words += ["--output", str(tmp_path / output)] if output else []
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_notebook_03_trains_a_reward_model_on_votes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    votes = [vote(n, "ab"[n % 2], a_response="yes", b_response="no") for n in range(60)]
    write(tmp_path / "votes.jsonl", *votes)
    assert main(["data", "from-votes", str(tmp_path)]) == 0
    run, source = tmp_path / "run", SourceConfig(str(tmp_path / "preferences.jsonl"))
    open_run(run, preset_name="toy", changes={"data__sources": (source,)}, resume=False, command="")
    pairs = Blend(from_dict(read_record(run)["config"]).data, seed=1)["reward"]
    assert {(p.chosen, p.rejected) for p in pairs} == {("yes", "no"), ("no", "yes")}
    words = ["--run_dir", str(run), "--init_from", "base", "--epochs", "1"]
    assert main(["run", str(NOTEBOOKS / "03_reward_model.py"), *words]) == 0
    assert f"{len(pairs)} pairs" in capfd.readouterr().out
    metrics = map(json.loads, (run / "reward/metrics.jsonl").read_text().splitlines())
    losses = [row["loss/train"] for row in metrics if "loss/train" in row]
    assert losses and all(map(math.isfinite, losses))
    assert is_complete(run / "reward/final")
