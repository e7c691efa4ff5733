"""Workflow Run RO-Crate metadata, https://www.researchobject.org/ro-crate/specification/1.1/"""

import json
from pathlib import Path

from rocrate.model.contextentity import ContextEntity
from rocrate.model.person import Person
from rocrate.rocrate import ROCrate

from tunetrail.provenance.exports.common import licence_of, lineage_of, record_of, slug, time_of


def export(folder: Path) -> str:
    node, nodes = lineage_of(folder)
    crate = ROCrate(version="1.1")
    crate.name = f"tunetrail: {node.name}"
    crate.description = "A checkpoint with everything it was made from, as its provenance records say."
    crate.datePublished = time_of(record_of(node).finished)
    licence = licence_of(node)
    crate.license = f"https://spdx.org/licenses/{licence}" if licence else "not stated"
    commit = record_of(node).code.get("commit")
    crate.root_dataset["isBasedOn"] = f"urn:git:{commit}" if commit else "code of unknown commit"
    author = crate.add(Person(crate, "#tunetrail", {"name": "tunetrail"}))
    crate.root_dataset["author"] = author
    by_folder = {}
    for n in nodes:
        record = record_of(n)
        entity = crate.add(
            ContextEntity(
                crate,
                f"#{n.identity}",
                {
                    "@type": "CreativeWork",
                    "name": n.name,
                    "identifier": f"sha256:{n.identity}",
                    "description": f"made by the stage {record.stage}",
                },
            )
        )
        by_folder[n.folder] = entity
    for n in nodes:
        record = record_of(n)
        action = crate.add(
            ContextEntity(
                crate,
                f"#run-{record.digest}",
                {
                    "@type": "CreateAction",
                    "name": f"{record.stage} {record.part}",
                    "startTime": record.started,
                    "endTime": record.finished,
                },
            )
        )
        action["result"] = by_folder[n.folder]
        action["agent"] = author
        inputs = [by_folder[parent.folder] for _, parent in sorted(n.parents.items()) if parent]
        for role in ("source", "base"):
            for d in record.of_role(role):
                source = crate.add(
                    ContextEntity(crate, f"#{role}-{slug(d['name'])}", {"@type": "CreativeWork", "name": d["name"]})
                )
                inputs.append(source)
        if inputs:
            action["object"] = inputs
        crate.root_dataset.append_to("mentions", action)
    crate.root_dataset["mainEntity"] = by_folder[node.folder]
    return json.dumps(crate.metadata.generate(), indent=1) + "\n"
