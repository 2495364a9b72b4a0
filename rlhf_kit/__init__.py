"""rlhf_kit: train a ChatGPT-style model the InstructGPT way, on one GPU or a cluster.

`RLHFEngine` and `PPOTrainer` are the API for a loop of one's own. DeepSpeed Chat announced it as
`DeepSpeedRLHFEngine` and `DeepSpeedPPOTrainer`; those names work too. Importing the package
itself loads nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_kit.ppo import PPOTrainer
    from rlhf_kit.rlhf_engine import RLHFEngine

    DeepSpeedRLHFEngine, DeepSpeedPPOTrainer = RLHFEngine, PPOTrainer

__version__ = "0.1.0"
__all__ = ["DeepSpeedPPOTrainer", "DeepSpeedRLHFEngine", "PPOTrainer", "RLHFEngine"]


def __getattr__(name: str) -> Any:
    if name in ("RLHFEngine", "DeepSpeedRLHFEngine"):
        from rlhf_kit.rlhf_engine import RLHFEngine

        return RLHFEngine
    if name in ("PPOTrainer", "DeepSpeedPPOTrainer"):
        from rlhf_kit.ppo import PPOTrainer

        return PPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
