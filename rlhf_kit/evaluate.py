"""Evaluate a run: base, SFT, final and EMA model on the same held-out prompts.

Shapes: B batch, R response tokens, N held-out prompts.

Every model answers the same prompts with the same sampling seeds, once sampled at temperature 1
and once greedily: a gain that sampling alone shows may be mere sharpening.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_kit.blending import Blend
from rlhf_kit.checkpoint import is_complete
from rlhf_kit.config import GenerationConfig, MemoryConfig, RunConfig, from_dict, require
from rlhf_kit.distributed import derive_seed, local_device
from rlhf_kit.hybrid_engine.decode import Decoder
from rlhf_kit.measure import (
    ActorEvaluation,
    Judge,
    evaluate_actor,
    evaluate_reward_model,
    weight_distance,
)
from rlhf_kit.micro_batches import micro_batches
from rlhf_kit.models import TOY_WORLD, load_causal_lm
from rlhf_kit.pipeline import EXPORTS, read_record
from rlhf_kit.results import COMPARISONS, MODELS, SEED, describe_reward_model, summarise
from rlhf_kit.scorer import Scorer
from rlhf_kit.token_logprobs import chosen_logprobs
from rlhf_kit.tokenization import (
    collate_prompts,
    decode_response,
    keep_fitting,
    load_tokenizer,
    prepare_tokenizer,
    stop_token_ids,
)
from rlhf_kit.types import PreferencePair, PromptBatch, Rollout

BATCH = 64
"""Prompts generated for at once. Forward passes see ppo.micro_batch_size rows, as in training."""
PAIRS_PER_PROMPT = 2
"""Held-out preference pairs for each held-out prompt."""


@dataclass(frozen=True)
class HeldOut:
    """What every model is measured on."""

    prompts: tuple[PreferencePair, ...]
    pairs: tuple[PreferencePair, ...]
    families: tuple[str, ...]
    """Of the pairs; empty where the data names none."""
    judge: Judge | None
    """The gold judge, which the toy world alone has."""


def evaluate_run(run_dir: str | Path, *, split: str = "test") -> dict[str, Any]:
    """Everything a report says about the models of a run, ready for JSON.

    split: of the toy world, `test` or `validation` (choose settings on validation); other data
        have one held-out part.

    Raises ValueError where `run_dir` holds no run or its SFT stage is not finished. Other
    missing models are left out and named under `notes`.
    """
    start = time.perf_counter()
    run = Path(run_dir)
    config = from_dict(read_record(run)["config"])
    directories = model_directories(run, config)
    require("sft" in directories, f"{run} has no finished SFT model; run notebooks/02_sft first")
    tokenizer = load_tokenizer(directories["sft"])
    prepare_tokenizer(tokenizer)
    if is_toy_world(config):
        held_out = toy_world_data(config, split)
    else:
        held_out = blend_data(config, tokenizer)
    prompts = prompt_batches(tokenizer, held_out.prompts)
    reward = run / EXPORTS["reward"]
    scorer = Scorer(reward, config, tokenizer) if is_complete(reward) else None
    sft = _load_actor(directories["sft"], tokenizer, config)

    rows = config.ppo.micro_batch_size
    sampled: dict[str, ActorEvaluation] = {}
    greedy: dict[str, ActorEvaluation] = {}
    for name, directory in directories.items():
        model = sft if name == "sft" else _load_actor(directory, tokenizer, config)
        actor = Actor(model, tokenizer, rows)
        for temperature, results in ((1.0, sampled), (0.0, greedy)):
            with_kl = name != "base" and temperature == 1
            results[name] = evaluate_actor(
                actor.generate_for_kl if with_kl else actor.generate,
                prompts,
                dataclasses.replace(config.generation, temperature=temperature),
                decode=lambda ids: decode_response(tokenizer, ids),
                score=scorer.normalised if scorer else None,
                judge=held_out.judge,
                ref_logprobs=(lambda rollout: logprobs(sft, rollout, rows)) if with_kl else None,
                name=f"{name} {'sampled' if temperature else 'greedy'}",
            )
    result = summarise(sampled, greedy, config.evaluation)
    if scorer:
        evaluation = evaluate_reward_model(
            scorer.pairs,
            held_out.pairs,
            families=held_out.families,
            resamples=config.evaluation.bootstrap,
        )
        result["reward_model"] = describe_reward_model(evaluation)
    result["weight_distance"] = {
        f"{a}_vs_{b}": weight_distance(directories[a], directories[b])
        for a, b in COMPARISONS
        if a in directories and b in directories
    }
    result["split"] = split if held_out.judge else "held out"
    result["notes"] = _notes(directories, scorer is not None, held_out.judge is not None)
    result["evaluation_seconds"] = time.perf_counter() - start
    return result


# ---- what a run holds


def model_directories(run: Path, config: RunConfig) -> dict[str, str]:
    """Name -> directory (or hub name) of the models that exist."""
    exports = {name: run / EXPORTS[name] for name in ("sft", "final", "ema")}
    found = {name: str(path) for name, path in exports.items() if is_complete(path)}
    return {"base": config.actor_model} | found


def is_toy_world(config: RunConfig) -> bool:
    """Whether all data come from the toy world, whose judge then knows every prompt."""
    return all(source.name == TOY_WORLD for source in config.data.sources)


def toy_world_data(config: RunConfig, split: str) -> HeldOut:
    """Prompts and pairs whose entities training never combined so, labels without errors."""
    from rlhf_kit import toy_world

    def judge(prompt: Any, response: str, ended: bool) -> toy_world.GoldScore:
        return toy_world.judge(list(prompt), response, ended=ended)

    n = config.evaluation.prompts
    prompts = toy_world.prompts(n, seed=SEED, split=split)
    pairs = toy_world.preferences(PAIRS_PER_PROMPT * n, seed=SEED, split=split, flip=0.0)
    return HeldOut(
        prompts=tuple(PreferencePair(tuple(row["prompt"])) for row in prompts),
        pairs=tuple(
            PreferencePair(tuple(row["prompt"]), row["chosen"], row["rejected"], kind=row["kind"])
            for row in pairs
        ),
        families=tuple(row["family"] for row in pairs),
        judge=judge,
    )


def blend_data(config: RunConfig, tokenizer: Any) -> HeldOut:
    """The held-out parts of the blend's ppo and reward splits; nobody knows their gold."""
    blend = Blend(config.data, config.seed)
    n = config.evaluation.prompts
    return HeldOut(
        prompts=tuple(keep_fitting(tokenizer, blend.evaluation("ppo"), config.data).rows[:n]),
        pairs=tuple(
            keep_fitting(tokenizer, blend.evaluation("reward"), config.data).rows[
                : PAIRS_PER_PROMPT * n
            ]
        ),
        families=(),
        judge=None,
    )


