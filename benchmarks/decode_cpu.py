"""How fast does our decode loop sample on a CPU, next to transformers' `generate`?

Both sides sample from the same weights in the same process, in turns, so that whatever else the
machine does hits both; the table shows medians. Lengths are natural: no length is forced, EOS is
sampled. `--actor DIR` takes any causal LM directory that has a tokenizer (an SFT actor, say) and
prompts of the toy world. Without it a random Llama of the toy actor's shape is used, with a
direction of constant size in its residual stream, onto which the head's EOS row is laid.

    python benchmarks/decode_cpu.py [--actor DIR] [--repeats 9]

The result file keeps the last report of each actor: `random`, and directories by their name.

Shapes: B batch, P prompt, R response.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

from rlhf_kit.config import GenerationConfig
from rlhf_kit.hybrid_engine.decode import Decoder
from rlhf_kit.types import PromptBatch

RESULT = Path(__file__).parent / "results" / "decode_cpu.json"
ROWS, BATCH, LIMIT = 256, 64, 44
EOS, PAD = 2, 0


def random_actor(layers: int, eos_scale: float) -> Any:
    """A random Llama whose EOS has about the same probability at every position."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1536,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        direction = torch.nn.functional.normalize(torch.randn(128), dim=0)
        model.model.embed_tokens.weight += direction
        model.lm_head.weight[EOS] = eos_scale * direction
    return model


def random_prompts() -> PromptBatch:
    """256 prompts of 10 to 40 tokens, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(10, 41, (ROWS, 1), generator=generator)
    ids = torch.randint(3, 1536, (ROWS, 40), generator=generator)
    mask = torch.arange(40) >= 40 - lengths
    return PromptBatch(ids.masked_fill(~mask, PAD), mask, torch.arange(ROWS), ((),) * ROWS)


def toy_prompts(tokenizer: Any) -> PromptBatch:
    """256 prompts of the toy world."""
    from rlhf_kit.config import SourceConfig
    from rlhf_kit.datasets import load_source
    from rlhf_kit.tokenization import collate_prompts

    rows = load_source(SourceConfig("toy_world"), "ppo", rows=ROWS)
    return collate_prompts(tokenizer, rows.pairs, seeds=range(ROWS))


def load(actor: str | None, layers: int, eos_scale: float) -> tuple[Any, PromptBatch, Decoder]:
    if actor is None:
        model, prompts = random_actor(layers, eos_scale), random_prompts()
        return model, prompts, Decoder(model, eos_token_ids=[EOS], pad_token_id=PAD)
    from rlhf_kit.tokenization import load_tokenizer, stop_token_ids

    tokenizer = load_tokenizer(actor)
    model = transformers.AutoModelForCausalLM.from_pretrained(actor, dtype=torch.float32).eval()
    stop = stop_token_ids(tokenizer, model)
    decoder = Decoder(model, eos_token_ids=stop, pad_token_id=tokenizer.pad_token_id)
    return model, toy_prompts(tokenizer), decoder


def first(prompts: PromptBatch, begin: int, rows: int) -> PromptBatch:
    part = slice(begin, begin + rows)
    return PromptBatch(
        prompts.input_ids[part],
        prompts.attention_mask[part],
        prompts.seeds[part],
        prompts.dialogues[part],
    )


def plain(model: Any, batches: list[PromptBatch], decoder: Decoder, **options: Any) -> int:
    """transformers' `generate` on each batch in turn; returns the response tokens made."""
    tokens = 0
    for batch in batches:
        # As a user would: no column that is padding in the whole batch.
        used = int(batch.attention_mask.any(0).int().argmax())
        out = model.generate(
            batch.input_ids[:, used:],
            attention_mask=batch.attention_mask[:, used:].long(),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=LIMIT,
            eos_token_id=list(decoder.eos_token_ids),
            pad_token_id=decoder.pad_token_id,
            **options,
        )
        response = out[:, batch.input_ids.shape[1] - used :]
        is_eos = torch.isin(response, torch.tensor(decoder.eos_token_ids))
        tokens += int((is_eos.cumsum(1) - is_eos.int() == 0).sum())
    return tokens


