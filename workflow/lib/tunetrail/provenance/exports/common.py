"""Shared by the exports."""

from datetime import UTC, datetime
from pathlib import Path

from tunetrail.errors import DataError
from tunetrail.provenance.lineage import Lineage, Node, ancestors
from tunetrail.provenance.record import Record
from tunetrail.stages.registry import STAGES

NAMESPACE = "urn:tunetrail:"


def lineage_of(folder: Path) -> tuple[Node, list[Node]]:
    """(the artifact, itself and everything it was made from). Raises DataError if one has no record."""
    lineage = Lineage()
    node = lineage.add(folder)
    nodes = sorted(lineage.nodes.values(), key=lambda n: n.folder)
    for each in nodes:
        if each.record is None:
            raise DataError(f"{each.folder}: {each.fault}")
    return node, nodes


def record_of(node: Node) -> Record:
    assert node.record is not None
    return node.record


def is_data(node: Node) -> bool:
    """Whether its stage makes data: splits, completions, comparisons."""
    stage = STAGES.get(record_of(node).stage)  # None for a stage of an older version
    return stage is not None and stage.makes == "data"


def time_of(text: str | None) -> datetime:
    return datetime.fromisoformat(text) if text else datetime.fromtimestamp(0, UTC)


def slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-._" else "-" for c in text)


def licence_of(node: Node) -> str | None:
    """The licence of the nearest model from elsewhere, if a record has it: an import, or the nearest base that has
    one. An imported reward model counts only for itself: a policy is not made from its weights."""
    for nearest, record in enumerate(map(record_of, ancestors(node).values())):
        if (taken := record.imported) and (record.stage == "sft" or nearest == 0):
            return taken[0]["annotations"].get("licence")
        own = [record.config.get("licence")] if record.stage == "base" else []
        stated = [*own, *(d["annotations"].get("licence") for d in record.of_role("base"))]
        if licence := next(filter(None, stated), None):
            return licence
    return None
