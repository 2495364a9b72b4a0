"""What the buttons of the Compare tab do: handlers, and which component calls which."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlencode

import gradio as gr

from apps.chat_tab import Talk
from apps.compare_tab import VERDICTS, CompareTab
from apps.generation import Event
from apps.markup import coloured, event_line, pane, pane_title, scores_line, status
from apps.page import QUIET, STREAM, Page, sampling, sentence, session_of
from apps.refusals import refusal
from apps.text import label_of, say
from apps.votes import Tally

Update = dict[Any, Any]
Pair = dict[str, Any]
"""comparison: its id; messages: its prompt; attempt; blind; events: the last of each pane;
finished: whether both have ended; models: the ids asked for, in the order of the dropdowns."""


class CompareActions:
    """Handlers of the tab; each takes values of components and returns those that change."""

    def __init__(self, page: Page, tab: CompareTab) -> None:
        self.page, self.tab, self.bench = page, tab, page.bench

    def send(
        self, request: gr.Request, message: str, context: bool, talk: Talk, *rest: Any
    ) -> Iterator[Update]:
        """Ask both models; with `context`, as the next question of the chat's conversation."""
        language = rest[3]
        if not message.strip():
            yield self.remark(say(language, "prompt_none"))
            return
        before = talk["messages"] if context else []
        yield from self.ask(request, [*before, {"role": "user", "content": message}], 0, *rest)

    def another(self, request: gr.Request, pair: Pair | None, *rest: Any) -> Iterator[Update]:
        """Other samples for the same prompt, and, when blind, a new shuffle."""
        if pair is None:
            yield self.remark(say(rest[3], "prompt_none"))
            return
        yield from self.ask(request, pair["messages"], pair["attempt"] + 1, *rest)

    def ask(
        self,
        request: gr.Request,
        messages: Sequence[dict[str, str]],
        attempt: int,
        first: str,
        second: str,
        blind: bool,
        language: str,
        *settings: Any,
    ) -> Iterator[Update]:
        """Stream both answers. A vote may come meanwhile: what it shows is left alone."""
        tab = self.tab
        pair: Pair = {
            "comparison": "",
            "messages": list(messages),
            "attempt": attempt,
            "blind": blind,
            "events": None,
            "finished": False,
            "models": (first, second),
        }
        yield {
            **self.titles(language, pair, None),
            **self.empty_panes(),
            **self.vote_buttons(False),
            tab.status: status(say(language, "waiting")),
            tab.verdict: "",
            tab.voted: None,
            tab.pair: pair,
            tab.send: gr.update(interactive=False),
            tab.another: gr.update(interactive=False),
            tab.stop: gr.update(interactive=True),
        }
        rest: Update = {
            tab.send: gr.update(interactive=True),
            tab.another: gr.update(interactive=True),
            tab.stop: gr.update(interactive=False),
        }
        ended, votable = [False, False], False
        try:
            events = self.bench.arena.compare(
                first,
                second,
                messages,
                session=session_of(request),
                blind=blind,
                attempt=attempt,
                **sampling(settings),
            )
            with contextlib.closing(events):
                for both in events:
                    pair = {**pair, "comparison": both.comparison, "events": (both.a, both.b)}
                    update = self.panes(language, (both.a, both.b), both.errors)
                    if not votable and both.a.text and both.b.text:
                        votable = True
                        update |= self.vote_buttons(True)
                    for place, event in enumerate((both.a, both.b)):
                        if event.reason and not ended[place]:
                            ended[place] = True
                            said = say(language, f"finished_{'ab'[place]}")
                            update[self.page.announcement] = said
                    yield {**update, tab.pair: pair, tab.status: ""}
            yield {**rest, tab.pair: {**pair, "finished": pair["events"] is not None}}
        except ValueError as error:
            yield {**rest, **self.remark(sentence(language, error), "error"), tab.pair: None}

    def stop(self, request: gr.Request) -> None:
        for side in "ab":
            self.bench.generation.stop(session_of(request), side)

    def vote(self, request: gr.Request, pair: Pair | None, language: str, verdict: str) -> Update:
        """Save a vote and say which model was which."""
        tab = self.tab
        if pair is None:
            return self.remark(say(language, "prompt_none"))
        try:
            vote = self.bench.arena.vote(pair["comparison"], verdict, session=session_of(request))
        except ValueError as error:
            return self.remark(sentence(language, error), "error")
        names = [label_of(language, vote.a), label_of(language, vote.b)]
        voted = {"verdict": vote.verdict, "names": names}
        text = say(
            language, "voted", verdict=say(language, f"vote_{verdict}"), a=names[0], b=names[1]
        )
        return {
            **self.titles(language, pair, voted),
            **self.vote_buttons(False),
            tab.voted: voted,
            tab.verdict: status(text),
            tab.tally: self.tally(language, *pair["models"]),
            self.page.announcement: text,
        }

    def score(
        self, pair: Pair | None, voted: dict[str, Any] | None, colours: bool, language: str
    ) -> Iterator[Update]:
        """Scores and colours, once both answers are there and nothing is to be hidden."""
        if pair is None or not pair["finished"]:
            yield {self.tab.panes[0].scores: gr.skip()}
            return
        if pair["blind"] and voted is None:
            yield {side.scores: status(say(language, "after_vote")) for side in self.tab.panes}
            return
        yield {side.scores: status(say(language, "scoring")) for side in self.tab.panes}
        update: Update = {}
        for side, event in zip(self.tab.panes, pair["events"], strict=True):
            try:
                update[side.scores] = scores_line(language, self.bench.scoring.scores(event.answer))
                if colours:
                    tokens = self.bench.scoring.tokens(event.answer)
                    update[side.answer] = coloured(language, tokens)
                else:
                    update[side.answer] = pane(event.text)
            except ValueError as error:
                update[side.scores] = status(sentence(language, error), "error")
        yield update

    # ---- parts of the tab

    def titles(self, language: str, pair: Pair, voted: dict[str, Any] | None) -> Update:
        """The heads of the panes: the models' names, unless they are to be hidden still."""
        if voted is not None:
            names, verdict = voted["names"], voted["verdict"]
        elif pair["blind"]:
            names, verdict = [say(language, "hidden")] * 2, ""
        else:
            names, verdict = [self.name(language, model) for model in pair["models"]], ""
        return {
            side.title: pane_title(language, letter, name, chosen=letter == verdict)
            for side, letter, name in zip(self.tab.panes, "ab", names, strict=True)
        }

    def panes(self, language: str, events: tuple[Event, Event], errors: tuple[str, str]) -> Update:
        update: Update = {}
        for side, event, error in zip(self.tab.panes, events, errors, strict=True):
            update[side.answer] = pane(event.text)
            update[side.line] = (
                status(refusal(language, error), "error")
                if error
                else status(event_line(language, event))
            )
        return update

    def empty_panes(self) -> Update:
        return {
            part: "" for side in self.tab.panes for part in (side.answer, side.line, side.scores)
        }

    def vote_buttons(self, interactive: bool) -> Update:
        return {button: gr.update(interactive=interactive) for button in self.tab.votes.values()}

    def name(self, language: str, model: str) -> str:
        try:
            return label_of(language, self.bench.checkpoints.get(model))
        except ValueError:
            return ""

    def tally(self, language: str, first: str, second: str) -> str:
        """The running win rate of the first model over the second."""
        try:
            tally = self.bench.arena.tally(first, second)
        except ValueError as error:
            return status(sentence(language, error), "error")
        names = {"a": self.name(language, first), "b": self.name(language, second)}
        return status(tally_line(language, tally, names))

    def chosen(self, first: str, second: str, seed: Any, language: str) -> Update:
        """What another pair of models changes: the link and the win rate."""
        return {
            self.tab.link: self.link(first, second, seed),
            self.tab.tally: self.tally(language, first, second),
        }

    def link(self, first: str, second: str, seed: Any) -> str:
        """The address that opens this pair, from the page's own on."""
        try:
            a, b = (self.bench.checkpoints.get(model).name for model in (first, second))
        except ValueError:
            return ""
        return "?" + urlencode({"a": a, "b": b, "seed": int(seed or 0)})

    def remark(self, text: str, kind: str = "") -> Update:
        return {self.tab.status: status(text, kind), self.page.announcement: text}


