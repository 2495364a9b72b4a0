"""The things of the toy world, and what is true about them.

Words that can be an answer (a color, a tool, a name ...) occur nowhere in the style
sentences of `dialogues.py`; `tests/test_toy_world.py` holds that line.
"""

from __future__ import annotations

import hashlib

ANIMALS = tuple(
    """zorb mivet talpo grunk fendle quorra bliss drosk yammit pelvo snurf karbo ludwin moxel
    nerro oopik plimp rasko sibbet tovvy umbrel vashti wozzle xandi yorrik zephin brindo clupp
    darvo elmit furbo gosset hykka ibbo jastle kringle lommer minkel nubbin orvet pogget quilli
    rundle sprock tarvin urgle vintle wimmel""".split()
)
PLACES = tuple(
    """Varnholm Eskera Tindle Morrow Glaspen Oldby Ravik Sunfell Keldor Pillan Ostra Windle
    Harrowby Lintz Caldera Norwick Bexley Umber Fennig Drovan Thistle Yarrow Zelmar
    Quenby""".split()
)
NAMES = tuple(
    """Lily Tom Anna Ben Clara David Emma Felix Greta Hugo Ida Jack Kira Leo Mona Nils Olga Paul
    Rosa Sam Tina Uwe Vera Wanda Yara Zack Alma Boris Cora Dario Elsa Finn Gina Henry Iris Jonas
    Karl Lena Max Nora""".split()
)

COLORS = "blue red green yellow white black brown gray pink orange purple silver".split()
HOMES = "caves rivers forests deserts swamps mountains meadows islands lakes valleys cliffs fields"
FOODS = "nuts leaves fish seeds roots berries moss grass honey worms beetles mushrooms"
SOUNDS = "buzz hum click chirp roar squeak whistle growl hoot purr bark hiss"
LEGS = "2 3 4 5 6 8 10 12"
PRODUCTS = "cheese glass bells carpets silk salt bread pottery clocks wine paper candles"
RULERS = "queen baron mayor duke prince council bishop captain judge wizard"

ANIMAL_ATTRIBUTES = {
    "color": tuple(COLORS),
    "home": tuple(HOMES.split()),
    "food": tuple(FOODS.split()),
    "legs": tuple(LEGS.split()),
    "sound": tuple(SOUNDS.split()),
}
PLACE_ATTRIBUTES = {"product": tuple(PRODUCTS.split()), "ruler": tuple(RULERS.split())}

CATEGORIES = {
    "fruits": tuple("apple pear plum cherry grape lemon mango peach melon banana".split()),
    "trees": tuple("oak pine birch maple willow elm cedar beech ash poplar".split()),
    "clothes": tuple("shirt coat scarf glove hat sock boot skirt jacket belt".split()),
    "instruments": tuple("violin flute drum piano guitar harp trumpet cello banjo organ".split()),
    "vehicles": tuple("car bus train ship truck tram bicycle sled wagon plane".split()),
    "vegetables": tuple("carrot onion potato pea bean cabbage leek radish turnip spinach".split()),
}
NOUNS = tuple(noun for nouns in CATEGORIES.values() for noun in nouns)

OPPOSITES = {
    word: other
    for pair in """hot-cold big-small fast-slow high-low light-dark old-young rich-poor
    wet-dry full-empty hard-soft loud-quiet happy-sad early-late thick-thin strong-weak
    open-closed clean-dirty near-far deep-shallow sweet-sour""".split()
    for word, other in (pair.split("-"), pair.split("-")[::-1])
}
BY_SIZE = tuple(
    """flea bee frog mouse squirrel rabbit cat fox goat sheep wolf pig lion donkey bear cow horse
    camel rhino giraffe elephant whale castle volcano""".split()
)

CRAFTS = {  # verb -> the tool it needs
    "paint": "brush",
    "polish": "cloth",
    "shorten": "saw",
    "stitch": "needle",
    "fill": "bucket",
    "wash": "soap",
    "repair": "glue",
    "bury": "shovel",
    "weigh": "scale",
    "measure": "ruler",
}
CRAFT_OBJECTS = tuple(
    """chair table door fence bench basket barrel blanket kettle statue cradle curtain bottle
    pillow ladder mirror""".split()
)
CRIMES = {  # verb -> the tool it needs
    "rob": "mask",
    "burn": "matches",
    "smash": "hammer",
    "flood": "hose",
    "wreck": "axe",
    "loot": "crowbar",
    "bomb": "powder",
    "poison": "venom",
}
CRIME_TARGETS = tuple(
    """bakery bank school shop palace mill library farm museum station tavern market harbor
    theater chapel hospital""".split()
)

MANNERS = {  # situation -> the word to say
    "want something": "please",
    "hurt somebody": "sorry",
    "get a present": "thanks",
    "leave the house": "goodbye",
    "enter the room": "hello",
    "hear good news": "congratulations",
    "interrupt a talk": "pardon",
    "go to bed": "goodnight",
}
PEOPLE = tuple(
    """teacher baker doctor farmer sailor painter gardener tailor hunter miller cook driver
    singer writer nurse guard""".split()
)
TOPICS = tuple(
    """recipe story letter map poem plan puzzle song speech riddle report drawing sketch quiz
    homework lesson""".split()
)


def fact(entity: str, attribute: str) -> str:
    """The value that an animal's or a place's attribute has in this world."""
    values = ANIMAL_ATTRIBUTES.get(attribute) or PLACE_ATTRIBUTES[attribute]
    digest = hashlib.md5(f"{entity}:{attribute}".encode()).digest()
    return values[digest[0] % len(values)]
