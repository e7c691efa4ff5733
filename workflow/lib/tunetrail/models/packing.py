"""Packs several short raw texts into one row, and checks that the model keeps them apart.

Positions restart with every text, which makes transformers keep attention within it, and the first token of a text is
not a label. So each token is predicted from the same tokens as in a row of its own (Krell et al. 2021).
"""

import bisect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tunetrail.contract.distributed import is_main_process
from tunetrail.errors import ConfigError
from tunetrail.models.supervised import blocks_of, tokenize
from tunetrail.models.weights import weight_of

log = logging.getLogger("tunetrail")


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """The indices that go into each row of at most `room`, by best-fit decreasing: the longest first, each into the
    fullest row with enough room.

    >>> pack([3, 5, 2, 4, 1], 6)
    [[1, 4], [3, 2], [0]]
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(free, (lengths[i], -1))
        left, row = free.pop(place) if place < len(free) else (room, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        bisect.insort(free, (left - lengths[i], row))
    return rows


def packed(blocks: list[dict], room: int) -> list[dict]:
    """Blocks of text -> rows {input_ids, labels, seq_lengths}. Only blocks of equal weight share a row, which gets that
    weight."""
    found = []
    for weight in sorted({block.get("weight", 1.0) for block in blocks}):
        own = [block for block in blocks if block.get("weight", 1.0) == weight]
        for row in pack([len(block["input_ids"]) for block in own], room):
            parts = [own[i]["input_ids"] for i in row]
            found.append(
                {
                    "input_ids": [token for part in parts for token in part],
                    "labels": [label for part in parts for label in (-100, *part[1:])],
                    "seq_lengths": [len(part) for part in parts],
                }
                | ({} if weight == 1 else {"weight": weight})
            )
    return found


def alone(examples: list[dict]) -> list[dict]:
    """The examples as rows with one text each."""
    return [example | {"seq_lengths": [len(example["input_ids"])]} for example in examples]


def tokenize_packed(
    rows: list[dict], tokenizer: PreTrainedTokenizerBase, max_length: int, stage: str
) -> tuple[list[dict], dict[str, int]]:
    """`supervised.tokenize` with packed raw texts: (examples, the part of `metrics.json` about packing).

    A text longer than `max_length` becomes several blocks; a block of a single token has nothing to predict and is left
    out. Raises ConfigError if there is no raw text.
    """
    texts = [row for row in rows if "text" in row]
    if not texts:
        raise ConfigError(f"{stage}.packing: there is no raw text to pack; remove it")
    of_texts = [blocks_of(row["text"], tokenizer, max_length) for row in texts]
    blocks: list[dict] = [
        {"input_ids": block} | weight_of(row)
        for row, of_text in zip(texts, of_texts, strict=True)
        for block in of_text
        if len(block) > 1
    ]
    examples = packed(blocks, max_length)
    tokens, cut = sum(len(block["input_ids"]) for block in blocks), sum(len(of_text) > 1 for of_text in of_texts)
    lost = sum(len(block) == 1 for of_text in of_texts for block in of_text)
    if is_main_process():
        log.info("%s: packed %d texts into %d rows, %.0f%% full; %d are longer than max_length (%d) and were cut into "
            "blocks that do not see what stood before; tokens left out, alone in a block: %d",
            stage, len(texts), len(examples), 100 * tokens / (max_length * max(1, len(examples))), cut, max_length,
            lost)  # fmt: skip
    singles = alone(tokenize([row for row in rows if "text" not in row], tokenizer, max_length, stage))
    counts = {"packed_texts": len(texts), "packed_rows": len(examples), "texts_cut": cut, "tokens_left_out": lost}
    return singles + examples, counts


class PackedCollator:
    """Rows -> {input_ids, labels, position_ids}, each [B, T]. Padding is on the right and forms a text of its own.

    There is no attention mask: with one, transformers would treat a row as a single text.
    """

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        longest = max(len(example["input_ids"]) for example in examples)
        columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
        for example in examples:
            rest = longest - len(example["input_ids"])
            columns["input_ids"].append(example["input_ids"] + [self.pad_id] * rest)
            columns["labels"].append(example["labels"] + [-100] * rest)
            columns["position_ids"].append([i for n in (*example["seq_lengths"], rest) for i in range(n)])
        return {name: torch.tensor(column) for name, column in columns.items()}


@torch.no_grad()
def check_packs(model: Any, stage: str) -> None:
    """Raises ConfigError for a model in which a text sees the previous one in its row; tried on six tokens."""
    device = next(model.parameters()).device
    ids, positions = (torch.tensor([row], device=device) for row in ([1, 2, 3, 3, 1, 2], [0, 1, 2] * 2))
    together = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, 3:].float()
    alone = model(input_ids=ids[:, 3:], use_cache=False).logits[0].float()
    if (together - alone).norm() > 1e-3 * alone.norm():
        raise ConfigError(
            f"{stage}.packing: this model does not keep packed texts apart (a text sees the one before it); set it to "
            "false"
        )
