"""Measurements of fakes whose right values are known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rlhf_kit.config import GenerationConfig
from rlhf_kit.measure import evaluate_actor, evaluate_reward_model, weight_distance
from rlhf_kit.types import PreferencePair, PromptBatch, Rollout

EOS = 2
SAMPLED = GenerationConfig(max_new_tokens=4)
GREEDY = GenerationConfig(max_new_tokens=4, temperature=0)


def batch(*texts: str) -> PromptBatch:
    n = len(texts)
    return PromptBatch(
        input_ids=torch.ones(n, 2, dtype=torch.long),
        attention_mask=torch.ones(n, 2, dtype=torch.bool),
        seeds=torch.arange(n),
        dialogues=tuple(({"role": "user", "content": text},) for text in texts),
    )


def generate(prompts: PromptBatch, generation: GenerationConfig) -> Rollout:
    """Row r answers with r + 1 tokens of id 10 + r; the first row ends, others are cut."""
    n = len(prompts)
    length = torch.arange(1, n + 1)
    mask = torch.arange(n)[None] < length[:, None]
    ids = torch.where(mask, 10 + torch.arange(n)[:, None], torch.tensor(99))
    return Rollout(
        prompts=prompts,
        response_ids=ids,
        response_mask=mask,
        logprobs=torch.where(mask, -0.5, 0.0),
        ended=torch.arange(n) == 0,
    )


def decode(ids: list[int]) -> str:
    return " " + " ".join(map(str, ids)) + " "


@dataclass(frozen=True)
class Verdict:
    polite: float
    total: float


def test_rows_stay_in_the_order_of_the_prompts_and_padding_is_not_decoded():
    result = evaluate_actor(generate, [batch("a", "b"), batch("c")], SAMPLED, decode=decode)
    assert [d[0]["content"] for d in result.dialogues] == ["a", "b", "c"]
    assert result.responses == ("10", "11 11", "10")
    assert result.length.tolist() == [1, 2, 1]
    assert result.ended.tolist() == [True, False, True]
    assert (result.gold, result.proxy, result.kl) == ({}, None, None)


def test_the_judge_sees_prompt_response_and_whether_it_ended():
    def judge(dialogue, response, ended):
        return Verdict(polite=float(ended), total=len(response) + (dialogue[0]["content"] == "b"))

    result = evaluate_actor(generate, [batch("a", "b")], GREEDY, decode=decode, judge=judge)
    assert result.gold["polite"].tolist() == [1.0, 0.0]
    assert result.gold["total"].tolist() == [2.0, 6.0]


def test_a_judge_may_return_a_plain_number():
    def judge(dialogue, response, ended):
        return 0.25

    result = evaluate_actor(generate, [batch("a")], SAMPLED, decode=decode, judge=judge)
    assert {name: values.tolist() for name, values in result.gold.items()} == {"total": [0.25]}


def test_kl_is_summed_over_the_response_alone():
    def ref(rollout):
        return torch.full_like(rollout.logprobs, -0.7)  # also on padding, where it must not count

    result = evaluate_actor(generate, [batch("a", "b")], SAMPLED, decode=decode, ref_logprobs=ref)
    assert result.kl == pytest.approx([0.2, 0.4], abs=1e-6)
    k3 = np.exp(-0.2) + 0.2 - 1
    assert result.kl_k3 == pytest.approx([k3, 2 * k3], abs=1e-6)


def test_kl_of_greedy_responses_is_refused():
    def ref(rollout):
        return rollout.logprobs

    with pytest.raises(ValueError, match="temperature 1"):
        evaluate_actor(generate, [batch("a")], GREEDY, decode=decode, ref_logprobs=ref)


def test_the_proxy_is_what_score_returned():
    def score(rollout):
        return rollout.response_mask.sum(-1).to(torch.bfloat16)

    result = evaluate_actor(generate, [batch("a", "b")], SAMPLED, decode=decode, score=score)
    assert result.proxy.tolist() == [1.0, 2.0]


def pair(chosen: str, rejected: str, kind: str = "") -> PreferencePair:
    return PreferencePair(({"role": "user", "content": "x"},), chosen, rejected, kind=kind)


def test_a_reward_model_is_judged_by_kind_and_by_family():
    pairs = [
        pair("a", "b", "style"),
        pair("a", "b", "style"),
        pair("a", "b", "truth"),
        pair("", ""),
    ]

    def score(pairs):
        return torch.tensor([1.0, 0.0, 2.0, 5.0]), torch.tensor([0.0, 1.0, 1.0, 5.0])

    result = evaluate_reward_model(score, pairs, families=["f", "g", "f", "g"])
    assert result.accuracy.mean == 0.625  # 2 right, 1 wrong, 1 tie
    assert result.accuracy_by_kind == {"style": 0.5, "truth": 1.0}
    assert result.accuracy_by_family == {"f": 1.0, "g": 0.25}
    assert result.mean_margin == pytest.approx(0.25)
    assert sum(b.count for b in result.calibration.bins) == result.pairs == 4


def test_a_reward_model_that_likes_length_alone_is_found_out():
    rng = np.random.default_rng(0)
    words = rng.integers(1, 30, size=(200, 2))
    pairs = [pair("w " * a, "w " * b) for a, b in words]

    def score(pairs):
        return tuple([len(getattr(p, name)) for p in pairs] for name in ("chosen", "rejected"))

    result = evaluate_reward_model(score, pairs)
    assert result.length.pearson == pytest.approx(1.0)
    assert result.length.partial == pytest.approx(1.0)


def test_weight_distance_by_hand_and_over_shards(tmp_path):
    a = {"x": torch.tensor([3.0, 4.0]), "y": torch.tensor([1.0]), "n": torch.tensor([7])}
    b = {"x": torch.tensor([3.0, 0.0]), "y": torch.tensor([4.0]), "z": torch.zeros(2)}
    expected = {"relative_l2": 1.0, "changed": pytest.approx(2 / 3), "compared": 2}
    assert weight_distance(a, b) == expected  # sqrt(16 + 9) / sqrt(9 + 16)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name, tensor in a.items():
        save_file({name: tensor}, tmp_path / "a" / f"model-{name}.safetensors")
    save_file(b, tmp_path / "b" / "model.safetensors")
    assert weight_distance(tmp_path / "a", tmp_path / "b") == expected


def test_weights_equal_in_bf16_have_distance_zero():
    x = {"w": torch.tensor([1.0, 1.001])}
    y = {"w": torch.tensor([1.0, 1.002])}
    rounded = [{"w": s["w"].bfloat16()} for s in (x, y)]
    assert weight_distance(*rounded)["changed"] == 0.0
    assert weight_distance(x, y)["changed"] == 0.5


def test_directories_without_common_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no \\*.safetensors"):
        weight_distance(tmp_path, tmp_path)
    with pytest.raises(ValueError, match="share no weights"):
        weight_distance({"a": torch.ones(1)}, {"b": torch.ones(1)})
