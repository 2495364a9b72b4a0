"""Faults while training, each tried: what is done, what is said, and that nothing else moves.

Two ranks run this file as a program.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import copied, prompt_rows, same_weights, small_tokenizer, tiny_model

from rlhf_kit import distributed, pipeline, report
from rlhf_kit.config import (
    DataConfig,
    EngineConfig,
    FaultConfig,
    LimitConfig,
    OptimizerConfig,
    RunConfig,
    SFTConfig,
)
from rlhf_kit.ema import _local
from rlhf_kit.faults import FILE_NAME, STOPPED, Faults, TrainingStopped, explain, record
from rlhf_kit.hybrid_engine.training import TrainingEngine, start_deepspeed
from rlhf_kit.metrics import MetricsLog, read_metrics
from rlhf_kit.ppo import PPOTrainer
from rlhf_kit.sft import SFTTrainer
from rlhf_kit.tokenization import Encoded, encode_demonstrations

OPTIMIZER = OptimizerConfig(learning_rate=3e-3, weight_decay=0.1, schedule="linear")
ENGINES = {
    "zero0": EngineConfig(),
    "zero1": EngineConfig(zero_stage=1),
    "zero2": EngineConfig(zero_stage=2),
    "zero3": EngineConfig(zero_stage=3),
    "bf16": EngineConfig(dtype="bf16"),
    "zero2-bf16": EngineConfig(zero_stage=2, dtype="bf16"),
    "zero2-offload": EngineConfig(zero_stage=2, offload_optimizer=True),
    "zero3-offload": EngineConfig(zero_stage=3, offload_optimizer=True),
}

SOME = ["zero0", "zero2", "zero3", "bf16", "zero2-offload", "zero3-offload"]
"""Where gradients lie in different places."""


def mlp(model: Any) -> Any:
    """A layer in the middle of a model, to fail in."""
    return model.model.layers[1].mlp


def short(*_: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


def make_sft(tokenizer: Any, config: EngineConfig, faults: Faults | None = None) -> SFTTrainer:
    model = tiny_model("llama", tokenizer, eos_scale=1.0)
    module = model.bfloat16() if config.dtype == "bf16" else model
    engine = TrainingEngine(module, config, OPTIMIZER, total_steps=6)
    sft = SFTConfig(micro_batch_size=4)
    return SFTTrainer(engine, sft, pad_token_id=tokenizer.pad_token_id, faults=faults)


def everything(engine: TrainingEngine) -> list[torch.Tensor]:
    """Weights (under ZeRO-3, shards), fp32 masters and AdamW's state, copied."""
    state = engine._adamw.state
    kept = [value for values in state.values() for value in values.values()]
    weights = [_local(p) for p in engine.module.parameters()]
    return [tensor.detach().clone() for tensor in (*kept, *state, *weights)]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@contextlib.contextmanager
def failing(module: torch.nn.Module, how: str, *, after: int) -> Iterator[None]:
    """The `after`-th forward of `module` from now on fails in this way; the others do not."""
    calls = iter(range(1, 1000))

    def hook(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor | None:
        if next(calls) != after:
            return None
        if how == "forward":
            short()
        if how == "backward":
            output.register_hook(short)
            return None
        return output * math.nan

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def rows(tokenizer: Any) -> list[Encoded]:
    return list(encode_demonstrations(tokenizer, prompt_rows(24), DataConfig()).rows)


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / FILE_NAME).read_text().splitlines()]


# NaN and infinity -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOME)
def test_a_minibatch_that_is_not_finite_leaves_no_trace(
    name: str, tokenizer: Any, rows: list[Encoded], tmp_path: Path
):
    faults = Faults(directory=tmp_path / "sft")
    trainer = make_sft(tokenizer, ENGINES[name], faults)
    other = make_sft(tokenizer, ENGINES[name])
    for one in (trainer, other):
        one.step(rows[:8])
    before = everything(trainer.engine)
    with failing(mlp(trainer.engine.module), "nan", after=2):
        metrics = trainer.step(rows[8:16])
    assert math.isnan(metrics["loss/train"]) and metrics["faults/skipped"] == 1
    assert equal(before, everything(trainer.engine))
    # It goes on as if that minibatch had never been there, the schedule included.
    assert trainer.step(rows[16:24]) == other.step(rows[16:24])
    assert equal(everything(trainer.engine), everything(other.engine))
    (line,) = lines(tmp_path / "sft")
    assert (line["stage"], line["step"]) == ("sft", 2)
    assert (line["fault"], line["action"]) == ("nonfinite", "skip")
    assert line["sentence"].startswith("NaN or infinity in loss/train: the minibatch was left out")


