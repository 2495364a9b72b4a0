"""The arithmetic of benchmarks/mixture_and_ema.py: intervals over seeds, paired differences."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import mixture_and_ema as benchmark  # noqa: E402


def end(gold: float) -> dict[str, Any]:
    return {
        "sampled": {"total": gold, "correct": gold},
        "greedy": {"total": gold, "correct": gold},
        "correct_by_family": {"fact": gold, "sort": gold - 0.1},
        "kl": 1.0,
        "distinct": 1.0,
        "loss on pretraining text": 2.0,
        "loss on dialogues": 3.0,
    }


def result(live: float, ema: float) -> dict[str, Any]:
    """A run whose average is worth `ema`, and the other one half of that."""
    ends = {"live": end(live), "ema": end(ema), "slow": end(ema / 2)}
    point = {name: {"gold": e["sampled"]["total"], "kl": 0.0} for name, e in ends.items()}
    return {"before": end(0.5), "ends": ends, "course": [{"iteration": 0, **point}]}


def test_the_interval_over_five_seeds_is_students():
    # Mean 3, standard deviation sqrt(2.5); 2.776 is the 97.5 % point with four degrees of freedom.
    found = benchmark.over_seeds([1.0, 2.0, 3.0, 4.0, 5.0])
    reach = 2.776 * math.sqrt(2.5 / 5)
    assert found["mean"] == 3.0
    assert found["low"] == pytest.approx(3 - reach) and found["high"] == pytest.approx(3 + reach)


def runs() -> dict[str, list[dict[str, Any]]]:
    """Two seeds: without mixture .6 and .8, with the ratio .1 and .3 more."""
    found = {}
    for setting in benchmark.SETTINGS:
        found[f"{setting}-none"] = [result(0.6, 0.7), result(0.8, 0.7)]
        found[f"{setting}-coef"] = [result(0.6, 0.6), result(0.8, 0.8)]
        found[f"{setting}-grad_norm_ratio"] = [result(0.7, 0.6), result(1.1, 0.6)]
    return found


def test_a_mixtures_worth_is_paired_by_seed():
    found = benchmark.compare(runs())["mixture"]["free-grad_norm_ratio"]["gold greedy"]
    assert found["seeds"] == pytest.approx([0.1, 0.3])
    assert found["mean"] == pytest.approx(0.2)
    # Half of the difference of two numbers is their mean's standard error.
    assert found["high"] - found["mean"] == pytest.approx(12.706 * 0.1)


def test_an_averages_worth_is_against_the_live_actor_of_the_same_run():
    found = benchmark.compare(runs())
    assert found["average"]["free-none"]["ema"]["gold sampled"]["seeds"] == pytest.approx(
        [0.1, -0.1]
    )
    assert found["course"]["free-none"]["slow - live"][0]["mean"] == pytest.approx(-0.35)
    assert found["before"]["correct greedy, worst family"]["mean"] == pytest.approx(0.4)


def test_costs_are_shares_of_an_iteration_with_neither():
    results = [
        {
            "iterations": 10,
            "seconds": {"plain": 20.0, "mixture": 2.0, "average": 0.2},
            "share": {"mixture": share, "average": 0.01},
            "bytes": {"weights": 4},
        }
        for share in (0.1, 0.3)
    ]
    found = benchmark.cost(results)
    assert found["share"]["mixture"]["mean"] == pytest.approx(0.2)
    assert found["seconds"]["plain"]["mean"] == pytest.approx(2.0)


def test_the_document_has_the_tables_of_the_committed_result():
    root = Path(benchmark.__file__).resolve().parents[1]
    found = json.loads(benchmark.RESULT.read_text(encoding="utf-8"))
    document = (root / "docs" / "mixture-and-ema.md").read_text(encoding="utf-8")
    for lines in benchmark.tables(found).values():
        assert "\n".join(lines) in document
