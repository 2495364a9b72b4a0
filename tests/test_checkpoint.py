"""Exports as another program sees them: plain transformers, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import copied, prompt_rows, same_weights
from transformers import AutoModelForCausalLM

from rlhf_kit import checkpoint, integrity
from rlhf_kit.checkpoint import export, is_complete, read_marker, verify
from rlhf_kit.config import DataConfig, EngineConfig, LoRAConfig, OptimizerConfig, SFTConfig
from rlhf_kit.hybrid_engine.training import TrainingEngine
from rlhf_kit.models import add_lora, load_causal_lm, load_scorer
from rlhf_kit.sft import SFTTrainer
from rlhf_kit.tokenization import encode_demonstrations, encode_dialogue, encode_prompt

ModelDir = Callable[..., str]
IDS = list(range(3, 24))
READER = """
import json, sys, torch, transformers
assert "rlhf_kit" not in sys.modules
result = {}
for directory, kind in json.loads(sys.argv[1]):
    auto = getattr(transformers, "AutoModelFor" + kind)
    model, info = auto.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([json.loads(sys.argv[2])])).logits
    result[directory] = {
        "logits": logits.flatten().tolist(),
        "chat": tokenizer.apply_chat_template(chat, tokenize=False),
        "ids": tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)["input_ids"],
        "special": [tokenizer.eos_token_id, tokenizer.pad_token_id],
        "generation": getattr(model.generation_config, "eos_token_id", None)
        if kind == "CausalLM" else None,
        "use_cache": model.config.use_cache,
    }
