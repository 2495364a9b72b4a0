"""A whole PPO step: plain PyTorch with transformers' `generate`, and ours, side by side.

    python benchmarks/ppo_step.py CASE [CASE ...] [--who peer ours] [--output FILE]

Random weights, bf16, prompts of 256 tokens, up to 256 new ones at temperature 1, one update a
batch, no average of the weights. The peer is the same step as it is usually written: four
models, static cache, all logits at once, padding computed; what its users would wait for.

On several GPUs each rank takes a case's batch: `torchrun --nproc-per-node 2 benchmarks/ppo_step.py
opt-1.3b-zero2`.

A case with `cap` limits the memory that PyTorch may take, as on a smaller card. `ragged` cases
draw responses that end by an EOS, about 96 tokens long on average.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from shapes import (
    SHAPES,
    causal_lm,
    environment,
    prompts,
    scorer,
    word_tokenizer,
    write_config,
)
from torch import Tensor, nn

from rlhf_kit import distributed, rlhf_engine
from rlhf_kit.config import (
    EMAConfig,
    EngineConfig,
    GenerationConfig,
    LoRAConfig,
    MemoryConfig,
    MixtureConfig,
    PPOConfig,
    RewardConfig,
    RunConfig,
    override,
    preset,
)
from rlhf_kit.hybrid_engine.training import start_deepspeed
from rlhf_kit.ppo import PPOTrainer
from rlhf_kit.types import PromptBatch

PROMPT, NEW = 256, 256
EOS, PAD = 2, 1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


@dataclass(frozen=True)
class Case:
    """One step to measure; sizes are those of one rank."""

    actor: str = "opt-1.3b"
    critic: str = "opt-350m"
    batch: int = 256
    micro_batch: int = 32
    slots: int = 256
    ragged: bool = False
    cap: float = 0.0
    """Gigabytes (1e9 bytes) that PyTorch may take; 0 is all there is."""
    iterations: int = 2
    """The first one compiles and is not counted."""
    changes: tuple[tuple[str, Any], ...] = ()
    """Settings of the run, by dotted name."""


LEAN = (
    ("actor_engine.lora.rank", 8),
    ("actor_engine.lora.merge", False),
    ("actor_engine.gradient_checkpointing", True),
    ("critic_engine.lora.rank", 8),
    ("critic_engine.gradient_checkpointing", True),
)
"""Adapters on a frozen base, which is the ref too; layers computed again in the backward pass."""
CASES: dict[str, Case] = {
    "tiny": Case("tiny", "tiny", batch=8, micro_batch=4, slots=4),
    "opt-1.3b": Case(iterations=3, micro_batch=64),
    "opt-1.3b-ragged": Case(
        batch=1024,
        slots=512,
        ragged=True,
        iterations=4,
        changes=(("ppo.micro_batch_tokens", 32768),),
    ),
    "opt-1.3b-zero2": Case(changes=(("actor_engine.zero_stage", 2),)),
    "opt-1.3b-zero3-tp2": Case(
        changes=(("actor_engine.zero_stage", 3), ("actor_engine.generation_tp", 2))
    ),
    "opt-13b-zero3-tp2": Case(
        "opt-13b",
        batch=32,
        micro_batch=4,
        slots=32,
        changes=(
            *LEAN,
            ("actor_engine.zero_stage", 3),
            ("actor_engine.generation_tp", 2),
        ),
    ),
    "opt-6.7b-24gb": Case("opt-6.7b", batch=32, micro_batch=4, slots=16, cap=24, changes=LEAN),
    "opt-6.7b-48gb": Case("opt-6.7b", batch=64, micro_batch=8, slots=64, cap=48, changes=LEAN),
    "opt-13b-48gb": Case("opt-13b", batch=32, micro_batch=4, slots=32, cap=48, changes=LEAN),
    "opt-13b-80gb": Case("opt-13b", batch=64, micro_batch=8, slots=64, cap=80, changes=LEAN),
    "opt-13b-lora": Case(
        "opt-13b",
        batch=128,
        micro_batch=8,
        slots=64,
        changes=(
            *LEAN,
            ("actor_engine.lora.merge", True),
            ("actor_engine.gradient_checkpointing", False),
        ),
    ),
    "opt-30b-80gb": Case("opt-30b", batch=16, micro_batch=2, slots=8, cap=80, changes=LEAN),
}


def run_config(case: Case, folder: Path) -> RunConfig:
    """`folder` takes the models' configurations, for the prediction of memory."""
    ranks = distributed.world_size()
    engine = EngineConfig(zero_stage=1, dtype="bf16" if DEVICE == "cuda" else "fp32")
    config = dataclasses.replace(
        preset("consumer"),
        actor_model=write_config(case.actor, folder),
        reward_model=write_config(case.critic, folder),
        reward=RewardConfig(init_from="base"),
        actor_engine=dataclasses.replace(engine, lora=LoRAConfig(rank=0)),
        critic_engine=engine,
        memory=MemoryConfig(),
        generation=GenerationConfig(max_new_tokens=NEW, slots=case.slots),
        ppo=PPOConfig(
            iterations=case.iterations,
            batch_size=case.batch * ranks,
            minibatch_size=case.batch * ranks,
            micro_batch_size=case.micro_batch,
            old_logprobs="rollout",
            mixture=MixtureConfig(kind="none"),
            ema=EMAConfig(enabled=False),
        ),
    )
    return override(config, **{name.replace(".", "__"): value for name, value in case.changes})


