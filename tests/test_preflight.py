"""The pre-flight check: one rank for real, several by what they would report.

Two real ranks run it in test_same_run.py.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_kit import distributed, preflight
from rlhf_kit.config import RunConfig, preset
from rlhf_kit.preflight import Rank
from rlhf_kit.run_directory import RunDirectory

VERSIONS = {name: "1.0" for name in preflight.SAME}
GPU = "cuda NVIDIA GPU-{}"


def rank(number: int, host: str = "alpha", **fields: Any) -> Rank:
    given = {
        "versions": VERSIONS,
        "device": GPU.format(f"{host}-{number}"),
        "problem": "",
        "models": {"actor_model": "abc", "reward_model": "abc"},
        "free_memory": 64 * 10**9,
    }
    return Rank(rank=number, host=host, **{**given, **fields})


@pytest.fixture
def run(tmp_path: Path, model_dir: Callable[..., str]) -> RunDirectory:
    config = preset("toy", actor_model=model_dir(), reward_model=model_dir())
    return RunDirectory(tmp_path / "run", config, time.monotonic())


def others_say(monkeypatch: pytest.MonkeyPatch, *others: Rank) -> None:
    """Further ranks beside this one; they agree with it in all but their reports."""

    def gather(value: Any) -> list[Any]:
        same = isinstance(value, Rank)
        return [value, *(others if same else [value] * len(others))]

    monkeypatch.setattr(distributed, "gather_objects", gather)


def test_one_healthy_rank_passes_quickly_and_leaves_nothing(run: RunDirectory, capsys: Any):
    preflight.check(run)  # the first one starts DeepSpeed
    start = time.process_time()
    preflight.check(run)
    assert time.process_time() - start < 2
    assert list(run.path.iterdir()) == []
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("pre-flight: 1 rank on 1 host (cpu) agree; settings ")


def test_what_is_wrong_with_one_rank_is_said_with_its_host(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
):
    mine = preflight._look_around(preflight._models(run), 1)
    for fields, message in (
        ({"problem": "it is broken"}, "rank 1 on beta: it is broken"),
        (
            {"versions": {**mine.versions, "transformers": "4.0"}},
            f"rank 1 on beta has transformers 4.0, but rank 0 on {mine.host} has ",
        ),
        ({"models": {**mine.models, "actor_model": "x"}}, "rank 1 on beta finds another actor_mo"),
        ({"device": GPU.format(0)}, "rank 1 on beta uses cuda NVIDIA GPU-0, but rank 0 on "),
        ({"free_memory": 10}, "rank 1 on beta: loading the models takes 0 GB"),
    ):
        other = dataclasses.replace(mine, rank=1, host="beta", **fields)
        others_say(monkeypatch, other)
        with pytest.raises(ValueError) as caught:
            preflight.check(run)
        assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("model", "ranks", "message"),
    [
        ({}, 3, "rank 0 on .*: generation_tp is 3, which does not divide the number of ranks"),
        ({}, 4, "rank 0 on .*: generation_tp is 4, which does not divide the 2 attention heads of"),
        ({"kind": "olmo2"}, 2, "layers.0.self_attn.q_norm.weight, which can't be split over 2"),
    ],
)
def test_an_actor_that_can_not_be_split_over_the_ranks_is_refused(
    model: dict[str, Any],
    ranks: int,
    message: str,
    run: RunDirectory,
    model_dir: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    names = {"actor_model": model_dir(**model), "actor_engine__generation_tp": ranks}
    config = preset("toy", reward_model=model_dir(), **names)
    with pytest.raises(ValueError, match=message):
        preflight.check(RunDirectory(run.path, config, 0.0))


def test_two_ranks_on_one_gpu_are_found():
    ranks = [rank(0), rank(1), rank(2, "beta"), rank(3, "beta", device=GPU.format("beta-2"))]
    preflight._require_own_devices(ranks[:3])
    with pytest.raises(ValueError, match="rank 3 on beta would use the same GPU as rank 2 on beta"):
        preflight._require_own_devices(ranks)


def test_memory_is_counted_for_all_ranks_of_a_host():
    ranks = [rank(0), rank(1), rank(2, "beta")]
    preflight._require_memory(ranks, 16 * 10**9)  # 2 ranks x 2 bytes x 16e9 = 64 GB
    message = "rank 0 on alpha: loading the models takes 68 GB of memory for the 2 ranks"
    with pytest.raises(ValueError, match=message):
        preflight._require_memory(ranks, 17 * 10**9)
    unknown = [rank(0, free_memory=0)]
    preflight._require_memory(unknown, 10**15)


def test_a_rank_without_a_gpu_of_its_own_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="it is number 3 on its host, which shows 2 GPUs to it"):
        preflight._device()


def test_a_model_is_known_by_its_config_and_the_sizes_of_its_weights(
    tmp_path: Path, model_dir: Callable[..., str]
):
    def copy(name: str) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        for file in ("config.json", "model.safetensors"):
            (directory / file).write_bytes((Path(model_dir()) / file).read_bytes())
        return directory

    same, other, cut = copy("same"), copy("other"), copy("cut")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 7}))
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[:-1])
    name = preflight._model("actor_model", model_dir())
    assert preflight._model("actor_model", str(same)) == name
    assert len({name, *(preflight._model("actor_model", str(path)) for path in (other, cut))}) == 3
    assert preflight._model("actor_model", "org/model") == "org/model"
    with pytest.raises(ValueError, match="model directory .*gone does not exist"):
        preflight._model("actor_model", str(tmp_path / "gone"))

    (same / "model.safetensors").unlink()
    (same / "model.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="actor_model: .*model.safetensors can't be read"):
        preflight._model("actor_model", str(same))


def test_parameters_are_counted_from_the_heads_of_the_files(model_dir: Callable[..., str]):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir())
    expected = sum(p.numel() for p in model.parameters())
    assert preflight._parameters(Path(model_dir())) == expected
    assert preflight._parameters(Path("org/model")) == 0


def test_a_run_directory_that_can_not_be_written_or_is_not_shared_is_refused(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
):
    ranks = [rank(0)]
    run.path.write_text("a file")
    with pytest.raises(ValueError, match="rank 0 on alpha: .*run can't be written .File exists.; "):
        preflight._require_shared(ranks, run.path)
    run.path.unlink()
    monkeypatch.setattr(preflight, "SHARED_SECONDS", 0.0)
    monkeypatch.setattr(Path, "touch", lambda self: None)
    with pytest.raises(ValueError, match="it does not see what rank 0 on alpha writes to .*run; "):
        preflight._require_shared(ranks, run.path)


@pytest.mark.parametrize(
    ("changes", "gigabytes"),
    [
        # 1e9 parameters each: exports 2 x 4 + 4, checkpoints (2 + best + the new one) x 12 each.
        ({}, 12 + 4 * 24),
        ({"checkpoint__keep_best": False}, 12 + 3 * 24),
        ({"checkpoint__every_steps": 0}, 12),
        ({"actor_engine__dtype": "bf16", "checkpoint__every_steps": 0}, 8),
        ({"actor_engine__lora__rank": 8}, 12 + 4 * 12),
    ],
)
def test_the_disk_must_hold_exports_and_checkpoints(
    changes: dict[str, Any], gigabytes: int, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
):
    config: RunConfig = preset("toy", checkpoint__every_minutes=0.0, **changes)
    run = RunDirectory(run.path, config, 0.0)
    sizes = {"actor_model": 10**9, "reward_model": 10**9}
    free = gigabytes * 10**9

    def usage(_: Path) -> Any:
        return type("Usage", (), {"free": free})

    monkeypatch.setattr(preflight.shutil, "disk_usage", usage)
    preflight._require_disk(run, sizes)
    free -= 1
    with pytest.raises(ValueError, match=f"models and checkpoints may take {gigabytes} GB; make"):
        preflight._require_disk(run, sizes)


def test_a_wrong_sum_names_its_rank(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distributed, "all_sum", lambda values: values + 1)
    with pytest.raises(ValueError, match="rank 0 on alpha gets a wrong sum of 1 over all ranks"):
        preflight._require_sum([rank(0)])
