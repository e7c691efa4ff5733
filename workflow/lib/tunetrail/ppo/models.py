"""Policy and critic as one module, so that accelerate wraps and saves them together."""

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from tunetrail.models.batching import Batch
from tunetrail.models.fit import checkpoint_layers
from tunetrail.models.scoring import FullPrecisionHead, policy_pass, response_logprobs, response_values


class ActorCritic(torch.nn.Module):
    """A causal language model and its value function.

    Args:
        policy: causal language model, with or without a LoRA adapter.
        reward_model: a `separate` critic starts as a copy of it.
        critic: `separate`; or `shared`, a linear head on the policy's last hidden state that starts at 0, since the
            reward model's head was trained on another trunk and would be noise on this one; or None, no value function,
            so that values are 0.
    """

    def __init__(self, policy: Any, reward_model: Any, critic: str | None):
        super().__init__()
        self.policy = policy
        self.critic = copy.deepcopy(reward_model).requires_grad_(True) if critic == "separate" else None
        self.value_head = FullPrecisionHead(policy.config.hidden_size, 1) if critic == "shared" else None
        if self.value_head is not None:
            torch.nn.init.zeros_(self.value_head.weight)
            torch.nn.init.zeros_(self.value_head.bias)

    def forward(
        self, batch: Batch, temperature: float, with_entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(logprobs, values, entropy), each [B, R] float32, 0 on padding. The entropy costs a pass over [B, R, V]."""
        checkpoint_layers(self, torch.is_grad_enabled())
        logprobs, entropy, hidden = policy_pass(self.policy, batch, temperature, with_entropy)
        if self.value_head is not None:
            values = self.value_head(hidden)[..., 0].float()
        elif self.critic is not None:
            values = response_values(self.critic, batch)
        else:
            values = torch.zeros_like(logprobs)
        return logprobs, values.masked_fill(~batch.response_mask, 0.0), entropy


class Reference:
    """The policy as it was before training: with its adapter switched off, or a frozen copy."""

    def __init__(self, policy: Any):
        self.has_adapter = hasattr(policy, "peft_config")
        self.model = policy if self.has_adapter else copy.deepcopy(policy).requires_grad_(False).eval()

    def logprobs(self, batch: Batch, temperature: float) -> torch.Tensor:
        """[B, R] float32."""
        without_adapter: AbstractContextManager = self.model.disable_adapter() if self.has_adapter else nullcontext()
        with without_adapter:
            return response_logprobs(self.model, batch, temperature)
