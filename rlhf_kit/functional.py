"""The maths of RLHF as pure functions: no models, no config, no I/O, no ranks.

Shapes: B batch, R response tokens, V vocabulary. Masks are bool, True = counts.

Losses divide by a `denominator` that the caller passes: the number of tokens (or pairs) of the
*global* minibatch. Summed over micro-batches and ranks, losses and metrics are then exact means
over all tokens, whatever the micro-batch size. A mean of micro-batch means would weigh tokens
of short responses more.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Metrics = dict[str, Tensor]


def token_logprobs(logits: Tensor, ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at `ids`, in fp32 whatever the dtype of the logits.

    logits [B, R, V], ids [B, R] -> [B, R]. The same temperature must be used by the rollout,
    the old, the new and the reference logprobs: they are then logprobs of one policy.
    """
    logits = logits.float() / temperature
    return torch.gather(logits, -1, ids.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(logits, -1)


def entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy of softmax(logits / temperature) in nats: [B, R, V] -> [B, R]."""
    logprobs = F.log_softmax(logits.float() / temperature, dim=-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x where mask is True; values elsewhere may be anything, NaN included."""
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device)).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask is True; 0 for an empty mask."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def moments(x: Tensor, mask: Tensor) -> Tensor:
    """[3] fp64: count, sum and sum of squares of x under the mask. Add up over ranks."""
    kept = torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device)).double()
    return torch.stack([mask.sum().double(), kept.sum(), (kept * kept).sum()])


def mean_and_std(total: Tensor) -> tuple[float, float]:
    """Mean and (population) standard deviation from added-up `moments`; (0, 0) of nothing."""
    count, first, second = (float(v) for v in total)
    if count == 0:
        return 0.0, 0.0
    mean = first / count
    return mean, math.sqrt(max(second / count - mean * mean, 0.0))


def whiten(x: Tensor, mask: Tensor, *, mean: float, std: float) -> Tensor:
    """(x - mean) / (std + 1e-8) under the mask, 0 elsewhere.

    Mean and std come from `moments` summed over all ranks: whitening one rank's share by itself
    would make the loss depend on the number of GPUs.
    """
    return torch.where(mask, (x - mean) / (std + 1e-8), torch.zeros_like(x))


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The estimator log p - log q of KL(p || q) at samples of p: unbiased, may be negative."""
    return logprobs - ref_logprobs


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(-x) + x - 1 with x = log p - log q: unbiased, never negative, low variance.

    Schulman, "Approximating KL divergence" (2020). A monitor here; the reward uses k1.
    """
    x = logprobs - ref_logprobs
    return torch.exp(-x) + x - 1


def next_kl_coef(coef: float, *, kl: float, target: float, horizon: int, n: int) -> float:
    """The adaptive controller of Ziegler et al. 2019, section 2.2.

    coef * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon), with `kl` the mean nats a
    response over the last `n` rollouts.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * n / horizon)


def shape_score(
    score: Tensor,
    ended: Tensor,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    clip: float = 5.0,
    missing_eos_score: float | None = None,
) -> Tensor:
    """The reward model's raw score [B] as PPO uses it: normalised, clipped, capped without EOS.

    `mean` and `std` are the reward model's own, saved with it. A response that ran into the
    length limit (`ended` [B] False) scores at most `missing_eos_score`: what it would have said
    next is unknown, so it can't be rewarded (Huang et al. 2024, "N+ details", detail 23).
    """
    shaped = ((score.float() - mean) / std).clamp(-clip, clip)
    if missing_eos_score is not None:
        shaped = torch.where(ended, shaped, shaped.clamp(max=missing_eos_score))
    return shaped


def last_token_index(mask: Tensor) -> Tensor:
    """[B] index of the last True of each row of a [B, R] mask that starts at 0 without gaps."""
    return mask.sum(-1).clamp(min=1) - 1


def token_rewards(
    score: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    *,
    kl_coef: float,
) -> Tensor:
    """r_t = -kl_coef * (log pi_old - log pi_ref)_t, plus the score on the last token.

    score [B], the rest [B, R] -> [B, R]; 0 off the mask. The last token is the EOS where there
    is one: the score rewards the action of stopping (Stiennon et al. 2020, equation in 3.4).
    """
    penalty = -kl_coef * kl_k1(old_logprobs, ref_logprobs)
    rewards = torch.where(response_mask, penalty, torch.zeros_like(penalty))
    return rewards.scatter_add(
        1, last_token_index(response_mask).unsqueeze(1), score.to(rewards.dtype).unsqueeze(1)
    )


def gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, equations 11 to 16).

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}, with V = A = 0
    after the last token. All [B, R]; returns (advantages, returns = advantages + values), both
    0 off the mask. Advantages are not whitened yet, so returns stay in the reward's units.
    """
    values = torch.where(response_mask, values, torch.zeros_like(values))
    rewards = torch.where(response_mask, rewards, torch.zeros_like(rewards))
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = delta + gamma * lam * next_advantage
        next_value, next_advantage = values[:, t], advantages[:, t]
    advantages = torch.where(response_mask, advantages, torch.zeros_like(advantages))
    return advantages, torch.where(response_mask, advantages + values, torch.zeros_like(values))


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    clip_ratio: float,
    denominator: float,
    dual_clip: float = 0.0,
    importance_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """PPO's clipped surrogate (Schulman et al. 2017, equation 7), as a loss. All [B, R].

    max(-A rho, -A clip(rho, 1 - eps, 1 + eps)), rho = exp(logprobs - old_logprobs). With
    `dual_clip` c > 1 it is bounded by -c A where A < 0 (Ye et al. 2020, equation 5).
    `importance_weights` [B, R] multiply each token's loss, for rollouts that another engine
    sampled. The log-ratio is clamped to +-20 so that exp can't overflow; the clip cuts the
    gradient long before.
    """
    log_ratio = torch.where(response_mask, logprobs - old_logprobs, torch.zeros_like(logprobs))
    ratio = torch.exp(log_ratio.clamp(-20.0, 20.0))
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_ratio, 1.0 + clip_ratio)
    losses = torch.maximum(unclipped, clipped)
    if dual_clip:
        bounded = torch.minimum(losses, -dual_clip * advantages)
        losses = torch.where(advantages < 0, bounded, losses)
    if importance_weights is not None:
        losses = losses * importance_weights
    with torch.no_grad():
        metrics = {
            "policy/approx_kl": masked_sum(ratio - 1.0 - log_ratio, response_mask) / denominator,
            "policy/clipfrac": masked_sum((clipped > unclipped).float(), response_mask)
            / denominator,
            "policy/ratio_mean": masked_sum(ratio, response_mask) / denominator,
            "policy/ratio_square": masked_sum(ratio * ratio, response_mask) / denominator,
        }
    return masked_sum(losses, response_mask) / denominator, metrics


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    *,
    value_clip: float,
    denominator: float,
) -> tuple[Tensor, Metrics]:
    """1/2 max((V - R)^2, (clip(V, V_old +- value_clip) - R)^2), all [B, R].

    The clipping of OpenAI's baselines (ppo2/model.py), kept by every RLHF code since.
    """
    clipped_values = old_values + (values - old_values).clamp(-value_clip, value_clip)
    unclipped = (values - returns).square()
    clipped = (clipped_values - returns).square()
    with torch.no_grad():
        clipfrac = masked_sum((clipped > unclipped).float(), response_mask) / denominator
    losses = 0.5 * torch.maximum(unclipped, clipped)
    return masked_sum(losses, response_mask) / denominator, {"value/clipfrac": clipfrac}


