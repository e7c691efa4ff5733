"""Sampling completions. Common prefixes are computed once, and finished rows leave the batch.

Every completion draws from its own random stream, seeded by (seed, the prompt's key, the completion's number). So the
completions of a prompt do not depend on its shard or batch, up to floating-point differences between batch shapes.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tunetrail.models.batching import collate
from tunetrail.models.lengths import check_room
from tunetrail.models.tree import has_full_attention, prefix_tree, shares_prefixes
from tunetrail.seeds import derive_seed


class PackedLinear(torch.nn.Module):
    """x W^T with bf16 W stored in the layout that the processor's products read, so that no step has to reorder it."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def can_pack() -> bool:
    """Whether this processor has the instructions for packed bf16 products: AVX-512 or AVX-NE-CONVERT."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def inference_weights(model: Any, bf16: bool) -> Any:
    """Prepares a model for decoding, in place: bf16 weights where autocast would use bf16, packed on a CPU.

    Without gradients, autocast would cast every weight again for each token.
    """
    if not bf16:
        return model
    model = model.to(torch.bfloat16)
    if model.device.type == "cpu" and can_pack():
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if type(child) is torch.nn.Linear:
                    setattr(module, name, PackedLinear(child))
    return model


def narrow(x: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """The numbers in bf16, whole numbers as they are: a parameter of what is one (or `like` is), else a tensor."""
    cast = x.detach().to(torch.bfloat16) if x.is_floating_point() else x.clone()
    return torch.nn.Parameter(cast, False) if isinstance(x if like is None else like, torch.nn.Parameter) else cast


def decoding_weights(model: Any, bf16: bool) -> Any:
    """`inference_weights` with any adapter merged. `model` stays as it is: a copy is made if anything must change.

    Weights are merged in their own precision and cast one by one, so that no second copy of all of them is made first.
    """
    has_adapter = hasattr(model, "peft_config")
    if not bf16:
        return copy.deepcopy(model).merge_and_unload() if has_adapter else model
    copies: dict[int, Any] = {id(x): narrow(x) for x in itertools.chain(model.parameters(), model.buffers())}
    for layer in model.modules() if has_adapter else ():
        if hasattr(layer, "get_delta_weight"):
            weight = layer.get_base_layer().weight
            copies[id(weight)] = narrow(weight.detach() + layer.get_delta_weight("default").detach(), weight)
    decoder = copy.deepcopy(model, copies)
    return inference_weights(decoder.unload() if has_adapter else decoder, bf16)


class PreallocatedLayer(DynamicLayer):
    """Keys and values of a full-attention layer, with room for the columns to come.

    Each step writes its column in place, whereas the layer of transformers copies all columns to append one.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, room: int):
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.length = keys.shape[2]
        self.buffers = [torch.cat([x, x.new_empty(*x.shape[:2], room, x.shape[3])], 2) for x in (keys, values)]
        self._update_views()

    def _update_views(self) -> None:
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        end = self.length + key_states.shape[2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length : end] = new
        self.length = end
        self._update_views()
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self._update_views()


def prefill(
    model: Any, prompts: Sequence[list[int]], k: int, room: int, pad_id: int
) -> tuple[DynamicCache, torch.Tensor]:
    """Runs all but the last token of B prompts, as a prefix tree if the model allows it.

    Returns:
        the cache of B*k rows (k consecutive ones per prompt) of C columns, with room for `room` more; the attention
        mask [B*k, C], 0 on the left padding of shorter prompts.
    """
    starts = [prompt[:-1] for prompt in prompts]
    batch = collate(starts, [[]] * len(starts), pad_id).to(model.device)
    mask = batch.attention_mask.repeat_interleave(k, 0)
    cache = DynamicCache(config=model.config)
    if not mask.shape[1]:
        return cache, mask
    trunk = model.base_model
    if not shares_prefixes(model):
        trunk(**(batch.inputs | {"use_cache": True}), past_key_values=cache)
        cache.batch_repeat_interleave(k)
        if has_full_attention(model.config):
            cache.layers = [PreallocatedLayer(layer.keys, layer.values, room) for layer in cache.layers]
        return cache, mask
    tree = prefix_tree(starts)
    assert tree is not None
    trunk(**tree.inputs(model.device), past_key_values=cache, use_cache=True)
    places, length = tree.index(batch.attention_mask.bool()).repeat_interleave(k, 0), tree.input_ids.shape[1]
    row, column = places // length, places % length

    def spread(states: torch.Tensor) -> torch.Tensor:
        return states[row, :, column].transpose(1, 2)  # [B*k, C, heads, d] -> [B*k, heads, C, d]

    cache.layers = [PreallocatedLayer(spread(layer.keys), spread(layer.values), room) for layer in cache.layers]
    return cache, mask


BLOCK = 256
"""How many tokens of the vocabulary are summed together."""


