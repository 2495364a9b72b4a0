"""One PPO run of the toy world, measured: what it ends as, and its course.

    python benchmarks/ppo_run.py MODELS OUTPUT SETTINGS

`MODELS` is a run with a SFT and a reward model, `SETTINGS` JSON of `config.override`'s changes.
`mixture_and_ema.py` starts one process of this for each of its runs. Beside the engine's average
the run keeps a second one. What mixture and average cost is measured by `ppo_cost.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from rlhf_kit import DeepSpeedPPOTrainer, DeepSpeedRLHFEngine, pipeline, toy_world
from rlhf_kit.blending import Blend
from rlhf_kit.config import EMAConfig, override
from rlhf_kit.ema import EMA
from rlhf_kit.evaluate import prompt_batches, toy_world_data
from rlhf_kit.functional import language_model_loss
from rlhf_kit.measure import ActorEvaluation, evaluate_actor
from rlhf_kit.results import SEED
from rlhf_kit.rollout import PromptLoader
from rlhf_kit.run_directory import RunDirectory
from rlhf_kit.tokenization import (
    as_text,
    decode_response,
    encode_demonstrations,
    encode_dialogue,
    keep_fitting,
    load_tokenizer,
    prepare_tokenizer,
)
from rlhf_kit.toy_world.pretraining import draw_text
from rlhf_kit.types import Rollout

AVERAGES = {
    "ema": EMAConfig(decay=0.95, warmup=True),
    "slow": EMAConfig(decay=0.992, warmup=False),
}
"""The preset's average, and InstructGPT's decay as it stands, without a warm-up."""
MODELS = ("live", *AVERAGES)
PROMPTS, COURSE_PROMPTS, TEXTS = 256, 128, 256
"""Held-out prompts at the end and on the way; texts for the losses that show forgetting."""
LOOK_EVERY = 5
"""Iterations between two evaluations on the way, once the actor learns."""
Text = tuple[list[int], list[bool]]
"""Ids, and which of them count in the loss."""


class Averages(EMA):
    """The engine's average, and others that advance beside it."""

    def __init__(self, *arguments: Any, beside: Sequence[EMA]):
        super().__init__(*arguments)
        self.beside = beside

    def update(self) -> float:
        for average in self.beside:
            average.update()
        return super().update()


