"""Lays out a DAG in columns: parents to the left, short edges as curves, long ones on lanes below the boxes they
pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter


@dataclass(frozen=True)
class Sizes:
    """Pixels."""

    width: int
    height: int
    """The size of a box."""
    across: int
    down: int
    """The distance between columns, and between rows."""
    lane: int = 9
    """The distance between lanes."""


@dataclass(frozen=True)
class Edge:
    source: int
    target: int
    path: str
    """The `d` of an SVG path."""
    is_long: bool
    """Whether it passes other columns."""


@dataclass(frozen=True)
class Layout:
    places: list[tuple[int, int]]
    """(x, y) of each box's upper left corner."""
    edges: list[Edge]
    width: int
    height: int


def ordered(parents: Sequence[set[int]]) -> list[int]:
    """The nodes, parents first. Raises CycleError."""
    return list(TopologicalSorter(dict(enumerate(parents))).static_order())


def acyclic(parents: Sequence[set[int]]) -> list[set[int]]:
    """Leaves out one edge of each cycle: a forged record may name its own artifact as an input."""
    kept = [set(of) for of in parents]
    while True:
        try:
            ordered(kept)
            return kept
        except CycleError as e:
            parent, child, *_ = e.args[1]
            kept[child].discard(parent)


def reduced(parents: Sequence[set[int]]) -> list[set[int]]:
    """Leaves out each edge that a longer path implies (transitive reduction)."""
    ancestors: dict[int, set[int]] = {}
    for node in ordered(parents):
        ancestors[node] = parents[node].union(*(ancestors[p] for p in parents[node]))
    return [{p for p in of if not any(p in ancestors[q] for q in of - {p})} for of in parents]


def columns(parents: Sequence[set[int]]) -> list[int]:
    """The column of each node: one to the right of its rightmost parent."""
    placed = [0] * len(parents)
    for node in ordered(parents):
        placed[node] = max((placed[p] + 1 for p in parents[node]), default=0)
    return placed


def layout(cells: Sequence[tuple[int, int]], parents: Sequence[set[int]], sizes: Sizes) -> Layout:
    """Computes positions and edges.

    Args:
        cells: (column, row) of each box.
        parents: indices of each box's parents, which must be in columns to its left.
    """
    places = [(column * sizes.across, row * sizes.down) for column, row in cells]
    height = max(y for _, y in places) + sizes.height
    lanes: dict[int, int] = {}  # source -> its lane: all its long edges share one
    edges = []
    for target, sources in enumerate(parents):
        for source in sorted(sources):
            start, end = cells[source][0], cells[target][0]
            between = [places[i][1] for i, (column, _) in enumerate(cells) if start < column < end]
            lane = lanes.setdefault(source, len(lanes)) if between else 0
            below = max(between) + sizes.height + sizes.lane * (lane + 1) if between else 0
            height = max(height, below)
            edges.append(Edge(source, target, _path(places[source], places[target], below, lane, sizes), bool(between)))
    return Layout(places, edges, max(x for x, _ in places) + sizes.width, height)


def _path(a: tuple[int, int], b: tuple[int, int], below: int, lane: int, sizes: Sizes) -> str:
    """From the right of box `a` to the left of box `b`: directly between neighbours, else along the height `below`."""
    x0, y0, x1, y1 = a[0] + sizes.width, a[1] + sizes.height // 2, b[0], b[1] + sizes.height // 2
    gap = sizes.across - sizes.width
    if not below:
        return f"M{x0},{y0}C{x0 + gap // 2},{y0} {x1 - gap // 2},{y1} {x1},{y1}"
    down, up, r = x0 + gap // 2, x1 - gap // 2 + 3 * (lane % 4) - 4, 5
    turn = 0 if y1 == below else (r if y1 > below else -r)
    return (
        f"M{x0},{y0}H{down - r}Q{down},{y0} {down},{y0 + r}V{below - r}Q{down},{below} {down + r},{below}"
        f"H{up - r}Q{up},{below} {up},{below + turn}V{y1 - turn}Q{up},{y1} {up + r},{y1}H{x1}"
    )
