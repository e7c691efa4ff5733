"""Computes the common prefixes of a batch's sequences once.

A batch runs as its prefix tree: the K responses of a prompt share the prompt, all chats of a run share the system
message, and only the ends of a few rows are padded. Every token keeps its position and sees only the tokens before it
in its own sequence, so values and gradients are the same as without sharing, up to floating-point rounding.
`share_prefixes` puts this between a model's trunk and its callers, which still pass padded [batch, time] tensors and
get [batch, time, hidden] back.
"""

import bisect
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tunetrail.models.cpu.attention import PLAIN

ROW_TOKENS = 256
"""Tokens per row of the tree: longer rows repeat common prefixes less often, but waste more of the attention on tokens
that are masked."""
WORTH_SHARING = 0.9
"""A batch runs as a tree only if that takes at most this share of the padded batch's tokens."""


@dataclass
class PrefixTree:
    """G rows of up to L tokens; each row is the prefix tree of some of the sequences."""

    input_ids: torch.Tensor
    """[G, L] int64"""
    position_ids: torch.Tensor
    """[G, L] int64: a token's depth"""
    attention_mask: torch.Tensor
    """[G, 1, L, L] bool: whether token i sees token j, which is its ancestor or itself. Padding sees itself, since
    attention to nothing is NaN."""
    places: list[list[int]]
    """for each sequence, the indices of its tokens in the flattened [G*L]"""

    def inputs(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Keyword arguments for a forward pass, without the cache."""
        return {
            "input_ids": self.input_ids.to(device),
            "attention_mask": self.attention_mask.to(device),
            "position_ids": self.position_ids.to(device),
        }

    def index(self, real: torch.Tensor) -> torch.Tensor:
        """[B, T] int64: for each column of the padded batch its index in the flattened [G*L]; 0 on padding.

        Args:
            real: [B, T] bool, True on the tokens of the B sequences.
        """
        places = torch.zeros_like(real, dtype=torch.long)
        places[real] = torch.tensor([place for path in self.places for place in path], device=real.device)
        return places


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of two sequences' common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _cut(ordered: Sequence[list[int]], kept: Sequence[int], limit: int) -> dict[int, int]:
    """The rows if none may have more than `limit` tokens: the sequence that starts each -> its number of tokens.

    Args:
        kept: how many tokens each sequence shares with the one before it.
    """
    lengths, first = {0: len(ordered[0])}, 0
    for n in range(1, len(ordered)):
        new = len(ordered[n]) - kept[n]
        if lengths[first] + new > limit:
            first = n
            lengths[n] = len(ordered[n])
        else:
            lengths[first] += new
    return lengths


def prefix_tree(
    sequences: Sequence[list[int]], row_tokens: int = ROW_TOKENS, worth: float = float("inf")
) -> PrefixTree | None:
    """Sorts the sequences, so that each shares most with the one before, and cuts them into rows of about equal length.

    Args:
        row_tokens: the most tokens per row, unless a single sequence is longer.
        worth: the most tokens that a tree may have, padding included; None is returned if it would have more.
    """
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    ordered = [sequences[i] for i in order]
    kept = [0, *(_shared(a, b) for a, b in pairwise(ordered))]

    def cut(limit: int) -> dict[int, int]:
        return _cut(ordered, kept, limit)

    longest = max(map(len, ordered))
    limits = range(longest, max(longest, row_tokens) + 1)
    fewest = len(cut(limits[-1]))
    rows = cut(limits[bisect.bisect_left(limits, True, key=lambda limit: len(cut(limit)) <= fewest)])
    length = max(rows.values())
    if len(rows) * length > worth:
        return None

    tokens: list[list[int]] = []
    depths: list[list[int]] = []
    paths: list[list[int]] = []  # for each sequence in order, the columns of its tokens
    of_row: list[int] = []
    for n, sequence in enumerate(ordered):
        if n in rows:
            tokens.append([])
            depths.append([])
        keep = 0 if n in rows else kept[n]
        start = len(tokens[-1])
        tokens[-1] += sequence[keep:]
        depths[-1] += range(keep, len(sequence))
        paths.append((paths[-1][:keep] if keep else []) + list(range(start, len(tokens[-1]))))
        of_row.append(len(tokens) - 1)

    attention_mask = torch.eye(length, dtype=torch.bool).repeat(len(tokens), 1, 1)
    places: list[list[int]] = [[] for _ in sequences]
    for i, row, path in zip(order, of_row, paths, strict=True):
        columns = torch.tensor(path, dtype=torch.long)
        attention_mask[row, columns[:, None], columns] = torch.ones(len(path), len(path), dtype=torch.bool).tril()
        places[i] = [row * length + column for column in path]

    def padded(values: list[list[int]]) -> torch.Tensor:
        return torch.tensor([row + [0] * (length - len(row)) for row in values])

    return PrefixTree(padded(tokens), padded(depths), attention_mask[:, None], places)


_HARMLESS = {"use_cache", "output_hidden_states", "return_dict", "num_items_in_batch"}
"""Keyword arguments with which a trunk can still run as a tree."""


def _as_tree(
    plain: Callable[..., Any],
    config: Any,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Runs `plain`, the trunk's own forward pass, over the batch's prefix tree if that is smaller, without a cache."""
    sequences = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    use_cache = kwargs.get("use_cache")
    if (
        (config.use_cache if use_cache is None else use_cache)
        or input_ids is None
        or len(input_ids) < 2
        or {name for name, value in kwargs.items() if value is not None and value is not False} - _HARMLESS
        or any(x is not None and x.shape != input_ids.shape for x in (attention_mask, position_ids))
    ):
        return plain(**sequences, **kwargs)
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    depth = real.cumsum(-1) - 1
    given = torch.arange(real.shape[1], device=real.device).expand_as(real) if position_ids is None else position_ids
    if not (given == depth)[real].all():
        return plain(**sequences, **kwargs)
    rows = [ids[mask].tolist() for ids, mask in zip(input_ids.cpu(), real.cpu(), strict=True)]
    tree = prefix_tree(rows, worth=WORTH_SHARING * input_ids.numel())
    if tree is None:
        return plain(**sequences, **kwargs)
    output = plain(**tree.inputs(input_ids.device), **kwargs)
    places = tree.index(real)

    def apart(hidden: torch.Tensor) -> torch.Tensor:
        return hidden.flatten(0, 1)[places]

    output.last_hidden_state = apart(output.last_hidden_state)
    if output.hidden_states is not None:
        output.hidden_states = tuple(map(apart, output.hidden_states))
    return output


def has_full_attention(config: Any) -> bool:
    """Whether every layer sees all tokens at any distance: no window, no recurrence."""
    may_have_windows = hasattr(config, "attention_layers") or hasattr(config, "attn_config")  # GPT-Neo, MPT
    return not may_have_windows and all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


@torch.no_grad()
def _runs_as_tree(trunk: Any) -> bool:
    """Whether the trunk gives the same results with a tree: checks its config, then makes a short trial."""
    config = trunk.config
    if (
        config._attn_implementation not in ("sdpa", PLAIN)  # others read other kinds of masks
        or not has_full_attention(config)
        or getattr(config, "output_router_logits", False)  # one row per token of the tree
    ):
        return False
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 6, 5], [1, 2, 6, 5, 4, 3]], device=trunk.device)
    ids = ids % config.vocab_size
    try:
        apart = trunk(input_ids=ids, use_cache=False).last_hidden_state.float()
        tree = _as_tree(trunk, config, input_ids=ids, use_cache=False).last_hidden_state.float()
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):  # it needs more than a mask
        return False
    tolerance = 1e-3 if next(trunk.parameters()).dtype == torch.float32 else 5e-2
    return bool((tree - apart).norm() <= tolerance * apart.norm())


