"""The log, its file format, and the plots."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rlhf_kit import distributed
from rlhf_kit.metrics import MetricsLog, Phases, history, read_metrics, summary

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
LOGGED = """
    loss/train loss/eval optim/lr optim/grad_norm perf/tokens_per_second
    reward/accuracy reward/margin reward/chosen reward/rejected
    eval/accuracy eval/accuracy/<kind>
    objective/kl objective/kl_k3 objective/kl_coef objective/entropy objective/score_raw
    objective/score objective/reward_sum
    policy/loss policy/approx_kl policy/clipfrac policy/ratio_mean policy/ratio_var
    value/loss value/clipfrac value/explained_variance
    mixture/loss mixture/coef
    response/length response/eos_rate response/truncated_rate response/empty_rate
    objective/score_std faults/skipped response/distinct_rate response/repetition
    monitor/length_correlation monitor/repetition_correlation monitor/heldout_score
    advantage/mean advantage/std
    optim/actor_grad_norm optim/critic_grad_norm optim/actor_lr optim/critic_lr
    engine/logprob_gap_max engine/logprob_gap_mean
    ema/decay ema/distance
    phase/generate/seconds phase/score/seconds phase/train/seconds
    perf/pairs_per_second perf/generated_tokens_per_second
    ppo/epochs_done
""".split()


def explained() -> list[str]:
    """The keys that stand in the first column of a table of docs/metrics.md."""
    first = [line.split("|")[1] for line in DOCUMENT.read_text().splitlines() if line[:3] == "| `"]
    return [key.strip(" `") for cell in first for key in cell.split(",")]


@pytest.mark.parametrize("key", LOGGED)
def test_the_document_explains_every_logged_key_once(key):
    assert explained().count(key) == 1


def test_the_page_draws_documented_keys_only():
    from rlhf_kit.report_page import PANELS

    drawn = {key for panels in PANELS.values() for keys in panels.values() for key in keys}
    assert drawn <= set(explained())


def test_logged_numbers_come_back_as_they_were(tmp_path):
    with MetricsLog(tmp_path / "new", tensorboard=False) as log:
        log(0, {"objective/kl": torch.tensor(0.5), "ppo/epochs_done": 2})
        log(1, {"objective/kl": 0.75})
    rows = read_metrics(tmp_path / "new")
    assert rows[0]["ppo/epochs_done"] == 2
    assert history(rows, "objective/kl") == ([0, 1], [0.5, 0.75])


def test_every_line_is_strict_json_even_with_nan_and_infinity(tmp_path, capsys):
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log(0, {"policy/loss": float("nan"), "value/loss": float("-inf"), "objective/kl": 1.0})
        log(1, {"policy/loss": float("nan")})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0], parse_constant=refuse)
    assert first["policy/loss"] is None
    assert first["nonfinite"] == {"policy/loss": "nan", "value/loss": "-inf"}
    row = read_metrics(tmp_path)[0]
    assert math.isnan(row["policy/loss"]) and row["value/loss"] == -math.inf
    assert "nonfinite" not in row
    assert capsys.readouterr().out.count("policy/loss is nan") == 1


def test_a_torn_last_line_is_dropped_and_a_torn_middle_line_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "a": 1}\n{"step": 1, "a"')
    assert read_metrics(path) == [{"step": 0, "a": 1}]
    path.write_text('{"step": 0, "a"\n{"step": 1, "a": 1}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_metrics(path)


def test_a_log_continues_after_a_torn_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "a": 1}\n{"step": 1, "a"')
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log(1, {"a": 2})
    assert history(read_metrics(tmp_path), "a") == ([0, 1], [1, 2])


def test_a_resumed_log_forgets_the_steps_it_will_log_again(tmp_path):
    with MetricsLog(tmp_path, tensorboard=False) as log:
        for step in range(5):
            log(step, {"a": step})
    with MetricsLog(tmp_path, tensorboard=False, purge_step=3) as log:
        log(3, {"a": 30})
    assert history(read_metrics(tmp_path), "a") == ([0, 1, 2, 3], [0, 1, 2, 30])


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    with MetricsLog(tmp_path / "run") as log:
        log(0, {"a": 1.0})
    assert not (tmp_path / "run").exists()


def test_tensorboard_receives_the_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path) as log:
        log(0, {"objective/kl": 0.5})
        log(1, {"objective/kl": 0.25})
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("objective/kl")
    assert [(event.step, event.value) for event in events] == [(0, 0.5), (1, 0.25)]


@pytest.mark.parametrize("value", ["high", [1.0, 2.0], torch.zeros(2), None])
def test_a_metric_that_is_no_number_is_refused_by_name(tmp_path, value):
    with pytest.raises(ValueError, match="objective/kl must be one number"):
        MetricsLog(tmp_path, tensorboard=False)(0, {"objective/kl": value})


def test_a_reserved_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="reserved"):
        MetricsLog(tmp_path, tensorboard=False)(0, {"step": 1})


def test_the_console_line_shows_the_chosen_keys_that_were_logged():
    values = {"objective/kl": 1.23456, "policy/loss": 0.5, "value/loss": 2}
    keys = ("objective/kl", "value/loss", "objective/score")
    assert summary(values, keys) == "objective/kl 1.235  value/loss 2"


def test_a_fast_loop_does_not_flood_the_console(tmp_path, capsys, monkeypatch):
    clock = iter([10.0, 10.0, 11.0, 16.0, 16.0])
    monkeypatch.setattr("rlhf_kit.metrics.time.monotonic", lambda: next(clock))
    log = MetricsLog(tmp_path, tensorboard=False, console=("a",))
    for step in range(3):
        log(step, {"a": step})
    assert capsys.readouterr().out == "step 0  a 0\nstep 2  a 2\n"


class Bar:
    text = ""

    def __init__(self, *, disable):
        self.disable = disable

    def set_postfix_str(self, text):
        self.text = text


def test_the_summary_goes_to_a_bar_when_there_is_one(tmp_path, capsys):
    bar = Bar(disable=False)
    MetricsLog(tmp_path, tensorboard=False, console=("a",))(0, {"a": 1.0}, bar=bar)
    assert bar.text == "a 1"
    assert capsys.readouterr().out == ""


def test_a_disabled_bar_leaves_the_summary_to_a_line(tmp_path, capsys):
    bar = Bar(disable=True)
    MetricsLog(tmp_path, tensorboard=False, console=("a",))(0, {"a": 1.0}, bar=bar)
    assert bar.text == ""
    assert capsys.readouterr().out == "step 0  a 1\n"


def test_phases_add_up(monkeypatch):
    clock = iter([0.0, 3.0, 10.0, 11.0, 20.0, 23.0])
    monkeypatch.setattr("rlhf_kit.metrics.time.perf_counter", lambda: next(clock))
    phases = Phases()
    with phases("generate", tokens=60) as phase:
        phase.tokens += 30
    with phases("train"):
        pass
    assert phases.lap() == {"phase/generate/seconds": 3.0, "phase/train/seconds": 1.0}
    with phases("generate", tokens=30):
        pass
    assert phases.lap() == {"phase/generate/seconds": 3.0}
    assert phases.shares() == {"generate": 6 / 7, "train": 1 / 7}
    assert phases.tokens_per_second() == {"generate": 20.0}
    assert phases.to_dict()["generate"] == {"seconds": 6.0, "tokens": 120}


def test_phases_do_not_nest():
    phases = Phases()
    inside = pytest.raises(ValueError, match="train starts inside phase score")
    with phases("score"), inside, phases("train"):
        pass
