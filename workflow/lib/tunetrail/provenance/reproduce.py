"""Runs a stage again from its record, in a scratch folder, and compares the result."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunetrail.errors import DataError
from tunetrail.files import read_jsonl
from tunetrail.provenance.diff import tensors
from tunetrail.provenance.lineage import Lineage, Node
from tunetrail.provenance.manifest import MANIFEST, canonical, identity, read_manifest

TIERS = ("same file bytes", "same tensors", "within tolerance", "same first losses", "different")
MARK = ".reproduction"
"""Marks a scratch folder that may be emptied."""
FIRST = 5
"""How many steps' losses are compared."""


@dataclass
class Reproduction:
    tier: str
    folder: Path
    details: dict[str, Any] = field(default_factory=dict)


def command(node: Node, scratch: Path) -> list[str]:
    """The stage's command line. Raises DataError if an input is gone or has changed."""
    record = node.record
    if record is None:
        raise DataError(f"{node.folder}: {node.fault}")
    inputs = []
    for role, parent in record.parents.items():
        input_node = node.parents.get(role)
        if input_node is None or input_node.identity != parent["manifest"]:
            state = "is gone" if input_node is None else "has changed"
            raise DataError(f"{node.folder}: its input {role} ({parent['name']}) {state}; restore it first")
        inputs += ["--input", f"{role}={os.path.relpath(input_node.folder / MANIFEST)}"]
    config = scratch / "config.json"
    config.write_bytes(canonical(_as_given(record.config_file)))
    part = [] if record.part == "0/1" else ["--part", record.part]
    return [
        sys.executable,
        "-m",
        f"tunetrail.stages.{record.stage}",
        "--config",
        str(config),
        *inputs,
        *part,
        "--output",
        str(scratch / "out" / MANIFEST),
        "--state",
        str(scratch / "state"),
    ]


def _as_given(config: dict) -> dict:
    """The config file with its seed as a number: a record keeps one from 2^53 on as a string."""
    seed = config.get("seed")
    return config | ({"seed": int(seed)} if isinstance(seed, str) and seed.lstrip("-").isdigit() else {})


def compare(original: Path, again: Path, tolerance: float) -> Reproduction:
    """The first of TIERS that holds.

    Args:
        tolerance: for weights relative to each tensor's norm, for numbers in metrics.json relative to themselves.
    """
    if identity(original) == identity(again):
        return Reproduction(TIERS[0], again)
    manifests = [read_manifest(folder / MANIFEST) for folder in (original, again)]
    weights = tensors(original, again)
    names = [sorted(m["path"] for m in manifest["files"]) for manifest in manifests]
    digests = [{(t["file"], t["name"]): t["sha256"] for t in m.get("tensors", [])} for m in manifests]
    details: dict[str, Any] = {
        "files that differ": sorted(f["path"] for f in manifests[0]["files"] if f not in manifests[1]["files"]),
        "tensors that differ": len(weights["different"]),
    }
    if digests[0] and digests[0] == digests[1]:
        return Reproduction(TIERS[1], again, details)
    if not digests[0]:
        return Reproduction(TIERS[4], again, details)
    far = max((_number(entry.get("relative")) for entry in weights["different"]), default=0.0)
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (original, again)]
    gap = _gap(*metrics)
    details |= {"largest relative change of a tensor": far, "largest relative change of a metric": gap}
    same_names = names[0] == names[1] and not weights["only A"] and not weights["only B"]
    if same_names and far <= tolerance and gap <= tolerance:
        return Reproduction(TIERS[2], again, details)
    losses = [_losses(folder) for folder in (original, again)]
    if losses[0] and losses[0][:FIRST] == losses[1][:FIRST]:
        return Reproduction(TIERS[3], again, details)
    return Reproduction(TIERS[4], again, details)


def _number(value: float | None) -> float:
    """Infinity for None and NaN."""
    return float("inf") if value is None or value != value else value


def _losses(folder: Path) -> list[float | None]:
    path = folder / "history.jsonl"
    rows = read_jsonl(path) if path.exists() else []
    return [row.get("loss", row.get("policy_loss")) for row in rows]


def _gap(a: Any, b: Any) -> float:
    """The largest relative difference between the numbers in two JSON values; infinity if anything else differs."""
    if isinstance(a, bool) or isinstance(b, bool) or a is None or isinstance(a, str):
        return 0.0 if a == b else float("inf")
    if isinstance(a, int | float) and isinstance(b, int | float):
        return abs(a - b) / max(abs(a), abs(b), 1e-12)
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return max((_gap(a[key], b[key]) for key in a), default=0.0)
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return max(map(_gap, a, b), default=0.0)
    return float("inf")


def reproduce(folder: Path, scratch: Path, tolerance: float = 1e-3) -> Reproduction:
    """Runs the stage that made `folder` again in `scratch`. Raises DataError if it cannot be run."""
    node = Lineage().add(folder)
    if scratch.exists() and any(scratch.iterdir()) and not (scratch / MARK).exists():
        raise DataError(f"{scratch}: is not empty, and not of an earlier reproduction; name another --scratch")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    (scratch / MARK).touch()
    # With another number of threads, sums would have another order.
    last = node.record.attempts[-1].get("variables", {}) if node.record else {}
    threads = {name: value for name, value in last.items() if name.endswith("_NUM_THREADS")}
    reply = subprocess.run(command(node, scratch), env=os.environ | threads, check=False)
    if reply.returncode:
        raise DataError(
            f"{folder}: the stage ended with exit code {reply.returncode}; its output is above, its state in {scratch}"
        )
    return compare(node.folder, scratch / "out", tolerance)
