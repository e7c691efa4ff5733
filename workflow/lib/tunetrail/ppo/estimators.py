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


def token_rewards(scores: torch.Tensor, kl: torch.Tensor, mask: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """-kl_coef * kl at each token, plus the score at each response's last token (Ziegler et al. 2019, eq. 2).

    Of the estimates of a token's KL only the log ratio (Schulman's k1) belongs in a reward, which has no gradient of
    its own: its policy gradient is that of the KL. The one of k2 or k3 is not (Tang and Munos 2025).

    Args:
        scores: [B].
        kl: [B, T], log-prob of the policy less that of the reference, nats.
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


def grpo(scores: torch.Tensor, penalties: torch.Tensor, k: int) -> torch.Tensor:
    """Group-relative advantages (Shao et al. 2024, section 4.1.2): score less its prompt's mean, over its deviation.

    The penalties are subtracted after that, less the mean of the prompt's others (`rloo`). Within the deviation they
    would decide alone wherever the scores tie, and noise of any size would become advantages of size 1.

    Args:
        scores: [N], of whole episodes, the k of a prompt in a row; k at least 2. The deviation is the population's; an
            advantage is 0 where all k scores agree.
        penalties: [N], in deviations of the score: the KL of each episode times its coefficient.

    Returns:
        [N], the advantage of every token of an episode.
    """
    groups = scores.view(-1, k)
    relative = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, correction=0, keepdim=True) + 1e-6)
    return relative.flatten() - rloo(penalties, k)


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
