"""Batches of prompts and responses: prompts are padded on the left, responses on the right.

So all responses of a batch start in the same column, only the last `R + 1` positions need logits, and masks never have
to be derived from `ids != pad`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

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

    @property
    def responses(self) -> torch.Tensor:
        """[B, R] int64"""
        return self.input_ids[:, self.input_ids.shape[1] - self.response_mask.shape[1] :]

    @property
    def position_ids(self) -> torch.Tensor:
        """[B, P+R] int64: each token's position among the real tokens, so padding shifts nothing."""
        return (self.attention_mask.cumsum(-1) - 1).clamp_min(0)

    @property
    def inputs(self) -> dict[str, Any]:
        """Keyword arguments for a forward pass."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            "use_cache": False,
        }

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
    """Token ids of a rendered prompt, whose text already contains the special tokens."""
    return tokenizer(prompt, add_special_tokens=False)["input_ids"]


def encode_response(tokenizer: PreTrainedTokenizerBase, text: str, finished: bool = True) -> list[int]:
    """Token ids of a response, ending with EOS unless it was cut off.

    Prompt and response are always tokenized separately, so the boundary between them is the same in training, sampling
    and scoring.
    """
    return encode(tokenizer, text) + ([tokenizer.eos_token_id] if finished else [])


def encode_comparison(tokenizer: PreTrainedTokenizerBase, row: dict) -> tuple[list[int], list[list[int]]]:
    """Token ids of a comparison row's prompt and of its K responses.

    Sampled responses keep the ids they were sampled with; responses that came as text are encoded.
    """
    responses = row.get("completion_ids") or [
        encode_response(tokenizer, text, ended) for text, ended in zip(row["completions"], row["finished"], strict=True)
    ]
    return encode(tokenizer, row["prompt"]), responses


def collate(prompts: Sequence[list[int]], responses: Sequence[list[int]], pad_id: int) -> Batch:
    """Pads B prompts on the left and their responses on the right."""
    p, r = max(map(len, prompts)), max(map(len, responses))
    input_ids = torch.full((len(prompts), p + r), pad_id)
    attention_mask = torch.zeros((len(prompts), p + r), dtype=torch.long)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        input_ids[i, p - len(prompt) : p + len(response)] = torch.tensor(prompt + response)
        attention_mask[i, p - len(prompt) : p + len(response)] = 1
    return Batch(input_ids, attention_mask, attention_mask[:, p:].bool())


def token_batches(prompts: Sequence[list[int]], responses: Sequence[list[int]], max_tokens: int) -> Iterator[list[int]]:
    """Yields indices in batches of similar length, each at most `max_tokens` after padding (at least one sequence).

    Responses to the same prompt are adjacent, so they can share it if they fall into one batch (`models.tree`).
    """
    batch: list[int] = []
    longest_response = 0
    for i in sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i], len(responses[i]), i)):
        longest_response = max(longest_response, len(responses[i]))
        if batch and (len(batch) + 1) * (len(prompts[i]) + longest_response) > max_tokens:
            yield batch
            batch, longest_response = [], len(responses[i])
        batch.append(i)
    if batch:
        yield batch