def batches(case: Case, vocabulary: int) -> list[PromptBatch]:
    ranks, rank = distributed.world_size(), distributed.rank()
    numbers = [i * ranks + rank + 1 for i in range(case.iterations)]
    return [prompts(case.batch, PROMPT, vocabulary, seed=number) for number in numbers]


@torch.no_grad()
def end_by_chance(model: Any, mean: float) -> None:
    """Give the EOS about probability 1 / mean everywhere: the bias of the last norm points to it.

    The tied embedding of the EOS is made to stand along one direction u, and the bias of the
    last LayerNorm is moved along u until its logit is that much above the other tokens'.
    """
    norm = model.model.decoder.final_layer_norm
    embedding = model.get_input_embeddings().weight
    u = F.normalize(torch.randn(embedding.shape[1], device=embedding.device), dim=0)
    embedding[EOS] = (0.1 * u).to(embedding.dtype)
    ids = torch.randint(10, len(embedding) - 10, (8, 64), device=embedding.device)
    for _ in range(4):
        logits = model(input_ids=ids, use_cache=False).logits.float()
        others = logits.clone()
        others[..., EOS] = -torch.inf
        gap = (others.logsumexp(-1) - logits[..., EOS]).mean() - torch.log(torch.tensor(mean - 1))
        norm.bias += (gap / 0.1 * u).to(norm.bias.dtype)


def build_actor(case: Case) -> Any:
    model = causal_lm(case.actor, device=DEVICE, dtype=DTYPE)
    if case.ragged:
        end_by_chance(model, 96.0)
    return model


def ours(case: Case) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return _ours(case, run_config(case, Path(folder)))


def _ours(case: Case, config: RunConfig) -> dict[str, Any]:
    tokenizer = word_tokenizer()
    # Built in place instead of loaded: the weights are random, the code behind is the same.
    rlhf_engine.load_causal_lm = lambda *_, **__: build_actor(case)
    rlhf_engine.load_scorer = lambda *_, **__: scorer(case.critic, device=DEVICE, dtype=DTYPE)
    rlhf_engine._tokenizer_of = lambda *_: tokenizer
    engine = rlhf_engine.RLHFEngine(
        actor_model_name_or_path="actor",
        critic_model_name_or_path="critic",
        tokenizer=tokenizer,
        num_total_iters=case.iterations,
        args=config,
    )
    trainer = PPOTrainer(engine=engine, args=config)
    rows = []
    memory: dict[str, float] = {}
    for batch in batches(case, SHAPES[case.actor][1]["vocab_size"]):
        begin = now()
        experience = trainer.generate_experience(batch)
        metrics = trainer.step(experience)
        seconds = now() - begin
        stats = engine.actor.last_stats
        memory = memory or {k: v for k, v in metrics.items() if k.startswith("memory/")}
        rows.append(
            {
                "seconds": seconds,
                "generate": metrics["phase/generate/seconds"],
                "score": metrics["phase/score/seconds"],
                "train": metrics["phase/train/seconds"],
                "rollout_tokens": stats.new_tokens,
                "occupancy": stats.occupancy,
                "prompts": stats.prompt_seconds,
                "captures": stats.capture_seconds,
                "peak_bytes": max(
                    (int(v * 2**30) for k, v in metrics.items() if k.endswith("/peak_gib")),
                    default=0,
                ),
                "logprob_gap_mean": metrics["engine/logprob_gap_mean"],
            }
        )
    return {**summary("ours", case, rows), "memory": memory}


