"""The statistics of a report: intervals, win rates, calibration, correlation with length.

Pure functions of NumPy arrays. Everything that compares two models is paired by prompt: both
answered the same prompts, so differences between prompts cancel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf_kit.config import require

Z95 = 1.959964
"""The 97.5 % quantile of the standard normal distribution."""


@dataclass(frozen=True)
class Interval:
    """A mean, and the ends of its confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class WinRate:
    """How often the first of two models did better on the same prompt."""

    wins: int
    ties: int
    losses: int
    rate: Interval
    """Share of wins, a tie counting as half."""
    difference: Interval
    """Mean of first minus second."""


@dataclass(frozen=True)
class Bin:
    """Pairs about which the reward model is about equally sure."""

    count: int
    confidence: float | None
    """Mean probability of the preferred response; None in an empty bin."""
    accuracy: float | None
    """How often that response was the labelled one."""
    low: float | None
    """Lower end of the accuracy's Wilson interval (95 %)."""
    high: float | None
    """Upper end."""


@dataclass(frozen=True)
class Calibration:
    """Whether a reward model is as often right as it is sure."""

    bins: tuple[Bin, ...]
    ece: float
    """Expected calibration error: mean |accuracy - confidence| of the bins, by their counts."""


@dataclass(frozen=True)
class Correlation:
    """Of two quantities; None where one of them never changes."""

    pearson: float | None
    spearman: float | None
    partial: float | None = None
    """Pearson's, of what a third quantity does not explain linearly."""


def bootstrap_interval(
    values: ArrayLike, *, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """The mean of `values` [N] and its percentile bootstrap interval.

    Efron 1979: the means of `resamples` samples of size N, drawn with replacement.
    """
    values = _finite(values, "values")
    require(0 < level < 1, f"level must lie between 0 and 1, not {level}")
    require(resamples > 0, "resamples must be at least 1")
    rng, n = np.random.default_rng(seed), len(values)
    means = [values[rng.integers(n, size=n)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def win_rate(
    first: ArrayLike, second: ArrayLike, *, resamples: int = 1000, seed: int = 0
) -> WinRate:
    """Compare two models' scores [N] of the same N prompts, in the same order."""
    first, second = _finite(first, "first"), _finite(second, "second")
    require(len(first) == len(second), "a win rate needs two scores of every prompt")
    outcome = np.sign(first - second)
    wins, losses = int((outcome > 0).sum()), int((outcome < 0).sum())
    return WinRate(
        wins=wins,
        ties=len(first) - wins - losses,
        losses=losses,
        rate=bootstrap_interval((outcome + 1) / 2, resamples=resamples, seed=seed),
        difference=bootstrap_interval(first - second, resamples=resamples, seed=seed),
    )


def calibration(
    margins: ArrayLike, labels: Sequence[bool] | None = None, *, bins: int = 10
) -> Calibration:
    """Reliability of P(first preferred) = sigmoid(margin), the Bradley-Terry model.

    margins: [N] score of the first response minus that of the second.
    labels: [N] True where the first is the preferred one; None says that it always is, which
        holds for chosen minus rejected.

    Which response is called first is arbitrary, so a pair is folded onto the response that the
    model prefers: confidence sigmoid(|margin|) from 0.5 to 1, in `bins` bins of equal width.
    """
    margins = _finite(margins, "margins")
    truth = np.ones(len(margins), bool) if labels is None else np.asarray(labels, bool)
    require(len(truth) == len(margins), "calibration needs one label for every margin")
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    right = np.where(margins == 0, 0.5, (margins > 0) == truth)
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    made = tuple(_bin(confidence[place == b], right[place == b]) for b in range(bins))
    gaps = [abs((right - confidence)[place == b].sum()) for b in range(bins)]
    return Calibration(made, float(sum(gaps) / len(margins)))


def length_correlation(
    scores: ArrayLike, lengths: ArrayLike, control: ArrayLike | None = None
) -> Correlation:
    """How far scores [N] follow lengths [N], and how far beyond what `control` [N] explains."""
    x, y = _finite(scores, "scores"), _finite(lengths, "lengths")
    require(len(x) == len(y), "a correlation needs one length for every score")
    partial = None
    if control is not None:
        z = _finite(control, "control")
        require(len(z) == len(x), "a partial correlation needs one control value for every score")
        partial = _partial(pearson(x, y), pearson(x, z), pearson(y, z))
    return Correlation(pearson(x, y), pearson(_ranks(x), _ranks(y)), partial)


def pearson(x: NDArray[Any], y: NDArray[Any]) -> float | None:
    """Pearson's correlation of two arrays [N]; None where one of them is constant."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def wilson_interval(rate: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n trials (Wilson 1927); sound at 0 and at 1."""
    centre = rate + Z95**2 / (2 * n)
    spread = Z95 * math.sqrt(rate * (1 - rate) / n + Z95**2 / (4 * n * n))
    scale = 1 + Z95**2 / n
    return (centre - spread) / scale, (centre + spread) / scale


def _bin(confidence: NDArray[Any], right: NDArray[Any]) -> Bin:
    if not len(right):
        return Bin(0, None, None, None, None)
    accuracy = float(right.mean())
    return Bin(
        len(right), float(confidence.mean()), accuracy, *wilson_interval(accuracy, len(right))
    )


def _partial(xy: float | None, xz: float | None, yz: float | None) -> float | None:
    """r_xy.z; a constant control explains nothing, one that explains all leaves nothing."""
    if xy is None:
        return None
    xz, yz = xz or 0.0, yz or 0.0
    left = (1 - xz**2) * (1 - yz**2)
    return None if left < 1e-12 else (xy - xz * yz) / math.sqrt(left)


def _ranks(x: NDArray[Any]) -> NDArray[Any]:
    """Ranks, ties sharing their mean rank, as Spearman's correlation needs."""
    _, group, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]


def _finite(values: ArrayLike, name: str) -> NDArray[Any]:
    array = np.asarray(values, dtype=float)
    require(array.ndim == 1 and array.size > 0, f"{name} must be a list of at least one number")
    require(bool(np.isfinite(array).all()), f"{name} contain NaN or infinity")
    return array