@pytest.mark.parametrize("name", ["zero0", "zero2", "zero3", "bf16"])
def test_a_gradient_that_overflows_though_the_loss_is_finite_is_found_before_the_step(
    name: str, tokenizer: Any, rows: list[Encoded]
):
    trainer = make_sft(tokenizer, ENGINES[name])
    trainer.step(rows[:8])
    before = everything(trainer.engine)
    layer = mlp(trainer.engine.module)
    handle = layer.register_forward_hook(
        lambda _, __, output: output.register_hook(lambda grad: grad * math.inf) and None
    )
    metrics = trainer.step(rows[8:16])
    handle.remove()
    assert math.isfinite(metrics["loss/train"]) and metrics["faults/skipped"] == 1
    assert equal(before, everything(trainer.engine))


@pytest.mark.parametrize("name", ["zero0", "zero2", "zero3", "bf16"])
def test_the_engine_itself_never_applies_a_gradient_that_is_not_finite(
    name: str, tokenizer: Any, rows: list[Encoded]
):
    trainer = make_sft(tokenizer, ENGINES[name])
    trainer.step(rows[:8])
    before, engine = everything(trainer.engine), trainer.engine
    with failing(mlp(engine.module), "nan", after=1):
        trainer._backward(trainer._texts(rows[8:16], 4), 40.0)
    info = engine.step()
    assert not info.applied and not math.isfinite(info.grad_norm) and engine.steps_done == 1
    assert equal(before, everything(engine))
    assert trainer.step(rows[16:24])["optim/grad_norm"] > 0


@pytest.fixture
def ppo(
    build: Callable[[RunConfig], Any], tiny_args: Callable[..., RunConfig], tmp_path: Path
) -> Callable[..., PPOTrainer]:
    def make(**changes: Any) -> PPOTrainer:
        args = tiny_args(**changes)
        faults = Faults(args.faults, tmp_path / "ppo")
        return PPOTrainer(engine=build(args), args=args, faults=faults)

    return make


@pytest.mark.parametrize("field", ["advantages", "returns", "old_logprobs"])
def test_ppo_leaves_a_minibatch_out_for_actor_critic_and_average_alike(
    field: str, ppo: Callable[..., PPOTrainer], prompts: Any, tmp_path: Path
):
    trainer = ppo()
    trainer.step(trainer.generate_experience(prompts()))
    experience = trainer.generate_experience(prompts(first_seed=300))
    values = getattr(experience, field).clone()
    values[5] = math.nan  # in the second of two minibatches of four
    broken = dataclasses.replace(experience, **{field: values})
    snapshots: list[Any] = []
    minibatch, ema = trainer._minibatch, trainer.engine.ema
    assert ema is not None

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = minibatch(*args, **kwargs)
        engines = trainer.engine.actor, trainer.engine.critic
        averages = [average.clone() for average in ema._averages]
        snapshots.append([*everything(engines[0]), *everything(engines[1]), *averages])
        return result

    trainer._minibatch = watched  # type: ignore[method-assign]
    metrics = trainer.step(broken)
    assert equal(*snapshots) and ema.updates == 3
    assert metrics["faults/skipped"] == 1 and metrics["ppo/epochs_done"] == 0.5
    assert all(map(math.isfinite, metrics.values()))
    assert trainer.iteration == 2 and lines(tmp_path / "ppo")[0]["step"] == 2


def test_a_gradient_of_the_actor_that_overflows_holds_the_critic_back_as_well(
    ppo: Callable[..., PPOTrainer], prompts: Any
):
    trainer = ppo(ppo__minibatch_size=8)
    experience = trainer.generate_experience(prompts())
    before = everything(trainer.engine.critic)
    handle = mlp(trainer.engine.actor.module).register_forward_hook(
        lambda _, __, output: output.register_hook(lambda grad: grad * math.inf) and None
    )
    metrics = trainer.step(experience)
    handle.remove()
    assert metrics["faults/skipped"] == 1 and equal(before, everything(trainer.engine.critic))


