"""Make the toy world's base model, tokenizer included, from one seed.

    python -m rlhf_kit.toy_world.base_model --output-dir runs/base --preset gpu
    python -m rlhf_kit.toy_world.base_model --evaluate rlhf_kit/toy_world/base

Shapes: B batch, T sequence, V vocabulary, N tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from rlhf_kit.toy_world import BASE_DIR
from rlhf_kit.toy_world.base_evaluation import evaluate, mean_accuracy
from rlhf_kit.toy_world.corpus import build_corpus
from rlhf_kit.toy_world.tokenizer import train_tokenizer


@dataclass(frozen=True)
class Recipe:
    """How the base model is made."""

    steps: int
    batch_size: int
    lr: float
    device: str
    layers: int = 4
    hidden: int = 128
    sequence_length: int = 128
    """T of a training row; rows are cut out of the corpus without regard to documents."""
    corpus_tokens: int = 250_000_000
    """Distinct tokens; training goes over them again when it needs more."""
    weight_decay: float = 0.05
    warmup: int = 200
    processes: int = 2
    """Processes that write the corpus."""
    compile_mode: str | None = None
    """Mode of `torch.compile`; None leaves the model as it is."""
    seed: int = 0


PRESETS = {
    "gpu": Recipe(
        steps=45_000,
        batch_size=64,
        lr=4e-3,
        device="cuda",
        processes=15,
        compile_mode="reduce-overhead",
    ),
    "cpu": Recipe(steps=24_000, batch_size=16, lr=3e-3, device="cpu", corpus_tokens=50_000_000),
}


def make_base_model(recipe: Recipe, output_dir: Path) -> None:
    """Train the tokenizer, write the corpus, train the model; save all in HF format."""
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("This recipe needs a CUDA device and there is none; use --preset cpu.")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the corpus is written by processes instead
    output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(seed=recipe.seed)
    tokenizer.save_pretrained(output_dir)
    ids, loss_mask = build_corpus(
        str(output_dir / "tokenizer.json"),
        tokens=recipe.corpus_tokens,
        seed=recipe.seed,
        processes=recipe.processes,
    )
    print(f"corpus: {len(ids):,} tokens, {loss_mask.mean():.0%} of them in the loss", flush=True)
    model = new_model(recipe, tokenizer)
    train(model, ids, loss_mask, recipe)
    model.bfloat16().save_pretrained(output_dir)
    (output_dir / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")


def new_model(recipe: Recipe, tokenizer) -> LlamaForCausalLM:
    """An untrained Llama in fp32, on the CPU."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=3 * recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    return model


def train(model: LlamaForCausalLM, ids: np.ndarray, loss_mask: np.ndarray, recipe: Recipe) -> None:
    """AdamW with warm-up and linear decay; on a GPU the forward pass runs in bf16."""
    device = torch.device(recipe.device)
    model.to(device)  # pyright: ignore[reportArgumentType]
    model.train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay, fused=True
    )

    def loss_of(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits  # [B, T, V]
        losses = functional.cross_entropy(
            logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
        counts = mask[:, 1:].flatten()
        return (losses * counts).sum() / counts.sum()

    compute_loss = loss_of
    if recipe.compile_mode is not None:
        compute_loss = torch.compile(loss_of, mode=recipe.compile_mode)
    started = time.perf_counter()
    for step, (tokens, mask) in enumerate(_batches(ids, loss_mask, recipe, device)):
        lr = recipe.lr * min((step + 1) / recipe.warmup, 1 - step / recipe.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.compiler.cudagraph_mark_step_begin()
        loss = compute_loss(tokens, mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 500 == 0 or step == recipe.steps - 1:
            seconds = time.perf_counter() - started
            speed = (step + 1) * recipe.batch_size * recipe.sequence_length / seconds
            print(
                f"step {step}: loss {loss:.4f}, {speed:,.0f} tokens/s, {seconds:.0f} s", flush=True
            )
    model.eval()


def _batches(
    ids: np.ndarray, loss_mask: np.ndarray, recipe: Recipe, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows of T + 1 tokens in a new random order every epoch."""
    length = recipe.sequence_length
    rows = (len(ids) - 1) // length
    if rows < recipe.batch_size:
        raise ValueError(f"The corpus has {rows} rows, fewer than one batch; raise corpus_tokens.")
    tokens = torch.from_numpy(ids.astype(np.int16)).to(device)  # the vocabulary fits 15 bits
    mask = torch.from_numpy(loss_mask).to(device)
    offsets = torch.arange(length + 1, device=device)
    generator = torch.Generator().manual_seed(recipe.seed)
    order = torch.empty(0, dtype=torch.long, device=device)
    for _ in range(recipe.steps):
        if len(order) < recipe.batch_size:
            order = torch.randperm(rows, generator=generator).to(device)
        starts, order = order[: recipe.batch_size], order[recipe.batch_size :]
        index = starts[:, None] * length + offsets
        yield tokens[index].long(), mask[index]


def report(directory: Path, device: str, per_family: int) -> None:
    """Print accuracy per family on "test" tasks."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.to(device)  # pyright: ignore[reportArgumentType]
    model.eval()
    table = evaluate(model, tokenizer, per_family=per_family)
    print("| family | answers | verdicts |\n|---|---|---|")
    for family, (answers, verdicts) in {**table, "mean": mean_accuracy(table)}.items():
        print(f"| {family} | {answers:.3f} | {verdicts:.3f} |")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the toy world's base model.")
    parser.add_argument("--output-dir", type=Path, default=BASE_DIR, help="make the model there")
    parser.add_argument("--evaluate", type=Path, metavar="DIR", help="only evaluate the one in DIR")
    parser.add_argument("--preset", choices=PRESETS, default="gpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="instead of the preset's")
    parser.add_argument("--layers", type=int, help="instead of the preset's")
    parser.add_argument("--per-family", type=int, default=100, help="test tasks a family")
    options = parser.parse_args(arguments)
    recipe = PRESETS[options.preset]
    changes = {"seed": options.seed, "steps": options.steps, "layers": options.layers}
    recipe = replace(recipe, **{name: v for name, v in changes.items() if v is not None})
    if options.evaluate is None:
        make_base_model(recipe, options.output_dir)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report(options.evaluate or options.output_dir, device, options.per_family)


if __name__ == "__main__":
    main()
