"""Loading the four models, the value model, and adapters.

Shapes: B batch, T sequence tokens.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXTS, copied, prompt, same_weights, shared_data, small_tokenizer, tiny_model

from rlhf_kit.checkpoint import export
from rlhf_kit.config import LoRAConfig, RunConfig
from rlhf_kit.models import (
    ValueModel,
    adapters_off,
    add_lora,
    has_adapters,
    load_causal_lm,
    load_scorer,
    position_ids,
    resolve_model,
    save_normalisation,
    saved_normalisation,
    score_head,
)
from rlhf_kit.ppo import PPOTrainer
from rlhf_kit.rlhf_engine import RLHFEngine
from rlhf_kit.tokenization import (
    decode_response,
    encode_prompt,
    encode_response,
    load_tokenizer,
    prepare_tokenizer,
    same_tokenizer,
)
from rlhf_kit.types import PromptBatch

ModelDir = Callable[..., str]
KINDS = ["llama", "opt", "gpt2"]


def test_positions_count_real_tokens_only():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_model_reads_at_the_last_token_what_transformers_scores(
    kind: str, model_dir: ModelDir, tokenizer: Any
):
    torch.manual_seed(0)
    scorer = load_scorer(model_dir(kind), tokenizer)
    ids = torch.arange(3, 27).reshape(2, 12)
    mask = torch.ones_like(ids, dtype=torch.bool)
    values = ValueModel(scorer, mean=0.5, std=2.0)(ids, mask)
    expected = (scorer(input_ids=ids).logits.squeeze(-1) - 0.5) / 2.0
    assert values.shape == (2, 12) and values.dtype == torch.float32
    torch.testing.assert_close(values[:, -1], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_either_side_changes_no_value(kind: str, model_dir: ModelDir, tokenizer: Any):
    value_model = ValueModel(load_scorer(model_dir(kind), tokenizer))
    ids = torch.arange(3, 13).reshape(1, 10)
    mask = torch.ones_like(ids, dtype=torch.bool)
    alone = value_model(ids, mask)
    pad = (2, 3)
    padded = value_model(
        torch.nn.functional.pad(ids, pad, value=tokenizer.pad_token_id),
        torch.nn.functional.pad(mask, pad, value=False),
    )
    torch.testing.assert_close(padded[:, 2:-3], alone, atol=1e-5, rtol=1e-5)


def test_a_directory_that_is_no_model_is_refused_in_one_sentence(
    tmp_path: Path, model_dir: ModelDir, tokenizer: Any
):
    with pytest.raises(ValueError, match="model directory .*nowhere does not exist"):
        resolve_model(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="it has no config.json"):
        resolve_model(str(tmp_path / "empty"))
    pickled = tmp_path / "pickled"
    shutil.copytree(model_dir(), pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights are refused"):
        load_causal_lm(str(pickled), tokenizer)
    assert resolve_model("owner/name") == "owner/name"


def test_embeddings_grow_to_the_tokenizer_and_never_shrink(model_dir: ModelDir):
    larger = small_tokenizer()
    larger.add_tokens(["<a>", "<b>"])
    model = load_causal_lm(model_dir(), larger)
    assert model.get_input_embeddings().weight.shape[0] == len(larger)
    smaller = small_tokenizer(vocabulary=280)
    model = load_causal_lm(model_dir(), smaller)
    assert model.get_input_embeddings().weight.shape[0] == 301


def test_the_models_special_tokens_are_the_tokenizers(model_dir: ModelDir, tokenizer: Any):
    for model in (
        load_causal_lm(model_dir("gpt2"), tokenizer),
        load_scorer(model_dir(), tokenizer),
    ):
        assert model.config.pad_token_id == tokenizer.pad_token_id
        assert model.config.eos_token_id == tokenizer.eos_token_id
    generation = load_causal_lm(model_dir("gpt2"), tokenizer).generation_config
    assert generation.eos_token_id == tokenizer.eos_token_id


def test_a_trained_head_is_kept_and_its_normalisation_comes_with_it(
    model_dir: ModelDir, tokenizer: Any, tmp_path: Path
):
    scorer = load_scorer(model_dir(), tokenizer)
    assert saved_normalisation(scorer) == (0.0, 1.0)
    save_normalisation(scorer, mean=1.25, std=0.5)
    export(scorer, tokenizer, tmp_path / "reward")
    again = load_scorer(str(tmp_path / "reward"), tokenizer)
    assert torch.equal(score_head(again).weight, score_head(scorer).weight)
    assert saved_normalisation(again) == (1.25, 0.5)


def test_a_model_without_a_linear_score_is_refused(model_dir: ModelDir, tokenizer: Any):
    with pytest.raises(ValueError, match="has no linear `score` head"):
        score_head(load_causal_lm(model_dir(), tokenizer))


# Adapters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_off_equals_the_base_to_the_last_bit(
    kind: str, model_dir: ModelDir, tokenizer: Any
):
    model = load_causal_lm(model_dir(kind), tokenizer).eval()
    ids = torch.arange(3, 27).reshape(2, 12)
    base = model(input_ids=ids).logits
    assert not has_adapters(model)
    add_lora(model, LoRAConfig(rank=4))
    assert has_adapters(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.1)
    assert not torch.equal(model(input_ids=ids).logits, base)
    with adapters_off(model):
        assert torch.equal(model(input_ids=ids).logits, base)
    assert not torch.equal(model(input_ids=ids).logits, base)
    assert all(p.requires_grad == (".lora_" in n) for n, p in model.named_parameters())


def test_adapters_of_a_scorer_leave_its_head_whole_and_trained(model_dir: ModelDir, tokenizer: Any):
    scorer = load_scorer(model_dir(), tokenizer)
    add_lora(scorer, LoRAConfig(rank=4))
    assert {n for n, p in scorer.named_parameters() if p.requires_grad and ".lora_" not in n} == {
        "score.weight"
    }


def test_target_modules_may_be_named(model_dir: ModelDir, tokenizer: Any):
    model = load_causal_lm(model_dir(), tokenizer)
    add_lora(model, LoRAConfig(rank=2, target_modules="q_proj, v_proj"))
    touched = {name.split(".")[-4] for name, _ in model.named_parameters() if ".lora_A." in name}
    assert touched == {"q_proj", "v_proj"}


# A reward model with another tokenizer ----------------------------------------------------


def other_reward_model(
    tokenizer: Any, directory: Path, args: RunConfig
) -> tuple[RLHFEngine, PPOTrainer]:
    """An exported reward model around `tokenizer`, and a PPO trainer of the tiny actor on it."""
    tiny_model("llama", tokenizer, max_position_embeddings=512).save_pretrained(directory / "base")
    tokenizer.save_pretrained(directory / "base")
    torch.manual_seed(8)
    scorer = load_scorer(str(directory / "base"), tokenizer)
    save_normalisation(scorer, mean=0.1, std=0.5)
    export(scorer, tokenizer, directory / "reward")
    engine = RLHFEngine(
        actor_model_name_or_path=args.actor_model,
        critic_model_name_or_path=str(directory / "reward"),
        tokenizer=load_tokenizer(args.actor_model),
        num_total_iters=args.ppo.iterations,
        args=args,
    )
    return engine, PPOTrainer(engine=engine, args=args)


def check_scores(engine: RLHFEngine, trainer: PPOTrainer, prompts: PromptBatch) -> None:
    experience = trainer.generate_experience(prompts)
    rollout = trainer.last_rollout
    assert not engine.shares_tokenizer and rollout is not None
    scores = engine.score(rollout)
    for row, dialogue in enumerate(prompts.dialogues):
        ids = rollout.response_ids[row, rollout.response_mask[row]]
        text = decode_response(engine.tokenizer, ids.tolist())
        answer = encode_response(engine.reward_tokenizer, dialogue, text)
        if not rollout.ended[row]:
            answer = answer[:-1]
        whole = torch.tensor([encode_prompt(engine.reward_tokenizer, dialogue) + answer])
        expected = engine.reward.scorer(input_ids=whole).logits.squeeze()
        torch.testing.assert_close(scores[row], expected, atol=1e-4, rtol=1e-4)
    # The critic values the actor's own tokens: it starts from the actor's body.
    body = engine.critic.module.scorer.base_model.state_dict()
    assert same_weights(copied(engine.actor.module.base_model), body)
    metrics = trainer.step(experience)
    assert metrics["optim/critic_grad_norm"] > 0


def test_another_tokenizer_is_scored_as_re_encoded_text(
    tiny_args: Callable[..., RunConfig], prompts: Callable[..., PromptBatch], tmp_path: Path
):
    other = small_tokenizer("zebra quartz " + TEXTS[4], vocabulary=290)
    assert not same_tokenizer(other, small_tokenizer())
    assert encode_prompt(other, prompt("Hi.")) != encode_prompt(small_tokenizer(), prompt("Hi."))
    check_scores(*other_reward_model(other, tmp_path, tiny_args()), prompts())


def test_gpt2s_tokenizer_is_scored_as_re_encoded_text(
    tiny_args: Callable[..., RunConfig], prompts: Callable[..., PromptBatch], tmp_path: Path
):
    directory = shared_data() / "gpt2-bpe"
    if not directory.is_dir():
        pytest.skip("set RLHF_KIT_SHARED_DATA to a directory that holds gpt2-bpe")
    tokenizer = load_tokenizer(directory)
    prepare_tokenizer(tokenizer)
    check_scores(*other_reward_model(tokenizer, tmp_path, tiny_args()), prompts())


def test_a_reward_model_without_a_tokenizer_takes_the_actors(
    tiny_args: Callable[..., RunConfig], reward_dir: str, tmp_path: Path, build: Any
):
    bare = tmp_path / "reward"
    shutil.copytree(reward_dir, bare)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "export.json"):
        (bare / name).unlink()
    assert build(tiny_args(reward_model=str(bare))).shares_tokenizer
