"""The decode loop against transformers' own generate and forward.

Shapes: B batch, P prompt, R response, T = P + R.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from rlhf_kit.config import GenerationConfig
from rlhf_kit.hybrid_engine.decode import Decoder
from rlhf_kit.types import PromptBatch, Rollout

transformers.logging.set_verbosity_error()

PAD, EOS = 0, (5, 7)
TINY = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = TINY | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "opt": TINY | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": TINY,
    "gpt_neox": TINY | {"intermediate_size": 48},
    "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": None},
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "gemma": GROUPED,
}
WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": GROUPED | {"sliding_window": 5},
    "qwen2": GROUPED | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "gemma2": GROUPED | {"sliding_window": 5, "attn_logit_softcapping": 2.0},
    "gemma3_text": GROUPED | {"sliding_window": 5, "sliding_window_pattern": 2},
}


def tiny(kind: str, **fields: Any) -> Any:
    """A random model whose logits are far enough apart for greedy comparisons."""
    config = transformers.AutoConfig.for_model(kind, **fields)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def llama() -> Any:
    return tiny("llama", **GROUPED)


def decoder(model: Any) -> Decoder:
    return Decoder(model, eos_token_ids=EOS, pad_token_id=PAD)


def prompts(rows: int = 9, longest: int = 8, extra: int = 0) -> PromptBatch:
    """Ragged prompts, padded on the left, with `extra` columns of padding more."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, longest + 1, (rows,), generator=generator)
    ids = torch.randint(8, 48, (rows, longest), generator=generator)
    mask = torch.arange(longest) >= longest - lengths[:, None]
    ids = torch.nn.functional.pad(ids.masked_fill(~mask, PAD), (extra, 0), value=PAD)
    mask = torch.nn.functional.pad(mask, (extra, 0), value=False)
    return PromptBatch(ids, mask, 100 + torch.arange(rows), ((),) * rows)


def pick(batch: PromptBatch, index: torch.Tensor) -> PromptBatch:
    return PromptBatch(
        batch.input_ids[index],
        batch.attention_mask[index],
        batch.seeds[index],
        tuple(batch.dialogues[i] for i in index),
    )


