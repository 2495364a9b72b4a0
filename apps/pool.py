"""Models in memory: loaded when an answer needs them, together where they fit, else in turn.

An answer leases its model and holds one lease at a time, so that waiting for memory cannot end
in a deadlock; whoever came first is served first. Forward passes of all models on the device
take turns, one token each, so that answers advance side by side and one that ends frees the
device within a token.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apps.checkpoints import Checkpoints, stamp, without_places
from apps.memory import OutOfMemory, free_host_memory, free_memory, memory_errors
from rlhf_kit.chat import load_model
from rlhf_kit.config import require
from rlhf_kit.distributed import local_device
from rlhf_kit.trust import parameter_count

MOST_MODELS = 4
"""In memory at once: two of a comparison, SFT and the reward model..."""
SMALL = 1 << 30
"""...and more, while all together take no more bytes than this."""
HEADROOM = 1.2
"""Memory asked for a model, over the size of its weights: caches and activations need some."""
RESERVE = 256 << 20
"""Bytes left free beside that."""


class Interrupted(Exception):
    """The answer was told to stop while it waited."""


@dataclass
class Model:
    """What lies in memory under a key."""

    key: str
    label: str
    size: int
    value: Any = None
    leases: int = 0
    used: int = 0
    """Place in the order of use, for leaving the longest unused."""


@dataclass(frozen=True)
class Lease:
    """A model for as long as the `with` block lasts."""

    value: Any
    placement: tuple[str, ...]
    """What was done to get it: () nothing; ("alone",); ("beside", label, ...); ("instead of",
    label, ...)."""


class ModelPool:
    """Leases the models of a `Checkpoints`; thread-safe."""

    def __init__(self, checkpoints: Checkpoints, *, memory: int | None = None) -> None:
        """`memory`: bytes that weights may take in all; by default what the device has free."""
        self.checkpoints = checkpoints
        self.memory = memory
        self.device = local_device()
        self._models: dict[str, Model] = {}
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()
        self._uses = 0
        self._turns: deque[object] = deque()
        self._turn = threading.Condition()

    # ---- leases

    def ticket(self) -> object:
        """A place in the queue for models, to be used by exactly one `actor` or `reward`."""
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
        return ticket

    def leave(self, ticket: object) -> None:
        """Give up a place in the queue; nothing happens where it was used."""
        with self._changed, contextlib.suppress(ValueError):
            self._queue.remove(ticket)
            self._changed.notify_all()

    @contextlib.contextmanager
    def actor(
        self,
        checkpoint: object,
        *,
        ticket: object | None = None,
        interrupted: Callable[[], bool] = lambda: False,
        seconds: float = 300.0,
    ) -> Iterator[Lease]:
        """Lease a checkpoint by id; `Lease.value` is a `LoadedModel`.

        ValueError where it is not trusted or does not load, OutOfMemory, Interrupted.
        """
        found = self.checkpoints.get(checkpoint)

        def directory() -> Path:
            return self.checkpoints.directory(found.id)

        key = f"{found.id} {self.checkpoints.stamp(found.id)}"
        with self._leased(
            key, found.label, directory, load_model, ticket, interrupted, seconds
        ) as lease:
            yield lease

    @contextlib.contextmanager
    def reward(
        self,
        tokenizer: Any,
        *,
        interrupted: Callable[[], bool] = lambda: False,
        seconds: float = 300.0,
    ) -> Iterator[Lease]:
        """Lease the run's reward model, an `evaluate.Scorer` for a `tokenizer`'s rollouts."""
        from rlhf_kit.evaluate import Scorer
        from rlhf_kit.tokenization import same_tokenizer

        directory = self.checkpoints.reward_directory()
        config = self.checkpoints.config
        if directory is None or config is None:
            raise ValueError("this run has no reward model")

        def load(path: Path) -> Scorer:
            # a GPU holds it in bf16 like the actors: the size that was asked for is then right
            engine = dataclasses.replace(config.critic_engine, dtype=self._dtype())
            return Scorer(path, dataclasses.replace(config, critic_engine=engine), tokenizer)

        key = f"reward {stamp(directory)}"
        leased = self._leased(
            key, "reward model", lambda: directory, load, None, interrupted, seconds
        )
        with leased as lease:
            scorer = object.__new__(Scorer)  # the shared one may serve another tokenizer now
            vars(scorer).update(vars(lease.value))
            scorer.actor_tokenizer = tokenizer
            scorer.shares_tokenizer = same_tokenizer(tokenizer, scorer.tokenizer)
            yield dataclasses.replace(lease, value=scorer)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """The device for one forward pass, in the order of asking.

        A plain lock would give it back to whoever just had it.
        """
        mine = object()
        with self._turn:
            self._turns.append(mine)
            self._turn.wait_for(lambda: self._turns[0] is mine)
        try:
            yield
        finally:
            with self._turn:
                self._turns.popleft()
                self._turn.notify_all()

    def loaded(self) -> list[str]:
        """Labels of the models in memory."""
        with self._changed:
            return [model.label for model in self._models.values()]

    def clear(self) -> None:
        """Free every model that nobody uses."""
        with self._changed:
            for model in [model for model in self._models.values() if not model.leases]:
                del self._models[model.key]
        free_memory()

    # ---- inside

    @contextlib.contextmanager
    def _leased(
        self,
        key: str,
        label: str,
        get_path: Callable[[], Path],
        load: Callable[[Path], Any],
        ticket: object | None,
        interrupted: Callable[[], bool],
        seconds: float,
    ) -> Iterator[Lease]:
        ticket = ticket or self.ticket()
        try:
            model, placement = self._get(key, label, get_path, load, ticket, interrupted, seconds)
        finally:
            self.leave(ticket)
        try:
            with memory_errors(label):
                yield Lease(model.value, placement)
        finally:
            with self._changed:
                model.leases -= 1
                self._changed.notify_all()

    def _get(
        self,
        key: str,
        label: str,
        get_path: Callable[[], Path],
        load: Callable[[Path], Any],
        ticket: object,
        interrupted: Callable[[], bool],
        seconds: float,
    ) -> tuple[Model, tuple[str, ...]]:
        """The model with a lease on it, once `ticket` is first and there is room."""
        deadline = time.monotonic() + seconds
        while True:
            with self._changed:
                if interrupted():
                    raise Interrupted
                require(
                    time.monotonic() < deadline,
                    f"no memory became free for {label} within {seconds:g} s; try again later",
                )
                if self._queue[0] is not ticket:
                    self._changed.wait(0.1)
                    continue
                if model := self._models.get(key):
                    model.leases += 1
                    self._use(model)
                    return model, ()
            # At the head of the queue nobody else adds a model: reading files needs no lock.
            path = get_path()
            size = self._size(path)
            gone = self._make_room(label, size)
            if gone is None:
                with self._changed:
                    self._changed.wait(0.1)
                continue
            try:
                with memory_errors(label):
                    value = load(path)
            except OutOfMemory:
                raise
            except ValueError as error:
                raise ValueError(without_places(str(error), {path: label})) from None
            with self._changed:
                for old in list(self._models):  # the same checkpoint, before it was written anew
                    if old.split()[0] == key.split()[0] and not self._models[old].leases:
                        del self._models[old]
                beside = tuple(model.label for model in self._models.values())
                model = self._models[key] = Model(key, label, size, value, leases=1)
                self._use(model)
            if gone:
                return model, ("instead of", *gone)
            return model, ("beside", *beside) if beside else ("alone",)

    def _make_room(self, label: str, size: int) -> tuple[str, ...] | None:
        """Let idle models go until `size` bytes fit: their labels; None while others are used."""
        gone: list[str] = []
        while True:
            with self._changed:
                free = self._free()
                total = size + sum(model.size for model in self._models.values())
                if (len(self._models) < MOST_MODELS or total <= SMALL) and size <= free:
                    return tuple(gone)
                idle = [model for model in self._models.values() if not model.leases]
                if idle:
                    oldest = min(idle, key=lambda model: model.used)
                    del self._models[oldest.key]
                    gone.append(oldest.label)
                    del oldest, idle
                elif self._models:
                    return None
                else:
                    raise OutOfMemory(
                        f"{label} takes {size / 1e9:.2f} GB with room to work, but only "
                        f"{max(free, 0) / 1e9:.2f} GB of memory are free"
                    )
            free_memory()

    def _use(self, model: Model) -> None:
        self._uses += 1
        model.used = self._uses

    def _dtype(self) -> str:
        return "bf16" if self.device.type == "cuda" else "fp32"

    def _size(self, path: Path) -> int:
        """Bytes that a model takes, with room to work."""
        return int(parameter_count(path) * (2 if self._dtype() == "bf16" else 4) * HEADROOM)

    def _free(self) -> int:
        """Bytes for another model's weights."""
        if self.memory is not None:
            return self.memory - sum(model.size for model in self._models.values())
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(
                self.device
            )
            return free + cached - RESERVE
        return free_host_memory() - RESERVE
