"""What a language model thinks of given texts: losses, log-probs, next-token probabilities."""

from typing import Any

import torch

from tunetrail.models.batching import Batch
from tunetrail.models.scoring import map_batches, response_logprobs, sequence_scores
from tunetrail.runtime import autocast, device


def logprobs_of(
    model: Any,
    examples: list[tuple[list[int], list[int]]],
    pad_id: int,
    precision: str,
    temperature: float = 1.0,
    max_tokens: int | None = None,
) -> list[torch.Tensor]:
    """Log-prob of each response token of each (prompt ids, response ids)."""

    def function(batch: Batch) -> torch.Tensor:
        with autocast(precision):
            return response_logprobs(model, batch, temperature)

    prompts, responses = [p for p, _ in examples], [r for _, r in examples]
    return map_batches(function, prompts, responses, pad_id, device(), max_tokens)


def reward_scores(
    reward_model: Any,
    examples: list[tuple[list[int], list[int]]],
    pad_id: int,
    precision: str,
    max_tokens: int | None = None,
) -> list[float]:
    """The reward model's score of each (prompt ids, response ids)."""

    def function(batch: Batch) -> torch.Tensor:
        with autocast(precision):
            return sequence_scores(reward_model, batch)

    prompts, responses = [p for p, _ in examples], [r for _, r in examples]
    return [float(score) for score in map_batches(function, prompts, responses, pad_id, device(), max_tokens)]


def mean_nlls(
    model: Any,
    examples: list[tuple[list[int], list[int]]],
    pad_id: int,
    precision: str,
    max_tokens: int | None = None,
) -> list[float]:
    """Nats a token of each response."""
    rows = logprobs_of(model, examples, pad_id, precision, max_tokens=max_tokens)
    return [-row.mean().item() if len(row) else 0.0 for row in rows]


@torch.no_grad()
def sentence_probe(model: Any, tokenizer: Any, sentence: str, top: int = 50) -> list[dict]:
    """For each token of a sentence: its probability given what stands before it, and the likeliest next tokens.

    In full precision: a figure that people read should not depend on the hardware. The first token has
    nothing before it: its `prob` is None.
    """
    ids = tokenizer(sentence)["input_ids"]
    probs = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0].float().softmax(-1).cpu()
    rows: list[dict] = [{"position": 0, "token": tokenizer.decode([ids[0]]), "prob": None, "top": []}]
    for position in range(1, len(ids)):
        best = probs[position - 1].topk(min(top, probs.shape[-1]))
        rows.append(
            {
                "position": position,
                "token": tokenizer.decode([ids[position]]),
                "prob": probs[position - 1, ids[position]].item(),
                "top": [
                    {"token": tokenizer.decode([token]), "prob": prob}
                    for prob, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
                ],
            }
        )
    return rows
