"""A lineage as a tree in the terminal and as a drawing."""

import html
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from tunetrail.provenance.drawing import Sizes, layout
from tunetrail.provenance.lineage import Node

SIZES = Sizes(width=150, height=40, across=190, down=56)
MARGIN = 10
DEPTH = 60
"""Levels of a tree in the terminal."""


def print_tree(node: Node) -> None:
    from rich import print as show
    from rich.markup import escape
    from rich.tree import Tree

    seen: set[Path] = set()

    def label(role: str, n: Node) -> str:
        start = f"{role}: " if role else ""
        made = (
            f"commit {(n.record.code.get('commit') or 'unknown')[:8]}"
            if n.record
            else f"[red]{escape(n.fault or '')}[/red]"
        )
        return f"{start}[bold]{escape(n.name)}[/bold] {n.identity[:12]} [dim]{made}[/dim]"

    def grow(branch: Tree, n: Node, depth: int = 0) -> None:
        if depth > DEPTH:
            branch.add("[dim]… deeper than this shows: --json lists all[/dim]")
            return
        if n.folder in seen:
            if n.parents:
                branch.add("[dim]as above[/dim]")
            return
        seen.add(n.folder)
        for role, parent in sorted(n.parents.items()):
            if parent is None:
                branch.add(f"{role}: [red]missing[/red]")
            else:
                grow(branch.add(label(role, parent)), parent, depth + 1)
        for kind in ("base", "source", "labels"):
            for d in n.record.of_role(kind) if n.record else []:
                branch.add(f"{kind}: {escape(d['name'])} [dim]{(d.get('digest') or {}).get('sha256', '')[:12]}[/dim]")

    tree = Tree(label("", node))
    grow(tree, node)
    show(tree)


def layers(nodes: list[Node]) -> dict[Path, int]:
    """Column of each artifact: one more than the furthest of its parents'. Iterative: a lineage may be deep."""
    among = {node.folder for node in nodes}
    by_folder = {node.folder: node for node in nodes}
    found: dict[Path, int] = {}
    for node in nodes:
        stack = [node]
        while stack:
            at = stack[-1]
            open_parents = [
                p for p in at.parents.values() if p and p.folder in among and p.folder not in found and p not in stack
            ]
            if open_parents:
                stack += open_parents
                continue
            stack.pop()
            above = [found[p.folder] for p in by_folder[at.folder].parents.values() if p and p.folder in found]
            found[at.folder] = max(above, default=-1) + 1
    return found


def svg(nodes: list[Node], unsound: Collection[Path] = (), records: dict[Path, str] | None = None) -> str:
    """Boxes in columns, parents to the left; green where sound, red where not.

    Args:
        unsound: folders of artifacts that an audit found fault with.
        records: folder -> address of its record, which its box then links to.
    """
    column = layers(nodes)
    nodes = sorted(nodes, key=lambda n: (column[n.folder], n.name))
    index = {node.folder: i for i, node in enumerate(nodes)}
    rows: Counter[int] = Counter()
    cells = []
    for node in nodes:
        x = column[node.folder]
        cells.append((x, rows[x]))
        rows[x] += 1
    parents = [{index[p.folder] for p in node.parents.values() if p and p.folder in index} for node in nodes]
    drawing = layout(cells, parents, SIZES)
    width, height = drawing.width + 2 * MARGIN, drawing.height + 2 * MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="{-MARGIN} {-MARGIN} {width} {height}" font-family="sans-serif">',
        f'<rect x="{-MARGIN}" y="{-MARGIN}" width="{width}" height="{height}" fill="#fff"/>',
    ]
    for edge in drawing.edges:
        source, target = nodes[edge.source], nodes[edge.target]
        roles = ", ".join(sorted(role for role, p in target.parents.items() if p and p.folder == source.folder))
        title = f"<title>{html.escape(roles)}</title>"
        lines.append(f'<path d="{edge.path}" fill="none" stroke="#8a94a0">{title}</path>')
    for node, place in zip(nodes, drawing.places, strict=True):
        sound = bool(node.record and node.record.manifest == node.identity and node.folder not in unsound)
        lines += _box(node, place, sound, (records or {}).get(node.folder))
    return "\n".join([*lines, "</svg>"]) + "\n"


def _box(node: Node, place: tuple[int, int], sound: bool, record: str | None) -> list[str]:
    x, y = place
    edge = "#00734f" if sound else "#b04300"
    name = node.name if len(node.name) <= 20 else f"{node.name[:9]}…{node.name[-10:]}"
    return [
        f'<a href="{html.escape(record)}">' if record else "<g>",
        f"<title>{'sound' if sound else 'NOT SOUND'}: {html.escape(node.name)} sha256 {node.identity}</title>",
        f'<rect x="{x}" y="{y}" width="{SIZES.width}" height="{SIZES.height}" rx="5" fill="#f6f8fa" stroke="{edge}" '
        'stroke-width="1.5"/>',
        f'<text x="{x + 8}" y="{y + 17}" font-size="13" fill="#1a2129">{html.escape(name)}</text>',
        f'<text x="{x + 8}" y="{y + 32}" font-size="10" fill="#5a6672">{node.identity[:16]}</text>',
        "</a>" if record else "</g>",
    ]