@functools.cache
def _sharing(trunk: Any) -> Any:
    """A subclass of the trunk's class that runs batches as trees.

    A class and not a patched method: a copy of a model then runs its own weights, and an unused model is freed at once.
    """

    def forward(self, input_ids=None, *args, **kwargs):  # classifiers pass the ids as a positional argument
        plain = functools.partial(trunk.forward, self)
        if args:
            return plain(input_ids, *args, **kwargs)
        return _as_tree(plain, self.config, input_ids=input_ids, **kwargs)

    # transformers looks classes up by name
    names = {"__module__": trunk.__module__, "__qualname__": trunk.__qualname__}
    return type(trunk.__name__, (trunk,), names | {"forward": forward, "shares_prefixes": True})


def share_prefixes(model: Any) -> Any:
    """Makes the model's trunk run batches as prefix trees if that changes no value; returns the model."""
    trunk = model.base_model
    if not shares_prefixes(model) and _runs_as_tree(trunk):
        trunk.__class__ = _sharing(type(trunk))  # type: ignore[arg-type]  # a class can be hashed
    return model


def shares_prefixes(model: Any) -> bool:
    """Whether the model runs batches as prefix trees."""
    return getattr(model.base_model, "shares_prefixes", False)


def without_sharing(model: Any) -> Any:
    """Undoes `share_prefixes`, for comparisons."""
    if shares_prefixes(model):
        model.base_model.__class__ = type(model.base_model).__mro__[1]
    return model
