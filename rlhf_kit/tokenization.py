"""Text -> ids -> batches: one chat template and one contract for every stage.

The prompt and the response are tokenized apart and joined as ids, so that SFT, the reward model
and PPO see the very ids that generation samples: the response ends with EOS, PAD is never EOS,
and masks come from lengths, never from ids. Text in a dialogue that looks like a special token
stays text.

Shapes: B batch, P prompt tokens, R response tokens, T = P + R.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor
from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast

from rlhf_kit.types import Message, PreferencePair, PromptBatch, Stage

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
EOS, PAD = "<|eos|>", "<|pad|>"
PRIVATE_USE = range(0xF0000, 0xFFFFE)
"""Code points that no text means anything by; they stand in for special tokens in contents."""


# The tokenizer -----------------------------------------------------------------------------


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a local directory, without touching the hub, or of a hub name.

    Raises:
        ValueError: the directory does not exist or holds no tokenizer, or the hub has none.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        names = {file.name for file in path.iterdir()}
        if {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"} & names:
            return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        if {"vocab.json", "merges.txt"} <= names:  # the original layout of GPT-2
            return GPT2TokenizerFast.from_pretrained(str(path), local_files_only=True)
        raise ValueError(f"directory {name_or_path} holds no tokenizer (no tokenizer.json)")
    if path.exists() or str(name_or_path).startswith((".", "/", "~")) or len(path.parts) > 2:
        raise ValueError(f"{name_or_path} is not a directory with a tokenizer")
    try:
        return AutoTokenizer.from_pretrained(str(name_or_path))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name_or_path} is no local directory and the hub gave no tokenizer of that name; "
            "check the spelling, or download it and give the directory"
        ) from error


@dataclass(frozen=True)
class TokenizerReport:
    """What `prepare_tokenizer` changed."""

    added_template: bool
    added_eos: bool
    added_pad: bool
    size: int
    """`len(tokenizer)` now; the models' embeddings need at least this many rows."""

    def __str__(self) -> str:
        changed = [
            text
            for flag, text in (
                (self.added_template, "the kit's chat template"),
                (self.added_eos, f"the EOS token {EOS}"),
                (self.added_pad, f"the PAD token {PAD}"),
            )
            if flag
        ]
        return f"tokenizer of {self.size} tokens, added: {', '.join(changed) or 'nothing'}"


def prepare_tokenizer(tokenizer: PreTrainedTokenizerFast) -> TokenizerReport:
    """Give it, in place, what every stage needs: a chat template, EOS, a PAD that is not EOS."""
    added_template = not tokenizer.chat_template
    if added_template:
        tokenizer.chat_template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    if added_eos := tokenizer.eos_token_id is None:
        tokenizer.add_special_tokens({"eos_token": EOS})
    added_pad = tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id
    if added_pad:
        tokenizer.add_special_tokens({"pad_token": PAD})
    tokenizer.padding_side = "left"
    return TokenizerReport(added_template, added_eos, added_pad, len(tokenizer))


# Text -> ids --------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _pattern(tokens: frozenset[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def _special_tokens(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str]:
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return _pattern(frozenset(added | set(tokenizer.all_special_tokens)))


def _protect(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]
) -> tuple[list[dict[str, str]], dict[int, str]]:
    """Messages whose contents hold no special token, and the map that undoes it.

    A user may write "<|eos|>", and it must stay text. So each special token in a content is
    replaced by a private-use character that occurs nowhere else, the template is applied, the
    result is cut at the special tokens that are left, which are the template's own, and the
    text between them gets its original characters back and is encoded as text alone.
    """
    # The tokenizer takes no lone surrogates: they become U+FFFD, and pairs one character.
    contents = [
        message["content"].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        for message in messages
    ]
    pattern = _special_tokens(tokenizer)
    everything = "".join(contents)
    found = sorted(set(pattern.findall(everything)))
    free = (chr(code) for code in PRIVATE_USE if chr(code) not in everything)
    stand_in = dict(zip(found, free, strict=False))
    if found:
        contents = [pattern.sub(lambda hit: stand_in[hit[0]], content) for content in contents]
    turns = [
        {"role": message["role"], "content": content}
        for message, content in zip(messages, contents, strict=True)
    ]
    return turns, {ord(char): token for token, char in stand_in.items()}


