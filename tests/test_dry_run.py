"""Sizes and passes on the meta device, against counts by hand and against tensors that exist.

Shapes: B batch, T sequence tokens, D hidden size, F width of the MLP, H heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from rlhf_kit.config import LoRAConfig
from rlhf_kit.hybrid_engine.dry_run import Model, read_config
from rlhf_kit.hybrid_engine.watch import BLOCK, Watch
from rlhf_kit.models import add_lora, disable_dropout, load_causal_lm

B, T, D, F, H, V = 4, 64, 64, 256, 4, 320
"""Such that every tensor that counts is a multiple of 512 bytes."""
FIELDS: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": F, "word_embed_proj_dim": D},
    "llama": {"intermediate_size": F, "num_key_value_heads": 2, "head_dim": D // H},
    "qwen2": {"intermediate_size": F, "num_key_value_heads": 2},
    "gemma2": {"intermediate_size": F, "num_key_value_heads": 2, "head_dim": D // H},
    "gpt2": {},
    "gpt_neox": {"intermediate_size": F},
}


def config_of(kind: str, layers: int = 2, **fields: Any) -> Any:
    return transformers.AutoConfig.for_model(
        kind,
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=layers,
        num_attention_heads=H,
        max_position_embeddings=T,
        **{**FIELDS[kind], **fields},
    )


def model_of(kind: str, layers: int = 2, **how: Any) -> Model:
    return Model(config_of(kind, layers).to_json_string(use_diff=False), **how)


# ---- sizes


def test_parameters_of_an_opt_model_counted_by_hand():
    sizes = model_of("opt").sizes
    assert sizes.embeddings == V * D + (T + 2) * D  # OPT keeps two positions more
    assert sizes.matrices == 2 * (4 * D * D + 2 * D * F)
    # Biases of q, k, v, o; of the MLP; two norms a layer, and one at the end.
    assert sizes.vectors == 2 * (4 * D + F + D + 4 * D) + 2 * D
    assert (sizes.head, sizes.tied, sizes.largest) == (V * D, True, V * D)
    assert (sizes.kv, sizes.queries) == (2 * 2 * D, 2 * D)
    assert sizes.trained_matrices == sizes.embeddings + sizes.matrices
    assert sizes.trained == sizes.total


def test_grouped_heads_keep_less_and_an_untied_head_counts_once():
    sizes = model_of("llama", layers=5).sizes
    assert sizes.kv == 5 * 2 * 2 * (D // H)
    assert not sizes.tied and sizes.embeddings == sizes.head == V * D
    assert sizes.total == sizes.embeddings + sizes.head + sizes.matrices + sizes.vectors


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("scorer", [False, True])
def test_every_architecture_is_counted_as_transformers_counts_it(kind: str, scorer: bool):
    config = config_of(kind, layers=5)
    auto: Any = transformers.AutoModelForCausalLM
    if scorer:
        auto, config.num_labels = transformers.AutoModelForSequenceClassification, 1
    with torch.device("meta"):
        module = auto.from_config(config)
    model = Model(config.to_json_string(use_diff=False), scorer)
    assert model.sizes.total == sum(p.numel() for p in module.parameters())


def test_adapters_by_hand():
    sizes = model_of("opt", layers=5, lora=LoRAConfig(rank=4)).sizes
    # A of rank 4 reads what the layer reads, B writes what it writes: q, k, v, o, and the MLP's.
    assert sizes.adapters == 5 * 4 * (4 * 2 * D + 2 * (D + F))
    assert sizes.trained == sizes.trained_matrices == sizes.adapters
    assert sizes.largest == 4 * F
    assert sizes.total == model_of("opt", layers=5).sizes.total + sizes.adapters


# ---- passes


def per_layer(**how: Any) -> Callable[[str], int]:
    """Bytes that a layer keeps for the backward pass, of B texts of T tokens."""

    def kept(kind: str) -> int:
        three, two = (model_of(kind, n, **how).text(B, T, T).kept for n in (3, 2))
        return three - two

    return kept


def test_what_a_layer_keeps_by_hand():
    tokens, rows = B * T, 4 * B * H * T  # fp32, a log-sum-exp of each row and head
    kept = per_layer(dtype="bf16")
    # OPT: input and output of two norms, queries, keys, values and their attention, the ReLU's
    # output; mean and deviation of two norms in fp32.
    assert kept("opt") == tokens * (2 * (8 * D + F) + 2 * 2 * 4) + rows
    # Llama: of two norms the input in fp32, the normalised and the scaled one, and the factor in
    # fp32; queries, attention, keys and values of 2 of 4 heads; gate, its SiLU, up, the product.
    norms = 2 * ((4 + 2 + 2) * D + 4)
    assert kept("llama") == tokens * (norms + 2 * (3 * D + 4 * F)) + rows


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize(("checkpointing", "rank"), [(False, 0), (True, 0), (False, 4)])
def test_what_is_kept_is_what_autograd_saves_of_tensors_that_exist(
    kind: str, checkpointing: bool, rank: int
):
    how: dict[str, Any] = {"dtype": "fp32", "checkpointing": checkpointing}
    how["lora"] = LoRAConfig(rank=rank)
    assert per_layer(**how)(kind) == saved(kind, 3, **how) - saved(kind, 2, **how)


def saved(kind: str, layers: int, *, dtype: str, checkpointing: bool, lora: LoRAConfig) -> int:
    """Bytes of storages that autograd saves in a forward pass of a real model, weights not."""
    module = transformers.AutoModelForCausalLM.from_config(config_of(kind, layers))
    module.config.use_cache = False
    disable_dropout(module)
    if lora.rank:
        add_lora(module, lora)
    if checkpointing:
        module.gradient_checkpointing_enable({"use_reentrant": False})
    module.train()
    known = {t.untyped_storage().data_ptr() for t in module.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = -(-storage.nbytes() // BLOCK) * BLOCK
        return tensor

    ids = torch.zeros(B, T, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = module(input_ids=ids).logits
    total = sum(found.values())
    del logits
    return total


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_a_deep_model_is_continued_from_two_shallow_ones(
    kind: str, monkeypatch: pytest.MonkeyPatch
):
    from rlhf_kit.hybrid_engine import dry_run

    continued = model_of(kind, 7).policy(B, T // 2, T // 2, 32)
    monkeypatch.setattr(dry_run, "SHALLOW", (6, 7))
    dry_run._measure.cache_clear()
    assert model_of(kind, 7).policy(B, T // 2, T // 2, 32) == continued


def test_the_watch_counts_what_lives_and_the_most_that_did():
    with Watch(device="cpu") as watch:
        a = torch.zeros(128)
        b = a + 1
        view = b[:64]
        del b
        assert watch.live == 2 * 512  # the view keeps b's storage alive
        del view
        assert (watch.live, watch.peak) == (512, 1024)


def test_a_checkpointed_pass_keeps_inputs_of_layers_and_takes_one_layer_more():
    plain, checkpointed = (
        model_of("opt", 12, checkpointing=on).policy(B, T // 2, T // 2, 32) for on in (False, True)
    )
    assert plain.kept - checkpointed.kept > 11 * B * T * 2 * (7 * D + F)
    assert checkpointed.peak < plain.peak / 2


# ---- configurations


def test_a_configuration_comes_from_a_directory_a_file_or_the_toy_world(
    model_dir: Callable[..., str], tokenizer: Any
):
    path = model_dir("opt")
    expected = sum(p.numel() for p in load_causal_lm(path, tokenizer).parameters())
    for name in (path, f"{path}/config.json"):
        config = read_config(name)
        assert Model(config.to_json_string(use_diff=False)).sizes.total == expected
    assert read_config("toy_world").num_hidden_layers > 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./nowhere", "model directory ./nowhere does not exist"),
        ("{path}/missing.json", "does not exist"),
    ],
)
def test_no_configuration_is_one_sentence(name: str, said: str, tmp_path: Any):
    with pytest.raises(ValueError, match=said):
        read_config(name.format(path=tmp_path))
