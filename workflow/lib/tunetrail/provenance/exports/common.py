"""What the exports share."""

from datetime import UTC, datetime
from pathlib import Path

from tunetrail.errors import DataError
from tunetrail.provenance.lineage import Lineage, Node
from tunetrail.provenance.record import Record
from tunetrail.stages.registry import STAGES

NAMESPACE = "urn:tunetrail:"


def lineage_of(folder: Path) -> tuple[Node, list[Node]]:
    """(the artifact, it and everything it was made from). Raises DataError where one has no record."""
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


def licence_of(nodes: list[Node]) -> str | None:
    """The base model's licence, as far as a record says."""
    return next((d["annotations"].get("licence") for n in nodes for d in record_of(n).of_role("base")), None)