class PPORun:
    """Engine, trainer, averages and held-out data."""

    def __init__(self, models: Path, settings: dict[str, Any]):
        args = RunDirectory.open(models, preset_name="toy").args()
        # Runs that walk far are the point: nothing here is rolled back or stopped.
        self.args = args = override(args, faults__kl__policy="warn", **settings)
        self.tokenizer = load_tokenizer(args.actor_model)
        prepare_tokenizer(self.tokenizer)
        self.engine = DeepSpeedRLHFEngine(
            actor_model_name_or_path=args.actor_model_name_or_path,
            critic_model_name_or_path=args.critic_model_name_or_path,
            tokenizer=self.tokenizer,
            num_total_iters=args.ppo.iterations,
            args=args,
        )
        module = self.engine.actor.module
        slow = EMA(module, AVERAGES["slow"])
        self.engine.ema = Averages(module, AVERAGES["ema"], beside=[slow])
        self.averages = {"ema": self.engine.ema, "slow": slow}
        blend = Blend(args.data, args.seed)
        demonstrations = encode_demonstrations(self.tokenizer, blend["sft"], args.data).rows
        self.trainer = DeepSpeedPPOTrainer(
            engine=self.engine, args=args, mixture_rows=as_text(demonstrations)
        )
        self.loader = PromptLoader(
            self.tokenizer,
            keep_fitting(self.tokenizer, blend["ppo"], args.data).rows,
            batch_size=args.ppo.batch_size,
            iterations=args.ppo.iterations,
            seed=args.seed,
        )
        held_out = toy_world_data(override(args, evaluation__prompts=PROMPTS), "test")
        self.judge = held_out.judge
        self.prompts = prompt_batches(self.tokenizer, held_out.prompts)
        rows = toy_world.prompts(PROMPTS, seed=SEED, split="test")
        self.families = [row["family"] for row in rows]
        self.texts = {"pretraining text": self._pretraining(), "dialogues": self._dialogues()}

    def _pretraining(self) -> list[Text]:
        """New text of the base model's kind, with the loss where pretraining had it."""
        rng, rows = Random("held-out pretraining text"), []
        for _ in range(TEXTS):
            ids: list[int] = []
            counts: list[bool] = []
            for text, counted in draw_text(rng):
                part = self.tokenizer(text, add_special_tokens=False)["input_ids"]
                ids += part
                counts += [counted] * len(part)
            rows.append((ids, counts))
        return rows

    def _dialogues(self) -> list[Text]:
        """Held-out demonstrations as whole texts: what the mixture loss trains on."""
        rows = toy_world.demonstrations(TEXTS, seed=SEED, split="test")
        longest = self.args.data.max_length
        encoded = [
            encode_dialogue(self.tokenizer, row["prompt"], row["response"], longest) for row in rows
        ]
        return [(row.input_ids, [True] * row.length) for row in encoded]

    # ---- measuring

    def weights(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Inside, the actor has the weights of this name."""
        self.engine.actor.eval()
        return contextlib.nullcontext() if name == "live" else self.averages[name].swapped_in()

    def answers(self, *, temperature: float, prompts: int) -> ActorEvaluation:
        """A response to each of the first prompts, judged; sampled ones with their KL."""
        return evaluate_actor(
            self.engine.actor.generate,
            self.prompts[: prompts // len(self.prompts[0])],
            dataclasses.replace(self.args.generation, temperature=temperature),
            decode=lambda ids: decode_response(self.tokenizer, ids),
            judge=self.judge,
            ref_logprobs=self._ref_logprobs if temperature else None,
        )

    def _ref_logprobs(self, rollout: Rollout) -> Tensor:
        length = rollout.response_ids.shape[1]
        return self.engine.ref_logprobs(rollout.sequences, rollout.attention_mask, length, 1.0)

    @torch.no_grad()
    def loss(self, rows: Sequence[Text], size: int = 32) -> float:
        """Nats a token that counts."""
        total, tokens = 0.0, sum(sum(counts[1:]) for _, counts in rows)
        ordered = sorted(rows, key=lambda row: len(row[0]))
        for start in range(0, len(ordered), size):
            part = ordered[start : start + size]
            width = len(part[-1][0])
            ids = torch.full((len(part), width), int(self.tokenizer.pad_token_id))
            mask = torch.zeros(len(part), width, dtype=torch.bool)
            for row, (mine, counts) in enumerate(part):
                ids[row, : len(mine)] = torch.tensor(mine)
                mask[row, : len(mine)] = torch.tensor(counts)
            # Causal, and padded on the right: no token that counts sees the padding.
            logits = self.engine.actor.module(input_ids=ids, use_cache=False).logits
            total += float(language_model_loss(logits, ids, mask, denominator=1.0))
        return total / tokens

    def evaluate(self, name: str) -> dict[str, Any]:
        """All that is measured of one set of weights."""
        with self.weights(name):
            sampled = self.answers(temperature=1.0, prompts=PROMPTS)
            greedy = self.answers(temperature=0.0, prompts=PROMPTS)
            losses = {f"loss on {key}": self.loss(rows) for key, rows in self.texts.items()}
        assert sampled.kl is not None
        right: dict[str, list[float]] = defaultdict(list)
        for family, value in zip(self.families, greedy.gold["correct"], strict=True):
            right[family].append(float(value))
        return {
            "sampled": {part: float(values.mean()) for part, values in sampled.gold.items()},
            "greedy": {part: float(values.mean()) for part, values in greedy.gold.items()},
            "correct_by_family": {family: fmean(v) for family, v in sorted(right.items())},
            "kl": float(sampled.kl.mean()),
            "distinct": len(set(sampled.responses)) / PROMPTS,
            **losses,
        }

    def look(self, iteration: int) -> dict[str, Any]:
        """Gold score and KL on the way, of all weights, on the first prompts."""
        point: dict[str, Any] = {"iteration": iteration}
        for name in MODELS:
            with self.weights(name):
                found = self.answers(temperature=1.0, prompts=COURSE_PROMPTS)
            assert found.kl is not None
            point[name] = {"gold": float(found.gold["total"].mean()), "kl": float(found.kl.mean())}
        return point

    # ---- training

    def train(self) -> dict[str, Any]:
        """From the first iteration to the last."""
        begin = time.process_time()
        before, course = self.evaluate("live"), [self.look(0)]
        history: dict[str, list[float]] = {"mixture/coef": [], "mixture/loss": []}
        for prompt_batch in self.loader:
            self.trainer.train_rlhf(self.trainer.generate_experience(prompt_batch))
            for key in history.keys() & self.trainer.metrics.keys():
                history[key].append(self.trainer.metrics[key])
            done = self.trainer.iteration
            if done > self.args.ppo.critic_warmup_iterations and done % LOOK_EVERY == 0:
                course.append(self.look(done))
        return {
            "settings": self.args.to_dict(),
            "before": before,
            "ends": {name: self.evaluate(name) for name in MODELS},
            "course": course,
            "history": history,
            "seconds": time.process_time() - begin,
            "commit": pipeline.commit(),
        }


if __name__ == "__main__":
    source, output, changes = sys.argv[1:]
    result = PPORun(Path(source), json.loads(changes)).train()
    assert all(math.isfinite(value) for value in result["history"]["mixture/loss"])
    pipeline.write_json(Path(output), result)
