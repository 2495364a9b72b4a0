"""Intervals, win rates, calibration and correlations, against scipy and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_kit.statistics import (
    bootstrap_interval,
    calibration,
    length_correlation,
    wilson_interval,
    win_rate,
)

RNG = np.random.default_rng(0)


def test_the_bootstrap_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = RNG.gamma(2.0, size=200)
    ours = bootstrap_interval(values, resamples=20000, seed=1)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20000, method="percentile", random_state=2
    ).confidence_interval
    assert ours.mean == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_the_bootstrap_covers_the_true_mean_about_as_often_as_it_says():
    hits = 0
    for seed in range(200):
        interval = bootstrap_interval(RNG.normal(3.0, size=40), resamples=300, seed=seed)
        hits += interval.low <= 3.0 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99


def test_the_same_seed_gives_the_same_interval():
    values = RNG.normal(size=50)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], 1.0])
def test_an_interval_of_nothing_or_of_nan_is_refused(values):
    with pytest.raises(ValueError, match="values"):
        bootstrap_interval(values)


def test_a_win_rate_pairs_prompts_and_counts_a_tie_as_half():
    result = win_rate([1.0, 0.5, 0.2, 0.9], [0.5, 0.5, 0.4, 0.1])
    assert (result.wins, result.ties, result.losses) == (2, 1, 1)
    assert result.rate.mean == pytest.approx(0.625)
    assert result.difference.mean == pytest.approx(0.275)
    assert 0 <= result.rate.low <= result.rate.high <= 1


def test_a_constant_gain_shows_through_prompts_of_unequal_difficulty():
    difficulty = RNG.normal(0, 10, size=100)
    result = win_rate(difficulty + 0.1, difficulty)
    assert result.wins == 100
    assert (result.difference.low, result.difference.high) == pytest.approx((0.1, 0.1))


def test_a_win_rate_refuses_unequal_lengths():
    with pytest.raises(ValueError, match="every prompt"):
        win_rate([1.0], [1.0, 2.0])


def test_calibration_by_hand():
    log3 = np.log(3)  # sigmoid(log 3) = 0.75
    result = calibration([log3, log3, log3, -log3, 0.0], bins=2)
    low, high = result.bins
    assert (low.count, low.confidence, low.accuracy) == (1, 0.5, 0.5)
    assert (high.count, high.accuracy) == (4, 0.75)
    assert high.confidence == pytest.approx(0.75)
    assert result.ece == pytest.approx(0.0)


def test_an_overconfident_model_has_the_calibration_error_it_earns():
    result = calibration([10.0, 10.0, 10.0, -10.0], bins=5)
    assert [b.count for b in result.bins] == [0, 0, 0, 0, 4]
    assert result.bins[0].accuracy is None
    assert result.ece == pytest.approx(0.25, abs=1e-4)


def test_calibration_does_not_depend_on_which_response_is_called_first():
    margins = RNG.normal(size=50)
    labels = RNG.random(50) < 0.7
    assert calibration(margins, labels) == calibration(-margins, ~labels)


def test_correlations_agree_with_scipy_ties_included():
    stats = pytest.importorskip("scipy.stats")
    x = RNG.integers(0, 8, 60).astype(float)
    y = x + RNG.normal(size=60)
    ours = length_correlation(y, x)
    assert ours.pearson == pytest.approx(stats.pearsonr(x, y).statistic)
    assert ours.spearman == pytest.approx(stats.spearmanr(x, y).statistic)


def test_a_partial_correlation_is_that_of_the_residuals():
    quality = RNG.normal(size=300)
    lengths = 2 * quality + RNG.normal(size=300)
    scores = 3 * quality + RNG.normal(size=300)
    result = length_correlation(scores, lengths, control=quality)
    design = np.stack([np.ones(300), quality], axis=1)
    residuals = [v - design @ np.linalg.lstsq(design, v)[0] for v in (scores, lengths)]
    assert result.partial == pytest.approx(np.corrcoef(*residuals)[0, 1])
    assert abs(result.partial) < 0.15 < result.pearson


def test_a_constant_has_no_correlation():
    result = length_correlation([1.0, 1.0], [2, 3], control=[0, 1])
    assert (result.pearson, result.spearman, result.partial) == (None, None, None)


def test_wilsons_interval_as_published():
    # Newcombe 1998, table I: 81 of 263.
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0.0, 10)[0] == pytest.approx(0.0)
