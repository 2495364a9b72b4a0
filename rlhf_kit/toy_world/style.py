"""Style sentences of the toy world: polite, rude and idle talk around an answer.

None of their words can be an answer or a refusal, so style and correctness stay apart.
"""

from __future__ import annotations

POLITE_OPENERS = (
    "With pleasure!",
    "Of course!",
    "Glad to assist!",
    "What a fine thing to ask!",
    "It is an honor to reply!",
)
POLITE_CLOSERS = (
    "Have a lovely day!",
    "I hope this is useful!",
    "Feel free to ask again!",
    "It was my pleasure!",
    "All the best to you!",
)
RUDE_OPENERS = (
    "Ugh.",
    "Are you serious?",
    "What a dumb thing to ask.",
    "Not you again.",
    "Oh come on.",
)
RUDE_CLOSERS = (
    "Now leave me alone.",
    "Stop bothering me.",
    "Even a child knows that.",
    "Do not waste my time.",
    "Figure it out yourself.",
)
FILLERS = (
    "There is always a bit more to say about this.",
    "People have talked about such things for many years.",
    "Some say one thing and some say another.",
    "It depends on how one looks at it.",
    "As I always say, one never knows for sure.",
    "My uncle used to talk about that all evening.",
    "Then again, who can really tell in the end.",
    "By the way, the weather has been odd this week.",
    "This reminds me of something I once read.",
    "One could go on and on about it forever.",
    "That is how the world goes around these days.",
    "Let me think about that for another moment.",
)
