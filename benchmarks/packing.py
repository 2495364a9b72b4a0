"""What does padding cost SFT and the reward model: random, length-bucketed, packed batches?

The toy actor's shape trains on real dialogues (HH pairs with `--pairs FILE`, else the toy world):
one forward and backward pass over the same rows, cut into steps in three ways. Ways take turns in
one process on one thread; seconds are the processor's, which other load on the machine hardly
touches, and ratios are of medians over the rounds. Packing puts several rows into one sequence,
with a block-diagonal attention mask and positions that begin anew for each row: for SFT alone,
here, and over the whole epoch, a step having as many tokens as those of the other ways. The
losses of all ways agree, which is asserted.

    python benchmarks/packing.py [--pairs FILE] [--rows 256] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from rlhf_kit.batch_order import epoch_order, length_bucketed_batches
from rlhf_kit.blending import Blend
from rlhf_kit.config import DataConfig, SourceConfig
from rlhf_kit.functional import language_model_loss, pairwise_loss
from rlhf_kit.models import load_causal_lm, load_scorer, position_ids, resolve_model
from rlhf_kit.reward import last_token_scores, prompt_batches
from rlhf_kit.sft import language_model_forward
from rlhf_kit.tokenization import (
    Encoded,
    collate_pairs,
    collate_sft,
    encode_demonstrations,
    encode_pairs,
    load_tokenizer,
    prepare_tokenizer,
)

RESULT = Path(__file__).parent / "results" / "packing.json"
BATCH, MAX_LENGTH = 16, 512
Indices = Sequence[Sequence[int]]


def padding(batches: Indices, lengths: Sequence[int]) -> float:
    """Share of the computed tokens that are PAD."""
    width = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths[i] for batch in batches for i in batch) / width


def packed(batch: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Rows in as few sequences of MAX_LENGTH tokens as first-fit decreasing finds."""
    room = max(MAX_LENGTH, max(lengths[i] for i in batch))
    bins: list[list[int]] = []
    for row in sorted(batch, key=lambda i: -lengths[i]):
        fits = (b for b in bins if sum(lengths[i] for i in b) + lengths[row] <= room)
        home = next(fits, None)
        if home is None:
            bins.append([row])
        else:
            home.append(row)
    return bins


def packed_loss(model: Any, rows: Sequence[Encoded], bins: Indices, tokens: float, pad: int) -> Any:
    """The loss of rows that share sequences, each attending to itself alone."""
    width = max(sum(rows[i].length for i in b) for b in bins)
    ids = torch.full((len(bins), width), pad)
    owner = torch.full((len(bins), width), -1)
    positions = torch.zeros((len(bins), width), dtype=torch.int64)
    counts = torch.zeros((len(bins), width), dtype=torch.bool)
    for number, members in enumerate(bins):
        start = 0
        for member in members:
            row = rows[member]
            place = slice(start, start + row.length)
            ids[number, place] = torch.tensor(row.input_ids)
            owner[number, place] = member
            positions[number, place] = torch.arange(row.length)
            counts[number, start + max(row.prompt_length, 1) : start + row.length] = True
            start += row.length
    same = owner.unsqueeze(2) == owner.unsqueeze(1)
    mask = (same & torch.ones(width, width, dtype=torch.bool).tril()).unsqueeze(1)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return language_model_loss(logits.logits, ids, counts, denominator=tokens)


def sft_ways(rows: Sequence[Encoded], tokenizer: Any) -> tuple[dict[str, Callable], dict]:
    """For each way a function that runs one pass and returns its loss; and the padding shares."""
    model = load_causal_lm(resolve_model("toy_world"), tokenizer).train()
    pad = tokenizer.pad_token_id
    lengths = [row.length for row in rows]
    tokens = float(sum(row.length - max(row.prompt_length, 1) for row in rows))
    order = epoch_order(len(rows), seed=1, epoch=0)
    random = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    bucketed = length_bucketed_batches(lengths, BATCH, seed=1, epoch=0)
    every = packed(order, lengths)  # of the whole epoch: the least padding there can be
    together = max(1, round(BATCH * sum(lengths) / len(lengths) / MAX_LENGTH))  # as many tokens
    bins = [every[i : i + together] for i in range(0, len(every), together)]

    def padded(batches: Indices) -> float:
        total = 0.0
        for batch in batches:
            made = collate_sft([rows[i] for i in batch], pad_token_id=pad)
            logits = language_model_forward(model, made)
            loss = language_model_loss(logits, made.input_ids, made.loss_mask, denominator=tokens)
            loss.backward()
            total += float(loss.detach())
        return total

    def in_bins() -> float:
        total = 0.0
        for batch in bins:
            loss = packed_loss(model, rows, batch, tokens, pad)
            loss.backward()
            total += float(loss.detach())
        return total

    filled = [[sum(lengths[i] for i in members) for members in batch] for batch in bins]
    ways = {
        "random": lambda: padded(random),
        "bucketed": lambda: padded(bucketed),
        "packed": in_bins,
    }
    shares = {
        "random": padding(random, lengths),
        "bucketed": padding(bucketed, lengths),
        "packed": 1 - sum(map(sum, filled)) / sum(len(f) * max(f) for f in filled),
    }
    return ways, shares


