"""Tensor-parallel generation: two and four ranks against one process that holds everything.

What ranks find out together is computed once for each number of them, by processes forked from one
that has imported everything; the tests look at what they wrote down.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import copied, prompt_rows, run_ranks, same_weights, small_tokenizer

from rlhf_kit import distributed
from rlhf_kit.config import (
    DataConfig,
    EMAConfig,
    EngineConfig,
    GenerationConfig,
    LoRAConfig,
    OptimizerConfig,
    SFTConfig,
    preset,
)
from rlhf_kit.ema import EMA
from rlhf_kit.hybrid_engine.decode import Decoder
from rlhf_kit.hybrid_engine.engine import HybridEngine
from rlhf_kit.hybrid_engine.partitions import gathered
from rlhf_kit.hybrid_engine.self_test import self_test
from rlhf_kit.hybrid_engine.shards import Shard, shards, vocabulary_range
from rlhf_kit.hybrid_engine.tensor_parallel import (
    TensorParallelCopy,
    group_of,
    require_hosts,
    require_same,
)
from rlhf_kit.hybrid_engine.training import rank_timeout, start_deepspeed
from rlhf_kit.models import add_lora, disable_dropout
from rlhf_kit.sft import SFTTrainer
from rlhf_kit.tokenization import collate_prompts, encode_demonstrations
from rlhf_kit.types import PromptBatch, Rollout

GROUPED = {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96}
KINDS: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 48},
    "llama": {**GROUPED, "tie_word_embeddings": True},
    "mistral": {**GROUPED, "sliding_window": 16},
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "gemma": {**GROUPED, "num_key_value_heads": 1},
    "gemma2": {**GROUPED, "sliding_window": 16},
    "gpt_neox": {"intermediate_size": 96},
    "gpt2": {},
    "phi": {"num_key_value_heads": 2, "intermediate_size": 96},
}
"""Fields of each architecture beside those of `model`. The vocabulary is odd."""
GREEDY = GenerationConfig(max_new_tokens=10, temperature=0.0, slots=4)
SAMPLED = GenerationConfig(max_new_tokens=10, slots=4)
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, eps=1e-3)
WAYS = {"greedy": GREEDY, "sampled": SAMPLED}
ZERO_3 = ("opt", "llama")
WHENS = ("at first", "after a step", "with the average", "without the average")
STOP, PAD = 0, 1


def model(kind: str) -> Any:
    """Four heads of 16; biases and norms are random too, so that none can be lost or doubled."""
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=301,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=STOP,
        pad_token_id=PAD,
        **KINDS[kind],
    )
    torch.manual_seed(3)
    made = transformers.AutoModelForCausalLM.from_config(config).eval()
    disable_dropout(made)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        made.get_output_embeddings().weight[STOP] *= 4  # ends now and then
    return made


def decoder(of: Any) -> Decoder:
    return Decoder(of, eos_token_ids=[STOP], pad_token_id=PAD)


def prompts(tokenizer: Any, count: int = 8) -> PromptBatch:
    return collate_prompts(tokenizer, prompt_rows(count), seeds=range(count))


def rows(batch: PromptBatch, part: slice) -> PromptBatch:
    """Some rows, padded no further than their own longest, as a rank's loader gives them."""
    mask = batch.attention_mask[part]
    first = int(mask.any(0).int().argmax())
    return PromptBatch(
        batch.input_ids[part, first:], mask[:, first:], batch.seeds[part], batch.dialogues[part]
    )


def share(count: int = 8) -> slice:
    """This rank's rows: one, and of the first rank all that are left."""
    behind = distributed.world_size() - 1 - distributed.rank()
    end = count - behind
    return slice(end - 1 if distributed.rank() else 0, end)


