"""Episodes: responses of the current policy, with everything that the update needs to know about them."""

from dataclasses import dataclass, fields
from typing import Any

import torch

from tunetrail.models.batching import Batch, collate


@dataclass
class Rollout:
    """N episodes of up to R response tokens."""

    prompts: list[list[int]]
    responses: list[list[int]]
    logprobs: torch.Tensor
    """[N, R], by the policy that sampled"""
    ref_logprobs: torch.Tensor
    """[N, R]"""
    values: torch.Tensor
    """[N, R]"""
    entropy: torch.Tensor
    """[N, R]"""
    scores: torch.Tensor
    """[N], the reward of each episode: the weighted sum of `terms`"""
    terms: torch.Tensor
    """[N, T], the scores that the reward consists of, in the order of the config"""
    finished: torch.Tensor
    """[N] bool: ends with EOS"""
    gold: torch.Tensor
    """[N], by the gold scorer, which is not trained on; [0] if there is none"""

    @property
    def lengths(self) -> torch.Tensor:
        """[N] int64: response tokens."""
        return torch.tensor([len(r) for r in self.responses])

    @property
    def mask(self) -> torch.Tensor:
        """[N, R] bool"""
        return torch.arange(self.logprobs.shape[1])[None] < self.lengths[:, None]

    @property
    def kl(self) -> torch.Tensor:
        """[N, R]: log-prob of the policy less that of the reference, nats; 0 on padding."""
        return (self.logprobs - self.ref_logprobs) * self.mask

    def batch(self, rows: list[int], pad_id: int) -> Batch:
        return collate([self.prompts[i] for i in rows], [self.responses[i] for i in rows], pad_id)


def pad_rows(rows: list[torch.Tensor]) -> torch.Tensor:
    """N tensors of various lengths -> [N, longest], padded with 0."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def concatenate(parts: list[Rollout]) -> Rollout:
    """The episodes of all processes, in the order of their ranks."""
    merged: dict[str, Any] = {}
    for f in fields(Rollout):
        values = [getattr(part, f.name) for part in parts]
        if isinstance(values[0], list):
            merged[f.name] = [item for value in values for item in value]
        elif values[0].dim() == 2:
            merged[f.name] = pad_rows([row for value in values for row in value])
        else:
            merged[f.name] = torch.cat(values)
    return Rollout(**merged)
