"""The work that both sides of a comparison do, and its cost in arithmetic.

The model and the texts are those of the embedded default: results/demo/base and results/demo/data.
Nothing here imports the library, so that the peers' own environment can read it.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

MODEL = Path("results/demo/base/model")
DATA = Path("results/demo/data")
RESPONSE_TOKENS = 48
EPISODES = 32
EPOCHS = 4
SAMPLED_AT_ONCE = 64
ROWS = 64
"""Rows for supervised fine-tuning; reward models and DPO get a quarter as many prompts with four completions each."""


def tokenizer(side: str = "right") -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL, padding_side=side)


def rows(split: str, n: int) -> list[dict]:
    found = [json.loads(line) for line in (DATA / f"{split}.jsonl").read_text().splitlines()]
    if len(found) < n:
        raise SystemExit(f"{DATA}/{split}.jsonl has {len(found)} rows, and the benchmark wants {n}")
    return found[:n]


def prompt_ids(split: str, n: int) -> list[list[int]]:
    encode = tokenizer()
    return [encode(row["prompt"], add_special_tokens=False)["input_ids"] for row in rows(split, n)]


def ranked(n: int) -> list[tuple[str, list[str]]]:
    """(prompt, four completions from best to worst): its author's sentence and those of the next three functions."""
    found = rows("sft", n)
    return [(row["prompt"], [found[(i + j) % n]["completion"] for j in range(4)]) for i, row in enumerate(found)]


class Arithmetic:
    """FLOPs of a model's passes, by the parameters used for each token; attention over other tokens is left out."""

    def __init__(self, model: Any):
        config = model.config
        self.head = config.hidden_size * config.vocab_size
        self.trunk = sum(p.numel() for p in model.base_model.parameters()) - self.head  # without the embedding

    def forward(self, tokens: int, scored: int = 0) -> int:
        """FLOPs for `tokens` through the trunk, `scored` of them through the head. With gradients it is three times as
        much."""
        return 2 * (self.trunk * tokens + self.head * scored)


def gemm_peak(dtype: torch.dtype, seconds: float = 2.0) -> float:
    """FLOP/s of products of two 2048 x 2048 matrices, the median of the fastest quarter."""
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / statistics.median(sorted(times)[: max(1, len(times) // 4)])


def memory_bandwidth() -> float:
    """Bytes per second that a sum over a gigabyte reads."""
    block = torch.ones(2**28)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - start)
    return block.numel() * block.element_size() / min(times)


def report(seconds: float, amount: int, flops: int | None = None, **more: Any) -> None:
    """Prints what a side did, for the driver to read."""
    # Not ru_maxrss, which starts at that of the parent process.
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    print(json.dumps({"seconds": seconds, "amount": amount, "flops": flops, "peak_bytes": peak} | more), flush=True)
