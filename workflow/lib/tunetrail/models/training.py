"""What the stages with Hugging Face trainers (sft, reward, all policies but ppo) share: data order, arguments, saving,
stopping.

A trainer resumed from any checkpoint ends with the same bytes as one that never stopped: the order of the data is fixed
in advance, and a checkpoint holds weights, optimizer, schedule and random states.
"""

import functools
import logging
import math
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, TrainerCallback

from tunetrail.config.training import Epochs, few_steps
from tunetrail.contract.distributed import is_main_process, of_all_processes, processes
from tunetrail.contract.progress import ProgressBar
from tunetrail.contract.stage import Stage
from tunetrail.errors import ConfigError, DataError
from tunetrail.files import write_jsonl
from tunetrail.models.checkpoints import keep, keep_newest, kept_steps, latest_checkpoint, mark_complete
from tunetrail.models.frozen import widen_below_adapter
from tunetrail.models.heldout import LOSS, HeldoutCallback, measured
from tunetrail.models.loading import trained_weights
from tunetrail.models.runtime import use_bf16
from tunetrail.models.trackers import trainer_options
from tunetrail.models.weights import rows_of_epoch
from tunetrail.seeds import derive_seed

log = logging.getLogger("tunetrail")

# Logged values that depend on the clock or count from the last resumption.
_NOT_RESULTS = ("total_flos", "train_loss", "num_tokens")


def epoch_order(
    lengths: Sequence[int], batch_size: int, epochs: int, seed: int, weights: Sequence[float] | None = None
) -> list[int]:
    """Row indices for all epochs in training order: batches of similar length, in random order.

    A row appears in each epoch as often as its weight says (`models.weights`), or once if there are no weights.

    Every epoch shuffles again. The rows that do not fill a batch, different ones in each epoch, are left out
    (`rows_left_out`), so that every optimizer step sees `batch_size` rows.
    """
    order: list[int] = []
    for epoch in range(epochs):
        rng = random.Random(derive_seed(seed, "order", epoch))
        rows = rows_of_epoch(weights, rng) if weights else list(range(len(lengths)))
        rng.shuffle(rows)
        rows = rows[: len(rows) - len(rows) % batch_size]
        rows.sort(key=lambda i: lengths[i])  # stable: equal lengths keep their random order
        batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        rng.shuffle(batches)
        order += [i for batch in batches for i in batch]
    return order


def rows_left_out(stage: str, rows: int, batch_size: int) -> int:
    """How many rows each epoch leaves out because they do not fill a batch; also logs it."""
    left_out = rows % batch_size
    if left_out and is_main_process():
        message = "%s: %d of %d rows do not fill a batch of %d; each epoch leaves out different ones"
        log.info(message, stage, left_out, rows, batch_size)
    return left_out


def learning_rate_scale(step: int, steps: int, warmup: int, schedule: str) -> float:
    """Share of the peak learning rate at optimizer step `step` of `steps`, counted from 1.

    It rises linearly to 1 over the first `warmup` steps. At the k-th of the n steps after them it is, with
    t = k / (n + 1), (1 + cos(pi t)) / 2 (cosine), 1 - t (linear) or 1 (constant). It is never 0, so that every batch
    counts.
    """
    warmup = max(1, warmup)
    if step <= warmup:
        return step / warmup
    t = (step - warmup) / (steps - warmup + 1)
    return {"cosine": (1 + math.cos(math.pi * t)) / 2, "linear": 1 - t, "constant": 1.0}[schedule]


