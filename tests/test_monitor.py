"""The monitor of reward hacking on made-up series, and on rollouts of a tiny actor."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_kit.config import MonitorConfig, RunConfig
from rlhf_kit.faults import FILE_NAME, Faults, TrainingStopped
from rlhf_kit.monitor import ADVICE, Monitor, change, repetition, signs
from rlhf_kit.ppo import PPOTrainer
from rlhf_kit.types import PromptBatch, Rollout

CONFIG = MonitorConfig(window=10, noise=3.0)


def series(**ends: tuple[float, float]) -> list[dict[str, float]]:
    """Ten points on lines from the first to the second value, with a fixed noise of 0.02."""
    noise = 0.02 * np.random.default_rng(1).standard_normal((10, len(ends)))
    return [
        {
            key.replace("__", "/"): low + (high - low) * i / 9 + float(noise[i, column])
            for column, (key, (low, high)) in enumerate(ends.items())
        }
        for i in range(10)
    ]


def test_a_change_is_measured_in_its_standard_errors():
    # Halves 1 2 3 and 4 5 6: difference 3, variance 1 each, error sqrt(1/3 + 1/3).
    assert change([1, 2, 3, 4, 5, 6]) == pytest.approx(3 / (2 / 3) ** 0.5)
    assert change([6, 5, 4, 3, 2, 1]) == pytest.approx(-3 / (2 / 3) ** 0.5)
    assert change([2.0] * 6) == 0 and abs(change([1, 2, 1, 2, 1, 2, 1, 2])) < 1e-9


def test_a_held_out_score_that_falls_while_the_score_rises_is_a_sign():
    points = series(objective__score=(0.5, 1.0), monitor__heldout_score=(0.4, -0.4))
    found = signs(points, CONFIG)
    assert list(found) == ["heldout"]
    assert found["heldout"].startswith("the score went from 0.6")
    assert "held-out reward model's fell from 0." in found["heldout"]


@pytest.mark.parametrize(
    "healthy",
    [
        {"objective__score": (0.5, 1.0), "monitor__heldout_score": (0.3, 0.8)},
        {"objective__score": (0.5, 1.0), "monitor__heldout_score": (0.3, 0.3)},
        {"objective__score": (1.0, 0.5), "monitor__heldout_score": (0.8, 0.3)},  # both lose
        {"objective__score": (0.5, 1.0)},
        {"objective__score": (0.5, 1.0), "monitor__length_correlation": (-0.4, 0.2)},
        {"objective__score": (0.5, 1.0), "monitor__length_correlation": (0.7, 0.7)},
        {"objective__score": (0.5, 1.0), "response__distinct_rate": (1.0, 0.94)},
        {"objective__score": (0.5, 0.5), "response__distinct_rate": (1.0, 0.5)},
    ],
)
def test_what_is_healthy_or_mere_noise_is_no_sign(healthy: dict[str, tuple[float, float]]):
    assert signs(series(**healthy), CONFIG) == {}


@pytest.mark.parametrize(
    ("key", "ends", "sign"),
    [
        ("monitor__length_correlation", (0.1, 0.9), "length"),
        ("monitor__repetition_correlation", (0.0, 0.95), "repetition"),
        ("response__distinct_rate", (0.9, 0.3), "alike"),
    ],
)
def test_cheap_ways_to_a_score_are_signs(key: str, ends: tuple[float, float], sign: str):
    found = signs(series(objective__score=(0.5, 1.0), objective__kl=(5, 15), **{key: ends}), CONFIG)
    assert list(found) == [sign] and "(KL 12." in found[sign] and sign in ADVICE


def test_too_few_measurements_show_nothing():
    points = series(objective__score=(0.5, 1.0), monitor__heldout_score=(0.4, -0.4))
    assert signs(points[:9], CONFIG) == {}


def test_a_sign_is_said_once_and_again_only_after_it_was_gone(tiny_args: Callable[..., RunConfig]):
    monitor = Monitor(tiny_args(monitor__window=10, monitor__noise=3.0), tokenizer=None)  # type: ignore[arg-type]
    bad = series(objective__score=(0.5, 1.0), monitor__heldout_score=(0.4, -0.4))
    good = series(objective__score=(0.5, 1.0), monitor__heldout_score=(0.4, 0.8))
    said = []
    for points in (bad, bad, good, bad):
        for point in points:
            monitor.add(point)
        said.append(list(monitor.signs()))
    assert said == [["heldout"], [], [], ["heldout"]]
    other = Monitor(tiny_args(monitor__window=10), tokenizer=None)  # type: ignore[arg-type]
    other.load_state(json.loads(json.dumps(monitor.state())))
    assert list(other.points) == list(monitor.points) and other.signs() == {}


def test_repetition_is_the_share_of_trigrams_seen_before():
    assert repetition([1, 2, 3, 4, 5]) == 0 and repetition([1, 2]) == 0
    # 121 212 121 212: two kinds in four
    assert repetition([1, 2, 1, 2, 1, 2]) == 0.5


def made_rollout(responses: list[list[int]]) -> Rollout:
    rows, width = len(responses), max(map(len, responses))
    ids, mask = torch.zeros(rows, width, dtype=torch.long), torch.zeros(rows, width).bool()
    for row, response in enumerate(responses):
        ids[row, : len(response)] = torch.tensor(response)
        mask[row, : len(response)] = True
    prompts = PromptBatch(ids[:, :1], mask[:, :1], torch.arange(rows), ((),) * rows)
    return Rollout(prompts, ids, mask, torch.zeros(rows, width), torch.ones(rows).bool())


def test_a_rollout_is_measured_by_its_lengths_and_its_tokens(tiny_args: Callable[..., RunConfig]):
    monitor = Monitor(tiny_args(), tokenizer=None)  # type: ignore[arg-type]
    rollout = made_rollout([[5, 1], [7, 8, 9, 1], [7, 8, 9, 1], [3, 3, 3, 3, 3, 3]])
    score = torch.tensor([1.0, 2.0, 2.0, 3.0])
    found = monitor.measure(rollout, score, heldout=torch.tensor([1.0, 0.0, 0.0, -2.0]))
    assert found == pytest.approx(
        {
            "response/distinct_rate": 0.75,
            "response/repetition": 0.75 / 4,  # 333 four times, of which three again
            "monitor/length_correlation": 1.0,  # lengths 2, 4, 4, 6
            "monitor/repetition_correlation": 0.8164966,  # 1 / sqrt(1.5), by hand
            "monitor/heldout_score": -0.25,
        }
    )
    # Nothing varies, or is not a number: no correlation, and no NaN in the log.
    alike = monitor.measure(made_rollout([[5, 1]] * 4), torch.tensor([1.0, 2.0, 3.0, torch.nan]))
    assert alike == {"response/distinct_rate": 1 / 3, "response/repetition": 0.0}


def test_ppo_scores_by_the_held_out_model_every_few_iterations_and_follows_the_policy(
    build: Callable[[RunConfig], Any],
    tiny_args: Callable[..., RunConfig],
    prompts: Callable[..., PromptBatch],
    reward_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    args = tiny_args(
        monitor__reward_model=reward_dir, monitor__every=2, monitor__policy="stop",
        monitor__window=4, ppo__score_clip=100.0, ppo__missing_eos_score=100.0,
    )  # fmt: skip
    trainer = PPOTrainer(
        engine=build(args), args=args, faults=Faults(args.faults, tmp_path / "ppo")
    )
    seen = []
    for _ in range(3):
        metrics = trainer.step(trainer.generate_experience(prompts()))
        seen.append(metrics.get("monitor/heldout_score"))
    assert seen[1] is None and len(trainer.monitor.points) == 2
    # The held-out model is the reward model itself here, so that both must agree.
    assert seen[2] == pytest.approx(metrics["objective/score"], abs=1e-4)
    assert "monitor" in trainer.state()
    monkeypatch.setattr(trainer.monitor, "signs", lambda: {"alike": "they are all alike"})
    trainer.step(trainer.generate_experience(prompts()))  # not one of those that are measured
    with pytest.raises(TrainingStopped, match="all alike; training stops here; raise ppo.kl.coef"):
        trainer.step(trainer.generate_experience(prompts()))
    line = json.loads((tmp_path / "ppo" / FILE_NAME).read_text())
    assert line["fault"] == "reward_hacking" and line["step"] == 5


def test_a_held_out_model_that_is_not_there_is_refused_before_training(
    tiny_args: Callable[..., RunConfig], tmp_path: Path
):
    args = tiny_args()
    missing = dataclasses.replace(args.monitor, reward_model=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="nowhere"):
        Monitor(dataclasses.replace(args, monitor=missing), tokenizer=None)  # type: ignore[arg-type]
