"""Log-probabilities, values and scores of responses. Logits are computed only where there are responses."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tunetrail.models.batching import Batch, collate, token_batches
from tunetrail.models.head import head_logprobs, head_weight


def gather_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log softmax(logits)[tokens]: [B, R, V] and [B, R] -> [B, R], without keeping a second [B, R, V]."""
    return logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)


def response_logprobs(model: Any, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
    """[B, R] float32: log-prob of each response token, 0 on padding."""
    return policy_pass(model, batch, temperature)[0]


def comparable_logprobs(model: Any, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
    """`response_logprobs`, but a plain head runs in float32 even under autocast. Use it without gradients.

    For log-probs that are compared across batches: bf16 logits differ between batch shapes.
    """
    weight, mask = head_weight(model), batch.response_mask
    if weight is None:
        return response_logprobs(model, batch, temperature)
    hidden = trunk_of(model)(**batch.inputs).last_hidden_state[:, -mask.shape[1] - 1 : -1][mask]
    with torch.autocast(hidden.device.type, enabled=False):
        flat, _ = head_logprobs(hidden.float(), weight.float(), batch.responses[mask], temperature)
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


def trunk_of(model: Any) -> Any:
    """The causal language model without its head, with or without an adapter."""
    return (model.get_base_model() if hasattr(model, "peft_config") else model).base_model


def policy_pass(
    model: Any, batch: Batch, temperature: float, entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Runs a causal language model over a batch once.

    Args:
        temperature: the sampling temperature, by which logits are divided.
        entropy: also compute the distributions' entropies; with gradients this keeps [B, R, V] in memory.

    Returns:
        the log-prob of each response token, [B, R] float32, 0 on padding; the entropies in the same form, or None; the
        last hidden state that predicts each response token, [B, R, d].
    """
    r, mask, tokens = batch.response_mask.shape[1], batch.response_mask, batch.responses
    weight = None if entropy and torch.is_grad_enabled() else head_weight(model)
    if weight is None:
        output = model(**batch.inputs, logits_to_keep=r + 1, output_hidden_states=True)
        hidden, logits = output.hidden_states[-1][:, -r - 1 : -1], output.logits[:, :-1].float() / temperature
        logprobs = gather_logprobs(logits, tokens).masked_fill(~mask, 0.0)
        if not entropy:
            return logprobs, None, hidden
        log_p = logits.log_softmax(-1)
        return logprobs, -(log_p.exp() * log_p).sum(-1).masked_fill(~mask, 0.0), hidden
    hidden = trunk_of(model)(**batch.inputs).last_hidden_state[:, -r - 1 : -1]
    # Real tokens only: if few responses are long, most columns are padding.
    flat, entropies = head_logprobs(hidden[mask], weight, tokens[mask], temperature, entropy)
    empty = flat.new_zeros(mask.shape)
    return (
        empty.masked_scatter(mask, flat),
        None if entropies is None else empty.masked_scatter(mask, entropies),
        hidden,
    )


# Tokens per forward pass without gradients: on a CPU, few enough for the activations to stay in its cache.
SCORING_TOKENS = 4096 if torch.cuda.is_available() else 2048


class FullPrecisionHead(torch.nn.Linear):
    """A linear head that stays in float32 under autocast: with bf16's 8 bits, close scores would tie."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return torch.nn.functional.linear(x.float(), self.weight, self.bias)


def head_and_trunk(classifier: Any) -> tuple[Any, Any]:
    """(score head, trunk) of a sequence-classification model, with or without an adapter."""
    model = classifier.get_base_model() if hasattr(classifier, "peft_config") else classifier
    return model.score, model.base_model


def response_values(critic: Any, batch: Batch) -> torch.Tensor:
    """[B, R] float32: value of the state before each response token, from a sequence-classification model.

    A critic that starts from a reward model with mean pooling applies its head to each of the states that the reward
    model pools, so the mean of their values is the score.
    """
    head, trunk = head_and_trunk(critic)
    hidden = trunk(**batch.inputs).last_hidden_state
    r = batch.response_mask.shape[1]
    bias = getattr(critic.config, "reward_bias", 0.0)
    return head(hidden[:, -r - 1 : -1])[..., 0].float() - bias


def pooled_states(hidden: torch.Tensor, batch: Batch, pooling: str) -> torch.Tensor:
    """[B, P+R, d] -> [B, d]: the state of each sequence's last token, or the mean over its response in float32.

    The last token is EOS if the response is finished (Stiennon et al. 2020).
    """
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), batch.ends]
    mask = batch.response_mask[..., None]
    states = hidden[:, hidden.shape[1] - mask.shape[1] :].float().masked_fill(~mask, 0.0)
    return states.sum(1) / mask.sum(1)


def reward_pooling(reward_model: Any) -> str:
    """How the model's states are pooled: `last` or `mean` if its config says so, as a run's models do, else `last`."""
    return getattr(reward_model.config, "reward_pooling", "last")


def sequence_scores(reward_model: Any, batch: Batch) -> torch.Tensor:
    """[B] float32: the reward model's score of each sequence's pooled state, less its bias."""
    head, trunk = head_and_trunk(reward_model)
    hidden = trunk(**batch.inputs).last_hidden_state
    scores = head(pooled_states(hidden, batch, reward_pooling(reward_model)))[:, 0].float()
    return scores - getattr(reward_model.config, "reward_bias", 0.0)


@torch.no_grad()
def map_batches(
    function: Callable[[Batch], torch.Tensor],
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    pad_id: int,
    device: torch.device,
    max_tokens: int | None = None,
) -> list[torch.Tensor]:
    """Applies `function` to batches of similar length; returns one row of its result per sequence, in order.

    Args:
        function: Batch -> [B] or [B, R]; rows of the latter are cut to the length of their response.
        max_tokens: the most tokens per batch; None: SCORING_TOKENS.
    """
    results: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
    for rows in token_batches(prompts, responses, max_tokens or SCORING_TOKENS):
        batch = collate([prompts[i] for i in rows], [responses[i] for i in rows], pad_id).to(device)
        for i, row in zip(rows, function(batch).cpu(), strict=True):
            results[i] = row[: len(responses[i])] if row.dim() else row
    return results
