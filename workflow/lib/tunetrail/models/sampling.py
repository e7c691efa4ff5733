"""Sampling completions: what sequences begin with is computed once, finished rows leave the batch.

Every completion draws from a random stream of its own, seeded by (seed, prompt's key, completion), so
that what a prompt gets does not depend on the shard or batch it is in (up to floating-point
differences between batch shapes).
"""

import copy
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import torch
from transformers import DynamicCache

from tunetrail.models.batching import collate
from tunetrail.models.scoring import gather_logprobs
from tunetrail.models.tree import has_full_attention
from tunetrail.seeds import derive_seed

WORTH_SHARING = 8
"""Tokens; a shorter start is not worth a forward pass of its own."""


def inference_weights(model: Any, bf16: bool) -> Any:
    """The model for decoding: bf16 weights where autocast would be bf16, since without gradients
    autocast casts every weight again for each token."""
    return model.to(torch.bfloat16) if bf16 else model


def decoding_weights(model: Any, bf16: bool) -> Any:
    """`inference_weights` with any adapter merged, leaving `model` as it is: a copy where it must be one."""
    has_adapter = hasattr(model, "peft_config")
    if not has_adapter and not bf16:
        return model
    decoder = copy.deepcopy(model)
    return inference_weights(decoder.merge_and_unload() if has_adapter else decoder, bf16)


def common_start(model: Any, prompts: Sequence[list[int]]) -> int:
    """Tokens that all prompts begin with and that are worth a forward pass of their own: none of the shortest's last.

    Where the cache of them is put before padded prompts, the padding stands in between. Full attention
    does not see it; a sliding window, a recurrent layer or distances counted in columns would: with those, 0.
    """
    alike = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False)))
    alike = min(alike, min(map(len, prompts)) - 1)
    return alike if len(prompts) > 1 and alike >= WORTH_SHARING and has_full_attention(model.config) else 0


def prefill(model: Any, prompts: Sequence[list[int]], pad_id: int) -> tuple[torch.Tensor, DynamicCache, torch.Tensor]:
    """(logits after each prompt [B, V], cache of its C columns, attention mask [B, C])."""
    batch = collate(prompts, [[]] * len(prompts), pad_id).to(model.device)
    cache, mask, n = DynamicCache(config=model.config), batch.attention_mask, common_start(model, prompts)
    if n:
        start = torch.tensor([prompts[0][:n]], device=model.device)
        model(input_ids=start, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(prompts))
        rest = mask * (batch.position_ids >= n)  # a shorter prompt has part of its start in the columns that are left
        mask = torch.cat([torch.ones_like(mask[:, :n]), rest[:, n:]], 1)
    logits = model(
        input_ids=batch.input_ids[:, n:], attention_mask=mask, position_ids=batch.position_ids[:, n:],
        past_key_values=cache, use_cache=True, logits_to_keep=1,
    ).logits[:, -1]  # fmt: skip
    return logits, cache, mask


class _Noise:
    """Exponential noise for the rows still running: argmax(logits/T - log noise) samples the softmax (Gumbel-max).

    A row without a seed gets none, and is decoded greedily.
    """

    def __init__(self, seeds: Sequence[int | None], vocab_size: int):
        self.generators = [None if seed is None else torch.Generator().manual_seed(seed) for seed in seeds]
        self.vocab_size = vocab_size

    def draw(self, rows: list[int]) -> torch.Tensor:
        noise = torch.ones(len(rows), self.vocab_size)
        for i, row in enumerate(rows):
            if self.generators[row] is not None:
                noise[i].exponential_(generator=self.generators[row])
        return noise


@torch.inference_mode()
def _sample_batch(
    model: Any,
    prompts: list[list[int]],
    seeds: list[int | None],
    k: int,
    max_new_tokens: int,
    temperature: float,
    eos_id: int,
    pad_id: int,
) -> tuple[list[list[int]], list[list[float]]]:
    """B prompts -> B*k token lists (k in a row for each prompt), closed by EOS where finished, and their log-probs."""
    logits, cache, mask = prefill(model, prompts, pad_id)
    if k > 1:
        cache.batch_repeat_interleave(k)
    logits = logits.repeat_interleave(k, 0)
    mask = mask.repeat_interleave(k, 0)
    positions = mask.sum(-1)
    noise = _Noise(seeds, logits.shape[-1]) if temperature > 0 else None
    outputs: list[list[int]] = [[] for _ in seeds]
    logprobs: list[list[float]] = [[] for _ in seeds]
    running = list(range(len(seeds)))
    for step in range(max_new_tokens):
        scores = logits.float() / (temperature or 1.0)
        tokens = (scores if noise is None else scores - noise.draw(running).log().to(model.device)).argmax(-1)
        chosen = gather_logprobs(scores, tokens)
        for row, token, logprob in zip(running, tokens.tolist(), chosen.tolist(), strict=True):
            outputs[row].append(token)
            logprobs[row].append(logprob)
        keep = tokens != eos_id
        if step == max_new_tokens - 1 or not keep.any():
            break
        if not keep.all():
            indices = keep.nonzero()[:, 0]
            cache.batch_select_indices(indices)
            running = [running[i] for i in indices.tolist()]
            tokens, mask, positions = tokens[indices], mask[indices], positions[indices]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = model(
            input_ids=tokens[:, None], attention_mask=mask, position_ids=positions[:, None],
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        ).logits[:, -1]  # fmt: skip
        positions = positions + 1
    return outputs, logprobs


def sample(model: Any, prompts: Sequence[list[int]], keys: Sequence[str], **settings: Any) -> list[list[list[int]]]:
    """The responses of `sample_with_logprobs` alone."""
    return sample_with_logprobs(model, prompts, keys, **settings)[0]


def sample_with_logprobs(
    model: Any,
    prompts: Sequence[list[int]],
    keys: Sequence[str],
    *,
    k: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
    eos_id: int,
    pad_id: int,
    greedy_first: bool = False,
    on_batch: Callable[[int], None] = lambda prompts_done: None,
) -> tuple[list[list[list[int]]], list[list[list[float]]]]:
    """K completions of each prompt.

    Args:
        prompts: token ids of each prompt.
        keys: a stable name of each prompt; with `seed` it fixes the random stream.
        temperature: 0 decodes greedily.
        batch_size: sequences decoded at once.
        greedy_first: the first of the K is decoded greedily, in the same batch.
        on_batch: told how many prompts each batch finished.

    Returns:
        For each prompt K token lists of at most `max_new_tokens`, the last token EOS unless cut off; and as
        many lists of the tokens' log-probs at the temperature (of greedy ones at 1 where it is 0).
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    size = max(1, batch_size // k)
    results: list[list[list[int]]] = [[] for _ in prompts]
    results_logprobs: list[list[list[float]]] = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        streams = range(-1, k - 1) if greedy_first else range(k)  # the samples are the same with and without it
        seeds = [derive_seed(seed, "sample", keys[i], j) if j >= 0 else None for i in rows for j in streams]
        flat, flat_logprobs = _sample_batch(
            model, [prompts[i] for i in rows], seeds, k, max_new_tokens, temperature, eos_id, pad_id
        )
        for n, i in enumerate(rows):
            results[i] = flat[n * k : (n + 1) * k]
            results_logprobs[i] = flat_logprobs[n * k : (n + 1) * k]
        on_batch(len(rows))
    model.train(was_training)
    return results, results_logprobs
