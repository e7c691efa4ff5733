"""What all sequences of a batch begin with, a chat template's system message say, is computed once."""

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tunetrail.models.batching import Batch

WORTH_SHARING = 8
"""Tokens; a shorter start is not worth a forward pass of its own."""


def shared_tokens(model: Any, batch: Batch) -> int:
    """Tokens of the common start that may be computed once.

    The padding of shorter prompts then stands between it and them. Full attention does not see it; a
    sliding window, a recurrent layer or distances counted in columns would: with those, none.
    """
    if batch.common_start < WORTH_SHARING:
        return 0
    full = all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
    elsewhere = hasattr(model.config, "attention_layers") or hasattr(model.config, "attn_config")  # GPT-Neo, MPT
    return batch.common_start if full and not elsewhere else 0


def cached_inputs(model: Any, batch: Batch) -> dict[str, Any]:
    """Keyword arguments of a forward pass over the columns after the common start, which is run here.

    Returns:
        input_ids, position_ids [B, L-n]; attention_mask [B, L]; past_key_values, the cache of n tokens.
    """
    cache, n, mask = DynamicCache(config=model.config), shared_tokens(model, batch), batch.attention_mask
    if n:
        whole = model.get_base_model() if hasattr(model, "peft_config") else model
        first = int(mask[0].argmax())  # the column of the first row's first token
        start = batch.input_ids[:1, first : first + n]
        whole.base_model(input_ids=start, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(mask))
        rest = mask * (batch.position_ids >= n)  # a shorter row has part of its start in the columns that are left
        mask = torch.cat([torch.ones_like(mask[:, :n]), rest[:, n:]], 1)
    return {
        "input_ids": batch.input_ids[:, n:],
        "attention_mask": mask,
        "position_ids": batch.position_ids[:, n:],
        "past_key_values": cache,
        "use_cache": True,
    }


def model_inputs(model: Any, batch: Batch) -> dict[str, Any]:
    """Keyword arguments of a forward pass: without its common start where no gradient is taken.

    What comes out has fewer columns then: count them from the end.
    """
    if not torch.is_grad_enabled() and shared_tokens(model, batch):
        return cached_inputs(model, batch)
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "position_ids": batch.position_ids,
        "use_cache": False,
    }
