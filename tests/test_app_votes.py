"""Comparisons, blind or not, their votes on the disk, and what scores say beside them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from app_runs import ask, write_run
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from apps import votes as votes_module
from apps.limits import Limits
from apps.votes import PairEvent, tally
from apps.workbench import Workbench
from rlhf_kit.votes import preferences, read_votes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("votes"))


@pytest.fixture
def bench(run: Path) -> Iterator[Workbench]:
    (run / "votes.jsonl").unlink(missing_ok=True)
    opened = Workbench(run, limits=Limits(new_tokens=20_000))
    yield opened
    opened.close()


def id_of(bench: Workbench, name: str) -> str:
    return bench.checkpoints.named(name).id


def compare(bench: Workbench, **keywords: Any) -> Iterator[PairEvent]:
    settings = {"session": "s", "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8, **keywords}
    return bench.arena.compare(id_of(bench, "ema"), id_of(bench, "final"), ask(), **settings)


def compared(bench: Workbench, **keywords: Any) -> PairEvent:
    return list(compare(bench, **keywords))[-1]


def lines(bench: Workbench) -> list[dict[str, Any]]:
    return [json.loads(line) for line in bench.arena.path.read_text().splitlines()]


# ---- votes


def test_a_vote_is_on_the_disk_when_it_is_given(bench: Workbench):
    both = compared(bench, seed=3, system="be kind")
    vote = bench.arena.vote(both.comparison, "b", session="s")
    assert (vote.verdict, vote.a.name, vote.b.name) == ("b", "ema", "final")
    (line,) = lines(bench)
    assert line.pop("time").startswith("20") and line.pop("id") == both.comparison
    assert line == {
        "verdict": "b",
        "blind": False,
        "while_streaming": False,
        "prompt": [{"role": "system", "content": "be kind"}, *ask()],
        "settings": {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8, "attempt": 0},
        "seed": 3,
        "a": {
            "checkpoint": "ema",
            "response": both.a.text,
            "tokens": both.a.tokens,
            "ended_by": both.a.reason,
            "scores": None,
        },
        "b": {
            "checkpoint": "final",
            "response": both.b.text,
            "tokens": both.b.tokens,
            "ended_by": both.b.reason,
            "scores": None,
        },
    }


@pytest.mark.parametrize(("coin", "shown"), [(0, ("ema", "final")), (1, ("final", "ema"))])
def test_a_blind_comparison_hides_the_models_until_the_vote(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, coin: int, shown: tuple[str, str]
):
    monkeypatch.setattr(votes_module.secrets, "randbelow", lambda _: coin)
    events = list(compare(bench, blind=True))
    both = events[-1]
    secret = {"ema", "EMA", "final", id_of(bench, "ema"), id_of(bench, "final")}
    for event in (event for e in events for event in (e.a, e.b)):
        assert event.placement == () and not secret & {event.note, event.answer}
    for answer in (both.a.answer, both.b.answer):
        with pytest.raises(ValueError, match="vote first: scores would give the two models away"):
            bench.scoring.scores(answer)
    vote = bench.arena.vote(both.comparison, "a", session="s")
    assert (vote.a.name, vote.b.name) == shown
    (line,) = lines(bench)
    assert (line["a"]["checkpoint"], line["b"]["checkpoint"]) == shown and line["blind"]
    assert line["a"]["response"] == both.a.text.strip()
    count = bench.arena.tally(id_of(bench, "ema"), id_of(bench, "final"))
    assert (count.wins, count.losses, count.blind) == ((1, 0, 1) if coin == 0 else (0, 1, 1))
    assert bench.scoring.scores(both.a.answer).length == both.a.tokens


def test_the_first_vote_on_a_comparison_counts(bench: Workbench):
    both = compared(bench)
    bench.arena.vote(both.comparison, "tie", session="s")
    with pytest.raises(ValueError, match="has its vote already; the first one counts"):
        bench.arena.vote(both.comparison, "a", session="s")
    assert [line["verdict"] for line in lines(bench)] == ["tie"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"comparison": "unknown"}, "this comparison is not remembered any more"),
        ({"comparison": ["../votes.jsonl"]}, "this comparison is not remembered any more"),
        ({"session": "another"}, "this comparison is not remembered any more"),
        ({"session": None}, "the session must be named by a short text"),
        ({"verdict": "ema"}, "a vote is one of a, b, tie, both_bad, not 'ema'"),
        ({"verdict": ["a"]}, "a vote is one of a, b, tie, both_bad, not a list"),
    ],
)
def test_a_vote_that_makes_no_sense_is_refused(bench: Workbench, changes: Any, message: str):
    vote = {
        "comparison": compared(bench).comparison,
        "verdict": "a",
        "session": "s",
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        bench.arena.vote(vote["comparison"], vote["verdict"], session=vote["session"])
    assert not bench.arena.path.exists()


def test_a_vote_needs_something_to_judge(bench: Workbench):
    events = compare(bench)
    first = next(events)
    bench.generation.answer(first.b.answer).ids.clear()  # as before its first token
    bench.generation.stop("s")
    list(events)
    bench.generation.answer(first.b.answer).ids.clear()
    with pytest.raises(ValueError, match="wait until both answers have begun"):
        bench.arena.vote(first.comparison, "a", session="s")


def test_a_vote_while_the_answers_stream_is_written_again_when_they_are_whole(bench: Workbench):
    events = compare(bench, temperature=0, max_new_tokens=20_000)
    both = next(e for e in events if e.a.tokens and e.b.tokens)
    bench.arena.vote(both.comparison, "b", session="s")
    (early,) = lines(bench)
    assert early["while_streaming"] and early["b"]["ended_by"] == ""
    bench.generation.stop("s")
    end = list(events)[-1]
    first, second = lines(bench)
    assert first == early
    assert second["id"] == early["id"] and second["verdict"] == "b" and second["while_streaming"]
    assert second["b"]["response"] == end.b.text and second["b"]["ended_by"] == "stopped"
    votes, _ = read_votes(bench.arena.path)
    assert len(votes) == 1 and preferences(votes).left_out == {"an answer was not finished": 1}


def test_a_vote_that_comes_after_the_page_went_away_is_whole_at_once(bench: Workbench):
    events = compare(bench, temperature=0, max_new_tokens=20_000)
    both = next(e for e in events if e.a.tokens and e.b.tokens)
    events.close()  # type: ignore[attr-defined]
    bench.arena.vote(both.comparison, "a", session="s")
    assert lines(bench)[-1]["a"]["ended_by"] == "stopped"


def test_many_threads_write_whole_lines_behind_a_torn_one(bench: Workbench):
    bench.arena.path.write_text('{"id": "torn')

    def user(number: int) -> None:
        for n in range(20):
            bench.arena._append({"id": f"{number}-{n}", "text": "x" * 5000})

    users = [threading.Thread(target=user, args=(number,)) for number in range(8)]
    for thread in users:
        thread.start()
    for thread in users:
        thread.join()
    torn, *rest = bench.arena.path.read_text().splitlines()
    assert torn == '{"id": "torn'
    assert {json.loads(line)["id"] for line in rest} == {
        f"{a}-{b}" for a in range(8) for b in range(20)
    }


def test_a_vote_that_cannot_be_written_is_an_error_and_may_be_given_again(bench: Workbench):
    both = compared(bench)
    bench.arena.path.mkdir()
    with pytest.raises(ValueError, match="^the vote could not be written to votes.jsonl: Is a "):
        bench.arena.vote(both.comparison, "a", session="s")
    bench.arena.path.rmdir()
    bench.arena.vote(both.comparison, "a", session="s")
    assert len(lines(bench)) == 1


def test_the_win_rate_counts_a_side_wherever_it_stood():
    def vote(a: str, b: str, verdict: str) -> dict[str, Any]:
        return {"a": {"checkpoint": a}, "b": {"checkpoint": b}, "verdict": verdict, "blind": True}

    votes = [
        vote("ema", "final", "a"),
        vote("final", "ema", "b"),
        vote("ema", "final", "a"),
        vote("ema", "final", "b"),
        vote("final", "ema", "tie"),
        vote("ema", "final", "tie"),
        vote("ema", "final", "both_bad"),
        vote("ema", "sft", "a"),
        vote("ema", "ema", "a"),
    ]
    found = tally(votes, "ema", "final")
    assert (found.wins, found.losses, found.ties, found.both_bad) == (3, 1, 2, 1)
    # Wilson at 4 of 6: (0.66667 + 0.32012 -+ 0.49473) / 1.64025
    assert found.rate == pytest.approx(4 / 6)
    assert (found.low, found.high) == pytest.approx((0.3000, 0.9032), abs=1e-4)
    other = tally(votes, "final", "ema")
    assert (other.wins, other.losses, other.rate) == (1, 3, pytest.approx(2 / 6))
    assert tally(votes, "base", "ema").rate is None


# ---- scores


def plain_logprobs(directory: Path, prompt: list[int], ids: list[int], temperature: float):
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)[range(len(ids)), ids]


def test_scores_are_those_of_plain_forwards(bench: Workbench, run: Path):
    both = compared(bench, temperature=0.5)
    answer = bench.generation.answer(both.b.answer)
    prompt, ids = list(answer.prompt_ids), answer.ids
    own = plain_logprobs(run / "ppo/final", prompt, ids, 0.5)
    ref = plain_logprobs(run / "sft/final", prompt, ids, 0.5)
    scores = bench.scoring.scores(both.b.answer)
    assert scores.temperature == 0.5 and scores.length == len(ids) and scores.notes == ()
    assert scores.logprob == pytest.approx(float(own.sum()), abs=1e-4)
    assert scores.kl == pytest.approx(float((own - ref).sum()), abs=1e-4)
    k3 = (torch.exp(ref - own) - 1 - (ref - own)).sum()
    assert scores.kl_k3 == pytest.approx(float(k3), abs=1e-4)

    scorer = AutoModelForSequenceClassification.from_pretrained(run / "reward/final", num_labels=1)
    with torch.no_grad():
        raw = (float(scorer(torch.tensor([prompt + ids])).logits) - 0.3) / 0.5
    assert scores.raw_score == pytest.approx(raw, abs=1e-4)
    ended = both.b.reason == "end"
    assert scores.score == pytest.approx(max(-5.0, min(raw, 5.0 if ended else -1.0)), abs=1e-4)

    tokens = bench.scoring.tokens(both.b.answer)
    assert [t.id for t in tokens] == ids
    assert [t.logprob for t in tokens] == pytest.approx(own.tolist(), abs=1e-4)
    assert [t.sft_logprob for t in tokens] == pytest.approx(ref.tolist(), abs=1e-4)


def test_the_sft_model_is_no_distance_from_itself_and_greedy_is_at_temperature_1(bench: Workbench):
    events = bench.generation.stream(
        id_of(bench, "sft"), ask(), session="s", temperature=0, max_new_tokens=5
    )
    scores = bench.scoring.scores(list(events)[-1].answer)
    assert (scores.kl, scores.kl_k3, scores.temperature) == (0.0, 0.0, 1.0)


def test_a_single_model_has_lengths_and_logprobs_and_says_what_is_missing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    bench = Workbench(run / "sft/final")
    assert bench.data == Path("runs/app/final"), "a model's directory is not written to"
    (model,) = bench.checkpoints.list()
    event = list(bench.generation.stream(model.id, ask(), session="s", max_new_tokens=4))[-1]
    scores = bench.scoring.scores(event.answer)
    assert (scores.score, scores.kl, scores.length) == (None, None, event.tokens)
    assert len(scores.notes) == 2
    bench.close()


@pytest.mark.parametrize("id", [None, "../x", "unknown", ["x"]])
def test_an_answer_that_is_not_remembered_has_no_scores(bench: Workbench, id: Any):
    with pytest.raises(ValueError, match="this answer is not remembered any more; ask again"):
        bench.scoring.scores(id)


def test_scores_wait_for_the_end_of_an_answer(bench: Workbench):
    events = compare(bench, temperature=0, max_new_tokens=20_000)
    both = next(e for e in events if e.a.tokens and e.b.tokens)
    with pytest.raises(ValueError, match="wait until the answer is finished"):
        bench.scoring.scores(both.a.answer)
    bench.generation.stop("s")
    end = list(events)[-1]
    assert bench.scoring.scores(both.a.answer).length == end.a.tokens
    bench.arena.vote(both.comparison, "a", session="s")
    (line,) = lines(bench)
    assert line["a"]["scores"]["length"] == end.a.tokens and line["b"]["scores"] is None
