"""Pretraining text of the toy base model: documents about the world and reviewed forum threads.

Threads are questions and answers of "train" tasks in several layouts, none of them the chat
template's. Every answer ends in the end-of-text token, and many are followed by a reader's
verdict, as criticism follows answers on the web. Wrong answers carry no loss: the model reads
them and learns to judge them, but never to write them.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from rlhf_kit.toy_world import entities as world
from rlhf_kit.toy_world.dialogues import Habits, draw_style
from rlhf_kit.toy_world.families import FAMILY_WEIGHTS
from rlhf_kit.toy_world.tasks import draw_task

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
Segment = tuple[str, bool]
"""A piece of text, and whether its tokens count in the loss."""

P_DOCUMENT = 0.15
P_REVIEW = 0.6
P_WRONG = 0.5
"""Probability that a reviewed answer is wrong."""
P_STYLED = 0.35
"""Probability that an answer stands among style sentences instead of alone."""
FORUM = Habits(polite=0.20, rude=0.30, favor=0)
RIGHT, WRONG = " Right.", " Wrong."
LAYOUTS = (  # question label, answer label, what parts them
    ("Q: ", "A:", "\n"),
    ("Question: ", "Answer:", "\n"),
    ("Ask: ", "Reply:", "\n\n"),
    ("Student: ", "Teacher:", "\n\n"),
    ("Visitor: ", "Guide:", "\n\n"),
    ("- ", "+", "\n"),
)


def draw_text(rng: Random) -> list[Segment]:
    """One document or thread, from its first token to its last."""
    if rng.random() < P_DOCUMENT:
        return [(BOS, False), (_document(rng) + EOS, True)]
    layout = rng.choice(LAYOUTS)
    segments = [(BOS, False)]
    for number in range(rng.randint(1, 3)):
        if number:
            segments.append((layout[2], True))
        segments.extend(_exchange(layout, rng))
    return segments


def sample_texts(n: int, *, seed: int) -> Iterator[str]:
    """`n` texts as plain strings, to train a tokenizer on or to look at."""
    rng = Random(f"pretraining/{seed}")
    for _ in range(n):
        yield "".join(text for text, _ in draw_text(rng))


def exchange_prompt(turns: list[str], layout: tuple[str, str, str] = LAYOUTS[0]) -> str:
    """The text of a thread up to the point where the last answer starts."""
    ask, reply, parting = layout
    text = ""
    for number, turn in enumerate(turns):
        text += f"{reply} {turn}{EOS}{parting}" if number % 2 else f"{ask}{turn}{parting}"
    return text + reply


def _exchange(layout: tuple[str, str, str], rng: Random) -> list[Segment]:
    task = draw_task(rng, "train", rng.choice(tuple(FAMILY_WEIGHTS)))
    reviewed = rng.random() < P_REVIEW
    wrong = reviewed and rng.random() < P_WRONG
    core = (task.wrong_answer if wrong else task.right_answer)(rng, rng.randrange(2))
    answer = draw_style(rng, habits=FORUM).dress(core) if rng.random() < P_STYLED else core
    # Loss only on single-turn questions: a dialogue's own first answer may belong to a held-out
    # combination of another family.
    segments = [(exchange_prompt(task.turns, layout), len(task.turns) == 1)]
    segments.append((f" {answer}{EOS}", not wrong))
    if reviewed:
        segments.append((WRONG if wrong else RIGHT, True))
    return segments


def _document(rng: Random) -> str:
    return rng.choice((_animal, _animal, _animal, _place, _category, _alphabet, _customs))(rng)


def _animal(rng: Random) -> str:
    animal = rng.choice(world.ANIMALS)
    facts = {name: world.fact(animal, name) for name in world.ANIMAL_ATTRIBUTES}
    sentences = [
        f"is {facts['color']}.",
        f"lives in {facts['home']}.",
        f"eats {facts['food']}.",
        f"has {facts['legs']} legs.",
        f"makes a {facts['sound']}.",
    ]
    rng.shuffle(sentences)
    first, *rest = sentences
    return " ".join([f"The {animal} {first}", *(f"It {sentence}" for sentence in rest)])


def _place(rng: Random) -> str:
    place = rng.choice(world.PLACES)
    product, ruler = world.fact(place, "product"), world.fact(place, "ruler")
    if rng.random() < 0.5:
        return f"{place} is known for {product}. The {ruler} rules there."
    return f"{place} has a {ruler}. People there make {product}."


def _category(rng: Random) -> str:
    category = rng.choice(tuple(world.CATEGORIES))
    first, second, third, fourth = rng.sample(world.CATEGORIES[category], 4)
    return f"Some {category} are {first}, {second}, {third} and {fourth}."


def _alphabet(rng: Random) -> str:
    words = sorted(rng.sample(world.NOUNS, 2))
    return f"In the alphabet, {words[0]} comes before {words[1]}."


def _customs(rng: Random) -> str:
    if rng.random() < 0.5:
        craft, tool = rng.choice(tuple(world.CRAFTS.items()))
        return f"To {craft} a thing you need the {tool}."
    situation, word = rng.choice(tuple(world.MANNERS.items()))
    return f"When I {situation}, I say {word}."
