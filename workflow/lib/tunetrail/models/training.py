"""What the stages on Hugging Face trainers (sft, reward, dpo) share: order of the data, saving, resuming, leaving.

A trainer resumed from any checkpoint ends with the same bytes as one that never stopped: the order
of the data is a fixed list made beforehand, and a checkpoint holds weights, optimizer, schedule and
random states. A checkpoint counts only once its `complete.json` lists every file with its digest, so
an interrupted save is skipped and the one before it is used.
"""

import functools
import json
import logging
import math
import random
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from tunetrail.config.training import Epochs
from tunetrail.contract.distributed import is_main_process, of_all_processes, processes
from tunetrail.contract.progress import ProgressBar
from tunetrail.contract.runner import KEPT
from tunetrail.contract.stage import Stage
from tunetrail.errors import ConfigError, DataError
from tunetrail.files import sync, write_json, write_jsonl
from tunetrail.models.runtime import use_bf16
from tunetrail.models.scoring import gather_logprobs
from tunetrail.models.trackers import trainer_options
from tunetrail.provenance.manifest import list_files, sha256_file, walk
from tunetrail.seeds import derive_seed

log = logging.getLogger("tunetrail")

COMPLETE = "complete.json"
# What depends on the clock, or counts from the last resumption.
_NOT_RESULTS = ("total_flos", "train_loss", "num_tokens")


def epoch_order(lengths: Sequence[int], batch_size: int, epochs: int, seed: int) -> list[int]:
    """Row indices for all epochs in training order: batches of similar length, in random order.

    Every epoch shuffles anew; the remainder that does not fill a batch is left out, another one each
    time, so that every optimizer step sees `batch_size` rows.
    """
    order: list[int] = []
    for epoch in range(epochs):
        rng = random.Random(derive_seed(seed, "order", epoch))
        rows = list(range(len(lengths)))
        rng.shuffle(rows)
        rows = rows[: len(rows) - len(rows) % batch_size]
        rows.sort(key=lambda i: lengths[i])  # stable: equal lengths keep their random order
        batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        rng.shuffle(batches)
        order += [i for batch in batches for i in batch]
    return order


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
        "lr_scheduler_type": config.schedule,
        "warmup_steps": config.warmup,  # below 1 it is a share of the steps
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "optim": "adamw_torch_fused",
        "bf16": use_bf16(stage.shared["precision"]),
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",  # StageCallback decides
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,  # there are none
        "seed": derive_seed(stage.seed, stage.name) % 2**32,
    }