def compare(want: Rollout, got: Rollout, part: slice | None = None) -> dict[str, Any]:
    """Whether the tokens of two rollouts are the same, and how far their logprobs are apart."""
    part = part or slice(None)
    length = got.response_ids.shape[1]
    mask = want.response_mask[part]
    assert torch.equal(mask[:, :length], got.response_mask) and not mask[:, length:].any()
    assert torch.equal(want.ended[part], got.ended)
    ids = want.response_ids[part, :length]
    gap = (want.logprobs[part, :length] - got.logprobs).abs().max()
    return {
        "tokens": int(mask.sum()),
        "ids": got.response_ids.tolist(),
        "equal": torch.equal(ids[got.response_mask], got.response_ids[got.response_mask]),
        "gap": float(gap),
    }


def engine_of(source: Any, **fields: Any) -> HybridEngine:
    settings = {"zero_stage": 3, "generation_tp": distributed.world_size(), **fields}
    return HybridEngine(
        source,
        EngineConfig(**settings),
        OPTIMIZER,
        total_steps=4,
        eos_token_ids=[STOP],
        pad_token_id=PAD,
    )


def whole(engine: HybridEngine, kind: str) -> Decoder:
    """One process's way to generate from the engine's weights as they are now."""
    plain = model(kind)
    with gathered(engine.module.parameters()):
        plain.load_state_dict(copied(engine.module))
    return decoder(plain)


# ---- what ranks do together


def in_parts(kind: str, batch: PromptBatch) -> dict[str, dict[str, Any]]:
    """A copy of a whole model, without DeepSpeed."""
    source = model(kind)
    parts = TensorParallelCopy(source, group_of(distributed.world_size(), rank_timeout()))
    parts.update(0)
    return {
        name: compare(
            decoder(source).generate(batch, way), decoder(parts.model).generate(batch, way)
        )
        for name, way in WAYS.items()
    }


def in_bf16(batch: PromptBatch) -> dict[str, Any]:
    source = model("llama").bfloat16()
    parts = TensorParallelCopy(source, group_of(distributed.world_size(), rank_timeout()))
    parts.update(0)
    got = decoder(parts.model).generate(batch, SAMPLED)
    require_same(got, parts.group)  # else the ranks would have lost each other
    with torch.no_grad():
        mask = got.attention_mask
        logits = source(
            input_ids=got.sequences,
            attention_mask=mask,
            position_ids=(mask.long().cumsum(-1) - 1).clamp(min=0),
        ).logits[:, -got.response_ids.shape[1] - 1 : -1]
    logprobs = logits.float().log_softmax(-1).gather(-1, got.response_ids[..., None])[..., 0]
    gaps = (logprobs - got.logprobs)[got.response_mask].abs()
    return {"mean": float(gaps.mean()), "max": float(gaps.max())}


def through_training(kind: str, tokenizer: Any) -> dict[str, Any]:
    """generate, step, generate; with the average in place for a while; and step again."""
    batch, part = prompts(tokenizer), share()
    data = encode_demonstrations(tokenizer, prompt_rows(16), DataConfig()).rows
    engine = engine_of(model(kind))
    trainer = SFTTrainer(engine, SFTConfig(micro_batch_size=2), pad_token_id=PAD)
    ema = EMA(engine.module, EMAConfig(decay=0.5, warmup=False))
    found: dict[str, Any] = {}

    def generate(when: str) -> None:
        for name, way in WAYS.items():
            want = whole(engine, kind).generate(batch, way)
            got = engine.generate(rows(batch, part), way)
            found[f"{when}, {name}"] = compare(want, got, part)

    generate(WHENS[0])
    trainer.step(data[:8])
    ema.update()
    generate(WHENS[1])
    with ema.swapped_in():
        generate(WHENS[2])
    generate(WHENS[3])
    self_tested = self_test(engine, rows(batch, part), SAMPLED)
    trainer.step(data[8:])
    with gathered(engine.module.parameters()):
        weights = copied(engine.module)
    return {"generated": found, "self-test": self_tested, "weights": weights}


def only_training(kind: str, tokenizer: Any) -> dict[str, torch.Tensor]:
    """The two steps of `through_training`, and nothing else."""
    data = encode_demonstrations(tokenizer, prompt_rows(16), DataConfig()).rows
    engine = engine_of(model(kind), generation_tp=1)
    trainer = SFTTrainer(engine, SFTConfig(micro_batch_size=2), pad_token_id=PAD)
    for part in (data[:8], data[8:]):
        trainer.step(part)
    with gathered(engine.module.parameters()):
        return copied(engine.module)


def with_adapters(batch: PromptBatch) -> dict[str, Any]:
    """LoRA on GPT-2, whose weights are transposed and fused."""

    def adapted() -> Any:
        source = model("gpt2")
        add_lora(source, LoRAConfig(rank=4, alpha=8))
        torch.manual_seed(5)
        for name, parameter in source.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        return source.eval()

    alone, part = adapted(), share()
    engine = engine_of(adapted(), offload_parameters=True, offload_optimizer=True)
    with gathered(engine.module.parameters()):
        before = copied(engine.module)
    want = decoder(alone).generate(batch, SAMPLED)
    found = compare(want, engine.generate(rows(batch, part), SAMPLED), part)
    without = decoder(model("gpt2")).generate(batch, SAMPLED).response_ids
    with gathered(engine.module.parameters()):
        untouched = same_weights(before, copied(engine.module))
    matters = without.shape != want.response_ids.shape or not torch.equal(
        without, want.response_ids
    )
    return {**found, "untouched": untouched, "matters": matters}


def memory(batch: PromptBatch) -> dict[str, Any]:
    """What is allocated while weights are kept, updated, freed, and generated from again."""
    part = share()
    engine = engine_of(model("llama"), zero_stage=2, keep_cache=True)
    assert engine.parallel is not None
    sizes, places, tokens = [engine.parallel.nbytes()], [], []

    def generate() -> None:
        assert engine.parallel is not None
        tokens.append(engine.generate(rows(batch, part), GREEDY).response_ids)
        sizes.append(engine.parallel.nbytes())
        places.append([p.data_ptr() for p in engine.parallel.model.parameters()])

    generate()
    versions = [engine.parallel.version]
    generate()
    loss = engine(input_ids=batch.input_ids, labels=batch.input_ids).loss
    engine.backward(loss)
    engine.step()
    generate()
    versions.append(engine.parallel.version)
    stats = engine.last_stats
    attention = engine.parallel.model.model.layers[1].self_attn
    one_matrix = [
        x.weight.data_ptr() for x in (attention.q_proj, attention.k_proj, attention.v_proj)
    ]
    engine.free_generation_weights()
    sizes.append(engine.parallel.nbytes())
    assert engine.last_stats is stats
    generate()
    return {
        "sizes": sizes,
        "same places": places[0] == places[1] == places[2],
        "same tokens": torch.equal(tokens[0], tokens[1]) and torch.equal(tokens[2], tokens[3]),
        "versions": versions,
        "between q, k and v": [b - a for a, b in zip(one_matrix, one_matrix[1:], strict=False)],
    }


def two_ranks(output: Path) -> None:
    start_deepspeed()
    tokenizer = small_tokenizer()
    batch = prompts(tokenizer)
    found = {
        "in parts": {kind: in_parts(kind, batch) for kind in KINDS},
        "bf16": in_bf16(batch),
        "through training": {kind: through_training(kind, tokenizer) for kind in ZERO_3},
        "only training": {kind: only_training(kind, tokenizer) for kind in ZERO_3},
        "adapters": with_adapters(batch),
        "memory": memory(batch),
    }
    torch.save(found, output / f"{distributed.rank()}.pt")


