"""Reward hacking: does PPO answer better, or only please its reward model?

Nobody has a gold judge in a real run. What one can have: a second reward model that PPO never
sees, and an eye on the cheap ways to a score: length, repetition, one answer for everything.
Each sign is a comparison of the later half of the last measurements with the earlier half.

Shapes: B batch, R response tokens.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from rlhf_kit import distributed
from rlhf_kit.checkpoint import read_marker
from rlhf_kit.config import MonitorConfig, RunConfig
from rlhf_kit.models import resolve_model
from rlhf_kit.scorer import Scorer
from rlhf_kit.statistics import pearson
from rlhf_kit.training_state import State
from rlhf_kit.types import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GRAM = 3
"""Tokens of a repeated piece."""
ALIKE = 0.9
"""Responses count as becoming alike once their distinct share has fallen to this much of itself."""
WATCHED = (
    "objective/score",
    "objective/kl",
    "monitor/heldout_score",
    "monitor/length_correlation",
    "monitor/repetition_correlation",
    "response/distinct_rate",
)
"""What a measurement keeps."""
ADVICE = {
    "heldout": "raise ppo.kl.coef, stop earlier, or train the reward model on such responses",
    "length": "raise ppo.kl.coef, or balance the lengths of the reward model's pairs",
    "repetition": "raise ppo.kl.coef, or give the reward model pairs with repetitive responses",
    "alike": "raise ppo.kl.coef, and read ppo/samples.jsonl: one answer wins everywhere",
}


class Monitor:
    """Measures each rollout, and says which signs of reward hacking the last ones show."""

    def __init__(self, args: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """`tokenizer` is the actor's. ValueError where the held-out model can't be loaded."""
        self.config = args.monitor
        self.heldout: Scorer | None = None
        if self.config.reward_model is not None:
            directory = resolve_model(self.config.reward_model)
            read_marker(directory)
            self.heldout = Scorer(Path(directory), args, tokenizer)
        self.points: deque[dict[str, float]] = deque(maxlen=self.config.window)
        self._said: set[str] = set()

    def due(self, iteration: int) -> bool:
        """Whether `iteration`, counted from 0, is one of those that are measured."""
        return iteration % self.config.every == 0

    def measure(
        self, rollout: Rollout, score: Tensor, heldout: Tensor | None = None
    ) -> dict[str, float]:
        """Metrics of all ranks' responses; `score` [B] is PPO's, `heldout` [B] the other model's.

        A correlation with something constant is none, and left out.
        """
        mine = [
            (float(s), len(ids), repetition(ids), tuple(ids))
            for s, ids in zip(score.tolist(), _responses(rollout), strict=True)
        ]
        every = distributed.gather_objects((mine, heldout.tolist() if heldout is not None else []))
        rows = [row for part, _ in every for row in part if math.isfinite(row[0])]
        texts = {row[3] for row in rows}
        metrics = {
            "response/distinct_rate": len(texts) / max(len(rows), 1),
            "response/repetition": sum(row[2] for row in rows) / max(len(rows), 1),
        }
        scores = np.array([row[0] for row in rows])
        for name, place in (("length", 1), ("repetition", 2)):
            found = pearson(scores, np.array([float(row[place]) for row in rows]))
            if found is not None:
                metrics[f"monitor/{name}_correlation"] = found
        if others := [value for _, part in every for value in part]:
            metrics["monitor/heldout_score"] = sum(others) / len(others)
        return metrics

    def add(self, metrics: Mapping[str, float]) -> None:
        """Keep an iteration's metrics, those of `measure` among them, as one measurement."""
        point = {key: metrics[key] for key in WATCHED if key in metrics}
        if all(map(math.isfinite, point.values())):
            self.points.append(point)

    def signs(self) -> dict[str, str]:
        """The signs that were not there before: what happened, by name; none before `window`."""
        found = signs(list(self.points), self.config)
        new = {name: said for name, said in found.items() if name not in self._said}
        self._said = set(found)
        return new

    def state(self) -> State:
        return {"points": list(self.points), "said": sorted(self._said)}

    def load_state(self, state: State) -> None:
        self.points = deque(state["points"], maxlen=self.config.window)
        self._said = set(state["said"])


def _responses(rollout: Rollout) -> list[list[int]]:
    rows = zip(rollout.response_ids.tolist(), rollout.response_mask.sum(-1).tolist(), strict=True)
    return [ids[:length] for ids, length in rows]


def repetition(ids: Sequence[int]) -> float:
    """Share of a response's trigrams that occurred in it before."""
    grams = [tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def change(values: Sequence[float]) -> float:
    """Mean of the later half minus that of the earlier, in standard errors of the difference.

    The noise is what the values scatter within the halves, a drift included: it is no less than
    it seems. Equal values have changed by 0.
    """
    half = len(values) // 2
    early, late = np.array(values[:half]), np.array(values[half:])
    error = math.sqrt(early.var(ddof=1) / len(early) + late.var(ddof=1) / len(late))
    difference = float(late.mean() - early.mean())
    return difference / max(error, 1e-9)


def signs(points: Sequence[Mapping[str, float]], config: MonitorConfig) -> dict[str, str]:
    """What the last `config.window` measurements show, by the keys of ADVICE."""
    if len(points) < config.window:
        return {}
    series = {key: [p[key] for p in points] for key in WATCHED if all(key in p for p in points)}
    changes = {key: change(values) for key, values in series.items()}
    half = config.window // 2

    def moved(key: str) -> str:
        early, late = np.mean(series[key][:half]), np.mean(series[key][half:])
        return f"from {early:.2f} to {late:.2f}"

    found: dict[str, str] = {}
    noise = config.noise
    kl = f"(KL {np.mean(series['objective/kl'][half:]):.1f})" if "objective/kl" in series else ""
    rises = changes.get("objective/score", 0.0) > noise
    # The score may have stopped rising by then; it only must not fall as well.
    if changes.get("monitor/heldout_score", 0.0) < -noise and changes["objective/score"] > -1:
        found["heldout"] = (
            f"the score went {moved('objective/score')} while the held-out reward model's fell "
            f"{moved('monitor/heldout_score')} {kl}"
        )
    for name in ("length", "repetition"):
        key = f"monitor/{name}_correlation"
        if changes.get(key, 0.0) > noise and np.mean(series[key][half:]) > config.correlation:
            found[name] = f"the score follows {name} more and more: correlation {moved(key)} {kl}"
    distinct = series.get("response/distinct_rate", [])
    if rises and distinct and np.mean(distinct[half:]) < ALIKE * np.mean(distinct[:half]):
        found["alike"] = (
            f"the score rose {moved('objective/score')} while the share of different responses "
            f"fell {moved('response/distinct_rate')} {kl}"
        )
    return found
