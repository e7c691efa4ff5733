"""A README.md as Hugging Face reads it, https://huggingface.co/docs/hub/model-cards.

`base_model` is the first published ancestor. The text is in model_card.md.j2.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from tunetrail.errors import DataError
from tunetrail.provenance.exports.common import licence_of, lineage_of, record_of
from tunetrail.provenance.ledger import artifacts
from tunetrail.provenance.lineage import Node, ancestors, is_checkpoint, run_of
from tunetrail.provenance.manifest import MANIFEST, METRICS, PROVENANCE, read_manifest
from tunetrail.provenance.record import Record
from tunetrail.provenance.schema import Dependency

TEMPLATE = Path(__file__).with_name("model_card.md.j2")


def published_ancestor(node: Node) -> Dependency | None:
    """The nearest model upstream that others can fetch: a hub repository or a package; None where there is none."""
    bases = (d for ancestor in ancestors(node).values() for d in record_of(ancestor).of_role("base"))
    return next((d for d in bases if d.get("uri")), None)


def results(node: Node) -> dict[str, dict[str, Any]]:
    """The metrics with an interval of this model's evaluation in the same run."""
    run = run_of(node.folder)
    for folder in artifacts(run) if run else []:
        path = folder / PROVENANCE
        if not path.exists():
            continue
        record = Record(path.read_bytes(), str(path))
        subjects = {s["digest"]["sha256"] for s in record.statement["subject"][1:]}
        if record.stage == "evaluation" and node.identity in subjects:
            metrics = json.loads((folder / METRICS).read_text())
            return {k: v for k, v in metrics.items() if isinstance(v, dict) and _has_interval(v)}
    return {}


def _has_interval(value: dict[str, Any]) -> bool:
    return {"mean", "low", "high"} <= value.keys() and value["mean"] is not None


def _is_on_hub(source: Dependency) -> bool:
    name = source["name"]
    return bool(source["annotations"].get("kind")) and "/" in name and not Path(name).exists()


def least_transformers(config: dict[str, Any]) -> str:
    """The oldest version of transformers that reads this config.json as it was meant, see `models.saving`.

    4.57 was tried; version 4 takes its defaults, without a word, for rotary embeddings that have no form it reads.
    """
    return "5.0" if config.get("rope_parameters") and "rope_theta" not in config else "4.57"


def export(folder: Path) -> str:
    node, nodes = lineage_of(folder)
    if not is_checkpoint(node):
        raise DataError(f"{folder}: holds no model; a card is of a checkpoint")
    base, licence, measured = published_ancestor(node), licence_of(node), results(node)
    sources = [d for n in nodes for d in record_of(n).of_role("source")]
    held_out: dict[str, Any] = {"dataset_type": "held-out", "dataset_name": "held-out prompts of the run"}
    data = ModelCardData(
        library_name="transformers",
        license=licence.lower() if licence else None,
        base_model=base["name"] if base and base["uri"].startswith("pkg:huggingface/") else None,
        base_model_relation="finetune",
        datasets=sorted({d["name"] for d in sources if _is_on_hub(d)}) or None,
        tags=["tunetrail", record_of(node).stage],
        model_name=node.name,
        eval_results=[
            EvalResult("text-generation", metric_type=k, metric_name=k, metric_value=round(v["mean"], 4), **held_out)
            for k, v in measured.items()
        ]
        or None,
    )
    config = json.loads((folder / "model/config.json").read_text())
    tensors = len(read_manifest(folder / MANIFEST).get("tensors", []))
    card = ModelCard.from_template(
        data,
        str(TEMPLATE),
        node=node,
        record=record_of(node),
        base=base,
        ancestors=ancestors(node),
        sources=sources,
        results=measured,
        tensors=tensors,
        config=config,
        auto_class=f"AutoModelFor{'SequenceClassification' if 'reward_pooling' in config else 'CausalLM'}",
        least_transformers=least_transformers(config),
        has_adapter=(folder / "adapter").is_dir(),
    )
    return f"{card}\n"
