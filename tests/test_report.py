"""The report card: its numbers, its verdict, its warnings, its page."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from rlhf_kit import report
from rlhf_kit.config import EvalConfig, preset
from rlhf_kit.measure import ActorEvaluation, evaluate_reward_model
from rlhf_kit.metrics import MetricsLog
from rlhf_kit.results import describe_reward_model, summarise
from rlhf_kit.types import PreferencePair

N = 40
ATTACK = '<script>alert("x")</script><img src=http://example.invalid/x.png>'


def actor(level: float, seed: int, kl: float | None) -> ActorEvaluation:
    rng = np.random.default_rng(seed)
    gold = np.clip(level + rng.normal(0, 0.05, N), 0, 1)
    return ActorEvaluation(
        dialogues=tuple(({"role": "user", "content": f"Prompt {i} {ATTACK}"},) for i in range(N)),
        responses=tuple(f"Answer {i} {ATTACK}" for i in range(N)),
        length=rng.integers(3, 20, N),
        ended=np.ones(N, bool),
        gold={"correct": gold, "polite": gold, "total": gold},
        proxy=2 * gold - 1,
        kl=None if kl is None else np.full(N, kl),
        kl_k3=None if kl is None else np.full(N, kl),
    )


@pytest.fixture(scope="module")
def evaluation():
    models = {
        "base": actor(0.2, 0, None),
        "sft": actor(0.5, 1, 0.0),
        "final": actor(0.8, 2, 2.0),
        "ema": actor(0.75, 3, 1.5),
    }
    result = summarise(models, models, EvalConfig(bootstrap=100, samples=2))
    pair = PreferencePair(({"role": "user", "content": "x"},), "a b", "c", kind="style")
    margins = np.linspace(-1, 3, N)
    measured = evaluate_reward_model(lambda pairs: (margins, 0 * margins), [pair] * N)
    distance = {"relative_l2": 0.03, "changed": 0.9, "compared": 3}
    return {
        **result,
        "reward_model": describe_reward_model(measured),
        "weight_distance": {"final_vs_sft": distance, "ema_vs_sft": distance},
        "notes": [],
        "evaluation_seconds": 5.0,
    }


def make_run(path):
    record = {
        "config": preset("toy").to_dict(),
        "seed": 1,
        "commit": "0123456789abcdef",
        "versions": {"torch": "2.13.0"},
        "stages": {"02_sft": {"seconds": 20.0}, "04_ppo": {"seconds": 70.0}},
        "finished": "2026-11-22T00:00:00+00:00",
    }
    (path / "run.json").write_text(json.dumps(record))
    for stage in ("sft", "reward", "ppo"):
        with MetricsLog(path / stage, tensorboard=False) as log:
            for step in range(3):
                log(step, {"loss/train": 1.0, "objective/kl": 0.1 * step})
        summary = {"seconds": 10.0, "tokens": 500, "phases": {}}
        if stage == "ppo":
            summary["phases"] = {
                "generate": {"seconds": 2.0, "tokens": 100},
                "train": {"seconds": 6.0, "tokens": 0},
            }
        (path / stage / "summary.json").write_text(json.dumps(summary))
    return path


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path)


@pytest.fixture(scope="module")
def built(tmp_path_factory, evaluation):
    """A run whose report was built, for tests that only look."""
    run = make_run(tmp_path_factory.mktemp("run"))
    return run, report.build(run, evaluation=evaluation)


def test_the_report_holds_what_it_promises(built):
    run_dir, made = built
    assert report.load(run_dir) == json.loads(json.dumps(made))
    for key in ("gold", "gold_greedy", "proxy"):
        for model in ("base", "sft", "final", "ema"):
            assert set(made[key][model]) == {"mean", "low", "high"}
    assert set(made["kl"]) == {"sft", "final", "ema"}
    assert made["gold_parts"]["greedy"]["ema"]["polite"]["mean"] == pytest.approx(0.75, abs=0.03)
    assert {"wins", "ties", "losses", "rate", "difference"} == set(made["win_rate"]["ema_vs_final"])
    assert {"accuracy", "accuracy_by_kind", "ece", "calibration", "length_correlation"} <= set(
        made["reward_model"]
    )
    assert {"samples", "length", "ended_rate", "weight_distance", "versions", "config"} <= set(made)
    assert made["commit"] == "0123456789abcdef"


def test_seconds_throughput_and_shares_by_hand(built):
    _, made = built
    assert made["seconds"] == {
        "sft": 10.0, "reward": 10.0, "ppo": 10.0, "evaluation": 5.0, "total": 95.0,
    }  # fmt: skip
    assert made["throughput"]["ppo"] == {"all": 50.0, "generate": 50.0}
    assert made["phase_shares"] == {"generate": 0.25, "train": 0.75}


def test_memory_as_predicted_and_measured_stands_in_the_report(run_dir, evaluation):
    gib = 2**30
    values = {"memory/train/predicted_gib": 5.0, "memory/train/measured_gib": 4.5}
    with MetricsLog(run_dir / "sft", tensorboard=False) as log:
        log(3, values)
    summary = {"seconds": 1.0, "tokens": 1, "phases": {"train": {"seconds": 1.0, "tokens": 1}}}
    summary["phases"]["train"]["peak_bytes"] = 6 * gib
    (run_dir / "sft" / "summary.json").write_text(json.dumps(summary))
    made = report.build(run_dir, evaluation=evaluation)
    assert made["memory"]["sft"] == {"train": {"predicted": 5.0, "measured": 4.5, "peak": 6.0}}
    assert made["memory"]["ppo"] == {}  # of a run without a GPU
    assert "peak memory, GiB, sft: train 6.0 (predicted 5.0)" in report._lines(made)
    page = (run_dir / "report.html").read_text()
    assert "<td>6.0</td><td>5.0</td><td>4.5</td>" in page


def test_an_unfinished_runs_total_is_the_sum_of_its_stages(run_dir, evaluation):
    record = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps({**record, "finished": None}))
    assert report.build(run_dir, evaluation=evaluation)["seconds"]["total"] == 35.0


def test_a_clear_gain_is_called_learning_and_nothing_is_warned_about(built):
    _, made = built
    assert made["verdict"].startswith("PPO learned: gold score 0.5")
    assert made["warnings"] == []


def test_the_verdict_and_the_warnings_follow_the_intervals(evaluation):
    changed = copy.deepcopy(evaluation)
    for key in ("win_rate", "win_rate_greedy"):
        changed[key]["final_vs_sft"]["difference"] = {"mean": -0.1, "low": -0.2, "high": -0.05}
    changed["proxy"]["final"]["mean"] = 3.0
    changed["weight_distance"]["ema_vs_sft"]["relative_l2"] = 0.0
    changed["ended_rate"]["final"] = 0.2
    changed["reward_model"]["accuracy_interval"]["low"] = 0.48
    assert report.verdict(changed).startswith("PPO made the model worse")
    found = " ".join(report.warnings(changed))
    for said in (
        "proxy score rose while the gold score fell",
        "worse than the SFT model (sampled)",
        "worse than the SFT model (greedy)",
        "EMA model equals the SFT model",
        "Only 20% of the final model's responses end",
        "no better than chance",
    ):
        assert said in found
    difference = {"mean": 0.01, "low": -0.02, "high": 0.04}
    changed["win_rate"]["final_vs_sft"]["difference"] = difference
    assert "changed nothing" in report.verdict(changed)


def test_a_kind_of_pair_that_the_average_hides_is_named(evaluation):
    changed = copy.deepcopy(evaluation)
    changed["reward_model"]["accuracy_by_kind"] = {"style": 0.99, "truth": 0.54}
    assert report.warnings(changed) == [
        "The reward model hardly tells pairs apart that differ in: truth (54%)."
    ]


def test_without_gold_the_verdict_names_the_proxy_and_no_overoptimisation_is_claimed(evaluation):
    changed = copy.deepcopy(evaluation) | {"gold": {}, "gold_greedy": {}, "win_rate_judge": "proxy"}
    assert "proxy score" in report.verdict(changed)
    assert report.warnings(changed) == []


def test_before_ppo_the_verdict_says_so():
    assert "has not run" in report.verdict({"win_rate": {}, "gold": {}})


def test_nan_in_the_metrics_is_warned_about(run_dir, evaluation):
    with MetricsLog(run_dir / "ppo", tensorboard=False) as log:
        log(3, {"policy/loss": float("nan")})
    made = report.build(run_dir, evaluation=evaluation)
    assert made["warnings"] == ["Stage ppo logged NaN or infinity in policy/loss."]


def test_missing_stages_leave_their_sections_out_and_are_noted(run_dir, evaluation):
    for name in ("metrics.jsonl", "summary.json"):
        (run_dir / "reward" / name).unlink()
    partial = {key: value for key, value in evaluation.items() if key != "reward_model"}
    made = report.build(run_dir, evaluation=partial)
    assert made["notes"] == ["Stage reward left no metrics.jsonl and no summary.json."]
    page = (run_dir / "report.html").read_text()
    assert "Reward model: curves" not in page and "PPO: curves" in page
    assert "held-out pairs" not in page
    assert "Stage reward left no metrics.jsonl" in page


def test_only_what_is_there_makes_a_page(run_dir, evaluation, capsys):
    bare = {
        key: {} if isinstance(value, dict) else value
        for key, value in evaluation.items()
        if key != "reward_model"
    }
    made = report.build(run_dir, evaluation={**bare, "samples": []})
    report.print_terminal(made)
    assert "has not run" in capsys.readouterr().out


def test_a_run_with_an_sft_model_alone_has_a_page(run_dir):
    models = {"base": actor(0.2, 0, None), "sft": actor(0.5, 1, 0.0)}
    models = {name: dataclasses.replace(model, proxy=None) for name, model in models.items()}
    evaluation = summarise(models, models, EvalConfig(bootstrap=20, samples=1))
    notes = ["The final model is missing."]
    made = report.build(run_dir, evaluation={**evaluation, "weight_distance": {}, "notes": notes})
    assert "has not run" in made["verdict"]
    report.print_terminal(made)
    page = (run_dir / "report.html").read_text()
    assert "The final model is missing." in page and "Sample dialogues" in page
    assert "Proxy scores" not in page and "held-out pairs" not in page


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [
            v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "action", "data")
        ]
        if tag not in ("meta", "img", "br", "link", "input", "path", "use"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
            self.open.pop()


def test_the_page_is_self_contained_and_runs_nothing_a_model_wrote(built):
    text = (built[0] / "report.html").read_text()
    page = Page(text)
    assert not {"script", "img", "link", "iframe", "object", "form"} & page.tags
    assert all(link.startswith(("#", "data:image/png")) for link in page.links)
    assert not re.search(r"url\((?!#)|@import", text)
    assert "Content-Security-Policy" in text
    assert "&lt;script&gt;alert" in text
    assert page.open == []


def test_the_page_follows_the_readers_theme(built):
    text = (built[0] / "report.html").read_text()
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert "stroke: currentColor" in text and "var(--grid)" in text
    assert "#24292f" not in text


def test_nothing_half_written_is_left_behind(run_dir, evaluation):
    report.build(run_dir, evaluation=evaluation)
    report.build(run_dir, evaluation=evaluation)
    names = {path.name for path in run_dir.iterdir()}
    assert names == {"run.json", "report.json", "report.html", "sft", "reward", "ppo"}


def test_the_terminal_report_fits_a_hundred_columns(built, capsys):
    report.print_terminal(built[1])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) <= 40
    text = " ".join(lines)
    for said in ("PPO learned", "gold, greedy", "win rate", "seconds:", "style"):
        assert said in text


def test_a_directory_without_run_or_report_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        report.build(tmp_path)
    with pytest.raises(ValueError, match="no report yet"):
        report.load(tmp_path)