def reward_ways(pairs: Sequence[Any], tokenizer: Any) -> tuple[dict[str, Callable], dict]:
    """The same for preference pairs; `bucketed` is what the library's `prompt_batches` gives."""
    torch.manual_seed(0)
    model = load_scorer(resolve_model("toy_world"), tokenizer).train()
    order = epoch_order(len(pairs), seed=1, epoch=0)
    batches = {
        "random": [order[i : i + BATCH] for i in range(0, len(order), BATCH)],
        "bucketed": prompt_batches(pairs, BATCH, seed=1, epoch=0),
    }

    def run(chosen: Indices) -> float:
        total = 0.0
        for batch in chosen:
            made = collate_pairs([pairs[i] for i in batch], pad_token_id=tokenizer.pad_token_id)
            hidden = model.model(
                input_ids=made.input_ids,
                attention_mask=made.attention_mask,
                position_ids=position_ids(made.attention_mask),
                use_cache=False,
            ).last_hidden_state
            scores = last_token_scores(model.score(hidden).squeeze(-1), made.last_index)
            better, worse = scores.chunk(2)
            loss, _ = pairwise_loss(
                better, worse, denominator=float(len(pairs)), margin=0.0, center_coef=0.0
            )
            loss.backward()
            total += float(loss.detach())
        return total

    def share(chosen: Indices) -> float:
        lengths = [side.length for pair in pairs for side in (pair.chosen, pair.rejected)]
        return padding([[2 * i + s for i in b for s in (0, 1)] for b in chosen], lengths)

    ways = {name: lambda chosen=chosen: run(chosen) for name, chosen in batches.items()}
    return ways, {name: share(chosen) for name, chosen in batches.items()}


def measure(ways: dict[str, Callable], shares: dict, rounds: int) -> dict[str, Any]:
    """Processor seconds of each way, in turns; asserts that their losses agree."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    losses: dict[str, float] = {}
    for turn in range(rounds + 1):  # the first warms up
        for name, run in ways.items():
            start = time.process_time()
            losses[name] = run()
            if turn:
                seconds[name].append(time.process_time() - start)
    first = next(iter(losses.values()))
    assert all(abs(loss - first) < 1e-4 * abs(first) for loss in losses.values()), losses
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        name: {
            "padding": shares[name],
            "seconds": seconds[name],
            "loss": losses[name],
            "speedup_over_random": medians["random"] / medians[name],
        }
        for name in ways
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="random, bucketed and packed batches")
    parser.add_argument("--pairs", help="a data source; default: the toy world")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(resolve_model("toy_world"))
    prepare_tokenizer(tokenizer)
    source = SourceConfig(arguments.pairs or "toy_world")
    data = DataConfig(sources=(source,), rows=(0, arguments.rows * 2, 0), split=(0.0, 1.0, 0.0))
    blend = Blend(data, 1)["reward"]
    demonstrations = encode_demonstrations(tokenizer, blend, data).rows[: arguments.rows]
    pairs = encode_pairs(tokenizer, blend, data).rows[: arguments.rows]
    report = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "source": Path(source.name).name,
        "rows": len(demonstrations),
        "batch": BATCH,
        "mean_tokens": statistics.mean(row.length for row in demonstrations),
        "sft": measure(*sft_ways(demonstrations, tokenizer), arguments.rounds),
        "reward": measure(*reward_ways(pairs, tokenizer), arguments.rounds),
    }
    for stage in ("sft", "reward"):
        for name, found in report[stage].items():
            print(
                f"{stage:6s} {name:8s} {found['padding']:5.1%} padding, "
                f"{statistics.median(found['seconds']):6.2f} s, "
                f"{found['speedup_over_random']:.2f} x random"
            )
    reports = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    RESULT.write_text(json.dumps({**reports, report["source"]: report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
