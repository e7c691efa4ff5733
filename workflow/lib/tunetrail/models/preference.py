"""What dpo and kto share: TRL's trainers on rows of token ids, and a policy trained by one of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from tunetrail.config.dpo import FromReference
from tunetrail.contract.distributed import is_main_process
from tunetrail.contract.stage import Stage
from tunetrail.errors import DataError
from tunetrail.models.checkpoints import publish_kept
from tunetrail.models.cpu.label_head import score_labels_only
from tunetrail.models.fit import fit_training
from tunetrail.models.loading import load_causal_lm, trained_parameters, training_flops, with_lora
from tunetrail.models.saving import save_kept, save_trained
from tunetrail.models.training import KeepCallback, epoch_order, rows_left_out, train, trained_model
from tunetrail.models.weights import rows_per_epoch, taken_weights
from tunetrail.seeds import derive_seed


class Pretokenized:
    """A TRL trainer on rows of token ids: prompt and responses are tokenized apart here as everywhere."""

    reference_columns: tuple[str, ...]
    """Where the collator looks for what `compute_ref_log_probs` returns."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self: Any, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """TRL hands them over in a file, in a temporary folder that the other processes do not see."""
        score_labels_only(self.model)  # so that policy and reference are scored alike
        loader = self.accelerator.prepare(DataLoader(dataset, batch_size, collate_fn=self.data_collator))
        found = ([x for x in self.compute_ref_log_probs(self.model, batch) if x is not None] for batch in loader)
        parts = [self.accelerator.gather_for_metrics(tuple(of_batch)) for of_batch in found]
        for name, column in zip(self.reference_columns, zip(*parts, strict=True), strict=False):
            dataset = dataset.add_column(name, torch.cat(column).tolist())
        return dataset


def optimise(
    stage: Stage,
    config: FromReference,
    parent: Path,
    examples: Sequence[dict],
    responses: tuple[str, ...],
    what: str,
    trainer_of: Callable[[PreTrainedModel, list[dict]], Any],
) -> tuple[list[dict], dict[str, Any]]:
    """Trains the model of a folder on token ids, and writes `model/`, `history.jsonl` and what is kept along the way.

    Args:
        examples: each with "prompt_ids" and the responses.
        responses: the keys of what follows the prompt, what was liked first.
        what: an example is, in the plural.
        trainer_of: makes the trainer, of the model and the examples of all epochs in their order.

    Returns:
        (history, what `metrics.json` says of any such policy); both empty where another process writes.

    Raises DataError where a batch is not full.
    """
    weights = taken_weights(examples)
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
    stage.draft.training_flops = training_flops(counts, sum(tokens[i] for i in order))
    trainer = trainer_of(model, [examples[i] for i in order])

    def save(model: Any, folder: Path) -> None:
        save_kept(trainer.accelerator.unwrap_model(model), parent, folder)

    trainer.add_callback(KeepCallback(stage, config.checkpoints, save))
    history = train(stage, trainer, config)
    if not is_main_process():
        return [], {}
    save_trained(stage, trained_model(trainer, parent), parent, (e["prompt_ids"] + e[responses[0]] for e in examples))
    publish_kept(stage)
    left_out = rows_left_out(stage.name, rows, config.batch_size)
    about = {"train_loss": history[-1]["loss"], "steps": len(history), "rows_left_out": left_out}
    return history, about | counts