def pick(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples from the softmax by inverting its cumulative distribution, block by block.

    Args:
        logits: [N, V].
        uniforms: [N] float64 in [0, 1), one for each row; NaN decodes the row greedily.
        temperature: 0 decodes all rows greedily.

    Returns:
        tokens [N] int64; their log-probs [N] float32 at this temperature (at temperature 1 if it is 0).
    """
    scores = logits.float()
    scores = scores / temperature if temperature not in (0, 1) else scores
    best, likeliest = scores.max(-1)
    weights = torch.nn.functional.pad((scores - best[:, None]).exp_(), (0, -scores.shape[1] % BLOCK))
    weights = weights.view(len(scores), -1, BLOCK)
    # On a GPU cumulative sums are not deterministic; those over blocks, and within one block, are cheap on the CPU.
    ends = weights.sum(-1).double().cpu().cumsum(-1)
    total = ends[:, -1:]
    uniforms = uniforms.cpu()
    greedy = uniforms.isnan() | (temperature == 0)
    target = (uniforms.nan_to_num()[:, None] * total).clamp_max(torch.nextafter(total, torch.zeros_like(total)))
    block = torch.searchsorted(ends, target, right=True)  # the first block that ends beyond it, so its weight is not 0
    block = block.clamp_max(ends.shape[1] - 1)  # only NaN goes beyond the last one, which the trainer will report
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp_min(0)), 0.0)
    chosen = weights[torch.arange(len(scores), device=scores.device), block[:, 0].to(scores.device)]
    inside = chosen.double().cpu().cumsum(-1)
    limit = torch.nextafter(inside[:, -1:], torch.zeros_like(total))
    token = block * BLOCK + torch.searchsorted(inside, (target - before).clamp_min(0).minimum(limit), right=True)
    token = token[:, 0].clamp_max(scores.shape[1] - 1).to(scores.device)
    tokens = torch.where(greedy.to(scores.device), likeliest, token)
    logprobs = scores.gather(1, tokens[:, None])[:, 0] - best - total[:, 0].log().float().to(scores.device)
    return tokens, logprobs


COMPACT_BELOW = 7 / 8
"""Finished rows leave the batch once the share of unfinished ones is at most this."""


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
    """B prompts -> B*k token lists (k consecutive per prompt), ending with EOS if finished, and their log-probs."""
    cache, mask = prefill(model, prompts, k, max_new_tokens, pad_id)
    tokens = torch.tensor([prompt[-1] for prompt in prompts for _ in range(k)], device=model.device)
    positions = mask.sum(-1)
    uniforms = torch.full((len(seeds), max_new_tokens), torch.nan, dtype=torch.float64)
    for row, seed in enumerate(seeds):
        if seed is not None:
            uniforms[row].uniform_(generator=torch.Generator().manual_seed(seed))
    outputs: list[list[int]] = [[] for _ in seeds]
    logprobs: list[list[float]] = [[] for _ in seeds]
    running = torch.arange(len(seeds), device=model.device)
    open_rows = torch.ones(len(seeds), dtype=torch.bool, device=model.device)
    for step in range(max_new_tokens):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=positions[:, None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        positions = positions + 1
        tokens, chosen = pick(logits, uniforms[running.cpu(), step], temperature)
        ended = tokens == eos_id
        for row, token, logprob, is_running in zip(
            running.tolist(), tokens.tolist(), chosen.tolist(), open_rows.tolist(), strict=True
        ):
            if is_running:
                outputs[row].append(token)
                logprobs[row].append(logprob)
        open_rows = open_rows & ~ended
        if not open_rows.any():
            break
        # Removing rows copies the cache, so they leave only when enough of them are finished.
        if open_rows.sum() <= COMPACT_BELOW * len(open_rows):
            indices = open_rows.nonzero()[:, 0]
            cache.batch_select_indices(indices)
            running, tokens, mask, positions = running[indices], tokens[indices], mask[indices], positions[indices]
            open_rows = open_rows[indices]
    return outputs, logprobs


def sample(model: Any, prompts: Sequence[list[int]], keys: Sequence[str], **settings: Any) -> list[list[list[int]]]:
    """The responses of `sample_with_logprobs`, without their log-probs."""
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
    """Samples K completions of each prompt.

    Args:
        prompts: token ids of each prompt.
        keys: a stable name for each prompt, which with `seed` determines its random streams.
        temperature: 0 decodes greedily.
        batch_size: sequences decoded at once.
        greedy_first: decode the first of the K greedily, in the same batch.
        on_batch: called after each batch with the number of its prompts.

    Returns:
        for each prompt, K token lists of at most `max_new_tokens`, ending with EOS unless cut off; and the log-probs of
        these tokens at this temperature (at temperature 1 if it is 0).

    Raises DataError if a prompt and `max_new_tokens` together are more than the model can read.
    """
    check_room(model.config, prompts, max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    size = max(1, batch_size // k)
    results: list[list[list[int]]] = [[] for _ in prompts]
    results_logprobs: list[list[list[float]]] = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        streams = range(-1, k - 1) if greedy_first else range(k)  # samples are the same with and without greedy_first
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
