"""The run's checkpoints in numbers: gold and proxy scores, KL, win rates, weight distances."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apps.checkpoints import Checkpoint
from apps.generation import Generation
from apps.limits import Settings, whole
from apps.scores import Scoring
from apps.votes import Arena, Tally
from rlhf_kit.config import require

MOST_PROMPTS = 64

Interval = tuple[float, float, float]
"""Mean, low, high (95 %)."""


@dataclass(frozen=True)
class Row:
    """One checkpoint; None is not known (yet)."""

    name: str
    label: str
    step: int | None
    gold: Interval | None
    """The toy world's judge, from report.json."""
    proxy: Interval | None
    """Reward model, from report.json."""
    kl: float | None
    """KL to SFT, from report.json."""
    measured_score: float | None
    """Reward model, as PPO sees it, on a few held-out prompts, measured here on request."""
    measured_kl: float | None
    """KL to SFT on them (k1, sum over the response), at temperature 1."""
    measured_prompts: int
    win_rate: Interval | None
    """Votes against SFT, Wilson."""
    votes: int
    """How many of them."""
    to_sft: float | None
    """||w - w_sft||, over all weights both have."""
    to_sft_relative: float | None
    """The same over ||w_sft||."""


@dataclass(frozen=True)
class Distance:
    """How far apart the weights of two checkpoints are."""

    a: str
    """Names."""
    b: str
    l2: float
    relative: float
    """l2 over the norm of b."""
    bf16_equal: float
    """Share of entries that are the same once rounded to bf16 (EMA and SFT: a stalled EMA)."""


class Progress:
    """Numbers are computed once for each state of a checkpoint; thread-safe."""

    def __init__(self, generation: Generation, scoring: Scoring, arena: Arena) -> None:
        self.generation = generation
        self.checkpoints = generation.pool.checkpoints
        self.scoring = scoring
        self.arena = arena
        self._distances: dict[tuple[str, ...], Distance] = {}
        self._measured: dict[str, tuple[float | None, float | None, int]] = {}
        """By a checkpoint's stamp: mean score, mean KL, prompts."""
        self._lock = threading.Lock()

    def rows(self) -> list[Row]:
        """All complete checkpoints in the order of `Checkpoints.list`; reads weights once."""
        report = self._report()
        found = self._complete()
        distances = {d.a: d for d in self.distances() if d.b == "sft"}
        rows = []
        for name, checkpoint in found.items():
            score, kl, prompts = self._measured.get(self._stamp(checkpoint), (None, None, 0))
            votes = None
            if "sft" in found and name != "sft":
                votes = self.arena.tally(checkpoint.id, found["sft"].id)
            distance = distances.get(name)
            rows.append(
                Row(
                    name=name,
                    label=checkpoint.label,
                    step=checkpoint.step,
                    gold=_interval(report, "gold", name),
                    proxy=_interval(report, "proxy", name),
                    kl=_number(report, "kl", name),
                    measured_score=score,
                    measured_kl=kl,
                    measured_prompts=prompts,
                    win_rate=_rate(votes),
                    votes=votes.wins + votes.losses + votes.ties if votes else 0,
                    to_sft=distance.l2 if distance else 0.0 if name == "sft" else None,
                    to_sft_relative=distance.relative
                    if distance
                    else (0.0 if name == "sft" else None),
                )
            )
        return rows

    def distances(self) -> list[Distance]:
        """final-sft, ema-sft, ema-final, and each periodic export to SFT."""
        found = self._complete()
        pairs = [(name, "sft") for name in found if name not in ("base", "sft", "model")]
        pairs += [("ema", "final")]
        made = []
        for a, b in pairs:
            if a not in found or b not in found:
                continue
            key = (a, b, self._stamp(found[a]), self._stamp(found[b]))
            # one that is not trusted has no distance; whoever chooses it hears why
            with self._lock, contextlib.suppress(ValueError):
                if key not in self._distances:
                    directories = (self.checkpoints.directory(found[x].id) for x in (a, b))
                    self._distances[key] = Distance(a, b, *weight_distances(*directories))
                made.append(self._distances[key])
        return made

    def measure(
        self, *, session: str, checkpoint: Any = None, prompts: Any = 8
    ) -> Generator[tuple[int, int, str], None, None]:
        """Answer held-out prompts with a checkpoint (None: all) and score them.

        Yields (done, of, label of the checkpoint). `rows` has the numbers afterwards. Closing
        it, and `Generation.stop(session, "measure")`, end it with what was measured before.
        """
        count = whole("the number of prompts", prompts, 1, MOST_PROMPTS)
        chosen = list(self._complete().values())
        if checkpoint is not None:
            chosen = [self.checkpoints.get(checkpoint)]
        dialogues = self._held_out(count)
        config = self.checkpoints.config
        assert config is not None
        length = min(config.generation.max_new_tokens, self.generation.limits.new_tokens)
        done = 0
        for one in chosen:
            stamp, results = self._stamp(one), []
            for number, dialogue in enumerate(dialogues):
                yield done, len(chosen) * len(dialogues), one.label
                settings = Settings(temperature=1, top_p=1, max_new_tokens=length, seed=number)
                (answer,) = self.generation.begin(
                    [one.id], dialogue, settings, session=session, panes=["measure"]
                )
                for _ in self.generation.watch([answer]):
                    pass
                answer.raise_error()
                if answer.reason in ("stopped", "time"):
                    return
                results.append(self.scoring.scores(answer.id))
                done += 1
            self._measured[stamp] = (
                _mean([scores.score for scores in results]),
                _mean([scores.kl for scores in results]),
                len(results),
            )
        yield done, done, ""

    # ---- inside

    def _complete(self) -> dict[str, Checkpoint]:
        return {c.name: c for c in self.checkpoints.list() if c.complete}

    def _stamp(self, checkpoint: Checkpoint) -> str:
        return f"{checkpoint.name} {self.checkpoints.stamp(checkpoint.id)}"

    def _report(self) -> dict[str, Any]:
        """report.json, or {} while the run has none."""
        with contextlib.suppress(OSError, ValueError):
            report = json.loads((self.checkpoints.root / "report.json").read_text("utf-8"))
            if isinstance(report, dict):
                return report
        return {}

    def _held_out(self, count: int) -> list[tuple[Any, ...]]:
        """Prompts that no stage trained on."""
        from rlhf_kit.evaluate import blend_data, is_toy_world, toy_world_data

        config = self.checkpoints.config
        if config is None:
            raise ValueError("held-out prompts belong to a run; open a run directory")
        few = dataclasses.replace(config.evaluation, prompts=count)
        config = dataclasses.replace(config, evaluation=few)
        if is_toy_world(config):
            held_out = toy_world_data(config, "test")
        else:
            sft = self._complete().get("sft")
            require(sft is not None, "measuring needs the SFT model; wait until it is there")
            assert sft is not None
            with self.generation.pool.actor(sft.id) as lease:
                held_out = blend_data(config, lease.value.tokenizer)
        return [pair.prompt for pair in held_out.prompts]


