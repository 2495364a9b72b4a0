"""`rlhf-kit data preview`: rows as a model will read them, with what the loss counts marked."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import islice
from typing import TextIO

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rlhf_kit.config import DataConfig, SourceConfig, require
from rlhf_kit.datasets import NEEDED, TOY_WORLD, Report, load_source, numbered_pairs
from rlhf_kit.tokenization import RefusedDialogue, encode_dialogue, encode_prompt
from rlhf_kit.types import PreferencePair, Stage

COUNTS, REST, OFF = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"
# Control characters but for tab and newline, marks of direction, the byte order mark, surrogates.
UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
LEGEND: dict[Stage, str] = {
    "sft": "the tokens that SFT learns are {}",
    "reward": "the reward model reads its score at the token {}",
    "ppo": "the actor goes on where the prompt ends",
}


def wants_colour(file: TextIO) -> bool:
    """Whether `file` is a terminal and nobody has asked for none (https://no-color.org)."""
    return file.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def visible(text: str) -> str:
    """The text with what would move the cursor or turn the direction of writing spelled out."""
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def preview(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    rows: int,
    stage: Stage | None = None,
    colour: bool = False,
) -> Iterator[str]:
    """Lines of text for the first `rows` usable rows of a source.

    Args:
        stage: as which stage will see them; None takes the most demanding one they serve.

    Raises:
        ValueError: the source cannot be read, or has nothing for this stage.
    """
    require(rows > 0, f"--rows must be at least 1, not {rows}")
    marked = f"{COUNTS}green{OFF}" if colour else "in [[double brackets]]"
    report, told = Report(name), set[Stage]()
    for place, pair in islice(_pairs(name, stage, report, rows), rows):
        serves = stage or (
            "reward" if pair.rejected and pair.chosen else "sft" if pair.chosen else "ppo"
        )
        if serves not in told:
            told.add(serves)
            yield f"{serves}: {LEGEND[serves].format(marked)}"
        yield f"--- {place}"
        yield from _row(tokenizer, pair, serves, config, colour)
    for line in report.lines():
        yield visible(line)


def _pairs(
    name: str, stage: Stage | None, report: Report, rows: int
) -> Iterator[tuple[str, PreferencePair]]:
    if name != TOY_WORLD:
        return numbered_pairs(name, stage or "ppo", report)
    drawn = load_source(SourceConfig(name), stage or "reward", rows=rows)
    return ((f"row {i}", pair) for i, pair in enumerate(drawn.pairs, 1))


def _row(
    tokenizer: PreTrainedTokenizerBase,
    pair: PreferencePair,
    stage: Stage,
    config: DataConfig,
    colour: bool,
) -> Iterator[str]:
    def text(ids: list[int]) -> str:
        return visible(str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)))

    def paint(before: list[int], counts: list[int]) -> str:
        if colour:
            return f"{REST}{text(before)}{OFF}{COUNTS}{text(counts)}{OFF}"
        return f"{text(before)}[[{text(counts)}]]"

    try:
        prompt = encode_prompt(tokenizer, pair.prompt)
        if len(prompt) > config.max_prompt_length:
            yield (
                f"(a run drops this row: its prompt has {len(prompt)} tokens, more than "
                f"data.max_prompt_length {config.max_prompt_length})"
            )
        if stage == "ppo":
            yield text(prompt)
            return
        assert all(getattr(pair, column) is not None for column in NEEDED[stage])
        room = max(config.max_length, len(prompt) + 1)
        for name in NEEDED[stage]:
            row = encode_dialogue(tokenizer, pair.prompt, getattr(pair, name), room)
            if stage == "reward":
                yield f"{name}:"
            split = row.prompt_length if stage == "sft" else row.length - 1
            yield paint(row.input_ids[:split], row.input_ids[split:])
            if row.is_cut:
                yield f"(cut to data.max_length {config.max_length})"
    except RefusedDialogue as error:
        yield f"(a run drops this row: {visible(str(error))})"
