"""`rlhf-kit train` from the outside: real data, exports that stand alone, bad input."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from conftest import shared_data

from rlhf_kit.tokenization import load_tokenizer, prepare_tokenizer

SMALL = {
    "data.max_prompt_length": 160,
    "data.max_length": 200,
    "data.rows": "[64,32,64]",
    "generation.max_new_tokens": 12,
    "sft.batch_size": 16,
    "sft.micro_batch_size": 16,
    "reward.batch_size": 8,
    "reward.micro_batch_size": 8,
    "ppo.iterations": 2,
    "ppo.critic_warmup_iterations": 0,
    "ppo.batch_size": 8,
    "ppo.minibatch_size": 4,
    "ppo.micro_batch_size": 4,
    "evaluation.prompts": 8,
    "evaluation.bootstrap": 100,
    "evaluation.samples": 2,
}

PLAIN = """
import sys, json, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
run = sys.argv[1]
result = {}
for name in ("sft/final", "ppo/final", "ppo/ema"):
    tokenizer = AutoTokenizer.from_pretrained(f"{run}/{name}")
    model = AutoModelForCausalLM.from_pretrained(f"{run}/{name}")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True)
    result[name] = text
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert torch.isfinite(model(ids).logits).all()
scorer = AutoModelForSequenceClassification.from_pretrained(f"{run}/reward/final", num_labels=1)
assert scorer(ids).logits.shape == (1, 1)
assert scorer.config.score_std > 0
assert "rlhf_kit" not in sys.modules
print(json.dumps(result))
"""


def command(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rlhf_kit.cli", *words], capture_output=True, text=True, cwd=cwd
    )


def settings(**changes: Any) -> list[str]:
    values = {**SMALL, **{key.replace("__", "."): value for key, value in changes.items()}}
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def test_all_stages_train_an_opt_actor_and_a_smaller_reward_model_on_real_dialogues(
    tmp_path: Path,
):
    source = shared_data() / "hh-rlhf-harmless" / "pairs.jsonl.gz"
    words = shared_data() / "gpt2-bpe"
    if not (source.is_file() and words.is_dir()):
        pytest.skip("set RLHF_KIT_SHARED_DATA to a directory with hh-rlhf-harmless and gpt2-bpe")
    for name, hidden, layers in (("actor", 32, 2), ("scorer", 16, 1)):
        tokenizer = load_tokenizer(words)
        prepare_tokenizer(tokenizer)
        config = transformers.OPTConfig(
            vocab_size=50272,
            hidden_size=hidden,
            word_embed_proj_dim=hidden,
            ffn_dim=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=256,
        )
        transformers.OPTForCausalLM(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    run = tmp_path / "run"
    done = command(
        "train",
        "--preset=toy",
        f"--actor-model={tmp_path / 'actor'}",
        f"--reward-model={tmp_path / 'scorer'}",
        f"--data={source}",
        f"--output-dir={run}",
        *settings(reward__init_from="base", data__split="[4,3,3]"),
    )
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    report = json.loads((run / "report.json").read_text())
    assert 0 <= report["reward_model"]["accuracy"] <= 1
    assert report["seconds"]["total"] > 0
    assert "gold" not in report or not report["gold"]
    loaded = subprocess.run(
        [sys.executable, "-c", PLAIN, str(run)], capture_output=True, text=True, check=False
    )
    assert loaded.returncode == 0, loaded.stderr[-2000:]
    assert all(text.endswith("Assistant:") for text in json.loads(loaded.stdout).values())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data=missing.jsonl"], "missing.jsonl does not exist"),
        (["--preset=huge"], "invalid choice: 'huge'"),
        (["--colour=red"], "unrecognized arguments: --colour=red"),
        (["--set", "ppo.colour=red"], "unknown setting ppo.colour"),
        (["--set", "ppo.batch_size=60"], "60 is not a multiple of 32"),
        (["--set", "ppo.kl.coef=much"], "ppo.kl.coef must be of type float"),
        (["--actor-model=./nowhere"], "model directory ./nowhere does not exist"),
        (["--set", "generation.top_k=5"], "must be off in a run"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_two_and_writes_no_model(
    words: list[str], sentence: str, tmp_path: Path
):
    run = tmp_path / "run"
    preset = [] if any(word.startswith("--preset") for word in words) else ["--preset=toy"]
    done = command("train", *preset, f"--output-dir={run}", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not run.exists()


def write(path: Path, rows: list[Any]) -> Path:
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "is empty"),
        ([{"question": "a", "answer": "b"}], "question"),
        ([{"prompt": "", "chosen": "a", "rejected": "b"}], "none of its 1 rows can be used"),
        ([{"prompt": "p " * 500, "chosen": "a", "rejected": "b"}] * 3, "max_prompt_length"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence_and_exit_code_two(
    rows: list[Any], sentence: str, tmp_path: Path
):
    source = write(tmp_path / "rows.jsonl", rows)
    run = tmp_path / "run"
    done = command(
        "train",
        "--preset=toy",
        f"--output-dir={run}",
        f"--data={source}",
        *settings(data__split="[1,0,0]", data__eval_share="0.0"),
    )
    assert done.returncode == 2, done.stdout[-500:] + done.stderr[-500:]
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not run.exists()


def test_a_model_directory_without_a_tokenizer_is_refused(tmp_path: Path, model_dir: Any):
    model = tmp_path / "model"
    transformers.AutoModelForCausalLM.from_pretrained(model_dir()).save_pretrained(model)
    done = command("train", "--preset=toy", f"--actor-model={model}", f"--output-dir={tmp_path}/r")
    assert done.returncode == 2
    assert "holds no tokenizer" in done.stderr


def test_an_output_directory_in_use_is_refused_and_left_alone(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("all my work")
    done = command("train", "--preset=toy", f"--output-dir={tmp_path}")
    assert done.returncode == 2
    assert "is in use" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