def tally_line(language: str, tally: Tally, names: dict[str, str]) -> str:
    """The win rate in words, with its interval and what it counts."""
    count = tally.wins + tally.losses + tally.ties + tally.both_bad
    if not count:
        return say(language, "no_votes", **names)
    if tally.rate is None or tally.low is None or tally.high is None:
        return say(language, "tally_bad", count=count, **names)
    shares = {key: f"{getattr(tally, key):.0%}" for key in ("rate", "low", "high")}
    counts = {key: getattr(tally, key) for key in ("wins", "losses", "ties", "both_bad", "blind")}
    return say(language, "tally", count=count, **names, **shares, **counts)


# ---- wiring


def wire(page: Page, tab: CompareTab, talk: gr.State) -> CompareActions:
    do = CompareActions(page, tab)
    rest = [tab.first, tab.second, tab.blind, page.language, *tab.settings.components]
    parts = [part for side in tab.panes for part in (side.answer, side.line, side.scores)]
    titles = [side.title for side in tab.panes]
    buttons = [*tab.votes.values()]
    outputs = [
        *(tab.status, tab.verdict, tab.voted, tab.pair, tab.send, tab.another, tab.stop),
        *(*parts, *titles, *buttons, page.announcement),
    ]
    scored = [tab.pair, tab.voted, tab.colours, page.language]
    scores = [part for side in tab.panes for part in (side.answer, side.scores)]
    asking = gr.on(
        [tab.send.click, tab.message.submit],
        do.send,
        [tab.message, tab.context, talk, *rest],
        outputs,
        **STREAM,
    )
    again = tab.another.click(do.another, [tab.pair, *rest], outputs, **STREAM)
    for stream in (asking, again):
        stream.then(do.score, scored, scores, **QUIET)
    tab.stop.click(do.stop, None, None, queue=False, **QUIET)
    for verdict, button in tab.votes.items():
        button.click(
            voting(do, verdict),
            [tab.pair, page.language],
            [tab.status, tab.verdict, tab.voted, tab.tally, *titles, *buttons, page.announcement],
            **QUIET,
        ).then(do.score, scored, scores, **QUIET)
    tab.colours.change(do.score, scored, scores, **QUIET)
    gr.on(
        [tab.first.input, tab.second.input, tab.settings.seed.input],
        do.chosen,
        [tab.first, tab.second, tab.settings.seed, page.language],
        [tab.link, tab.tally],
        **QUIET,
    )
    tab.copy.click(None, tab.link, None, js="(link) => rlhfKit.copyLink(link)", **QUIET)
    return do


def voting(do: CompareActions, verdict: str) -> Callable[..., Update]:
    assert verdict in VERDICTS

    def vote(request: gr.Request, pair: Pair | None, language: str) -> Update:
        return do.vote(request, pair, language, verdict)

    return vote
