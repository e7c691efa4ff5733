"""The reward model: K-wise loss over all pairs of a prompt, one forward pass of K sequences.

    python -m tunetrail.stages.reward --config C.json --input policy=… --input data=… --input comparisons=… --output … --state …

Initialised from the SFT model; head N(0, 1/(d+1)) without bias (Stiennon et al. 2020); scored at the
last token; the mean score of demonstrations is subtracted (`reward_bias` in the model's config).
Evaluated on held-out prompts, beside "the longer wins".

Writes `model/`, `history.jsonl` and `pairs.jsonl` (the held-out pairs behind every number). Of metrics.json:

    accuracy, accuracy_longer_wins, accuracy_by_labeler.<name>, accuracy_by_source.<source>
                  interval {"mean", "low", "high", "n"} over prompts
    accuracy_by_confidence
                  the reliability diagram: [{"low", "high": of the bin, "confidence", "accuracy", "accuracy_low",
                  "accuracy_high": 95%, "n"}]
    ece           expected calibration error, which is too high where pairs are few; ece_interval {"mean", "low",
                  "high", "n"}, 95% at least, reaches 0 where nothing speaks against calibration
    ceiling       what labelers' agreement allows: {"labelers", "agreement": interval, how often two labelers who
                  both decide on a pair agree, "majority": interval, how often a labeler agrees with the majority of
                  the others, "allowed": interval, the accuracy of a model without error, if labelers err
                  independently and equally often; null where they agree on fewer than half}; null with one labeler
    length_correlation, length_correlation_of_margins
                  Spearman's, of scores with length and of margins with the difference in length
"""

import sys
from itertools import combinations
from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase, Trainer, TrainingArguments

from tunetrail.config.training import RewardConfig
from tunetrail.contract.distributed import is_main_process
from tunetrail.contract.stage import Stage
from tunetrail.errors import DataError
from tunetrail.evaluation.models import reward_scores
from tunetrail.evaluation.stats import bootstrap, bootstrap_of, expected_calibration_error, spearman
from tunetrail.files import write_jsonl
from tunetrail.models.batching import collate, encode, encode_comparison, encode_response
from tunetrail.models.loading import (
    copy_tokenizer,
    load_causal_lm,
    load_tokenizer,
    trained_parameters,
    training_flops,
    with_full_precision_head,
    with_lora,
)
from tunetrail.models.runtime import prepare
from tunetrail.models.scoring import head_and_trunk
from tunetrail.models.training import epoch_order, train, trainer_arguments
from tunetrail.preferences.pairs import decided_pairs, preference_targets
from tunetrail.preferences.ranks import agreements, pair_outcomes
from tunetrail.seeds import derive_seed
from tunetrail.stages.registry import start

BIAS_DEMONSTRATIONS = 128
"""Demonstrations whose mean score becomes 0."""


def kwise_loss(scores: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of all C(K,2) pairs of each prompt, divided by C(K,2) (Ouyang et al. 2022, eq. 1).

    With a target of 1 for the preferred one this is -log sigmoid(r_w - r_l); a tie is a target of one
    half, and several labelers' verdicts are averaged.

    Args:
        scores: [B, K].
        targets: [B, K, K], the share of labelers that put i above j.
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
    """Comparison rows -> {prompt, responses, targets}. Raises DataError for one longer than `max_length`."""
    examples = []
    for row in rows:
        prompt, responses = encode_comparison(tokenizer, row)
        if (longest := len(prompt) + max(map(len, responses))) > max_length:
            raise DataError(
                f"reward: comparison {row['id']} has {longest} tokens; raise reward.max_length ({max_length}) or drop the row"
            )
        examples.append(
            {"prompt": prompt, "responses": responses, "targets": preference_targets(row["rankings"]).tolist()}
        )
    return examples


class KWiseCollator:
    """B prompts -> one batch of all their N sequences, with [B, K, K] targets and a [B, K] mask."""

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
            "position_ids": batch.position_ids,
            "ends": batch.ends,
            "targets": targets,
            "mask": mask,
        }


def kwise_scores(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """[B, K] float32: the score at each sequence's last token, 0 where a prompt has fewer than K completions."""
    hidden = model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        position_ids=inputs["position_ids"],
        use_cache=False,
        output_hidden_states=True,
    ).hidden_states[-1]
    head, _ = head_and_trunk(extract_model_from_parallel(model))
    flat = head(hidden[torch.arange(len(hidden), device=hidden.device), inputs["ends"]])[:, 0].float()
    return flat.new_zeros(inputs["mask"].shape).masked_scatter(inputs["mask"], flat)


class KWiseTrainer(Trainer):
    """transformers' Trainer with the K-wise loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        scores = kwise_scores(model, inputs)
        loss = kwise_loss(scores, inputs["targets"], inputs["mask"])
        return (loss, scores) if return_outputs else loss


def initialise(causal_lm: Any, seed: int) -> Any:
    """A sequence-classification model on the language model's trunk; head N(0, 1/sqrt(d+1)) as standard deviation."""
    config = causal_lm.config
    config.num_labels = 1
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    model.base_model.load_state_dict(causal_lm.base_model.state_dict())
    torch.nn.init.normal_(model.score.weight, std=(config.hidden_size + 1) ** -0.5)
    return with_full_precision_head(model)