def four_ranks(output: Path) -> None:
    """One group of four over two key/value heads; then two groups, one of which ends early."""
    start_deepspeed()
    tokenizer = small_tokenizer()
    batch = prompts(tokenizer)
    found = {"four": in_parts("llama", batch)}
    engine = engine_of(model("llama"), generation_tp=2)
    plain, part = whole(engine, "llama"), share()
    limit = 1 if distributed.rank() < 2 else 40
    way = dataclasses.replace(SAMPLED, max_new_tokens=limit, min_new_tokens=limit)
    got = engine.generate(rows(batch, part), way)
    found["two and two"] = {"sampled": compare(plain.generate(batch, way), got, part)}
    torch.save(found, output / f"{distributed.rank()}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    output = tmp_path_factory.mktemp("two")
    run_ranks(2, two_ranks, output)
    return [torch.load(output / f"{rank}.pt", weights_only=False) for rank in range(2)]


def agree(found: dict[str, dict[str, Any]]) -> None:
    for name, one in found.items():
        assert one["equal"] and one["gap"] < 1e-5 and one["tokens"] > 0, (name, one)


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_generates_in_two_parts_what_it_does_whole(
    kind: str, two: list[dict[str, Any]]
):
    for rank in two:
        agree(rank["in parts"][kind])


@pytest.mark.parametrize("kind", ZERO_3)
def test_from_zero_3_shards_every_rank_gets_what_one_process_generates_after_every_change(
    kind: str, two: list[dict[str, Any]]
):
    for rank in two:
        found = rank["through training"][kind]
        agree(found["generated"])
        ids = [found["generated"][f"{when}, sampled"]["ids"] for when in WHENS]
        assert ids[0] != ids[1] != ids[2] != ids[3] == ids[1]
        assert found["self-test"].tokens_equal
        assert found["self-test"].largest_logprob_gap < 1e-4


@pytest.mark.parametrize("kind", ZERO_3)
def test_training_steps_are_the_same_to_the_last_bit_with_generation_between(
    kind: str, two: list[dict[str, Any]]
):
    one, other = (rank["through training"][kind]["weights"] for rank in two)
    assert same_weights(one, other)
    assert same_weights(one, two[0]["only training"][kind])


def test_bf16_logits_are_equal_on_all_ranks_and_near_the_plain_forwards(two: list[dict[str, Any]]):
    assert two[0]["bf16"] == two[1]["bf16"]
    assert two[0]["bf16"]["mean"] < 0.02 and two[0]["bf16"]["max"] < 0.15


def test_adapters_are_merged_into_the_parts_and_never_into_the_base(two: list[dict[str, Any]]):
    for rank in two:
        found = rank["adapters"]
        agree({"adapters": found})
        assert found["untouched"] and found["matters"]


def test_parts_take_their_share_of_memory_stay_in_place_and_are_freed(two: list[dict[str, Any]]):
    # Of each of 2 layers: q and o 64 x 64, k and v 32 x 64, three times 96 x 64 in the MLP, halved;
    # two norms of 64. Once: 301 x 64 embeddings, of which the head is a part, and a norm.
    layer = (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64) // 2 + 2 * 64
    each = 4 * (2 * layer + 301 * 64 + 64)
    for rank in two:
        found = rank["memory"]
        assert found["sizes"] == [0, each, each, each, 0, each]
        assert found["same places"] and found["same tokens"]
        assert found["versions"] == [0, 1]
        assert found["between q, k and v"] == [4 * 32 * 64, 4 * 16 * 64]


def test_four_ranks_share_two_key_value_heads_and_groups_do_not_wait_for_each_other(
    tmp_path: Path,
):
    run_ranks(4, four_ranks, tmp_path)
    tokens = []
    for number in range(4):
        rank = torch.load(tmp_path / f"{number}.pt", weights_only=False)
        agree(rank["four"])
        agree(rank["two and two"])
        tokens.append(rank["two and two"]["sampled"]["tokens"])
    # 5, 1, 1 and 1 rows of one token in the first group, of forty in the second
    assert tokens == [5, 1, 40, 40]


# ---- alone


def test_the_parts_of_grouped_query_attention_by_hand():
    made = model("llama")  # 4 query heads and 2 key/value heads of 16, an MLP of 96
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj")
    names += ("mlp.down_proj",)

    def of(rank: int, ranks: int) -> list[Shard]:
        found = shards(made, rank, ranks)
        return [found[f"model.layers.1.{name}"] for name in names]

    assert of(1, 2) == [
        Shard(((32, 32),)),
        Shard(((16, 16),)),
        Shard(inputs=(32, 32)),
        Shard(((48, 48),)),
        Shard(inputs=(48, 48)),
    ]
    # With four ranks, ranks 2 and 3 hold the same key/value head.
    assert of(2, 4)[:2] == [Shard(((32, 16),)), Shard(((16, 16),))]
    assert of(3, 4)[:2] == [Shard(((48, 16),)), Shard(((16, 16),))]


def test_fused_projections_are_split_as_they_are_laid_out():
    found = shards(model("gpt2"), 1, 2)["transformer.h.0.attn.c_attn"]
    assert found == Shard(((32, 32), (96, 32), (160, 32)))  # q, k and v of 64, one after another
    found = shards(model("gpt_neox"), 1, 2)["gpt_neox.layers.0.attention.query_key_value"]
    assert found == Shard(((96, 96),))  # q, k and v of 16 a head, head after head


def test_the_last_rank_has_fewer_words():
    assert [vocabulary_range(301, rank, 4) for rank in range(4)] == [
        (0, 76),
        (76, 76),
        (152, 76),
        (228, 73),
    ]
    assert vocabulary_range(5, 3, 4) == (5, 0)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("phi3", {"num_key_value_heads": 4}, "Phi3ForCausalLM has model.layers.0.self_attn.qkv_pr"),
        ("mixtral", {}, "MixtralForCausalLM has model.layers.0.mlp.gate.weight, which can't be"),
        ("olmo2", {}, "Olmo2ForCausalLM has model.layers.0.self_attn.q_norm.weight, which can't"),
        ("llama", {"num_attention_heads": 3}, "is 2, which does not divide the 3 attention heads"),
        (
            "llama",
            {"num_attention_heads": 6, "num_key_value_heads": 3},
            "generation_tp is 2, but the 3 key/value heads of LlamaForCausalLM can't be shared",
        ),
        (
            "llama",
            {"intermediate_size": 97},
            "does not divide the 97 units of LlamaForCausalLM's model.layers.0.mlp.gate_proj",
        ),
    ],
)
def test_what_can_not_be_split_is_refused_by_name(kind: str, fields: dict[str, Any], message: str):
    sizes = {"hidden_size": 96, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 32}
    sizes |= {"num_hidden_layers": 1, "vocab_size": 50, "pad_token_id": 0, **fields}
    if kind != "llama":
        del sizes["head_dim"]
    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(kind, **sizes)
        )
    with pytest.raises(ValueError, match=message):
        shards(made, 0, 2)


def test_groups_must_fit_into_a_host(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    require_hosts(3)
    with pytest.raises(ValueError, match="generation_tp is 4, .* ranks of each host, 6; choose"):
        require_hosts(4)


def test_only_the_actor_generates_in_groups():
    with pytest.raises(ValueError, match="critic_engine.generation_tp must be 1: only the actor"):
        preset("toy", critic_engine__generation_tp=2)
    with pytest.raises(ValueError, match="generation_tp must be at least 1"):
        preset("toy", actor_engine__generation_tp=0)


def test_ranks_that_sampled_different_tokens_stop(tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    rollout = decoder(model("llama")).generate(prompts(tokenizer), SAMPLED)
    said: list[Any] = []

    def others(value: Any, group: Any) -> list[Any]:
        said.append(value)
        return said

    monkeypatch.setattr(distributed, "gather_objects", others)
    group: Any = None
    require_same(rollout, group)
    require_same(rollout, group)
    ids = rollout.response_ids.clone()
    ids[1, 0] += 1
    with pytest.raises(RuntimeError, match="sampled different tokens from the same prompts"):
        require_same(dataclasses.replace(rollout, response_ids=ids), group)