def score_labels_only(model: Any) -> None:
    """Gives a model that a TRL trainer prepared a head for the columns that hold labels, on a CPU.

    Without Triton, TRL's fused head scores every position, the prompts' too, and keeps no logits for
    the backward pass: of a step on short answers to longer prompts that is a large part (`make bench`).
    In float32 the numbers are the same. Where labels fill most columns, as raw text does, TRL's head stays
    in use: it keeps less in memory. Call it between making the trainer and training.
    """
    if next(model.parameters()).device.type != "cpu":
        return
    from trl.trainer.utils import FusedCausalLMOutput

    model = model.get_base_model() if hasattr(model, "peft_config") else model
    forward_of_trl = model.forward

    @functools.wraps(forward_of_trl)
    def forward(*args, fused_lm_head=False, labels=None, **kwargs):
        if not fused_lm_head:
            return forward_of_trl(*args, **({} if labels is None else {"labels": labels}), **kwargs)
        labelled = (labels != -100).any(0).nonzero()
        first = max(1, int(labelled[0])) if len(labelled) else 0  # the first column that is predicted
        if first <= labels.shape[1] // 2:
            return forward_of_trl(*args, fused_lm_head=True, labels=labels, **kwargs)
        targets = labels[:, first:]
        mask = targets != -100
        kwargs |= {"use_cache": False, "logits_to_keep": targets.shape[1] + 1}
        output = forward_of_trl(*args, **kwargs)
        logits = output.logits[:, :-1].float()
        log_probs = gather_logprobs(logits, targets.clamp_min(0))
        with torch.no_grad():
            watched = {
                "entropy": torch.stack([row.logsumexp(-1) - (row.softmax(-1) * row).sum(-1) for row in logits]),
                "mean_logits": logits.mean(-1),
                "is_top1": logits.argmax(-1) == targets,
            }

        def whole(x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(x.masked_fill(~mask, 0), (first - 1, 0))

        return FusedCausalLMOutput(
            log_probs=whole(log_probs),
            label_mask=whole(mask),
            aux_loss=getattr(output, "aux_loss", None),
            **{name: whole(x) for name, x in watched.items()},
        )

    model.forward = forward


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
            self.bar.advance(state.global_step - self.bar.done, f"loss {float(logs['loss']):.4f}")

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


def kept_steps(total: int, count: int) -> list[int]:
    """At most `count` steps at equal distances before the last of `total`.

    >>> kept_steps(12, 3), kept_steps(2, 5)
    ([3, 6, 9], [1])
    """
    return sorted({round(total * i / (count + 1)) for i in range(1, count + 1)} - {0, total})


def keep(stage: Stage, step: int, save: Callable[[Path], None]) -> None:
    """Saves the model of this step for good, beside what is saved to resume from. Call it in the process that writes.

    Args:
        save: fills a folder.
    """
    folder = stage.state / KEPT / str(step)
    if folder.exists():  # an earlier attempt came this far, with the same bytes
        return
    pending = folder.with_name(f"{step}.new")
    shutil.rmtree(pending, ignore_errors=True)
    save(pending)
    for path in walk(pending):  # whoever finds the folder takes it for whole
        sync(path)
    stage.attempt.check_leases()
    pending.rename(folder)


def publish_kept(stage: Stage) -> None:
    """Puts the kept models into the artifact; a copy, since this attempt may yet be killed."""
    if (stage.state / KEPT).exists():
        shutil.copytree(stage.state / KEPT, stage.work / "checkpoints", ignore=shutil.ignore_patterns("*.new"))


class KeepCallback(TrainerCallback):
    """Keeps models along the way."""

    def __init__(self, stage: Stage, count: int, save: Callable[[Any, Path], None]):
        self.stage, self.count, self.save = stage, count, save

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if is_main_process() and state.global_step in kept_steps(state.max_steps, self.count):
            keep(self.stage, state.global_step, functools.partial(self.save, model))


def mark_complete(stage: Stage, checkpoint: Path) -> None:
    """Declares a checkpoint whole: the last file to be written lists the others, and all are on disk.

    The record has its digest before: an attempt that goes on from a checkpoint is then known to go on from this run's.
    """
    stage.attempt.check_leases()
    with ThreadPoolExecutor() as pool:  # the disk writes while the processors hash
        written = pool.map(sync, walk(checkpoint))
        write_json(checkpoint / f".{COMPLETE}", list_files(checkpoint))
        list(written)  # raises what went wrong
    sync(checkpoint / f".{COMPLETE}")
    stage.attempt.saves = [
        *stage.attempt.saves[-1:],
        {"name": checkpoint.name, "digest": sha256_file(checkpoint / f".{COMPLETE}")},
    ]
    stage.attempt.note("states_out", stage.attempt.saves)
    (checkpoint / f".{COMPLETE}").rename(checkpoint / COMPLETE)
    sync(checkpoint)  # before the older ones go


def is_complete(checkpoint: Path) -> bool:
    """Whether every file of the checkpoint is as it was when its save ended."""
    try:
        listed = json.loads((checkpoint / COMPLETE).read_text())
    except (OSError, ValueError):
        return False
    return [f for f in list_files(checkpoint) if f["path"] != COMPLETE] == listed


def _by_step(state: Path) -> list[Path]:
    found = [p for p in state.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def keep_newest(state: Path) -> None:
    """Two: should a disk lose a part of the last, the one before it is there."""
    for old in _by_step(state)[:-2]:
        shutil.rmtree(old)


def latest_checkpoint(stage: Stage) -> Path | None:
    """The newest whole checkpoint, whose digest goes into the record; broken ones are removed.

    Call it in all processes: one looks, for all.
    """
    return of_all_processes(_newest_whole(stage) if is_main_process() else None)[0]


def _newest_whole(stage: Stage) -> Path | None:
    for checkpoint in reversed(_by_step(stage.state)):
        if is_complete(checkpoint):
            log.info("%s: resuming from %s", stage.name, checkpoint.name)
            state = {"name": checkpoint.name, "digest": sha256_file(checkpoint / COMPLETE)}
            stage.attempt.saves = [state]  # a later attempt may have to begin from it again
            stage.attempt.note("state_in", state)
            stage.attempt.note("states_out", stage.attempt.saves)
            return checkpoint
        log.info("%s: the save was interrupted; using the one before it", checkpoint)
        shutil.rmtree(checkpoint)
    return None


def history(log_history: list[dict]) -> list[dict]:
    """One row a step of what the trainer logged, without anything that the clock or an interruption decides."""
    return [
        {k: v for k, v in row.items() if k not in _NOT_RESULTS and "runtime" not in k and "per_second" not in k}
        for row in log_history
        if "loss" in row
    ]


def train(stage: Stage, trainer: Any) -> list[dict]:
    """Trains to the end, resuming where an earlier attempt was; writes and returns `history.jsonl`.

    Raises Interrupted when told to stop, after saving; DataError when the loss is no longer finite.
    """
    callback = StageCallback(stage)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(callback)
    trainer.create_model_card = lambda *_, **__: None  # TRL's, with every save; ours is `tunetrail audit card`
    checkpoint = latest_checkpoint(stage)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if callback.stopping:
        step, total = trainer.state.global_step, trainer.state.max_steps
        raise stage.stop.interruption(f"at step {step} of {total}")
    rows = history(trainer.state.log_history)
    # Not the loss alone: a diverged model's log-probs may be infinite where a clipped loss is not.
    if not all(math.isfinite(value) for row in rows for value in row.values()):
        raise DataError(f"{stage.name}: the loss became infinite or NaN; lower {stage.name}.learning_rate")
    if is_main_process():
        write_jsonl(stage.work / "history.jsonl", rows)
    return rows
