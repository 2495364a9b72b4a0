"""The families that ask for facts: single questions, and follow-ups that say "it"."""

from __future__ import annotations

from itertools import permutations
from random import Random

from rlhf_kit.toy_world import entities as world
from rlhf_kit.toy_world.pattern import Pattern, Slots, lookup, pick

# attribute: (questions, follow-up question, answer forms)
_ANIMAL_TEXTS = {
    "color": (
        ("What color is the {animal}?", "Which color does the {animal} have?"),
        "And what color is it?",
        ("The {animal} is {answer}.", "Its color is {answer}."),
    ),
    "home": (
        ("Where does the {animal} live?", "Where can I find the {animal}?"),
        "And where does it live?",
        ("The {animal} lives in {answer}.", "It lives in {answer}."),
    ),
    "food": (
        ("What does the {animal} eat?", "Which food does the {animal} like?"),
        "And what does it eat?",
        ("The {animal} eats {answer}.", "It eats {answer}."),
    ),
    "legs": (
        ("How many legs does the {animal} have?", "What number of legs does the {animal} have?"),
        "And how many legs does it have?",
        ("The {animal} has {answer} legs.", "It has {answer} legs."),
    ),
    "sound": (
        ("What sound does the {animal} make?", "Which sound comes from the {animal}?"),
        "And what sound does it make?",
        ("The {animal} makes a {answer}.", "Its sound is a {answer}."),
    ),
}
_PLACE_TEXTS = {
    "product": (
        ("What is {place} known for?", "What do people make in {place}?"),
        ("{place} is known for {answer}.", "People there make {answer}."),
    ),
    "ruler": (
        ("Who rules {place}?", "Who is in charge of {place}?"),
        ("{place} has a {answer}.", "The {answer} rules there."),
    ),
}


def fact_patterns() -> list[Pattern]:
    patterns = []
    for attribute, (questions, _, forms) in _ANIMAL_TEXTS.items():
        patterns.append(
            lookup(
                "fact",
                questions,
                forms,
                pick(animal=world.ANIMALS),
                lambda slots, attribute=attribute: world.fact(slots["animal"], attribute),
                world.ANIMAL_ATTRIBUTES[attribute],
            )
        )
    for attribute, (questions, forms) in _PLACE_TEXTS.items():
        patterns.append(
            lookup(
                "fact",
                questions,
                forms,
                pick(place=world.PLACES),
                lambda slots, attribute=attribute: world.fact(slots["place"], attribute),
                world.PLACE_ATTRIBUTES[attribute],
            )
        )
    return patterns


def _follow_up_pattern(first: str, second: str) -> Pattern:
    """A question about "it", the animal that the turn before was about."""
    questions, _, (form, _) = _ANIMAL_TEXTS[first]
    _, follow_up, forms = _ANIMAL_TEXTS[second]
    answered = form.replace("{answer}", "{" + first + "}")

    def draw(rng: Random) -> Slots:
        animal = rng.choice(world.ANIMALS)
        return {"animal": animal, first: world.fact(animal, first)}

    return lookup(
        "follow-up",
        tuple(f"{question}\n\n{answered}\n\n{follow_up}" for question in questions),
        forms,
        draw,
        lambda slots: world.fact(slots["animal"], second),
        world.ANIMAL_ATTRIBUTES[second],
    )


def follow_up_patterns() -> list[Pattern]:
    """One pattern for every ordered pair of an animal's attributes."""
    return [_follow_up_pattern(*pair) for pair in permutations(world.ANIMAL_ATTRIBUTES, 2)]
