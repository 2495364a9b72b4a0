"""What does the `consumer` preset take of a GPU with 24 GB? Minutes a step and peak memory.

    python benchmarks/consumer.py --shape qwen2.5-0.5b [--gpu-memory 24]
    python benchmarks/consumer.py --shape opt-1.3b

Notebooks 02, 03 and 04 run as they are, each by `rlhf_kit.launch.run_notebook`, as `rlhf-kit
train` does; of each a copy gets one cell before it, which forbids the process more memory than
such a GPU has, and one behind it, which writes its peak. No weights and no data are fetched: the
models have the shape of their names and random weights, so seconds and bytes are right and what
is learnt is nothing. Rows and responses are as long as the preset allows (random weights hardly
ever end a response), so both figures are the highest there can be.

The tokenizer is GPT-2's from RLHF_KIT_SHARED_DATA where that is set, else a small one trained on
such text; embedding and head have the size of the model's name either way. OPT-1.3B trains
adapters of rank 16: all its weights with AdamW's states would take 21 GB alone. A stage that
fails, for want of memory say, is noted, and the next one starts from what there is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
from shapes import causal_lm
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlhf_kit import pipeline
from rlhf_kit.launch import run_notebook
from rlhf_kit.metrics import read_metrics
from rlhf_kit.tokenization import encode_prompt, load_tokenizer, prepare_tokenizer
from rlhf_kit.toy_world import entities

RESULTS = Path(__file__).parent / "results"
LORA = {"actor_engine__lora__rank": 16, "critic_engine__lora__rank": 16}
CHANGES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {},
    "opt-1.3b": LORA,
    "tiny": {
        "data__max_prompt_length": 48,
        "data__max_length": 80,
        "generation__max_new_tokens": 16,
        "sft__batch_size": 16,
        "reward__batch_size": 16,
        "ppo__batch_size": 16,
        "ppo__minibatch_size": 8,
        **LORA,
    },
}
"""What the preset is changed in for each shape of `shapes.py`; `tiny` tries this script out."""
PROMPT = "Say this, number {:05d}: {}"
STAGES = {"02_sft": "sft", "03_reward_model": "reward", "04_ppo": "ppo"}
BEFORE = """
# %%
# Added by benchmarks/consumer.py
import torch

if torch.cuda.is_available():
    torch.cuda.set_per_process_memory_fraction({fraction}, 0)

"""
BEHIND = """

# %%
# Added by benchmarks/consumer.py
import json
import resource

from rlhf_kit.metrics import peak_memory

