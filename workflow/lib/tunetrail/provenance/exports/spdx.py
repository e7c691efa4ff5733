"""SPDX 3.0.1 with the AI and dataset profiles, https://spdx.github.io/spdx-spec/v3.0.1/"""

import io
from pathlib import Path
from typing import Any

from spdx_python_model import v3_0_1

from tunetrail.provenance.exports.common import NAMESPACE, is_data, lineage_of, record_of, slug, time_of
from tunetrail.provenance.lineage import Node, is_checkpoint
from tunetrail.provenance.schema import Dependency

model: Any = v3_0_1  # its classes and their types are generated from the specification


class Document:
    """The elements of a document about one artifact."""

    def __init__(self, node: Node):
        self.base = f"https://spdx.org/spdxdocs/tunetrail-{node.identity}"
        self.objects, self.relations, self.packages = model.SHACLObjectSet(), 0, dict[str, Any]()
        finished = time_of(record_of(node).finished)
        self.created = model.CreationInfo(_id="_:creation", specVersion="3.0.1", created=finished)
        self.agent = model.SoftwareAgent(_id=f"{self.base}#tunetrail", name="tunetrail", creationInfo=self.created)
        self.created.createdBy = [self.agent]
        self.objects.update([self.created, self.agent])

    def package(self, key: str, data: bool, digest: str | None, **properties: Any) -> Any:
        """Adds a package, once."""
        if key not in self.packages:
            kind = model.dataset_DatasetPackage if data else model.ai_AIPackage
            package = self.packages[key] = kind(_id=f"{self.base}#{key}", creationInfo=self.created, **properties)
            if data:
                package.dataset_datasetType = [model.dataset_DatasetType.text]
            if digest:
                package.verifiedUsing = [model.Hash(algorithm=model.HashAlgorithm.sha256, hashValue=digest)]
            self.objects.add(package)
        return self.packages[key]

    def artifact(self, node: Node) -> Any:
        data, finished, purpose = is_data(node), time_of(record_of(node).finished), model.software_SoftwarePurpose
        return self.package(
            node.identity,
            data,
            node.identity,
            name=node.name,
            software_packageVersion=node.identity[:16],
            software_downloadLocation=f"{NAMESPACE}{node.identity}",
            releaseTime=finished,
            builtTime=finished,
            software_primaryPurpose=purpose.data if data else purpose.model,
            **({"originatedBy": [self.agent]} if data else {"suppliedBy": self.agent}),
        )

    def outside(self, role: str, d: Dependency) -> Any:
        """Data or a base model from outside the run."""
        name, place = slug(d["name"]), d.get("uri") or f"{NAMESPACE}{slug(d['name'])}"
        properties = {"name": d["name"], "software_downloadLocation": place}
        return self.package(f"{role}-{name}", role == "source", (d.get("digest") or {}).get("sha256"), **properties)

    def relate(self, kind: str, source: Any, target: Any) -> None:
        kind, name = getattr(model.RelationshipType, kind), f"{self.base}#relation-{self.relations}"
        ends = {"from_": source, "to": [target]}
        self.objects.add(model.Relationship(_id=name, creationInfo=self.created, relationshipType=kind, **ends))
        self.relations += 1


def export(folder: Path) -> str:
    node, nodes = lineage_of(folder)
    document = Document(node)
    for n in (n for n in nodes if is_checkpoint(n) or is_data(n)):
        own = document.artifact(n)
        for parent in filter(None, n.parents.values()):
            if is_checkpoint(parent) or is_data(parent):
                kind = "descendantOf" if is_checkpoint(parent) else "trainedOn"
                document.relate(kind if is_checkpoint(n) else "dependsOn", own, document.artifact(parent))
        for role, kind in (("source", "dependsOn"), ("base", "descendantOf")):
            for d in record_of(n).of_role(role):
                document.relate(kind, own, document.outside(role, d))
    about = {"name": node.name, "creationInfo": document.created, "rootElement": [document.artifact(node)]}
    profiles = [getattr(model.ProfileIdentifierType, name) for name in ("core", "software", "ai", "dataset")]
    about["element"] = [o for o in document.objects.foreach_type(model.Element) if o is not document.agent]
    document.objects.add(model.SpdxDocument(_id=f"{document.base}#document", profileConformance=profiles, **about))
    model.JSONLDSerializer().write(document.objects, buffer := io.BytesIO(), indent=1)
    return buffer.getvalue().decode() + "\n"
