"""SPDX 3.0.1 with the AI and dataset profiles, https://spdx.github.io/spdx-spec/v3.0.1/"""

import io
from pathlib import Path
from typing import Any

from spdx_python_model import v3_0_1

from tunetrail.provenance.exports.common import NAMESPACE, lineage_of, record_of, slug, time_of
from tunetrail.provenance.lineage import Node, is_checkpoint
from tunetrail.stages.registry import STAGES

model: Any = v3_0_1  # its classes are made from the specification, and so are their types
PROFILES = ("core", "software", "ai", "dataset")


class Document:
    """The elements of a document about one artifact."""

    def __init__(self, node: Node):
        self.base = f"https://spdx.org/spdxdocs/tunetrail-{node.identity}"
        self.objects, self.relations = model.SHACLObjectSet(), 0
        finished = time_of(record_of(node).finished)
        self.created = model.CreationInfo(_id="_:creation", specVersion="3.0.1", created=finished)
        self.agent = model.SoftwareAgent(_id=f"{self.base}#tunetrail", name="tunetrail", creationInfo=self.created)
        self.created.createdBy = [self.agent]
        self.objects.add(self.created)
        self.objects.add(self.agent)
        self.packages: dict[Any, Any] = {}

    def package(self, key: Any, name: str, is_data: bool, digest: str | None, location: str, **more: Any) -> Any:
        """The package of an artifact or of something from outside, made once."""
        if key not in self.packages:
            kind = model.dataset_DatasetPackage if is_data else model.ai_AIPackage
            package = kind(
                _id=f"{self.base}#{slug(str(key))}", name=name, creationInfo=self.created,
                software_downloadLocation=location, **more,
            )  # fmt: skip
            if is_data:
                package.dataset_datasetType = [model.dataset_DatasetType.text]
            if digest:
                package.verifiedUsing = [model.Hash(algorithm=model.HashAlgorithm.sha256, hashValue=digest)]
            self.objects.add(package)
            self.packages[key] = package
        return self.packages[key]

    def artifact(self, node: Node) -> Any:
        is_data = STAGES[record_of(node).stage].makes == "data"
        finished, purpose = time_of(record_of(node).finished), model.software_SoftwarePurpose
        more = {"originatedBy": [self.agent]} if is_data else {"suppliedBy": self.agent}
        return self.package(
            node.identity, node.name, is_data, node.identity, f"{NAMESPACE}{node.identity}",
            software_packageVersion=node.identity[:16], releaseTime=finished, builtTime=finished,
            software_primaryPurpose=purpose.data if is_data else purpose.model, **more,
        )  # fmt: skip

    def relate(self, kind: str, source: Any, target: Any) -> None:
        self.objects.add(model.Relationship(
            _id=f"{self.base}#relation-{self.relations}", creationInfo=self.created, from_=source, to=[target],
            relationshipType=getattr(model.RelationshipType, kind),
        ))  # fmt: skip
        self.relations += 1


def export(folder: Path) -> str:
    node, nodes = lineage_of(folder)
    document = Document(node)
    shown = [n for n in nodes if is_checkpoint(n) or STAGES[record_of(n).stage].makes == "data"]
    folders = {n.folder for n in shown}
    for n in shown:
        own = document.artifact(n)
        for parent in n.parents.values():
            if parent is not None and parent.folder in folders:
                kind = "descendantOf" if is_checkpoint(parent) else "trainedOn"
                document.relate(kind if is_checkpoint(n) else "dependsOn", own, document.artifact(parent))
        for role, kind in (("source", "dependsOn"), ("base", "descendantOf")):
            for d in record_of(n).of_role(role):
                digest, location = (
                    (d.get("digest") or {}).get("sha256"),
                    d.get("uri") or f"{NAMESPACE}{slug(d['name'])}",
                )
                outside = document.package(f"{role}-{d['name']}", d["name"], role == "source", digest, location)
                document.relate(kind, own, outside)
    elements = [o for o in document.objects.objects if isinstance(o, model.Element) and o is not document.agent]
    document.objects.add(model.SpdxDocument(
        _id=f"{document.base}#document", name=node.name, creationInfo=document.created,
        rootElement=[document.artifact(node)], element=elements,
        profileConformance=[getattr(model.ProfileIdentifierType, name) for name in PROFILES],
    ))  # fmt: skip
    buffer = io.BytesIO()
    model.JSONLDSerializer().write(document.objects, buffer, indent=1)
    return buffer.getvalue().decode() + "\n"
