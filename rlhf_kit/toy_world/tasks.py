"""Tasks: prompts of the toy world, drawn from a split and read back from their text.

One question template writes a prompt and, turned into a regular expression, reads it back, so
the judge knows the right answer of any prompt of the world. A blank line parts the turns.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache, lru_cache
from random import Random

from rlhf_kit.toy_world import entities as world
from rlhf_kit.toy_world.families import FAMILY_WEIGHTS, PATTERNS
from rlhf_kit.toy_world.pattern import Pattern, Slots

SPLITS = ("train", "validation", "test")
HELD_OUT_SHARE = 0.12
"""Share of the entity combinations in "validation", and the same again in "test"."""

SLOT_VALUES: dict[str, tuple[str, ...]] = {
    "animal": world.ANIMALS,
    "place": world.PLACES,
    "name": world.NAMES,
    "category": tuple(world.CATEGORIES),
    "noun": world.NOUNS,
    "adjective": tuple(world.OPPOSITES),
    "one": world.BY_SIZE,
    "two": world.BY_SIZE,
    "craft": tuple(world.CRAFTS),
    "object": world.CRAFT_OBJECTS,
    "crime": tuple(world.CRIMES),
    "target": world.CRIME_TARGETS,
    "situation": tuple(world.MANNERS),
    "person": world.PEOPLE,
    "topic": world.TOPICS,
    **world.ANIMAL_ATTRIBUTES,
}


@dataclass(frozen=True)
class Task:
    """One prompt of the world: a pattern, one of its questions, and the entities in it."""

    pattern: Pattern
    question: str
    slots: Slots

    @property
    def family(self) -> str:
        return self.pattern.family

    @property
    def turns(self) -> list[str]:
        return self.question.format(**self.slots).split("\n\n")

    def prompt(self) -> list[dict[str, str]]:
        roles = ("user", "assistant")
        return [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(self.turns)]

    def split(self) -> str:
        """The split this combination of family and entities belongs to, for every seed."""
        return _split_of(self.family, self.question.format(**self.slots))

    def right_answer(self, rng: Random, form: int = 0) -> str:
        forms = self.pattern.forms
        answer = self.pattern.solve(self.slots, rng)
        return forms[form % len(forms)].format(**self.slots, answer=answer)

    def wrong_answer(self, rng: Random, form: int = 0) -> str:
        forms = self.pattern.wrong_forms or self.pattern.forms
        answer = self.pattern.mistake(self.slots, rng)
        return forms[form % len(forms)].format(**self.slots, answer=answer)


def draw_task(rng: Random, split: str, family: str | None = None) -> Task:
    """Draw a task of one split; of one family, or of the families by weight."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}.")
    if family is None:
        family = rng.choices(tuple(FAMILY_WEIGHTS), tuple(FAMILY_WEIGHTS.values()))[0]
    while True:
        pattern = rng.choice(_patterns_of(family))
        task = Task(pattern, rng.choice(pattern.questions), pattern.draw(rng))
        if task.split() == split:
            return task


def parse(prompt: list[dict[str, str]]) -> Task:
    """Read a prompt of the world back; system messages are skipped.

    Raises:
        ValueError: the text is no prompt of the toy world.
    """
    text = "\n\n".join(message["content"] for message in prompt if message["role"] != "system")
    return parse_text(text)


@lru_cache(maxsize=65536)
def parse_text(text: str) -> Task:
    for pattern, question, expression in _expressions():
        if found := expression.fullmatch(text):
            return Task(pattern, question, found.groupdict())
    raise ValueError(f"The toy world's judge knows no such prompt: {text[:80]!r}.")


def words_of(text: str) -> list[str]:
    """Lower-case words and numbers of a text."""
    return re.findall(r"[a-z0-9']+", text.lower())


def _split_of(family: str, text: str) -> str:
    digest = hashlib.md5(f"{family}|{text}".encode()).digest()
    share = int.from_bytes(digest[:4], "big") / 2**32
    if share < HELD_OUT_SHARE:
        return "test"
    return "validation" if share < 2 * HELD_OUT_SHARE else "train"


@lru_cache(maxsize=1)
def _expressions() -> list[tuple[Pattern, str, re.Pattern[str]]]:
    return [
        (pattern, question, re.compile(_to_expression(question)))
        for pattern in PATTERNS
        for question in pattern.questions
    ]


def _to_expression(question: str) -> str:
    seen: set[str] = set()
    expression = ""
    for literal, slot in re.findall(r"([^{]*)(?:\{(\w+)\})?", question):
        expression += re.escape(literal)
        if slot in seen:
            expression += f"(?P={slot})"
        elif slot:
            seen.add(slot)
            expression += f"(?P<{slot}>{_slot_expression(slot)})"
    return expression


def _slot_expression(slot: str) -> str:
    if slot in SLOT_VALUES:
        return "|".join(SLOT_VALUES[slot])
    if slot == "words":
        noun = "(?:" + "|".join(world.NOUNS) + ")"
        return f"{noun}(?: {noun}){{1,3}}"
    return r"\d{1,2}"


@cache
def _patterns_of(family: str) -> tuple[Pattern, ...]:
    return tuple(pattern for pattern in PATTERNS if pattern.family == family)