def heldout_pairs(rows: list[dict], scores: list[np.ndarray], sources: dict[str, str]) -> list[dict]:
    """One row for each pair each labeler decided: who won, by how much the model agrees, who is longer.

    Args:
        sources: row id -> which of the data's sources it came from.
    """
    pairs = []
    for row, score in zip(rows, scores, strict=True):
        for ranking in row["rankings"]:
            for winner, loser in decided_pairs(preference_targets([ranking])):
                margin = float(score[winner] - score[loser])
                longer = len(row["completions"][winner]) - len(row["completions"][loser])
                pairs.append(
                    {
                        "id": row["id"],
                        "group": row["group"],
                        "source": sources[row["id"]],
                        "labeler": ranking["labeler"],
                        "margin": margin,
                        "longer": longer,
                    }
                )
    return pairs


def accuracy(pairs: list[dict], key: str, seed: int) -> dict | None:
    """Share of pairs where `key` is positive (zero counts one half), resampling whole prompts."""
    values = np.array([0.5 if pair[key] == 0 else float(pair[key] > 0) for pair in pairs])
    return bootstrap(values, 2000, seed, groups=[pair["id"] for pair in pairs])


def ceiling(rows: list[dict], seed: int) -> dict | None:
    """How often labelers who decide on a pair agree, with one another and with the majority of the others; and how often
    a model that is always right would agree with one of them.

    That is not their agreement: two labelers who are each right with probability p agree on a = p² + (1 - p)², a model
    that is always right agrees with either on p = (1 + sqrt(2a - 1)) / 2. The majority of many others is close to it.

    Args:
        rows: comparison rows.
    """
    agreeing: list[tuple[str, float]] = []
    majorities: list[tuple[str, float]] = []
    for row in rows:
        rankings = [ranking["ranks"] for ranking in row["rankings"]]
        agreeing += [(row["id"], same) for a, b in combinations(rankings, 2) for same in agreements(a, b, decided=True)]
        outcomes = np.array([pair_outcomes(ranks) for ranks in rankings])  # [labelers, pairs]
        for own in outcomes:
            votes = np.sign(outcomes.sum(0) - own)
            # Of a split vote nobody knows: it is a coin's toss.
            majorities += [(row["id"], (1 + vote * mine) / 2) for vote, mine in zip(votes, own, strict=True) if mine]
    if not agreeing:
        return None

    def over_prompts(values: list[tuple[str, float]]) -> dict | None:
        return bootstrap([value for _, value in values], 2000, seed, groups=[i for i, _ in values])

    labelers = {ranking["labeler"] for row in rows for ranking in row["rankings"]}
    agreement = over_prompts(agreeing)
    return {
        "labelers": len(labelers),
        "agreement": agreement,
        "majority": over_prompts(majorities),
        "allowed": allowed_accuracy(agreement),
    }


def allowed_accuracy(agreement: dict | None) -> dict | None:
    """The interval of p for that of a, see `ceiling`; bounds below a coin's toss are one."""
    if agreement is None or agreement["mean"] < 0.5:
        return None
    return agreement | {end: (1 + max(0.0, 2 * agreement[end] - 1) ** 0.5) / 2 for end in ("mean", "low", "high")}


def reliability(pairs: list[dict], seed: int, bins: int = 20) -> dict:
    """Expected calibration error and the bins of the diagram, with intervals over prompts.

    Of few pairs the error, a mean of absolute values, lies above 0 for a calibrated model too, and its resamples lie
    higher still. Its interval is what the noise of all bins together can have done, for or against: by the triangle
    inequality no error is farther from the true one than the bins' gaps are from theirs in sum, of which the resamples'
    97.5th percentile is taken.
    """
    margins = np.array([pair["margin"] for pair in pairs])
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    correct = np.where(margins == 0, 0.5, margins > 0)
    ece, rows = expected_calibration_error(confidence.tolist(), correct.tolist(), bins)
    if ece is None:
        return {"accuracy_by_confidence": [], "ece": None, "ece_interval": None}
    ids = [pair["id"] for pair in pairs]
    bin_of = np.array([next(i for i, row in enumerate(rows) if p <= row["high"]) for p in confidence])
    for i, row in enumerate(rows):
        mine = np.flatnonzero(bin_of == i)
        interval = bootstrap(correct[mine], 2000, seed, groups=[ids[j] for j in mine]) or {}
        row |= {f"accuracy_{end}": interval.get(end) for end in ("low", "high")}

    gaps = np.stack([np.where(bin_of == i, confidence - correct, 0) for i in range(len(rows))], 1)  # [pairs, bins]

    def noise(counts: np.ndarray) -> np.ndarray:
        return np.abs(counts @ gaps / counts.sum(1, keepdims=True) - gaps.mean(0)).sum(1, keepdims=True)

    (found,) = bootstrap_of(noise, ids, 2000, seed)
    most = found["high"] if found["groups"] == 1 else found["group_high"]
    return {
        "accuracy_by_confidence": rows,
        "ece": ece,
        "ece_interval": {"mean": ece, "low": max(0.0, ece - most), "high": ece + most, "n": len(pairs)},
    }


