"""The recipes that DeepSpeed Chat published (training_scripts/), as presets of this kit.

Each is a preset to start from and what it changes, by the keys of `config.override`. Rates, rows a
step, lengths and data are the published ones; what is not is said beside it, and holds for all:

- Dropout is off in every stage. Theirs is, by flags, in the reward model and in PPO alone.
- SFT goes over its data once, where theirs goes 16 times (1.3B on a node, 6.7B, 13B) or 4 times
  (Llama): SFT models over-fit after one epoch (InstructGPT, section 3.5).
- One blend serves all stages, cut by the prompts' content; theirs takes rm-static alone for PPO,
  and rows that two of its datasets share may come in several stages.
- Responses are sampled, not greedy; scores are normalised, the average is kept (theirs: 1.3B on a
  node), and schedules warm up for a tenth of the steps, where theirs do for 100.
- PPO's rollouts have 128 prompts or more, so that GPUs have rows to decode; an optimiser step has
  the published rows.
- ZeRO, checkpointing and the like fit the GPUs that DEVICES names, by `rlhf-kit plan`.
"""

from __future__ import annotations

from typing import Any

RM_STATIC: dict[str, Any] = {"name": "Dahoas/rm-static"}
# Weights are thousands of rows, so that all of them come, as when datasets are put together.
FOUR: list[dict[str, Any]] = [
    {**RM_STATIC, "weight": 76},
    {"name": "Dahoas/full-hh-rlhf", "weight": 112},
    {"name": "Dahoas/synthetic-instruct-gptj-pairwise", "weight": 33},
    {"name": "yitingxie/rlhf-reward-datasets", "weight": 76},
]
EVERYWHERE: dict[str, Any] = {
    "reward__optimizer__weight_decay": 0.1,
    "reward__optimizer__learning_rate": 5e-5,
    "ppo__kl__coef": 0.1,
    "ppo__actor_optimizer__warmup_ratio": 0.1,
    "ppo__critic_optimizer__warmup_ratio": 0.1,
    "ppo__critic_optimizer__learning_rate": 5e-6,
    # One pass over rm-static's prompts for PPO, of which there are about 30,000.
    "ppo__iterations": 240,
    "ppo__batch_size": 128,
}
OPT: dict[str, Any] = {
    **EVERYWHERE,
    "reward_model": "facebook/opt-350m",
    "reward__init_from": "base",
    "critic_engine__gradient_checkpointing": False,
}
ALL_WEIGHTS: dict[str, Any] = {
    "sft__optimizer__learning_rate": 9.65e-6,
    "ppo__actor_optimizer__learning_rate": 9.65e-6,
}
ADAPTERS: dict[str, Any] = {
    "actor_engine__lora__rank": 128,
    # Theirs train at 5e-4 in PPO, and in SFT at 1e-4 (13B) or 1e-3; norms and embeddings train with
    # them. Scales are 1/128 theirs and 32/128 ours, so scale times rate in PPO, by which a step of
    # AdamW moves a weight, is 3.9e-6 there and 2.5e-6 here.
    "ppo__actor_optimizer__learning_rate": 1e-5,
    "sft__optimizer__learning_rate": 1e-4,
}
ZERO_3: dict[str, Any] = {
    "actor_engine__zero_stage": 3,
    # grad_norm_ratio needs whole gradients, which ZeRO-3 never has.
    "ppo__mixture__kind": "none",
}

RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt-1.3b-single-gpu": (
        "consumer",
        {
            **OPT,
            **ALL_WEIGHTS,  # theirs: adapters of rank 128; SFT at 1e-3
            "actor_model": "facebook/opt-1.3b",
            "data__sources": [RM_STATIC],
            "sft__batch_size": 128,
            "ppo__minibatch_size": 32,
        },
    ),
    "opt-1.3b-single-node": (
        "consumer",
        {
            **OPT,
            **ALL_WEIGHTS,
            "actor_model": "facebook/opt-1.3b",
            "data__sources": FOUR,
            "reward__batch_size": 32,
            "ppo__minibatch_size": 32,
        },
    ),
    "opt-6.7b-lora-single-gpu": (
        "consumer",
        {
            **OPT,
            **ADAPTERS,
            "actor_model": "facebook/opt-6.7b",
            "data__sources": FOUR,
            "sft__batch_size": 128,
            "ppo__minibatch_size": 128,
        },
    ),
    "opt-13b-single-node": (
        "consumer",
        {
            **OPT,
            **ADAPTERS,
            **ZERO_3,
            "actor_model": "facebook/opt-13b",
            "actor_engine__generation_tp": 2,
            "data__sources": FOUR,
            "sft__batch_size": 32,
            "reward__batch_size": 32,
            "ppo__minibatch_size": 128,
        },
    ),
    "llama2-7b-single-node": (
        "consumer",
        {
            **EVERYWHERE,
            **ALL_WEIGHTS,
            **ZERO_3,
            "critic_engine__zero_stage": 3,
            "actor_model": "meta-llama/Llama-2-7b-hf",
            "reward_model": "meta-llama/Llama-2-7b-hf",
            "reward__init_from": "base",
            "reward__optimizer__learning_rate": 9.65e-6,
            "data__sources": FOUR,
            "sft__batch_size": 32,
            "ppo__minibatch_size": 32,  # theirs: 8, one a GPU
            "ppo__actor_optimizer__weight_decay": 0.1,
            "ppo__critic_optimizer__weight_decay": 0.1,
        },
    ),
    "opt-66b-multi-node": (
        "consumer",
        {
            **OPT,
            **ADAPTERS,
            **ZERO_3,
            "actor_model": "facebook/opt-66b",
            "actor_engine__generation_tp": 8,
            "data__sources": [RM_STATIC],
            "sft__batch_size": 256,  # theirs is not published; four rows a GPU, as in PPO
            "ppo__iterations": 120,
            "ppo__batch_size": 256,
            "ppo__minibatch_size": 256,
            "ppo__actor_optimizer__weight_decay": 0.1,
            "ppo__critic_optimizer__weight_decay": 0.1,
        },
    ),
}

DEVICES: dict[str, tuple[str, int]] = {
    "opt-1.3b-single-gpu": ("a6000", 1),
    "opt-1.3b-single-node": ("a100-40", 8),
    "opt-6.7b-lora-single-gpu": ("a6000", 1),
    "opt-13b-single-node": ("a100-40", 8),
    "llama2-7b-single-node": ("a100", 8),
    # Theirs had 64 A100 of 80 GB. Here an engine's weights are whole on each GPU as it starts.
    "opt-66b-multi-node": ("h200", 64),
}
"""The GPU, by its name in `rlhf-kit plan`, and the number of them that each is planned for."""
