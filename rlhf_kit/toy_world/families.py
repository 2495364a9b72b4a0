"""Task families: what can be asked in the toy world, what is right, what is wrong."""

from __future__ import annotations

from itertools import permutations
from random import Random

from rlhf_kit.toy_world import entities as world
from rlhf_kit.toy_world.pattern import Pattern, Slots

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


def _pick(**choices: tuple[str, ...]):
    """A draw function that picks one value for every slot."""
    return lambda rng: {slot: rng.choice(values) for slot, values in choices.items()}


def _other(values: tuple[str, ...], right: str, rng: Random) -> str:
    return rng.choice([value for value in values if value != right])


def _lookup(family, questions, forms, draw, answer_of, values) -> Pattern:
    """A pattern with one right value out of a closed set of values."""
    return Pattern(
        family,
        questions,
        forms,
        draw,
        solve=lambda slots, rng: answer_of(slots),
        mistake=lambda slots, rng: _other(values, answer_of(slots), rng),
        domain=frozenset(value.lower() for value in values),
    )


def _fact_patterns() -> list[Pattern]:
    patterns = []
    for attribute, (questions, _, forms) in _ANIMAL_TEXTS.items():
        patterns.append(
            _lookup(
                "fact",
                questions,
                forms,
                _pick(animal=world.ANIMALS),
                lambda slots, attribute=attribute: world.fact(slots["animal"], attribute),
                world.ANIMAL_ATTRIBUTES[attribute],
            )
        )
    for attribute, (questions, forms) in _PLACE_TEXTS.items():
        patterns.append(
            _lookup(
                "fact",
                questions,
                forms,
                _pick(place=world.PLACES),
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

    return _lookup(
        "follow-up",
        tuple(f"{question}\n\n{answered}\n\n{follow_up}" for question in questions),
        forms,
        draw,
        lambda slots: world.fact(slots["animal"], second),
        world.ANIMAL_ATTRIBUTES[second],
    )


def _near_number(right: int, rng: Random) -> str:
    return str(rng.choice([n for n in range(max(0, right - 4), right + 5) if n != right]))


def _arithmetic(family, questions, forms, draw, result) -> Pattern:
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


def _draw_words(least: int, most: int):
    return lambda rng: {"words": " ".join(rng.sample(world.NOUNS, rng.randint(least, most)))}


def _order(family, questions, forms, draw, arrange) -> Pattern:
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
        mistake=lambda slots, rng: _other(
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
    *_fact_patterns(),
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
        _pick(crime=tuple(world.CRIMES), target=world.CRIME_TARGETS),
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
    _lookup(
        "how-to",
        ("How do I {craft} the {object}?", "Tell me how to {craft} the {object}."),
        (
            "Take the {answer} and {craft} the {object} with care.",
            "You need the {answer} to {craft} the {object}.",
        ),
        _pick(craft=tuple(world.CRAFTS), object=world.CRAFT_OBJECTS),
        lambda slots: world.CRAFTS[slots["craft"]],
        tuple(world.CRAFTS.values()),
    ),
    _position("first", 0),
    _position("last", -1),
    *(
        _follow_up_pattern(first, second)
        for first, second in permutations(world.ANIMAL_ATTRIBUTES, 2)
    ),
    _lookup(
        "opposite",
        (
            "What is the opposite of {adjective}?",
            "Tell me the opposite of {adjective}.",
            "Which word means the opposite of {adjective}?",
            "I need a word that is the opposite of {adjective}.",
        ),
        ("The opposite of {adjective} is {answer}.", "It is {answer}."),
        _pick(adjective=tuple(world.OPPOSITES)),
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
        mistake=lambda slots, rng: _other((slots["one"], slots["two"]), _larger(slots), rng),
        domain=frozenset(world.BY_SIZE),
    ),
    _lookup(
        "greeting",
        (
            "Hello! My name is {name}.",
            "Good morning, I am {name}.",
            "Hi, this is {name}. How are you?",
            "Hello, {name} is here.",
        ),
        ("Hello, {answer}! How can I help you?", "Good day, {answer}! What can I do for you?"),
        _pick(name=world.NAMES),
        lambda slots: slots["name"],
        world.NAMES,
    ),
    _lookup(
        "manners",
        (
            "What should I say to the {person} when I {situation}?",
            "When I {situation}, what do I tell the {person}?",
        ),
        ("Say {answer} to the {person}.", "You should say {answer}."),
        _pick(person=world.PEOPLE, situation=tuple(world.MANNERS)),
        lambda slots: world.MANNERS[slots["situation"]],
        tuple(world.MANNERS.values()),
    ),
    _lookup(
        "name",
        (
            "My name is {name} and I have a {noun}.\n\nNice to meet you.\n\nWhat is my name?",
            "I am {name}, and I see a {noun}.\n\nI see.\n\nDo you remember my name?",
        ),
        ("Your name is {answer}.", "You are {answer}."),
        _pick(name=world.NAMES, noun=world.NOUNS),
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
    _lookup(
        "thanks",
        (
            "Thank you for the help with the {topic}!",
            "Thanks, the {topic} is done now.",
            "That was great help with my {topic}.",
            "Many thanks, I could finish the {topic}.",
        ),
        ("You are welcome! Enjoy the {answer}.", "Any time! Good luck with the {answer}."),
        _pick(topic=world.TOPICS),
        lambda slots: slots["topic"],
        world.TOPICS,
    ),
)
