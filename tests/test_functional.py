"""The maths against values worked by hand, torch's own functions, and slow definitions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_kit import functional as f

MASK = torch.tensor([[True, True, True, False], [True, False, False, False]])


def test_token_logprobs_are_fp32_and_match_log_softmax_at_the_temperature():
    logits = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 4.0, 0.0]]], dtype=torch.bfloat16)
    ids = torch.tensor([[0, 2]])
    result = f.token_logprobs(logits, ids, temperature=2.0)
    assert result.dtype == torch.float32
    # e^1 / (e^1 + 2) and e^0 / (e^2 + 2), by hand
    expected = [[math.log(math.e / (math.e + 2)), math.log(1 / (math.e**2 + 2))]]
    torch.testing.assert_close(result, torch.tensor(expected))


def test_entropy_of_a_uniform_distribution_is_the_log_of_its_size():
    torch.testing.assert_close(f.entropy(torch.zeros(1, 1, 8)), torch.tensor([[math.log(8)]]))


def test_entropy_follows_the_temperature():
    logits = torch.tensor([[[3.0, 1.0]]])
    half = torch.distributions.Categorical(logits=logits / 2).entropy()
    torch.testing.assert_close(f.entropy(logits, temperature=2.0), half)


def test_masked_sums_ignore_nan_outside_the_mask():
    x = torch.tensor([[1.0, 2.0, 3.0, math.nan], [4.0, math.nan, math.inf, 9.0]])
    assert f.masked_sum(x, MASK) == 10
    assert f.masked_mean(x, MASK) == 2.5


def test_moments_of_two_ranks_add_up_to_those_of_all_rows():
    x = torch.tensor([[1.0, 2.0, 6.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    total = f.moments(x[:1], MASK[:1]) + f.moments(x[1:], MASK[1:])
    mean, std = f.mean_and_std(total)
    assert mean == pytest.approx(3.0)
    assert std == pytest.approx(math.sqrt((4 + 1 + 9 + 0) / 4))


def test_whitened_values_have_mean_zero_and_standard_deviation_one_under_the_mask():
    x = torch.tensor([[1.0, 2.0, 6.0, 50.0], [3.0, 50.0, 50.0, 50.0]])
    mean, std = f.mean_and_std(f.moments(x, MASK))
    white = f.whiten(x, MASK, mean=mean, std=std)
    assert white[MASK].mean().abs() < 1e-6
    assert white[MASK].std(unbiased=False) == pytest.approx(1.0, abs=1e-6)
    assert (white[~MASK] == 0).all()


def test_whitening_a_single_token_gives_zero_and_no_nan():
    x, mask = torch.tensor([[7.0]]), torch.tensor([[True]])
    mean, std = f.mean_and_std(f.moments(x, mask))
    assert f.whiten(x, mask, mean=mean, std=std).item() == 0.0


def test_both_kl_estimators_have_the_exact_kl_as_their_mean():
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    q = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    exact = float((p * (p / q).log()).sum())
    assert float((p * f.kl_k1(p.log(), q.log())).sum()) == pytest.approx(exact)
    assert float((p * f.kl_k3(p.log(), q.log())).sum()) == pytest.approx(exact)
    assert (f.kl_k3(p.log(), q.log()) >= 0).all()
    assert (f.kl_k1(p.log(), q.log()) < 0).any()


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.1),  # on target
        (60.0, 0.1 * (1 + 0.2 * 0.5)),  # far above: the error is clipped to 0.2
        (0.0, 0.1 * (1 - 0.2 * 0.5)),  # far below
        (6.6, 0.1 * (1 + 0.1 * 0.5)),  # 10 % above
    ],
)
def test_the_adaptive_controller_moves_the_coefficient_towards_the_target(kl, expected):
    result = f.next_kl_coef(0.1, kl=kl, target=6.0, horizon=1000, n=500)
    assert result == pytest.approx(expected)


def test_scores_are_normalised_then_clipped_then_capped_without_eos():
    score = torch.tensor([3.0, 103.0, 3.0, -9.0])
    ended = torch.tensor([True, True, False, False])
    shaped = f.shape_score(score, ended, mean=1.0, std=2.0, clip=5.0, missing_eos_score=-1.0)
    assert shaped.tolist() == [1.0, 5.0, -1.0, -5.0]
    free = f.shape_score(score, ended, mean=1.0, std=2.0, clip=5.0, missing_eos_score=None)
    assert free.tolist() == [1.0, 5.0, 1.0, -5.0]


def test_the_score_lands_on_the_last_response_token_and_nowhere_else():
    zeros = torch.zeros(2, 4)
    rewards = f.token_rewards(torch.tensor([2.0, -3.0]), zeros, zeros, MASK, kl_coef=0.5)
    assert rewards.tolist() == [[0, 0, 2.0, 0], [-3.0, 0, 0, 0]]


def test_the_kl_penalty_falls_on_every_response_token_with_its_sign():
    old = torch.tensor([[-1.0, -2.0, -3.0, 8.0], [-1.0, 8.0, 8.0, 8.0]])
    ref = torch.tensor([[-2.0, -1.0, -3.0, 5.0], [-3.0, 5.0, 5.0, 5.0]])
    rewards = f.token_rewards(torch.zeros(2), old, ref, MASK, kl_coef=0.5)
    assert rewards.tolist() == [[-0.5, 0.5, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.0]]


def test_gae_of_three_tokens_worked_by_hand():
    rewards = torch.tensor([[0.0, 0.0, 1.0, 9.0]])
    values = torch.tensor([[0.5, 0.4, 0.2, 9.0]])
    mask = torch.tensor([[True, True, True, False]])
    advantages, returns = f.gae(rewards, values, mask, gamma=1.0, lam=0.5)
    # deltas: .4 - .5 = -.1, .2 - .4 = -.2, 1 - .2 = .8
    # A2 = .8, A1 = -.2 + .5 * .8 = .2, A0 = -.1 + .5 * .2 = 0
    torch.testing.assert_close(advantages, torch.tensor([[0.0, 0.2, 0.8, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[0.5, 0.6, 1.0, 0.0]]))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 7), st.floats(0.5, 1.0), st.floats(0.0, 1.0), st.integers(0, 10_000))
def test_gae_equals_its_definition_as_a_double_sum(length, gamma, lam, seed):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(1, 8, generator=generator, dtype=torch.float64)
    values = torch.randn(1, 8, generator=generator, dtype=torch.float64)
    mask = torch.arange(8).unsqueeze(0) < length
    advantages, _ = f.gae(rewards, values, mask, gamma=gamma, lam=lam)
    r, v = rewards[0, :length].tolist(), [*values[0, :length].tolist(), 0.0]
    for t in range(length):
        slow = sum(
            (gamma * lam) ** k * (r[t + k] + gamma * v[t + k + 1] - v[t + k])
            for k in range(length - t)
        )
        assert float(advantages[0, t]) == pytest.approx(slow, abs=1e-9)
    assert (advantages[0, length:] == 0).all()


def test_with_lambda_one_and_gamma_one_the_return_is_the_sum_of_rewards_to_come():
    rewards = torch.tensor([[1.0, 2.0, 3.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    _, returns = f.gae(rewards, torch.tensor([[9.0, -4.0, 2.0]]), mask, gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, torch.tensor([[6.0, 5.0, 3.0]]))


def _policy(ratio, advantage, **options):
    one = torch.ones(1, 1, dtype=torch.bool)
    new = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss, metrics = f.policy_loss(
        new,
        torch.zeros(1, 1),
        torch.tensor([[advantage]]),
        one,
        clip_ratio=0.2,
        denominator=1.0,
        **options,
    )
    loss.backward()
    return loss.item(), new.grad.item(), metrics


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),  # inside: the plain policy gradient
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),  # clipped from above: nothing more to gain
        (0.5, 2.0, -1.0, -1.0),  # went the wrong way: full gradient
        (0.5, -2.0, 1.6, 0.0),  # clipped from below
        (1.5, -2.0, 3.0, 3.0),
    ],
)
def test_the_clipped_policy_loss_and_its_gradient_case_by_case(ratio, advantage, loss, gradient):
    result, slope, metrics = _policy(ratio, advantage)
    assert result == pytest.approx(loss, rel=1e-5)
    assert slope == pytest.approx(gradient, rel=1e-5, abs=1e-7)
    assert metrics["policy/clipfrac"].item() == (1.0 if gradient == 0.0 else 0.0)


def test_dual_clip_bounds_the_loss_of_a_bad_action_grown_likely():
    assert _policy(10.0, -2.0)[0] == pytest.approx(20.0, rel=1e-5)
    loss, slope, _ = _policy(10.0, -2.0, dual_clip=3.0)
    assert loss == pytest.approx(6.0)
    assert slope == 0.0
    assert _policy(10.0, 2.0, dual_clip=3.0)[0] == pytest.approx(-2.4)  # A > 0: untouched


def test_a_ratio_of_one_gives_clip_fraction_zero_and_approximate_kl_zero():
    _, _, metrics = _policy(1.0, 5.0)
    assert metrics["policy/clipfrac"] == 0
    assert metrics["policy/approx_kl"] == 0
    assert metrics["policy/ratio_mean"] == 1


def test_importance_weights_multiply_each_tokens_loss():
    loss, slope, _ = _policy(1.0, 2.0, importance_weights=torch.tensor([[0.5]]))
    assert (loss, slope) == (-1.0, -1.0)


def test_a_huge_log_ratio_gives_a_finite_loss():
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, _ = f.policy_loss(
        torch.tensor([[500.0]]),
        torch.tensor([[0.0]]),
        torch.tensor([[-1.0]]),
        mask,
        clip_ratio=0.2,
        denominator=1.0,
    )
    assert math.isfinite(loss.item())


def test_policy_losses_of_micro_batches_add_up_to_that_of_the_minibatch():
    generator = torch.Generator().manual_seed(0)
    new, old, advantages = (torch.randn(2, 4, generator=generator) for _ in range(3))
    options = {"clip_ratio": 0.2, "denominator": float(MASK.sum())}
    whole, _ = f.policy_loss(new, old, advantages, MASK, **options)
    parts = [
        f.policy_loss(new[i], old[i], advantages[i], MASK[i], **options)[0]
        for i in (slice(0, 1), slice(1, 2))
    ]
    torch.testing.assert_close(whole, parts[0] + parts[1])
    mean_of_means = (
        sum(
            f.policy_loss(
                new[i],
                old[i],
                advantages[i],
                MASK[i],
                clip_ratio=0.2,
                denominator=float(MASK[i].sum()),
            )[0]
            for i in (slice(0, 1), slice(1, 2))
        )
        / 2
    )
    assert not torch.allclose(whole, mean_of_means)  # what a mean of means would have given


@pytest.mark.parametrize(
    ("value", "loss", "gradient"),
    [
        (1.1, 0.5 * 0.9**2, -0.9),  # inside the clip: the plain squared error
        (1.5, 0.5 * 0.8**2, 0.0),  # old 1, return 2: clipped value 1.2 is further from 2
        (0.5, 0.5 * 1.5**2, -1.5),  # moved away from the return: the plain error is larger
    ],
)
def test_the_clipped_value_loss_case_by_case(value, loss, gradient):
    values = torch.tensor([[value]], requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    result, metrics = f.value_loss(
        values,
        torch.tensor([[1.0]]),
        torch.tensor([[2.0]]),
        mask,
        value_clip=0.2,
        denominator=1.0,
    )
    result.backward()
    assert result.item() == pytest.approx(loss)
    assert values.grad.item() == pytest.approx(gradient)
    assert metrics["value/clipfrac"].item() == (1.0 if gradient == 0.0 else 0.0)


def test_explained_variance_is_one_for_perfect_values_and_zero_for_a_constant():
    returns = torch.tensor([[1.0, 2.0, 4.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    spread = f.moments(returns, MASK)
    perfect, constant = f.moments(returns - returns, MASK), f.moments(returns - 5.0, MASK)
    assert f.explained_variance(perfect, spread) == pytest.approx(1.0)
    assert f.explained_variance(constant, spread) == pytest.approx(0.0)


def test_the_pairwise_loss_at_known_differences():
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0])
    loss, metrics = f.pairwise_loss(chosen, rejected, denominator=2.0)
    expected = (math.log(1 + math.exp(-1)) + math.log(2)) / 2
    assert loss.item() == pytest.approx(expected)
    assert metrics["reward/accuracy"].item() == 0.5  # a tie is not right
    assert metrics["reward/margin"].item() == 0.5


def test_the_pairwise_loss_is_the_same_for_any_common_shift_unless_it_is_centred():
    chosen, rejected = torch.tensor([1.0]), torch.tensor([0.5])
    plain = [
        f.pairwise_loss(chosen + shift, rejected + shift, denominator=1.0)[0].item()
        for shift in (0.0, 7.0)
    ]
    assert plain[0] == pytest.approx(plain[1])
    shifted, _ = f.pairwise_loss(chosen + 7, rejected + 7, denominator=1.0, center_coef=0.01)
    assert shifted.item() == pytest.approx(plain[0] + 0.01 * 15.5**2)


def test_a_margin_asks_for_a_larger_difference():
    loss, _ = f.pairwise_loss(torch.tensor([1.0]), torch.tensor([0.0]), denominator=1.0, margin=1.0)
    assert loss.item() == pytest.approx(math.log(2))


def test_the_pairwise_loss_of_a_huge_difference_is_finite():
    loss, _ = f.pairwise_loss(torch.tensor([-1e4]), torch.tensor([1e4]), denominator=1.0)
    assert loss.item() == pytest.approx(2e4)


def test_the_language_model_loss_equals_cross_entropy_on_the_masked_targets():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator)
    ids = torch.randint(7, (2, 5), generator=generator)
    mask = torch.tensor([[False, False, True, True, False], [True, True, False, False, False]])
    loss = f.language_model_loss(logits, ids, mask, denominator=3.0)
    labels = ids.masked_fill(~mask, -100)
    labels[:, 0] = -100  # the first token has nothing to be predicted from
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1))
    torch.testing.assert_close(loss, expected)


def test_the_mixture_weight_brings_the_gradient_to_its_share():
    weight = f.mixture_weight(4.0, 2.0, ratio=0.1)
    assert weight * 4.0 == pytest.approx(0.1 * 2.0)
    assert f.mixture_weight(0.0, 2.0, ratio=0.1) == 100.0  # bounded, not infinite


def test_the_ema_decay_warms_up_to_its_value():
    warm = [f.ema_decay(n, decay=0.9, warmup=True) for n in (0, 8, 1000)]
    assert warm == [pytest.approx(0.1), pytest.approx(0.5), 0.9]
    assert f.ema_decay(0, decay=0.9, warmup=False) == 0.9


def test_the_learning_rate_warms_up_and_decays_to_its_end():
    options = {"total": 10, "warmup_ratio": 0.2, "final_ratio": 0.1}
    linear = [f.learning_rate_scale(s, schedule="linear", **options) for s in range(10)]
    assert linear[:3] == [0.5, 1.0, 1.0]
    assert linear[9] == pytest.approx(0.1)
    assert linear[2:] == sorted(linear[2:], reverse=True)
    cosine = [f.learning_rate_scale(s, schedule="cosine", **options) for s in range(10)]
    assert cosine[9] == pytest.approx(0.1)
    assert cosine[5] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 3 / 7)))
    assert f.learning_rate_scale(9, schedule="constant", **options) == 1.0


def test_a_run_of_one_step_has_its_full_rate():
    scale = f.learning_rate_scale(0, total=1, warmup_ratio=0.0, schedule="linear", final_ratio=0.1)
    assert scale == 1.0
