"""Conversations kept on the server, so that a reload or a restart finds them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class History:
    """One JSONL file a browser under RUN_DIR/app/history, named by a hash of the browser's key."""

    def new_key(self) -> str:
        """A key for the browser to keep (gr.BrowserState): whoever has it can read the history."""
        raise NotImplementedError

    def save(
        self, key: Any, name: str, messages: Sequence[Mapping[str, Any]], **about: Any
    ) -> None:
        """Keep a conversation under `name` ("chat", "compare"), replacing the one before.

        `about` are plain values to find again (checkpoint name, system, settings). ValueError
        for a key this server did not make, or beyond the limits.
        """
        raise NotImplementedError

    def load(self, key: Any, name: str) -> dict[str, Any] | None:
        """{"messages": [...], **about}, or None: an unknown key is no error."""
        raise NotImplementedError

    def jsonl(self, key: Any, name: str) -> str:
        """The conversation for download, one JSON line a message."""
        raise NotImplementedError

    def forget(self, key: Any, name: str) -> None:
        """Delete it."""
        raise NotImplementedError
