"""Estimators over [B, T] tensors. `mask` is bool, True on response tokens; every row's True run starts at column 0."""

import torch


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of x over the True positions: [B, T], [B, T] -> scalar."""
    return (x * mask).sum() / mask.sum()


def masked_whiten(x: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """x scaled to variance 1 over the True positions, and to mean 0 if `shift_mean` (advantages; rewards keep their mean).

    [B, T] -> [B, T], 0 where masked. The variance is the population's (no Bessel correction).
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    whitened = (x - mean) * (variance + 1e-8).rsqrt()
    return (whitened if shift_mean else whitened + mean) * mask


def kl_penalty(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: str = "k1") -> torch.Tensor:
    """Per-token estimate of KL(policy || reference) on tokens the policy sampled: [B, T], [B, T] -> [B, T], nats.

    With d = logprobs - ref_logprobs: k1 = d; k2 = d²/2; k3 = exp(-d) - 1 + d, unbiased like k1, never
    negative and of low variance (Schulman, "Approximating KL divergence", 2020).
    """
    d = logprobs - ref_logprobs
    match estimator:
        case "k1":
            return d
        case "k2":
            return d**2 / 2
        case "k3":
            return torch.expm1(-d) + d
    raise ValueError(f"estimator must be k1, k2 or k3, got {estimator!r}")


def token_rewards(scores: torch.Tensor, kl: torch.Tensor, mask: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """-kl_coef * kl at each token, plus the score at each response's last token (Ziegler et al. 2019, eq. 2).

    Args:
        scores: [B].
        kl: [B, T].
        mask: [B, T]; every row has at least one True.

    Returns:
        [B, T], 0 where masked.
    """
    rewards = -kl_coef * kl * mask
    last = mask.sum(1) - 1
    rewards[torch.arange(len(scores), device=scores.device), last] += scores
    return rewards


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16); the value after the last token is 0.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1}.

    Args:
        rewards, values, mask: [B, T].

    Returns:
        (advantages, returns), both [B, T], 0 where masked; returns = advantages + values.
    """
    values = values * mask
    advantages = torch.zeros_like(values)
    next_advantage = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, (advantages + values) * mask
