"""Pairs -> encoded rows that fit the lengths of the config; what does not fit is counted."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from tqdm.auto import tqdm
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rlhf_kit import encoded_cache
from rlhf_kit.chat_template import RefusedDialogue, encode_prompt, encode_response
from rlhf_kit.config import DataConfig
from rlhf_kit.distributed import is_main_rank
from rlhf_kit.row_store import BlendedRows
from rlhf_kit.types import Message, PreferencePair


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

    rows: Sequence[Row] = field(default_factory=list)
    refused: int = 0
    """Rows dropped because the chat template refuses the dialogue."""
    long_prompts: int = 0
    """Rows dropped because the prompt is longer than `max_prompt_length`."""
    cut_responses: int = 0
    """Kept rows in which a response is cut to `max_length`."""
    equal_pairs: int = 0
    """Pairs dropped because their responses are equal as ids, most often once cut."""

    def counts(self) -> dict[str, int]:
        """What happened, without the rows."""
        return {name: value for name, value in vars(self).items() if name != "rows"}

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
) -> Iterator[tuple[int, PreferencePair, list[int]]]:
    """Places of pairs whose prompt fits, and its ids: the one place where a prompt drops a row."""
    bar = tqdm(pairs, desc="encode", delay=2, disable=not is_main_rank())
    for place, pair in enumerate(bar):
        try:
            prompt_ids = encode_prompt(tokenizer, pair.prompt)
        except RefusedDialogue:
            fitting.refused += 1
            continue
        if len(prompt_ids) > config.max_prompt_length:
            fitting.long_prompts += 1
        else:
            yield place, pair, prompt_ids


def _require_rows(
    fitting: Fitting[Row], pairs: Sequence[PreferencePair], config: DataConfig
) -> Fitting[Row]:
    if not len(fitting.rows):
        raise ValueError(
            f"none of {len(pairs)} rows fits data.max_prompt_length {config.max_prompt_length} and "
            f"data.max_length {config.max_length}: {'; '.join(fitting.lines()) or 'no rows given'}"
        )
    return fitting


def _demonstrations(
    fitting: Fitting[Any],
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    config: DataConfig,
) -> Iterator[Encoded]:
    for _, pair, prompt_ids in _fitting(fitting, tokenizer, pairs, config):
        assert pair.chosen is not None
        response_ids = encode_response(tokenizer, pair.prompt, pair.chosen)
        row = _join(prompt_ids, response_ids, config.max_length)
        fitting.cut_responses += row.is_cut
        yield row


def _pairs(
    fitting: Fitting[Any],
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    config: DataConfig,
) -> Iterator[EncodedPair]:
    for _, pair, prompt_ids in _fitting(fitting, tokenizer, pairs, config):
        assert pair.chosen is not None and pair.rejected is not None
        chosen, rejected = (
            _join(prompt_ids, encode_response(tokenizer, pair.prompt, response), config.max_length)
            for response in (pair.chosen, pair.rejected)
        )
        if chosen.input_ids == rejected.input_ids:
            fitting.equal_pairs += 1
            continue
        fitting.cut_responses += chosen.is_cut or rejected.is_cut
        yield EncodedPair(chosen, rejected, pair.prompt_id, pair.kind)


def encode_demonstrations(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[PreferencePair], config: DataConfig
) -> Fitting[Encoded]:
    """Prompts and chosen responses, for SFT; kept in `data.cache`. ValueError where no row fits."""
    fitting: Fitting[Encoded] = Fitting()
    rows = _demonstrations(fitting, tokenizer, pairs, config)
    if config.cache:
        numbered = ((row.input_ids, [row.prompt_length, row.is_cut]) for row in rows)
        entry = _cached("demonstrations", fitting, tokenizer, pairs, config, numbered, dict)
        fitting.rows = CachedRows(entry)
    else:
        fitting.rows = list(rows)
    return _require_rows(fitting, pairs, config)


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[PreferencePair], config: DataConfig
) -> Fitting[EncodedPair]:
    """Prompts with both responses, for the reward model; else like `encode_demonstrations`."""
    fitting: Fitting[EncodedPair] = Fitting()
    rows = _pairs(fitting, tokenizer, pairs, config)
    if config.cache:
        kinds: dict[str, int] = {}
        numbered = (
            (side.input_ids, [side.prompt_length, side.is_cut, *_prompt_numbers(row), kind])
            for row in rows
            for kind in [kinds.setdefault(row.kind, len(kinds))]
            for side in (row.chosen, row.rejected)
        )
        entry = _cached(
            "pairs", fitting, tokenizer, pairs, config, numbered, lambda: {"kinds": list(kinds)}
        )
        fitting.rows = CachedPairs(entry)
    else:
        fitting.rows = list(rows)
    return _require_rows(fitting, pairs, config)


def keep_fitting(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[PreferencePair], config: DataConfig
) -> Fitting[PreferencePair]:
    """The rows whose prompts fit, for PPO and for evaluation. ValueError where none does."""
    fitting: Fitting[PreferencePair] = Fitting()
    places = array("q", (place for place, *_ in _fitting(fitting, tokenizer, pairs, config)))
    # A blend may lie on disk: keep places, not rows.
    is_blend = isinstance(pairs, BlendedRows)
    fitting.rows = pairs.take(places) if is_blend else [pairs[i] for i in places]
    return _require_rows(fitting, pairs, config)


# Rows in the cache -------------------------------------------------------------------------


def _cached(
    what: str,
    fitting: Fitting[Any],
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    config: DataConfig,
    rows: Iterable[tuple[Sequence[int], Sequence[int]]],
    details: Callable[[], dict[str, Any]],
) -> encoded_cache.Entry:
    """The entry of these rows, written from `rows` where there is none; fills in the counts."""
    settings = {"what": what, "lengths": [config.max_prompt_length, config.max_length]}
    parts = encoded_cache.key_parts(tokenizer, pairs, settings)
    entry = encoded_cache.find(config.cache, parts)
    if entry is None:
        return encoded_cache.write(
            config.cache, parts, rows, lambda: {"counts": fitting.counts(), **details()}
        )
    for name, count in entry.details["counts"].items():
        setattr(fitting, name, count)
    return entry


def _prompt_numbers(row: EncodedPair) -> tuple[int, int]:
    """The 24 hex digits of a prompt's hash as two numbers of 48 bits."""
    return int(row.prompt_id[:12], 16), int(row.prompt_id[12:], 16)


class CachedRows(Sequence[Encoded]):
    """Encoded rows of a cache entry, read when asked for."""

    def __init__(self, entry: encoded_cache.Entry):
        self._entry = entry

    def __len__(self) -> int:
        return len(self._entry.numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        ids, (prompt_length, is_cut, *_) = self._entry.row(range(len(self))[index])
        return Encoded(ids, prompt_length, bool(is_cut))


class CachedPairs(Sequence[EncodedPair]):
    """Encoded pairs of a cache entry, read when asked for."""

    def __init__(self, entry: encoded_cache.Entry):
        self._entry, self._sides = entry, CachedRows(entry)

    def __len__(self) -> int:
        return len(self._sides) // 2

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        i = range(len(self))[index]
        *_, high, low, kind = self._entry.numbers[2 * i].tolist()
        kinds = self._entry.details["kinds"]
        return EncodedPair(
            self._sides[2 * i], self._sides[2 * i + 1], f"{high:012x}{low:012x}", kinds[kind]
        )
