"""What the server holds of each page or script between its calls, kept from growing.

Gradio 6.31 keeps 10,000 sessions, and a session grows with every call (`Session` says why).
"""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio.blocks import Block
from gradio.routes import App
from gradio.state_holder import SessionState, StateHolder

MOST = 256
"""Sessions. A page's takes 0.35 MB, a script's 0.17."""


class Session(SessionState):
    """A session that holds one component for each of the page's.

    For every output that a handler leaves as it is, Gradio makes a new component with an id of
    its own. With the next value it would file that one under its own id too, value and all:
    each turn of a conversation would stay in memory with the whole transcript.
    """

    def __setitem__(self, key: int, value: Any) -> None:
        if isinstance(value, Block):
            value._id = key
        super().__setitem__(key, value)


class Sessions(StateHolder):
    """All of them, by the hash that a page or a script makes up."""

    def update(self, session_id: str) -> None:
        """Note that a session is used. Beyond MOST one of the longer unused half leaves: that of
        a script, which keeps nothing from call to call, before a page with its conversation."""
        with self.lock:
            if session_id in self.session_data:
                self.session_data.move_to_end(session_id)
            while len(self.session_data) > MOST:
                unused = list(self.session_data)[: MOST // 2]
                scripts = (id for id in unused if not self.session_data[id].state_data)
                gone = next(scripts, unused[0])
                del self.session_data[gone]
                self.time_last_used.pop(gone, None)
                self.blocks._queue.pending_messages_per_session.pop(gone, None)

    def __getitem__(self, session_id: str) -> SessionState:
        if session_id not in self.session_data:
            self.session_data[session_id] = Session(self.blocks)
        return super().__getitem__(session_id)


def hold(app: App, blocks: gr.Blocks) -> None:
    """Let a server that has just started hold its sessions in this way."""
    app.state_holder = Sessions()
    app.state_holder.set_blocks(blocks)
