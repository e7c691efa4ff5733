"""Lays out the DAG on the page: the main line in the top row, policies and evaluations below each other."""

from dataclasses import dataclass, field

from tunetrail.provenance import drawing as drawer
from tunetrail.reporting.collect import ORDER, Artifact, Run, kind

SIZES = drawer.Sizes(width=118, height=46, across=144, down=62)


@dataclass
class Node:
    """One or more artifacts of a stage; the shards of completions share a node."""

    label: str
    artifacts: list[Artifact]
    layer: int
    row: int
    x: int = 0
    y: int = 0
    parents: list["Node"] = field(default_factory=list)

    @property
    def short(self) -> str:
        """The label, with its middle left out if it is too long for the box."""
        return self.label if len(self.label) <= 15 else f"{self.label[:6]}…{self.label[-8:]}"

    @property
    def href(self) -> str:
        """The artifact's folder, or the folder that contains all of them."""
        href = self.artifacts[0].href
        return href if len(self.artifacts) == 1 else href.rstrip("/").rpartition("/")[0] + "/"

    @property
    def seconds(self) -> float | None:
        known = [a.seconds for a in self.artifacts if a.seconds is not None]
        return sum(known) if known else None

    @property
    def attempts(self) -> int:
        return max(len(a.attempts) for a in self.artifacts)

    @property
    def state(self) -> str:
        """The worst state of its artifacts."""
        states = {a.state for a in self.artifacts}
        return next(s for s in ("altered", "stale", "unrecorded", "resumed", "done") if s in states)


@dataclass
class Dag:
    nodes: list[Node]
    edges: list[tuple[str, bool]]
    """(SVG path, whether it is a long edge, which is drawn fainter)."""
    headings: list[tuple[int, str]]
    """(x, heading) of the columns with policies and evaluations, whose nodes have the same names."""
    width: int
    height: int

    @property
    def layers(self) -> list[list[Node]]:
        """The nodes by layer, for a narrow screen."""
        return [[n for n in self.nodes if n.layer == layer] for layer in sorted({n.layer for n in self.nodes})]


def _nodes(run: Run) -> dict[str, Node]:
    """Role -> node. Columns follow ORDER without gaps; evaluations are next to their policies."""
    columns = [column for column in ORDER if any(kind(role) == column for role in run.artifacts)]
    nodes: dict[str, Node] = {}
    for layer, column in enumerate(columns):
        roles = [role for role in run.artifacts if kind(role) == column]
        if column == "completions":
            nodes |= dict.fromkeys(roles, Node(column, [run.artifacts[role] for role in roles], layer, 0))
            continue
        last = [role for role in roles if role in ("evaluation.sft", "evaluation.base")][::-1]
        for row, role in enumerate([role for role in roles if role not in last] + last):
            nodes[role] = Node(role.partition(".")[2] or role, [run.artifacts[role]], layer, row)
    return nodes


def layout(run: Run) -> Dag:
    """The positions of nodes and edges in pixels."""
    by_role = _nodes(run)
    nodes = list({id(node): node for node in by_role.values()}.values())
    index = {id(node): i for i, node in enumerate(nodes)}
    parents: list[set[int]] = [set() for _ in nodes]
    for role, roles in run.parents.items():
        child = by_role[role]
        parents[index[id(child)]] |= {index[id(by_role[r])] for r in roles if by_role[r].layer < child.layer}
    drawing = drawer.layout([(node.layer, node.row) for node in nodes], drawer.reduced(parents), SIZES)
    for node, (x, y) in zip(nodes, drawing.places, strict=True):
        node.x, node.y = x, y
    for edge in drawing.edges:
        nodes[edge.target].parents.append(nodes[edge.source])
    heading_of = {"policy": "policies", "evaluation": "evaluation of"}
    headings = {by_role[role].x: heading_of[kind(role)] for role in by_role if kind(role) in heading_of}
    edges = [(edge.path, edge.is_long) for edge in drawing.edges]
    return Dag(nodes, edges, sorted(headings.items()), drawing.width, drawing.height)
