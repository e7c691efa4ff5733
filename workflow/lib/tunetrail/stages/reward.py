"""The reward model, trained with the K-wise loss over all pairs of a prompt in one forward pass of K sequences, or
imported (`tunetrail.reward.imported`).

    python -m tunetrail.stages.reward --config C.json --input policy=… --input data=… --input comparisons=… \
        --output … --state …

It starts from the SFT model with a head N(0, 1/(d+1)) without bias (Stiennon et al. 2020), or with a linear probe as
its head. The score is read from the state of the last token or from the mean over the response (`reward_pooling` in the
model's config), less the mean score of demonstrations (`reward_bias`). On held-out prompts the model is compared with
three baselines: the longer response wins, the shorter wins, and a linear probe on the SFT model's states.

Writes `model/`, `history.jsonl` and `pairs.jsonl`, the held-out pairs behind every number (`HeldOutPair`). The types of
metrics.json are in `reward.calibration`: accuracies have intervals over source groups, `gain_over` has the paired
differences from the baselines, `accuracy_by_confidence` is the reliability diagram, `ece` the expected calibration
error with `ece_interval` (at least 95%), `ceiling` the most that labelers' agreement allows, `length_correlation`
Spearman's correlation of scores with length.
"""

import logging
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from pydantic import TypeAdapter
from transformers import AutoModelForSequenceClassification, TrainingArguments

from tunetrail.config.imported import ImportedModel
from tunetrail.config.training import RewardBlock, RewardConfig
from tunetrail.contract.distributed import is_main_process
from tunetrail.contract.stage import Stage
from tunetrail.errors import DataError
from tunetrail.evaluation.models import reward_scores
from tunetrail.evaluation.stats import spearman
from tunetrail.files import write_jsonl
from tunetrail.models.batching import encode, encode_response
from tunetrail.models.fit import fit_training
from tunetrail.models.heldout import heldout_dataset, kept
from tunetrail.models.loading import load_causal_lm, load_tokenizer, trained_parameters, training_flops, with_lora
from tunetrail.models.runtime import device, prepare
from tunetrail.models.saving import save_trained
from tunetrail.models.training import epoch_order, rows_left_out, train, trained_model, trainer_arguments
from tunetrail.models.weights import pop_weights, rows_per_epoch
from tunetrail.reward.calibration import ceiling, evaluate, heldout_pairs
from tunetrail.reward.imported import import_reward_model
from tunetrail.reward.kwise import KWiseCollator, KWiseTrainer, initialise, tokenize
from tunetrail.reward.probe import fit_probe, frozen_states
from tunetrail.seeds import derive_seed
from tunetrail.stages.registry import start

log = logging.getLogger("tunetrail")

BIAS_DEMONSTRATIONS = 128
"""How many demonstrations are used to set the mean score to 0."""


def split_rows(rows: list[dict], batch_size: int) -> tuple[list[dict], list[dict]]:
    """(training, held-out) comparisons. Raises DataError if either is too small."""
    training, heldout = ([row for row in rows if row["split"] == split] for split in ("reward", "heldout"))
    if (per_epoch := rows_per_epoch([row.get("weight", 1.0) for row in training])) < batch_size:
        raise DataError(
            f"reward: {per_epoch} prompts with comparisons are fewer than one batch (reward.batch_size: {batch_size})"
        )
    if not heldout:
        raise DataError(
            "reward: no comparisons on held-out prompts to measure its accuracy on; raise data.shares.heldout"
        )
    return training, heldout


@dataclass
class Probes:
    """Linear probes, fitted before any training."""

    unseen: list[np.ndarray]
    """[K] per held-out prompt: the baseline's scores, by a linear probe on mean-pooled states."""
    head: np.ndarray | None
    """[d], the initial score head; None: random."""


def fit_probes(
    stage: Stage, config: RewardConfig, model: Any, training: list[dict], groups: list[str], unseen: list[dict]
) -> Probes:
    """Fits the linear probes to the training examples. Every attempt does so, at the cost of one forward pass over the
    data."""
    log.info("reward: fitting a linear probe to the SFT model's states")

    def states(examples: list[dict], pooling: str) -> list[np.ndarray]:
        return frozen_states(model, examples, model.config.pad_token_id, stage.shared["precision"], pooling)

    targets = [example["targets"] for example in training]
    probe = head = fit_probe(states(training, "mean"), targets, groups)
    if config.pooling != "mean" and config.warm_start:
        head = fit_probe(states(training, config.pooling), targets, groups)
    return Probes([of_prompt @ probe for of_prompt in states(unseen, "mean")], head if config.warm_start else None)


