"""Settings: presets, changes by name, what is refused, and DeepSpeed's dict."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rlhf_kit.config import (
    PRESETS,
    DataConfig,
    EngineConfig,
    RunConfig,
    exact_div,
    from_dict,
    override,
    preset,
)
from rlhf_kit.deepspeed_config import deepspeed_config


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_a_trip_through_json(name: str):
    config = preset(name)
    assert config.preset == name
    assert from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_can_start_as_it_is(name: str):
    ppo, actor = preset(name).ppo, preset(name).actor_engine
    exact_div(ppo.minibatch_size, ppo.micro_batch_size, "minibatch / micro-batch")
    assert ppo.mixture.kind != "grad_norm_ratio" or actor.zero_stage < 3


def test_changes_reach_nested_fields_and_none_changes_nothing():
    config = preset("toy", ppo__kl__coef=0.5, seed=None, ppo__epochs=2)
    assert (config.ppo.kl.coef, config.seed, config.ppo.epochs) == (0.5, 1, 2)
    assert override(config) == config


def test_an_int_may_stand_for_a_float_and_nothing_else_is_guessed():
    assert preset("toy", ppo__kl__coef=1).ppo.kl.coef == 1.0
    for value in ("1", True):
        with pytest.raises(ValueError, match=r"ppo\.kl\.coef must be of type float"):
            preset("toy", ppo__kl__coef=value)
    with pytest.raises(ValueError, match=r"ppo\.epochs must be of type int"):
        preset("toy", ppo__epochs=1.5)


def test_all_changes_apply_before_they_are_checked():
    config = preset("toy", ppo__batch_size=6, ppo__minibatch_size=3, ppo__micro_batch_size=3)
    assert config.ppo.batch_size == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ppo__kl__coeff": 1.0}, r"unknown setting ppo\.kl\.coeff"),
        ({"ppo__epochs__deep": 1}, r"unknown setting ppo\.epochs\.deep"),
        ({"nothing": 1}, "unknown setting nothing"),
        ({"ppo__old_logprobs": "cached"}, "must be one of recompute, rollout, corrected"),
        ({"ppo__minibatch_size": 5}, "64 is not a multiple of 5; change one of them"),
        ({"ppo__minibatch_size": 0}, "ppo batch sizes must be positive"),
        ({"sft__batch_size": 0}, "sft epochs and batch sizes must be positive"),
        ({"reward__micro_batch_size": 0}, "reward epochs and batch sizes must be positive"),
        ({"ppo__critic_warmup_iterations": 60}, "the actor would never learn; lower it"),
        ({"ppo__kl__coef": -1.0}, "kl coef must be 0 or more"),
        ({"ppo__dual_clip": 0.5}, "above 1"),
        ({"ppo__score_clip": 0.0}, "score_clip must be positive"),
        ({"ppo__ema__decay": 1.0}, r"ema decay must lie in \[0, 1\)"),
        ({"data__rows": [1, 2]}, "rows needs three counts"),
        ({"data__split": [1, 1]}, "split needs three shares"),
        ({"data__sources": []}, "name at least one data source"),
        ({"generation__max_new_tokens": 100}, "must not exceed data.max_length"),
        ({"generation__temperature": 0}, "temperature must be positive in a run"),
        ({"actor_engine__zero_stage": 4}, "zero_stage must be 0, 1, 2 or 3"),
        ({"actor_engine__offload_optimizer": True}, "offload_optimizer needs zero_stage 1"),
        ({"actor_engine__lora__rank": -1}, r"lora rank must be 0 \(off\) or more"),
        ({"actor_engine__dtype": "fp16"}, "must be one of fp32, bf16"),
        ({"actor_model": ""}, "actor_model must name a model"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_sentence(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as caught:
        preset("toy", **changes)
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match="choose one of toy, consumer, cluster"):
        preset("laptop")


def test_a_configuration_without_its_models_is_refused():
    with pytest.raises(ValueError, match="lacks actor_model, reward_model"):
        from_dict({"preset": "toy"})


def test_a_source_of_ones_own_is_a_mapping():
    config = preset("toy", data__sources=[{"name": "my.jsonl", "weight": 2}])
    assert config.data.sources[0].weight == 2.0
    with pytest.raises(ValueError, match=r"unknown setting data\.sources\[0\]\.breadth"):
        preset("toy", data__sources=[{"name": "my.jsonl", "breadth": 2}])


def test_the_announcements_names_are_the_models():
    config = RunConfig(preset="toy", actor_model="a", reward_model="b", data=DataConfig())
    assert (config.actor_model_name_or_path, config.critic_model_name_or_path) == ("a", "b")


def test_deepspeed_gets_the_stage_the_precision_and_the_offload():
    config = EngineConfig(
        zero_stage=3, dtype="bf16", offload_optimizer=True, offload_parameters=True
    )
    found = deepspeed_config(config, max_grad_norm=0.5)
    zero = found["zero_optimization"]
    assert zero["stage"] == 3 and found["bf16"]["enabled"] and found["gradient_clipping"] == 0.5
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "cpu"
    plain = deepspeed_config(EngineConfig(), max_grad_norm=1.0)
    assert plain["zero_optimization"]["stage"] == 0 and not plain["bf16"]["enabled"]
    assert set(plain["zero_optimization"]) == {"stage", "reduce_bucket_size"}
    assert found["managed_gradient_accumulation"] is False
    bf16 = deepspeed_config(EngineConfig(dtype="bf16"), max_grad_norm=1.0)
    assert bf16["zero_optimization"]["stage"] == 1
