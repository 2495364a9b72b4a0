"""Four roles on one base: who computes with what, what moves, what is refused, what is exported.

Shapes: B batch, P prompt, R response, T = P + R.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import copied, same_weights
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_kit.adapters import AdapterSwitch, base_checksum, read_adapter
from rlhf_kit.checkpoint import export
from rlhf_kit.config import GenerationConfig, LoRAConfig, RunConfig, preset
from rlhf_kit.models import (
    ValueModel,
    add_lora,
    load_causal_lm,
    load_scorer,
    save_normalisation,
)
from rlhf_kit.ppo import PPOTrainer
from rlhf_kit.rlhf_engine import RLHFEngine
from rlhf_kit.training_state import Fragment
from rlhf_kit.types import PromptBatch

Args = Callable[..., RunConfig]
Build = Callable[[RunConfig], RLHFEngine]
Prompts = Callable[..., PromptBatch]
KINDS = ["llama", "gpt2", "opt"]


def adapter_reward(directory: Path, base: str, tokenizer: Any, dtype: str = "fp32") -> Any:
    """A scorer trained as an adapter of `base` (its weights are drawn), exported; the scorer."""
    torch.manual_seed(4)
    scorer = load_scorer(base, tokenizer, dtype=dtype)
    add_lora(scorer, LoRAConfig(rank=4))
    for name, parameter in scorer.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_normalisation(scorer, mean=0.3, std=0.5)
    export(scorer, tokenizer, directory)
    return scorer


@pytest.fixture(scope="module")
def shared_args(
    tiny_args: Args,
    model_dir: Callable[..., str],
    tokenizer: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Args:
    """Settings of an actor and a reward model on one base of an architecture."""
    made: dict[tuple[str, str], str] = {}

    def args(kind: str = "llama", dtype: str = "fp32", **changes: Any) -> RunConfig:
        if (kind, dtype) not in made:
            path = tmp_path_factory.mktemp("runs") / "reward"
            adapter_reward(path, model_dir(kind), tokenizer, dtype)
            made[kind, dtype] = str(path)
        return tiny_args(
            **{
                "actor_model": model_dir(kind),
                "reward_model": made[kind, dtype],
                "memory__shared_base": True,
                "actor_engine__lora__rank": 4,
                "critic_engine__lora__rank": 4,
                "actor_engine__dtype": dtype,
                "critic_engine__dtype": dtype,
                **changes,
            }
        )

    return args


def opinions(engine: RLHFEngine, prompts: Any) -> dict[str, torch.Tensor]:
    """What the four models say about fixed sequences."""
    inputs = (prompts.input_ids, prompts.attention_mask, 4)
    with torch.no_grad():
        return {
            "actor": engine.actor_logprobs(*inputs, 1.0),
            "ref": engine.ref_logprobs(*inputs, 1.0),
            "critic": engine.values(*inputs),
            "reward": engine.reward(prompts.input_ids, prompts.attention_mask),
        }


# on disk --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_has_the_adapter_beside_the_merged_model_in_pefts_format(
    kind: str, model_dir: Callable[..., str], tokenizer: Any, tmp_path: Path
):
    from peft import PeftModel

    scorer = adapter_reward(tmp_path / "reward", model_dir(kind), tokenizer)
    ids = torch.arange(5, 17).reshape(2, 6)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    base = AutoModelForSequenceClassification.from_pretrained(model_dir(kind), num_labels=1)
    loaded: Any = PeftModel.from_pretrained(base, tmp_path / "reward" / "adapter")
    expected = ValueModel(scorer)(ids)[:, -1:]
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=1e-6, rtol=1e-5)
    load_scorer(str(tmp_path / "reward"), tokenizer)  # passes the checks of its files


def test_the_checksum_is_of_the_base_alone_and_of_all_of_it(
    model_dir: Callable[..., str], tokenizer: Any
):
    actor, scorer = load_causal_lm(model_dir(), tokenizer), load_scorer(model_dir(), tokenizer)
    checksum = base_checksum(actor)
    assert base_checksum(scorer) == checksum
    add_lora(scorer, LoRAConfig(rank=2))
    assert base_checksum(scorer) == checksum
    assert base_checksum(load_causal_lm(model_dir(), tokenizer, dtype="bf16")) != checksum
    with torch.no_grad():
        actor.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-6
    assert base_checksum(actor) != checksum


def test_an_adapter_that_is_broken_is_refused(
    model_dir: Callable[..., str], tokenizer: Any, tmp_path: Path
):
    adapter_reward(tmp_path / "reward", model_dir(), tokenizer)
    weights = tmp_path / "reward" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is not an adapter that was exported here"):
        read_adapter(tmp_path / "reward")
    with pytest.raises(ValueError, match="was changed after it was exported"):
        load_scorer(str(tmp_path / "reward"), tokenizer)
    weights.unlink()
    assert read_adapter(tmp_path / "reward") is None


# the roles ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_four_roles_start_as_they_were_saved(
    kind: str, shared_args: Args, build: Build, prompts: Prompts, tokenizer: Any
):
    args = shared_args(kind)
    said = opinions(build(args), prompts())
    apart = build(shared_args(kind, memory__shared_base=False, critic_engine__lora__rank=0))
    expected = opinions(apart, prompts())
    assert torch.equal(said["ref"], expected["ref"])
    assert torch.equal(said["actor"], said["ref"])  # B of a new adapter is 0
    # Apart, the reward model is the merged one, which is rounded otherwise.
    for name in ("reward", "critic"):
        torch.testing.assert_close(said[name], expected[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("stage", "dtype", "checkpointing"),
    [(0, "fp32", False), (1, "fp32", True), (2, "fp32", False), (2, "bf16", True)],
)
def test_each_role_moves_its_own_adapter_and_the_base_never_moves(
    stage: int,
    dtype: str,
    checkpointing: bool,
    shared_args: Args,
    build: Build,
    prompts: Prompts,
):
    args = shared_args(
        dtype=dtype,
        actor_engine__zero_stage=stage,
        critic_engine__zero_stage=stage,
        actor_engine__gradient_checkpointing=checkpointing,
        ppo__actor_optimizer__learning_rate=0.01,
        ppo__critic_optimizer__learning_rate=0.01,
        ppo__critic_warmup_iterations=1,
    )
    engine = build(args)
    trainer = PPOTrainer(engine=engine, args=args)
    before, weights = opinions(engine, prompts()), copied(engine.actor.module)
    metrics = trainer.step(trainer.generate_experience(prompts()))  # the critic alone learns
    after = opinions(engine, prompts())
    assert metrics["optim/critic_grad_norm"] > 0
    assert not torch.equal(after["critic"], before["critic"])
    for name in ("actor", "ref", "reward"):
        assert torch.equal(after[name], before[name])
    trainer.step(trainer.generate_experience(prompts()))
    last = opinions(engine, prompts())
    assert not torch.equal(last["actor"], before["actor"])
    assert torch.equal(last["ref"], before["ref"])
    assert torch.equal(last["reward"], before["reward"])
    for name, tensor in copied(engine.actor.module).items():
        moved = ".actor." in name or ".critic." in name
        assert moved or torch.equal(tensor, weights[name])


def test_an_actor_step_leaves_the_critic_alone(shared_args: Args, build: Build, prompts: Prompts):
    args = shared_args(ppo__minibatch_size=8)
    engine = build(args)
    trainer = PPOTrainer(engine=engine, args=args)
    experience = trainer.generate_experience(prompts())
    before = opinions(engine, prompts())
    loss, _ = trainer._policy(engine.actor, experience, 1.0)
    engine.actor.backward(loss)
    assert engine.actor.step().grad_norm > 0
    after = opinions(engine, prompts())
    assert torch.equal(after["critic"], before["critic"])
    assert not torch.equal(after["actor"], before["actor"])


@pytest.mark.parametrize("stage", [0, 2])
def test_a_step_is_that_of_separate_engines(
    stage: int, shared_args: Args, build: Build, prompts: Prompts
):
    """Stepping one engine must not drop what `backward` has added in the other."""
    norms = {}
    for shared in (True, False):
        args = shared_args(
            memory__shared_base=shared,
            critic_engine__lora__rank=4,
            actor_engine__zero_stage=stage,
            critic_engine__zero_stage=stage,
            ppo__minibatch_size=8,
        )
        torch.manual_seed(1)
        engine = build(args)
        # The A matrices are drawn; make them equal, so that the B gradients are.
        for layer in AdapterSwitch(engine.actor.module).layers:
            name = "actor" if shared else "default"
            torch.nn.init.constant_(layer.lora_A[name].weight, 0.1)
        trainer = PPOTrainer(engine=engine, args=args)
        norms[shared] = trainer.step(trainer.generate_experience(prompts()))
    for key in ("policy/loss", "value/loss", "objective/score", "optim/actor_grad_norm"):
        assert norms[True][key] == pytest.approx(norms[False][key], rel=2e-3, abs=1e-5), key
    assert norms[True]["optim/critic_grad_norm"] > 0


def test_gradient_checkpointing_recomputes_with_the_role_that_computed(
    shared_args: Args, build: Build, prompts: Prompts
):
    ends = []
    for checkpointing in (False, True):
        args = shared_args(
            actor_engine__gradient_checkpointing=checkpointing,
            critic_engine__gradient_checkpointing=checkpointing,
        )
        trainer = PPOTrainer(engine=build(args), args=args)
        trainer.step(trainer.generate_experience(prompts()))
        ends.append(copied(trainer.engine.critic.held))
    assert same_weights(*ends)


def test_what_is_exported_is_the_actor_and_its_average(
    shared_args: Args, build: Build, prompts: Prompts, tmp_path: Path
):
    args = shared_args(ppo__actor_optimizer__learning_rate=0.02)
    engine = build(args)
    trainer = PPOTrainer(engine=engine, args=args)
    for _ in range(2):
        trainer.step(trainer.generate_experience(prompts()))
    export(engine.actor.module, engine.tokenizer, tmp_path / "final")
    assert engine.ema is not None
    with engine.ema.swapped_in():
        export(engine.actor.module, engine.tokenizer, tmp_path / "ema")
    ids = prompts().input_ids[:1, prompts().attention_mask[0]]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    expected = engine.actor.module(input_ids=ids).logits
    torch.testing.assert_close(plain(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
    average = AutoModelForCausalLM.from_pretrained(tmp_path / "ema")
    assert not torch.allclose(average(input_ids=ids).logits, expected, atol=1e-3)
    adapter = read_adapter(tmp_path / "final")
    assert adapter is not None and not adapter.head and len(adapter.tensors) == 2 * 7 * 2
    greedy = GenerationConfig(max_new_tokens=6, temperature=0.0)
    rollout = engine.actor.generate(prompts(1), greedy)
    found = plain.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert found.tolist() == rollout.response_ids[0, rollout.response_mask[0]].tolist()


class Whole:
    """A fragment that holds all of its tensor, as it is read back."""

    def __init__(self, fragment: Fragment):
        self.shape, self._data = fragment.shape, fragment.data.clone()

    def read(self, start: int, length: int) -> torch.Tensor:
        return self._data[start : start + length]


def saved(state: Any) -> Any:
    if isinstance(state, Fragment):
        return Whole(state)
    return {key: saved(value) for key, value in state.items()} if type(state) is dict else state


def test_a_run_on_one_base_goes_on_to_the_last_bit(
    shared_args: Args, build: Build, prompts: Prompts
):
    args = shared_args(actor_engine__zero_stage=1)
    straight, resumed = (PPOTrainer(engine=build(args), args=args) for _ in range(2))
    straight.step(straight.generate_experience(prompts()))
    state = saved(straight.state())
    names = [set(state[role]["weights"]) for role in ("actor", "critic")]
    assert names[0].isdisjoint(names[1]) and "scorer.score.weight" in names[1]
    resumed.load_state(state)
    ends = []
    for trainer in (straight, resumed):
        trainer.step(trainer.generate_experience(prompts()))
        ends.append(opinions(trainer.engine, prompts()))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


# refusals -------------------------------------------------------------------------------------


def test_settings_that_one_base_cannot_have_are_refused_before_anything_is_loaded(
    shared_args: Args,
):
    for changes, words in (
        ({"actor_engine__lora__rank": 0}, "needs adapters"),
        ({"critic_engine__lora__rank": 0}, "needs adapters"),
        ({"actor_engine__zero_stage": 3}, "does not go with ZeRO-3"),
        ({"critic_engine__dtype": "bf16"}, "needs one dtype"),
    ):
        with pytest.raises(ValueError, match=words):
            shared_args(**changes)
    assert preset("toy").memory.shared_base is False


def test_a_reward_model_without_an_adapter_is_refused(
    shared_args: Args, reward_dir: str, build: Build
):
    with pytest.raises(ValueError, match="trained as an adapter of the actor's base"):
        build(shared_args(reward_model=reward_dir))


def test_an_adapter_of_another_base_or_shape_is_refused(
    shared_args: Args, build: Build, model_dir: Callable[..., str], tokenizer: Any, tmp_path: Path
):
    other = load_causal_lm(model_dir(), tokenizer)
    with torch.no_grad():
        other.model.embed_tokens.weight[7, 3] += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="is an adapter of other weights"):
        build(shared_args(actor_model=str(tmp_path / "other")))
    with pytest.raises(ValueError, match=r"critic_engine.lora has rank 8 and alpha 32"):
        build(shared_args(critic_engine__lora__rank=8))
