"""Refuses models of other runs that were trained on rows which this run measures on.

A run that starts from another run's model splits its own data. With other shares, another seed or more data, its test
rows may be among those that the model was trained on. The records of the model's lineage say what it was trained on, as
long as that data still exists.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from tunetrail.config.shares import PAIRED
from tunetrail.data.contamination import compared_text
from tunetrail.errors import DataError
from tunetrail.files import read_jsonl
from tunetrail.provenance.lineage import Lineage, nearest_first

log = logging.getLogger("tunetrail")

TRAINS_ON = {"sft": "sft", "reward": "reward", "kto": "reward", "ppo": "rl"} | dict.fromkeys(PAIRED, "reward")
"""Stage -> the split that it trains on."""


def trained_on(artifact: Path) -> set[str]:
    """The texts that a model and its ancestors were trained on, in the form of `compared_text`.

    Args:
        artifact: the model's folder, with its manifest.
    """
    texts: set[str] = set()
    for node in nearest_first([Lineage().add(artifact)]):
        if node.record is None or node.record.stage not in TRAINS_ON:
            continue
        splits = [TRAINS_ON[node.record.stage]]
        if node.record.config.get("ptx_coef"):
            splits.append("sft")
        data = next((at.folder for at in nearest_first([node]) if at.record and at.record.stage == "data"), None)
        for split in splits:
            rows = _rows(data / f"{split}.jsonl") if data else None
            if rows is None:
                log.warning("%s: the %s rows that it was trained on cannot be read any more, and so are not compared "
                    "with what this run measures on", node.folder, split)  # fmt: skip
            texts.update(map(compared_text, rows or ()))
    return texts


def _rows(path: Path) -> list[dict] | None:
    """The rows of a split; None if the file is gone, or from a version whose rows lack `messages`."""
    try:
        rows = read_jsonl(path)
    except (OSError, ValueError):
        return None
    return rows if all("text" in row or "messages" in row for row in rows) else None


def check_unseen(key: str, artifact: Path, measured: Sequence[dict]) -> None:
    """Raises DataError if a model was trained on rows of the evaluation or held-out splits.

    Args:
        key: the config key that names the model.
        artifact: the model's folder.
        measured: the rows of those splits.
    """
    texts = trained_on(artifact)
    seen = [row for row in measured if compared_text(row) in texts]
    if seen:
        raise DataError(
            f"{key}: the model in {artifact}, or one that it descends from, was trained on {len(seen)} of the "
            f"{len(measured)} rows that this run measures on, such as {compared_text(seen[0])[:40]!r}; pin a test set "
            "that no run trained on (`split: evaluation`, `split: heldout`), or split the data as that run did: the "
            "same seed, sources and shares"
        )
