"""What a language model thinks of given texts: losses, log-probs, next-token probabilities, distance to another."""

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
    """`map_batches` of (prompt ids, response ids) in this precision."""

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
    """The distributions that predict each response token of a batch, row by row: chunks [n, V] float32.

    The head is computed in float32 where it is a plain one: bf16 logits would add a distance of their own.
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
    """Of each response that `model` sampled the KL of model to reference along it, in nats.

    At every step the whole next-token distributions are compared, instead of the two log-probs of the token that was
    drawn: the Rao-Blackwellised estimate (Amini, Vieira and Cotterell 2025). It has the same mean over responses and
    never more variance; it is 0 for equal models, since both are scored by the same pass; and unlike exp(-d) - 1 + d
    no single token can dominate it.
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
    """Nats a token of each response, which has a token at least."""
    rows = logprobs_of(model, examples, pad_id, precision, max_tokens=max_tokens)
    return [-row.mean().item() for row in rows]


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
                    {"id": token, "token": tokenizer.decode([token]), "prob": prob}
                    for prob, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
                ],
            }
        )
    return rows


def right_choices(
    model: Any, questions: list[dict], pad_id: int, precision: str, max_tokens: int | None = None
) -> list[bool]:
    """Whether the question makes the answer likelier than it makes the other choices, of each multiple-choice question.

    log p(choice | prompt) - log p(choice | neutral prompt) (Holtzman et al. 2021): the likelihood alone prefers what is
    short or common, whatever was asked.

    Args:
        questions: with "prompt_ids", "neutral_ids", "choices" (token ids of each) and "answer", an index.
    """
    asked = [(row["prompt_ids"], choice) for row in questions for choice in row["choices"]]
    bare = dict.fromkeys((tuple(row["neutral_ids"]), tuple(choice)) for row in questions for choice in row["choices"])
    examples = asked + [(list(prompt), list(choice)) for prompt, choice in bare]
    logps = [float(row.sum()) for row in logprobs_of(model, examples, pad_id, precision, max_tokens=max_tokens)]
    given, unasked = iter(logps), dict(zip(bare, logps[len(asked) :], strict=True))
    found = []
    for row in questions:
        gains = [next(given) - unasked[tuple(row["neutral_ids"]), tuple(choice)] for choice in row["choices"]]
        found.append(gains.index(max(gains)) == row["answer"])
    return found
