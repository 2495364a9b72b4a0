"""Where a run keeps its things, and what stands in for what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_kit.checkpoint import MARKER
from rlhf_kit.config import preset
from rlhf_kit.metrics import Phases
from rlhf_kit.run_directory import RunDirectory


def finished(directory: Path) -> str:
    directory.mkdir(parents=True)
    (directory / MARKER).write_text('{"sha256": {}}')
    return str(directory)


def test_a_notebook_by_hand_takes_its_preset_and_its_parameters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = RunDirectory.open(tmp_path, preset_name="toy", seed=7, ppo__epochs=None)
    assert run.config == preset("toy", seed=7)
    assert "settings: preset toy" in capsys.readouterr().out


def test_the_record_of_a_started_run_wins_over_the_preset(tmp_path: Path):
    config = preset("toy", seed=9, ppo__kl__coef=0.7)
    record = {"config": config.to_dict(), "stages": {}, "finished": None}
    (tmp_path / "run.json").write_text(json.dumps(record))
    run = RunDirectory.open(tmp_path, preset_name="consumer", seed=11)
    assert run.config == preset("toy", seed=11, ppo__kl__coef=0.7)


def test_missing_models_are_replaced_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = RunDirectory.open(tmp_path, preset_name="toy")
    args = run.args()
    assert (args.actor_model, args.reward_model) == ("toy_world", "toy_world")
    said = capsys.readouterr().out
    assert f"no SFT model in {tmp_path / 'sft' / 'final'}: using toy_world instead" in said
    assert f"no reward model in {tmp_path / 'reward' / 'final'}: using toy_world instead" in said


def test_finished_models_are_used_and_unfinished_ones_are_not(tmp_path: Path):
    sft = finished(tmp_path / "sft" / "final")
    (tmp_path / "reward" / "final").mkdir(parents=True)
    (tmp_path / "reward" / "final" / "model.safetensors").write_bytes(b"half")
    args = RunDirectory.open(tmp_path, preset_name="toy").args()
    assert (args.actor_model, args.reward_model) == (sft, "toy_world")
    reward = finished(tmp_path / "other" / "reward" / "final")
    assert RunDirectory.open(tmp_path / "other", preset_name="toy").args().reward_model == reward


def test_the_summary_of_a_stage_says_what_it_took(tmp_path: Path):
    run = RunDirectory.open(tmp_path, preset_name="toy")
    phases = Phases()
    with phases("train") as phase:
        phase.tokens += 40
    with phases("score") as phase:
        phase.tokens += 2
    summary = run.finish("sft", phases, steps=3)
    assert json.loads((tmp_path / "sft" / "summary.json").read_text()) == summary
    assert summary["tokens"] == 42 and summary["steps"] == 3 and summary["world_size"] == 1
    assert summary["seconds"] >= 0 and set(summary["phases"]) == {"train", "score"}


def test_a_stage_directory_is_made_once(tmp_path: Path):
    run = RunDirectory.open(tmp_path / "new", preset_name="toy")
    assert run.stage("ppo") == run.stage("ppo") == tmp_path / "new" / "ppo"
    assert run.stage("ppo").is_dir()


def test_the_stages_of_this_file_are_those_of_the_kit(
    tmp_path: Path, tiny_args: Callable[..., Any]
):
    assert tiny_args().preset == "toy"
    assert RunDirectory.open(str(tmp_path), preset_name="toy").path == tmp_path