def test_a_score_that_is_not_a_number_costs_its_iteration_and_not_the_kl_coefficient(
    ppo: Callable[..., PPOTrainer], prompts: Any
):
    trainer = ppo(ppo__kl__kind="adaptive", ppo__score_clip=1e9)
    before = copied(trainer.engine.actor.module)
    scored = trainer.engine.scores
    trainer.engine.scores = lambda *parts, **how: scored(*parts, **how) * math.nan
    actor_loss, critic_loss = trainer.train_rlhf(trainer.generate_experience(prompts()))
    assert actor_loss == 0.0 and math.isnan(critic_loss)
    assert trainer.metrics["faults/skipped"] == 2 and math.isfinite(trainer.kl_coef)
    assert same_weights(before, copied(trainer.engine.actor.module))
    trainer.engine.scores = scored
    assert trainer.step(trainer.generate_experience(prompts()))["ppo/epochs_done"] == 1.0


def test_after_too_many_in_a_row_it_goes_back_once_and_then_stops(tmp_path: Path):
    faults = Faults(FaultConfig(nonfinite_in_a_row=1), tmp_path / "sft")
    went_back: list[int] = []

    def roll_back() -> int:
        went_back.append(1)
        engine.steps_done = 40  # as loading a state does
        return 40

    faults.roll_back = roll_back

    class Engine:
        steps_done, dropped = 57, 0

        def gradients_finite(self) -> bool:
            return True

        def drop_gradients(self) -> None:
            self.dropped += 1

    engine = Engine()
    faults.place = [(engine, "steps_done")]
    for _ in range(3):
        assert faults.step_if_finite({"loss/train": math.nan}, engine) is None
    with pytest.raises(TrainingStopped, match="gone back to a checkpoint before; training stops"):
        faults.step_if_finite({"loss/train": math.nan}, engine)
    assert went_back == [1] and engine.dropped == 4 and engine.steps_done == 57
    actions = [line["action"] for line in lines(tmp_path / "sft")]
    assert actions == ["skip", "roll_back", "skip", "stop"]
    assert "the models are those of step 40 again" in lines(tmp_path / "sft")[1]["sentence"]


def test_one_good_minibatch_starts_the_count_anew():
    faults = Faults(FaultConfig(nonfinite_in_a_row=1))
    for value in (math.nan, 1.0, math.inf, 1.0, math.nan):
        assert faults.finite({"loss/train": value}, []) is math.isfinite(value)


def test_without_a_checkpoint_logits_that_are_not_finite_stop_the_run(
    ppo: Callable[..., PPOTrainer], prompts: Any
):
    trainer = ppo()
    with torch.no_grad():
        for parameter in trainer.engine.actor.module.parameters():
            parameter.fill_(math.nan)
    with pytest.raises(TrainingStopped) as stopped:
        trainer.generate_experience(prompts())
    assert "the actor's logits are not finite, and there is no checkpoint" in str(stopped.value)
    assert "lower ppo.actor_optimizer.learning_rate" in str(stopped.value)


@pytest.mark.parametrize("stage", [0, 3])
def test_after_a_roll_back_the_same_prompts_are_sampled_by_the_models_of_then(
    stage: int, ppo: Callable[..., PPOTrainer], prompts: Any
):
    trainer = ppo(actor_engine__zero_stage=stage)
    expected = trainer.generate_experience(prompts())
    actor = trainer.engine.actor
    good = [_local(p).clone() for p in actor.module.parameters()]

    def roll_back() -> int:
        for parameter, value in zip(actor.module.parameters(), good, strict=True):
            _local(parameter).data.copy_(value)
        trainer.iteration = 7  # as loading a state does
        return 7

    trainer.faults.roll_back = roll_back
    for parameter in actor.module.parameters():
        _local(parameter).data.mul_(math.nan)
    found = trainer.generate_experience(prompts())
    assert torch.equal(found.sequences, expected.sequences) and trainer.iteration == 0


