"""The training mode against a plain torch loop, under every ZeRO stage, dtype and rank count.

Two ranks run this file as a program, through torchrun.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import copied, prompt_rows, small_tokenizer, tiny_model

from rlhf_kit import distributed
from rlhf_kit.checkpoint import export
from rlhf_kit.config import DataConfig, EMAConfig, EngineConfig, OptimizerConfig, SFTConfig
from rlhf_kit.ema import EMA
from rlhf_kit.hybrid_engine.partitions import gathered
from rlhf_kit.hybrid_engine.training import TrainingEngine
from rlhf_kit.sft import SFTTrainer
from rlhf_kit.tokenization import Encoded, encode_demonstrations

# Adam divides by the gradient's size: with a small eps it would turn the rounding of tiny gradients
# into steps of their own. With this one, weights can be compared closely.
OPTIMIZER = OptimizerConfig(
    learning_rate=3e-3,
    eps=1e-3,
    schedule="linear",
    warmup_ratio=0.2,
    weight_decay=0.1,
    max_grad_norm=0.5,
)
STEPS, ROWS = 3, 8
STAGES = [(stage, dtype) for dtype in ("fp32", "bf16") for stage in (0, 1, 2, 3)]


def tiny_llama(tokenizer: Any) -> Any:
    """Its embeddings are above the size up to which ZeRO-3 keeps weights whole, the rest below."""
    model = tiny_model("llama", tokenizer, eos_scale=1.0, hidden_size=48)
    assert model.get_input_embeddings().weight.numel() > 10_000
    return model


def batches(tokenizer: Any) -> list[list[Encoded]]:
    rows = encode_demonstrations(tokenizer, prompt_rows(16), DataConfig()).rows
    return [rows[start : start + ROWS] for start in (0, 4, 8)]


def train(
    tokenizer: Any, directory: Path, *, stage: int = 0, dtype: str = "fp32", micro: int = 8
) -> dict[str, Any]:
    """Three SFT steps with an EMA; both exported, and their tensors read back."""
    from safetensors.torch import load_file

    model = tiny_llama(tokenizer)
    engine = TrainingEngine(
        model.bfloat16() if dtype == "bf16" else model,
        EngineConfig(zero_stage=stage, dtype=dtype),
        OPTIMIZER,
        total_steps=STEPS,
    )
    ema = EMA(engine.module, EMAConfig(decay=0.5, warmup=False))
    trainer = SFTTrainer(
        engine, SFTConfig(micro_batch_size=micro), pad_token_id=tokenizer.pad_token_id
    )
    history, decays = [], []
    for rows in batches(tokenizer):
        history.append(trainer.step(rows))
        decays.append(ema.update())
    with gathered(engine.module.parameters()):
        live = copied(engine.module)
    with ema.swapped_in():  # at once, as in notebook 04: under ZeRO-3 small weights are whole
        export(engine.module, tokenizer, directory / "ema")
    export(engine.module, tokenizer, directory / "final")
    result = {"history": history, "decays": decays, "distance": ema.distance(), "live": live}
    return result | {
        name: load_file(directory / name / "model.safetensors") for name in ("final", "ema")
    }


def plain_torch(tokenizer: Any) -> dict[str, Any]:
    """The same three steps and average as a loop around torch.optim.AdamW."""
    model = tiny_llama(tokenizer)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
        eps=OPTIMIZER.eps,
    )
    average = copied(model)
    history = []
    # One warm-up step at the full rate, then the line from the peak down to 0 at the last step.
    for rate, rows in zip((3e-3, 3e-3, 0.0), batches(tokenizer), strict=True):
        losses = []
        for row in rows:
            ids = torch.tensor([row.input_ids])
            logits = model(input_ids=ids).logits[0, row.prompt_length - 1 : -1]
            losses.append(F.cross_entropy(logits, ids[0, row.prompt_length :], reduction="none"))
        loss = torch.cat(losses).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        adamw.zero_grad()
        history.append((loss.item(), norm.item(), rate))
        average = {key: 0.5 * average[key] + 0.5 * value for key, value in copied(model).items()}
    return {"history": history, "final": copied(model), "ema": average}


def largest_gap(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[key].float() - other[key].float()).abs().max()) for key in one)


@pytest.fixture(scope="module")
def plain(tokenizer: Any) -> dict[str, Any]:
    return plain_torch(tokenizer)


@pytest.mark.parametrize(("stage", "dtype"), STAGES)
def test_every_zero_stage_gives_the_weights_and_average_of_a_plain_loop(
    stage: int, dtype: str, plain: dict[str, Any], tokenizer: Any, tmp_path: Path
):
    result = train(tokenizer, tmp_path, stage=stage, dtype=dtype)
    # fp32: sums of another order. bf16: roundings of weights up to 1, each 2^-9 at most.
    weights, loss = (1e-6, 1e-5) if dtype == "fp32" else (1e-2, 0.02)
    assert largest_gap(result["final"], plain["final"]) < weights
    assert largest_gap(result["ema"], plain["ema"]) < weights
    assert result["decays"] == [0.5] * STEPS
    for metrics, (expected, norm, rate) in zip(result["history"], plain["history"], strict=True):
        assert metrics["loss/train"] == pytest.approx(expected, rel=loss)
        assert metrics["optim/grad_norm"] == pytest.approx(norm, rel=loss)
        assert metrics["optim/lr"] == pytest.approx(rate)


@pytest.mark.parametrize(("stage", "dtype"), STAGES)
def test_several_backward_passes_a_step_are_one_large_batch(
    stage: int, dtype: str, tokenizer: Any, tmp_path: Path
):
    whole = train(tokenizer, tmp_path / "whole", stage=stage, dtype=dtype)
    parts = train(tokenizer, tmp_path / "parts", stage=stage, dtype=dtype, micro=2)
    assert largest_gap(whole["final"], parts["final"]) < (1e-6 if dtype == "fp32" else 1e-2)
    for one, other in zip(whole["history"], parts["history"], strict=True):
        assert one == pytest.approx(other, rel=1e-5 if dtype == "fp32" else 2e-3)


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (3, "fp32"), (2, "bf16"), (3, "bf16")])
def test_exporting_the_average_leaves_the_live_weights_alone(
    stage: int, dtype: str, tokenizer: Any, tmp_path: Path
):
    result = train(tokenizer, tmp_path, stage=stage, dtype=dtype)
    assert largest_gap(result["final"], result["live"]) == 0
    assert largest_gap(result["final"], result["ema"]) > 0
    assert 0 < result["distance"] < 0.1


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_offload_and_gradient_checkpointing_change_no_loss(
    stage: int, plain: dict[str, Any], tokenizer: Any
):
    model = tiny_llama(tokenizer)
    config = EngineConfig(
        zero_stage=stage,
        gradient_checkpointing=True,
        offload_optimizer=stage >= 1,
        offload_parameters=stage == 3,
    )
    engine = TrainingEngine(model, config, OPTIMIZER, total_steps=STEPS)
    trainer = SFTTrainer(engine, SFTConfig(micro_batch_size=4), pad_token_id=tokenizer.pad_token_id)
    losses = [trainer.step(rows)["loss/train"] for rows in batches(tokenizer)]
    assert losses == pytest.approx([loss for loss, _, _ in plain["history"]], rel=1e-5)


@pytest.mark.parametrize(
    ("stage", "dtype", "weights", "states"),
    [(0, "fp32", 4, 8), (1, "fp32", 4, 12), (0, "bf16", 2, 12), (2, "bf16", 2, 12)],
)
def test_an_engine_keeps_as_many_bytes_a_parameter_as_it_says(
    stage: int, dtype: str, weights: int, states: int, tokenizer: Any
):
    model = tiny_model("llama", tokenizer, eos_scale=1.0)
    engine = TrainingEngine(
        model.bfloat16() if dtype == "bf16" else model,
        EngineConfig(zero_stage=stage, dtype=dtype),
        OPTIMIZER,
        total_steps=STEPS,
    )
    trainer = SFTTrainer(engine, SFTConfig(), pad_token_id=tokenizer.pad_token_id)
    trainer.step(batches(tokenizer)[0])
    engine.leave(weights=True)
    count = sum(p.numel() for p in model.parameters())
    assert engine._weights.nbytes == pytest.approx(weights * count, rel=1e-3)
    assert engine._states.nbytes == pytest.approx(states * count, rel=1e-3)
    trainer.step(batches(tokenizer)[1])


def test_gradients_do_not_survive_the_step(tokenizer: Any):
    model = tiny_llama(tokenizer)
    engine = TrainingEngine(model, EngineConfig(), OPTIMIZER, total_steps=9)
    trainer = SFTTrainer(engine, SFTConfig(), pad_token_id=tokenizer.pad_token_id)
    trainer.step(batches(tokenizer)[0])
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def two_ranks(directory: Path) -> None:
    """What every rank of the torchrun program does: all stages in turn, saved by rank 0."""
    tokenizer = small_tokenizer()
    for stage, dtype in STAGES:
        result = train(tokenizer, directory / f"{stage}-{dtype}", stage=stage, dtype=dtype, micro=2)
        if distributed.is_main_rank():
            torch.save(result, directory / f"{stage}-{dtype}.pt")
    distributed.barrier()


def test_two_ranks_train_to_the_weights_of_one(plain: dict[str, Any], tmp_path: Path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", __file__, str(tmp_path)]
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    for stage, dtype in STAGES:
        result = torch.load(tmp_path / f"{stage}-{dtype}.pt")
        weights, loss = (1e-6, 1e-5) if dtype == "fp32" else (1e-2, 0.02)
        assert largest_gap(result["final"], plain["final"]) < weights
        assert largest_gap(result["ema"], plain["ema"]) < weights
        assert 0 < result["distance"] < 0.1
        for metrics, (expected, norm, _) in zip(result["history"], plain["history"], strict=True):
            assert metrics["loss/train"] == pytest.approx(expected, rel=loss)
            assert metrics["optim/grad_norm"] == pytest.approx(norm, rel=loss)


if __name__ == "__main__":
    two_ranks(Path(sys.argv[1]))
