"""Predicted beside measured memory: with a GPU that is played, and without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_engine_memory import opt

from rlhf_kit import memory_check
from rlhf_kit.config import RunConfig, preset
from rlhf_kit.hybrid_engine.memory import GIB, Plan
from rlhf_kit.metrics import Phases, peak_memory


class PlayedGPU:
    """What `Phases` asks of torch.cuda: peaks that begin anew."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.allocated = self.peak = 0
        for name in ("is_available", "is_initialized"):
            monkeypatch.setattr(torch.cuda, name, lambda: True)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: self.peak)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 2 * self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)
        monkeypatch.setattr("rlhf_kit.metrics._peaks", {"allocated": 0, "reserved": 0})

    def reset(self) -> None:
        self.peak = self.allocated

    def take(self, gib: float) -> None:
        self.allocated += int(gib * GIB)
        self.peak = max(self.peak, self.allocated)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> PlayedGPU:
    return PlayedGPU(monkeypatch)


@pytest.fixture
def config(tmp_path: Any) -> RunConfig:
    opt().save_pretrained(tmp_path)
    return preset(
        "consumer",
        actor_model=str(tmp_path),
        data__max_prompt_length=24,
        generation__max_new_tokens=40,
        data__max_length=64,
    )


def test_each_phase_has_its_own_peak(gpu: PlayedGPU):
    phases = Phases()
    gpu.take(5)
    gpu.take(-4)  # before the first phase, and gone
    with phases("generate"):
        gpu.take(2)
        gpu.take(-2)
    with phases("train"):
        gpu.take(1)
    with phases("generate"):
        pass
    lap = phases.lap()
    assert lap["phase/generate/peak_gib"] == 3.0
    assert lap["phase/train/peak_gib"] == 2.0
    assert phases.to_dict()["train"]["peak_bytes"] == 2 * GIB
    assert peak_memory() == {"allocated": 5 * GIB, "reserved": 10 * GIB}
    again = Phases()
    again.load_state(phases.state())
    assert again.to_dict() == phases.to_dict()


def test_predicted_and_measured_stand_side_by_side(
    gpu: PlayedGPU,
    config: RunConfig,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("rlhf_kit.distributed.local_device", lambda: torch.device("cpu"))
    phases = Phases()
    with phases("train"):
        gpu.take(0.75)
    found = memory_check.compare(config, "sft", phases)
    expected = Plan.of(config, first=True).peaks("sft")["train"] / GIB
    assert found == {"memory/train/predicted_gib": expected, "memory/train/measured_gib": 0.75}
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["memory,", "peak", "GiB", "predicted", "measured"]
    assert printed[1].split() == ["train", f"{expected:.2f}", "0.75"]


def test_a_model_that_cannot_be_planned_stops_no_run(
    gpu: PlayedGPU,
    config: RunConfig,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("rlhf_kit.distributed.local_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(Plan, "peaks", lambda self, stage: {}["a layer of its own"])
    phases = Phases()
    with phases("train"):
        pass
    assert memory_check.compare(config, "sft", phases) == {}
    assert "memory: it could not be predicted" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_is_measured_and_that_is_said(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
):
    assert memory_check.compare(config, "sft", Phases()) == {}
    assert capsys.readouterr().out.startswith("memory: nothing is measured on a CPU")
