"""Lays the DAG out: the main line on the top row, policies and evaluations below each other, long edges on lanes."""

from dataclasses import dataclass, field

from tunetrail.reporting.collect import ORDER, Artifact, Run, kind

WIDTH, HEIGHT, ACROSS, DOWN, LANE = 118, 46, 144, 62, 9
"""Pixels: a node, the pitch of columns and rows, the pitch of lanes."""


@dataclass
class Node:
    """One or more artifacts of a stage (the shards of completions are one node)."""

    label: str
    artifacts: list[Artifact]
    layer: int
    row: int
    parents: list["Node"] = field(default_factory=list)

    @property
    def short(self) -> str:
        """The label with its middle left out where it is too long for the box."""
        return self.label if len(self.label) <= 15 else f"{self.label[:6]}…{self.label[-8:]}"

    @property
    def x(self) -> int:
        return self.layer * ACROSS

    @property
    def y(self) -> int:
        return self.row * DOWN

    @property
    def href(self) -> str:
        """The folder; the one above for several."""
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
        """The worst of its artifacts'."""
        states = {a.state for a in self.artifacts}
        return next(s for s in ("altered", "stale", "unrecorded", "resumed", "done") if s in states)


@dataclass
class Dag:
    nodes: list[Node]
    edges: list[tuple[str, bool]]
    """SVG path and whether it is a long one, drawn fainter."""
    headings: list[tuple[int, str]]
    """x and name of the columns that hold policies and their evaluations, which bear the same names."""
    width: int
    height: int

    @property
    def layers(self) -> list[list[Node]]:
        """The nodes by layer, for a narrow screen."""
        return [[n for n in self.nodes if n.layer == layer] for layer in sorted({n.layer for n in self.nodes})]


def _nodes(run: Run) -> dict[str, Node]:
    """Node of each role. Columns follow ORDER without its gaps; evaluations stand beside their policies."""
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


def _reduce(parents: dict[int, set[int]]) -> dict[int, set[int]]:
    """Leaves out each edge that a longer path implies (transitive reduction)."""

    def ancestors(node: int) -> set[int]:
        return parents[node].union(*(ancestors(p) for p in parents[node]))

    return {n: {p for p in ps if not any(p in ancestors(q) for q in ps - {p})} for n, ps in parents.items()}


def layout(run: Run) -> Dag:
    """Positions in pixels of nodes and edges."""
    by_role = _nodes(run)
    nodes = list({id(node): node for node in by_role.values()}.values())
    index = {id(node): i for i, node in enumerate(nodes)}
    parents: dict[int, set[int]] = {i: set() for i in range(len(nodes))}
    for role, roles in run.parents.items():
        child = index[id(by_role[role])]
        parents[child] |= {index[id(by_role[r])] for r in roles if by_role[r].layer < by_role[role].layer}
    edges: list[tuple[str, bool]] = []
    lanes: dict[int, int] = {}  # source -> its lane: all its long edges ride on one
    depth = max(node.y for node in nodes) + HEIGHT
    for child, sources in _reduce(parents).items():
        for source in sorted(sources):
            a, b = nodes[source], nodes[child]
            b.parents.append(a)
            between = [node.y for node in nodes if a.layer < node.layer < b.layer]
            lane = lanes.setdefault(source, len(lanes)) if between else 0
            below = max(between) + HEIGHT + LANE * (lane + 1) if between else 0
            depth = max(depth, below)
            edges.append((_path(a, b, below, lane), bool(between)))
    named = {"policy": "policies", "evaluation": "evaluation of"}
    headings = {by_role[role].x: named[kind(role)] for role in by_role if kind(role) in named}
    return Dag(nodes, edges, sorted(headings.items()), max(node.x for node in nodes) + WIDTH, depth)


def _path(a: Node, b: Node, below: int, lane: int) -> str:
    """From the right of `a` to the left of `b`: straight on for neighbours, else along the height `below`."""
    x0, y0, x1, y1 = a.x + WIDTH, a.y + HEIGHT // 2, b.x, b.y + HEIGHT // 2
    gap = ACROSS - WIDTH
    if not below:
        return f"M{x0},{y0}C{x0 + gap // 2},{y0} {x1 - gap // 2},{y1} {x1},{y1}"
    down, up, r = x0 + gap // 2, x1 - gap // 2 + 3 * (lane % 4) - 4, 5
    turn = 0 if y1 == below else (r if y1 > below else -r)
    return (
        f"M{x0},{y0}H{down - r}Q{down},{y0} {down},{y0 + r}V{below - r}Q{down},{below} {down + r},{below}"
        f"H{up - r}Q{up},{below} {up},{below + turn}V{y1 - turn}Q{up},{y1} {up + r},{y1}H{x1}"
    )
