"""Sessions of pages and scripts: what the server holds of them does not grow."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the app's extra is not installed")

import gradio as gr

from apps import sessions
from apps.sessions import Sessions


def talking() -> gr.Blocks:
    """A page whose handler changes some of its outputs and leaves others as they are."""
    with gr.Blocks() as blocks:
        message, talk, shown = gr.Textbox(), gr.State([]), gr.HTML()

        def send(text: str, before: list[str]):
            said = [*before, text]
            yield {message: "", talk: said}
            yield {shown: " ".join(said)}

        gr.on([message.submit], send, [message, talk], [message, talk, shown])
    return blocks


def send(blocks: gr.Blocks, session: str, text: str) -> list[Any]:
    """What the page shows at the end of the event."""

    async def run() -> list[Any]:
        state, iterator, shown = blocks.state_holder[session], None, []
        while True:
            found = await blocks.process_api(0, [text, None], state=state, iterator=iterator)
            if not found["is_generating"]:
                return shown
            shown, iterator = found["data"], found["iterator"]

    return asyncio.run(run())


@pytest.fixture
def page() -> gr.Blocks:
    blocks = talking()
    Sessions().set_blocks(blocks)
    return blocks


def test_a_session_has_one_component_for_each_of_the_pages_after_many_turns_too(page: gr.Blocks):
    for text in "abcde":
        shown = send(page, "s", text)
    assert shown[2] == "a b c d e"
    session = page.state_holder["s"]
    assert session.blocks_config.blocks.keys() == page.blocks.keys()
    assert session.config_values.keys() <= page.blocks.keys()
    assert all(key == block._id for key, block in session.blocks_config.blocks.items())
    (shown_id,) = (key for key, block in page.blocks.items() if isinstance(block, gr.HTML))
    assert session[shown_id] is not page.blocks[shown_id], "the page's own component is nobody's"


def test_beyond_the_most_a_script_leaves_before_a_page_and_the_longest_unused_page_before_others(
    page: gr.Blocks, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sessions, "MOST", 4)
    send(page, "old page", "a")
    _ = page.state_holder["script"]
    send(page, "page", "a")
    send(page, "new page", "a")
    send(page, "newest page", "a")
    held = page.state_holder.session_data
    assert list(held) == ["old page", "page", "new page", "newest page"]
    unread = page._queue.pending_messages_per_session
    unread["old page"] = unread["page"] = asyncio.Queue()
    send(page, "page", "b")
    send(page, "last page", "a")
    assert list(held) == ["new page", "newest page", "page", "last page"]
    assert send(page, "page", "c")[2] == "a b c", "it kept its conversation"
    assert page.state_holder.time_last_used.keys() == held.keys() and [*unread] == ["page"]
