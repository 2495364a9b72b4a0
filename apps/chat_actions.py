"""What the buttons of the Chat tab do: handlers, and which component calls which."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import gradio as gr

from apps.chat_tab import ChatTab, Talk, empty
from apps.generation import Event
from apps.markup import event_line, exact_prompt, status, transcript, writing
from apps.page import QUIET, STREAM, Page, choices, key_of, sampling, sentence, session_of
from apps.text import label_of, say

Update = dict[Any, Any]


class ChatActions:
    """Handlers of the tab; each takes values of components and returns those that change."""

    def __init__(self, page: Page, tab: ChatTab) -> None:
        self.page, self.tab, self.bench = page, tab, page.bench

    def send(
        self, request: gr.Request, message: str, talk: Talk, browser: Any, *rest: Any
    ) -> Iterator[Update]:
        """The message becomes the next turn, and is answered."""
        if not message.strip():
            yield self.remark(say(rest[1], "prompt_none"))
            return
        question = {"role": "user", "content": message}
        asked = {"messages": [*talk["messages"], question], "attempt": 0}
        yield from self.answer(request, asked, talk, browser, *rest)

    def retry(self, request: gr.Request, talk: Talk, browser: Any, *rest: Any) -> Iterator[Update]:
        """Answer the last question again, with other samples."""
        if not talk["messages"]:
            yield self.remark(say(rest[1], "prompt_none"))
            return
        asked = cut(talk, len(talk["messages"]) - 1)
        asked["attempt"] = talk["attempt"] + 1
        yield from self.answer(request, asked, talk, browser, *rest)

    def save(
        self, request: gr.Request, text: str, turn: int | None, talk: Talk, browser: Any, *rest: Any
    ) -> Iterator[Update]:
        """Put an edited turn in its place; a question is answered again, what followed it goes."""
        if turn is None or not 0 <= turn < len(talk["messages"]) or not text.strip():
            yield {self.tab.editor: gr.update(visible=False)}
            return
        edited = {**talk["messages"][turn], "content": text}
        if edited["role"] == "user":
            asked = cut(talk, turn)
            asked["messages"].append(edited)
            yield from self.answer(request, asked, talk, browser, *rest)
            return
        messages = [*talk["messages"]]
        messages[turn] = edited
        changed = {**talk, "messages": messages}
        yield {
            **self.shown(rest[1], changed),
            self.tab.editor: gr.update(visible=False),
            **self.keep(rest[1], changed, browser, rest[0]),
        }

    def answer(
        self,
        request: gr.Request,
        asked: Talk,
        before: Talk,
        browser: Any,
        checkpoint: str,
        language: str,
        *settings: Any,
    ) -> Iterator[Update]:
        """Stream the answer to a dialogue that ends with a question; on an error all is as it was.

        A page that is closed meanwhile keeps the answer as far as it came.
        """
        tab = self.tab
        yield {
            tab.transcript: transcript(language, asked["messages"]),
            tab.answer: writing(language, ""),
            tab.status: status(say(language, "waiting")),
            tab.message: "",
            tab.editor: gr.update(visible=False),
            tab.send: gr.update(interactive=False),
            tab.stop: gr.update(interactive=True),
        }
        event: Event | None = None
        done = before
        try:
            events = self.bench.generation.stream(
                checkpoint,
                asked["messages"],
                session=session_of(request),
                attempt=asked["attempt"],
                **sampling(settings),
            )
            with contextlib.closing(events):
                for event in events:
                    yield {
                        tab.answer: writing(language, event.text),
                        tab.status: status(event_line(language, event)),
                    }
            done = self.answered(language, asked, checkpoint, event)
            kept = self.keep(language, done, browser, checkpoint)
            stopped = event is not None and event.reason == "stopped"
            yield {
                **self.shown(language, done),
                tab.status: "",
                self.page.announcement: say(language, "stopped" if stopped else "finished"),
                **kept,
            }
        except ValueError as error:
            yield {
                **self.shown(language, before),
                **self.remark(sentence(language, error), "error"),
                tab.message: asked["messages"][-1]["content"],
            }
        except GeneratorExit:
            if event is not None and event.text:
                done = self.answered(language, asked, checkpoint, event)
                self.keep(language, done, browser, checkpoint)
            raise

    def answered(self, language: str, asked: Talk, checkpoint: str, event: Event | None) -> Talk:
        """The dialogue with its new answer; below it, who gave it and how fast."""
        model = label_of(language, self.bench.checkpoints.get(checkpoint))
        note = f"{model} · {event_line(language, event)}" if event else model
        message = {"role": "assistant", "content": event.text if event else "", "note": note}
        return {**asked, "messages": [*asked["messages"], message]}

    def stop(self, request: gr.Request) -> None:
        self.bench.generation.stop(session_of(request), "chat")

    def undo(self, talk: Talk, browser: Any, checkpoint: str, language: str) -> Update:
        """Take the last question and its answer away; the question is in the box again."""
        messages = talk["messages"]
        places = [number for number, m in enumerate(messages) if m["role"] == "user"]
        if not places:
            return self.remark(say(language, "prompt_none"))
        shorter = cut(talk, places[-1])
        return {
            **self.shown(language, shorter),
            self.tab.message: messages[places[-1]]["content"],
            self.tab.editor: gr.update(visible=False),
            self.tab.status: "",
            **self.keep(language, shorter, browser, checkpoint),
        }

    def new(self, browser: Any, language: str) -> Update:
        """Begin a new conversation; the old one is forgotten."""
        with contextlib.suppress(ValueError):
            self.bench.history.forget(key_of(browser), "chat")
        return {
            **self.shown(language, empty()),
            self.tab.editor: gr.update(visible=False),
            self.tab.status: "",
            self.tab.prompt: "",
        }

    def edit(self, event: gr.EventData, talk: Talk, language: str) -> Update:
        """Open the editor with a turn."""
        turn = event._data.get("turn") if isinstance(event._data, Mapping) else None
        if not isinstance(turn, int) or not 0 <= turn < len(talk["messages"]):
            return {self.tab.editor: gr.update(visible=False)}
        message = talk["messages"][turn]
        kind = "edit_user" if message["role"] == "user" else "edit_model"
        label = say(language, "edit_turn", turn=turn + 1)
        return {
            self.tab.editor: gr.update(visible=True),
            self.tab.edited: gr.update(value=message["content"], label=label),
            self.tab.save: gr.update(value=say(language, kind)),
            self.tab.editing: turn,
        }

    def show_prompt(
        self, message: str, talk: Talk, checkpoint: str, language: str, *settings: Any
    ) -> Update:
        """The prompt of the message in the box, or of the last question where it is empty."""
        messages = talk["messages"]
        if message.strip():
            messages = [*messages, {"role": "user", "content": message}]
        elif messages:
            messages = messages[: len(messages) - (messages[-1]["role"] == "assistant")]
        else:
            return {self.tab.prompt: status(say(language, "prompt_none"))}
        values = sampling(settings)
        try:
            prompt = self.bench.generation.prompt(
                checkpoint,
                messages,
                system=values["system"],
                max_new_tokens=values["max_new_tokens"],
            )
        except ValueError as error:
            return {self.tab.prompt: status(sentence(language, error), "error")}
        return {self.tab.prompt: exact_prompt(language, prompt)}

    def download(self, browser: Any) -> str:
        return self.bench.history.jsonl(key_of(browser), "chat")

    def refresh(self, checkpoint: str, language: str) -> Update:
        """Offer what a run has written meanwhile."""
        offered = choices(language, self.bench.checkpoints.list())
        value = checkpoint if checkpoint in [id for _, id in offered] else None
        return {
            self.tab.checkpoint: gr.update(choices=offered, value=value),
            **self.remark(say(language, "found", count=len(offered))),
        }

    def shown(self, language: str, talk: Talk) -> Update:
        """A conversation at rest."""
        tab = self.tab
        return {
            tab.talk: talk,
            tab.transcript: transcript(language, talk["messages"]),
            tab.answer: "",
            tab.send: gr.update(interactive=True),
            tab.stop: gr.update(interactive=False),
        }

    def remark(self, text: str, kind: str = "") -> Update:
        return {self.tab.status: status(text, kind), self.page.announcement: text}

    def keep(self, language: str, talk: Talk, browser: Any, checkpoint: str) -> Update:
        """Save a conversation, with what a reload shows again; a sentence where that fails."""
        try:
            self.bench.history.save(
                key_of(browser),
                "chat",
                talk["messages"],
                attempt=talk["attempt"],
                checkpoint=self.bench.checkpoints.get(checkpoint).name,
            )
        except ValueError as error:  # no reason to lose the answer
            return self.remark(sentence(language, error), "error")
        return {}

    def restore(self, browser: Any) -> tuple[Talk, str | None]:
        """The conversation that a browser left, and the id of its checkpoint where it is there."""
        kept = self.bench.history.load(key_of(browser), "chat")
        if not kept:
            return empty(), None
        try:
            checkpoint = self.bench.checkpoints.named(kept.get("checkpoint")).id
        except ValueError:
            checkpoint = None
        talk = {name: kept.get(name, value) for name, value in empty().items()}
        return talk, checkpoint


def cut(talk: Talk, length: int) -> Talk:
    """The first turns of a conversation."""
    return {"messages": talk["messages"][:length], "attempt": 0}


# ---- wiring


def wire(page: Page, tab: ChatTab) -> ChatActions:
    do = ChatActions(page, tab)
    rest = [page.browser, tab.checkpoint, page.language, *tab.settings.components]
    shown = [tab.talk, tab.transcript, tab.answer, tab.status, tab.send, tab.stop]
    outputs = [*shown, tab.message, tab.editor, page.announcement]
    gr.on(
        [tab.send.click, tab.message.submit],
        do.send,
        [tab.message, tab.talk, *rest],
        outputs,
        **STREAM,
    )
    tab.retry.click(do.retry, [tab.talk, *rest], outputs, **STREAM)
    tab.save.click(do.save, [tab.edited, tab.editing, tab.talk, *rest], outputs, **STREAM)
    # The flag alone ends the answer: the stream's own last event then sets the page at rest.
    tab.stop.click(do.stop, None, None, queue=False, **QUIET)
    tab.undo.click(
        do.undo, [tab.talk, page.browser, tab.checkpoint, page.language], outputs, **QUIET
    )
    tab.new.click(do.new, [page.browser, page.language], [*outputs, tab.prompt], **QUIET)
    tab.transcript.select(
        do.edit,
        [tab.talk, page.language],
        [tab.editor, tab.edited, tab.save, tab.editing],
        **QUIET,
    ).then(None, None, None, js="() => rlhfKit.focus('#editor textarea')", **QUIET)
    tab.cancel.click(lambda: gr.update(visible=False), None, tab.editor, **QUIET).then(
        None, None, None, js="() => rlhfKit.focus('#message textarea')", **QUIET
    )
    tab.show_prompt.click(
        do.show_prompt,
        [tab.message, tab.talk, tab.checkpoint, page.language, *tab.settings.components],
        tab.prompt,
        **QUIET,
    )
    tab.download.click(do.download, page.browser, tab.file, **QUIET).then(
        None, tab.file, None, js="(text) => rlhfKit.download('chat.jsonl', text)", **QUIET
    )
    tab.refresh.click(
        do.refresh,
        [tab.checkpoint, page.language],
        [tab.checkpoint, tab.status, page.announcement],
        **QUIET,
    )
    return do