class Scorer(nn.Module):
    """A scalar for every token, as the peer has it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = scorer(name, device=DEVICE, dtype=DTYPE)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        return self.model.score(hidden.last_hidden_state).squeeze(-1)


def peer(case: Case) -> dict[str, Any]:
    """PPO as it is written without a library, with transformers' compiled static cache."""
    actor, ref = build_actor(case), build_actor(case)
    critic, reward = Scorer(case.critic), Scorer(case.critic)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-6, fused=True) for m in (actor, critic)]

    def logprobs(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        return F.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]

    def generate(part: Tensor) -> Tensor:
        return actor.generate(
            input_ids=part, attention_mask=torch.ones_like(part), max_new_tokens=NEW,
            do_sample=True, top_k=0, pad_token_id=PAD, eos_token_id=EOS,
            cache_implementation="static",
        )  # fmt: skip

    rows = []
    made = batches(case, SHAPES[case.actor][1]["vocab_size"])
    generate(made[0].input_ids[:256].to(DEVICE))  # compiles
    for batch in made[: 1 if case.ragged else None]:
        reset_peak()
        begin = now()
        ids = batch.input_ids.to(DEVICE)
        with torch.no_grad():
            parts = [generate(part) for part in ids.split(256)]
            padded = [F.pad(p, (0, PROMPT + NEW - p.shape[1]), value=PAD) for p in parts]
            sequences = torch.cat(padded)
        mask = (sequences != PAD).long()
        generated = now()
        old, base, values, scores = [], [], [], []
        with torch.no_grad():
            for at in torch.arange(len(ids)).split(case.micro_batch):
                part, m = sequences[at], mask[at]
                old.append(logprobs(actor, part, m))
                base.append(logprobs(ref, part, m))
                values.append(critic(part, m)[:, :-1])
                scores.append(reward(part, m)[:, -1])
        old_, base_, values_, scores_ = map(torch.cat, (old, base, values, scores))
        start, last = PROMPT - 1, torch.zeros(len(ids), device=DEVICE)
        shaped = -0.1 * (old_ - base_)
        shaped[:, -1] += scores_.clamp(-5, 5)
        steps = []
        for t in reversed(range(start, shaped.shape[1])):
            after = values_[:, t + 1] if t + 1 < shaped.shape[1] else 0.0
            last = shaped[:, t] + after - values_[:, t] + 0.95 * last
            steps.append(last)
        advantages = torch.stack(steps[::-1], 1)
        returns = advantages + values_[:, start:]
        scored = now()
        for at in torch.arange(len(ids)).split(case.micro_batch):
            new = logprobs(actor, sequences[at], mask[at])[:, start:]
            ratio, a = (new - old_[at][:, start:]).exp(), advantages[at]
            loss = torch.max(-a * ratio, -a * ratio.clamp(0.8, 1.2)).mean()
            (loss * len(at) / len(ids)).backward()
            value = critic(sequences[at], mask[at])[:, :-1][:, start:]
            (0.5 * (value - returns[at]).square().mean() * len(at) / len(ids)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        end = now()
        rows.append(
            {
                "seconds": end - begin,
                "generate": generated - begin,
                "score": scored - generated,
                "train": end - scored,
                "rollout_tokens": int((sequences[:, PROMPT:] != PAD).sum()),
                "peak_bytes": peak(),
            }
        )
    return summary("peer", case, rows)


def summary(who: str, case: Case, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of all iterations but the first, which compiles, where there are more."""
    found = {key: statistics.median(row[key] for row in rows[1:] or rows) for key in rows[0]}
    found["ranks"] = distributed.world_size()
    pairs = case.batch * found["ranks"]
    found["pairs_per_second"] = pairs / found["seconds"]
    found["rollout_pairs_per_second"] = pairs / found["generate"]
    found["first_seconds"] = rows[0]["seconds"]
    found["peak_bytes"] = max(row["peak_bytes"] for row in rows)
    distributed.print_main(
        f"{who}: {found['pairs_per_second']:.1f} pairs/s, {found['seconds']:.2f} s (generate "
        f"{found['generate']:.2f}, score {found['score']:.2f}, train {found['train']:.2f}), first "
        f"{found['first_seconds']:.1f} s, {found['rollout_tokens'] / pairs:.0f} tokens a "
        f"response, peak {found['peak_bytes'] / 1e9:.1f} GB"
    )
    return found


def now() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak() -> None:
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak() -> int:
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="+", choices=CASES)
    parser.add_argument("--who", nargs="+", choices=["peer", "ours"], default=["ours"])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/ppo_step.json"))
    args = parser.parse_args()
    start_deepspeed()
    results = json.loads(args.output.read_text()) if args.output.is_file() else {}
    for name in args.cases:
        case = CASES[name]
        distributed.print_main(f"{name}: {case}")
        if case.cap:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, case.cap * 1e9 / total))
        found: dict[str, Any] = {**environment(), **dataclasses.asdict(case)}
        for who in args.who:
            try:
                found[who] = {"peer": peer, "ours": ours}[who](case)
            except (torch.OutOfMemoryError, ValueError) as error:
                found[who] = {"failed": str(error).splitlines()[0]}
                print(f"{who} failed: {found[who]['failed']}", flush=True)
            gc.collect()
            torch.compiler.reset()
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
        results[name] = found
        if not distributed.is_main_rank():
            continue
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
