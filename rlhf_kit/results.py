"""What evaluations found, as plain JSON: the middle of `report.json`.

Shapes: N held-out prompts. Every model answered the same ones, in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from rlhf_kit.config import EvalConfig
from rlhf_kit.measure import ActorEvaluation, RewardModelEvaluation
from rlhf_kit.statistics import bootstrap_interval, length_correlation, win_rate

MODELS = ("base", "sft", "final", "ema")
COMPARISONS = (("final", "sft"), ("ema", "sft"), ("ema", "final"))
SEED = 0
"""Of prompts, sampling and resampling: the same for every run, so that runs compare."""


def summarise(
    sampled: Mapping[str, ActorEvaluation],
    greedy: Mapping[str, ActorEvaluation],
    config: EvalConfig,
) -> dict[str, Any]:
    """Means with intervals by model and decoding, win rates by pair, and sample dialogues."""

    def interval(values: np.ndarray) -> dict[str, float]:
        resamples = config.bootstrap
        return asdict(bootstrap_interval(values, resamples=resamples, seed=SEED))

    result: dict[str, Any] = {"prompts": len(next(iter(sampled.values())).responses)}
    for suffix, results in (("", sampled), ("_greedy", greedy)):
        gold = {name: r.gold["total"] for name, r in results.items() if r.gold}
        proxy = {name: r.proxy for name, r in results.items() if r.proxy is not None}
        result[f"gold{suffix}"] = {name: interval(values) for name, values in gold.items()}
        result[f"proxy{suffix}"] = {name: interval(values) for name, values in proxy.items()}
        result[f"length{suffix}"] = {name: float(r.length.mean()) for name, r in results.items()}
        result[f"ended_rate{suffix}"] = {name: float(r.ended.mean()) for name, r in results.items()}
        result[f"win_rate{suffix}"] = {
            f"{a}_vs_{b}": asdict(
                win_rate(judged[a], judged[b], resamples=config.bootstrap, seed=SEED)
            )
            for judged in [gold or proxy]
            for a, b in COMPARISONS
            if a in judged and b in judged
        }
    result["win_rate_judge"] = "gold" if result["gold"] else "proxy"
    result["gold_parts"] = {
        decoding: {
            name: {part: interval(values) for part, values in r.gold.items() if part != "total"}
            for name, r in results.items()
            if r.gold
        }
        for decoding, results in (("sampled", sampled), ("greedy", greedy))
    }
    k1 = {name: r.kl for name, r in sampled.items() if r.kl is not None}
    k3 = {name: r.kl_k3 for name, r in sampled.items() if r.kl_k3 is not None}
    result["kl"] = {name: float(values.mean()) for name, values in k1.items()}
    result["kl_interval"] = {name: interval(values) for name, values in k1.items()}
    result["kl_k3"] = {name: float(values.mean()) for name, values in k3.items()}
    result["length_correlation"] = {
        name: asdict(length_correlation(r.proxy, r.length, control=r.gold.get("total")))
        for name, r in sampled.items()
        if r.proxy is not None
    }
    result["distributions"] = {name: _distribution(r) for name, r in sampled.items()}
    result["samples"] = _samples(sampled, config.samples)
    return result


def _distribution(result: ActorEvaluation) -> dict[str, list[float]]:
    """Per prompt, for histograms and scatter plots."""
    columns = {"length": result.length, "proxy": result.proxy, "gold": result.gold.get("total")}
    return {
        key: [round(float(value), 4) for value in values]
        for key, values in columns.items()
        if values is not None
    }


def _samples(sampled: Mapping[str, ActorEvaluation], n: int) -> list[dict[str, Any]]:
    """Evenly spaced prompts, not chosen by how they look, with every model's response."""
    first = next(iter(sampled.values()))
    rows = np.unique(np.linspace(0, len(first.responses) - 1, n).astype(int))
    return [
        {
            "prompt": [dict(message) for message in first.dialogues[row]],
            "responses": {
                name: {
                    "text": r.responses[row],
                    "ended": bool(r.ended[row]),
                    "gold": float(r.gold["total"][row]) if r.gold else None,
                    "proxy": float(r.proxy[row]) if r.proxy is not None else None,
                }
                for name, r in sampled.items()
            },
        }
        for row in rows
    ]


def describe_reward_model(evaluation: RewardModelEvaluation) -> dict[str, Any]:
    """Accuracy, its parts, and calibration."""
    return {
        "accuracy": evaluation.accuracy.mean,
        "accuracy_interval": asdict(evaluation.accuracy),
        "accuracy_by_kind": evaluation.accuracy_by_kind,
        "accuracy_by_family": evaluation.accuracy_by_family,
        "mean_margin": evaluation.mean_margin,
        "ece": evaluation.calibration.ece,
        "calibration": asdict(evaluation.calibration),
        "length_correlation": asdict(evaluation.length),
        "pairs": evaluation.pairs,
    }
