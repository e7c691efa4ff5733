"""The held-out loss during training, and early stopping: training ends when that loss no longer falls, and the weights
of its lowest value are kept.

The loss is the one that the stage trains on, over the rows of the held-out split; no prompt of the evaluation split is
used. The measurements are in the trainer's log and the best weights in each checkpoint, so that a resumed attempt
continues with both.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerState

from tunetrail.config.training import Epochs
from tunetrail.contract.distributed import is_main_process, of_all_processes
from tunetrail.contract.stage import Stage
from tunetrail.errors import DataError
from tunetrail.models.loading import trained_weights

log = logging.getLogger("tunetrail")

LOSS = "heldout_loss"
BEST = "best.safetensors"
"""In a checkpoint: the trained weights at the lowest held-out loss so far."""

Measured = Sequence[tuple[int, float]]
"""(step, held-out loss) of each measurement after step 0, in order."""


def measured(log_history: list[dict]) -> list[tuple[int, float]]:
    return [(row["step"], row[LOSS]) for row in log_history if LOSS in row and row["step"]]


def best_step(found: Measured) -> int:
    """The step with the lowest loss, the first of them if there are several.

    >>> best_step([(5, 2.0), (10, 1.0), (15, 1.0)])
    10
    """
    return min(found, key=lambda one: one[1])[0]


def is_over(found: Measured, patience: int | None) -> bool:
    """Whether at least `patience` measurements in a row were not below the lowest one before them.

    >>> is_over([(5, 2.0), (10, 1.0), (15, 1.5), (20, 1.0)], 2), is_over([(5, 2.0), (10, 1.0), (15, 1.5)], 2)
    (True, False)
    """
    if patience is None or not found:
        return False
    return len(found) - 1 - [step for step, _ in found].index(best_step(found)) >= patience


def kept(about: Mapping[str, Any]) -> int:
    """The index in the history of the step whose weights are published: the last one, or that of the lowest loss.

    Args:
        about: of `HeldoutCallback.finish`, or metrics that include it.
    """
    return about["kept_step"] - 1 if "kept_step" in about else -1


def heldout_dataset(config: Epochs, examples: list[dict]) -> Dataset | None:
    """The `eval_dataset` of a trainer; None if nothing is measured during training."""
    return Dataset.from_list(examples) if config.evaluate_every and examples else None


def _tokens(row: dict) -> int:
    return sum(len(value) for value in row.values() if isinstance(value, list))


def _weight(rows: list[dict]) -> int:
    """The weight of a batch in the mean: its labels if the loss is a mean over labels, as for sft, else its rows."""
    if "labels" in rows[0]:
        return sum(label != -100 for row in rows for label in row["labels"][1:])
    return len(rows)


class HeldoutCallback(TrainerCallback):
    """Measures every `evaluate_every` steps and after the last one; with `patience`, keeps the best weights and stops.

    Raises DataError if there are no held-out rows, or if the loss is no longer finite.
    """

    def __init__(self, stage: Stage, trainer: Any, config: Epochs, steps: int):
        if trainer.eval_dataset is None:
            raise DataError(
                f"{stage.name}: evaluate_every measures on held-out rows, but there are none; raise "
                "data.shares.heldout, or remove evaluate_every"
            )
        self.stage, self.trainer, self.config, self.steps = stage, trainer, config, steps
        self.best: dict[str, torch.Tensor] = {}
        rows, n = sorted(trainer.eval_dataset, key=_tokens), trainer.args.per_device_train_batch_size
        parts = [rows[i : i + n] for i in range(0, len(rows), n)]
        self.batches = [(trainer.data_collator(part), _weight(part)) for part in parts]

    def loss(self) -> float:
        """The mean over the held-out rows, for fine-tuning over their labels. Every process computes all of it."""
        trainer, model = self.trainer, self.trainer.model
        batches = [(trainer._prepare_inputs(batch), weight) for batch, weight in self.batches]
        with torch.no_grad(), trainer.compute_loss_context_manager():
            if measure_kl := getattr(trainer, "measure_kl", None):
                measure_kl([batch for batch, _ in batches])
            losses = [trainer.compute_loss(model, batch).item() * weight for batch, weight in batches]
        return sum(losses) / sum(weight for _, weight in batches)

    def measure(self, step: int) -> None:
        """Logs the loss that rank 0 measured: all processes must decide alike."""
        model = self.trainer.model
        was_training = model.training
        model.eval()  # TRL keeps separate logs for evaluation
        loss = of_all_processes(self.loss())[0]
        if not math.isfinite(loss):
            raise DataError(
                f"{self.stage.name}: the held-out loss became infinite or NaN at step {step}; lower learning_rate"
            )
        self.trainer.log({LOSS: loss})
        model.train(was_training)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.measure(0)

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        if step % self.config.evaluate_every and step < self.steps:
            return
        self.measure(step)
        control.should_log = True  # the step's own loss, which would be skipped after another one was logged
        found = measured(state.log_history)
        if self.config.patience and best_step(found) == step and is_main_process():
            weights = trained_weights(self.trainer.model)
            self.best = {name: weight.to("cpu", copy=True).contiguous() for name, weight in weights}
        if is_over(found, self.config.patience):
            control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        if self.best:
            save_file(self.best, Path(args.output_dir) / f"checkpoint-{state.global_step}" / BEST)

    def resume(self, checkpoint: Path) -> None:
        """Continues from a checkpoint. If training was over at that point, no batch is left."""
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if is_main_process() and (checkpoint / BEST).exists():
            self.best = load_file(checkpoint / BEST)
        if is_over(measured(state.log_history), self.config.patience):
            rows = range(state.global_step * self.config.batch_size)
            self.trainer.train_dataset = self.trainer.train_dataset.select(rows)

    def finish(self) -> dict[str, Any]:
        """Restores the best weights if `patience` is set; returns its part of `metrics.json`."""
        log_history = self.trainer.state.log_history
        found, patience = measured(log_history), self.config.patience
        start = next(row[LOSS] for row in log_history if LOSS in row)
        kept = best_step(found) if patience else found[-1][0]
        loss, last = dict(found)[kept], found[-1][0]
        about = {LOSS: loss, f"{LOSS}_at_start": start, "heldout_rows": len(self.trainer.eval_dataset)}
        if is_main_process() and loss >= start:
            log.warning("%s: the held-out loss did not fall: %.4g before training, %.4g at step %d; lower "
                "learning_rate, or add data", self.stage.name, start, loss, kept)  # fmt: skip
        if not patience:
            return about
        if is_main_process():
            log.info("%s: the held-out loss was lowest at step %d (%.4g), whose weights are kept; training ended after "
                "step %d of %d", self.stage.name, kept, loss, last, self.steps)  # fmt: skip
            for name, weight in trained_weights(self.trainer.model):
                weight.copy_(self.best[name])
        return about | {"kept_step": kept, "stopped_early": last < self.steps}
