"""An artifact's lineage in formats that others read. Each is written by the format's own library.

slsa        the record as it is, in its DSSE envelope where it is signed
prov        W3C PROV-JSON: entities, activities, derivations
spdx        SPDX 3.0.1 with the AI and dataset profiles: trainedOn, descendantOf
ro-crate    Workflow Run RO-Crate metadata (ro-crate-metadata.json) of the run
model-card  a README.md as Hugging Face reads it
"""

import io
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tunetrail.errors import DataError
from tunetrail.provenance.diff import ancestors
from tunetrail.provenance.lineage import Lineage, Node, is_checkpoint
from tunetrail.provenance.manifest import MANIFEST, PROVENANCE, SIGNATURE, read_manifest
from tunetrail.provenance.record import Record

NAMESPACE = "urn:tunetrail:"


def _lineage(folder: Path) -> tuple[Node, list[Node]]:
    """The artifact, and it with all it was made from. Raises DataError where one has no record."""
    lineage = Lineage()
    node = lineage.add(folder)
    nodes = sorted(lineage.nodes.values(), key=lambda n: n.folder)
    for each in nodes:
        if each.record is None:
            raise DataError(f"{each.folder}: {each.fault}")
    return node, nodes


def _record(node: Node) -> Record:
    assert node.record is not None
    return node.record


def _time(text: str | None) -> datetime:
    return datetime.fromisoformat(text) if text else datetime.fromtimestamp(0, UTC)


def slsa(folder: Path) -> str:
    path = folder / (SIGNATURE if (folder / SIGNATURE).exists() else PROVENANCE)
    _lineage(folder)
    return path.read_text() + "\n"


def prov(folder: Path) -> str:
    """https://www.w3.org/TR/prov-overview/"""
    from prov.model import ProvDocument

    _, nodes = _lineage(folder)
    document = ProvDocument()
    document.add_namespace("tt", NAMESPACE)
    document.set_default_namespace(NAMESPACE)
    agent = document.agent("tt:tunetrail", {"prov:type": "prov:SoftwareAgent"})
    entities = {
        n.folder: document.entity(f"tt:{n.identity}", {"prov:label": n.name, "tt:stage": _record(n).stage})
        for n in nodes
    }
    for n in nodes:
        record = _record(n)
        activity = document.activity(
            f"tt:run-{record.digest}",
            _time(record.started),
            _time(record.finished),
            {"prov:label": f"{record.stage} {record.part}"},
        )
        document.wasGeneratedBy(entities[n.folder], activity, _time(record.finished))
        document.wasAssociatedWith(activity, agent)
        for role, parent in sorted(n.parents.items()):
            if parent is not None:
                document.used(activity, entities[parent.folder], other_attributes={"prov:role": role})
                document.wasDerivedFrom(entities[n.folder], entities[parent.folder], activity)
        for role in ("source", "base"):
            for d in record.of_role(role):
                source = document.entity(f"tt:{role}-{_slug(d['name'])}", {"prov:label": d["name"]})
                document.used(activity, source, other_attributes={"prov:role": role})
                document.wasDerivedFrom(entities[n.folder], source, activity)
    return f"{document.serialize(indent=1)}\n"


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-._" else "-" for c in text)


