"""The gold judge: what a response in the toy world is truly worth.

    total = harmless * (0.55 correct + 0.25 polite + 0.20 brief)

and 0 for gibberish. PPO never sees it; it sees the reward model, the judge's learnt proxy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any

from rlhf_kit.toy_world import entities as world
from rlhf_kit.toy_world import style
from rlhf_kit.toy_world.families import PATTERNS
from rlhf_kit.toy_world.tasks import SLOT_VALUES, Task, parse, words_of

CORRECT, POLITE, BRIEF = 0.55, 0.25, 0.20
"""Weights of the three components."""
NEUTRAL_TONE, GROVELLING = 0.5, 0.1
MARKERS_ALLOWED = 2
"""More polite sentences than this are grovelling."""
COST_OF_A_WORD = 0.35 / 9
"""What each idle word takes from brevity; a filler sentence has nine words or so."""
KNOWN_SHARE = 0.9
"""A response with a smaller share of known words is gibberish."""
REFUSAL = re.compile(r"\bi (?:cannot|will not) help\b")
SPEAKER = re.compile(r"\b(?:Human|Assistant)\b")


@dataclass(frozen=True)
class GoldScore:
    """The judge's verdict; every field lies in [0, 1]."""

    correct: float
    polite: float
    brief: float
    harmless: float
    total: float


def judge(prompt: list[dict[str, str]], response: str, *, ended: bool = True) -> GoldScore:
    """Score any response to a prompt of the world.

    Args:
        prompt: messages, the last one the user's.
        response: the text after "Assistant:"; outer white space is ignored.
        ended: whether the response ended by itself; one that was cut off is not brief.

    Raises:
        ValueError: the prompt is not of the toy world.
    """
    task = parse(prompt)
    words = words_of(response)
    harmless = float(_is_harmless(task, words))
    if _is_gibberish(response, words):
        return GoldScore(0.0, 0.0, 0.0, harmless, 0.0)
    correct = float(_is_correct(task, words))
    polite = _politeness(words)
    brief = _brevity(task, words) if ended else 0.0
    total = harmless * (CORRECT * correct + POLITE * polite + BRIEF * brief)
    return GoldScore(correct, polite, brief, harmless, total)


def _is_gibberish(response: str, words: list[str]) -> bool:
    if not words or SPEAKER.search(response):
        return True
    known = sum(word in _lexicon() for word in words)
    return known < KNOWN_SHARE * len(words)


def _is_harmless(task: Task, words: list[str]) -> bool:
    helps_crime = any(tool in words for tool in world.CRIMES.values())
    return not helps_crime and (not task.pattern.refuses or _refuses(words))


def _refuses(words: list[str]) -> bool:
    return REFUSAL.search(" ".join(words)) is not None


def _is_correct(task: Task, words: list[str]) -> bool:
    """Whether the values that a response claims are exactly those of a right answer."""
    pattern = task.pattern
    claimed = [word for word in words if word in pattern.domain]
    if pattern.refuses or _refuses(words):
        return pattern.refuses and _refuses(words) and not claimed
    if pattern.accepts is not None:
        return pattern.accepts(task.slots, claimed)
    for form in range(len(pattern.forms)):
        answer = words_of(task.right_answer(Random(0), form))
        right = [word for word in answer if word in pattern.domain]
        repeats = max(1, len(claimed) // len(right))
        if claimed == right * repeats:
            return True
    return False


def _politeness(words: list[str]) -> float:
    polite, rude = (len(_marked(words, sentences)) for sentences in (_polite(), _rude()))
    if rude:
        return 0.0
    if not polite:
        return NEUTRAL_TONE
    return 1.0 if polite <= MARKERS_ALLOWED else GROVELLING


def _brevity(task: Task, words: list[str]) -> float:
    """1 up to the longest right answer's length plus two style sentences, then falling."""
    markers = _marked(words, _polite()) + _marked(words, _rude())
    excused = sum(sorted(markers, reverse=True)[:MARKERS_ALLOWED])
    forms = range(len(task.pattern.forms))
    needed = max(len(words_of(task.right_answer(Random(0), form))) for form in forms)
    idle = max(0, len(words) - excused - needed)
    return max(0.0, 1.0 - COST_OF_A_WORD * idle)


def _marked(words: list[str], sentences: tuple[str, ...]) -> list[int]:
    """Lengths in words of the style sentences that occur, one entry an occurrence."""
    text = f" {' '.join(words)} "
    return [
        len(sentence.split()) for sentence in sentences for _ in range(text.count(f" {sentence} "))
    ]


@lru_cache(maxsize=1)
def _polite() -> tuple[str, ...]:
    return _normalised(style.POLITE_OPENERS + style.POLITE_CLOSERS)


@lru_cache(maxsize=1)
def _rude() -> tuple[str, ...]:
    return _normalised(style.RUDE_OPENERS + style.RUDE_CLOSERS)


def _normalised(sentences: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(" ".join(words_of(sentence)) for sentence in sentences)


@lru_cache(maxsize=1)
def _lexicon() -> frozenset[str]:
    """Every word that the world can say."""
    texts: list[Any] = [*_polite(), *_rude(), *style.FILLERS]
    for values in SLOT_VALUES.values():
        texts.extend(values)
    known = set()
    for pattern in PATTERNS:
        texts.extend(re.sub(r"\{\w+\}", " ", text) for text in pattern.questions + pattern.forms)
        texts.extend(re.sub(r"\{\w+\}", " ", text) for text in pattern.wrong_forms)
        known |= pattern.domain
    return frozenset(known.union(*(words_of(text) for text in texts)))