def use_schedule(trainer: Any, config: Epochs) -> None:
    """Makes a transformers trainer follow `learning_rate_scale`: the library's schedules start at 0, and its constant
    one has no warm-up."""

    def create(num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        warmup = trainer.args.get_warmup_steps(num_training_steps)
        if trainer.lr_scheduler is None:
            trainer.lr_scheduler = LambdaLR(
                optimizer or trainer.optimizer,
                lambda done: learning_rate_scale(done + 1, num_training_steps, warmup, config.schedule),
            )
        return trainer.lr_scheduler

    trainer.create_scheduler = create


def rows_at_once(stage: str, config: Epochs, processes: int) -> int:
    """How many rows of its share of a batch a process puts through the model together, at most `micro_batch_size`.

    Raises ConfigError if the processes cannot have equal shares: rows would then get different weights.
    """
    share, rest = divmod(config.batch_size, processes)
    if rest:
        raise ConfigError(
            f"{stage}: batch_size ({config.batch_size}) must be a multiple of the {processes} processes; change either"
        )
    return config.rows_at_once(share)


def trainer_arguments(stage: Stage, config: Epochs) -> dict[str, Any]:
    """Keyword arguments for transformers.TrainingArguments and TRL's subclasses."""
    micro = rows_at_once(stage.name, config, processes())
    return trainer_options(stage.output, stage.state) | {
        "output_dir": str(stage.state),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": config.batch_size // (micro * processes()),
        "num_train_epochs": 1,  # the data set contains all epochs, see epoch_order
        "train_sampling_strategy": "sequential",
        "learning_rate": config.learning_rate,
        "warmup_steps": config.warmup,  # below 1: a share of the steps
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "optim": "adamw_torch_fused",
        "bf16": use_bf16(stage.shared["precision"]),
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,  # TRL would; `models.fit` decides
        "logging_steps": 1,
        "save_strategy": "no",  # StageCallback decides
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,  # there are none
        "seed": derive_seed(stage.seed, stage.name) % 2**32,
    }


def trained_model(trainer: Any, parent: Path) -> Any:
    """The model after training, with its original forward pass: the trainer's wrapper would use autocast.

    Args:
        parent: the `model/` folder that training started from, for the fp32 weights below an adapter.
    """
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    for wrapped in (model, model.get_base_model() if hasattr(model, "peft_config") else model):
        wrapped.__dict__.pop("forward", None)  # the wrappers for autocast and TRL's head
    widen_below_adapter(model, parent)
    return model


class StageCallback(TrainerCallback):
    """Shows progress, saves when a save is due, and stops when told to."""

    def __init__(self, stage: Stage):
        self.stage = stage
        self.bar: ProgressBar | None = None
        self.stopping = False

    def on_train_begin(self, args, state, control, **kwargs):
        if is_main_process():
            self.bar = ProgressBar(self.stage.name, state.max_steps, "steps", done=state.global_step)
            self.bar.__enter__()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar and logs and "loss" in logs:
            loss = float(logs["loss"])
            self.bar.advance(state.global_step - self.bar.done, f"loss {loss:.4f}", {"loss": loss})

    def on_step_end(self, args, state, control, **kwargs):
        if self.stage.stop.save_due():  # after the last step too: publishing may take long
            control.should_save = True
            if self.stage.stop.requested():
                self.stopping = control.should_training_stop = True
        return control

    def on_save(self, args, state, control, **kwargs):
        of_all_processes(None)  # wait until each has written its random state: the checkpoint's list includes them
        if is_main_process():
            mark_complete(self.stage, self.stage.state / f"checkpoint-{state.global_step}")
            keep_newest(self.stage.state)
        self.stage.stop.saved()

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar:
            self.bar.__exit__(None, None, None)


class KeepCallback(TrainerCallback):
    """Keeps models along the way."""

    def __init__(self, stage: Stage, count: int, save: Callable[[Any, Path], None]):
        self.stage, self.count, self.save = stage, count, save

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if is_main_process() and state.global_step in kept_steps(state.max_steps, self.count):
            keep(self.stage, state.global_step, functools.partial(self.save, model))


def history(log_history: list[dict]) -> list[dict]:
    """One row per step from the trainer's log, with the held-out loss if it was measured at that step.

    Leaves out values that depend on the clock or on interruptions.
    """
    heldout = {step: {LOSS: loss} for step, loss in measured(log_history)}
    return [
        {k: v for k, v in row.items() if k not in _NOT_RESULTS and "runtime" not in k and "per_second" not in k}
        | heldout.get(row["step"], {})
        for row in log_history
        if "loss" in row
    ]


def bit_sums(weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
    """For each weight, the sum of its values with their bits read as integers; it differs if a single value does."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {
        name: int(values.contiguous().view(integers[values.element_size()]).sum(dtype=torch.int64))
        for name, values in weights
    }


def check_learnt(name: str, before: dict[str, int], after: dict[str, int], steps: int) -> None:
    """Raises ConfigError if training changed no weight: the artifact would be a copy of its parent.

    Args:
        before: the `bit_sums` of the trained weights before the first step.
        after: the same after the last step.
    """
    if all(after.get(weight) == bits for weight, bits in before.items()):
        raise ConfigError(
            f"{name}: {steps} optimizer steps left every weight as it was, so nothing was learnt; raise learning_rate, "
            "or see whether its data, or its scores, can teach anything"
        )


def warn_of_few_steps(stage: Stage, steps: int, more_steps: str) -> None:
    """Logs a warning if there are too few optimizer steps to learn from."""
    if is_main_process() and (note := few_steps(stage.name, steps, more_steps)):
        log.warning("%s", note)


def train(stage: Stage, trainer: Any, config: Epochs) -> tuple[list[dict], dict[str, Any]]:
    """Trains to the end, resuming from the latest checkpoint if there is one; writes `history.jsonl`.

    Returns:
        (the rows of `history.jsonl`, what `metrics.json` says of the held-out loss if it was measured).

    Raises Interrupted when told to stop, after saving; DataError if the loss is no longer finite; ConfigError if no
    weight changed.
    """
    steps = len(trainer.train_dataset) // config.batch_size
    warn_of_few_steps(stage, steps, config.more_steps)
    before = bit_sums(trained_weights(trainer.model))
    heldout = HeldoutCallback(stage, trainer, config, steps) if config.evaluate_every else None
    callback = StageCallback(stage)
    trainer.remove_callback(PrinterCallback)
    for one in filter(None, (heldout, callback)):  # in this order: a save includes what was measured at its step
        trainer.add_callback(one)
    trainer.create_model_card = lambda *_, **__: None  # TRL writes one with every save; ours is `tunetrail audit card`
    use_schedule(trainer, config)
    checkpoint = latest_checkpoint(stage)
    if heldout and checkpoint:
        heldout.resume(checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if callback.stopping:
        step, total = trainer.state.global_step, trainer.state.max_steps
        raise stage.stop.interruption(f"at step {step} of {total}")
    rows = history(trainer.state.log_history)
    # Not only the loss: a diverged model's log-probs may be infinite while a clipped loss is finite.
    if not all(math.isfinite(value) for row in rows for value in row.values()):
        raise DataError(f"{stage.name}: the loss became infinite or NaN; lower {stage.name}.learning_rate")
    about = heldout.finish() if heldout else {}
    check_learnt(stage.name, before, bit_sums(trained_weights(trainer.model)), len(rows))
    if is_main_process():
        write_jsonl(stage.work / "history.jsonl", rows)
    return rows, about
