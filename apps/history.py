"""Conversations kept on the server, so that a reload or a restart finds them again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apps.limits import Limits, check_text
from rlhf_kit.config import require

KEY = re.compile(r"[A-Za-z0-9_-]{32}")
NAMES = ("chat", "compare")
MOST_FILES = 500
"""Conversations kept, those not touched for longest leave first."""
ABOUT_CHARACTERS = 20_000


class History:
    """One JSONL file a conversation under RUN_DIR/app/history, named by a hash of its key."""

    def __init__(self, directory: Path, limits: Limits) -> None:
        self.directory = directory / "app" / "history"
        self.limits = limits
        self._lock = threading.Lock()

    def new_key(self) -> str:
        """A key for the browser to keep (gr.BrowserState): whoever has it can read the history."""
        return secrets.token_urlsafe(24)

    def save(
        self, key: Any, name: Any, messages: Sequence[Mapping[str, Any]], **about: Any
    ) -> None:
        """Keep a conversation under `name` ("chat", "compare"), replacing the one before.

        `messages` have a `role`, a `content` text and, if need be, other plain values; `about`
        are plain values to find again (checkpoint name, system, settings). ValueError for a
        malformed key, and beyond the limits.
        """
        path = self._path(key, name)
        most = 2 * self.limits.messages
        require(len(messages) <= most, f"{len(messages)} messages are too many to keep; begin anew")
        lines = [_line({"about": about})]
        require(len(lines[0]) <= ABOUT_CHARACTERS, "the settings are too long to be kept")
        for message in messages:
            require(
                isinstance(message, Mapping) and message.get("role") in ("user", "assistant"),
                "a message to keep needs the role user or assistant",
            )
            content = check_text(self.limits, message.get("content"), of="assistant")
            lines.append(_line({**message, "content": content}))
        require(
            sum(map(len, lines)) <= 4 * self.limits.dialogue_characters,
            "the conversation is too long to be kept; begin a new one",
        )
        with self._lock:
            try:
                self._write(path, "".join(lines))
            except OSError as error:
                why = error.strerror or error
                raise ValueError(f"the conversation could not be kept: {why}") from error
            self._bound()

    def load(self, key: Any, name: Any) -> dict[str, Any] | None:
        """{"messages": [...], **about}, or None: a key that nobody gave out is no error."""
        lines = self._lines(key, name)
        if not lines or not isinstance(lines[0].get("about"), dict):
            return None
        return {**lines[0]["about"], "messages": lines[1:]}

    def jsonl(self, key: Any, name: Any) -> str:
        """The conversation for download, one JSON line a message; "" where there is none."""
        return "".join(map(_line, self._lines(key, name)[1:]))

    def forget(self, key: Any, name: Any) -> None:
        """Delete it."""
        with self._lock:
            self._path(key, name).unlink(missing_ok=True)

    def _path(self, key: Any, name: Any) -> Path:
        """The file of a key: its hash, so that no key is a path and no listing gives a key."""
        require(
            isinstance(key, str) and bool(KEY.fullmatch(key)),
            "this browser's key is none of this server's; reload the page",
        )
        require(isinstance(name, str) and name in NAMES, f"a history is {' or '.join(NAMES)}")
        digest = hashlib.sha256(key.encode()).hexdigest()[:32]
        return self.directory / f"{digest}-{name}.jsonl"

    def _write(self, path: Path, text: str) -> None:
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial = path.with_suffix(".partial")
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(partial, path)

    def _lines(self, key: Any, name: Any) -> list[dict[str, Any]]:
        try:
            text = self._path(key, name).read_text(encoding="utf-8")
            lines = [json.loads(line) for line in text.splitlines()]
        except (ValueError, OSError):  # none, or none of ours
            return []
        return lines if all(isinstance(line, dict) for line in lines) else []

    def _bound(self) -> None:
        files = [(path.stat().st_mtime_ns, path) for path in self.directory.glob("*.jsonl")]
        for _, path in sorted(files)[:-MOST_FILES]:
            with contextlib.suppress(OSError):
                path.unlink()


def _line(value: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError("only texts and numbers can be kept in the history") from None
    # Line separators of Unicode would end a line for `splitlines`.
    for char in "\x85\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") + "\n"