peak = {{"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}}
if torch.cuda.is_available():
    peak |= {{name: size / 2**30 for name, size in peak_memory().items()}}
with open({path!r}, "w") as file:
    json.dump(peak, file)
"""


# ---- what it trains on


def words(count: int, rng: Random) -> list[str]:
    return [rng.choice(entities.NOUNS) for _ in range(count)]


def long_text(longest: int, tokenizer: Any, rng: Random) -> str:
    """Words that make a prompt of nearly `longest` tokens, whatever its number."""
    longest -= 4  # five digits are one token to some vocabularies, and five to others
    said, over = words(longest, rng), 1
    while over > 0:  # a word has a few tokens at most
        dialogue = [{"role": "user", "content": PROMPT.format(0, " ".join(said))}]
        over = len(encode_prompt(tokenizer, dialogue)) - longest
        if over > 0:
            del said[-max(over // 2, 1) :]
    return " ".join(said)


def write_pairs(path: Path, rows: int, longest: int, tokenizer: Any) -> None:
    """Pairs with prompts of nearly `longest` tokens and with longer responses than fit."""
    rng = Random(0)
    texts = [long_text(longest, tokenizer, rng) for _ in range(32)]
    with open(path, "w", encoding="utf-8") as file:
        for number in range(rows):
            sides = {name: " ".join(words(2 * longest, rng)) for name in ("chosen", "rejected")}
            prompt = PROMPT.format(number, texts[number % len(texts)])
            file.write(json.dumps({"prompt": prompt, **sides}) + "\n")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's byte-level BPE where RLHF_KIT_SHARED_DATA has it, else one trained on such words."""
    shared = os.environ.get("RLHF_KIT_SHARED_DATA")
    if shared:
        folder = Path(shared) / "gpt2-bpe"
        bpe = Tokenizer(
            models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        )
    else:
        bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    if not shared:
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator([" ".join(words(20_000, Random(1)))], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")
    prepare_tokenizer(tokenizer)
    return tokenizer


def write_model(directory: Path, shape: str, tokenizer: Any) -> int:
    """Random weights of a shape, in bf16, as a directory; the number of parameters."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = causal_lm(shape, device=device, dtype=torch.bfloat16)
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id = None, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


# ---- the stages


def with_cells(notebook: Path, target: Path, fraction: float, peak: Path) -> None:
    """A copy of a notebook between two cells of ours."""
    text = notebook.read_text(encoding="utf-8")
    place = text.index('# %% tags=["parameters"]')
    before, behind = BEFORE.format(fraction=fraction), BEHIND.format(path=str(peak))
    target.write_text(text[:place] + before.lstrip() + text[place:] + behind, encoding="utf-8")


def seconds_a_step(run: Path, stage: str) -> list[float]:
    """By the stage's own log: PPO's phases, and the time from one line to the next elsewhere."""
    rows = read_metrics(run / stage)
    if stage == "ppo":
        return [
            sum(v for k, v in row.items() if k.startswith("phase/") and k.endswith("/seconds"))
            for row in rows
        ]
    times = {row["step"]: row["time"] for row in rows if "loss/train" in row}
    ordered = [times[step] for step in sorted(times)]
    return [later - earlier for earlier, later in zip(ordered, ordered[1:], strict=False)]


def measure(run: Path, name: str, stage: str, fraction: float) -> dict[str, Any]:
    """One stage, run by the launcher; where it fails, the last that it said."""
    script, peak = run / f"{name}.py", run / f"{name}.peak.json"
    with_cells(pipeline.NOTEBOOKS / f"{name}.py", script, fraction, peak)
    start = time.monotonic()
    log = run / "logs" / f"{name}.log"
    code = run_notebook(script, {"run_dir": str(run), "resume": False}, log=log)
    if code or not peak.is_file():
        return {"exit_code": code, "said": log.read_text(encoding="utf-8").splitlines()[-5:]}
    steps = seconds_a_step(run, stage)
    if not steps:
        return {"exit_code": code, "said": [f"{name} made too few steps to time one"]}
    # The first one warms up; PPO's is the critic's alone.
    steady = median(steps[1:] if len(steps) > 1 else steps)
    return {
        "seconds_in_all": round(time.monotonic() - start, 1),
        "timed_steps": len(steps),
        "seconds_a_step": round(steady, 3),
        "minutes_of_100_steps": round(100 * steady / 60, 2),
        "peak_gib": {k: round(v, 2) for k, v in json.loads(peak.read_text()).items()},
        "last_metrics": {
            key: value
            for key, value in read_metrics(run / stage)[-1].items()
            if key.startswith(("phase/", "perf/"))
        },
    }


def benchmark(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    changes = CHANGES[args.shape]
    run, model, pairs = folder / "run", folder / args.shape, folder / "pairs.jsonl"
    longest = changes.get("data__max_prompt_length", 256)
    batch = changes.get("ppo__batch_size", 128)
    needed = max(args.steps * changes.get("sft__batch_size", 64), batch)
    tokenizer = make_tokenizer()
    parameters = write_model(model, args.shape, tokenizer)
    # By the tokenizer as the notebooks load it: beside another architecture's config transformers
    # may split words otherwise than the one that was saved.
    tokenizer = load_tokenizer(str(model))
    write_pairs(pairs, 7 * needed, longest, tokenizer)  # two in ten rows are SFT's
    pipeline.open_run(
        run,
        preset_name="consumer",
        changes={
            "actor_model": str(model),
            "reward_model": str(model),
            "data__sources": [{"name": str(pairs)}],
            "data__rows": [needed, needed, needed],
            "ppo__iterations": args.steps,
            "ppo__critic_warmup_iterations": 1,
            **changes,
        },
        resume=False,
        command=" ".join(sys.argv),
    )
    total = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    fraction = min(args.gpu_memory * 1e9 / total, 1.0) if total else 1.0
    torch.cuda.empty_cache()  # what made the model must not count
    return {
        "shape": args.shape,
        "parameters": parameters,
        "changes": changes,
        "weights": "random",
        "tokenizer_size": len(tokenizer),
        "gpu": torch.cuda.get_device_name() if total else "none: " + platform.machine(),
        "allowed_gib": round(fraction * total / 2**30, 2),
        "stages": {stage: measure(run, name, stage, fraction) for name, stage in STAGES.items()},
        "faults": pipeline.read_faults(run),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": pipeline.commit(),
        "versions": pipeline.versions(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=CHANGES, default="qwen2.5-0.5b")
    parser.add_argument("--steps", type=int, default=3, help="optimiser steps, PPO iterations")
    parser.add_argument("--gpu-memory", type=float, default=24.0, help="GB (1e9 bytes) allowed")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: results/")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps must be at least 2: the first one warms up")
    output = args.output or RESULTS / f"consumer_{args.shape}.json"
    with tempfile.TemporaryDirectory() as folder:
        found = benchmark(args, Path(folder))
    output.parent.mkdir(parents=True, exist_ok=True)
    pipeline.write_json(output, found)
    failed = False
    for stage, figures in found["stages"].items():
        if "exit_code" in figures:
            failed = True
            print(f"{args.shape} {stage}: exit code {figures['exit_code']}", *figures["said"])
            continue
        peak, minutes = figures["peak_gib"], figures["minutes_of_100_steps"]
        memory = ", ".join(f"{name} {size:.1f} GiB" for name, size in peak.items())
        print(f"{args.shape} {stage}: {minutes:.1f} minutes for 100 steps; peak: {memory}")
    for fault in found["faults"]:
        print(fault["sentence"])
    print(f"written to {output}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
