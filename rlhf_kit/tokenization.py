"""Text -> ids -> batches: one chat template and one contract for every stage.

The prompt and the response are tokenized apart and joined as ids, so that SFT, the reward model
and PPO see the very ids that generation samples: the response ends with EOS, PAD is never EOS,
and masks come from lengths, never from ids. Text in a dialogue that looks like a special token
stays text.

Shapes: B batch, P prompt tokens, R response tokens, T = P + R.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rlhf_kit.config import DataConfig
from rlhf_kit.distributed import is_main_rank
from rlhf_kit.types import Message, PreferencePair, PromptBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import Self

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
EOS, PAD = "<|eos|>", "<|pad|>"
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"}
PRIVATE_USE = range(0xF0000, 0xFFFFE)
"""Code points that no text means anything by; they stand in for special tokens in contents."""


# The tokenizer -----------------------------------------------------------------------------


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a local directory, without touching the hub, or of a hub name.

    Raises:
        ValueError: the directory does not exist or holds no tokenizer, or the hub has none.
    """
    path = Path(name_or_path).expanduser()
    is_local = path.exists() or str(name_or_path).startswith((".", "/", "~")) or len(path.parts) > 2
    if is_local and not path.is_dir():
        raise ValueError(f"directory {name_or_path} does not exist")
    names = {file.name for file in path.iterdir()} if is_local else set()
    is_gpt2 = {"vocab.json", "merges.txt"} <= names  # the layout before tokenizer.json
    if is_local and not is_gpt2 and not names & TOKENIZER_FILES:
        raise ValueError(f"directory {name_or_path} holds no tokenizer (no tokenizer.json)")
    kind = GPT2Tokenizer if is_gpt2 and not names & {"config.json", *TOKENIZER_FILES} else None
    try:
        return (kind or AutoTokenizer).from_pretrained(str(path), local_files_only=is_local)
    except Exception as error:  # the Rust side raises nothing narrower
        raise ValueError(
            f"the tokenizer in {name_or_path} cannot be read: {error}"
            if is_local
            else f"{name_or_path} is no local directory, and the hub gave no tokenizer of that "
            "name; check the spelling, or download it and give the directory"
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


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> TokenizerReport:
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


def same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether a dialogue has the same ids in both, so that no text needs to be encoded anew."""
    return (
        one.get_vocab() == other.get_vocab()
        and one.eos_token == other.eos_token
        and one.chat_template == other.chat_template
    )


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[int]:
    """The ids that end a response: the tokenizer's EOS, then others that the model names."""
    generation = getattr(model, "generation_config", None)
    named = getattr(generation, "eos_token_id", None)
    named = [] if named is None else [named] if isinstance(named, int) else list(named)
    return list(dict.fromkeys([cast(int, tokenizer.eos_token_id), *named]))


# Text -> ids --------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _pattern(tokens: frozenset[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return _pattern(frozenset(added | set(tokenizer.all_special_tokens)))


def _protect(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
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


class RefusedDialogue(ValueError):
    """The model's own template will not write a dialogue, such as two user turns in a row."""


def _render(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[dict[str, str]], *, generate: bool
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            list(turns), tokenize=False, add_generation_prompt=generate
        )
    except TemplateError as error:
        raise RefusedDialogue(f"the chat template refuses a dialogue: {error}") from error
    return str(text)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, originals: dict[int, str]) -> list[int]:
    """Ids of a rendered text; see `_protect` for `originals`."""
    if not originals:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    as_tokens = set(_ids(tokenizer, originals.values()))
    ids: list[int] = []
    for i, part in enumerate(_special_tokens(tokenizer).split(text)):
        if i % 2:
            ids += _ids(tokenizer, [part])
            continue
        plain = part.translate(originals)
        if not plain:
            continue
        part_ids = tokenizer(plain, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        if not as_tokens.isdisjoint(part_ids):
            raise ValueError(
                f"this tokenizer cannot write {' or '.join(originals.values())} as text; remove "
                "it from the data"
            )
        ids += part_ids
    return ids


def _ids(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str]) -> list[int]:
    return cast("list[int]", tokenizer.convert_tokens_to_ids(list(tokens)))


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message]) -> str:
    """The prompt as the template writes it, up to where the assistant begins to speak."""
    turns, originals = _protect(tokenizer, prompt)
    return _render(tokenizer, turns, generate=True).translate(originals)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message]) -> list[int]:
    """The ids of `render_prompt`; what looks like a special token in a content stays text."""
    turns, originals = _protect(tokenizer, prompt)
    return _encode(tokenizer, _render(tokenizer, turns, generate=True), originals)


