"""One save of the demo's SFT state, compared with writing its bytes: python -m tests.benchmarks.saving

Training waits for it once in $TUNETRAIL_CHECKPOINT_MINUTES.
"""

import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from tests.benchmarks.workload import MODEL
from tunetrail.contract.stage import Attempt, Request, Stage
from tunetrail.contract.stop import Stop
from tunetrail.models.loading import load_causal_lm, load_tokenizer
from tunetrail.models.runtime import prepare
from tunetrail.models.training import StageCallback


def trained(folder: Path) -> SFTTrainer:
    """A trainer of the demo's model after one step, so that its optimizer has a state."""
    stage = Stage(Request("sft", {}, {}, folder), {}, Attempt(folder, folder, Stop()))
    trainer = SFTTrainer(
        model=load_causal_lm(MODEL),
        args=SFTConfig(output_dir=str(folder), max_steps=1, per_device_train_batch_size=1, bf16=False, use_cpu=True,
            max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, report_to=[], disable_tqdm=True,
            gradient_checkpointing=False, save_strategy="no", optim="adamw_torch_fused"),
        train_dataset=Dataset.from_list([{"input_ids": [7, 8, 9], "labels": [-100, 8, 9]}]),
        processing_class=load_tokenizer(MODEL),
    )  # fmt: skip
    trainer.train()
    trainer.add_callback(StageCallback(stage))
    return trainer


def save(trainer: SFTTrainer) -> float:
    """Seconds that a step waits until the checkpoint is complete."""
    start = time.perf_counter()
    trainer._save_checkpoint(trainer.model, None)
    trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
    return time.perf_counter() - start


def write(contents: list[bytes], folder: Path) -> float:
    """Seconds to write these files and sync them to disk."""
    folder.mkdir()
    start = time.perf_counter()
    for n, content in enumerate(contents):
        with (folder / str(n)).open("wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
    return time.perf_counter() - start


def measure(repeats: int = 5) -> dict:
    """Medians of alternating saves and plain writes; the median of their ratios; the size."""
    saves, writes = [], []
    with tempfile.TemporaryDirectory(dir=".") as name:  # on the same disk as the results
        trainer = trained(Path(name))
        for _ in range(repeats):
            saves.append(save(trainer))
            [checkpoint] = Path(name).glob("checkpoint-*")
            contents = [path.read_bytes() for path in sorted(checkpoint.rglob("*")) if path.is_file()]
            writes.append(write(contents, Path(name) / "plain"))
            for folder in (checkpoint, Path(name) / "plain"):
                shutil.rmtree(folder)
    ratios = [a / b for a, b in zip(saves, writes, strict=True)]
    return {
        "seconds": statistics.median(saves),
        "share_of_training": statistics.median(saves) / Stop().interval,
        "of_writing": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
        "bytes": sum(map(len, contents)),
    }


if __name__ == "__main__":
    prepare(17)
    with contextlib.redirect_stdout(sys.stderr):
        found = measure()
    print(json.dumps(found))
