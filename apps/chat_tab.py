"""The Chat tab: a conversation with one checkpoint. What its buttons do is in chat_actions.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from apps.markup import transcript
from apps.page import Page, Settings, choices, settings_panel

Talk = dict[str, Any]
"""messages: the dialogue, each answer with a note; attempt: how often the last was retried."""
TURN_BUTTONS = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (!button) return;
  if (button.dataset.edit !== undefined) trigger('select', {turn: Number(button.dataset.edit)});
  if (button.dataset.copy !== undefined) {
    navigator.clipboard?.writeText(button.closest('.turn').querySelector('.text').textContent);
    window.rlhfKit.flash(button);
  }
});
"""


@dataclass(frozen=True)
class ChatTab:
    """The components of the tab."""

    checkpoint: gr.Dropdown
    refresh: gr.Button
    transcript: gr.HTML
    answer: gr.HTML
    """The turn that is being written."""
    status: gr.HTML
    editor: gr.Column
    edited: gr.Textbox
    save: gr.Button
    cancel: gr.Button
    message: gr.Textbox
    send: gr.Button
    stop: gr.Button
    retry: gr.Button
    undo: gr.Button
    new: gr.Button
    download: gr.Button
    file: gr.Textbox
    """The conversation as JSONL, on its way to the browser's own download."""
    settings: Settings
    show_prompt: gr.Button
    prompt: gr.HTML
    talk: gr.State
    editing: gr.State
    """Number of the turn in the editor."""


def empty() -> Talk:
    return {"messages": [], "attempt": 0}


def build(page: Page) -> ChatTab:
    labels = page.labels
    offered = choices(labels.language, page.bench.checkpoints.list())
    talk, editing = gr.State(empty()), gr.State(None)
    with gr.Row(elem_classes="columns"):
        with gr.Column(scale=3, min_width=320):
            with gr.Row(elem_classes="bar"):
                checkpoint = labels(
                    gr.Dropdown(
                        offered, value=page.bench.checkpoints.default().id, scale=4, min_width=160
                    ),
                    label="checkpoint",
                )
                refresh = labels(
                    gr.Button(size="md", scale=1, min_width=120, elem_classes="quiet"),
                    value="refresh",
                )
            with gr.Column(elem_id="talk"):
                said = gr.HTML(
                    transcript(labels.language, []),
                    elem_id="transcript",
                    apply_default_css=False,
                    js_on_load=TURN_BUTTONS,
                )
                answer = gr.HTML("", elem_id="answer", apply_default_css=False, js_on_load=None)
            line = gr.HTML("", elem_id="chat-status", apply_default_css=False, js_on_load=None)
            with gr.Column(visible=False, elem_id="editor") as editor:
                edited = labels(gr.Textbox(lines=2, max_lines=12), label="edit_text")
                with gr.Row():
                    save = gr.Button(variant="primary", min_width=80)
                    cancel = labels(gr.Button(min_width=80), value="cancel")
            message = labels(
                gr.Textbox(
                    lines=1,
                    max_lines=10,
                    max_length=page.bench.limits.message_characters,
                    elem_id="message",
                    autofocus=True,
                ),
                label="message",
                placeholder="message_hint",
            )
            with gr.Row(elem_classes="buttons"):
                send = labels(gr.Button(variant="primary", min_width=90), value="send")
                stop = labels(
                    gr.Button(variant="stop", interactive=False, min_width=90, elem_id="stop"),
                    value="stop",
                )
                retry = labels(gr.Button(min_width=70), value="retry")
                undo = labels(gr.Button(min_width=70), value="undo")
                new = labels(gr.Button(min_width=90), value="new")
                download = labels(gr.Button(min_width=90), value="download")
            file = gr.Textbox(visible="hidden", label="jsonl")
        with gr.Column(scale=1, min_width=280):
            with labels(gr.Accordion(open=True), label="settings"):
                settings = settings_panel(page)
            with labels(gr.Accordion(open=False), label="prompt"):
                show_prompt = labels(gr.Button(), value="prompt_show")
                prompt = gr.HTML("", elem_id="prompt", apply_default_css=False, js_on_load=None)
    return ChatTab(
        checkpoint=checkpoint,
        refresh=refresh,
        transcript=said,
        answer=answer,
        status=line,
        editor=editor,
        edited=edited,
        save=save,
        cancel=cancel,
        message=message,
        send=send,
        stop=stop,
        retry=retry,
        undo=undo,
        new=new,
        download=download,
        file=file,
        settings=settings,
        show_prompt=show_prompt,
        prompt=prompt,
        talk=talk,
        editing=editing,
    )
