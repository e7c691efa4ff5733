"""Measures of a language model on given texts: losses, log-probs, next-token probabilities, KL to another model."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from tunetrail.models.batching import Batch
from tunetrail.models.head import SCORED_AT_ONCE, head_weight
from tunetrail.models.runtime import autocast, device
from tunetrail.models.scoring import comparable_logprobs, map_batches, sequence_scores


def _over(
    function: Callable[[Batch], torch.Tensor],
    examples: list[tuple[list[int], list[int]]],
    pad_id: int,
    precision: str,
    max_tokens: int | None,
) -> list[torch.Tensor]:
    """`map_batches` over (prompt ids, response ids) in this precision."""

    def in_precision(batch: Batch) -> torch.Tensor:
        with autocast(precision):
            return function(batch)

    prompts, responses = [p for p, _ in examples], [r for _, r in examples]
    return map_batches(in_precision, prompts, responses, pad_id, device(), max_tokens)


def logprobs_of(
    model: Any,
    examples: list[tuple[list[int], list[int]]],
    pad_id: int,
    precision: str,
    temperature: float = 1.0,
    max_tokens: int | None = None,
) -> list[torch.Tensor]:
    """Log-prob of each response token of each (prompt ids, response ids)."""
    return _over(lambda batch: comparable_logprobs(model, batch, temperature), examples, pad_id, precision, max_tokens)


def reward_scores(
    reward_model: Any,
    examples: list[tuple[list[int], list[int]]],
    pad_id: int,
    precision: str,
    max_tokens: int | None = None,
) -> list[float]:
    """The reward model's score of each (prompt ids, response ids)."""
    scores = _over(lambda batch: sequence_scores(reward_model, batch), examples, pad_id, precision, max_tokens)
    return [float(score) for score in scores]


def next_token_log_probs(model: Any, batch: Batch, temperature: float) -> Iterator[torch.Tensor]:
    """Yields the log-probs that predict each response token of a batch, row by row, in chunks [n, V] float32.

    A plain head is computed in float32: the rounding of bf16 logits would add to the distance between models.
    """
    r, mask, weight = batch.response_mask.shape[1], batch.response_mask, head_weight(model)
    if weight is None:
        parts = model(**batch.inputs, logits_to_keep=r + 1).logits[:, :-1][mask].split(SCORED_AT_ONCE)
    else:
        parts = model.base_model(**batch.inputs).last_hidden_state[:, -r - 1 : -1][mask].split(SCORED_AT_ONCE)
    for part in parts:
        with torch.autocast(part.device.type, enabled=False):
            logits = part.float() if weight is None else part.float() @ weight.float().T
        yield (logits / temperature).log_softmax(-1)


def kl_divergences(
    model: Any,
    reference: Any,
    examples: list[tuple[list[int], list[int]]],
    pad_id: int,
    precision: str,
    temperature: float = 1.0,
    max_tokens: int | None = None,
) -> list[float]:
    """For each response that `model` sampled, the KL from model to reference along it, in nats.

    At every step whole next-token distributions are compared, not just the two log-probs of the sampled token: the
    Rao-Blackwellised estimate (Amini, Vieira and Cotterell 2025). It has the same mean over responses and never more
    variance; it is 0 for equal models, since both are scored in the same way; and unlike with exp(-d) - 1 + d no single
    token can dominate it.
    """

    def divergence(batch: Batch) -> torch.Tensor:
        pairs = zip(*(next_token_log_probs(m, batch, temperature) for m in (model, reference)), strict=True)
        flat = torch.cat([(ours.exp() * (ours - theirs)).sum(-1) for ours, theirs in pairs])
        return flat.new_zeros(batch.response_mask.shape).masked_scatter(batch.response_mask, flat)

    return [max(0.0, float(row.sum())) for row in _over(divergence, examples, pad_id, precision, max_tokens)]


def mean_nlls(
    model: Any,
    examples: list[tuple[list[int], list[int]]],
    pad_id: int,
    precision: str,
    max_tokens: int | None = None,
) -> list[float]:
    """The mean loss of each response in nats per token; responses must not be empty."""
    rows = logprobs_of(model, examples, pad_id, precision, max_tokens=max_tokens)
    return [-row.mean().item() for row in rows]


@torch.no_grad()
def sentence_probe(model: Any, tokenizer: Any, sentence: str, top: int = 50) -> list[dict]:
    """For each token of a sentence, its probability given the tokens before it, and the likeliest tokens there.

    In full precision: a number that people read should not depend on the hardware. The `prob` of the first token is
    None, since nothing precedes it.
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
                    {"id": token, "token": tokenizer.decode([token]), "prob": prob}
                    for prob, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
                ],
            }
        )
    return rows


def right_choices(
    model: Any, questions: list[dict], pad_id: int, precision: str, max_tokens: int | None = None
) -> list[bool]:
    """For each multiple-choice question, whether the model chooses the right answer.

    It chooses by log p(choice | prompt) - log p(choice | neutral prompt) (Holtzman et al. 2021): the likelihood alone
    would favour short or common texts, whatever the question.

    Args:
        questions: with "prompt_ids", "neutral_ids", "choices" (token ids of each) and "answer" (an index).
    """
    asked = [(row["prompt_ids"], choice) for row in questions for choice in row["choices"]]
    bare = dict.fromkeys((tuple(row["neutral_ids"]), tuple(choice)) for row in questions for choice in row["choices"])
    examples = asked + [(list(prompt), list(choice)) for prompt, choice in bare]
    logps = [float(row.sum()) for row in logprobs_of(model, examples, pad_id, precision, max_tokens=max_tokens)]
    given_prompt, given_neutral = iter(logps), dict(zip(bare, logps[len(asked) :], strict=True))
    correct = []
    for row in questions:
        gains = [
            next(given_prompt) - given_neutral[tuple(row["neutral_ids"]), tuple(choice)] for choice in row["choices"]
        ]
        correct.append(gains.index(max(gains)) == row["answer"])
    return correct