def prompt_batches(tokenizer: Any, prompts: Sequence[PreferencePair]) -> list[PromptBatch]:
    """Batches in the order of the prompts; each prompt's seed depends on its place alone."""
    starts = range(0, len(prompts), BATCH)
    return [
        collate_prompts(
            tokenizer,
            prompts[start : start + BATCH],
            seeds=[
                derive_seed("evaluation", SEED, row)
                for row in range(start, min(start + BATCH, len(prompts)))
            ],
        )
        for start in starts
    ]


# ---- models


class Actor:
    """Generates with a loaded model."""

    def __init__(self, model: Any, tokenizer: Any, rows: int) -> None:
        self.model = model
        self.rows = rows
        self.decoder = Decoder(
            model,
            eos_token_ids=stop_token_ids(tokenizer, model),
            pad_token_id=tokenizer.pad_token_id,
        )

    def generate(self, prompts: PromptBatch, generation: GenerationConfig) -> Rollout:
        device = next(self.model.parameters()).device
        moved = dataclasses.replace(
            prompts,
            input_ids=prompts.input_ids.to(device),
            attention_mask=prompts.attention_mask.to(device),
            seeds=prompts.seeds.to(device),
        )
        return self.decoder.generate(moved, generation)

    def generate_for_kl(self, prompts: PromptBatch, generation: GenerationConfig) -> Rollout:
        """A rollout whose logprobs are a plain forward's, as the SFT model's are.

        The decoder's own leave out an EOS that would have come too early, and are rounded
        otherwise; the KL of a model to itself would then not be 0.
        """
        rollout = self.generate(prompts, generation)
        return dataclasses.replace(rollout, logprobs=logprobs(self.model, rollout, self.rows))


@torch.no_grad()
def logprobs(model: Any, rollout: Rollout, rows: int) -> Tensor:
    """[B, R] log-probabilities of the response tokens at temperature 1, `rows` at a time."""
    found = torch.zeros_like(rollout.logprobs)
    length, chunk = rollout.response_ids.shape[1], MemoryConfig.logprob_chunk
    for micro in micro_batches(rollout.sequences, rollout.attention_mask, length, size=rows):
        logprob, _ = chosen_logprobs(model, micro.input_ids, micro.places, chunk=chunk)
        found.view(-1).index_copy_(0, micro.slots, logprob)
    return found


def _load_actor(directory: str, tokenizer: Any, config: RunConfig) -> Any:
    model: Any = load_causal_lm(directory, tokenizer, dtype=config.actor_engine.dtype)
    return model.to(local_device()).eval()


def _notes(directories: Mapping[str, str], proxy: bool, gold: bool) -> list[str]:
    notes = [f"The {name} model is missing." for name in MODELS if name not in directories]
    if not proxy:
        notes.append("The reward model is missing, so there are no proxy scores.")
    if not gold:
        notes.append(
            "These data have no gold judge: what people would think of the responses is not "
            "measured here, only what the reward model thinks."
        )
    return notes