def ours(prompts: PromptBatch, decoder: Decoder, repeat: int) -> int:
    seeds = prompts.seeds + repeat * 1_000_003
    batch = PromptBatch(prompts.input_ids, prompts.attention_mask, seeds, prompts.dialogues)
    rollout = decoder.generate(batch, GenerationConfig(max_new_tokens=LIMIT, slots=BATCH))
    return int(rollout.response_mask.sum())


def measure(sides: dict[str, Callable[[int], int]], repeats: int) -> dict[str, dict[str, float]]:
    """Seconds and response tokens of every side, the sides taking turns; round 0 warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    tokens = dict.fromkeys(sides, 0)
    for repeat in range(repeats + 1):
        torch.manual_seed(repeat)
        for name, side in sides.items():
            begin = time.perf_counter()
            made = side(repeat)
            if repeat:
                seconds[name].append(time.perf_counter() - begin)
                tokens[name] += made
    return {
        name: {
            "seconds": statistics.median(times),
            "fastest": min(times),
            "slowest": max(times),
            "new_tokens": tokens[name] / repeats,
        }
        for name, times in seconds.items()
    }


def hardware() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line for line in lines if line.startswith("model name")]
    return f"{names[0].split(':')[1].strip()}, {os.cpu_count()} cores" if names else "unknown"


def git(*words: str) -> str:
    out = subprocess.run(["git", *words], capture_output=True, text=True, cwd=RESULT.parent)
    return out.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--actor", help="a causal LM directory; default: a random Llama")
    parser.add_argument("--layers", type=int, default=4, help="of the random Llama")
    parser.add_argument("--eos-scale", type=float, default=0.72, help="of the random Llama")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()

    model, prompts, decoder = load(args.actor, args.layers, args.eos_scale)
    batches = [first(prompts, begin, BATCH) for begin in range(0, ROWS, BATCH)]
    one = batches[:1]
    static = {"cache_implementation": "static"}
    sides: dict[str, Callable[[int], int]] = {
        "256 prompts, generate": lambda _: plain(model, batches, decoder),
        "256 prompts, generate static": lambda _: plain(model, batches, decoder, **static),
        "256 prompts, ours": lambda repeat: ours(prompts, decoder, repeat),
        "64 prompts, generate": lambda _: plain(model, one, decoder),
        "64 prompts, generate static": lambda _: plain(model, one, decoder, **static),
        "64 prompts, ours": lambda repeat: ours(one[0], decoder, repeat),
    }
    results = measure(sides, args.repeats)

    print(f"{'':30} {'seconds':>8} {'responses/s':>12} {'mean length':>12} {'ours is':>8}")
    for name, result in results.items():
        rows = int(name.split()[0])
        result["responses_per_second"] = rows / result["seconds"]
        result["mean_length"] = result["new_tokens"] / rows
        result["ours_is"] = result["seconds"] / results[f"{rows} prompts, ours"]["seconds"]
        print(
            f"{name:30} {result['seconds']:8.3f} {result['responses_per_second']:12.0f} "
            f"{result['mean_length']:12.1f} {result['ours_is']:7.2f}x"
        )
    config = model.config
    report = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": git("rev-parse", "--short", "HEAD"),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "shape": {
            "layers": config.num_hidden_layers,
            "hidden": config.hidden_size,
            "vocabulary": config.vocab_size,
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        "max_new_tokens": LIMIT,
        "batch_and_slots": BATCH,
        "mean_prompt_length": float(prompts.attention_mask.sum(1).float().mean()),
        "repeats": args.repeats,
        "results": {
            name: {key: round(value, 4) for key, value in result.items()}
            for name, result in results.items()
        },
    }
    reports = json.loads(args.output.read_text()) if args.output.exists() else {}
    reports[Path(args.actor).name if args.actor else "random"] = report
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps(reports, indent=2) + "\n")
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
