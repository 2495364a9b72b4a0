"""Answers as streams of events, each made by a thread that ends within a token when told to.

The thread decodes on whether or not a slow page has taken the last event; what the page gets is
the answer as it then stands, at most so many times a second.
"""

from __future__ import annotations

import secrets
import sys
import threading
import time
import traceback
from array import array
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from apps.answers import Answer, Event, Reason
from apps.limits import Limits, Settings, check_dialogue, check_session, check_settings
from apps.memory import OutOfMemory, free_memory
from apps.pool import Interrupted, ModelPool
from rlhf_kit.chat import ChatSession, LoadedModel
from rlhf_kit.config import GenerationConfig, require
from rlhf_kit.distributed import derive_seed
from rlhf_kit.hybrid_engine.decode import Token
from rlhf_kit.types import Message


@dataclass(frozen=True)
class Prompt:
    """The exact prompt of a dialogue."""

    text: str
    """As the model's template writes it."""
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    """The text of each id (special tokens by their names)."""
    dropped: int
    context: int
    """Tokens that prompt and answer may take together."""


class Generation:
    """All answers of the server; thread-safe."""

    def __init__(self, pool: ModelPool, limits: Limits) -> None:
        self.pool = pool
        self.limits = limits
        self._lock = threading.Lock()
        self._answers: OrderedDict[str, Answer] = OrderedDict()
        self._current: dict[tuple[str, str], tuple[Answer, threading.Thread]] = {}

    def stream(
        self,
        checkpoint: Any,
        messages: Any,
        *,
        session: str,
        pane: str = "chat",
        system: Any = "",
        temperature: Any = 0.7,
        top_p: Any = 0.9,
        max_new_tokens: Any = 256,
        seed: Any = 0,
        attempt: Any = 0,
    ) -> Generator[Event, None, None]:
        """The answer of a checkpoint (its id) to a dialogue, at most 12 events a second.

        Everything is checked before the first event: ValueError with one sentence. The same
        seed gives the same answer; `attempt` counts retries and gives another one each. A
        stream that begins ends the one before it in the same session and pane. Closing the
        generator stops the answer and frees the device. OutOfMemory (a ValueError) when memory
        ran out.
        """
        settings = check_settings(
            self.limits,
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            seed=seed,
            attempt=attempt,
        )
        dialogue = check_dialogue(self.limits, messages, system)
        (answer,) = self.begin([checkpoint], dialogue, settings, session=session, panes=[pane])
        for (event,) in self.watch([answer]):
            if event.reason == "error":
                answer.raise_error()
            yield event

    def begin(
        self,
        checkpoints: Sequence[Any],
        dialogue: tuple[Message, ...],
        settings: Settings,
        *,
        session: Any,
        panes: Sequence[str],
        blind: bool = False,
    ) -> list[Answer]:
        """Start one answer a checkpoint, in this order; what they are made of is checked."""
        session = check_session(session)
        found = [self.pool.checkpoints.get(id) for id in checkpoints]
        for checkpoint in found:
            require(checkpoint.complete, f"{checkpoint.label} is not finished; try again later")
        for pane in panes:
            self.stop(session, pane)
        answers = [
            Answer(
                id=secrets.token_urlsafe(12),
                checkpoint=checkpoint.id,
                name=checkpoint.name,
                label=checkpoint.label,
                stamp=self.pool.checkpoints.stamp(checkpoint.id),
                dialogue=dialogue,
                settings=settings,
                session=session,
                blind=blind,
            )
            for checkpoint in found
        ]
        with self._lock:
            alive = sum(thread.is_alive() for _, thread in self._current.values())
            require(
                alive + len(answers) <= self.limits.running,
                f"{alive} answers are being written already; try again in a moment",
            )
            for answer, pane in zip(answers, panes, strict=True):
                self._answers[answer.id] = answer
                ticket = self.pool.ticket()
                thread = threading.Thread(
                    target=self._make, args=(answer, ticket), name=f"answer {pane}", daemon=True
                )
                self._current[session, pane] = answer, thread
                thread.start()
            self._forget()
        return answers

    def watch(self, answers: Sequence[Answer]) -> Generator[list[Event], None, None]:
        """Events of all answers, until all have ended; closing it stops them."""
        pause = 1 / self.limits.updates_per_second
        try:
            while True:
                for answer in answers:
                    answer.read = time.monotonic()
                events = [answer.event() for answer in answers]
                yield events
                if all(event.reason for event in events):
                    return
                self._wait(answers, events, pause)
        finally:
            for answer in answers:
                answer.stop.set()

    def _wait(self, answers: Sequence[Answer], shown: Sequence[Event], pause: float) -> None:
        """For something new to show: at least `pause`, unless an answer ends or begins."""
        begin = time.monotonic()
        going = next(a for a, event in zip(answers, shown, strict=True) if not event.reason)
        while (waited := time.monotonic() - begin) < 1:
            states = [(a.reason, len(a.ids)) for a in answers]
            news = [(event.reason, event.tokens) for event in shown]
            if states != news and waited >= pause:
                return
            urgent = any(
                reason != event.reason or (count and not event.tokens)
                for (reason, count), event in zip(states, shown, strict=True)
            )
            if urgent:
                return
            with going.changed:
                going.changed.wait(max(0.005, pause - waited) if waited < pause else 0.05)

    def stop(self, session: str, pane: str | None = None) -> int:
        """End the answers of a session (of one pane, or of all); how many were running.

        Returns at once; each ends within a token and its stream then gives its last event.
        """
        with self._lock:
            chosen = [
                (answer, thread)
                for (owner, place), (answer, thread) in self._current.items()
                if owner == session and pane in (None, place)
            ]
        for answer, _ in chosen:
            answer.stop.set()
        return sum(thread.is_alive() for _, thread in chosen)

    def running(self, session: str | None = None) -> int:
        """Answers whose threads have not ended."""
        with self._lock:
            return sum(
                thread.is_alive()
                for (owner, _), (_, thread) in self._current.items()
                if session in (None, owner)
            )

    def close(self, seconds: float = 10.0) -> None:
        """Stop every answer and wait for the threads."""
        with self._lock:
            current = list(self._current.values())
        for answer, _ in current:
            answer.stop.set()
        for _, thread in current:
            thread.join(seconds)

    def answer(self, id: Any) -> Answer:
        """By its id; ValueError where it is unknown or was forgotten."""
        with self._lock:
            found = self._answers.get(id) if isinstance(id, str) else None
        if found is None:
            raise ValueError("this answer is not remembered any more; ask again")
        return found

    def prompt(
        self, checkpoint: Any, messages: Any, *, system: Any = "", max_new_tokens: Any = 256
    ) -> Prompt:
        """The exact prompt that `stream` would give the model."""
        from rlhf_kit.tokenization import render_prompt

        settings = check_settings(self.limits, max_new_tokens=max_new_tokens)
        dialogue = check_dialogue(self.limits, messages, system)
        given: list[int] = []

        def nothing(ids: Sequence[int], generation: GenerationConfig, *, seed: int) -> Iterator:
            given.extend(ids)
            return iter(())

        with self.pool.actor(checkpoint, seconds=self.limits.wait_seconds) as lease:
            loaded: LoadedModel = lease.value
            session = _session(loaded, nothing, dialogue, settings)
            list(session.reply(dialogue[-1]["content"]))
            kept = [*session.system, *session.messages, dialogue[-1]]
            return Prompt(
                text=render_prompt(loaded.tokenizer, kept),
                ids=tuple(given),
                tokens=tuple(str(loaded.tokenizer.decode([id])) for id in given),
                dropped=session.dropped,
                context=loaded.context,
            )

    # ---- the thread of an answer

    def _make(self, answer: Answer, ticket: object) -> None:
        reason: Reason = "error"
        try:
            waiting = self.pool.actor(
                answer.checkpoint,
                ticket=ticket,
                interrupted=lambda: self._interrupted(answer) is not None,
                seconds=self.limits.wait_seconds,
            )
            with waiting as lease:
                with answer.changed:
                    answer.leased = time.monotonic()
                    answer.placement = lease.placement
                    answer.changed.notify_all()
                reason = self._decode(answer, lease.value)
        except Interrupted:
            reason = "stopped"
        except ValueError as error:
            answer.error = str(error)
            answer.out_of_memory = isinstance(error, OutOfMemory)
        except Exception:  # a mistake of ours: the reader gets a sentence, the log the rest
            traceback.print_exc(file=sys.stderr)
            answer.error = "the answer failed inside the server; its log says why"
        finally:
            self.pool.leave(ticket)
            if answer.out_of_memory:  # only now are the frames gone that held the memory
                free_memory()
            with answer.changed:
                answer.reason = reason
                answer.changed.notify_all()

    def _decode(self, answer: Answer, loaded: LoadedModel) -> Reason:
        """Decode until something ends it, and say what."""
        from rlhf_kit.tokenization import decode_response

        interruption: Reason | None = None
        room = 0

        def stream(
            ids: Sequence[int], generation: GenerationConfig, *, seed: int
        ) -> Iterator[Token]:
            nonlocal interruption, room
            room = generation.max_new_tokens
            with answer.changed:
                answer.prompt_ids, answer.dropped = array("i", ids), session.dropped
            with closing(loaded.decoder.stream(ids, generation, seed=seed)) as tokens:  # type: ignore[type-var]
                while True:
                    with self.pool.turn():
                        # looked at behind the queue for the device, right before the work
                        interruption = self._interrupted(answer)
                        token = None if interruption else next(tokens, None)
                    if token is None:
                        return
                    with answer.changed:
                        answer.last = time.monotonic()
                        if answer.first is None:
                            answer.first = answer.last
                        answer.ids.append(token.id)
                        if len(answer.ids) == 1:
                            answer.changed.notify_all()
                    yield token

        session = _session(loaded, stream, answer.dialogue, answer.settings)
        for piece in session.reply(answer.dialogue[-1]["content"]):
            with answer.changed:
                answer.pieces.append(piece)
        response = decode_response(loaded.tokenizer, answer.ids)
        with answer.changed:
            answer.response = response
        if interruption:
            return interruption
        if answer.ids and answer.ids[-1] in loaded.decoder.eos_token_ids:
            return "end"
        return "length" if room == answer.settings.max_new_tokens else "context"

    def _interrupted(self, answer: Answer) -> Reason | None:
        now = time.monotonic()
        if answer.stop.is_set() or now - answer.read > self.limits.unread_seconds:
            return "stopped"
        if answer.leased is not None and now - answer.leased > self.limits.seconds:
            return "time"
        return None

    def _forget(self) -> None:
        """Drop the oldest answers, and panes whose threads have ended."""
        while len(self._answers) > self.limits.kept:
            self._answers.popitem(last=False)
        ended = [key for key, (_, thread) in self._current.items() if not thread.is_alive()]
        for key in ended:
            del self._current[key]


def _session(
    loaded: LoadedModel, stream: Any, dialogue: Sequence[Message], settings: Settings
) -> ChatSession:
    """The terminal chat's session, with the dialogue up to its last question."""
    system = dialogue[0]["content"] if dialogue[0]["role"] == "system" else ""
    before = list(dialogue[1 if system else 0 : -1])
    retry = settings.attempt
    session = ChatSession(
        loaded.tokenizer,
        stream,
        context=loaded.context,
        generation=GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            slots=1,
        ),
        seed=derive_seed(settings.seed, "attempt", retry) if retry else settings.seed,
        system=system,
    )
    session.messages = before
    session.answers = len(before) // 2
    return session