def evaluate(pairs: list[dict], seed: int) -> dict:
    """Accuracy with intervals, by labeler, source and confidence, calibration, and the length baseline."""
    margins = np.array([pair["margin"] for pair in pairs])

    def accuracy_by(key: str) -> dict:
        values = sorted({pair[key] for pair in pairs})
        return {value: accuracy([p for p in pairs if p[key] == value], "margin", seed) for value in values}

    return {
        "pairs": len(pairs),
        "accuracy": accuracy(pairs, "margin", seed),
        "accuracy_longer_wins": accuracy(pairs, "longer", seed),
        "accuracy_by_labeler": accuracy_by("labeler"),
        "accuracy_by_source": accuracy_by("source"),
        "length_correlation_of_margins": spearman(margins, np.array([pair["longer"] for pair in pairs])),
    } | reliability(pairs, seed)


def run(stage: Stage) -> dict:
    config, precision = RewardConfig(**stage.config), stage.shared["precision"]
    prepare(stage.seed, "reward")
    parent = stage.inputs["policy"].folder / "model"
    tokenizer = load_tokenizer(parent)
    pad_id = tokenizer.pad_token_id
    rows = stage.rows("comparisons", "comparisons.jsonl")
    examples = tokenize([row for row in rows if row["split"] == "reward"], tokenizer, config.max_length)
    heldout = [row for row in rows if row["split"] == "heldout"]
    if len(examples) < config.batch_size:
        raise DataError(
            f"reward: {len(examples)} prompts with comparisons are fewer than one batch (reward.batch_size: {config.batch_size})"
        )
    if not heldout:
        raise DataError(
            "reward: no comparisons on held-out prompts, so its accuracy could not be told; raise data.shares.heldout"
        )
    lengths = [len(e["prompt"]) + max(map(len, e["responses"])) for e in examples]
    order = epoch_order(lengths, config.batch_size, config.epochs, stage.seed)

    model = initialise(load_causal_lm(parent), derive_seed(stage.seed, "head"))
    model.config.pad_token_id = pad_id
    model = with_lora(model, config.lora, derive_seed(stage.seed, "lora"), extra_modules=["score"])
    counts = trained_parameters(model)
    stage.draft.training_flops = training_flops(
        counts,
        sum(
            len(examples[i]["responses"]) * len(examples[i]["prompt"]) + sum(map(len, examples[i]["responses"]))
            for i in order
        ),
    )
    trainer = KWiseTrainer(
        model=model,
        args=TrainingArguments(**trainer_arguments(stage, config), remove_unused_columns=False),
        train_dataset=Dataset.from_list([examples[i] for i in order]),
        data_collator=KWiseCollator(pad_id),
        processing_class=tokenizer,
    )
    history = train(stage, trainer)
    if not is_main_process():
        return {}
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    if config.lora is not None:
        model = model.merge_and_unload()  # scores are read by stages that know nothing of adapters

    demonstrations = [
        (encode(tokenizer, row["prompt"]), encode_response(tokenizer, row["completion"]))
        for split in ("reward", "sft")
        for row in stage.rows("data", f"{split}.jsonl")
        if "prompt" in row
    ][:BIAS_DEMONSTRATIONS]
    demonstration_scores = np.array(reward_scores(model, demonstrations, pad_id, precision))
    model.config.reward_bias = float(demonstration_scores.mean()) if demonstrations else 0.0
    model.save_pretrained(stage.work / "model")
    copy_tokenizer(parent, stage.work / "model")

    tokens = tokenize(heldout, tokenizer, config.max_length)
    sequences = [(e["prompt"], response) for e in tokens for response in e["responses"]]
    flat_scores = np.array(reward_scores(model, sequences, pad_id, precision))
    splits = np.cumsum([len(e["responses"]) for e in tokens])[:-1]
    sources = {row["id"]: row["source"] for row in stage.rows("data", "heldout.jsonl")}
    pairs = heldout_pairs(heldout, np.split(flat_scores, splits), sources)
    write_jsonl(stage.work / "pairs.jsonl", pairs)
    return (
        evaluate(pairs, stage.seed)
        | {
            "ceiling": ceiling(heldout, stage.seed),
            "train_loss": history[-1]["loss"],
            "steps": len(history),
            "prompts": len(examples),
            "bias": model.config.reward_bias,
            "score_mean_demonstrations": float((demonstration_scores - model.config.reward_bias).mean())
            if demonstrations
            else None,
            "length_correlation": spearman(flat_scores, np.array([len(response) for _, response in sequences])),
        }
        | counts
    )


if __name__ == "__main__":
    sys.exit(start("reward", run))