def weight_distances(a: Path, b: Path) -> tuple[float, float, float]:
    """||a - b||, the same over ||b||, and the share of entries equal in bf16.

    Of two model directories, tensor by tensor, over those that both have in one shape.
    """
    first, second = _tensors(a), _tensors(b)
    square = norm = 0.0
    equal = entries = 0
    for name in sorted(first.keys() & second.keys()):
        x, y = first[name](), second[name]()
        if not x.is_floating_point() or x.shape != y.shape:
            continue
        equal += int((x.bfloat16() == y.bfloat16()).sum())
        entries += x.numel()
        x, y = x.float(), y.float()
        square += float(torch.linalg.vector_norm(x - y, dtype=torch.float64)) ** 2
        norm += float(torch.linalg.vector_norm(y, dtype=torch.float64)) ** 2
    require(entries > 0 and norm > 0, "the two checkpoints share no weights to be compared")
    return math.sqrt(square), math.sqrt(square / norm), equal / entries


def _tensors(directory: Path) -> dict[str, Callable[[], torch.Tensor]]:
    """Name -> a function that reads the tensor."""
    from safetensors import safe_open

    from rlhf_kit.trust import weight_files

    readers: dict[str, Callable[[], torch.Tensor]] = {}
    for path in weight_files(directory):
        file = safe_open(str(path), framework="pt")
        names: list[str] = file.keys()
        readers |= {name: lambda file=file, name=name: file.get_tensor(name) for name in names}
    return readers


def _interval(report: Any, key: str, name: str) -> Interval | None:
    with contextlib.suppress(KeyError, TypeError, ValueError):
        found = report[key][name]
        return float(found["mean"]), float(found["low"]), float(found["high"])
    return None


def _number(report: Any, key: str, name: str) -> float | None:
    with contextlib.suppress(KeyError, TypeError, ValueError):
        return float(report[key][name])
    return None


def _rate(votes: Tally | None) -> Interval | None:
    if votes is None or votes.rate is None or votes.low is None or votes.high is None:
        return None
    return votes.rate, votes.low, votes.high


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
