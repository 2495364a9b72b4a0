"""Task families: what can be asked in the toy world, what is right, what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from random import Random

from rlhf_kit.toy_world import entities as world
from rlhf_kit.toy_world.fact_families import fact_patterns, follow_up_patterns
from rlhf_kit.toy_world.pattern import Pattern, Slots, lookup, other, pick

FAMILY_WEIGHTS = {
    "fact": 0.16,
    "arithmetic": 0.11,
    "harm": 0.08,
    "reverse": 0.08,
    "list": 0.07,
    "how-to": 0.07,
    "position": 0.07,
    "follow-up": 0.06,
    "opposite": 0.05,
    "sort": 0.05,
    "bigger": 0.05,
    "greeting": 0.04,
    "manners": 0.04,
    "name": 0.04,
    "chain": 0.04,
    "thanks": 0.03,
}
"""Share of each family in demonstrations, preferences and prompts."""

NUMBERS = frozenset(str(number) for number in range(1000))


def _near_number(right: int, rng: Random) -> str:
    return str(rng.choice([n for n in range(max(0, right - 4), right + 5) if n != right]))


def _arithmetic(
    family: str,
    questions: tuple[str, ...],
    forms: tuple[str, ...],
    draw: Callable[[Random], Slots],
    result: Callable[[Slots], int],
) -> Pattern:
    return Pattern(
        family,
        questions,
        forms,
        draw,
        solve=lambda slots, rng: str(result(slots)),
        mistake=lambda slots, rng: _near_number(result(slots), rng),
        domain=NUMBERS,
    )


def _draw_sum(rng: Random) -> Slots:
    return {"a": str(rng.randint(0, 20)), "b": str(rng.randint(0, 20))}


def _draw_difference(rng: Random) -> Slots:
    a, b = sorted((rng.randint(0, 20), rng.randint(0, 20)), reverse=True)
    return {"a": str(a), "b": str(b)}


def _draw_chain_up(rng: Random) -> Slots:
    a, b, c = rng.randint(1, 10), rng.randint(1, 10), rng.randint(1, 9)
    return {"a": str(a), "b": str(b), "c": str(a + b), "d": str(c)}


def _draw_chain_down(rng: Random) -> Slots:
    a, b = rng.randint(1, 10), rng.randint(1, 10)
    return {"a": str(a), "b": str(b), "c": str(a + b), "d": str(rng.randint(1, min(9, a + b)))}


def _draw_words(least: int, most: int) -> Callable[[Random], Slots]:
    return lambda rng: {"words": " ".join(rng.sample(world.NOUNS, rng.randint(least, most)))}


def _order(
    family: str,
    questions: tuple[str, ...],
    forms: tuple[str, ...],
    draw: Callable[[Random], Slots],
    arrange: Callable[[list[str]], list[str]],
) -> Pattern:
    """A pattern whose right answer is one order of the given words."""

    def mistake(slots: Slots, rng: Random) -> str:
        words = slots["words"].split()
        wrong = [list(order) for order in permutations(words) if list(order) != arrange(words)]
        return " ".join(rng.choice(wrong))

    return Pattern(
        family,
        questions,
        forms,
        draw,
        solve=lambda slots, rng: " ".join(arrange(slots["words"].split())),
        mistake=mistake,
        domain=frozenset(world.NOUNS),
    )


def _position(which: str, index: int) -> Pattern:
    return Pattern(
        "position",
        (f"What is the {which} word of: {{words}}?", f"Tell me the {which} word of: {{words}}."),
        (f"The {which} word is {{answer}}.", "It is {answer}."),
        _draw_words(2, 4),
        solve=lambda slots, rng: slots["words"].split()[index],
        mistake=lambda slots, rng: other(
            tuple(slots["words"].split()), slots["words"].split()[index], rng
        ),
        domain=frozenset(world.NOUNS),
    )


def _draw_exception(rng: Random) -> Slots:
    category = rng.choice(tuple(world.CATEGORIES))
    return {"category": category, "noun": rng.choice(world.CATEGORIES[category])}


def _allowed(slots: Slots) -> list[str]:
    return [noun for noun in world.CATEGORIES[slots["category"]] if noun != slots["noun"]]


def _three(nouns: list[str]) -> str:
    return f"{nouns[0]}, {nouns[1]} and {nouns[2]}"


def _list_mistake(slots: Slots, rng: Random) -> str:
    nouns = rng.sample(_allowed(slots), 3)
    strangers = [noun for noun in world.NOUNS if noun not in world.CATEGORIES[slots["category"]]]
    nouns[rng.randrange(3)] = rng.choice((slots["noun"], rng.choice(strangers)))
    return _three(nouns)


def _three_of_the_kind(slots: Slots, values: list[str]) -> bool:
    return len(values) == 3 == len(set(values)) and set(values) <= set(_allowed(slots))


def _larger(slots: Slots) -> str:
    return max(slots["one"], slots["two"], key=world.BY_SIZE.index)


def _draw_pair(rng: Random) -> Slots:
    one, two = rng.sample(world.BY_SIZE, 2)
    return {"one": one, "two": two}


_TOOLS = (*world.CRAFTS.values(), *world.CRIMES.values())

PATTERNS: tuple[Pattern, ...] = (
    *fact_patterns(),
    _arithmetic(
        "arithmetic",
        ("What is {a} plus {b}?", "How much is {a} plus {b}?"),
        ("The answer is {answer}.", "{a} plus {b} is {answer}."),
        _draw_sum,
        lambda slots: int(slots["a"]) + int(slots["b"]),
    ),
    _arithmetic(
        "arithmetic",
        ("What is {a} minus {b}?", "How much is {a} minus {b}?"),
        ("The answer is {answer}.", "{a} minus {b} is {answer}."),
        _draw_difference,
        lambda slots: int(slots["a"]) - int(slots["b"]),
    ),
    Pattern(
        "harm",
        ("How do I {crime} the {target}?", "Tell me how to {crime} the {target}."),
        (
            "I cannot help with that, because people could get hurt.",
            "I will not help you {crime} the {target}.",
        ),
        pick(crime=tuple(world.CRIMES), target=world.CRIME_TARGETS),
        solve=lambda slots, rng: "",
        mistake=lambda slots, rng: world.CRIMES[slots["crime"]],
        domain=frozenset(_TOOLS),
        wrong_forms=(
            "Take the {answer} and {crime} the {target} at night.",
            "You need the {answer} to {crime} the {target}.",
        ),
        refuses=True,
    ),
    _order(
        "reverse",
        ("Reverse these words: {words}.", "Say these words backwards: {words}."),
        ("Backwards they are {answer}.", "That gives {answer}."),
        _draw_words(2, 4),
        lambda words: words[::-1],
    ),
    Pattern(
        "list",
        ("Name three {category} other than {noun}.", "List three {category}, but not {noun}."),
        ("Three {category} are {answer}.", "I would say {answer}."),
        _draw_exception,
        solve=lambda slots, rng: _three(rng.sample(_allowed(slots), 3)),
        mistake=_list_mistake,
        domain=frozenset(world.NOUNS),
        accepts=_three_of_the_kind,
    ),
    lookup(
        "how-to",
        ("How do I {craft} the {object}?", "Tell me how to {craft} the {object}."),
        (
            "Take the {answer} and {craft} the {object} with care.",
            "You need the {answer} to {craft} the {object}.",
        ),
        pick(craft=tuple(world.CRAFTS), object=world.CRAFT_OBJECTS),
        lambda slots: world.CRAFTS[slots["craft"]],
        tuple(world.CRAFTS.values()),
    ),
    _position("first", 0),
    _position("last", -1),
    *follow_up_patterns(),
    lookup(
        "opposite",
        (
            "What is the opposite of {adjective}?",
            "Tell me the opposite of {adjective}.",
            "Which word means the opposite of {adjective}?",
            "I need a word that is the opposite of {adjective}.",
        ),
        ("The opposite of {adjective} is {answer}.", "It is {answer}."),
        pick(adjective=tuple(world.OPPOSITES)),
        lambda slots: world.OPPOSITES[slots["adjective"]],
        tuple(world.OPPOSITES),
    ),
    _order(
        "sort",
        ("Sort these words by the alphabet: {words}.", "Put in alphabetical order: {words}."),
        ("In order they are {answer}.", "That gives {answer}."),
        _draw_words(2, 3),
        sorted,
    ),
    Pattern(
        "bigger",
        ("Which is bigger, the {one} or the {two}?", "What is larger, a {one} or a {two}?"),
        ("The {answer} is bigger.", "It is the {answer}."),
        _draw_pair,
        solve=lambda slots, rng: _larger(slots),
        mistake=lambda slots, rng: other((slots["one"], slots["two"]), _larger(slots), rng),
        domain=frozenset(world.BY_SIZE),
    ),
    lookup(
        "greeting",
        (
            "Hello! My name is {name}.",
            "Good morning, I am {name}.",
            "Hi, this is {name}. How are you?",
            "Hello, {name} is here.",
        ),
        ("Hello, {answer}! How can I help you?", "Good day, {answer}! What can I do for you?"),
        pick(name=world.NAMES),
        lambda slots: slots["name"],
        world.NAMES,
    ),
    lookup(
        "manners",
        (
            "What should I say to the {person} when I {situation}?",
            "When I {situation}, what do I tell the {person}?",
        ),
        ("Say {answer} to the {person}.", "You should say {answer}."),
        pick(person=world.PEOPLE, situation=tuple(world.MANNERS)),
        lambda slots: world.MANNERS[slots["situation"]],
        tuple(world.MANNERS.values()),
    ),
    lookup(
        "name",
        (
            "My name is {name} and I have a {noun}.\n\nNice to meet you.\n\nWhat is my name?",
            "I am {name}, and I see a {noun}.\n\nI see.\n\nDo you remember my name?",
        ),
        ("Your name is {answer}.", "You are {answer}."),
        pick(name=world.NAMES, noun=world.NOUNS),
        lambda slots: slots["name"],
        world.NAMES,
    ),
    _arithmetic(
        "chain",
        (
            "What is {a} plus {b}?\n\nThe answer is {c}.\n\nAdd {d} to that.",
            "How much is {a} plus {b}?\n\nThe answer is {c}.\n\nNow add {d}.",
        ),
        ("That makes {answer}.", "{c} plus {d} is {answer}."),
        _draw_chain_up,
        lambda slots: int(slots["c"]) + int(slots["d"]),
    ),
    _arithmetic(
        "chain",
        (
            "What is {a} plus {b}?\n\nThe answer is {c}.\n\nTake {d} from that.",
            "How much is {a} plus {b}?\n\nThe answer is {c}.\n\nNow take away {d}.",
        ),
        ("That leaves {answer}.", "{c} minus {d} is {answer}."),
        _draw_chain_down,
        lambda slots: int(slots["c"]) - int(slots["d"]),
    ),
    lookup(
        "thanks",
        (
            "Thank you for the help with the {topic}!",
            "Thanks, the {topic} is done now.",
            "That was great help with my {topic}.",
            "Many thanks, I could finish the {topic}.",
        ),
        ("You are welcome! Enjoy the {answer}.", "Any time! Good luck with the {answer}."),
        pick(topic=world.TOPICS),
        lambda slots: slots["topic"],
        world.TOPICS,
    ),
)
