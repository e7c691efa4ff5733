"""The two clipped losses of PPO (Schulman et al. 2017), over [B, T] tensors with a bool mask."""

import torch

from tunetrail.ppo.estimators import masked_mean


def policy_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, clip_range: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clipped surrogate (eq. 7): -mean(min(ratio A, clip(ratio, 1-eps, 1+eps) A)).

    Args:
        logprobs, old_logprobs, advantages, mask: [B, T].

    Returns:
        (loss, clip_fraction, approx_kl), scalars over the masked positions: the share of tokens where
        the clipped term is the smaller one, and KL(old || new) by its k3 estimate. Only `loss` carries
        a gradient.
    """
    # Masked positions are set to 0 before exp: padding may hold anything, inf * 0 would be NaN.
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = masked_mean(torch.maximum(unclipped, clipped), mask)
    with torch.no_grad():
        clip_fraction = masked_mean((clipped > unclipped).float(), mask)
        approx_kl = masked_mean(torch.expm1(log_ratio) - log_ratio, mask)
    return loss, clip_fraction, approx_kl


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, clip_range: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half the larger of the squared errors of the value and of the value clipped around the old one.

    Args:
        values, old_values, returns, mask: [B, T].

    Returns:
        (loss, clip_fraction), scalars over the masked positions.
    """
    clipped = torch.clamp(values, old_values - clip_range, old_values + clip_range)
    unclipped_error, clipped_error = (values - returns) ** 2, (clipped - returns) ** 2
    loss = 0.5 * masked_mean(torch.maximum(unclipped_error, clipped_error), mask)
    clip_fraction = masked_mean((clipped_error > unclipped_error).float(), mask).detach()
    return loss, clip_fraction
