"""Estimators over [B, T] tensors. `mask` is bool, True on response tokens; every row's True run starts at column 0."""

import torch


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of x over the True positions: [B, T], [B, T] -> scalar."""
    return (x * mask).sum() / mask.sum()


def masked_whiten(x: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """x scaled to variance 1 over the True positions, and to mean 0 if `shift_mean` (advantages; rewards keep their
    mean).

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


def rloo(rewards: torch.Tensor, k: int) -> torch.Tensor:
    """REINFORCE leave-one-out (Ahmadian et al. 2024, eq. 8): each episode's reward less the mean of its prompt's
    others.

    Args:
        rewards: [N], of whole episodes, the k of a prompt in a row; k at least 2.

    Returns:
        [N], the advantage of every token of an episode.
    """
    groups = rewards.view(-1, k)
    return ((groups - groups.mean(1, keepdim=True)) * k / (k - 1)).flatten()


def grpo(rewards: torch.Tensor, k: int) -> torch.Tensor:
    """Group-relative advantages (Shao et al. 2024, section 4.1.2): reward less its prompt's mean, over its deviation.

    The deviation is the population's; 0 where all k agree. The KL penalty stays in the reward, where the
    paper puts it in the loss.

    Args:
        rewards: [N], of whole episodes, the k of a prompt in a row; k at least 2.

    Returns:
        [N], the advantage of every token of an episode.
    """
    groups = rewards.view(-1, k)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, correction=0, keepdim=True) + 1e-6)).flatten()


def shaped_scores(
    scores: torch.Tensor,
    lengths: torch.Tensor,
    finished: torch.Tensor,
    *,
    normalise: bool = False,
    clip: float | None = None,
    missing_eos_score: float | None = None,
    missing_eos_penalty: float = 0.0,
    length_penalty: float = 0.0,
) -> torch.Tensor:
    """What an episode is rewarded for its text: [N] scores, normalised over the N, clipped, less penalties.

    A response without EOS gets a fixed score (Stiennon et al. 2020) or pays a penalty (Huang et al. 2024).

    Args:
        lengths: [N] int64, tokens.
        finished: [N] bool, closed by EOS.
    """
    if normalise:
        scores = (scores - scores.mean()) / (scores.std(correction=0) + 1e-8)
    if clip is not None:
        scores = scores.clamp(-clip, clip)
    scores = scores - length_penalty * lengths - missing_eos_penalty * ~finished
    return scores if missing_eos_score is None else torch.where(finished, scores, missing_eos_score)
