"""The template contract, masks, padding and what text may not do. The tokenizers are made here."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_kit.config import DataConfig, SourceConfig
from rlhf_kit.datasets import load_source
from rlhf_kit.tokenization import (
    CHAT_TEMPLATE,
    Encoded,
    EncodedPair,
    as_text,
    collate_pairs,
    collate_prompts,
    collate_scored,
    collate_sft,
    decode_response,
    encode_demonstrations,
    encode_dialogue,
    encode_pairs,
    encode_prompt,
    encode_response,
    encode_scored,
    keep_fitting,
    load_tokenizer,
    prepare_tokenizer,
    render_prompt,
    same_tokenizer,
    stop_token_ids,
)
from rlhf_kit.types import PreferencePair

SMALL = settings(derandomize=True, max_examples=60, deadline=None)
REPOSITORY = Path(__file__).parents[1]
SHARED = Path(os.environ.get("RLHF_KIT_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
GPT2 = SHARED / "gpt2-bpe"
REAL_PAIRS = SHARED / "hh-rlhf-harmless" / "pairs.jsonl.gz"
needs_gpt2 = pytest.mark.skipif(
    not GPT2.exists(), reason="set RLHF_KIT_SHARED_DATA to the real data"
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BARE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
DEAF = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '>' if add_generation_prompt }}"
STRICT = "{{ raise_exception('no system turn') }}"


def byte_tokenizer(*specials: str, template: str | None = None, **roles: str):
    """A token for each byte, and special tokens: no text is unknown, any id can be checked."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([*specials, *roles.values()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **roles)
    tokenizer.chat_template = template
    prepare_tokenizer(tokenizer)
    return tokenizer


KIT = byte_tokenizer(bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>")
CHAT = byte_tokenizer("<|im_start|>", template=CHATML, eos_token="<|im_end|>")
TOKENIZERS = {"kit": KIT, "chatml": CHAT}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def pair(prompt: str, chosen: str | None = None, rejected: str | None = None, kind: str = ""):
    return PreferencePair((user(prompt),), chosen, rejected, kind=kind)


def byte_ids(text: str) -> list[int]:
    return KIT(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


BOS_ID, EOS_ID, PAD_ID = KIT.bos_token_id, KIT.eos_token_id, KIT.pad_token_id


# The template


def test_the_kits_template_writes_what_its_readers_expect():
    prompt = [{"role": "system", "content": "Be kind."}, user("Hi"), assistant("Yes?"), user("?")]
    text = "<|bos|>Be kind.\n\nHuman: Hi\n\nAssistant: Yes?<|eos|>\n\nHuman: ?\n\nAssistant:"
    assert render_prompt(KIT, prompt) == text


def test_prompt_and_response_ids_are_those_of_the_template_by_hand():
    assert encode_prompt(KIT, [user("Hi")]) == [BOS_ID, *byte_ids("Human: Hi\n\nAssistant:")]
    assert encode_response(KIT, [user("Hi")], "Yes.") == [*byte_ids(" Yes."), EOS_ID]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompt_and_response_together_are_the_text_of_the_template(name: str):
    tokenizer = TOKENIZERS[name]
    prompt = [user("Hi"), assistant("Yes?"), user("Bye")]
    ids = encode_prompt(tokenizer, prompt) + encode_response(tokenizer, prompt, "So long.")
    whole = tokenizer.apply_chat_template([*prompt, assistant("So long.")], return_dict=False)
    assert ids == whole[: len(ids)]
    assert tokenizer.decode(whole[len(ids) :]).strip() == ""  # ChatML's newline after EOS


def test_the_kits_template_marks_the_assistants_tokens_as_our_response_ids():
    dialogue = [user("Hi"), assistant("Yes."), user("Bye"), assistant("So long.")]
    marked = KIT.apply_chat_template(dialogue, return_dict=True, return_assistant_tokens_mask=True)
    tokens = zip(marked["input_ids"], marked["assistant_masks"], strict=True)
    expected = encode_response(KIT, dialogue[:1], "Yes.") + encode_response(
        KIT, dialogue[:3], "So long."
    )
    assert [token for token, counts in tokens if counts] == expected


def test_a_template_without_eos_gets_one_and_one_that_does_not_continue_is_refused():
    bare = byte_tokenizer(template=BARE)
    assert bare.eos_token == "<|eos|>"
    assert encode_response(bare, [user("Hi")], "Yes.") == [*byte_ids("Yes.\n"), bare.eos_token_id]
    with pytest.raises(ValueError, match="does not continue its own generation prompt"):
        encode_response(byte_tokenizer(template=DEAF), [user("Hi")], "Yes.")
    with pytest.raises(ValueError, match="refuses a dialogue: no system turn"):
        encode_prompt(byte_tokenizer(template=STRICT), [user("Hi")])


text = st.text(st.characters(codec=None), max_size=30)


@SMALL
@example("<|eos|>", "<|pad|><|bos|>")
@example("\ud83d and \ud83d\ude00", "\ude00")
@example("\ufeffbyte order", "\ufeff")
@example("\U000f0000<|eos|>", "\U000f0001<|eos|>\U000f0000")
@given(text, text)
def test_any_text_makes_the_round_trip_and_one_eos_ends_it(prompt: str, response: str):
    for tokenizer in TOKENIZERS.values():
        ids = encode_response(tokenizer, [user(prompt)], response)
        assert ids[-1] == tokenizer.eos_token_id
        assert not set(ids[:-1]) & set(tokenizer.all_special_ids)
        whole = response.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        assert decode_response(tokenizer, ids) == whole.strip()


@SMALL
@given(st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "<|", "im_end", "|>", "a", " "])))
def test_special_tokens_in_a_prompt_stay_text(pieces: list[str]):
    content = "".join(pieces)
    ids = encode_prompt(CHAT, [user(content)])
    specials = [i for i in ids if i in CHAT.all_special_ids]
    im_start, im_end = CHAT.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert specials == [im_end]  # im_start is an added token, not in all_special_ids
    assert [i for i in ids if i >= 256] == [im_start, im_end, im_start]
    expected = f"<|im_start|>user\n{content.strip()}<|im_end|>\n<|im_start|>assistant\n"
    assert render_prompt(CHAT, [user(content)]) == CHAT.decode(ids) == expected


