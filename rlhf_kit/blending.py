"""A weighted mixture of sources, cut into three disjoint splits, and the order it is seen in.

A row's split is decided by the content hash of its prompt and by nothing else: neither its
place, nor its source, nor the seed. A prompt that two sources share, or one source repeats,
therefore never trains one stage and judges another.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice

from rlhf_kit.batch_order import epoch_order as epoch_order
from rlhf_kit.batch_order import fingerprint
from rlhf_kit.batch_order import length_bucketed_batches as length_bucketed_batches
from rlhf_kit.config import DataConfig, SourceConfig
from rlhf_kit.datasets import TOY_WORLD, NotForThisStage, Report, load_source, stream_source
from rlhf_kit.distributed import derive_seed, print_main
from rlhf_kit.row_store import BlendedRows, RowStore
from rlhf_kit.types import STAGES, PreferencePair, Stage

TOY_CHUNK = 2048
"""Rows the toy world draws at a time, until enough fall into the split."""
TOY_PATIENCE = 20
"""Chunks without a single row of the split, after which its share is called too small."""
LARGEST_DRIFT = 0.05
"""A share this far below a source's weight is worth a printed line."""


def split_of(prompt_id: str, split: Sequence[float]) -> Stage:
    """The stage this prompt belongs to, for the shares in `DataConfig.split`.

    The first 52 bits of the hash, as a number in [0, 1), fall into one of three intervals.
    """
    bounds = list(accumulate(split))
    place = int(prompt_id[:13], 16) / 2**52 * bounds[-1]
    return next(stage for stage, bound in zip(STAGES, bounds, strict=True) if place < bound)


def held_out(prompt_id: str, eval_share: float) -> bool:
    """Whether this prompt is kept for evaluation: other bits of the same hash."""
    return int(prompt_id[13:], 16) / 16 ** len(prompt_id[13:]) < eval_share


def interleave(
    sizes: Sequence[int], weights: Sequence[float], repeats: Sequence[int] | None = None
) -> Iterable[tuple[int, int]]:
    """(source, row) of every row of every source, so that each prefix has the weights' shares.

    At each step the source furthest behind its share gives its next row. A source that runs out
    ends its part, and the others go on in their proportions: no row is repeated. With `repeats`
    a source that has run out begins anew, up to so many passes in all, for as long as another
    source still has rows that have not come yet.
    """
    passes = [1] * len(sizes) if repeats is None else repeats
    taken = [0] * len(sizes)
    fresh = sum(size > 0 for size in sizes)
    due = [(1 / weights[i], i) for i, size in enumerate(sizes) if size]
    heapq.heapify(due)
    while fresh:
        _, source = due[0]
        yield source, taken[source] % sizes[source]
        taken[source] += 1
        fresh -= taken[source] == sizes[source]
        if taken[source] < sizes[source] * passes[source]:
            heapq.heapreplace(due, ((taken[source] + 1) / weights[source], source))
        else:
            heapq.heappop(due)


def tempered(weights: Sequence[float], temperature: float) -> list[float]:
    """weights ** (1 / T): above 1 flattens the shares, towards 0 the largest takes all."""
    if temperature == 1:
        return list(weights)
    largest = max(weights, default=1.0)  # quotients up to 1 cannot overflow
    return [max((weight / largest) ** (1 / temperature), 1e-200) for weight in weights]


@dataclass(frozen=True)
class _Part:
    """What one source has for one stage, in a shuffled order."""

    source: SourceConfig
    train: Sequence[PreferencePair]
    held_out: Sequence[PreferencePair]
    report: Report


@dataclass(frozen=True)
class _StageRows:
    parts: list[_Part]
    weights: list[float]
    """Of the parts, with the temperature in them."""
    shares: list[float]
    """The share of `train` that each part gave."""
    unfit: list[str]
    """Names of the sources that lack a column this stage needs."""
    train: BlendedRows
    evaluation: BlendedRows


