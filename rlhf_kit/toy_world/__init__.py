"""The toy world: a generator, a gold judge and a small base model, all inside the package."""

from __future__ import annotations

from pathlib import Path

from rlhf_kit.toy_world.dialogues import demonstrations, preferences, prompts
from rlhf_kit.toy_world.judge import GoldScore, judge

BASE_DIR = Path(__file__).parent / "base"
"""Directory of the shipped base model, in Hugging Face format."""

__all__ = ["BASE_DIR", "GoldScore", "demonstrations", "judge", "preferences", "prompts"]
