"""A README.md as Hugging Face reads it, https://huggingface.co/docs/hub/model-cards.

`base_model` is the first published ancestor.
"""

import json
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from tunetrail.errors import DataError
from tunetrail.provenance.exports.common import licence_of, lineage_of, record_of
from tunetrail.provenance.ledger import artifacts
from tunetrail.provenance.lineage import Node, ancestors, is_checkpoint, run_of
from tunetrail.provenance.manifest import MANIFEST, PROVENANCE, read_manifest
from tunetrail.provenance.record import Record
from tunetrail.provenance.schema import Dependency


def published_ancestor(node: Node) -> Dependency | None:
    """The first model on the way up that others can fetch: a hub repository or a package; None where there is none."""
    for found in ancestors(node).values():
        for d in record_of(found).of_role("base"):
            if d.get("uri"):
                return d
    return None


def results(folder: Path, node: Node) -> dict[str, dict]:
    """Metrics with intervals of this model's evaluation in the same run: every metric that has a mean, low and high."""
    run = run_of(node.folder)
    for candidate in artifacts(run) if run else []:
        path = candidate / PROVENANCE
        if not path.exists():
            continue
        record = Record(path.read_bytes(), str(path))
        subjects = {s["digest"]["sha256"] for s in record.statement["subject"][1:]}
        if record.stage == "evaluation" and node.identity in subjects:
            metrics = json.loads((candidate / "metrics.json").read_text())
            return {
                k: v
                for k, v in metrics.items()
                if isinstance(v, dict) and {"mean", "low", "high"} <= v.keys() and v["mean"] is not None
            }
    return {}


def _is_on_hub(source: Dependency) -> bool:
    name = source["name"]
    return bool(source["annotations"].get("kind")) and "/" in name and not Path(name).exists()


def export(folder: Path) -> str:
    node, nodes = lineage_of(folder)
    if not is_checkpoint(node):
        raise DataError(f"{folder}: holds no model; a card is of a checkpoint")
    base = published_ancestor(node)
    repo = base["name"] if base and base["uri"].startswith("pkg:huggingface/") else None
    licence = licence_of(nodes)
    sources = [d for n in nodes for d in record_of(n).of_role("source")]
    measured = results(folder, node)
    data = ModelCardData(
        library_name="transformers",
        license=licence.lower() if licence else None,
        base_model=repo,
        base_model_relation="adapter" if (folder / "model/adapter_config.json").exists() else "finetune",
        datasets=sorted({d["name"] for d in sources if _is_on_hub(d)}) or None,
        tags=["tunetrail", record_of(node).stage],
        model_name=node.name,
        eval_results=[
            EvalResult(
                task_type="text-generation", dataset_type="held-out", dataset_name="held-out prompts of the run",
                metric_type=key, metric_name=key, metric_value=round(value["mean"], 4),
            )
            for key, value in measured.items()
        ] or None,
    )  # fmt: skip
    record = record_of(node)
    changes = " with uncommitted changes" if record.code.get("dirty") else ""
    lines = [
        "---", data.to_yaml(), "---", "", f"# {node.name}", "",
        f"Made by the stage `{record.stage}` of tunetrail, commit `{record.code.get('commit')}`{changes}.",
        "", "## Where it comes from", "",
        f"- first published ancestor: {base['name'] if base else 'none: random weights or a local folder'}",
        *[f"- {kind}: {n.name}, manifest `{n.identity}`" for kind, n in ancestors(node).items() if n is not node],
        *[f"- data: {d['name']}, licence {d['annotations'].get('licence') or 'not stated'}" for d in sources],
        *[f"- labels by {', '.join(d['annotations']['labelers'])}" for d in record.of_role("labels")],
        "", "## Results", "",
    ]  # fmt: skip
    lines += [
        f"- {key}: {v['mean']:.4g} [{v['low']:.4g}, {v['high']:.4g}], n = {v.get('n')}" for key, v in measured.items()
    ] or ["Not measured."]
    tensors = read_manifest(folder / MANIFEST).get("tensors", [])
    lines += [
        "", "## How to verify", "",
        f"`manifest.json` has sha256 `{node.identity}` and lists the sha256 of every file and of {len(tensors)} "
        f"tensors; `provenance.json` has sha256 `{record.digest}`.", "",
        "```", f"tunetrail audit verify --deep {node.name}", "```", "",
    ]  # fmt: skip
    return "\n".join(lines)
