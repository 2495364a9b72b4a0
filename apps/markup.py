"""HTML of what models and people have written, of tokens and of numbers.

Every text is escaped here, so that an answer is shown as the text it is: no markup, no image,
no script of it reaches the browser as such.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from apps.generation import Event, Prompt
from apps.refusals import refusal
from apps.scores import Scores, TokenScore
from apps.text import say

SHADES = 5
"""Steps of the colours of tokens, from improbable to sure; app.css has them."""


def status(text: str, kind: str = "") -> str:
    """A line below an answer; `kind` is "" or "error"."""
    return f'<p class="status {kind}">{escape(text)}</p>'


def event_line(language: str, event: Event) -> str:
    """Speed and length of an answer, and why it ended, in a line."""
    parts = [say(language, "waiting")] if event.waiting else []
    if event.tokens:
        parts.append(say(language, "tokens", count=event.tokens))
    if event.tokens_per_second:
        parts.append(say(language, "speed", speed=f"{event.tokens_per_second:.0f}"))
    if event.first_token_seconds is not None:
        parts.append(say(language, "first", seconds=f"{event.first_token_seconds:.2f}"))
    if event.reason not in ("", "end"):
        parts.append(say(language, f"end_{event.reason}"))
    if event.dropped:
        parts.append(say(language, "dropped", count=event.dropped))
    if event.placement:
        how, *labels = event.placement
        parts.append(say(language, f"loaded {how}", labels=", ".join(labels)))
    return " · ".join(parts) or say(language, "writing")


def transcript(language: str, messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation, each turn with its buttons, and below an answer its `note`."""
    head = f'<h2 id="talk-title" class="unseen">{escape(say(language, "conversation"))}</h2>'
    if not messages:
        return f'{head}<p class="empty">{escape(say(language, "empty"))}</p>'
    turns = (turn(language, message, number) for number, message in enumerate(messages))
    return head + "".join(turns)


def turn(language: str, message: Mapping[str, str], number: int) -> str:
    who = "you" if message["role"] == "user" else "model"
    text = message["content"] or say(language, "empty_answer")
    buttons = "".join(
        f'<button type="button" data-{action}="{number}" '
        f'aria-label="{escape(say(language, f"{action}_turn", turn=number + 1))}">'
        f"{escape(say(language, action))}</button>"
        for action in ("copy", "edit")
    )
    note = message.get("note")
    about = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f'<article class="turn {who}"><h3>{escape(say(language, who))}</h3>'
        f'<div class="text" dir="auto">{escape(text)}</div>{about}'
        f'<div class="turn-buttons">{buttons}</div></article>'
    )


def writing(language: str, text: str) -> str:
    """The turn that is being written."""
    return (
        f'<article class="turn model writing"><h3>{escape(say(language, "model"))}</h3>'
        f'<div class="text" dir="auto">{escape(text)}</div></article>'
    )


def pane(text: str) -> str:
    """An answer of a comparison."""
    return f'<div class="text" dir="auto">{escape(text)}</div>'


def pane_title(language: str, side: str, name: str, *, chosen: bool = False) -> str:
    """The head of a pane: its letter, and the model's name where it may be known."""
    mark = f' <span class="chosen">✓ {escape(say(language, "chosen"))}</span>' if chosen else ""
    return (
        f'<h3 id="title-{side}">{escape(say(language, f"answer_{side}"))}'
        f'<span class="model-name">{escape(name)}</span>{mark}</h3>'
    )


def shade(logprob: float) -> int:
    """0 for a token as good as impossible, SHADES - 1 for a sure one, in probability."""
    return min(int(math.exp(min(logprob, 0.0)) * SHADES), SHADES - 1)


def coloured(language: str, tokens: Sequence[TokenScore]) -> str:
    """An answer with each token's probability as its colour, and in words where one points."""
    spans = []
    for token in tokens:
        title = say(
            language,
            "token_title",
            probability=f"{math.exp(min(token.logprob, 0.0)):.3f}",
            logprob=f"{token.logprob:.2f}",
        )
        if token.sft_logprob is not None:
            title += "; " + say(language, "token_sft", logprob=f"{token.sft_logprob:.2f}")
        spans.append(
            f'<span class="shade-{shade(token.logprob)}" title="{escape(title)}">'
            f"{escape(token.text)}</span>"
        )
    return f'<div class="text tokens" dir="auto">{"".join(spans)}</div>{legend(language)}'


def legend(language: str) -> str:
    steps = "".join(
        f'<span class="shade-{step}">{step / SHADES:.0%}–{(step + 1) / SHADES:.0%}</span> '
        for step in range(SHADES)
    )
    return f'<p class="legend">{escape(say(language, "legend"))} {steps}</p>'


def scores_line(language: str, scores: Scores) -> str:
    """Score, KL and length under an answer; what is missing says why."""
    facts = {
        "score": None if scores.score is None else f"{scores.score:+.2f}",
        "kl": None if scores.kl is None else say(language, "nats", kl=f"{scores.kl:.2f}"),
        "answer_length": say(language, "tokens", count=scores.length),
    }
    items = "".join(
        f"<div><dt>{escape(say(language, key))}</dt><dd>{escape(value)}</dd></div>"
        for key, value in facts.items()
        if value is not None
    )
    notes = "".join(status(refusal(language, note)) for note in scores.notes)
    return f'<dl class="facts">{items}</dl>{notes}'


def exact_prompt(language: str, prompt: Prompt) -> str:
    """The text that the model reads, and its tokens with their ids."""
    chips = "".join(
        f"<li><span>{escape(visible(text))}</span><b>{number}</b></li>"
        for text, number in zip(prompt.tokens, prompt.ids, strict=True)
    )
    count = say(language, "prompt_ids", count=len(prompt.ids), context=prompt.context)
    dropped = status(say(language, "dropped", count=prompt.dropped)) if prompt.dropped else ""
    return (
        f"<h4>{escape(say(language, 'prompt_text'))}</h4>"
        f'<pre class="prompt" tabindex="0">{escape(prompt.text)}</pre>{dropped}'
        f'<h4>{escape(count)}</h4><ol class="ids">{chips}</ol>'
    )


def visible(text: str) -> str:
    """White space by signs, so that a token of it can be seen."""
    return text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣")


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls within itself where the page is narrow."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="table" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )
