"""PPO for language models: pure estimators and losses over [batch, time] tensors, and a trainer that wires them."""

from tunetrail.ppo.controllers import AdaptiveKLController, FixedKLController
from tunetrail.ppo.estimators import (
    gae,
    grpo,
    masked_mean,
    masked_whiten,
    rloo,
    shaped_scores,
    token_rewards,
)
from tunetrail.ppo.losses import policy_loss, value_loss

__all__ = [
    "AdaptiveKLController",
    "FixedKLController",
    "gae",
    "grpo",
    "masked_mean",
    "masked_whiten",
    "policy_loss",
    "rloo",
    "shaped_scores",
    "token_rewards",
    "value_loss",
]
