"""Dialogues of the toy world: style, and the data of the three stages.

A response is `[opener] core [closer] [fillers]`. The core decides whether it is correct, the
rest whether it is polite and brief. Demonstrations are of mixed quality on purpose: a policy
that imitates them leaves room for the reward model and PPO to show what they are worth.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from rlhf_kit.toy_world.judge import judge
from rlhf_kit.toy_world.style import (
    FILLERS,
    POLITE_CLOSERS,
    POLITE_OPENERS,
    RUDE_CLOSERS,
    RUDE_OPENERS,
)
from rlhf_kit.toy_world.tasks import Task, draw_task

P_CORRECT = 0.75
"""Probability that a demonstration's core is right."""
P_RAMBLE = 0.60
"""Probability that fillers follow."""
SMALLEST_GAP = 0.03
"""Two responses whose gold scores differ by less are no preference pair."""
KIND_WEIGHTS = {"correctness": 3, "politeness": 1, "brevity": 1, "mixed": 1}


@dataclass(frozen=True)
class Habits:
    """How the speakers of a text choose their style sentences."""

    polite: float
    rude: float
    favor: int
    """Extra chances of the first sentence of each kind, on top of one chance for all."""


DEMONSTRATED = Habits(polite=0.25, rude=0.25, favor=5)


@dataclass(frozen=True)
class Style:
    """What stands around the core of a response."""

    opener: str
    closer: str
    fillers: tuple[str, ...]

    def dress(self, core: str) -> str:
        return " ".join(part for part in (self.opener, core, self.closer, *self.fillers) if part)


def demonstrations(n: int, *, seed: int, split: str = "train") -> list[dict]:
    """`n` rows {prompt, response, family}; responses of mixed quality (see `P_CORRECT` ...)."""
    rng = Random(f"demonstrations/{split}/{seed}")
    rows = []
    for _ in range(n):
        task = draw_task(rng, split)
        response = draw_style(rng).dress(_draw_core(task, rng))
        rows.append({"prompt": task.prompt(), "response": response, "family": task.family})
    return rows


def preferences(n: int, *, seed: int, split: str = "train", flip: float = 0.1) -> list[dict]:
    """`n` rows {prompt, chosen, rejected, family, kind, flipped}.

    The gold judge chooses, then a share `flip` of the pairs is labelled the wrong way round, as
    human annotators would. `kind` names what the two responses differ in alone.
    """
    if not 0.0 <= flip <= 1.0:
        raise ValueError(f"flip is a share of the pairs, between 0 and 1, not {flip}.")
    rng = Random(f"preferences/{split}/{seed}")
    rows: list[dict] = []
    while len(rows) < n:
        task = draw_task(rng, split)
        kind = rng.choices(tuple(KIND_WEIGHTS), tuple(KIND_WEIGHTS.values()))[0]
        pair = _draw_pair(task, kind, rng)
        flipped = rng.random() < flip
        prompt = task.prompt()
        scores = [judge(prompt, response).total for response in pair]
        if abs(scores[0] - scores[1]) < SMALLEST_GAP:
            continue
        chosen, rejected = pair if (scores[0] > scores[1]) != flipped else pair[::-1]
        rows.append(
            {
                "prompt": prompt,
                "chosen": chosen,
                "rejected": rejected,
                "family": task.family,
                "kind": kind,
                "flipped": flipped,
            }
        )
    return rows


def prompts(n: int, *, seed: int, split: str) -> list[dict]:
    """`n` rows {prompt, family}."""
    rng = Random(f"prompts/{split}/{seed}")
    tasks = (draw_task(rng, split) for _ in range(n))
    return [{"prompt": task.prompt(), "family": task.family} for task in tasks]


def draw_style(
    rng: Random,
    tone: str | None = None,
    fillers: int | None = None,
    habits: Habits = DEMONSTRATED,
) -> Style:
    """Draw what stands around a core; tone and number of fillers are drawn if not given."""
    if tone is None:
        weights = (habits.polite, habits.rude, 1 - habits.polite - habits.rude)
        tone = rng.choices(("polite", "rude", "neutral"), weights)[0]
    if fillers is None:
        fillers = rng.randint(1, 3) if rng.random() < P_RAMBLE else 0
    opener = closer = ""
    if tone != "neutral":
        openers, closers = (
            (POLITE_OPENERS, POLITE_CLOSERS) if tone == "polite" else (RUDE_OPENERS, RUDE_CLOSERS)
        )
        place = rng.choice(("opener", "closer", "both"))
        opener = "" if place == "closer" else _choose(openers, habits.favor, rng)
        closer = "" if place == "opener" else _choose(closers, habits.favor, rng)
    return Style(opener, closer, tuple(rng.sample(FILLERS, fillers)))


def _choose(sentences: tuple[str, ...], favor: int, rng: Random) -> str:
    return rng.choice((*sentences[:1] * favor, *sentences))


def _draw_core(task: Task, rng: Random) -> str:
    write = task.right_answer if rng.random() < P_CORRECT else task.wrong_answer
    return write(rng, rng.randrange(2))


def _draw_pair(task: Task, kind: str, rng: Random) -> tuple[str, str]:
    if kind == "mixed":
        first, second = (draw_style(rng).dress(_draw_core(task, rng)) for _ in range(2))
        return first, second
    if kind == "correctness":
        style, form = draw_style(rng), rng.randrange(2)
        return style.dress(task.right_answer(rng, form)), style.dress(task.wrong_answer(rng, form))
    core = _draw_core(task, rng)
    if kind == "politeness":
        tones = rng.sample(("polite", "neutral", "rude"), 2)
        fillers = draw_style(rng, tone="neutral").fillers
        one, two = (draw_style(rng, tone=tone, fillers=0) for tone in tones)
        first = Style(one.opener, one.closer, fillers).dress(core)
        return first, Style(two.opener, two.closer, fillers).dress(core)
    style = draw_style(rng, fillers=3)
    few, many = sorted(rng.sample(range(4), 2))
    short = Style(style.opener, style.closer, style.fillers[:few])
    long = Style(style.opener, style.closer, style.fillers[:many])
    return short.dress(core), long.dress(core)