# metrics out of their limits ------------------------------------------------------------------


HEALTHY = {
    "objective/kl": [0.0, -0.03, 2.2, 2.94],
    "policy/ratio_mean": [0.999, 1.0, 1.001, 1.0],
    "objective/entropy": [0.48, 0.43, 0.31, 0.246],
    "response/length": [19.9, 10.2, 9.2, 15.5],
    "response/truncated_rate": [0.031, 0.0, 0.016, 0.0],
    "response/empty_rate": [0.0] * 4,
    "objective/score_std": [1.05, 0.9, 0.5, 0.34],
    "response/distinct_rate": [1.0, 0.98, 0.94, 1.0],
}
"""What a run of the toy preset logs, its extremes included."""


def test_a_healthy_run_breaks_no_limit(capsys: pytest.CaptureFixture[str]):
    faults = Faults()
    for _ in range(5):
        for i in range(4):
            faults.check({key: values[i] for key, values in HEALTHY.items()})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("key", "value", "action"),
    [
        ("objective/kl", 140.0, "stop"),
        ("policy/ratio_mean", 2.5, "stop"),
        ("policy/ratio_mean", 0.3, "stop"),
        ("objective/entropy", 0.001, "warn"),
        ("response/length", 1.2, "warn"),
        ("response/truncated_rate", 1.0, "warn"),
        ("response/empty_rate", 0.8, "stop"),
        ("objective/score_std", 0.0, "warn"),
        ("response/distinct_rate", 0.05, "warn"),
    ],
)
def test_a_metric_has_to_be_outside_for_the_whole_window_and_is_named_once(
    key: str, value: float, action: str, tmp_path: Path
):
    faults = Faults(FaultConfig(window=3), tmp_path / "ppo")
    healthy = HEALTHY[key][-1]
    series = [healthy, value, value, healthy, value, value]
    for number in series:
        faults.check({key: number})
    assert not (tmp_path / "ppo").exists()
    if action == "stop":  # a roll-back, without a checkpoint to go back to
        with pytest.raises(TrainingStopped, match=key):
            faults.check({key: value})
    for number in [value] * 4 if action == "warn" else []:
        faults.check({key: number})
    (line,) = lines(tmp_path / "ppo")
    assert line["action"] == action and line["sentence"].startswith(f"{key} has been ")


def test_a_limit_can_be_moved_and_turned_off(tiny_args: Callable[..., RunConfig]):
    args = tiny_args(faults__kl__high=3.0, faults__kl__policy="stop", faults__window=1)
    assert args.faults.kl == LimitConfig("stop", high=3.0)
    with pytest.raises(TrainingStopped, match="above 3 for 1 iterations, now 4; training stops"):
        Faults(args.faults).check({"objective/kl": 4.0})
    Faults(tiny_args(faults__kl__policy="off", faults__window=1).faults).check(
        {"objective/kl": 1e9}
    )
    with pytest.raises(ValueError, match="must be one of off, warn, roll_back, stop"):
        tiny_args(faults__kl__policy="pray")


def test_ppo_stays_where_it_is_in_data_and_schedules_when_a_limit_takes_it_back(
    ppo: Callable[..., PPOTrainer], prompts: Any
):
    trainer = ppo(faults__window=1, faults__kl__high=-1.0)
    saved: list[Any] = []

    def roll_back() -> int:
        saved.append(trainer.iteration)
        trainer.iteration = trainer.engine.actor.steps_done = 0
        return 0

    trainer.faults.roll_back = roll_back
    metrics = trainer.step(trainer.generate_experience(prompts()))
    assert saved == [0] and trainer.iteration == 1 and trainer.engine.actor.steps_done == 2
    assert metrics["objective/kl"] == pytest.approx(0.0, abs=1e-5)  # logged all the same
    with pytest.raises(TrainingStopped):
        trainer.step(trainer.generate_experience(prompts()))


# memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOME)
def test_where_memory_runs_out_the_minibatch_is_repeated_in_smaller_parts(
    name: str, tokenizer: Any, rows: list[Encoded], tmp_path: Path
):
    trainer = make_sft(tokenizer, ENGINES[name], Faults(directory=tmp_path / "sft"))
    calm = make_sft(tokenizer, ENGINES[name])
    for one in (trainer, calm):
        one.step(rows[:8])
    layer = mlp(trainer.engine.module)
    for how, size, start in (("forward", 2, 8), ("backward", 1, 16)):
        part = rows[start : start + 8]
        with failing(layer, how, after=2):
            found = trainer.step(part)
        calm.steps.micro_batch_size = size
        # To the last bit the step of a run that had these parts from here on.
        assert found == calm.step(part) and trainer.steps.micro_batch_size == size
        assert equal(everything(trainer.engine), everything(calm.engine))
    line, _ = lines(tmp_path / "sft")
    assert (line["fault"], line["action"]) == ("out_of_memory", "halve")
    assert "set sft.micro_batch_size to 2" in line["sentence"]


def test_a_single_row_that_does_not_fit_stops_with_what_to_lower(
    tokenizer: Any, rows: list[Encoded], tmp_path: Path
):
    trainer = make_sft(tokenizer, ENGINES["zero0"], Faults(directory=tmp_path / "sft"))
    trainer.engine.module.register_forward_hook(short)
    with pytest.raises(TrainingStopped, match=r"with 1 row at once; .* lower data\.max_length"):
        trainer.step(rows[:8])
    actions = [line["action"] for line in lines(tmp_path / "sft")]
    assert actions == ["halve", "halve", "stop"]


def test_halving_can_be_forbidden(tokenizer: Any, rows: list[Encoded]):
    trainer = make_sft(tokenizer, ENGINES["zero0"], Faults(FaultConfig(out_of_memory="stop")))
    trainer.engine.module.register_forward_hook(short)
    with pytest.raises(TrainingStopped, match=r"with 4 rows at once; .* lower sft\.micro_batch"):
        trainer.step(rows[:8])


@pytest.mark.parametrize("stage", [0, 3])
def test_generating_with_fewer_slots_gives_the_same_responses(
    stage: int, ppo: Callable[..., PPOTrainer], prompts: Any, tmp_path: Path
):
    trainer = ppo(actor_engine__zero_stage=stage, generation__slots=8)
    expected = trainer.generate_experience(prompts()).sequences
    with failing(mlp(trainer.engine.actor.module), "forward", after=3):
        found = trainer.generate_experience(prompts()).sequences
    assert torch.equal(found, expected) and trainer.generation.slots == 4
    assert "memory ran out in generating" in lines(tmp_path / "ppo")[0]["sentence"]


def test_under_zero_3_an_error_while_generating_leaves_the_model_fit_to_train(
    ppo: Callable[..., PPOTrainer], prompts: Any
):
    trainer = ppo(actor_engine__zero_stage=3)
    experience, actor = trainer.generate_experience(prompts()), trainer.engine.actor
    with failing(mlp(actor.module), "forward", after=3), pytest.raises(torch.OutOfMemoryError):
        actor.generate(prompts(), trainer.generation)
    assert trainer.step(experience)["optim/actor_grad_norm"] > 0


@pytest.mark.parametrize("model", ["reward", "ref", "critic"])
def test_scoring_in_smaller_parts_gives_the_same_experience(
    model: str, ppo: Callable[..., PPOTrainer], prompts: Any, tmp_path: Path
):
    trainer = ppo(ppo__micro_batch_size=4)
    expected = trainer.generate_experience(prompts())
    models = {
        "reward": trainer.engine.reward,
        "ref": trainer.engine._ref,
        "critic": trainer.engine.critic.module,
    }
    with failing(models[model], "forward", after=1):
        found = trainer.generate_experience(prompts())
    for name, value in vars(expected).items():
        counts = expected.response_mask if value.shape == expected.response_mask.shape else 1
        other = getattr(found, name)
        torch.testing.assert_close(other * counts, value * counts, atol=1e-5, rtol=1e-4)
    (line,) = lines(tmp_path / "ppo")
    assert "memory ran out in scoring" in line["sentence"] and trainer.micro_batch_size == 2


