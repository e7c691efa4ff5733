"""Compares two artifacts on one screen: data, config, code, packages, hardware, seeds, labels, weights."""

from itertools import islice
from pathlib import Path
from typing import Any

from tunetrail.files import changed, flatten
from tunetrail.provenance.lineage import Lineage, Node, ancestors
from tunetrail.provenance.manifest import MANIFEST, read_manifest
from tunetrail.provenance.record import Record


def data_rows(a: Node | None, b: Node | None) -> dict[str, dict[str, int]]:
    """Split -> the numbers of rows in both, only in A, and only in B."""
    counts = {}
    names = {path.name for node in (a, b) if node for path in node.folder.glob("*.jsonl")}
    for name in sorted(names):
        rows = [
            set((node.folder / name).read_bytes().splitlines()) if node and (node.folder / name).exists() else set()
            for node in (a, b)
        ]
        if rows[0] != rows[1]:
            counts[name] = {
                "both": len(rows[0] & rows[1]),
                "only A": len(rows[0] - rows[1]),
                "only B": len(rows[1] - rows[0]),
            }
    return counts


def tensors(a: Path, b: Path) -> dict[str, Any]:
    """Which tensors differ, and by how much: relative to A's norm if both have the same shape."""
    before, now = (
        {(t["file"], t["name"]): t for t in read_manifest(folder / MANIFEST).get("tensors", [])} for folder in (a, b)
    )
    others = [key for key in sorted(before.keys() & now.keys()) if before[key]["sha256"] != now[key]["sha256"]]
    measured: list[dict] = []
    if others:
        from safetensors import safe_open

        for file, name in others:
            with safe_open(a / file, "pt") as x, safe_open(b / file, "pt") as y:
                left, right = x.get_tensor(name).float(), y.get_tensor(name).float()
            entry: dict[str, Any] = {"tensor": name, "file": file}
            if left.shape == right.shape:
                gap = right - left
                entry |= {
                    "relative": float(gap.norm() / left.norm().clamp_min(1e-30)),
                    "largest": float(gap.abs().max()),
                }
            measured.append(entry)
        measured.sort(key=lambda entry: -entry.get("relative", float("inf")))
    return {
        "same": len(before.keys() & now.keys()) - len(others),
        "different": measured,
        "only A": [f"{file}: {name}" for file, name in sorted(before.keys() - now.keys())],
        "only B": [f"{file}: {name}" for file, name in sorted(now.keys() - before.keys())],
    }


def hardware(record: Record) -> dict[str, Any]:
    keys = ("host", "partition", "nodes", "gpus", "driver", "cpu", "cores", "world_size", "deterministic")
    return {key: record.attempts[-1].get(key) for key in keys}


def diff(a: Path, b: Path) -> dict[str, Any]:
    """Everything that differs between two artifacts and what they were made from. Raises DataError."""
    lineage = Lineage()
    nodes = [lineage.add(folder) for folder in (a, b)]
    lines = [ancestors(node) for node in nodes]
    both = [(key, lines[0][key].record, lines[1][key].record) for key in lines[0] if key in lines[1]]
    config: dict[str, list] = {}
    seeds: dict[str, list] = {}
    packages: dict[str, list] = {}
    machines: dict[str, list] = {}
    labels: dict[str, list] = {}
    code: dict[str, list] = {}
    for stage, x, y in both:
        assert x is not None
        assert y is not None
        for key, pair in changed(flatten(x.config_file), flatten(y.config_file)).items():
            (seeds if key == "seed" else config)[f"{stage}.{key.removeprefix('config.')}"] = pair
        packages |= changed(x.packages, y.packages)
        machines |= {f"{stage}.{key}": pair for key, pair in changed(hardware(x), hardware(y)).items()}
        code |= {f"{stage}.{key}": pair for key, pair in changed(x.code, y.code).items() if key != "role"}
        ours, theirs = ([d.get("digest") for d in r.of_role("labels")] for r in (x, y))
        if ours != theirs:
            labels[stage] = [ours, theirs]
    data = [line.get("data") for line in lines]
    return {
        "a": {"folder": str(nodes[0].folder), "manifest": nodes[0].identity},
        "b": {"folder": str(nodes[1].folder), "manifest": nodes[1].identity},
        "equal": nodes[0].identity == nodes[1].identity,
        "stages": changed({k: n.identity for k, n in lines[0].items()}, {k: n.identity for k, n in lines[1].items()}),
        "data rows": data_rows(*data) if data[0] is not data[1] else {},
        "config": config,
        "seeds": seeds,
        "labels": labels,
        "code": code,
        "packages": packages,
        "hardware": machines,
        "tensors": tensors(nodes[0].folder, nodes[1].folder),
    }


def as_text(found: dict[str, Any], limit: int = 8) -> str:
    """The differences as text for one screen."""
    lines = [
        f"A {found['a']['folder']}  {found['a']['manifest'][:16]}",
        f"B {found['b']['folder']}  {found['b']['manifest'][:16]}",
    ]
    if found["equal"]:
        lines.append("equal: the same files")

    def short(value: Any) -> str:
        text = "–" if value is None else str(value)
        return text if len(text) <= 40 else f"{text[:18]}…{text[-18:]}"

    for section in ("stages", "data rows", "config", "seeds", "labels", "code", "packages", "hardware"):
        entries = found[section]
        if not entries:
            continue
        lines.append(f"{section}: {len(entries)} differ")
        for key, pair in islice(entries.items(), limit):
            shown = (
                ", ".join(f"{k} {v}" for k, v in pair.items())
                if isinstance(pair, dict)
                else " -> ".join(map(short, pair))
            )
            lines.append(f"  {key}: {shown}")
        if len(entries) > limit:
            lines.append(f"  and {len(entries) - limit} more (--json shows all)")
    weights = found["tensors"]
    if any(weights.values()):
        lines.append(
            f"tensors: {weights['same']} equal, {len(weights['different'])} differ, {len(weights['only A'])} only in "
            f"A, {len(weights['only B'])} only in B"
        )
        for entry in weights["different"][:limit]:
            if "relative" in entry:
                lines.append(
                    f"  {entry['tensor']}: moved by {entry['relative']:.2%} of its norm, {entry['largest']:.2e} at most"
                )
            else:
                lines.append(f"  {entry['tensor']}: another shape")
        if len(weights["different"]) > limit:
            lines.append(f"  and {len(weights['different']) - limit} more")
    return "\n".join(lines)
