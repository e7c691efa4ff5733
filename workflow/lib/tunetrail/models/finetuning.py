"""Fine-tuning a causal language model by methods to compare: all weights, LoRA, 4-bit LoRA, prompt tuning.

The training loop is plain: a constant learning rate and no checkpoints, since an interrupted training is short enough
to start over. It has not been run on a GPU.
"""

import contextlib
import gc
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tunetrail.config.methods import MethodConfig
from tunetrail.models.batching import collate
from tunetrail.models.cpu.memory import return_freed_memory
from tunetrail.models.loading import with_lora, without_dropout
from tunetrail.models.runtime import autocast, device, use_bf16

Example = tuple[list[int], list[int]]
"""(ids given as context, ids to learn)"""


def build(folder: Path, method: MethodConfig, precision: str, seed: int) -> Any:
    """The model in `folder`, ready to be trained by `method`; all other weights are frozen."""
    options: dict[str, Any] = {"dtype": torch.float32}
    if method.four_bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16 if use_bf16(precision) else torch.float32,
        )
    model = without_dropout(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **options)).to(
        device()
    )
    if method.prompt_tokens:
        from peft import PromptTuningConfig, PromptTuningInit, get_peft_model

        torch.manual_seed(seed)
        # The prompt starts from the vectors of random words: from random numbers it learns slowly (Lester et al. 2021).
        return get_peft_model(
            model,
            PromptTuningConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=method.prompt_tokens,
                prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
            ),
        )
    return with_lora(model, method.lora, seed)


def token_losses(model: Any, examples: Sequence[Example], pad_id: int, precision: str) -> list[torch.Tensor]:
    """For each example, the negative log-prob of every token to learn [R], in nats; the first of a text has none.

    Rows are padded on the right, so that the vectors of a tuned prompt come directly before the text.
    """
    batch = collate([[] for _ in examples], [given + learnt for given, learnt in examples], pad_id).to(device())
    ids = batch.input_ids
    with autocast(precision):
        out = model(input_ids=ids, attention_mask=batch.attention_mask, use_cache=False)
    logits = out.logits[:, -ids.shape[1] :]  # without those of a tuned prompt, which come first
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
    return [
        row[max(len(given) - 1, 0) : len(given) + len(learnt) - 1]
        for row, (given, learnt) in zip(losses, examples, strict=True)
    ]


@torch.no_grad()
def mean_losses(model: Any, examples: Sequence[Example], pad_id: int, precision: str, batch_size: int) -> list[float]:
    """For each example, the mean loss over its tokens to learn, in nats per token."""
    model.eval()
    parts = (examples[i : i + batch_size] for i in range(0, len(examples), batch_size))
    losses = [float(row.mean()) for part in parts for row in token_losses(model, part, pad_id, precision)]
    model.train()
    return losses


class Cost:
    """Seconds of each optimizer step, and the peak memory of any step above what was in use at construction."""

    def __init__(self) -> None:
        gc.collect()
        return_freed_memory()
        self.seconds: list[float] = []
        self.peak: int | None = None
        """In bytes; None if it cannot be measured."""
        self._before = _memory_in_use()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        _forget_peak()
        started = time.perf_counter()
        yield
        self.seconds.append(time.perf_counter() - started)
        if (peak := _peak_memory()) is not None and self._before is not None:
            self.peak = max(self.peak or 0, peak - self._before)


def _status(name: str) -> int | None:
    """A size in Linux's /proc/self/status, in bytes."""
    with contextlib.suppress(OSError):
        if line := re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE):
            return 1024 * int(line[1])
    return None


def _memory_in_use() -> int | None:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _status("VmRSS")


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def _peak_memory() -> int | None:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def train(
    model: Any,
    batches: Sequence[Sequence[Example]],
    learning_rate: float,
    pad_id: int,
    precision: str,
    cost: Cost,
    on_step: Callable[[int], None],
) -> None:
    """Takes one AdamW step per batch. The loss is the mean over its tokens to learn; gradients are clipped to norm 1.

    Args:
        on_step: called after each step with its number.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    model.train()
    for step, batch in enumerate(batches, 1):
        with cost.step():
            torch.cat(token_losses(model, batch, pad_id, precision)).mean().backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        on_step(step)
