"""W3C PROV-JSON, https://www.w3.org/TR/prov-overview/"""

from pathlib import Path

from prov.model import ProvDocument

from tunetrail.provenance.exports.common import NAMESPACE, lineage_of, record_of, slug, time_of


def export(folder: Path) -> str:
    _, nodes = lineage_of(folder)
    document = ProvDocument()
    document.add_namespace("tt", NAMESPACE)
    document.set_default_namespace(NAMESPACE)
    agent = document.agent("tt:tunetrail", {"prov:type": "prov:SoftwareAgent"})
    entities = {
        n.folder: document.entity(f"tt:{n.identity}", {"prov:label": n.name, "tt:stage": record_of(n).stage})
        for n in nodes
    }
    for n in nodes:
        record = record_of(n)
        activity = document.activity(
            f"tt:run-{record.digest}",
            time_of(record.started),
            time_of(record.finished),
            {"prov:label": f"{record.stage} {record.part}"},
        )
        document.wasGeneratedBy(entities[n.folder], activity, time_of(record.finished))
        document.wasAssociatedWith(activity, agent)
        for role, parent in sorted(n.parents.items()):
            if parent is not None:
                document.used(activity, entities[parent.folder], other_attributes={"prov:role": role})
                document.wasDerivedFrom(entities[n.folder], entities[parent.folder], activity)
        for role in ("source", "base"):
            for d in record.of_role(role):
                source = document.entity(f"tt:{role}-{slug(d['name'])}", {"prov:label": d["name"]})
                document.used(activity, source, other_attributes={"prov:role": role})
                document.wasDerivedFrom(entities[n.folder], source, activity)
    return f"{document.serialize(indent=1)}\n"
