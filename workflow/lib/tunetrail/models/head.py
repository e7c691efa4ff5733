"""Log-probs from a model's head, computed in chunks without keeping logits for the gradient."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

SCORED_AT_ONCE = 512
"""How many rows of [V] logits are in memory at once."""


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        tokens: torch.Tensor,
        temperature: float,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        ctx.dtype, ctx.temperature = torch.get_autocast_dtype(device) if autocast else hidden.dtype, temperature
        with torch.autocast(device, enabled=False):
            narrow, w = hidden.to(ctx.dtype), weight.to(ctx.dtype)
            logprobs, entropies = [], []
            for x, y in zip(narrow.split(SCORED_AT_ONCE), tokens.split(SCORED_AT_ONCE), strict=True):
                logits = x @ w.T
                log_p = (logits.float().div_(temperature) if temperature != 1 else logits).log_softmax(
                    -1, torch.float32
                )
                logprobs.append(log_p.gather(1, y[:, None])[:, 0])
                if with_entropy:
                    entropies.append(-torch.linalg.vecdot(log_p.exp(), log_p))
            token_logprobs = torch.cat(logprobs)
            ctx.save_for_backward(narrow, weight, tokens, token_logprobs)
            entropy = torch.cat(entropies) if with_entropy else None
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return token_logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, tokens, logprobs = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            w = weight.to(ctx.dtype)
            grad = grad / ctx.temperature
            grad_hidden = torch.empty_like(hidden)
            grad_weight = None
            for start in range(0, len(hidden), SCORED_AT_ONCE):
                part = slice(start, start + SCORED_AT_ONCE)
                logits = hidden[part] @ w.T
                if ctx.temperature != 1:
                    logits = logits.float().div_(ctx.temperature)
                p = logits.softmax(-1).mul_(-grad[part, None])
                # For the tokens themselves 1 - p is computed exactly: bf16 would lose it where p is near 1.
                p.scatter_(1, tokens[part, None], (grad[part] * -torch.expm1(logprobs[part]))[:, None].to(p.dtype))
                p = p.to(ctx.dtype)
                grad_hidden[part] = p @ w
                if ctx.needs_input_grad[1]:
                    more = p.T @ hidden[part]
                    grad_weight = more.to(weight.dtype) if grad_weight is None else grad_weight.add_(more)
        return grad_hidden, grad_weight, None, None, None


def head_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-prob of each token under softmax(hidden weight^T / temperature); no logits are kept for the gradient.

    Args:
        hidden: [N, d].
        weight: [V, d].
        tokens: [N] int64.

    Returns:
        ([N] float32; the distributions' entropies [N] float32 without a gradient, or None).
    """
    return _HeadLogprobs.apply(hidden, weight, tokens, temperature, with_entropy)


def narrow_products(model: Any, dtype: torch.dtype) -> Any:
    """Casts the weights of plain linear layers to `dtype`, in place, for scoring under autocast to `dtype`.

    The numbers stay the same, since autocast would cast these weights at each pass. Whatever autocast leaves in float32
    stays in float32, and so does an embedding that shares its weight with the head.
    """
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.weight = torch.nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)
    return model


@torch.no_grad()
def mark_plain_head(model: Any) -> Any:
    """Notes on a model whether its logits are just the last hidden state times the head's weight; returns the model.

    A trial decides, not the config: some models scale, shift or cap their logits.
    """
    head = model.get_output_embeddings()
    if type(head) is torch.nn.Linear and head.bias is None:
        ids = torch.tensor([[1, 2, 3, 4, 5, 6]], device=model.device) % model.config.vocab_size
        logits = model(input_ids=ids, use_cache=False).logits.float()
        product = (model.base_model(input_ids=ids, use_cache=False).last_hidden_state @ head.weight.T).float()
        tolerance = 1e-4 if head.weight.dtype == torch.float32 else 5e-2
        model.has_plain_head = bool((logits - product).norm() <= tolerance * logits.norm())
    return model


def head_weight(model: Any) -> torch.Tensor | None:
    """[V, d], if the logits are just the last hidden state times this weight (`mark_plain_head`); otherwise None."""
    model = model.get_base_model() if hasattr(model, "peft_config") else model
    head = model.get_output_embeddings()
    return head.weight if getattr(model, "has_plain_head", False) and type(head) is torch.nn.Linear else None