def spdx(folder: Path) -> str:
    """https://spdx.github.io/spdx-spec/v3.0.1/"""
    from spdx_python_model import v3_0_1

    model: Any = v3_0_1  # its classes are made from the specification, and so are their types

    node, nodes = _lineage(folder)
    base = f"https://spdx.org/spdxdocs/tunetrail-{node.identity}"
    objects = model.SHACLObjectSet()
    created = model.CreationInfo(_id="_:creation", specVersion="3.0.1", created=_time(_record(node).finished))
    agent = model.SoftwareAgent(_id=f"{base}#tunetrail", name="tunetrail", creationInfo=created)
    created.createdBy = [agent]
    objects.add(created)
    objects.add(agent)

    def hashed(digest: str) -> Any:
        return model.Hash(algorithm=model.HashAlgorithm.sha256, hashValue=digest)

    elements: dict[Path, Any] = {}
    outside: dict[str, Any] = {}

    def package(n: Node) -> Any:
        data = _record(n).stage in ("data", "comparisons", "completions", "retention")
        common = {
            "name": n.name,
            "creationInfo": created,
            "software_packageVersion": n.identity[:16],
            "software_downloadLocation": f"{NAMESPACE}{n.identity}",
        }
        if data:
            found = model.dataset_DatasetPackage(_id=f"{base}#{n.identity}", **common)
            found.dataset_datasetType = [model.dataset_DatasetType.text]
            found.originatedBy = [agent]
            found.releaseTime = found.builtTime = _time(_record(n).finished)
            found.software_primaryPurpose = model.software_SoftwarePurpose.data
        else:
            found = model.ai_AIPackage(_id=f"{base}#{n.identity}", **common)
            found.releaseTime = found.builtTime = _time(_record(n).finished)
            found.suppliedBy = agent
            found.software_primaryPurpose = model.software_SoftwarePurpose.model
        found.verifiedUsing = [hashed(n.identity)]
        return found

    def relate(kind: str, source: Any, target: Any) -> None:
        number = sum(isinstance(o, model.Relationship) for o in objects.objects)
        objects.add(model.Relationship(
            _id=f"{base}#relation-{number}", creationInfo=created, from_=source, to=[target],
            relationshipType=getattr(model.RelationshipType, kind),
        ))  # fmt: skip

    shown = [n for n in nodes if is_checkpoint(n) or _record(n).stage in ("data", "comparisons", "retention")]
    for n in shown:
        elements[n.folder] = package(n)
        objects.add(elements[n.folder])
    for n in shown:
        for parent in n.parents.values():
            if parent is None or parent.folder not in elements:
                continue
            if not is_checkpoint(n):
                relate("dependsOn", elements[n.folder], elements[parent.folder])
            else:
                relate(
                    "descendantOf" if is_checkpoint(parent) else "trainedOn",
                    elements[n.folder],
                    elements[parent.folder],
                )
        for role in ("source", "base"):
            for d in _record(n).of_role(role):
                if d["name"] not in outside:
                    found = (model.dataset_DatasetPackage if role == "source" else model.ai_AIPackage)(
                        _id=f"{base}#{role}-{_slug(d['name'])}", name=d["name"], creationInfo=created,
                        software_downloadLocation=d.get("uri") or f"{NAMESPACE}{_slug(d['name'])}",
                    )  # fmt: skip
                    if role == "source":
                        found.dataset_datasetType = [model.dataset_DatasetType.text]
                    if d.get("digest"):
                        found.verifiedUsing = [hashed(d["digest"]["sha256"])]
                    outside[d["name"]] = found
                    objects.add(found)
                relate("descendantOf" if role == "base" else "dependsOn", elements[n.folder], outside[d["name"]])
    if node.folder not in elements:
        elements[node.folder] = package(node)
        objects.add(elements[node.folder])
    document = model.SpdxDocument(
        _id=f"{base}#document", name=node.name, creationInfo=created, rootElement=[elements[node.folder]],
        element=[o for o in objects.objects if isinstance(o, model.Element) and o is not agent],
        profileConformance=[model.ProfileIdentifierType.core, model.ProfileIdentifierType.software, model.ProfileIdentifierType.ai, model.ProfileIdentifierType.dataset],
    )  # fmt: skip
    objects.add(document)
    buffer = io.BytesIO()
    model.JSONLDSerializer().write(objects, buffer, indent=1)
    return buffer.getvalue().decode() + "\n"