def train_model(
    stage: Stage, config: RewardConfig, tokenizer: Any, model: Any, examples: list[dict], unseen: list[dict]
) -> tuple[Any, list, dict]:
    """(trained classifier, history, the part of metrics.json about training)."""
    weights = pop_weights(examples)
    lengths = [len(e["prompt"]) + max(map(len, e["responses"])) for e in examples]
    order = epoch_order(lengths, config.batch_size, config.epochs, stage.seed, weights)
    model = with_lora(model, config.lora, derive_seed(stage.seed, "lora"), extra_modules=["score"])
    counts = trained_parameters(model)
    k = max(len(example["responses"]) for example in examples)
    fit_training(stage, config, model, max(lengths), sequences=k, is_classifier=True)
    tokens = [len(e["responses"]) * len(e["prompt"]) + sum(map(len, e["responses"])) for e in examples]
    trainer = KWiseTrainer(
        model=model,
        args=TrainingArguments(**trainer_arguments(stage, config), remove_unused_columns=False),
        train_dataset=Dataset.from_list([examples[i] for i in order]),
        eval_dataset=heldout_dataset(config, unseen),
        data_collator=KWiseCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        head_learning_rate=config.head_learning_rate,
    )
    history, about = train(stage, trainer, config)
    taken = order[: len(history) * config.batch_size]
    stage.draft.training_flops = training_flops(counts, sum(tokens[i] for i in taken))
    model = trained_model(trainer, stage.inputs["policy"].folder / "model")
    if config.lora is not None and is_main_process():
        model = model.merge_and_unload()  # so that the bias below fits the scores of the published model
    left_out = rows_left_out("reward", rows_per_epoch(weights), config.batch_size) if is_main_process() else 0
    return model, history, counts | about | {"rows_left_out": left_out}


def demonstrations(stage: Stage, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, response ids) of demonstrations."""
    return [
        (encode(tokenizer, row["prompt"]), encode_response(tokenizer, row["completion"]))
        for split in ("reward", "sft")
        for row in stage.rows("data", f"{split}.jsonl")
        if "completion" in row
    ][:BIAS_DEMONSTRATIONS]


def train_and_evaluate(stage: Stage, config: RewardConfig) -> dict[str, Any]:
    precision = stage.shared["precision"]
    parent = stage.inputs["policy"].folder / "model"
    tokenizer = load_tokenizer(parent)
    training, heldout = split_rows(stage.rows("comparisons", "comparisons.jsonl"), config.batch_size)
    examples, unseen = (tokenize(rows, tokenizer, config.max_length) for rows in (training, heldout))
    sft = load_causal_lm(parent).to(device()).eval()
    sft.config.pad_token_id = tokenizer.pad_token_id
    probes = fit_probes(stage, config, sft, examples, [row["group"] for row in training], unseen)
    model = initialise(sft, derive_seed(stage.seed, "head"), config.pooling, probes.head)
    del sft  # not needed in memory while the reward model trains
    model, history, counts = train_model(stage, config, tokenizer, model, examples, unseen)
    if not is_main_process():
        return {}

    def score(examples: list[tuple[list[int], list[int]]]) -> np.ndarray:
        return np.array(reward_scores(model, examples, tokenizer.pad_token_id, precision))

    demonstration_scores = score(demonstrations(stage, tokenizer))
    model.config.reward_bias = float(demonstration_scores.mean()) if len(demonstration_scores) else 0.0
    rows = (e["prompt"] + e["responses"][0] for e in examples)
    save_trained(stage, model, parent, rows, auto_class=AutoModelForSequenceClassification)

    sequences = [(e["prompt"], response) for e in unseen for response in e["responses"]]
    scores = score(sequences)
    by_prompt = np.split(scores, np.cumsum([len(e["responses"]) for e in unseen])[:-1])
    sources = {row["id"]: row["source"] for row in stage.rows("data", "heldout.jsonl")}
    pairs = heldout_pairs(heldout, by_prompt, probes.unseen, sources)
    write_jsonl(stage.work / "pairs.jsonl", pairs)  # type: ignore[arg-type]
    return (
        evaluate(pairs, stage.seed)
        | {
            "ceiling": ceiling(heldout, stage.seed),
            "train_loss": history[kept(counts)]["loss"],
            "steps": len(history),
            "prompts": len(training),
            "bias": model.config.reward_bias,
            "score_mean_demonstrations": float((demonstration_scores - model.config.reward_bias).mean())
            if len(demonstration_scores)
            else None,
            "length_correlation": spearman(scores, np.array([len(response) for _, response in sequences])),
        }
        | counts
    )


def run(stage: Stage) -> dict[str, Any]:
    prepare(stage.seed, "reward")
    config: RewardConfig | ImportedModel = TypeAdapter(RewardBlock).validate_python(stage.config)
    if isinstance(config, RewardConfig):
        return train_and_evaluate(stage, config)
    return import_reward_model(stage, config) if is_main_process() else {}


if __name__ == "__main__":
    sys.exit(start("reward", run))
