"""What the stages on Hugging Face trainers (sft, reward, dpo, kto) share: data order, arguments, saving, leaving.

A trainer resumed from any checkpoint ends with the same bytes as one that never stopped: the order of the data is a
fixed list made beforehand, and a checkpoint holds weights, optimizer, schedule and random states.
"""

import functools
import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from tunetrail.models.runtime import use_bf16
from tunetrail.models.trackers import trainer_options
from tunetrail.models.weights import rows_of_epoch
from tunetrail.seeds import derive_seed

log = logging.getLogger("tunetrail")

# What depends on the clock, or counts from the last resumption.
_NOT_RESULTS = ("total_flos", "train_loss", "num_tokens")


def epoch_order(
    lengths: Sequence[int], batch_size: int, epochs: int, seed: int, weights: Sequence[float] | None = None
) -> list[int]:
    """Row indices for all epochs in training order: batches of similar length, in random order.

    A row is in each epoch as often as its weight says (`models.weights`), once where there are none.

    Every epoch shuffles again; the remainder that does not fill a batch is left out (`rows_left_out`), another one each
    time, so that every optimizer step sees `batch_size` rows.
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
    """How many rows each epoch leaves out because they do not fill a batch; says so in the log."""
    left_out = rows % batch_size
    if left_out and is_main_process():
        message = "%s: %d of %d rows do not fill a batch of %d; each epoch leaves out others"
        log.info(message, stage, left_out, rows, batch_size)
    return left_out


def learning_rate_scale(step: int, steps: int, warmup: int, schedule: str) -> float:
    """Share of the peak learning rate at optimizer step `step` of `steps`, from 1. Never 0: all batches teach.

    It rises to 1 over the `warmup` first steps. Of the n steps after them the k-th has, with t = k / (n + 1),
    (1 + cos(pi t)) / 2 (cosine), 1 - t (linear) or 1 (constant).
    """
    warmup = max(1, warmup)
    if step <= warmup:
        return step / warmup
    t = (step - warmup) / (steps - warmup + 1)
    return {"cosine": (1 + math.cos(math.pi * t)) / 2, "linear": 1 - t, "constant": 1.0}[schedule]


def use_schedule(trainer: Any, config: Epochs) -> None:
    """Has a transformers trainer follow `learning_rate_scale`: the library's schedules begin at 0, and its constant one
    has no warm-up."""

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
    """Rows of a process's share of a batch that go through the model together, at most `micro_batch_size`.

    Raises ConfigError where the processes cannot have equal shares, which would weigh rows differently.
    """
    share, rest = divmod(config.batch_size, processes)
    if rest:
        raise ConfigError(
            f"{stage}: batch_size ({config.batch_size}) must be a multiple of the {processes} processes; change either"
        )
    return next(n for n in range(min(config.micro_batch_size or share, share), 0, -1) if share % n == 0)


def trainer_arguments(stage: Stage, config: Epochs) -> dict[str, Any]:
    """Keyword arguments of transformers.TrainingArguments and its TRL children."""
    micro = rows_at_once(stage.name, config, processes())
    return trainer_options(stage.output, stage.state) | {
        "output_dir": str(stage.state),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": config.batch_size // (micro * processes()),
        "num_train_epochs": 1,  # epochs are laid out in the data set itself, see epoch_order
        "train_sampling_strategy": "sequential",
        "learning_rate": config.learning_rate,
        "warmup_steps": config.warmup,  # below 1 it is a share of the steps
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
    """The model after training, its forward pass as it was before the trainer wrapped it: in the weights' precision.

    Args:
        parent: the `model/` folder that training started from, for the fp32 weights below an adapter.
    """
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    for wrapped in (model, model.get_base_model() if hasattr(model, "peft_config") else model):
        wrapped.__dict__.pop("forward", None)  # autocast, and TRL's head
    widen_below_adapter(model, parent)
    return model


class StageCallback(TrainerCallback):
    """Shows progress, saves when due, leaves when told to."""

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
        if self.stage.stop.save_due():  # after the last step too: what follows may take long
            control.should_save = True
            if self.stage.stop.requested():
                self.stopping = control.should_training_stop = True
        return control

    def on_save(self, args, state, control, **kwargs):
        of_all_processes(None)  # each writes its random state, and they are listed
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
    """One row per step of what the trainer logged, without anything that the clock or an interruption decides."""
    return [
        {k: v for k, v in row.items() if k not in _NOT_RESULTS and "runtime" not in k and "per_second" not in k}
        for row in log_history
        if "loss" in row
    ]


def trained_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, values) of the weights that are trained."""
    return ((name, weight.detach()) for name, weight in model.named_parameters() if weight.requires_grad)


def bit_sums(weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
    """Of each weight the sum of its values' bits, read as whole numbers: another one where a single value changed."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {
        name: int(values.contiguous().view(integers[values.element_size()]).sum(dtype=torch.int64))
        for name, values in weights
    }


def check_learnt(name: str, before: dict[str, int], after: dict[str, int], steps: int) -> None:
    """Raises ConfigError where training left every weight as it was: the artifact would be its parent's copy.

    Args:
        before: the `bit_sums` of what is trained, before its first step.
    """
    if all(after.get(weight) == bits for weight, bits in before.items()):
        raise ConfigError(
            f"{name}: {steps} optimizer steps left every weight as it was, so nothing was learnt; raise learning_rate, "
            "or see whether its data, or its scores, can teach anything"
        )


def warn_of_few_steps(stage: Stage, steps: int, more_steps: str) -> None:
    """Says in the log where there are too few steps to learn in."""
    if is_main_process() and (note := few_steps(stage.name, steps, more_steps)):
        log.warning("%s", note)


def train(stage: Stage, trainer: Any, config: Epochs) -> list[dict]:
    """Trains to the end, resuming where an earlier attempt was; writes and returns `history.jsonl`.

    Raises Interrupted when told to stop, after saving; DataError when the loss is no longer finite; ConfigError when
    no weight changed.
    """
    steps = len(trainer.train_dataset) // config.batch_size
    warn_of_few_steps(stage, steps, config.more_steps)
    before = bit_sums(trained_weights(trainer.model))
    callback = StageCallback(stage)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(callback)
    trainer.create_model_card = lambda *_, **__: None  # TRL's, with every save; ours is `tunetrail audit card`
    use_schedule(trainer, config)
    checkpoint = latest_checkpoint(stage)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if callback.stopping:
        step, total = trainer.state.global_step, trainer.state.max_steps
        raise stage.stop.interruption(f"at step {step} of {total}")
    rows = history(trainer.state.log_history)
    # Not the loss alone: a diverged model's log-probs may be infinite where a clipped loss is not.
    if not all(math.isfinite(value) for row in rows for value in row.values()):
        raise DataError(f"{stage.name}: the loss became infinite or NaN; lower {stage.name}.learning_rate")
    check_learnt(stage.name, before, bit_sums(trained_weights(trainer.model)), steps)
    if is_main_process():
        write_jsonl(stage.work / "history.jsonl", rows)
    return rows