@pytest.mark.parametrize("how", ["forward", "backward"])
@pytest.mark.parametrize("model", ["actor", "critic"])
def test_a_ppo_minibatch_repeated_in_smaller_parts_is_the_same_update(
    model: str, how: str, ppo: Callable[..., PPOTrainer], prompts: Any
):
    ends = []
    for disturbed in (False, True):
        trainer = ppo(ppo__micro_batch_size=4)
        experience = trainer.generate_experience(prompts())
        layer = mlp(trainer.engine.actor.module)
        if model == "critic":
            layer = mlp(trainer.engine.critic.module.scorer)
        calm = contextlib.nullcontext()
        with failing(layer, how, after=2) if disturbed else calm:
            metrics = trainer.step(experience)
        ends.append((metrics, copied(trainer.engine.actor.module), trainer.micro_batch_size))
    (calm_metrics, calm_weights, _), (metrics, weights, size) = ends
    assert size == 2 and metrics["value/loss"] == pytest.approx(calm_metrics["value/loss"], 1e-4)
    for key, value in calm_weights.items():
        torch.testing.assert_close(weights[key], value, atol=3e-5, rtol=0)


# the log --------------------------------------------------------------------------------------


def test_a_tracker_that_fails_is_dropped_and_the_log_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    log = MetricsLog(tmp_path / "ppo")
    log(1, {"objective/kl": 0.5})

    def broken(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    log._writer.add_scalar = broken
    for step in (2, 3):
        log(step, {"objective/kl": 0.5})
    log.close()
    assert [row["step"] for row in read_metrics(tmp_path / "ppo")] == [1, 2, 3]
    (line,) = lines(tmp_path / "ppo")
    assert (line["fault"], line["action"], line["step"]) == ("tracker", "drop", 2)
    assert capsys.readouterr().out.count("TensorBoard failed (ConnectionError: no route") == 1


def test_on_a_full_disk_metrics_wait_and_no_byte_is_lost(tmp_path: Path):
    log = MetricsLog(tmp_path / "ppo", tensorboard=False)
    log(1, {"objective/kl": 0.5})
    file = log._file

    class Full:
        room = 10

        def write(self, data: bytes) -> int:
            if not self.room:
                raise OSError(28, "No space left on device")
            written = file.write(data[: self.room])
            self.room -= written
            return written

        def close(self) -> None:
            file.close()

    log._file = full = Full()
    for step in (2, 3):
        log(step, {"objective/kl": 0.25})
    assert [row["step"] for row in read_metrics(tmp_path / "ppo")] == [1]  # and a torn line
    full.room = 10_000
    log(4, {"objective/kl": 0.125})
    log.close()
    assert [row["step"] for row in read_metrics(tmp_path / "ppo")] == [1, 2, 3, 4]
    (line,) = lines(tmp_path / "ppo")
    assert line["fault"] == "metrics" and "(No space left on device)" in line["sentence"]


def test_faults_are_forgotten_where_training_starts_anew_and_nowhere_else(tmp_path: Path):
    record(tmp_path, 7, "kl", "warn", "it was high")
    log = MetricsLog(tmp_path, tensorboard=False)
    log.rewind(5)
    assert len(lines(tmp_path)) == 1
    log.rewind(0)
    assert not (tmp_path / FILE_NAME).exists()


def test_a_log_that_cannot_be_opened_is_one_sentence(tmp_path: Path):
    (tmp_path / "ppo").write_text("a file, where a directory should be")
    with pytest.raises(ValueError, match="can't be written .* choose another run_dir"):
        MetricsLog(tmp_path / "ppo", tensorboard=False)(1, {"objective/kl": 0.5})


# the record -----------------------------------------------------------------------------------


def test_faults_of_all_stages_come_together_in_the_record_and_the_report(tmp_path: Path):
    record(tmp_path / "ppo", 7, "nonfinite", "skip", "a row was odd")
    record(tmp_path / "ppo", 9, "nonfinite", "skip", "a row was odd again")
    record(tmp_path / "sft", 3, "tracker", "drop", "the tracker failed")
    with (tmp_path / "ppo" / FILE_NAME).open("a") as file:
        file.write('{"time": 1, "st')  # torn, as a killed run leaves it
    found = pipeline.read_faults(tmp_path)
    assert [(line["stage"], line["step"]) for line in found] == [("sft", 3), ("ppo", 7), ("ppo", 9)]
    assert report._faults(found) == [
        "Stage sft, step 3: the tracker failed.",
        "Stage ppo, step 7: a row was odd (2 times in all).",
    ]


def test_only_the_main_rank_writes_unless_another_one_stops_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    record(tmp_path, 1, "kl", "warn", "not mine to say")
    assert not (tmp_path / FILE_NAME).exists()
    record(tmp_path, 1, "out_of_memory", "stop", "only I know", alone=True)
    assert lines(tmp_path)[0]["sentence"] == "only I know"


def test_errors_are_explained_where_they_mean_a_fault(monkeypatch: pytest.MonkeyPatch):
    assert explain(TrainingStopped("so it ends")) == "so it ends"
    lost = RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.1]:41")
    assert explain(lost) is None  # one rank has nobody to lose
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert (explain(lost) or "").startswith("rank 0 lost another rank")
    assert explain(RuntimeError("size mismatch")) is None and explain(ValueError("x")) is None