def _render(
    tokenizer: PreTrainedTokenizerFast, turns: Sequence[dict[str, str]], *, generate: bool
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            list(turns), tokenize=False, add_generation_prompt=generate
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refuses a dialogue: {error}") from error
    return str(text)


def _encode(tokenizer: PreTrainedTokenizerFast, text: str, originals: dict[int, str]) -> list[int]:
    """Ids of a rendered text; see `_protect` for `originals`."""
    if not originals:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    as_tokens = {tokenizer.convert_tokens_to_ids(token) for token in originals.values()}
    ids: list[int] = []
    for i, part in enumerate(_special_tokens(tokenizer).split(text)):
        if i % 2:
            ids.append(tokenizer.convert_tokens_to_ids(part))
            continue
        plain = part.translate(originals)
        # An empty text may have ids: sentencepiece begins every text with a space.
        part_ids = (
            tokenizer(plain, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            if plain
            else []
        )
        if not as_tokens.isdisjoint(part_ids):
            raise ValueError(
                f"this tokenizer cannot write {' '.join(originals.values())} as text; remove it "
                "from the data"
            )
        ids += part_ids
    return ids


def render_prompt(tokenizer: PreTrainedTokenizerFast, prompt: Sequence[Message]) -> str:
    """The prompt as the template writes it, up to where the assistant begins to speak."""
    turns, originals = _protect(tokenizer, prompt)
    return _render(tokenizer, turns, generate=True).translate(originals)


def encode_prompt(tokenizer: PreTrainedTokenizerFast, prompt: Sequence[Message]) -> list[int]:
    """The ids of `render_prompt`; what looks like a special token in a content stays text."""
    turns, originals = _protect(tokenizer, prompt)
    return _encode(tokenizer, _render(tokenizer, turns, generate=True), originals)


def encode_response(
    tokenizer: PreTrainedTokenizerFast, prompt: Sequence[Message], response: str
) -> list[int]:
    """The ids of what the template writes after `render_prompt`, the last of them EOS.

    What the template writes after its own EOS (often a newline) belongs to the next turn and is
    cut; where it writes no EOS, one is appended.

    Raises:
        ValueError: the template does not continue its own generation prompt.
    """
    answered = [*prompt, Message(role="assistant", content=response)]
    turns, originals = _protect(tokenizer, answered)
    head = _render(tokenizer, turns[:-1], generate=True)
    full = _render(tokenizer, turns, generate=False)
    if not full.startswith(head):
        raise ValueError(
            "the chat template does not continue its own generation prompt: what it writes for "
            "an answered dialogue does not begin with what it writes for the prompt"
        )
    before, eos, _ = full[len(head) :].rpartition(tokenizer.eos_token)
    tail = before if eos else full[len(head) :]
    return [*_encode(tokenizer, tail, originals), tokenizer.eos_token_id]


def decode_response(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int] | Tensor) -> str:
    """The text of a response, without special tokens and outer space."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text).strip()


@dataclass(frozen=True)
class Encoded:
    """One dialogue as ids: a prompt and a response that ends with EOS."""

    input_ids: list[int]
    prompt_length: int

    def __len__(self) -> int:
        return len(self.input_ids)


def encode_dialogue(
    tokenizer: PreTrainedTokenizerFast, prompt: Sequence[Message], response: str, max_length: int
) -> Encoded:
    """Prompt and response in at most `max_length` ids; a response that is cut keeps its EOS.

    Raises:
        ValueError: the prompt alone fills `max_length`; `keep_fitting` drops such rows.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    response_ids = encode_response(tokenizer, prompt, response)
    room = max_length - len(prompt_ids)
    if room < 1:
        raise ValueError(
            f"a prompt of {len(prompt_ids)} tokens leaves no room for a response in max_length "
            f"{max_length}; drop such rows with keep_fitting"
        )
    if len(response_ids) > room:
        response_ids = [*response_ids[: room - 1], response_ids[-1]]
    return Encoded(prompt_ids + response_ids, len(prompt_ids))


# Rows that fit -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitting:
    """The rows of a stage that fit the lengths of the config, and what happened to the others."""

    rows: tuple[PreferencePair, ...]
    lengths: tuple[int, ...]
    """Tokens of each row: of its prompt in stage ppo, else of its longest dialogue."""
    long_prompts: int
    """Rows dropped because the prompt is longer than `max_prompt_length`."""
    cut_responses: int
    """Kept rows in which a response is cut to `max_length`."""
    equal_when_cut: int
    """Pairs dropped because their responses are equal once cut, or once tokenized."""

    def __len__(self) -> int:
        return len(self.rows)

    def lines(self) -> list[str]:
        """One line of text for each thing that happened."""
        counts = (
            (self.long_prompts, "rows dropped: the prompt is longer than max_prompt_length"),
            (self.cut_responses, "rows kept with a response cut to max_length"),
            (self.equal_when_cut, "pairs dropped: the responses are equal once cut"),
        )
        return [f"{count} {text}" for count, text in counts if count]


def keep_fitting(
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[PreferencePair],
    stage: Stage,
    *,
    max_prompt_length: int,
    max_length: int,
) -> Fitting:
    """Drop the rows that do not fit: the one place where length decides, and it counts.

    Raises:
        ValueError: no row fits.
    """
    kept, lengths, long_prompts, cut_responses, equal = [], [], 0, 0, 0
    for row in rows:
        prompt_length = len(encode_prompt(tokenizer, row.prompt))
        if prompt_length > max_prompt_length:
            long_prompts += 1
            continue
        room = max_length - prompt_length
        responses = {"sft": (row.chosen,), "reward": (row.chosen, row.rejected), "ppo": ()}[stage]
        ids = [encode_response(tokenizer, row.prompt, response or "") for response in responses]
        is_cut = any(len(response) > room for response in ids)
        if stage == "reward" and ids[0][: room - is_cut] == ids[1][: room - is_cut]:
            equal += 1
            continue
        cut_responses += is_cut
        kept.append(row)
        lengths.append(prompt_length + min(room, max(map(len, ids), default=0)))
    if not kept:
        raise ValueError(
            f"none of {len(rows)} rows fits: {long_prompts} prompts are longer than "
            f"max_prompt_length {max_prompt_length}; raise it"
        )
    return Fitting(tuple(kept), tuple(lengths), long_prompts, cut_responses, equal)


# Ids -> batches ----------------------------------------------------------------------------


@dataclass(frozen=True)
class SFTBatch:
    """Right-padded dialogues for the next-token loss."""

    input_ids: Tensor
    """[B, T] token ids."""
    attention_mask: Tensor
    """[B, T] bool, True on prompt and response tokens."""
    loss_mask: Tensor
    """[B, T] bool, True on the tokens to be predicted: the response's, its EOS included."""

    def __len__(self) -> int:
        return self.input_ids.shape[0]


@dataclass(frozen=True)
class ScoreBatch:
    """Right-padded dialogues for a reward model, which reads its score at `last_index`."""

    input_ids: Tensor
    """[B, T] token ids."""
    attention_mask: Tensor
    """[B, T] bool, True on prompt and response tokens."""
    last_index: Tensor
    """[B] int64, the position of the last token, EOS where the response has ended."""
    shortened: int = 0
    """Rows that did not fit `max_length`."""

    def __len__(self) -> int:
        return self.input_ids.shape[0]


@dataclass(frozen=True)
class PairBatch(ScoreBatch):
    """B pairs as 2B dialogues: rows 0 to B - 1 are the chosen, B to 2B - 1 the rejected."""

    prompt_ids: tuple[str, ...] = ()
    """B content hashes: pairs of one prompt share theirs."""
    kinds: tuple[str, ...] = ()
    """B names of what the two responses differ in; empty where the source does not say."""


def _pad(sequences: Sequence[Sequence[int]], pad_id: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """ids and mask [B, T], T the longest sequence's length. The mask comes from lengths."""
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(sequences), width), dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        place = slice(width - len(sequence), None) if left else slice(len(sequence))
        ids[row, place] = torch.tensor(sequence, dtype=torch.int64)
        mask[row, place] = True
    return ids, mask


def _last_index(attention_mask: Tensor) -> Tensor:
    """[B, T] right-padded mask -> [B] position of the last True."""
    return attention_mask.sum(dim=1) - 1


def collate_sft(
    tokenizer: PreTrainedTokenizerFast, rows: Sequence[PreferencePair], *, max_length: int
) -> SFTBatch:
    """Demonstrations, the loss on the response alone."""
    return _collate_chosen(tokenizer, rows, max_length, whole=False)


def collate_text(
    tokenizer: PreTrainedTokenizerFast, rows: Sequence[PreferencePair], *, max_length: int
) -> SFTBatch:
    """The same dialogues as plain text, the loss on every token: for the mixture loss."""
    return _collate_chosen(tokenizer, rows, max_length, whole=True)


def _collate_chosen(
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[PreferencePair],
    max_length: int,
    *,
    whole: bool,
) -> SFTBatch:
    dialogues = [
        encode_dialogue(tokenizer, row.prompt, _response(row.chosen), max_length) for row in rows
    ]
    ids, mask = _pad([d.input_ids for d in dialogues], tokenizer.pad_token_id, left=False)
    loss_mask = mask.clone()
    for row, dialogue in enumerate(dialogues):
        loss_mask[row, : 0 if whole else dialogue.prompt_length] = False
    return SFTBatch(ids, mask, loss_mask)


def collate_pairs(
    tokenizer: PreTrainedTokenizerFast, rows: Sequence[PreferencePair], *, max_length: int
) -> PairBatch:
    """Preference pairs, chosen above rejected, so that one forward pass sees both."""
    dialogues = [
        encode_dialogue(tokenizer, row.prompt, _response(response), max_length).input_ids
        for responses in ([row.chosen for row in rows], [row.rejected for row in rows])
        for row, response in zip(rows, responses, strict=True)
    ]
    ids, mask = _pad(dialogues, tokenizer.pad_token_id, left=False)
    return PairBatch(
        ids,
        mask,
        _last_index(mask),
        prompt_ids=tuple(row.prompt_id for row in rows),
        kinds=tuple(row.kind for row in rows),
    )


def _response(response: str | None) -> str:
    assert response is not None, "load_source gives a stage only rows with the responses it needs"
    return response


def collate_prompts(
    tokenizer: PreTrainedTokenizerFast, rows: Sequence[PreferencePair], *, seeds: Sequence[int]
) -> PromptBatch:
    """Prompts padded on the left, so that all responses begin at position P.

    Args:
        seeds: the sampling seed of each row.
    """
    sequences = [encode_prompt(tokenizer, row.prompt) for row in rows]
    ids, mask = _pad(sequences, tokenizer.pad_token_id, left=True)
    assert len(seeds) == len(rows), "one seed a row"
    dialogues = tuple(row.prompt for row in rows)
    return PromptBatch(ids, mask, torch.tensor(seeds, dtype=torch.int64), dialogues)


def encode_scored(
    tokenizer: PreTrainedTokenizerFast,
    dialogues: Sequence[Sequence[Message]],
    responses: Sequence[str],
    ended: Sequence[bool] | Tensor,
    max_length: int,
) -> ScoreBatch:
    """Rollouts written anew for a reward model that has another tokenizer than the actor.

    A response that has not ended gets no EOS. A sequence over `max_length` loses its beginning,
    the oldest turns, because the score is read at its end; such rows are counted in `shortened`.
    """
    sequences, shortened = [], 0
    for dialogue, response, has_ended in zip(dialogues, responses, ended, strict=True):
        prompt_ids = encode_prompt(tokenizer, dialogue)
        response_ids = encode_response(tokenizer, dialogue, response)
        response_ids = response_ids if has_ended else response_ids[:-1]
        shortened += len(prompt_ids) + len(response_ids) > max_length
        sequences.append((prompt_ids + response_ids)[-max_length:])
    ids, mask = _pad(sequences, tokenizer.pad_token_id, left=False)
    return ScoreBatch(ids, mask, _last_index(mask), shortened)
