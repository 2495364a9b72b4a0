"""A whole run evaluated: tiny random models, the real toy world, decoder and judge."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rlhf_kit.checkpoint import export
from rlhf_kit.config import DataConfig, EvalConfig, GenerationConfig, override, preset
from rlhf_kit.evaluate import evaluate_run, is_toy_world, logprobs, prompt_batches
from rlhf_kit.toy_world import prompts
from rlhf_kit.types import PreferencePair, PromptBatch, Rollout

PROMPTS = 6


def small_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    bytes_ = Tokenizer(models.BPE(vocabulary, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_, eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )


def llama(kind: type, seed: int, **options):
    torch.manual_seed(seed)
    return kind(
        LlamaConfig(
            vocab_size=300,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=0,
            eos_token_id=1,
            **options,
        )
    )


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """base and sft are equal, ema equals sft, final differs; the reward model is untrained."""
    run = tmp_path_factory.mktemp("run")
    tokenizer = small_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    for name, seed in (("base", 0), ("sft/final", 0), ("ppo/ema", 0), ("ppo/final", 1)):
        export(llama(LlamaForCausalLM, seed), tokenizer, run / name)
    scorer = llama(LlamaForSequenceClassification, 2, num_labels=1)
    scorer.config.score_mean, scorer.config.score_std = 1.0, 2.0
    export(scorer, tokenizer, run / "reward" / "final")
    config = dataclasses.replace(
        preset("toy"),
        actor_model=str(run / "base"),
        data=DataConfig(max_prompt_length=400, max_length=500, rows=(8, 8, 8)),
        generation=GenerationConfig(max_new_tokens=6, slots=4),
        evaluation=EvalConfig(prompts=PROMPTS, bootstrap=50, samples=3),
    )
    record = {"config": config.to_dict(), "stages": {}, "finished": None}
    (run / "run.json").write_text(json.dumps(record))
    return run


@pytest.fixture(scope="module")
def result(run_dir):
    return evaluate_run(run_dir)


def test_every_model_is_scored_under_both_decodings(result):
    for key in ("gold", "gold_greedy", "proxy", "proxy_greedy"):
        assert list(result[key]) == ["base", "sft", "final", "ema"]
        assert all(v["low"] <= v["mean"] <= v["high"] for v in result[key].values())
    parts = ["correct", "polite", "brief", "harmless"]
    assert list(result["gold_parts"]["greedy"]["final"]) == parts
    assert result["prompts"] == PROMPTS and result["notes"] == []


def test_equal_weights_get_equal_results_since_prompts_and_seeds_are_shared(result):
    for key in ("gold", "proxy", "length", "ended_rate", "proxy_greedy"):
        assert result[key]["base"] == result[key]["sft"] == result[key]["ema"]
    assert result["proxy"]["final"] != result["proxy"]["sft"]
    ema = result["win_rate"]["ema_vs_sft"]
    assert (ema["wins"], ema["ties"], ema["losses"]) == (0, PROMPTS, 0)


def test_a_models_kl_to_itself_is_exactly_zero_and_to_another_is_not(result):
    assert list(result["kl"]) == ["sft", "final", "ema"]
    assert result["kl"]["sft"] == result["kl"]["ema"] == 0.0
    assert result["kl_k3"]["final"] > 0


def test_weights_are_compared_by_pair(result):
    distance = result["weight_distance"]
    assert distance["ema_vs_sft"]["relative_l2"] == 0 == distance["ema_vs_sft"]["changed"]
    assert distance["final_vs_sft"]["relative_l2"] > 0.1
    assert distance["final_vs_sft"]["changed"] == distance["ema_vs_final"]["changed"] > 0.5


def test_the_reward_model_is_measured_on_held_out_pairs(result):
    measured = result["reward_model"]
    assert measured["pairs"] == 2 * PROMPTS
    assert set(measured["accuracy_by_kind"]) <= {"correctness", "politeness", "brevity", "mixed"}
    assert measured["accuracy_by_family"]
    assert sum(b["count"] for b in measured["calibration"]["bins"]) == 2 * PROMPTS


def test_samples_show_every_models_response_to_the_same_prompt(result):
    assert len(result["samples"]) == 3
    first = result["samples"][0]
    assert first["prompt"][-1]["role"] == "user"
    assert list(first["responses"]) == ["base", "sft", "final", "ema"]
    assert first["responses"]["base"] == first["responses"]["sft"]


def test_the_result_is_strict_json(result):
    assert json.loads(json.dumps(result, allow_nan=False))["kl"] == result["kl"]


def test_evaluating_again_changes_nothing(run_dir, result):
    again = evaluate_run(run_dir)
    assert {**again, "evaluation_seconds": 0} == {**result, "evaluation_seconds": 0}


def test_a_missing_model_is_left_out_and_named(run_dir, tmp_path, result):
    for name in ("base", "sft"):
        (tmp_path / name).symlink_to(run_dir / name)
    (tmp_path / "run.json").write_text((run_dir / "run.json").read_text())
    partial = evaluate_run(tmp_path)
    assert list(partial["gold"]) == ["base", "sft"]
    assert partial["gold"]["sft"] == result["gold"]["sft"]
    assert "reward_model" not in partial and partial["proxy"] == {}
    assert [note.split()[1] for note in partial["notes"][:2]] == ["final", "ema"]


def test_data_without_a_judge_have_no_gold_and_say_so(run_dir, tmp_path):
    for name in ("sft", "reward", "ppo"):
        (tmp_path / name).symlink_to(run_dir / name)
    rows = [
        {"prompt": f"Question {i}?", "chosen": "Yes, sir.", "rejected": "No."} for i in range(200)
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = json.loads((run_dir / "run.json").read_text())
    record["config"]["data"] |= {
        "sources": [{"name": str(tmp_path / "own.jsonl")}],
        "eval_share": 0.3,
        "rows": [0, 0, 0],
    }
    (tmp_path / "run.json").write_text(json.dumps(record))
    result = evaluate_run(tmp_path)
    assert result["gold"] == {} and set(result["proxy"]) == {"base", "sft", "final", "ema"}
    assert result["win_rate_judge"] == "proxy" and result["win_rate"]["final_vs_sft"]
    assert any("no gold judge" in note for note in result["notes"])


def test_a_run_without_sft_model_is_refused(run_dir, tmp_path):
    (tmp_path / "run.json").write_text((run_dir / "run.json").read_text())
    with pytest.raises(ValueError, match="no finished SFT model"):
        evaluate_run(tmp_path)


def test_an_unknown_source_makes_the_judge_step_back():
    config = override(preset("toy"), data__sources=[{"name": "toy_world"}, {"name": "other/data"}])
    assert is_toy_world(preset("toy")) and not is_toy_world(config)


def test_a_prompts_seed_depends_on_its_place_alone():
    tokenizer = small_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    rows = [PreferencePair(tuple(r["prompt"])) for r in prompts(70, seed=0, split="test")]
    many, few = (prompt_batches(tokenizer, rows[:n]) for n in (70, 66))
    assert [len(batch) for batch in many] == [64, 6]
    assert many[1].seeds[:2].tolist() == few[1].seeds.tolist()
    assert len({seed for batch in many for seed in batch.seeds.tolist()}) == 70


def test_logprobs_are_those_of_a_forward_over_one_unpadded_row():
    model = llama(LlamaForCausalLM, 3).eval()
    prompt, response = [5, 6, 7], [8, 9]
    batch = PromptBatch(
        torch.tensor([[0, 0, *prompt]]),
        torch.tensor([[False, False, True, True, True]]),
        seeds=torch.zeros(1, dtype=torch.long),
        dialogues=((),),
    )
    mask = torch.tensor([[True, True, False]])
    ids = torch.tensor([[*response, 0]])
    rollout = Rollout(batch, ids, mask, torch.zeros(1, 3), torch.tensor([True]))
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0].double()
    expected = [logits[2 + r].log_softmax(-1)[token].item() for r, token in enumerate(response)]
    assert logprobs(model, rollout, 1)[0, :2].tolist() == pytest.approx(expected, abs=1e-5)
