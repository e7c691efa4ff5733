"""What dpo, orpo, simpo and kto share: trainers that read token ids, and training a policy with one of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOTrainer

from tunetrail.config.dpo import FromPairs, Offline
from tunetrail.contract.distributed import is_main_process
from tunetrail.contract.stage import Stage
from tunetrail.errors import DataError
from tunetrail.models.batching import encode_comparison
from tunetrail.models.checkpoints import publish_kept
from tunetrail.models.cpu.label_head import score_labels_only
from tunetrail.models.fit import fit_training
from tunetrail.models.heldout import heldout_dataset, kept
from tunetrail.models.lengths import check_lengths
from tunetrail.models.loading import load_causal_lm, load_tokenizer, trained_parameters, training_flops, with_lora
from tunetrail.models.saving import save_kept, save_trained
from tunetrail.models.training import KeepCallback, epoch_order, rows_left_out, train, trained_model
from tunetrail.models.weights import pop_weights, rows_per_epoch, weight_of
from tunetrail.preferences.pairs import widest_pairs
from tunetrail.seeds import derive_seed


class Pretokenized:
    """A mixin for TRL trainers that read rows of token ids: here, as everywhere, prompts and responses are tokenized
    separately."""

    reference_columns: tuple[str, ...]
    """The columns in which the collator expects what `compute_ref_log_probs` returns."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self: Any, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Gathers the reference's log-probs from all processes: TRL passes them on in a temporary file, which other
        nodes do not see."""
        score_labels_only(self.model)  # so that policy and reference are scored alike
        loader = self.accelerator.prepare(DataLoader(dataset, batch_size, collate_fn=self.data_collator))
        logprobs = ([x for x in self.compute_ref_log_probs(self.model, batch) if x is not None] for batch in loader)
        parts = [self.accelerator.gather_for_metrics(tuple(of_batch)) for of_batch in logprobs]
        for name, column in zip(self.reference_columns, zip(*parts, strict=True), strict=False):
            dataset = dataset.add_column(name, torch.cat(column).tolist())
        return dataset


class PretokenizedDpoTrainer(Pretokenized, DPOTrainer):
    """DPOTrainer on rows {prompt_ids, chosen_ids, rejected_ids}."""

    reference_columns = ("ref_chosen_logps", "ref_rejected_logps")


def tokenize_pairs(rows: list[dict], tokenizer: PreTrainedTokenizerBase, config: FromPairs, stage: str) -> list[dict]:
    """Comparison rows -> {prompt_ids, chosen_ids, rejected_ids}.

    Raises DataError, in the name of a stage, for ones that are too long.
    """
    examples: list[dict] = []
    lengths: list[tuple[str, int]] = []
    for row in rows:
        prompt, responses = encode_comparison(tokenizer, row)
        for chosen, rejected in widest_pairs(row["rankings"], config.pairs_per_prompt):
            lengths.append((row["id"], len(prompt) + max(len(responses[chosen]), len(responses[rejected]))))
            examples.append(
                {"prompt_ids": prompt, "chosen_ids": responses[chosen], "rejected_ids": responses[rejected]}
                | weight_of(row)
            )
    check_lengths(stage, lengths, config.max_length)
    return examples


def optimise(
    stage: Stage,
    config: Offline,
    parent: Path,
    examples: Sequence[dict],
    responses: tuple[str, ...],
    what: str,
    trainer_of: Callable[[PreTrainedModel, list[dict]], Any],
) -> tuple[list[dict], dict[str, Any]]:
    """Trains the model in `parent` on token ids; writes `model/`, `history.jsonl` and the models kept along the way.

    Args:
        examples: each with "prompt_ids" and its responses.
        responses: the keys of the responses, the preferred one first.
        what: what to call the examples in messages, in the plural.
        trainer_of: makes the trainer from the model and the examples of all epochs in training order.

    Returns:
        (history, the part of `metrics.json` that all such policies share); both empty in processes that do not write.

    Raises DataError if there are fewer examples than one batch.
    """
    weights = pop_weights(examples)
    rows = rows_per_epoch(weights)
    if rows < config.batch_size:
        raise DataError(
            f"{stage.name}: {rows} {what} are fewer than one batch (batch_size: {config.batch_size}); "
            "collect more, or lower it"
        )
    longest = [len(e["prompt_ids"]) + max(len(e[key]) for key in responses) for e in examples]
    order = epoch_order(longest, config.batch_size, config.epochs, stage.seed, weights)
    model = with_lora(load_causal_lm(parent), config.lora, derive_seed(stage.seed, "lora"))
    counts = trained_parameters(model)
    answer = max(len(e[key]) for e in examples for key in responses)
    fit_training(stage, config, model, max(longest), answer, sequences=len(responses))
    tokens = [sum(len(e["prompt_ids"]) + len(e[key]) for key in responses) for e in examples]
    trainer = trainer_of(model, [examples[i] for i in order])

    def save(model: Any, folder: Path) -> None:
        save_kept(trainer.accelerator.unwrap_model(model), parent, folder)

    trainer.add_callback(KeepCallback(stage, config.checkpoints, save))
    history, about_heldout = train(stage, trainer, config)
    taken = order[: len(history) * config.batch_size]
    stage.draft.training_flops = training_flops(counts, sum(tokens[i] for i in taken))
    if not is_main_process():
        return [], {}
    save_trained(stage, trained_model(trainer, parent), parent, (e["prompt_ids"] + e[responses[0]] for e in examples))
    publish_kept(stage)
    left_out = rows_left_out(stage.name, rows, config.batch_size)
    about = {"train_loss": history[kept(about_heldout)]["loss"], "steps": len(history), "rows_left_out": left_out}
    return history, about | about_heldout | counts


def train_on_pairs(stage: Stage, config: FromPairs, trainer_class: Callable[..., Any]) -> dict[str, Any]:
    """Trains the stage's policy on its pairs; returns what `metrics.json` says of it.

    Args:
        trainer_class: makes the trainer, of `model`, `train_dataset` and `processing_class`; the last row of its
            history has the accuracy and the margin of the last batch.
    """
    parent = stage.inputs["policy"].folder / "model"
    tokenizer = load_tokenizer(parent)
    rows = stage.rows("comparisons", "comparisons.jsonl")

    def tokenized(split: str) -> list[dict]:
        return tokenize_pairs([row for row in rows if row["split"] == split], tokenizer, config, stage.name)

    examples, heldout = tokenized("reward"), tokenized("heldout") if config.evaluate_every else []
    history, found = optimise(
        stage,
        config,
        parent,
        examples,
        ("chosen_ids", "rejected_ids"),
        "pairs",
        lambda model, pairs: trainer_class(
            model=model,
            train_dataset=Dataset.from_list(pairs),
            eval_dataset=heldout_dataset(config, heldout),
            processing_class=tokenizer,
        ),
    )
    if not history:
        return {}
    last = history[kept(found)]
    return found | {"accuracy": last["rewards/accuracies"], "margin": last["rewards/margins"], "pairs": len(examples)}