# two ranks ------------------------------------------------------------------------------------


def two_ranks(directory: Path) -> None:
    """What both ranks do: run out of memory on one, skip on one, then wait to be killed."""
    start_deepspeed()
    tokenizer = small_tokenizer()
    rows = encode_demonstrations(tokenizer, prompt_rows(24), DataConfig()).rows
    for name in ("zero0", "zero1", "zero2", "zero2-bf16"):
        trainer, calm = (make_sft(tokenizer, ENGINES[name]) for _ in range(2))
        layer = mlp(trainer.engine.module)
        second = contextlib.nullcontext()
        trainer.steps.micro_batch_size = calm.steps.micro_batch_size = 2
        with failing(layer, "forward", after=2) if distributed.rank() == 1 else second:
            found = trainer.step(rows[:8])
        calm.steps.micro_batch_size = 1
        assert found == calm.step(rows[:8]) and trainer.steps.micro_batch_size == 1, name
        before = everything(trainer.engine)
        with failing(layer, "nan", after=2) if distributed.rank() == 1 else second:
            assert trainer.step(rows[8:16])["faults/skipped"] == 1, name
        assert equal(before, everything(trainer.engine)), name
        assert trainer.step(rows[16:24]) == calm.step(rows[16:24]), name
        assert equal(everything(trainer.engine), everything(calm.engine)), name
    trainer = make_sft(tokenizer, ENGINES["zero3"])
    before = everything(trainer.engine)
    layer = mlp(trainer.engine.module)
    # after=2: the first pass of a model only looks at what it does to its logits
    with failing(layer, "nan", after=2) if distributed.rank() == 1 else contextlib.nullcontext():
        assert trainer.step(rows[:8])["faults/skipped"] == 1
    assert equal(before, everything(trainer.engine))
    (directory / f"ready-{distributed.rank()}").touch()
    while True:
        trainer.step(rows[:8])


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_two_ranks_repeat_and_skip_together_and_one_ends_when_the_other_dies(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    root = str(Path(__file__).resolve().parents[1])
    ranks = []
    for rank in ("0", "1"):
        environment = {
            **os.environ,
            **{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": root},
            "RLHF_KIT_RANK_TIMEOUT": "1",
        }
        with (tmp_path / f"{rank}.out").open("w") as out, (tmp_path / f"{rank}.err").open("w") as e:
            command = [sys.executable, __file__, str(tmp_path)]
            ranks.append(subprocess.Popen(command, env=environment, stdout=out, stderr=e))
    try:
        ready = [tmp_path / "ready-0", tmp_path / "ready-1"]
        wait_for(lambda: all(p.exists() for p in ready) or any(r.poll() for r in ranks), 120)
        errors = [(tmp_path / f"{rank}.err").read_text() for rank in (0, 1)]
        assert all(path.exists() for path in ready), errors[0][-2000:] + errors[1][-2000:]
        ranks[1].send_signal(signal.SIGKILL)
        assert ranks[0].wait(timeout=90) == STOPPED
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    said = (tmp_path / "0.err").read_text()
    assert "error: rank 0 lost another rank" in said and "Traceback" not in said
    assert "repeated, and from now on done, with 1 rows" in (tmp_path / "0.out").read_text()


if __name__ == "__main__":
    two_ranks(Path(sys.argv[1]))