def encode_response(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], response: str
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
    eos = str(tokenizer.eos_token)
    tail = full[len(head) :]
    text = tail[: tail.rindex(eos)] if eos in tail else tail
    return _encode(tokenizer, text + eos, originals)


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | Tensor) -> str:
    """The text of a response, without special tokens and outer space."""
    text = tokenizer.decode(
        list(map(int, ids)), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return str(text).strip()


@dataclass(frozen=True)
class Encoded:
    """One dialogue as ids: a prompt and a response that ends with EOS."""

    input_ids: list[int]
    prompt_length: int
    """How many of them the loss leaves out; 0 makes the whole dialogue a text to be learnt."""
    is_cut: bool = False
    """Whether the response was longer than there was room for."""

    @property
    def length(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class EncodedPair:
    """Two responses to one prompt, as ids."""

    chosen: Encoded
    rejected: Encoded
    prompt_id: str = ""
    """Content hash of the prompt: pairs of one prompt share theirs."""
    kind: str = ""
    """What the two responses differ in, where the source says so."""

    @property
    def length(self) -> int:
        return max(self.chosen.length, self.rejected.length)

    @property
    def tokens(self) -> int:
        """Tokens of both dialogues: what a forward pass computes on."""
        return self.chosen.length + self.rejected.length


def encode_dialogue(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], response: str, max_length: int
) -> Encoded:
    """Prompt and response in at most `max_length` ids; a response that is cut keeps its EOS.

    Raises:
        ValueError: the prompt alone fills `max_length`.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    return _join(prompt_ids, encode_response(tokenizer, prompt, response), max_length)


def _join(prompt_ids: list[int], response_ids: list[int], max_length: int) -> Encoded:
    room = max_length - len(prompt_ids)
    if room < 1:
        raise ValueError(
            f"a prompt of {len(prompt_ids)} tokens leaves no room for a response in max_length "
            f"{max_length}; raise it, or drop the row"
        )
    is_cut = len(response_ids) > room
    if is_cut:
        response_ids = [*response_ids[: room - 1], response_ids[-1]]
    return Encoded(prompt_ids + response_ids, len(prompt_ids), is_cut)


def as_text(rows: Iterable[Encoded]) -> list[Encoded]:
    """The same ids with the loss on every token, for the mixture loss."""
    return [replace(row, prompt_length=0) for row in rows]


# Rows that fit -----------------------------------------------------------------------------

Row = TypeVar("Row")


@dataclass
class Fitting(Generic[Row]):
    """The rows of a stage that fit the lengths of the config, and what happened to the others."""

    rows: list[Row] = field(default_factory=list)
    refused: int = 0
    """Rows dropped because the chat template refuses the dialogue."""
    long_prompts: int = 0
    """Rows dropped because the prompt is longer than `max_prompt_length`."""
    cut_responses: int = 0
    """Kept rows in which a response is cut to `max_length`."""
    equal_pairs: int = 0
    """Pairs dropped because their responses are equal as ids, most often once cut."""

    def lines(self) -> list[str]:
        """One line of text for each thing that happened."""
        counts = (
            (self.refused, "rows dropped: the chat template refuses the dialogue"),
            (self.long_prompts, "rows dropped: the prompt is longer than max_prompt_length"),
            (self.cut_responses, "rows kept with a response cut to max_length"),
            (self.equal_pairs, "pairs dropped: their responses are equal once cut"),
        )
        return [f"{count} {text}" for count, text in counts if count]


def _fitting(
    fitting: Fitting[Any],
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    config: DataConfig,
) -> Iterator[tuple[PreferencePair, list[int]]]:
    """Pairs whose prompt fits, and its ids: the one place where a prompt drops a row.

    The caller appends to `fitting.rows`; nothing left at the end is an error.
    """
    for pair in tqdm(pairs, desc="encode", delay=2, disable=not is_main_rank()):
        try:
            prompt_ids = encode_prompt(tokenizer, pair.prompt)
        except RefusedDialogue:
            fitting.refused += 1
            continue
        if len(prompt_ids) > config.max_prompt_length:
            fitting.long_prompts += 1
        else:
            yield pair, prompt_ids
    if not fitting.rows:
        raise ValueError(
            f"none of {len(pairs)} rows fits data.max_prompt_length {config.max_prompt_length} and "
            f"data.max_length {config.max_length}: {'; '.join(fitting.lines()) or 'no rows given'}"
        )


def encode_demonstrations(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[PreferencePair], config: DataConfig
) -> Fitting[Encoded]:
    """Prompts and chosen responses, for SFT. ValueError where no row fits."""
    fitting: Fitting[Encoded] = Fitting()
    for pair, prompt_ids in _fitting(fitting, tokenizer, pairs, config):
        assert pair.chosen is not None
        response_ids = encode_response(tokenizer, pair.prompt, pair.chosen)
        row = _join(prompt_ids, response_ids, config.max_length)
        fitting.cut_responses += row.is_cut
        fitting.rows.append(row)
    return fitting


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[PreferencePair], config: DataConfig
) -> Fitting[EncodedPair]:
    """Prompts with both responses, for the reward model. ValueError where no row fits."""
    fitting: Fitting[EncodedPair] = Fitting()
    for pair, prompt_ids in _fitting(fitting, tokenizer, pairs, config):
        assert pair.chosen is not None and pair.rejected is not None
        chosen, rejected = (
            _join(prompt_ids, encode_response(tokenizer, pair.prompt, response), config.max_length)
            for response in (pair.chosen, pair.rejected)
        )
        if chosen.input_ids == rejected.input_ids:
            fitting.equal_pairs += 1
            continue
        fitting.cut_responses += chosen.is_cut or rejected.is_cut
        fitting.rows.append(EncodedPair(chosen, rejected, pair.prompt_id, pair.kind))
    return fitting


def keep_fitting(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[PreferencePair], config: DataConfig
) -> Fitting[PreferencePair]:
    """The rows whose prompts fit, for PPO and for evaluation. ValueError where none does."""
    fitting: Fitting[PreferencePair] = Fitting()
    for pair, _ in _fitting(fitting, tokenizer, pairs, config):
        fitting.rows.append(pair)
    return fitting


# Ids -> batches ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    input_ids: Tensor
    """[B, T] token ids, padded on the right."""
    attention_mask: Tensor
    """[B, T] bool, True on prompt and response tokens."""

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str) -> Self:
        """The same batch with its tensors on `device`."""
        moved = {
            name: value.to(device) for name, value in vars(self).items() if torch.is_tensor(value)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class SFTBatch(_Batch):
    """Right-padded dialogues for the next-token loss."""

    loss_mask: Tensor
    """[B, T] bool, True on the tokens to be predicted: the response's, its EOS included."""


@dataclass(frozen=True)
class ScoreBatch(_Batch):
    """Right-padded dialogues for a reward model, which reads its score at `last_index`."""

    last_index: Tensor
    """[B] int64, the position of the last token, EOS where the response has ended."""
    shortened: int = 0
    """Rows that lost their beginning because they did not fit."""


@dataclass(frozen=True)
class PairBatch(ScoreBatch):
    """B pairs as 2B dialogues: rows 0 to B - 1 are the chosen, B to 2B - 1 the rejected."""

    prompt_ids: tuple[str, ...] = ()
    """B content hashes of the prompts."""
    kinds: tuple[str, ...] = ()
    """B names of what the two responses differ in; empty where the source does not say."""


def _pad(
    sequences: Sequence[Sequence[int]], pad_token_id: int, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """ids and mask [B, T], T the longest sequence's length. The mask comes from lengths."""
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), pad_token_id, dtype=torch.int64)
    mask = torch.zeros((len(sequences), width), dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        place = slice(width - len(sequence), None) if left else slice(len(sequence))
        ids[row, place] = torch.tensor(sequence, dtype=torch.int64)
        mask[row, place] = True
    return ids, mask


def collate_sft(rows: Sequence[Encoded], *, pad_token_id: int) -> SFTBatch:
    """Dialogues for the next-token loss, which counts from `prompt_length` on."""
    ids, mask = _pad([row.input_ids for row in rows], pad_token_id)
    prompt_lengths = torch.tensor([row.prompt_length for row in rows])
    is_response = torch.arange(ids.shape[1]) >= prompt_lengths.unsqueeze(1)
    return SFTBatch(ids, mask, mask & is_response)


def collate_scored(rows: Sequence[Encoded], *, pad_token_id: int) -> ScoreBatch:
    """Dialogues to be scored at their last token."""
    ids, mask = _pad([row.input_ids for row in rows], pad_token_id)
    return ScoreBatch(ids, mask, mask.sum(dim=1) - 1)


def collate_pairs(rows: Sequence[EncodedPair], *, pad_token_id: int) -> PairBatch:
    """Preference pairs, all chosen above all rejected, so that one forward pass sees both."""
    dialogues = [row.chosen for row in rows] + [row.rejected for row in rows]
    scored = collate_scored(dialogues, pad_token_id=pad_token_id)
    return PairBatch(
        scored.input_ids,
        scored.attention_mask,
        scored.last_index,
        prompt_ids=tuple(row.prompt_id for row in rows),
        kinds=tuple(row.kind for row in rows),
    )


def collate_prompts(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[PreferencePair], *, seeds: Sequence[int]
) -> PromptBatch:
    """Prompts padded on the left, so that all responses begin at position P.

    Args:
        seeds: the sampling seed of each row.
    """
    assert len(seeds) == len(rows), "one seed a row"
    sequences = [encode_prompt(tokenizer, row.prompt) for row in rows]
    ids, mask = _pad(sequences, cast(int, tokenizer.pad_token_id), left=True)
    dialogues = tuple(row.prompt for row in rows)
    return PromptBatch(ids, mask, torch.tensor(seeds, dtype=torch.int64), dialogues)


def encode_scored(
    tokenizer: PreTrainedTokenizerBase,
    dialogues: Sequence[Sequence[Message]],
    responses: Sequence[str],
    ended: Sequence[bool],
    max_length: int,
) -> ScoreBatch:
    """Rollouts written anew for a reward model that has another tokenizer than the actor.

    A response that has not ended gets no EOS. A sequence over `max_length` loses its beginning,
    the oldest turns, because the score is read at its end; such rows are counted in `shortened`.
    """
    rows, shortened = [], 0
    for dialogue, response, has_ended in zip(dialogues, responses, ended, strict=True):
        prompt_ids = encode_prompt(tokenizer, dialogue)
        response_ids = encode_response(tokenizer, dialogue, response)
        ids = prompt_ids + (response_ids if has_ended else response_ids[:-1])
        shortened += len(ids) > max_length
        rows.append(Encoded(ids[-max_length:], 0))
    batch = collate_scored(rows, pad_token_id=cast(int, tokenizer.pad_token_id))
    return replace(batch, shortened=shortened)
