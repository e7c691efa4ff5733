"""K-wise training (Ouyang et al. 2022): one loss over all pairs of a prompt's K responses, with K forward passes."""

from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase, Trainer

from tunetrail.models.batching import Batch, collate, encode_comparison
from tunetrail.models.lengths import check_lengths
from tunetrail.models.loading import with_full_precision_head
from tunetrail.models.scoring import head_and_trunk, pooled_states, reward_pooling
from tunetrail.models.weights import weight_of
from tunetrail.preferences.pairs import preference_targets


def kwise_loss(scores: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropies of all C(K,2) pairs of a prompt, divided by C(K,2) (Ouyang et al. 2022, eq. 1).

    With a target of 1 for the preferred response this is -log sigmoid(r_w - r_l). Ties have a target of one half, and
    the targets of several labelers are averaged.

    Args:
        scores: [B, K].
        targets: [B, K, K], the share of labelers who ranked i above j.
        mask: [B, K] bool, False where a prompt has fewer than K completions.

    Returns:
        scalar, the mean over prompts.
    """
    margins = scores[:, :, None] - scores[:, None, :]
    losses = torch.nn.functional.binary_cross_entropy_with_logits(margins, targets.to(margins), reduction="none")
    k = scores.shape[1]
    pairs = torch.ones(k, k, dtype=torch.bool, device=scores.device).triu(1) & mask[:, :, None] & mask[:, None, :]
    return ((losses * pairs).sum((1, 2)) / pairs.sum((1, 2))).mean()


def tokenize(rows: list[dict], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict]:
    """Comparison rows -> {prompt, responses, targets}. Raises DataError if one is longer than `max_length`."""
    examples: list[dict] = []
    lengths: list[tuple[str, int]] = []
    for row in rows:
        prompt, responses = encode_comparison(tokenizer, row)
        lengths.append((row["id"], len(prompt) + max(map(len, responses))))
        examples.append(
            {"prompt": prompt, "responses": responses, "targets": preference_targets(row["rankings"]).tolist()}
            | weight_of(row)
        )
    check_lengths("reward", lengths, max_length)
    return examples


class KWiseCollator:
    """Collates B prompts into one batch of all their N sequences, with targets [B, K, K] and a mask [B, K]."""

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        responses = [e["responses"] for e in examples]
        prompts = [e["prompt"] for e in examples for _ in e["responses"]]
        batch = collate(prompts, [r for k in responses for r in k], self.pad_id)
        k = max(map(len, responses))
        targets = torch.full((len(examples), k, k), 0.5)
        mask = torch.zeros(len(examples), k, dtype=torch.bool)
        for i, example in enumerate(examples):
            n = len(example["responses"])
            targets[i, :n, :n] = torch.tensor(example["targets"])
            mask[i, :n] = True
        return {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "response_mask": batch.response_mask,
            "targets": targets,
            "mask": mask,
        }


def kwise_scores(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """[B, K] float32: the score of each sequence's pooled state, 0 where a prompt has fewer than K completions."""
    batch = Batch(inputs["input_ids"], inputs["attention_mask"], inputs["response_mask"])
    hidden = model(**batch.inputs, output_hidden_states=True).hidden_states[-1]
    classifier = extract_model_from_parallel(model)
    head, _ = head_and_trunk(classifier)
    flat = head(pooled_states(hidden, batch, reward_pooling(classifier)))[:, 0].float()
    return flat.new_zeros(inputs["mask"].shape).masked_scatter(inputs["mask"], flat)


class KWiseTrainer(Trainer):
    """transformers' Trainer with the K-wise loss and, optionally, a separate learning rate for the head."""

    def __init__(self, *args: Any, head_learning_rate: float | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.head_learning_rate = head_learning_rate

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.head_learning_rate is not None:
            head, _ = head_and_trunk(self.model)
            own = {id(p) for p in head.parameters() if p.requires_grad}
            for group in list(optimizer.param_groups):
                moved = [p for p in group["params"] if id(p) in own]
                group["params"] = [p for p in group["params"] if id(p) not in own]
                if moved:
                    optimizer.add_param_group(group | {"params": moved, "lr": self.head_learning_rate})
        return optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        scores = kwise_scores(model, inputs)
        loss = kwise_loss(scores, inputs["targets"], inputs["mask"])
        return (loss, scores) if return_outputs else loss


def initialise(causal_lm: Any, seed: int, pooling: str = "last", head: np.ndarray | None = None) -> Any:
    """A sequence-classification model on the language model's trunk.

    Args:
        pooling: what the score is read from, see `models.scoring.pooled_states`; kept in the config.
        head: [d], the initial head; None: random with standard deviation 1/sqrt(d+1) (Stiennon et al. 2020).
    """
    config = causal_lm.config
    config.num_labels = 1
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    model.base_model.load_state_dict(causal_lm.base_model.state_dict())
    model.config.reward_pooling = pooling
    torch.nn.init.normal_(model.score.weight, std=(config.hidden_size + 1) ** -0.5)
    if head is not None:
        model.score.weight.data[0] = torch.from_numpy(head)
    return with_full_precision_head(model)