print(json.dumps(result))
"""


def read_elsewhere(exports: list[tuple[Path, str]]) -> dict[str, Any]:
    """What a process that never imports rlhf_kit reads from the exports."""
    named = json.dumps([(str(path), kind) for path, kind in exports])
    done = subprocess.run(
        [sys.executable, "-c", READER, named, json.dumps(IDS)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_export_loads_in_plain_transformers_with_equal_logits_and_scores(
    model_dir: ModelDir, tokenizer: Any, tmp_path: Path
):
    exports, expected = [], {}
    ids = torch.tensor([IDS])
    cases = [(kind, {}) for kind in ("llama", "opt", "gpt2")]
    cases.append(("llama", {"tie_word_embeddings": True}))
    for kind, fields in cases:
        directory = model_dir(kind, **fields)
        for task, load in (
            ("CausalLM", load_causal_lm),
            ("SequenceClassification", load_scorer),
        ):
            model = load(directory, tokenizer)
            path = tmp_path / f"{kind}-{len(fields)}-{task}"
            export(model, tokenizer, path)
            verify(path)
            exports.append((path, task))
            expected[str(path)] = model(input_ids=ids).logits.detach().flatten()
    read = read_elsewhere(exports)
    answered = encode_dialogue(tokenizer, prompt_rows(1)[0].prompt, "So.", 99)
    assert answered.input_ids[-1] == tokenizer.eos_token_id
    for path, task in exports:
        found = read[str(path)]
        torch.testing.assert_close(torch.tensor(found["logits"]), expected[str(path)])
        assert found["special"] == [tokenizer.eos_token_id, tokenizer.pad_token_id]
        assert found["chat"].startswith("Human: Why?") and found["chat"].endswith("So.<eos>")
        assert found["ids"] == encode_prompt(tokenizer, [{"role": "user", "content": "Why?"}])
        assert found["use_cache"] is True
        assert found["generation"] in (None, tokenizer.eos_token_id, [tokenizer.eos_token_id])
        assert task != "CausalLM" or found["generation"] is not None


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "tied"])
def test_adapters_are_merged_into_the_export_and_the_live_weights_stay(
    kind: str, model_dir: ModelDir, tokenizer: Any, tmp_path: Path
):
    tied = {"tie_word_embeddings": True} if kind == "tied" else {}
    model = load_causal_lm(model_dir("llama" if tied else kind, **tied), tokenizer)
    plain = copied(model)
    torch.manual_seed(2)
    add_lora(model, LoRAConfig(rank=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    live = copied(model)
    export(model, tokenizer, tmp_path / "merged")
    assert same_weights(live, copied(model))
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert copied(loaded).keys() == plain.keys()
    assert not same_weights(copied(loaded), plain)
    ids = torch.tensor([IDS])
    torch.testing.assert_close(
        loaded(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4, rtol=1e-4
    )
    assert not list((tmp_path / "merged").glob("adapter_*"))  # transformers would load it on top


def test_a_merged_bf16_export_rounds_once_and_leaves_the_base_as_it_was(
    model_dir: ModelDir, tokenizer: Any, tmp_path: Path
):
    model = load_causal_lm(model_dir(), tokenizer, dtype="bf16")
    add_lora(model, LoRAConfig(rank=4))
    live = copied(model)
    export(model, tokenizer, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert loaded.dtype == torch.bfloat16 and same_weights(live, copied(model))
    base = load_causal_lm(model_dir(), tokenizer, dtype="bf16")
    assert same_weights(copied(loaded), copied(base))  # adapters start at zero


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("kind", ["opt", "tied"])
def test_tied_embeddings_survive_training_and_export(
    stage: int, kind: str, model_dir: ModelDir, tokenizer: Any, tmp_path: Path
):
    directory = model_dir("llama", tie_word_embeddings=True) if kind == "tied" else model_dir(kind)
    model = load_causal_lm(directory, tokenizer)
    engine = TrainingEngine(model, EngineConfig(zero_stage=stage), OptimizerConfig(), total_steps=1)
    rows = encode_demonstrations(tokenizer, prompt_rows(8), DataConfig()).rows
    trainer = SFTTrainer(engine, SFTConfig(), pad_token_id=tokenizer.pad_token_id)
    trainer.step(rows)
    loss = trainer.evaluate(rows)
    export(engine.module, tokenizer, tmp_path / "tied")
    again = load_causal_lm(str(tmp_path / "tied"), tokenizer)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    fresh = TrainingEngine(again, EngineConfig(), OptimizerConfig(), total_steps=1)
    reread = SFTTrainer(fresh, SFTConfig(), pad_token_id=tokenizer.pad_token_id).evaluate(rows)
    assert reread == pytest.approx(loss, rel=1e-5)


@pytest.fixture
def exported(model_dir: ModelDir, tokenizer: Any, tmp_path: Path) -> Path:
    model = load_causal_lm(model_dir(), tokenizer)
    return export(model, tokenizer, tmp_path / "sft", details={"step": 3})


def test_the_marker_names_every_file_and_carries_the_details(exported: Path):
    verify(exported)
    marker = read_marker(exported)
    files = {path.name for path in exported.iterdir()} - {checkpoint.MARKER}
    assert set(marker["sha256"]) == files and marker["step"] == 3
    assert {"model.safetensors", "config.json", "generation_config.json"} <= files
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= files


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_verify_names_a_file_that_was_changed_or_is_missing(name: str, exported: Path):
    path = exported / name
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    changed = f"{name} was changed after it was written; export it again"
    with pytest.raises(ValueError, match=changed):
        verify(exported)
    path.unlink()
    with pytest.raises(ValueError, match=f"{name} is missing; export it again"):
        verify(exported)


def test_an_interrupted_first_export_leaves_nothing(
    model_dir: ModelDir, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(integrity, "publish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(load_causal_lm(model_dir(), tokenizer), tokenizer, tmp_path / "sft")
    assert not list(tmp_path.iterdir()) and not is_complete(tmp_path / "sft")
    with pytest.raises(ValueError, match="holds no finished export; run the stage"):
        read_marker(tmp_path / "sft")


def test_an_export_that_fails_while_writing_leaves_the_old_one_whole(
    exported: Path, model_dir: ModelDir, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    before = read_marker(exported)
    monkeypatch.setattr(
        tokenizer, "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(ValueError, match="sft could not be written: disk full"):
        export(load_causal_lm(model_dir("opt"), tokenizer), tokenizer, exported)
    verify(exported)
    assert read_marker(exported) == before


def test_a_second_export_replaces_the_first_as_a_whole(
    exported: Path, model_dir: ModelDir, tokenizer: Any
):
    (exported / "model-00001-of-00002.safetensors").write_bytes(b"stale")
    with pytest.raises(ValueError, match="model-00001-of-00002.safetensors does not belong there"):
        verify(exported)
    export(load_causal_lm(model_dir("opt"), tokenizer), tokenizer, exported)
    verify(exported)
    assert [path.name for path in exported.glob("*.safetensors")] == ["model.safetensors"]
    assert json.loads((exported / "config.json").read_text())["model_type"] == "opt"
    assert not list(exported.parent.glob(".*"))


def test_an_export_never_replaces_a_directory_of_other_things(
    model_dir: ModelDir, tokenizer: Any, tmp_path: Path
):
    (tmp_path / "thesis.txt").write_text("all my work")
    model = load_causal_lm(model_dir(), tokenizer)
    with pytest.raises(ValueError, match="holds other files than an export; move them"):
        export(model, tokenizer, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "all my work"


def test_an_export_can_be_read_by_all_and_goes_through_a_link(
    model_dir: ModelDir, tokenizer: Any, tmp_path: Path
):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "sft").symlink_to(tmp_path / "elsewhere")
    export(load_causal_lm(model_dir(), tokenizer), tokenizer, tmp_path / "sft")
    assert (tmp_path / "sft").is_symlink()
    verify(tmp_path / "elsewhere")
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "elsewhere").iterdir()} == {0o644}


def test_an_export_that_does_not_fit_on_the_disk_is_not_begun(
    exported: Path, model_dir: ModelDir, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(integrity.shutil, "disk_usage", lambda _: SimpleNamespace(free=4096))
    with pytest.raises(ValueError, match="has 0.0 GiB free and .* GiB are needed; free some space"):
        export(load_causal_lm(model_dir(), tokenizer), tokenizer, exported)
    verify(exported)