def plain_logits(model: Any, rollout: Rollout) -> torch.Tensor:
    """[B, R, V] of an ordinary forward pass over the padded sequences."""
    mask = rollout.attention_mask
    with torch.no_grad():
        logits = model(
            input_ids=rollout.sequences,
            attention_mask=mask.long(),
            position_ids=(mask.long().cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).logits
    first = rollout.prompts.input_ids.shape[1] - 1
    return logits[:, first:-1]


def compare(left: Rollout, right: Rollout) -> None:
    assert left.response_ids.tolist() == right.response_ids.tolist()
    assert left.response_mask.tolist() == right.response_mask.tolist()
    assert left.ended.tolist() == right.ended.tolist()
    torch.testing.assert_close(left.logprobs, right.logprobs, atol=1e-5, rtol=0)


def check_against_transformers(model: Any) -> None:
    batch = prompts(longest=12)
    greedy = GenerationConfig(max_new_tokens=16, temperature=0, min_new_tokens=0, slots=4)
    ours = decoder(model).generate(batch, greedy)
    theirs = model.generate(
        batch.input_ids,
        attention_mask=batch.attention_mask.long(),
        do_sample=False,
        max_new_tokens=16,
        eos_token_id=list(EOS),
        pad_token_id=PAD,
    )
    assert ours.sequences.tolist() == theirs.tolist()

    config = GenerationConfig(max_new_tokens=16, min_new_tokens=1, slots=4)
    sampled = decoder(model).generate(batch, config)
    want = plain_logits(model, sampled)
    want[:, 0, list(EOS)] = -torch.inf
    want = want.log_softmax(-1).gather(2, sampled.response_ids[..., None])[..., 0]
    want = want.masked_fill(~sampled.response_mask, 0.0)
    torch.testing.assert_close(sampled.logprobs, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", CONFIGS)
def test_greedy_and_logprobs_equal_transformers(kind: str) -> None:
    check_against_transformers(tiny(kind, **CONFIGS[kind]))


@pytest.mark.parametrize("kind", WINDOWS)
def test_sliding_windows_and_soft_caps_equal_transformers(kind: str) -> None:
    check_against_transformers(tiny(kind, **WINDOWS[kind]))


def test_multi_head_attention_equals_transformers() -> None:
    check_against_transformers(tiny("llama", **GROUPED | {"num_key_value_heads": 4}))


def test_slots_order_and_padding_change_nothing() -> None:
    decode = decoder(llama())
    batch = prompts(rows=70)
    whole = decode.generate(batch, GenerationConfig(max_new_tokens=12))
    assert whole.ended.any() and not whole.ended.all()
    for slots in (1, 3, 64):
        compare(whole, decode.generate(batch, GenerationConfig(max_new_tokens=12, slots=slots)))
    padded = decode.generate(prompts(rows=70, extra=5), GenerationConfig(max_new_tokens=12))
    compare(whole, padded)

    order = torch.randperm(70, generator=torch.Generator().manual_seed(0))
    mixed = decode.generate(pick(batch, order), GenerationConfig(max_new_tokens=12, slots=8))
    assert mixed.response_ids.tolist() == whole.response_ids[order].tolist()
    torch.testing.assert_close(mixed.logprobs, whole.logprobs[order], atol=1e-5, rtol=0)


def test_sampled_tokens_follow_the_model() -> None:
    model = llama()
    batch = prompts(rows=1, longest=4)
    many = 4000
    batch = pick(batch, torch.zeros(many, dtype=torch.long))
    batch = PromptBatch(batch.input_ids, batch.attention_mask, torch.arange(many), batch.dialogues)
    config = GenerationConfig(max_new_tokens=1, temperature=3.0, min_new_tokens=0)
    rollout = decoder(model).generate(batch, config)
    probs = (plain_logits(model, rollout)[0, 0] / 3.0).softmax(-1).double()
    counts = torch.bincount(rollout.response_ids[:, 0], minlength=48).double()
    expected = probs * many
    assert expected.min() >= 5  # what the test statistic needs
    freedom = len(expected) - 1
    # The 99.9 % point of chi-square, by the Wilson-Hilferty approximation.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert ((counts - expected) ** 2 / expected).sum() < limit


def test_a_response_stops_at_each_eos_and_nothing_follows() -> None:
    config = GenerationConfig(max_new_tokens=16, temperature=2.0, min_new_tokens=0, slots=16)
    rollout = decoder(llama()).generate(prompts(rows=80), config)
    seen = set()
    for ids, mask, logprobs, ended in zip(
        rollout.response_ids, rollout.response_mask, rollout.logprobs, rollout.ended, strict=True
    ):
        length = int(mask.sum())
        assert mask.tolist() == [True] * length + [False] * (len(mask) - length)
        assert not set(EOS) & set(ids[: length - 1].tolist())
        assert ids[length:].tolist() == [PAD] * (len(ids) - length)
        assert (logprobs[:length] < 0).all() and (logprobs[length:] == 0).all()
        assert bool(ended) == (int(ids[length - 1]) in EOS)
        assert ended or length == 16
        seen.add(int(ids[length - 1]))
    assert set(EOS) <= seen


def test_no_eos_before_min_new_tokens() -> None:
    decode = decoder(llama())
    for least in (0, 1, 5):
        config = GenerationConfig(
            max_new_tokens=12, min_new_tokens=least, temperature=2.0, slots=16
        )
        lengths = decode.generate(prompts(rows=80), config).response_mask.sum(1)
        assert lengths.min() == max(least + 1, 1)


def test_logprobs_are_those_of_the_filtered_distribution() -> None:
    model = llama()
    config = GenerationConfig(max_new_tokens=8, temperature=1.5, top_k=3, min_new_tokens=0, slots=4)
    rollout = decoder(model).generate(prompts(), config)
    logits = plain_logits(model, rollout) / 1.5
    kept, index = logits.topk(3, dim=-1)
    is_sampled = index == rollout.response_ids[..., None]
    assert is_sampled.any(-1)[rollout.response_mask].all()
    want = (kept.log_softmax(-1) * is_sampled).sum(-1)[rollout.response_mask]
    torch.testing.assert_close(rollout.logprobs[rollout.response_mask], want, atol=1e-5, rtol=0)


def test_stream_equals_generate() -> None:
    decode = decoder(llama())
    batch = prompts()
    config = GenerationConfig(max_new_tokens=12)
    rollout = decode.generate(batch, config)
    for row in range(4):
        ids = batch.input_ids[row][batch.attention_mask[row]]
        tokens = list(decode.stream(ids.tolist(), config, seed=int(batch.seeds[row])))
        mask = rollout.response_mask[row]
        assert [token.id for token in tokens] == rollout.response_ids[row][mask].tolist()
        got = torch.tensor([token.logprob for token in tokens])
        torch.testing.assert_close(got, rollout.logprobs[row][mask], atol=1e-5, rtol=0)


def test_the_model_is_free_between_two_streamed_tokens() -> None:
    model = llama()
    ids = torch.tensor([[9, 10, 11]])
    want = model(input_ids=ids).logits
    stream = decoder(model).stream(ids[0], GenerationConfig(max_new_tokens=8), seed=1)
    next(stream)
    assert model(input_ids=ids).logits.equal(want)
    assert want.requires_grad
    stream.close()


def test_generate_reads_the_weights_as_they_are() -> None:
    model = llama()
    decode = decoder(model)
    config = GenerationConfig(max_new_tokens=8, temperature=0, min_new_tokens=0)
    decode.generate(prompts(), config)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(-2)
    after = decode.generate(prompts(), config)
    compare(after, decoder(model).generate(prompts(), config))
    before = decoder(llama()).generate(prompts(), config)
    assert after.response_ids.tolist() != before.response_ids.tolist()


def test_the_model_comes_back_as_it_was() -> None:
    model = tiny("gpt2", **TINY | {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5})
    config = GenerationConfig(max_new_tokens=6)
    want = decoder(model).generate(prompts(), config)
    model.train()
    model.transformer.h[0].attn.eval()
    states = [module.training for module in model.modules()]
    attention = model.config._attn_implementation
    compare(want, decoder(model).generate(prompts(), config))
    assert [module.training for module in model.modules()] == states
    assert model.config._attn_implementation == attention
    assert not want.logprobs.requires_grad and not want.logprobs.is_inference()

    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        decoder(model).generate(prompts(), config)
    assert [module.training for module in model.modules()] == states
    assert model.config._attn_implementation == attention


def test_lora_adapters_are_part_of_the_model() -> None:
    peft = pytest.importorskip("peft")
    base = llama()
    config = GenerationConfig(max_new_tokens=8, min_new_tokens=0)
    plain = decoder(base).generate(prompts(), config)
    lora = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5)
    model = peft.get_peft_model(base, lora).train()
    compare(plain, decoder(model).generate(prompts(), config))  # B starts at zero
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted = decoder(model).generate(prompts(), config)
    assert adapted.response_ids.tolist() != plain.response_ids.tolist()
    compare(adapted, decoder(model.merge_and_unload()).generate(prompts(), config))


def test_finished_rows_leave_and_cost_nothing() -> None:
    decode = decoder(llama())
    rollout = decode.generate(prompts(rows=40), GenerationConfig(max_new_tokens=12, slots=8))
    stats = decode.last_stats
    assert stats is not None
    assert stats.new_tokens == int(rollout.response_mask.sum())
    assert stats.prompt_tokens == int(prompts(rows=40).attention_mask.sum())
    # A prompt pass samples the first token of a row, each later token is one row-step.
    assert stats.row_steps == stats.new_tokens - 40
    assert 0 < stats.occupancy <= 1 and stats.tokens_per_second > 0


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_learned_positions_have_an_end(kind: str) -> None:
    decode = decoder(tiny(kind, **CONFIGS[kind]))
    fits = GenerationConfig(max_new_tokens=56, min_new_tokens=56, slots=4)
    assert decode.generate(prompts(rows=2), fits).response_mask.all()
    too_long = GenerationConfig(max_new_tokens=60)
    with pytest.raises(ValueError, match="64 positions: lower max_new_tokens"):
        decode.generate(prompts(), too_long)
    with pytest.raises(ValueError, match="64 positions"):
        decode.stream([9] * 5, too_long, seed=0)


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("gptj", TINY | {"rotary_dim": 4}, "does not attend through transformers' attention"),
        ("gpt_oss", GROUPED | {"num_local_experts": 4}, "attends with s_aux"),
        ("llama4_text", GROUPED | {"num_local_experts": 2}, "uses chunked_attention"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    kind: str, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        decoder(tiny(kind, **fields)).generate(prompts(), GenerationConfig(max_new_tokens=4))


def test_bad_input_is_one_sentence() -> None:
    model = llama()
    with pytest.raises(ValueError, match="at least one EOS"):
        Decoder(model, eos_token_ids=[], pad_token_id=0)
    with pytest.raises(ValueError, match="not all in the vocabulary of 48"):
        Decoder(model, eos_token_ids=[48], pad_token_id=0)
    with pytest.raises(ValueError, match="Linear is not a transformers model"):
        Decoder(torch.nn.Linear(2, 2), eos_token_ids=EOS, pad_token_id=0)
    batch = prompts()
    empty = PromptBatch(
        batch.input_ids, torch.zeros_like(batch.attention_mask), batch.seeds, batch.dialogues
    )
    with pytest.raises(ValueError, match="no tokens"):
        decoder(model).generate(empty, GenerationConfig(max_new_tokens=4))


def test_hooks_on_the_model_are_not_run_for_they_are_about_training() -> None:
    model = llama()
    decode = decoder(model)
    before = decode.generate(prompts(), GenerationConfig(max_new_tokens=4))

    def refuse(*_: Any) -> None:
        raise AssertionError("DeepSpeed's hook would wait for the GPU here")

    model.register_forward_pre_hook(refuse)
    compare(before, decode.generate(prompts(), GenerationConfig(max_new_tokens=4)))