def test_a_special_token_in_a_content_changes_no_other_id():
    ids = encode_prompt(KIT, [user("a<|eos|>b")])
    assert ids == [BOS_ID, *byte_ids("Human: a<|eos|>b\n\nAssistant:")]
    assert EOS_ID not in ids


def test_a_tokenizer_that_cannot_write_a_special_token_as_text_says_so():
    words = Tokenizer(models.WordLevel({"<e>": 0, "a": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>", unk_token="?")
    prepare_tokenizer(tokenizer)
    with pytest.raises(ValueError, match="cannot write <e> as text"):
        encode_prompt(tokenizer, [user("a <e> a")])


# Lengths


def test_a_response_that_is_cut_keeps_its_eos():
    prompt_length = len(encode_prompt(KIT, [user("Hi")]))
    whole = encode_dialogue(KIT, [user("Hi")], "abcdef", 100)
    assert not whole.is_cut and whole.length == prompt_length + 8
    cut = encode_dialogue(KIT, [user("Hi")], "abcdef", prompt_length + 4)
    assert cut.is_cut and cut.prompt_length == prompt_length
    assert cut.input_ids == [*whole.input_ids[: prompt_length + 3], EOS_ID]
    with pytest.raises(ValueError, match="leaves no room"):
        encode_dialogue(KIT, [user("Hi")], "abcdef", prompt_length)


def test_rows_that_do_not_fit_are_dropped_and_counted():
    base = len(encode_prompt(KIT, [user("")]))
    config = DataConfig(max_prompt_length=base + 4, max_length=base + 10)
    rows = [
        pair("a", "yes", "no", kind="tone"),
        pair("abcde", "yes", "no"),
        pair("abcd", "1234abcd", "1243abcd"),
        pair("ab", "12345678 and", "12345678 or"),
    ]
    pairs = encode_pairs(KIT, rows, config)
    assert (pairs.long_prompts, pairs.cut_responses, pairs.equal_pairs) == (1, 1, 1)
    assert [row.kind for row in pairs.rows] == ["tone", ""]
    assert pairs.rows[0].prompt_id == rows[0].prompt_id
    assert pairs.rows[1].length == config.max_length
    demonstrations = encode_demonstrations(KIT, rows, config)
    assert (len(demonstrations.rows), demonstrations.cut_responses) == (3, 2)
    prompts = keep_fitting(KIT, rows, config)
    assert prompts.rows == [rows[0], rows[2], rows[3]]
    assert prompts.lines() == ["1 rows dropped: the prompt is longer than max_prompt_length"]
    with pytest.raises(ValueError, match="none of 1 rows fits data.max_prompt_length .*: 1 rows"):
        keep_fitting(KIT, rows[1:2], config)


def test_rows_that_the_models_template_refuses_are_dropped_and_counted():
    alternating = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    twice = PreferencePair((user("Hi"), user("Hello?")))
    fitting = keep_fitting(byte_tokenizer(template=alternating), [twice, pair("Hi")], DataConfig())
    assert fitting.rows == [pair("Hi")]
    assert fitting.lines() == ["1 rows dropped: the chat template refuses the dialogue"]


# Batches


def test_sft_batches_count_the_response_and_its_eos_and_no_padding():
    rows = [Encoded([5, 6, 7, EOS_ID], 2), Encoded([5, EOS_ID], 1)]
    batch = collate_sft(rows, pad_token_id=PAD_ID)
    assert batch.input_ids.tolist() == [[5, 6, 7, EOS_ID], [5, EOS_ID, PAD_ID, PAD_ID]]
    assert batch.attention_mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.loss_mask.tolist() == [[False, False, True, True], [False, True, False, False]]
    text_batch = collate_sft(as_text(rows), pad_token_id=PAD_ID)
    assert torch.equal(text_batch.loss_mask, text_batch.attention_mask)


def test_masks_come_from_lengths_so_that_pad_and_eos_ids_in_a_row_count():
    batch = collate_sft([Encoded([PAD_ID, EOS_ID, PAD_ID, EOS_ID], 1)], pad_token_id=PAD_ID)
    assert batch.attention_mask.all()
    assert batch.loss_mask.tolist() == [[False, True, True, True]]


def test_pairs_are_stacked_chosen_first_and_read_at_their_last_token():
    rows = [
        EncodedPair(Encoded([1, 2, 9], 1), Encoded([1, 9], 1), "p", "tone"),
        EncodedPair(Encoded([3, 9], 1), Encoded([3, 4, 5, 9], 1), "q"),
    ]
    batch = collate_pairs(rows, pad_token_id=0)
    assert batch.input_ids.tolist() == [[1, 2, 9, 0], [3, 9, 0, 0], [1, 9, 0, 0], [3, 4, 5, 9]]
    assert batch.last_index.tolist() == [2, 1, 1, 3]
    assert batch.attention_mask.sum(dim=1).tolist() == [3, 2, 2, 4]
    assert (batch.prompt_ids, batch.kinds) == (("p", "q"), ("tone", ""))
    assert (rows[0].length, rows[0].tokens) == (3, 5)
    assert batch.to("cpu").kinds == batch.kinds and len(batch) == 4


def test_prompts_are_padded_on_the_left_and_carry_their_text_and_seeds():
    rows = [pair("a"), pair("abc")]
    batch = collate_prompts(KIT, rows, seeds=[7, 8])
    assert batch.attention_mask.tolist()[0][:3] == [False, False, True]
    assert batch.input_ids.tolist()[0][:3] == [PAD_ID, PAD_ID, BOS_ID]
    assert batch.attention_mask[1].all()
    assert batch.seeds.tolist() == [7, 8]
    assert batch.dialogues == (rows[0].prompt, rows[1].prompt)


@SMALL
@given(st.lists(text, min_size=1, max_size=5))
def test_the_side_of_the_padding_changes_no_id(prompts: list[str]):
    rows = [pair(prompt) for prompt in prompts]
    left = collate_prompts(KIT, rows, seeds=range(len(rows)))
    encoded = [Encoded(encode_prompt(KIT, row.prompt), 0) for row in rows]
    right = collate_scored(encoded, pad_token_id=PAD_ID)
    assert left.input_ids.shape == right.input_ids.shape
    for row in range(len(rows)):
        ids = left.input_ids[row][left.attention_mask[row]].tolist()
        assert ids == right.input_ids[row][right.attention_mask[row]].tolist()
        assert ids == encoded[row].input_ids


def test_rollouts_are_written_anew_for_another_tokenizer():
    dialogues = [(user("Hi"),), (user("Hello"),)]
    batch = encode_scored(CHAT, dialogues, ["Yes.", "Nope"], [True, False], max_length=100)
    rows = [batch.input_ids[i][mask].tolist() for i, mask in enumerate(batch.attention_mask)]
    assert rows[0] == encode_dialogue(CHAT, dialogues[0], "Yes.", 100).input_ids
    assert rows[1] == encode_dialogue(CHAT, dialogues[1], "Nope", 100).input_ids[:-1]
    assert batch.last_index.tolist() == [len(rows[0]) - 1, len(rows[1]) - 1]
    assert batch.shortened == 0
    short = encode_scored(CHAT, dialogues, ["Yes.", "Nope"], [True, False], max_length=len(rows[0]))
    assert short.shortened == 1
    assert short.input_ids[1].tolist() == rows[1][-len(rows[0]) :]


# The tokenizer


def test_preparing_adds_what_is_missing_once_and_reports_it():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    report = prepare_tokenizer(tokenizer)
    assert (report.added_template, report.added_eos, report.added_pad) == (True, True, True)
    assert report.size == len(tokenizer) == 258
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.padding_side == "left"
    assert tokenizer.chat_template == CHAT_TEMPLATE.read_text()
    again = prepare_tokenizer(tokenizer)
    assert str(again) == "tokenizer of 258 tokens, added: nothing"


def test_a_pad_that_is_eos_is_replaced_and_a_template_of_the_model_kept():
    tokenizer = byte_tokenizer(template=CHATML, eos_token="<e>", pad_token="<e>")
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.chat_template == CHATML


def test_a_prepared_tokenizer_comes_back_unchanged_from_its_directory(tmp_path: Path):
    KIT.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert not prepare_tokenizer(loaded).added_template
    assert same_tokenizer(KIT, loaded) and not same_tokenizer(KIT, CHAT)
    assert encode_prompt(loaded, [user("Hi <|eos|>")]) == encode_prompt(KIT, [user("Hi <|eos|>")])


def test_a_directory_without_a_tokenizer_and_a_missing_one_are_told_apart(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        load_tokenizer(tmp_path / "missing")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_a_local_directory_is_read_without_the_hub_and_a_name_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from rlhf_kit import chat_template

    asked = []

    def from_pretrained(name: str, *, local_files_only: bool, trust_remote_code: bool):
        assert not trust_remote_code
        asked.append((name, local_files_only))
        raise OSError("offline")

    monkeypatch.setattr(chat_template.AutoTokenizer, "from_pretrained", from_pretrained)
    KIT.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be read: offline"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="the hub gave no tokenizer of that name"):
        load_tokenizer("owner/name")
    assert asked == [(str(tmp_path), True), ("owner/name", False)]


def test_responses_end_at_the_tokenizers_eos_and_at_what_the_model_names():
    class Generation:
        eos_token_id = [3, EOS_ID]

    class Model:
        generation_config = Generation()

    assert stop_token_ids(KIT, Model()) == [EOS_ID, 3]  # type: ignore[arg-type]
    Generation.eos_token_id = None  # type: ignore[assignment]
    assert stop_token_ids(KIT, Model()) == [EOS_ID]  # type: ignore[arg-type]


# GPT-2's tokenizer and real dialogues


@needs_gpt2
def test_gpt2s_vocabulary_and_merges_load_and_get_a_pad_of_their_own():
    tokenizer = load_tokenizer(GPT2)
    report = prepare_tokenizer(tokenizer)
    assert (report.added_eos, report.added_pad, report.size) == (False, True, 50258)
    ids = encode_response(tokenizer, [user("Hi")], "Hello world")
    assert ids == [18435, 995, 50256]
    assert encode_prompt(tokenizer, [user("<|endoftext|>")]).count(50256) == 1  # BOS alone


@needs_gpt2
@pytest.mark.skipif(not REAL_PAIRS.exists(), reason="set RLHF_KIT_SHARED_DATA to the real data")
def test_real_dialogues_survive_the_round_trip_and_the_template_joins_them_token_by_token():
    tokenizer = load_tokenizer(GPT2)
    prepare_tokenizer(tokenizer)
    rows = load_source(SourceConfig(str(REAL_PAIRS)), "reward").pairs
    fitting = encode_pairs(tokenizer, rows, DataConfig())
    assert (len(fitting.rows), fitting.long_prompts) == (1575, 221)
    for row in rows[:300]:
        assert row.chosen is not None
        ids = encode_response(tokenizer, row.prompt, row.chosen)
        assert decode_response(tokenizer, ids) == row.chosen
        whole = tokenizer.apply_chat_template(
            [*row.prompt, assistant(row.chosen)], return_dict=False
        )
        assert encode_prompt(tokenizer, row.prompt) + ids == whole


def test_own_rows_go_from_file_to_batch():
    source = SourceConfig(str(Path(__file__).parent / "data" / "hh_rlhf.jsonl"))
    fitting = encode_pairs(KIT, load_source(source, "reward").pairs, DataConfig())
    batch = collate_pairs(fitting.rows, pad_token_id=PAD_ID)
    assert batch.input_ids.shape[0] == 20
    last = batch.input_ids.gather(1, batch.last_index.unsqueeze(1))
    assert (last == EOS_ID).all()
    assert json.dumps(fitting.lines()) == "[]"
