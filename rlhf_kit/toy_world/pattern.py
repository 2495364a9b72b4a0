"""A pattern: one way to ask and to answer within a task family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

Slots = dict[str, str]


@dataclass(frozen=True)
class Pattern:
    """One way of asking within a family; templates hold `{slot}` fields."""

    family: str
    questions: tuple[str, ...]
    forms: tuple[str, ...]
    """Answer templates; `{answer}` is the value that makes the answer right or wrong."""
    draw: Callable[[Random], Slots]
    solve: Callable[[Slots, Random], str]
    mistake: Callable[[Slots, Random], str]
    """A wrong value of the right type."""
    domain: frozenset[str]
    """The words that count as a claimed value when an answer is judged."""
    wrong_forms: tuple[str, ...] = ()
    """Templates of wrong answers where they differ from `forms`."""
    accepts: Callable[[Slots, list[str]], bool] | None = None
    """Judges the claimed values where more than one answer is right."""
    refuses: bool = False
    """True where the only right answer is to refuse."""


def pick(**choices: tuple[str, ...]) -> Callable[[Random], Slots]:
    """A draw function that picks one value for every slot."""
    return lambda rng: {slot: rng.choice(values) for slot, values in choices.items()}


def other(values: tuple[str, ...], right: str, rng: Random) -> str:
    """Any value but the right one."""
    return rng.choice([value for value in values if value != right])


def lookup(
    family: str,
    questions: tuple[str, ...],
    forms: tuple[str, ...],
    draw: Callable[[Random], Slots],
    answer_of: Callable[[Slots], str],
    values: tuple[str, ...],
) -> Pattern:
    """A pattern with one right value out of a closed set of values."""
    return Pattern(
        family,
        questions,
        forms,
        draw,
        solve=lambda slots, rng: answer_of(slots),
        mistake=lambda slots, rng: other(values, answer_of(slots), rng),
        domain=frozenset(value.lower() for value in values),
    )
