"""Those who use the app in app_load.py: scripts at its API, and pages as browsers have them."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import re
import secrets
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from rlhf_kit import toy_world

KINDS = ("script", "chat", "compare")
PATIENCE = 120.0
"""Seconds without a new event after which an answer counts as stuck."""
GIVES_UP = 1 / 8
"""Share of the questions that are given up in the middle."""
LENGTH = 128
"""Longest answer, in tokens."""


@dataclass
class Seen:
    """What the users saw, over all of them; lists are appended to from many threads."""

    first_token: list[float] = field(default_factory=list)
    """Seconds, of scripts."""
    seconds: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    """Until the end of an answer; in a comparison of both, with their scores."""
    tokens: list[int] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)


# ---- how a script or a browser talks to the app


class Site:
    """What a browser knows of the app once the page is there."""

    def __init__(self, address: str) -> None:
        self.http = httpx.Client(base_url=address, timeout=PATIENCE)
        config = self.http.get("/config").json()
        self.functions = {d["api_name"]: d["id"] for d in config["dependencies"]}
        listed = next(c for c in config["components"] if c["type"] == "dropdown")
        self.checkpoints: list[str] = [value for _, value in listed["props"]["choices"]]

    def lines(self, address: str) -> Generator[str, None, None]:
        """An event stream's lines. Closing it leaves, as a closed page does."""
        last = time.monotonic()
        with self.http.stream("GET", f"/gradio_api{address}") as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if "heartbeat" in line or line in ("", "data: null"):
                    if time.monotonic() - last > PATIENCE:
                        raise TimeoutError
                else:
                    last = time.monotonic()
                    yield line

    def post(self, address: str, **body: Any) -> str:
        """The id of the event that this begins."""
        response = self.http.post(f"/gradio_api{address}", json=body).raise_for_status()
        return response.json()["event_id"]

    def ask(
        self, checkpoint: str, messages: Any, settings: Sequence[Any]
    ) -> Generator[Any, None, None]:
        """The events of an answer, as a script has them."""
        event = self.post("/call/chat", data=[checkpoint, messages, *settings])
        kind = ""
        with contextlib.closing(self.lines(f"/call/chat/{event}")) as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name == "event":
                    kind = value.strip()
                elif kind == "error":
                    raise RuntimeError(value)
                elif kind in ("generating", "complete"):
                    yield json.loads(value)[0]


class Page:
    """An open page: a session of its own, and the key that its browser keeps."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.session = secrets.token_hex(6)
        self.browser = {"key": secrets.token_urlsafe(24), "language": "en"}
        list(self.call("opened", None))

    def call(self, function: str, *inputs: Any) -> Generator[list[Any], None, None]:
        """What an event of the page shows, change by change; the last one is whole."""
        number = self.site.functions[function]
        self.site.post("/queue/join", fn_index=number, data=inputs, session_hash=self.session)
        lines = self.site.lines(f"/queue/data?session_hash={self.session}")
        with contextlib.closing(lines):
            for line in lines:
                message = json.loads(line.removeprefix("data:"))
                if message["msg"] == "process_generating":
                    yield message["output"]["data"]
                if message["msg"] == "process_completed":
                    if not message["success"]:
                        raise RuntimeError(str(message["output"]))
                    yield message["output"]["data"]
                    return
        raise RuntimeError("the stream had no end")


# ---- users


class User:
    """One of those who use the app at once."""

    def __init__(self, number: int, site: Site, seen: Seen) -> None:
        self.kind = KINDS[number % len(KINDS)]
        self.site, self.seen, self.rng = site, seen, random.Random(number)
        self.prompts = toy_world.prompts(200, seed=number, split="validation")

    def run(self, done: Callable[[], bool]) -> None:
        """Dialogues of three questions, one after the other."""
        dialogue = {"script": self.script, "chat": self.chat, "compare": self.compare}[self.kind]
        while not done():
            try:
                for tokens, seconds in dialogue():
                    self.seen.tokens.append(tokens)
                    self.seen.seconds[self.kind].append(seconds)
                    time.sleep(self.rng.random() / 2)
                    if done():
                        break
            except TimeoutError:
                self.seen.stuck.append(f"{self.kind}: no event for {PATIENCE:g} s")
            except Exception as error:  # whatever a user would see
                self.seen.errors.append(f"{self.kind}: {type(error).__name__}: {str(error)[:200]}")

    def script(self) -> Generator[tuple[int, float], None, None]:
        """A dialogue through the API; tokens and seconds of each answer."""
        checkpoint, messages = self.rng.choice(self.site.checkpoints), list[dict[str, str]]()
        for _ in range(3):
            messages.append({"role": "user", "content": self.question()})
            begin, first, event = time.monotonic(), None, None
            with contextlib.closing(self.site.ask(checkpoint, messages, self.settings())) as events:
                for event in events:
                    if first is None and event["tokens"]:
                        first = time.monotonic() - begin
                        self.seen.first_token.append(first)
                        if self.gives_up():
                            return
            if event is None or not event["reason"]:
                raise RuntimeError(f"the answer had no end: {event}")
            yield event["tokens"], time.monotonic() - begin
            messages.append({"role": "assistant", "content": event["text"]})

    def chat(self) -> Generator[tuple[int, float], None, None]:
        """A conversation in a page."""
        page = Page(self.site)
        for turn in range(1, 4):
            begin, model = time.monotonic(), self.rng.choice(self.site.checkpoints)
            shown = self.read(
                page.call(
                    "send", self.question(), None, page.browser, model, "en", *self.settings()
                )
            )
            if shown is None:
                return
            notes = re.findall(r'<p class="note">.*?(\d+) tokens', shown[1])  # the transcript
            if len(notes) != turn:
                raise RuntimeError(f"{len(notes)} answers to {turn} questions: {shown[1]}")
            yield int(notes[-1]), time.monotonic() - begin

    def compare(self) -> Generator[tuple[int, float], None, None]:
        """Comparisons in a page, with scores and the tokens in colour."""
        page = Page(self.site)
        for _ in range(3):
            begin, pair = time.monotonic(), self.rng.sample(self.site.checkpoints, 2)
            asked = self.question(), False, None, *pair, False, "en", *self.settings()
            if self.read(page.call("send_1", *asked)) is None:
                return
            *_, shown = page.call("score", None, None, True, "en")
            lengths = re.findall(r"(\d+) tokens", str(shown))
            if len(lengths) != 2:
                raise RuntimeError(f"two answers without their scores: {shown}")
            yield sum(map(int, lengths)), time.monotonic() - begin

    def read(self, events: Generator[list[Any], None, None]) -> list[Any] | None:
        """The whole of what an event shows at its end; None where the user gives it up."""
        changes = 3 if self.gives_up() else None
        with contextlib.closing(events):
            shown = list(itertools.islice(events, changes))
        return None if changes else shown[-1]

    def question(self) -> str:
        return self.rng.choice(self.prompts)["prompt"][-1]["content"]

    def settings(self) -> tuple[Any, ...]:
        """System prompt, temperature, top-p, length and seed."""
        return "", 0.9, 0.95, LENGTH, self.rng.randrange(1000)

    def gives_up(self) -> bool:
        gives_up = self.rng.random() < GIVES_UP
        if gives_up:
            self.seen.given_up.append(self.kind)
        return gives_up