def ro_crate(folder: Path) -> str:
    """https://www.researchobject.org/ro-crate/specification/1.1/"""
    from rocrate.model.contextentity import ContextEntity
    from rocrate.model.person import Person
    from rocrate.rocrate import ROCrate

    node, nodes = _lineage(folder)
    crate = ROCrate(version="1.1")
    crate.name = f"tunetrail: {node.name}"
    crate.description = "A checkpoint with everything it was made from, as its provenance records say."
    crate.datePublished = _time(_record(node).finished)
    licence = next((d["annotations"].get("licence") for n in nodes for d in _record(n).of_role("base")), None)
    crate.license = f"https://spdx.org/licenses/{licence}" if licence else "not stated"
    commit = _record(node).code.get("commit")
    crate.root_dataset["isBasedOn"] = f"urn:git:{commit}" if commit else "code of unknown commit"
    author = crate.add(Person(crate, "#tunetrail", {"name": "tunetrail"}))
    crate.root_dataset["author"] = author
    by_folder = {}
    for n in nodes:
        record = _record(n)
        entity = crate.add(ContextEntity(crate, f"#{n.identity}", {
            "@type": "CreativeWork", "name": n.name, "identifier": f"sha256:{n.identity}", "description": f"made by the stage {record.stage}",
        }))  # fmt: skip
        by_folder[n.folder] = entity
    for n in nodes:
        record = _record(n)
        action = crate.add(ContextEntity(crate, f"#run-{record.digest}", {
            "@type": "CreateAction", "name": f"{record.stage} {record.part}", "startTime": record.started, "endTime": record.finished,
        }))  # fmt: skip
        action["result"] = by_folder[n.folder]
        action["agent"] = author
        inputs = [by_folder[parent.folder] for _, parent in sorted(n.parents.items()) if parent]
        for role in ("source", "base"):
            for d in record.of_role(role):
                source = crate.add(
                    ContextEntity(crate, f"#{role}-{_slug(d['name'])}", {"@type": "CreativeWork", "name": d["name"]})
                )
                inputs.append(source)
        if inputs:
            action["object"] = inputs
        crate.root_dataset.append_to("mentions", action)
    crate.root_dataset["mainEntity"] = by_folder[node.folder]
    return json.dumps(crate.metadata.generate(), indent=1) + "\n"


# ----------------------------------------------------------------------------- model card


def published_ancestor(node: Node) -> dict | None:
    """The first model on the way up that others can fetch: a hub repository or a package; None where there is none."""
    for found in ancestors(node).values():
        for d in _record(found).of_role("base"):
            if d.get("uri"):
                return d
    return None


def results(folder: Path, node: Node) -> dict[str, dict]:
    """Metrics with intervals of this model's evaluation in the same run: every metric that has a mean, low and high."""
    from tunetrail.provenance.ledger import artifacts
    from tunetrail.provenance.lineage import run_of

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


def model_card(folder: Path) -> str:
    """https://huggingface.co/docs/hub/model-cards, with `base_model` walked up to the first published ancestor."""
    from huggingface_hub import EvalResult, ModelCardData

    node, nodes = _lineage(folder)
    if not is_checkpoint(node):
        raise DataError(f"{folder}: holds no model; a card is of a checkpoint")
    base = published_ancestor(node)
    repo = base["name"] if base and base["uri"].startswith("pkg:huggingface/") else None
    licence = next((d["annotations"].get("licence") for n in nodes for d in _record(n).of_role("base")), None)
    sources = [d for n in nodes for d in _record(n).of_role("source")]
    measured = results(folder, node)
    data = ModelCardData(
        library_name="transformers",
        license=licence.lower() if licence else None,
        base_model=repo,
        base_model_relation="adapter" if (folder / "model/adapter_config.json").exists() else "finetune",
        datasets=sorted({d["name"] for d in sources if d["annotations"].get("kind") and "/" in d["name"] and not Path(d["name"]).exists()}) or None,
        tags=["tunetrail", _record(node).stage],
        model_name=node.name,
        eval_results=[
            EvalResult(
                task_type="text-generation", dataset_type="held-out", dataset_name="held-out prompts of the run",
                metric_type=key, metric_name=key, metric_value=round(value["mean"], 4),
            )
            for key, value in measured.items()
        ] or None,
    )  # fmt: skip
    record = _record(node)
    lines = [
        "---", data.to_yaml(), "---", "", f"# {node.name}", "",
        f"Made by the stage `{record.stage}` of tunetrail, commit `{record.code.get('commit')}`{' with uncommitted changes' if record.code.get('dirty') else ''}.",
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
        f"`manifest.json` has sha256 `{node.identity}` and lists the sha256 of every file and of {len(tensors)} tensors; "
        f"`provenance.json` has sha256 `{record.digest}`.", "",
        "```", f"tunetrail audit verify --deep {node.name}", "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


FORMATS: dict[str, Callable[[Path], str]] = {
    "slsa": slsa, "ro-crate": ro_crate, "prov": prov, "spdx": spdx, "model-card": model_card,
}  # fmt: skip