def explained_variance(residuals: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 perfect, 0 a constant's worth.

    From the added-up `moments` of returns - values, and of returns.
    """
    _, residual = mean_and_std(residuals)
    _, spread = mean_and_std(returns)
    return 1.0 - residual**2 / max(spread**2, 1e-12)


def pairwise_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    denominator: float,
    margin: float = 0.0,
    center_coef: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """-log sigmoid(r_chosen - r_rejected - margin), a Bradley-Terry likelihood; both [B].

    InstructGPT (Ouyang et al. 2022), equation 1, on the scores of the last tokens. Only the
    difference is identified, so `center_coef` * (r_chosen + r_rejected)^2 pins the level
    (Eisenstein et al. 2023, equation 2).
    """
    chosen, rejected = chosen.float(), rejected.float()
    loss = -F.logsigmoid(chosen - rejected - margin)
    if center_coef:
        loss = loss + center_coef * (chosen + rejected).square()
    with torch.no_grad():
        metrics = {
            "reward/accuracy": (chosen > rejected).float().sum() / denominator,
            "reward/margin": (chosen - rejected).sum() / denominator,
            "reward/chosen": chosen.sum() / denominator,
            "reward/rejected": rejected.sum() / denominator,
        }
    return loss.sum() / denominator, metrics


def language_model_loss(
    logits: Tensor, ids: Tensor, loss_mask: Tensor, *, denominator: float
) -> Tensor:
    """Next-token cross-entropy: logits [B, T, V], ids and loss_mask [B, T] -> scalar.

    `loss_mask` names the *target* tokens, so position t is predicted from t - 1 and the first
    token never counts.
    """
    logprobs = token_logprobs(logits[:, :-1], ids[:, 1:])
    return -masked_sum(logprobs, loss_mask[:, 1:]) / denominator


def mixture_weight(
    mixture_norm: float, ppo_norm: float, *, ratio: float, largest: float = 100.0
) -> float:
    """The factor that brings the mixture gradient's norm to `ratio` times the PPO gradient's."""
    return min(ratio * ppo_norm / max(mixture_norm, 1e-12), largest)


def ema_decay(updates: int, *, decay: float, warmup: bool) -> float:
    """The decay of update number `updates` (from 0): min(decay, (1 + n) / (10 + n)) in warm-up.

    Without it an average over 1 / (1 - decay) steps still is the initial weights when a short
    run ends.
    """
    return min(decay, (1 + updates) / (10 + updates)) if warmup else decay


def learning_rate_scale(
    step: int, *, total: int, warmup_ratio: float, schedule: str, final_ratio: float
) -> float:
    """The share of the peak rate at optimiser step `step` (from 0) of `total`.

    Linear from 1 / warm-up steps to 1, then `cosine`, `linear` or `constant` down to
    `final_ratio` at the last step.
    """
    warmup = int(round(warmup_ratio * total))
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = min((step - warmup) / max(total - 1 - warmup, 1), 1.0)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return final_ratio + (1 - final_ratio) * shape
