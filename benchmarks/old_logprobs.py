"""What do old logprobs cost: recomputed, taken from the rollout, or both and a correction?

    python benchmarks/old_logprobs.py [--case opt-1.3b] [--dtypes fp32 bf16] [--batch 64]

`recompute` asks the actor once more, by the forward that training uses; `rollout` takes what
generation computed while it sampled; `corrected` recomputes and weights each token by what
generation and training disagree about. One seed, so all three see the same rollout. Of each:

- seconds of scoring and of one update, the fastest of some rounds (on a CPU the processor's);
- how far the first minibatch's ratios are from 1, and the approximate KL and clipped share there;
- the policy gradient of that minibatch (last layer) against the unbiased one: tokens were drawn
  from the rollout's distribution, so each one's weight is exp(old - rollout), without a cap.

Without `--case` the toy world's base model answers the toy world's prompts; a case of ppo_step.py
has random weights of a known shape.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_kit import rlhf_engine
from rlhf_kit.blending import Blend
from rlhf_kit.config import RunConfig, override, preset
from rlhf_kit.hybrid_engine.training import start_deepspeed
from rlhf_kit.mixture import probe_parameters
from rlhf_kit.models import resolve_model
from rlhf_kit.pipeline import commit
from rlhf_kit.ppo import PPOTrainer
from rlhf_kit.rollout import PromptLoader, ask_models
from rlhf_kit.tokenization import keep_fitting, load_tokenizer, prepare_tokenizer
from rlhf_kit.types import Experience, PromptBatch

RESULT = Path(__file__).parent / "results" / "old_logprobs.json"
SOURCES = ("recompute", "rollout", "corrected")
CUDA = torch.cuda.is_available()


def toy(arguments: argparse.Namespace) -> tuple[RunConfig, Any, PromptBatch]:
    """Settings, tokenizer and a batch of prompts of the toy world."""
    config = preset(
        "toy",
        data__rows=(1, 1, 16 * arguments.batch),
        ppo__batch_size=arguments.batch,
        ppo__minibatch_size=arguments.batch // 2,
    )
    tokenizer = load_tokenizer(resolve_model(config.actor_model))
    prepare_tokenizer(tokenizer)
    rows = keep_fitting(tokenizer, Blend(config.data, config.seed)["ppo"], config.data).rows
    loader = PromptLoader(tokenizer, rows, batch_size=arguments.batch, iterations=1, seed=1)
    return config, tokenizer, loader[0]


def shaped(arguments: argparse.Namespace) -> tuple[RunConfig, Any, PromptBatch]:
    """The same of a case of ppo_step.py, whose models are built in place of loaded ones."""
    import ppo_step

    case = dataclasses.replace(ppo_step.CASES[arguments.case], batch=arguments.batch)
    tokenizer, device = ppo_step.word_tokenizer(), "cuda" if CUDA else "cpu"

    def dtype(name: str) -> torch.dtype:
        return torch.bfloat16 if name == "bf16" else torch.float32

    rlhf_engine.load_causal_lm = lambda *_, dtype_=dtype, dtype="bf16": ppo_step.causal_lm(
        case.actor, device=device, dtype=dtype_(dtype)
    )
    rlhf_engine.load_scorer = lambda *_, dtype_=dtype, dtype="bf16": ppo_step.scorer(
        case.critic, device=device, dtype=dtype_(dtype)
    )
    rlhf_engine._tokenizer_of = lambda *_: tokenizer
    vocabulary = ppo_step.SHAPES[case.actor][1]["vocab_size"]
    prompts = ppo_step.prompts(case.batch, ppo_step.PROMPT, vocabulary, seed=1)
    config = override(ppo_step.run_config(case), ppo__minibatch_size=case.batch // 2)
    return config, tokenizer, prompts


def timed(run: Callable[[], Any], rounds: int) -> tuple[Any, float]:
    """The last result, and the seconds of the fastest round after a first one that warms up."""
    clock = time.perf_counter if CUDA else time.process_time
    seconds = []
    for _ in range(rounds + 1):
        start = clock()
        result = run()
        if CUDA:
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    return result, min(seconds[1:])


def gradient(trainer: PPOTrainer, minibatch: Experience) -> Tensor:
    """The policy gradient of a minibatch on the last layer, flattened."""
    probes = probe_parameters(trainer.engine.actor)
    tokens = float(minibatch.response_mask.sum())
    parts = trainer._policy_gradient(minibatch, tokens, probes, trainer.micro_batch)
    return torch.cat([part.flatten() for part in parts])


def with_source(trainer: PPOTrainer, source: str, *, cap: float | None = None) -> None:
    changes: dict[str, Any] = {"old_logprobs": source}
    if cap is not None:
        changes["importance_cap"] = cap
    trainer.config = dataclasses.replace(trainer.config, **changes)


def measure(
    trainer: PPOTrainer, prompts: PromptBatch, *, rounds: int
) -> dict[str, dict[str, float]]:
    """All three ways, on one rollout of an actor that has not moved."""
    size = trainer.config.minibatch_size
    first = torch.arange(size, device=trainer.engine.device)
    with_source(trainer, "corrected", cap=1e9)
    experience = trainer.generate_experience(prompts)
    unbiased = gradient(trainer, experience.rows(first))
    rollout = trainer.last_rollout
    assert rollout is not None
    found: dict[str, dict[str, float]] = {}
    experiences: dict[str, Experience] = {}
    for source in SOURCES:
        with_source(trainer, source, cap=trainer.args.ppo.importance_cap)
        _, score = timed(
            lambda: ask_models(
                rollout,
                trainer.engine,
                trainer.config,
                temperature=trainer.generation.temperature,
                size=trainer.micro_batch,
            ),
            rounds,
        )
        # The same seeds, so the same rollout, to the last bit.
        experiences[source] = experience = trainer.generate_experience(prompts)
        minibatch = experience.rows(first)
        _, metrics = trainer._policy(
            trainer.engine.actor, minibatch, float(minibatch.response_mask.sum())
        )
        mask = experience.response_mask
        gap = (experience.old_logprobs - experience.rollout_logprobs)[mask]
        mine = gradient(trainer, minibatch)
        found[source] = {
            "score_seconds": score,
            "ratio_mean": float(metrics["policy/ratio_mean"].detach()),
            "approx_kl": float(metrics["policy/approx_kl"]),
            "clipped_share": float(metrics["policy/clipfrac"]),
            "gap_mean": float(gap.abs().mean()),
            "gap_max": float(gap.abs().max()),
            "weights_capped": float((gap.exp() > trainer.config.importance_cap).float().mean()),
            "gradient_error": float((mine - unbiased).norm() / unbiased.norm()),
            "gradient_cosine": float(torch.nn.functional.cosine_similarity(mine, unbiased, dim=0)),
        }
    for source in SOURCES:  # last, as they move the actor
        with_source(trainer, source, cap=trainer.args.ppo.importance_cap)
        _, update = timed(lambda s=source: trainer._train(experiences[s]), rounds)
        found[source]["update_seconds"] = update
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", help="a case of ppo_step.py; default: the toy world")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    start_deepspeed()
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    base, tokenizer, prompts = (shaped if arguments.case else toy)(arguments)
    for dtype in arguments.dtypes:
        config = override(
            base,
            actor_engine__dtype=dtype,
            critic_engine__dtype=dtype,
            ppo__mixture__kind="none",
            ppo__ema__enabled=False,
            ppo__critic_warmup_iterations=0,
        )
        engine = rlhf_engine.RLHFEngine(
            actor_model_name_or_path=config.actor_model,
            critic_model_name_or_path=config.reward_model,
            tokenizer=tokenizer,
            num_total_iters=1,
            args=config,
        )
        trainer = PPOTrainer(engine=engine, args=config)
        found = measure(trainer, prompts, rounds=arguments.rounds)
        for source, numbers in found.items():
            print(
                f"{dtype} {source:9s} score {numbers['score_seconds']:6.2f} s, update "
                f"{numbers['update_seconds']:6.2f} s, |ratio - 1| "
                f"{abs(numbers['ratio_mean'] - 1):.1e}, approximate KL "
                f"{numbers['approx_kl']:.1e}, gradient off by {numbers['gradient_error']:.1e}"
            )
        machine = torch.cuda.get_device_name() if CUDA else f"{platform.machine()}, one thread"
        results[f"{arguments.case or 'toy'} {'gpu' if CUDA else 'cpu'} {dtype}"] = {
            "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine,
            "torch": torch.__version__,
            "commit": commit(),
            **vars(arguments),
            "sources": found,
        }
        del engine, trainer
    RESULT.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
