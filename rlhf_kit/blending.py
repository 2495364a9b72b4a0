"""A weighted mixture of sources, cut into three disjoint splits, and the order it is seen in.

A row's split is decided by the content hash of its prompt and by nothing else: neither its
place, nor its source, nor the seed. A prompt that two sources share, or one source repeats,
therefore never trains one stage and judges another.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from random import Random

from rlhf_kit.config import DataConfig, SourceConfig
from rlhf_kit.datasets import TOY_WORLD, NotForThisStage, Report, load_source
from rlhf_kit.distributed import derive_seed, print_main
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


def interleave(sizes: Sequence[int], weights: Sequence[float]) -> Iterable[tuple[int, int]]:
    """(source, row) of every row of every source, so that each prefix has the weights' shares.

    At each step the source furthest behind its share gives its next row. A source that runs out
    ends its part, and the others go on in their proportions: no row is repeated.
    """
    taken = [0] * len(sizes)
    while left := [i for i, size in enumerate(sizes) if taken[i] < size]:
        source = min(left, key=lambda i: ((taken[i] + 1) / weights[i], i))
        yield source, taken[source]
        taken[source] += 1


@dataclass(frozen=True)
class _Part:
    """What one source has for one stage, in a shuffled order."""

    source: SourceConfig
    train: list[PreferencePair]
    held_out: list[PreferencePair]
    report: Report


@dataclass(frozen=True)
class _StageRows:
    parts: list[_Part]
    shares: list[float]
    """The share of `train` that each part gave."""
    unfit: list[str]
    """Names of the sources that lack a column this stage needs."""
    train: tuple[PreferencePair, ...]
    evaluation: tuple[PreferencePair, ...]


class Blend:
    """The rows of the three stages: `blend["sft"]`, `blend["reward"]`, `blend["ppo"]`.

    Each is a sequence of `PreferencePair` that depends on the configuration and the seed alone,
    read when first asked for. A source's weight is its share of the blend. Without a cap
    (`DataConfig.rows`) every row is there once, so that a source that runs out falls short of
    its share; `manifest` says what was realised, and a line is printed.
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
        weights = [part.source.weight for part in parts]
        every = interleave([len(part.train) for part in parts], weights)
        order = list(islice(every, self.config.rows[index] or None))
        if not order:
            raise ValueError(
                f"no rows are left for stage {stage}: give more data, or raise its share in "
                "data.split"
            )
        counts = Counter(i for i, _ in order)
        held_out = list(interleave([len(part.held_out) for part in parts], weights))
        # A cap on the training rows caps the others in proportion.
        most = math.ceil(len(held_out) * len(order) / sum(len(part.train) for part in parts))
        rows = _StageRows(
            parts,
            [counts[i] / len(order) for i in range(len(parts))],
            unfit,
            tuple(parts[i].train[row] for i, row in order),
            tuple(parts[i].held_out[row] for i, row in held_out[:most]),
        )
        _print_drift(rows, stage)
        return rows

    def _read_source(self, source: SourceConfig, stage: Stage, seed: int) -> _Part:
        """One pass over a file or dataset; the rows of this stage's split, shuffled."""
        rows = load_source(source, stage)
        train: list[PreferencePair] = []
        evaluation: list[PreferencePair] = []
        for pair in rows.pairs:
            prompt_id = pair.prompt_id
            if split_of(prompt_id, self.config.split) == stage:
                is_held_out = held_out(prompt_id, self.config.eval_share)
                (evaluation if is_held_out else train).append(pair)
        Random(seed).shuffle(train)
        Random(seed).shuffle(evaluation)
        return _Part(source, train[: source.max_rows], evaluation, rows.report)

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


def _print_drift(rows: _StageRows, stage: Stage) -> None:
    """Say when a source ran out and gives less than its weight asks for."""
    total = sum(part.source.weight for part in rows.parts)
    for part, share in zip(rows.parts, rows.shares, strict=True):
        wanted = part.source.weight / total
        if wanted - share > LARGEST_DRIFT:
            print_main(
                f"stage {stage}: all {len(part.train)} rows of {part.source.name} are {share:.0%} "
                f"of the blend, its weight asks for {wanted:.0%}; data.rows can hold the shares"
            )


# The order of an epoch ---------------------------------------------------------------------


def epoch_order(n: int, *, seed: int, epoch: int) -> list[int]:
    """A permutation of range(n), another one for each epoch."""
    order = list(range(n))
    Random(derive_seed(seed, "order", epoch)).shuffle(order)
    return order


def length_bucketed_batches(
    lengths: Sequence[int],
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    drop_last: bool = False,
    mega_batch: int = 16,
) -> list[list[int]]:
    """Batches of rows of similar length, each row once; they depend on no number of ranks.

    Shuffle the rows, cut them into mega-batches, sort each by length, cut those into batches,
    and shuffle the batches. The rows that fill no batch are the last of the shuffled order, not
    the longest; they come as a smaller batch at the end, or not at all with `drop_last`.

    Args:
        lengths: tokens of each row.
        batch_size: rows a batch, over all ranks.
        mega_batch: batches sorted together; 1 sorts nothing across batches.
    """
    order = epoch_order(len(lengths), seed=seed, epoch=epoch)
    full = len(order) - len(order) % batch_size
    rest = order[full:]
    batches: list[list[int]] = []
    for start in range(0, full, batch_size * mega_batch):
        mega = order[start : min(start + batch_size * mega_batch, full)]
        mega.sort(key=lambda row: lengths[row])
        batches += [mega[i : i + batch_size] for i in range(0, len(mega), batch_size)]
    Random(derive_seed(seed, "batches", epoch)).shuffle(batches)
    return batches if drop_last or not rest else [*batches, rest]


def fingerprint(ids: Iterable[str | int]) -> str:
    """Eight hex digits that name a sequence of ids: equal in two logs, equal data."""
    joined = "\n".join(map(str, ids)).encode()
    return hashlib.blake2b(joined, digest_size=4).hexdigest()
