"""A lineage as a tree in the terminal and as a drawing."""

import html
from collections import Counter
from pathlib import Path

from tunetrail.provenance.drawing import Sizes, acyclic, columns, layout
from tunetrail.provenance.lineage import Node
from tunetrail.terminal import escape

SIZES = Sizes(width=150, height=40, across=190, down=56)
MARGIN = 10
DEPTH = 60
"""How many levels of a tree the terminal shows."""


def print_tree(node: Node) -> None:
    from rich import print as print_rich
    from rich.markup import escape as escape_markup
    from rich.tree import Tree

    def shown(text: object) -> str:
        return escape_markup(escape(text))

    seen: set[Path] = set()

    def label(role: str, n: Node) -> str:
        start = f"{shown(role)}: " if role else ""
        made = (
            f"commit {shown((n.record.code.get('commit') or 'unknown')[:8])}"
            if n.record
            else f"[red]{shown(n.fault or '')}[/red]"
        )
        return f"{start}[bold]{shown(n.name)}[/bold] {n.identity[:12]} [dim]{made}[/dim]"

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
                branch.add(f"{shown(role)}: [red]missing[/red]")
            else:
                grow(branch.add(label(role, parent)), parent, depth + 1)
        for kind in ("base", "source", "labels"):
            for d in n.record.of_role(kind) if n.record else []:
                digest = (d.get("digest") or {}).get("sha256", "")[:12]
                branch.add(f"{kind}: {shown(d['name'])} [dim]{shown(digest)}[/dim]")

    tree = Tree(label("", node))
    grow(tree, node)
    print_rich(tree)


def svg(nodes: list[Node]) -> str:
    """Boxes in columns, parents to the left; green if the record belongs to this manifest, else red."""
    nodes = sorted(nodes, key=lambda node: node.name)
    index = {node.folder: i for i, node in enumerate(nodes)}
    parents = acyclic([{index[p.folder] for p in n.parents.values() if p and p.folder in index} for n in nodes])
    rows: Counter[int] = Counter()
    cells = []
    for column in columns(parents):
        cells.append((column, rows[column]))
        rows[column] += 1
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
        lines += _box(node, place)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _box(node: Node, place: tuple[int, int]) -> list[str]:
    x, y = place
    sound = node.record is not None and node.record.manifest == node.identity
    edge = "#00734f" if sound else "#b04300"
    name = node.name if len(node.name) <= 20 else f"{node.name[:9]}…{node.name[-10:]}"
    return [
        f"<g><title>{'sound' if sound else 'NOT SOUND'}: {html.escape(node.name)} sha256 {node.identity}</title>",
        f'<rect x="{x}" y="{y}" width="{SIZES.width}" height="{SIZES.height}" rx="5" fill="#f6f8fa" stroke="{edge}" '
        'stroke-width="1.5"/>',
        f'<text x="{x + 8}" y="{y + 17}" font-size="13" fill="#1a2129">{html.escape(name)}</text>',
        f'<text x="{x + 8}" y="{y + 32}" font-size="10" fill="#5a6672">{node.identity[:16]}</text></g>',
    ]
