"""Lineage: which artifacts an artifact was made from, and which were made from it, as their records say.

A record names a parent by the way from folder to folder and by the digests of its manifest and its record, so that a
run may be moved or copied; a parent that is not where it was is looked for by its digest in the run.
"""

import functools
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunetrail.errors import DataError
from tunetrail.provenance.ledger import LEDGER, artifacts
from tunetrail.provenance.manifest import MANIFEST, identity
from tunetrail.provenance.record import Record, read_record


@functools.cache
def run_of(folder: Path) -> Path | None:
    """The run an artifact belongs to: the nearest folder above it that holds a ledger."""
    return next((above for above in folder.parents if (above / LEDGER).exists()), None)


@dataclass
class Node:
    """An artifact on disk."""

    folder: Path
    identity: str
    record: Record | None
    fault: str | None = None
    """Why there is no record."""
    parents: dict[str, "Node | None"] = field(default_factory=dict)
    """By role; None where it is nowhere to be found."""

    @property
    def name(self) -> str:
        """Its path in its run; from here where there is no ledger yet to tell the run by."""
        run = run_of(self.folder)
        return self.folder.relative_to(run).as_posix() if run else os.path.relpath(self.folder)


class Lineage:
    """Artifacts, read once each."""

    def __init__(self) -> None:
        self.nodes: dict[Path, Node] = {}
        self._followed: set[Path] = set()
        self._runs: dict[Path, dict[str, Path]] = {}

    def add(self, folder: Path, recursive: bool = True) -> Node:
        """The artifact in a folder and, if asked, all it was made from. Raises DataError when there is no manifest."""
        folder = Path(os.path.abspath(folder))  # not resolved: a folder linked into a run is part of it
        todo = [self._read(folder)]
        while recursive and todo:
            node = todo.pop()
            if node.folder in self._followed:
                continue
            self._followed.add(node.folder)
            for role, parent in (node.record.parents if node.record else {}).items():
                there = self.find(node.folder, parent)
                node.parents[role] = self._read(there) if there else None
                if there:
                    todo.append(self.nodes[there])
        return self.nodes[folder]

    def add_run(self, run: Path) -> list[Node]:
        """Every artifact of a run."""
        return [self.add(folder) for folder in artifacts(Path(os.path.abspath(run)))]

    def _read(self, folder: Path) -> Node:
        if folder not in self.nodes:
            try:
                digest = identity(folder)
            except OSError:
                raise DataError(f"{folder / MANIFEST}: no manifest; this is no artifact") from None
            try:
                self.nodes[folder] = Node(folder, digest, read_record(folder))
            except DataError as e:
                self.nodes[folder] = Node(folder, digest, None, str(e))
        return self.nodes[folder]

    def find(self, child: Path, parent: dict) -> Path | None:
        """Where a parent is: where the record says, else wherever the run has it, else what is in its place now."""
        there = Path(os.path.normpath(child / parent["name"]))
        is_there = there in self.nodes or (there / MANIFEST).exists()
        if is_there and self._read(there).identity == parent["manifest"]:
            return there
        if run := run_of(child):
            if run not in self._runs:
                self._runs[run] = {
                    identity(folder): folder for folder in artifacts(run) if (folder / MANIFEST).is_file()
                }
            if found := self._runs[run].get(parent["manifest"]):
                return found
        return there if is_there else None

    def children(self) -> dict[Path, list[Node]]:
        """Folder -> the artifacts that were made from it, of those that were added."""
        found: dict[Path, list[Node]] = {}
        for node in self.nodes.values():
            for parent in node.parents.values():
                if parent is not None:
                    found.setdefault(parent.folder, []).append(node)
        return found

    def descendants(self, origins: list[Node]) -> list[Node]:
        """All that was made from these, in the order of the folders."""
        children, found, todo = self.children(), {}, list(origins)
        while todo:
            for child in children.get(todo.pop().folder, []):
                if child.folder not in found:
                    found[child.folder] = child
                    todo.append(child)
        return sorted(found.values(), key=lambda node: node.folder)


# ----------------------------------------------------------------------------- what a withdrawal touches

SUBJECTS = (
    "dataset:NAME, group:NAME (a source group of the data), labeler:NAME, package:NAME or "
    "package:NAME==VERSION, or the folder of an artifact"
)


def origins(lineage: Lineage, what: str) -> list[Node]:
    """The artifacts that hold or used `what`, one of SUBJECTS. Raises DataError when it is none, or nobody used it."""
    kind, _, name = what.partition(":")
    nodes = list(lineage.nodes.values())
    if kind == "dataset":
        found = [
            n
            for n in nodes
            if n.record and any(name in (d.get("name"), d.get("uri")) for d in n.record.of_role("source"))
        ]
    elif kind == "group":
        found = [n for n in nodes if _has_group(n.folder, name)]
    elif kind == "labeler":
        found = [
            n
            for n in nodes
            if n.record and any(name in d["annotations"].get("labelers", []) for d in n.record.of_role("labels"))
        ]
    elif kind == "package":
        package, _, version = name.partition("==")
        package = re.sub(r"[-_.]+", "-", package).lower()
        found = [
            n
            for n in nodes
            if n.record and package in n.record.packages and version in ("", n.record.packages[package])
        ]
    elif Path(what).is_dir():
        found = [n for n in nodes if n.folder == Path(os.path.abspath(what))]
    else:
        raise DataError(f"{what}: name {SUBJECTS}")
    if not found:
        raise DataError(f"{what}: no artifact here comes from it")
    return found


def _has_group(folder: Path, group: str) -> bool:
    """Whether a training split in this folder holds rows of this source group."""
    needle = json.dumps(group, ensure_ascii=False)
    for path in folder.glob("*.jsonl"):
        with path.open(encoding="utf-8") as f:
            for line in f:
                if needle in line and json.loads(line).get("group") == group:
                    return True
    return False


def is_checkpoint(node: Node) -> bool:
    """Whether weights were trained: what must be trained again when something it came from is withdrawn."""
    return (node.folder / "model").is_dir()


def table(node: Node) -> list[dict[str, Any]]:
    """The lineage of an artifact, itself first: a row for each artifact, its parents by role and folder (null:
    missing).
    """
    rows, todo, seen = [], [node], {node.folder}
    while todo:
        at = todo.pop(0)
        row: dict[str, Any] = {
            "artifact": at.name,
            "folder": str(at.folder),
            "manifest": at.identity,
            "fault": at.fault,
        }
        if at.record:
            row |= {"stage": at.record.stage, "commit": at.record.code.get("commit"), "finished": at.record.finished}
            row["sources"] = [
                {"name": d.get("name"), "digest": d.get("digest")}
                for role in ("source", "labels", "base")
                for d in at.record.of_role(role)
            ]
        row["from"] = {role: str(parent.folder) if parent else None for role, parent in sorted(at.parents.items())}
        rows.append(row)
        for parent in at.parents.values():
            if parent and parent.folder not in seen:
                seen.add(parent.folder)
                todo.append(parent)
    return rows
