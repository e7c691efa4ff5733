"""Attention of short sequences on a CPU as plain matrix products.

For them torch's fused attention does not use the CPU's bf16 products, and its backward pass is slower still. With rows
of one or two hundred tokens the scores fit in the cache, and plain products are faster both forwards and backwards;
`make bench` measures a whole training step with and without. Longer rows, whose scores would not fit, and other devices
keep the fused attention.
"""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PLAIN = "plain_on_cpu"
LONGEST = 512
"""Most keys per row; beyond that, keeping [heads, T, S] scores for the gradient costs more than it saves."""


def product_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """softmax(scaling q k^T) v (Vaswani et al. 2017, eq. 1); query heads that share a key head become its rows.

    Args:
        query: [B, H, T, d].
        key: [B, G, S, d], G dividing H.
        value: [B, G, S, e].
        mask: [B or 1, 1, T, S], True where a token is attended to; None: everywhere.

    Returns:
        [B, H, T, e]. A token that attends to nothing gets the mean of the values.
    """
    b, heads, t, _ = query.shape
    groups, s = key.shape[1:3]
    q, k, v = query.reshape(b * groups, -1, query.shape[3]), key.flatten(0, 1), value.flatten(0, 1)
    scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=scaling)
    if mask is not None:
        seen, unseen = scores.new_tensor([0.0, torch.finfo(scores.dtype).min])
        scores.view(b, heads, t, s).add_(torch.where(mask, seen, unseen))
    return torch.bmm(scores.softmax(-1), v).view(b, heads, t, -1)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The function that transformers calls in each layer: [B, H, T, d] -> ([B, T, H, e], no weights)."""
    t, s = query.shape[2], key.shape[2]
    plain = (
        query.device.type == "cpu"
        and 1 < t <= s <= LONGEST
        and not dropout
        and (attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1))
        and not any(
            kwargs.get(name) is not None for name in ("is_causal", "position_bias", "cache", "softcap", "s_aux")
        )
    )
    if not plain:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if attention_mask is None and getattr(module, "is_causal", True):
        attention_mask = torch.ones(t, s, dtype=torch.bool).tril()[None, None]
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    return product_attention(query, key, value, attention_mask, scaling).transpose(1, 2).contiguous(), None


AttentionInterface.register(PLAIN, attention)
AttentionMaskInterface.register(PLAIN, sdpa_mask)


def plain_attention(model: Any) -> Any:
    """Makes a model that uses torch's fused attention use `attention` instead, if there is no GPU."""
    if model.config._attn_implementation == "sdpa" and not torch.cuda.is_available():
        model.set_attn_implementation(PLAIN)
    return model
