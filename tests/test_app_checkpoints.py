"""Which checkpoints a run offers, and what is not loaded whoever asks."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from app_runs import ask, write_run

from apps.checkpoints import Checkpoints
from apps.generation import Generation
from apps.limits import Limits
from apps.pool import ModelPool

STEP = "ppo/exports/step-00000004"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def names(checkpoints: Checkpoints) -> list[str]:
    return [checkpoint.name for checkpoint in checkpoints.list()]


def why_not(checkpoints: Checkpoints, name: str) -> str:
    """The one sentence with which an answer by this checkpoint is refused."""
    generation = Generation(ModelPool(checkpoints), Limits())
    with pytest.raises(ValueError) as error:
        list(generation.stream(checkpoints.named(name).id, ask(), session="s", max_new_tokens=2))
    text = str(error.value)
    assert "\n" not in text and "Traceback" not in text, text
    assert str(checkpoints.root) not in text
    assert generation.running() == 0 and not generation.pool.loaded()
    return text


def test_a_run_offers_base_sft_periodic_exports_final_and_ema(finished: Path):
    found = Checkpoints(finished).list()
    assert [(c.name, c.label, c.step, c.complete) for c in found] == [
        ("base", "base (base)", None, True),
        ("sft", "SFT", None, True),
        ("step-00000004", "PPO step 4", 4, True),
        ("final", "final", None, True),
        ("ema", "EMA", None, True),
    ]


def test_ids_are_random_and_stay_the_same_while_the_server_runs(finished: Path):
    one, other = Checkpoints(finished), Checkpoints(finished)
    ids = [c.id for c in one.list()]
    assert [c.id for c in one.list()] == ids and len(set(ids)) == 5
    assert not set(ids) & {c.id for c in other.list()}
    assert all(one.get(c.id) == c for c in one.list())


def test_a_chat_begins_with_final_and_a_comparison_with_ema_and_final(run: Path):
    checkpoints = Checkpoints(run)
    assert checkpoints.default().name == "final"
    assert [c.name for c in checkpoints.default_pair()] == ["ema", "final"]
    shutil.rmtree(run / "ppo")
    assert [c.name for c in checkpoints.default_pair()] == ["base", "sft"]
    assert checkpoints.default().name == "sft"


def test_what_a_training_run_writes_meanwhile_appears(run: Path):
    checkpoints = Checkpoints(run)
    new = run / "ppo/exports/step-00000010"
    shutil.copytree(run / STEP, new, ignore=shutil.ignore_patterns("export.json"))
    found = {c.name: c for c in checkpoints.list()}
    assert list(found)[2:4] == ["step-00000004", "step-00000010"]
    assert not found[new.name].complete
    assert why_not(checkpoints, new.name) == "PPO step 10 is not finished; try again later"
    shutil.copy(run / STEP / "export.json", new)
    assert checkpoints.get(found[new.name].id).name == new.name
    assert checkpoints.named(new.name).complete


@pytest.mark.parametrize(
    "value",
    ["../../etc/passwd", "/etc/passwd", "sft/final", "", "\0", "x" * 10_000, None, 0, ["final"]],
)
def test_nothing_from_a_caller_is_a_path(finished: Path, value: object):
    checkpoints = Checkpoints(finished)
    with pytest.raises(ValueError, match=r"^there is no such checkpoint; choose one from"):
        checkpoints.get(value)
    with pytest.raises(ValueError, match=r"^this run has no checkpoint of that name; choose one"):
        checkpoints.named(value)


def link_elsewhere(path: Path) -> None:
    outside = path.parents[len(path.parts) - 1 - path.parts.index("run")] / "outside"
    shutil.move(path, outside)
    path.symlink_to(outside)


def link_weights_elsewhere(path: Path) -> None:
    outside = path.parents[len(path.parts) - 1 - path.parts.index("run")] / "elsewhere.safetensors"
    shutil.move(path / "model.safetensors", outside)
    (path / "model.safetensors").symlink_to(outside)


def flip_a_bit(path: Path) -> None:
    weights = path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)


def pickle_instead(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def name_code(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (link_elsewhere, "PPO step 4 is a link that leaves the run directory: it is not loaded"),
        (link_weights_elsewhere, "is a link that leaves"),
        (flip_a_bit, "model.safetensors was changed after it was exported"),
        (pickle_instead, "pickled weights"),
        (name_code, "has auto_map, which names Python code to import"),
    ],
)
def test_what_is_not_to_be_trusted_is_not_loaded(
    run: Path, spoil: Callable[[Path], None], message: str
):
    checkpoints = Checkpoints(run)
    spoil(run / STEP)
    assert message in why_not(checkpoints, "step-00000004")


def test_a_link_within_the_run_is_followed(run: Path):
    os.rename(run / "ppo/ema", run / "ppo/kept")
    (run / "ppo/ema").symlink_to(run / "ppo/kept")
    checkpoints = Checkpoints(run)
    assert checkpoints.directory(checkpoints.named("ema").id) == (run / "ppo/kept").resolve()


def test_one_model_directory_can_be_opened_alone(run: Path):
    checkpoints = Checkpoints(run / "sft/final")
    assert [(c.name, c.label, c.complete) for c in checkpoints.list()] == [("model", "final", True)]
    assert [c.name for c in checkpoints.default_pair()] == ["model", "model"]
    assert checkpoints.reward_directory() is None


def test_a_run_outlives_its_base_model(run: Path):
    record = json.loads((run / "run.json").read_text())
    record["config"]["actor_model"] = "./gone"
    (run / "run.json").write_text(json.dumps(record))
    assert names(Checkpoints(run))[0] == "sft"


def test_other_directories_are_refused_in_one_sentence(tmp_path: Path, run: Path):
    with pytest.raises(ValueError, match="there is no directory"):
        Checkpoints(tmp_path / "gone")
    with pytest.raises(ValueError, match="holds neither a model"):
        Checkpoints(tmp_path)
    for part in ("sft", "ppo"):
        shutil.rmtree(run / part)
    record = json.loads((run / "run.json").read_text())
    record["config"]["actor_model"] = "./gone"
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="holds no finished model yet"):
        Checkpoints(run)
