"""`rlhf-kit plan`: what it prints, which choices it finds, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers

from rlhf_kit import cli
from rlhf_kit.choices import LORA_RANK, choices, that_fit
from rlhf_kit.config import RunConfig, override, preset
from rlhf_kit.hybrid_engine.memory import GIB, Plan
from rlhf_kit.run_flags import flag


@pytest.fixture(scope="module")
def actor(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of a configuration without weights: a Llama of 150 million parameters."""
    path = tmp_path_factory.mktemp("actor")
    transformers.LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=32000,
    ).save_pretrained(path)
    return str(path)


@pytest.fixture
def config(actor: str) -> RunConfig:
    return preset("consumer", actor_model=actor, reward_model=actor)


def plan(actor: str, *words: str) -> int:
    return cli.main(["plan", "--actor-model", actor, *words])


def test_the_table_has_every_phase_and_ends_with_a_verdict(
    actor: str, capsys: pytest.CaptureFixture[str]
):
    assert plan(actor, "--gpu", "h100") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "actor: 155,730,944 parameters, 155,730,944 of them trained"
    parts = ["train critic", "train actor", "critic step", "actor step"]
    assert [(line[:8].strip(), line[8:24].strip()) for line in lines[4:17]] == [
        *(("sft", name) for name in ("load", "train", "step")),
        *(("reward", name) for name in ("load", "train", "step")),
        *(("ppo", name) for name in ("load", "generate", "score", *parts)),
    ]
    fullest = Plan.of(preset("consumer", actor_model=actor)).fullest
    assert lines[17] == f"fullest at {fullest.stage} {fullest.name}:"
    row = next(line for line in lines[4:17] if line[8:24].strip() == fullest.name)
    assert float(row[24:33]) == max(float(line[24:33]) for line in lines[4:17])
    terms = [float(line.split()[0]) for line in lines[18:25]]
    assert sum(terms) == pytest.approx(fullest.peak / GIB, abs=0.05)
    assert lines[-1].startswith("it fits: ") and "GiB of 79.1 are needed" in lines[-1]


def test_where_a_run_does_not_fit_each_flag_alone_makes_it_fit(
    actor: str, config: RunConfig, capsys: pytest.CaptureFixture[str]
):
    memory = Plan.of(config).needed / GIB * 0.9
    assert plan(actor, "--gpu-memory", f"{memory:.3f}") == 0
    out = capsys.readouterr().out
    assert "it does not fit" in out and "any one of these makes it fit:" in out
    found = that_fit(config, memory, 1)
    assert len(found) >= 2
    for choice in found:
        assert Plan.of(override(config, **choice.changes)).fits(memory)
        assert " ".join(flag(*change) for change in choice.changes.items()) in out


def test_of_a_kind_the_smallest_change_that_is_enough_is_named(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
):
    def stand_in(config: RunConfig, *, ranks: int) -> SimpleNamespace:
        return SimpleNamespace(fits=lambda memory: config.ppo.micro_batch_size <= memory)

    monkeypatch.setattr("rlhf_kit.choices.Plan", SimpleNamespace(of=stand_in))
    (choice,) = that_fit(config, 2, 1)
    assert choice.changes == {
        "sft__micro_batch_size": 2,
        "reward__micro_batch_size": 2,
        "ppo__micro_batch_size": 2,
    }
    assert that_fit(config, 0, 1) == []


def test_adapters_are_named_under_zero_3_too_and_not_where_there_are_some(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
):
    def stand_in(config: RunConfig, *, ranks: int) -> SimpleNamespace:
        return SimpleNamespace(fits=lambda memory: config.actor_engine.lora.rank == LORA_RANK)

    monkeypatch.setattr("rlhf_kit.choices.Plan", SimpleNamespace(of=stand_in))
    # One base for all roles, the other choice of the kind, does not go with ZeRO-3.
    sharded = override(config, actor_engine__zero_stage=3, critic_engine__zero_stage=3)
    (choice,) = that_fit(sharded, 1, 8)
    assert choice.changes["actor_engine__lora__rank"] == LORA_RANK
    assert that_fit(override(config, actor_engine__lora__rank=128), 1, 8) == []


def test_a_flag_is_read_back_as_it_was_meant(config: RunConfig):
    lora = next(
        choice
        for kind in choices(config, 1)
        for choice in kind
        if choice.changes.get("actor_engine__lora__rank") == LORA_RANK
    )
    words = " ".join(flag(*change) for change in lora.changes.items()).split()
    parser = cli.build_parser()
    from rlhf_kit import run_flags

    arguments = parser.parse_args(["plan", "--actor-model", config.actor_model, *words])
    changed = preset("consumer", **run_flags.changes(arguments))
    assert changed.actor_engine == override(config, **lora.changes).actor_engine
    assert changed.sft.optimizer.learning_rate == 1e-4


def test_gpus_share_what_zero_shards(actor: str, capsys: pytest.CaptureFixture[str]):
    def needed(ranks: int) -> float:
        assert plan(actor, "--gpu", "h100", "--num-gpus", str(ranks)) == 0
        return float(capsys.readouterr().out.splitlines()[-1].split()[2])

    config = preset("consumer", actor_model=actor)
    assert needed(8) == pytest.approx(Plan.of(config, ranks=8).needed / GIB, abs=0.05)
    assert Plan.of(config, ranks=8).fullest.peak < Plan.of(config).fullest.peak


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "h900"], "error: there is no GPU h900 in the table"),
        (["--gpu", "h100", "--num-gpus", "0"], "error: --num-gpus must be 1 or more, not 0"),
        (["--gpu", "h100", "--set", "sft.speed=3"], "error: unknown setting sft.speed"),
        (["--gpu", "h100", "--reward-model", "./no"], "error: model directory ./no does not exist"),
    ],
)
def test_wrong_input_is_one_sentence(
    actor: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
):
    assert plan(actor, *words) == 2
    err = capsys.readouterr().err
    assert err.startswith(said) and err.count("\n") == 1


def test_a_config_json_alone_is_enough_and_the_toy_world_too(
    actor: str, capsys: pytest.CaptureFixture[str]
):
    assert plan(str(Path(actor, "config.json")), "--gpu", "4090") == 0
    first = capsys.readouterr().out
    assert plan(actor, "--gpu", "4090") == 0
    assert capsys.readouterr().out == first
    assert cli.main(["plan", "--preset", "toy", "--gpu", "4090"]) == 0
    assert "it fits" in capsys.readouterr().out