class Blend:
    """The rows of the three stages: `blend["sft"]`, `blend["reward"]`, `blend["ppo"]`.

    Each is a sequence of `PreferencePair` that depends on the configuration and the seed alone,
    read when first asked for; its rows may be more than memory holds (row_store.py). A source's
    weight is its share of the blend. Without a cap (`DataConfig.rows`) every row is there once,
    or as often as `SourceConfig.repeat` allows, so that a source that runs out falls short of its
    share; `manifest` says what was realised, and a line is printed.
    """

    def __init__(self, config: DataConfig, seed: int):
        names = [source.name for source in config.sources]
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise ValueError(
                f"data source {twice[0]} is named twice: name it once, with one weight"
            )
        self.config = config
        self.seed = seed
        self._stages: dict[Stage, _StageRows] = {}

    def __getitem__(self, stage: Stage) -> Sequence[PreferencePair]:
        """Training rows of a stage.

        Raises:
            ValueError: a source cannot be read, or no row is left for this stage.
        """
        return self._rows(stage).train

    def evaluation(self, stage: Stage) -> Sequence[PreferencePair]:
        """Held-out rows of a stage; those of the toy world come from its validation split."""
        return self._rows(stage).evaluation

    def manifest(self) -> dict[str, object]:
        """What the stages read so far are made of, as plain values for run.json."""
        return {
            "seed": self.seed,
            "split": dict(zip(STAGES, self.config.split, strict=True)),
            "eval_share": self.config.eval_share,
            "temperature": self.config.temperature,
            "stages": {stage: self._describe(rows) for stage, rows in self._stages.items()},
        }

    def _describe(self, rows: _StageRows) -> dict[str, object]:
        return {
            "rows": len(rows.train),
            "evaluation_rows": len(rows.evaluation),
            "distinct_prompts": len({row.prompt_id for row in rows.train}),
            "digest": fingerprint(
                repr((row.prompt_id, row.chosen, row.rejected)) for row in rows.train
            ),
            "sources_without_rows": rows.unfit,
            "sources": [
                {
                    "name": part.source.name,
                    "weight": part.source.weight,
                    "repeat": part.source.repeat,
                    "rows": round(share * len(rows.train)),
                    "share": share,
                    "available": len(part.train),
                    "read": part.report.read,
                    "refused": part.report.refused,
                }
                for part, share in zip(rows.parts, rows.shares, strict=True)
            ],
        }

    def _rows(self, stage: Stage) -> _StageRows:
        if stage not in STAGES:
            raise ValueError(f"stage must be one of {', '.join(STAGES)}, not {stage!r}")
        if stage not in self._stages:
            self._stages[stage] = self._read(stage)
        return self._stages[stage]

    def _read(self, stage: Stage) -> _StageRows:
        index = STAGES.index(stage)
        if not self.config.split[index]:
            raise ValueError(f"data.split leaves nothing for stage {stage}: raise its share")
        parts, unfit = [], []
        for number, source in enumerate(self.config.sources):
            try:
                read = self._draw_toy if source.name == TOY_WORLD else self._read_source
                parts.append(read(source, stage, derive_seed(self.seed, stage, number)))
            except NotForThisStage as error:
                if len(self.config.sources) == 1:
                    raise
                print_main(f"{error}: it gives this stage no rows")
                unfit.append(source.name)
        weights = tempered([part.source.weight for part in parts], self.config.temperature)
        repeats = [part.source.repeat for part in parts]
        every = interleave([len(part.train) for part in parts], weights, repeats)
        train = _blended([part.train for part in parts], every, self.config.rows[index] or None)
        if not len(train):
            raise ValueError(
                f"no rows are left for stage {stage}: give more data, or raise its share in "
                "data.split"
            )
        counts = Counter(train.sources)
        every = interleave([len(part.held_out) for part in parts], weights)
        evaluation = _blended([part.held_out for part in parts], every)
        # A cap on the training rows caps the others in proportion.
        there = sum(len(part.train) for part in parts)
        rows = _StageRows(
            parts,
            weights,
            [counts[i] / len(train) for i in range(len(parts))],
            unfit,
            train,
            evaluation[: math.ceil(len(evaluation) * len(train) / there)],
        )
        _print_drift(rows, stage)
        return rows

    def _read_source(self, source: SourceConfig, stage: Stage, seed: int) -> _Part:
        """One pass over a file or dataset; the rows of this stage's split, shuffled."""
        report = Report(source.name)
        train, evaluation = RowStore(source.name), RowStore(source.name)
        for pair in stream_source(source, stage, report):
            prompt_id = pair.prompt_id
            if split_of(prompt_id, self.config.split) == stage:
                is_held_out = held_out(prompt_id, self.config.eval_share)
                (evaluation if is_held_out else train).append(pair)
        train.shuffle(seed, source.max_rows)
        evaluation.shuffle(seed)
        return _Part(source, train, evaluation, report)

    def _draw_toy(self, source: SourceConfig, stage: Stage, seed: int) -> _Part:
        """Draw until enough prompts fall into this stage's split."""
        caps = [cap for cap in (source.max_rows, self.config.rows[STAGES.index(stage)]) if cap]
        if not caps:
            raise ValueError(
                f"the toy world has no end: set data.rows for stage {stage}, or the source's "
                "max_rows"
            )
        report = Report(source.name)
        train: list[PreferencePair] = []
        chunk = 0
        while len(train) < min(caps):
            drawn = load_source(source, stage, seed=derive_seed(seed, chunk), rows=TOY_CHUNK)
            report.read += len(drawn)
            train += [p for p in drawn.pairs if split_of(p.prompt_id, self.config.split) == stage]
            chunk += 1
            if not train and chunk == TOY_PATIENCE:
                raise ValueError(
                    f"data.split gives stage {stage} too small a share of the toy world"
                )
        evaluation: tuple[PreferencePair, ...] = ()
        if count := math.ceil(min(caps) * self.config.eval_share):
            evaluation = load_source(source, stage, seed=seed, rows=count, split="validation").pairs
        return _Part(source, train[: min(caps)], list(evaluation), report)


def _blended(
    parts: list[Sequence[PreferencePair]], order: Iterable[tuple[int, int]], most: int | None = None
) -> BlendedRows:
    sources, rows = array("H"), array("q")
    for source, row in islice(order, most):
        sources.append(source)
        rows.append(row)
    return BlendedRows(parts, sources, rows)


def _print_drift(rows: _StageRows, stage: Stage) -> None:
    """Say when a source ran out and gives less than its weight asks for."""
    for part, weight, share in zip(rows.parts, rows.weights, rows.shares, strict=True):
        wanted = weight / sum(rows.weights)
        if wanted - share > LARGEST_DRIFT:
            print_main(
                f"stage {stage}: all {len(part.train)} rows of {part.source.name} are {share:.0%} "
                f"of the blend, its weight asks for {wanted:.0%}; data.rows can hold the shares"
            )
