"""A run directory of tiny random models, for tests of the app that need no trained ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from conftest import small_tokenizer, tiny_model

from rlhf_kit.checkpoint import export
from rlhf_kit.config import preset
from rlhf_kit.models import load_scorer, save_normalisation

POSITIONS = 32_768


def write_run(directory: Path) -> Path:
    """base, sft, reward (mean 0.3, std 0.5), a periodic export, final and ema.

    Greedy decoding never ends with these models: their EOS has logit 0. They differ by steps of
    1/8 in one bias-like tensor, so that distances can be worked by hand.
    """
    tokenizer = small_tokenizer()
    model = tiny_model("llama", tokenizer, eos_scale=0.0, max_position_embeddings=POSITIONS)
    base = directory / "base"
    export(model, tokenizer, base)
    run = directory / "run"
    for name, shift in (
        ("sft/final", 0.0),
        ("ppo/exports/step-00000004", 0.125),
        ("ppo/final", 0.25),
        ("ppo/ema", 0.375),
    ):
        with torch.no_grad():
            model.model.norm.weight.fill_(1 + shift)  # D = 32 entries
        export(model, tokenizer, run / name)
    torch.manual_seed(4)
    scorer = load_scorer(str(base), tokenizer)
    save_normalisation(scorer, mean=0.3, std=0.5)
    export(scorer, tokenizer, run / "reward/final")
    config = preset("toy", actor_model=str(base), reward_model=str(base))
    record = {"config": config.to_dict(), "stages": {}, "finished": None}
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return run


def ask(text: str = "Why?") -> list[dict[str, Any]]:
    """A dialogue of one question."""
    return [{"role": "user", "content": text}]
