"""Batches of prompt and response: prompts padded on the left, responses on the right.

So every response starts in the same column, the last `R + 1` positions are all that need logits, and
nothing is ever read off `ids != pad`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from transformers import PreTrainedTokenizerBase


@dataclass
class Batch:
    """B sequences of P prompt columns and R response columns."""

    input_ids: torch.Tensor
    """[B, P+R] int64"""
    attention_mask: torch.Tensor
    """[B, P+R] int64, 1 on real tokens"""
    response_mask: torch.Tensor
    """[B, R] bool, True on real response tokens"""
    common_start: int = 0
    """tokens that all prompts begin with; 0 for a single sequence, and less than the shortest prompt"""

    @property
    def responses(self) -> torch.Tensor:
        """[B, R] int64"""
        return self.input_ids[:, self.input_ids.shape[1] - self.response_mask.shape[1] :]

    @property
    def position_ids(self) -> torch.Tensor:
        """[B, P+R] int64: the place among the real tokens, so that padding does not shift anything."""
        return (self.attention_mask.cumsum(-1) - 1).clamp_min(0)

    @property
    def ends(self) -> torch.Tensor:
        """[B] int64: the column of each sequence's last real token."""
        return self.attention_mask.shape[1] - 1 - self.attention_mask.flip(-1).argmax(-1)

    def to(self, device: torch.device) -> "Batch":
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            response_mask=self.response_mask.to(device),
        )


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a rendered prompt (its special tokens are already in the text)."""
    return tokenizer(prompt, add_special_tokens=False)["input_ids"]


def encode_response(tokenizer: PreTrainedTokenizerBase, text: str, finished: bool = True) -> list[int]:
    """Token ids of a response, closed by EOS unless it was cut off.

    Prompt and response are always tokenized apart, so that the border between them is the same in
    training, sampling and scoring.
    """
    return encode(tokenizer, text) + ([tokenizer.eos_token_id] if finished else [])


def encode_comparison(tokenizer: PreTrainedTokenizerBase, row: dict) -> tuple[list[int], list[list[int]]]:
    """Token ids of a comparison row: its prompt, and its K responses."""
    responses = [
        encode_response(tokenizer, text, ended) for text, ended in zip(row["completions"], row["finished"], strict=True)
    ]
    return encode(tokenizer, row["prompt"]), responses


def collate(prompts: Sequence[list[int]], responses: Sequence[list[int]], pad_id: int) -> Batch:
    """Pads B prompts (left) and responses (right)."""
    p, r = max(map(len, prompts)), max(map(len, responses))
    input_ids = torch.full((len(prompts), p + r), pad_id)
    attention_mask = torch.zeros((len(prompts), p + r), dtype=torch.long)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        input_ids[i, p - len(prompt) : p + len(response)] = torch.tensor(prompt + response)
        attention_mask[i, p - len(prompt) : p + len(response)] = 1
    same = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False)))
    common_start = max(0, min(same, min(map(len, prompts)) - 1)) if len(prompts) > 1 else 0
    return Batch(input_ids, attention_mask, attention_mask[:, p:].bool(), common_start)


def pack(prompts: Sequence[list[int]], responses: Sequence[list[list[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """One row a prompt, followed by all its responses, each of which sees the prompt and itself but no other.

    So the prompt's tokens are computed once and not K times. Every token keeps the position it would
    have in a sequence of its own.

    Args:
        prompts: B of them.
        responses: for each prompt its own number of responses; N in all.

    Returns:
        input_ids, position_ids [B, L] int64; attention_mask [B, 1, L, L] bool, True where token i sees
        token j (padding sees the prompt: attention to nothing is NaN); rows, ends [N] int64, where the
        last token of each response is.
    """
    length = max(len(p) + sum(map(len, rs)) for p, rs in zip(prompts, responses, strict=True))
    input_ids = torch.full((len(prompts), length), pad_id)
    position_ids = torch.zeros((len(prompts), length), dtype=torch.long)
    part = torch.full((len(prompts), length), -1)  # 0: prompt, k: k-th response, -1: padding
    rows, ends = [], []
    for b, (prompt, answers) in enumerate(zip(prompts, responses, strict=True)):
        end = 0
        for k, tokens in enumerate([prompt, *answers]):
            start, end = end, end + len(tokens)
            input_ids[b, start:end] = torch.tensor(tokens)
            position_ids[b, start:end] = torch.arange(len(tokens)) + (len(prompt) if k else 0)
            part[b, start:end] = k
            if k:
                rows.append(b)
                ends.append(end - 1 if tokens else len(prompt) - 1)
    ours, theirs = part[:, :, None], part[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    attention_mask = causal & ((theirs == 0) | ((theirs == ours) & (theirs > 0)))
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "attention_mask": attention_mask[:, None],
        "rows": torch.tensor(rows),
        "ends": torch.tensor(ends),
    }


def token_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, each at most `max_tokens` after padding (at least one sequence)."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[i] > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
