"""Lineage: which artifacts an artifact was made from, and which were made from it, according to their records.

A record names a parent by its relative path and by the digests of its manifest and record, so that a
run may be moved or copied. A parent that has moved is searched for in the run by its digest.
"""

import functools
import json
import os
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunetrail.errors import DataError, DiskError, TunetrailError
from tunetrail.files import open_regular, read_regular
from tunetrail.provenance.ledger import Ledger, read_ledger
from tunetrail.provenance.manifest import MANIFEST, cannot_read, identity, sha256_bytes
from tunetrail.provenance.record import Record, read_record
from tunetrail.provenance.run_folder import LEDGER, artifacts
from tunetrail.provenance.schema import LedgerEntry, Manifest, RecordedParent

UNREAD = "unreadable"
"""Stands for the identity of an artifact whose manifest cannot be read."""


@functools.cache
def run_of(folder: Path) -> Path | None:
    """The run an artifact belongs to: the nearest folder above it that holds a ledger."""
    return next((above for above in folder.parents if os.path.lexists(above / LEDGER)), None)


class Runs:
    """The runs that an audit meets, with their ledgers; each is read once."""

    def __init__(self) -> None:
        self.named: list[Path] = []
        """The runs to audit; all others are runs of their parents."""
        self.ledgers: dict[Path, Ledger] = {}
        self.made: dict[Path, Counter[str]] = {}
        """Run -> the names of the runs in which its artifacts were made, according to their records."""
        self._latest: dict[Path, dict[str, LedgerEntry]] = {}

    def of(self, folder: Path) -> Path | None:
        """An artifact's run: a named one, even if there are ledgers further down, else the nearest."""
        return next((run for run in self.named if folder.is_relative_to(run)), None) or run_of(folder)

    def ledger(self, run: Path) -> Ledger:
        if run not in self.ledgers:
            self.ledgers[run] = read_ledger(run)
        return self.ledgers[run]

    def latest(self, run: Path) -> dict[str, LedgerEntry]:
        """The last entry of each artifact."""
        if run not in self._latest:
            self._latest[run] = self.ledger(run).latest
        return self._latest[run]

    def made_as(self, run: Path) -> str:
        """The name that a run had when most of its artifacts were made."""
        return self.made[run].most_common(1)[0][0]


@dataclass
class Node:
    """An artifact on disk."""

    folder: Path
    identity: str
    record: Record | None
    fault: TunetrailError | None = None
    """Why there is no record."""
    content: bytes = b""
    """The content of its manifest file when it was read."""
    manifest: Manifest | None = None
    """The parsed manifest, once it has been checked."""
    unread: TunetrailError | None = None
    """Why the manifest file could not be read."""
    parents: dict[str, "Node | None"] = field(default_factory=dict)
    """By role; None for a parent that cannot be found."""
    runs: set[Path] = field(default_factory=set)
    """The runs of the lineage that it was read with."""

    @property
    def is_unreadable(self) -> bool:
        """Whether its manifest or record cannot be read, although they may be unchanged."""
        return isinstance(self.unread, DiskError) or isinstance(self.fault, DiskError)

    @property
    def name(self) -> str:
        """Its path in its run, preceded by the run if the lineage has several; relative to the working directory if no
        ledger marks the run yet.
        """
        run = run_of(self.folder)
        if run is None:
            return os.path.relpath(self.folder)
        return self.folder.relative_to(run.parent if len(self.runs) > 1 else run).as_posix()


class Lineage:
    """Artifacts, read once each."""

    def __init__(self) -> None:
        self.nodes: dict[Path, Node] = {}
        self.runs: set[Path] = set()
        self._followed: set[Path] = set()
        self._runs: dict[Path, dict[str, Path]] = {}

    def add(self, folder: Path, recursive: bool = True) -> Node:
        """Reads an artifact and, if `recursive`, all it was made from. Raises DataError if there is no manifest."""
        folder = Path(os.path.abspath(folder))  # not resolved: a folder linked into a run is part of the run
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
            path = folder / MANIFEST
            node = self.nodes[folder] = Node(folder, UNREAD, None, runs=self.runs)
            try:
                node.content = read_regular(path)
                node.identity = sha256_bytes(node.content)
            except OSError as e:
                if not os.path.lexists(path):
                    del self.nodes[folder]
                    raise DataError(f"{path}: no manifest; this is no artifact") from None
                node.unread = cannot_read(path, e)
            try:
                node.record = read_record(folder)
            except (DataError, DiskError) as e:
                node.fault = e
            if run := run_of(folder):
                self.runs.add(run)
        return self.nodes[folder]

    def find(self, child: Path, parent: RecordedParent) -> Path | None:
        """Finds a parent: where the record says, else anywhere in the run, else whatever is in its place now."""
        there = Path(os.path.normpath(child / parent["name"]))
        is_there = there in self.nodes or os.path.lexists(there / MANIFEST)
        if is_there and self._read(there).identity == parent["manifest"]:
            return there
        if run := run_of(child):
            if run not in self._runs:
                self._runs[run] = _by_identity(run)
            if found := self._runs[run].get(parent["manifest"]):
                return found
        return there if is_there else None

    def children(self) -> dict[Path, list[Node]]:
        """Folder -> the artifacts made from it, as far as they were added."""
        by_parent: dict[Path, list[Node]] = {}
        for node in self.nodes.values():
            for parent in node.parents.values():
                if parent is not None:
                    by_parent.setdefault(parent.folder, []).append(node)
        return by_parent

    def descendants(self, nodes: list[Node]) -> list[Node]:
        """Everything that was made from these, in the order of the folders."""
        children, by_folder, todo = self.children(), {}, list(nodes)
        while todo:
            for child in children.get(todo.pop().folder, []):
                if child.folder not in by_folder:
                    by_folder[child.folder] = child
                    todo.append(child)
        return sorted(by_folder.values(), key=lambda node: node.folder)


def _by_identity(run: Path) -> dict[str, Path]:
    """The artifacts of a run by identity, if their manifest can be read."""
    found = {}
    for folder in artifacts(run):
        with suppress(OSError):
            found[identity(folder)] = folder
    return found


def ancestors(node: Node) -> dict[str, Node]:
    """An artifact and all it was made from, nearest first, by stage; shards by stage and number.

    Stages of other runs are preceded by their run.
    """
    nodes: dict[str, Node] = {}
    for at in nearest_first([node]):
        if at.record:
            key = made_by(at.record)
            if (run := run_of(at.folder)) != run_of(node.folder):
                key = f"{run.name if run else os.path.relpath(at.folder)}/{key}"
            nodes.setdefault(key, at)
    return nodes


def nearest_first(nodes: list[Node]) -> list[Node]:
    """These artifacts and all they were made from, nearest first."""
    ordered, todo, seen = [], list(nodes), {node.folder for node in nodes}
    while todo:
        ordered.append(at := todo.pop(0))
        parents = [parent for parent in at.parents.values() if parent and parent.folder not in seen]
        seen |= {parent.folder for parent in parents}
        todo += parents
    return ordered


def made_by(record: Record) -> str:
    """The stage, and which part if it is one of several."""
    return record.stage if record.part == "0/1" else f"{record.stage} {record.part}"


# ----------------------------------------------------------------------------- what a withdrawal touches

SUBJECTS = (
    "dataset:NAME, group:NAME (a source group of the data), labeler:NAME, package:NAME or "
    "package:NAME==VERSION, or the folder of an artifact"
)


def artifacts_using(lineage: Lineage, what: str) -> list[Node]:
    """The artifacts that contain or used `what`, one of SUBJECTS. Raises DataError if it is none, or nothing used
    it."""
    kind, _, name = what.partition(":")
    if kind in USES:
        uses = USES[kind]
        users = [node for node in lineage.nodes.values() if uses(node, name)]
    elif Path(what).is_dir():
        users = [node for node in lineage.nodes.values() if node.folder == Path(os.path.abspath(what))]
    else:
        raise DataError(f"{what}: name {SUBJECTS}")
    if not users:
        raise DataError(f"{what}: no artifact here comes from it")
    return users


def _read_dataset(node: Node, name: str) -> bool:
    sources = node.record.of_role("source") if node.record else []
    return any(name in (source.get("name"), source.get("uri")) for source in sources)


def _has_group(node: Node, group: str) -> bool:
    """Whether a split in this folder holds rows of this source group. Its files tell, with or without a record."""
    needle = json.dumps(group, ensure_ascii=False).encode()
    for path in node.folder.glob("*.jsonl"):
        with suppress(OSError), open_regular(path) as f:
            if any(needle in line and json.loads(line).get("group") == group for line in f):
                return True
    return False


def _has_labels_of(node: Node, labeler: str) -> bool:
    label_sets = node.record.of_role("labels") if node.record else []
    return any(labeler in labels["annotations"].get("labelers", []) for labels in label_sets)


def _ran_with(node: Node, requirement: str) -> bool:
    name, _, version = requirement.partition("==")
    name = re.sub(r"[-_.]+", "-", name).lower()
    packages = node.record.packages if node.record else {}
    return name in packages and version in ("", packages[name])


USES = {"dataset": _read_dataset, "group": _has_group, "labeler": _has_labels_of, "package": _ran_with}


def is_checkpoint(node: Node) -> bool:
    """Whether weights were trained, so that they must be retrained if something they came from is withdrawn."""
    return (node.folder / "model").is_dir()


def table(node: Node) -> list[dict[str, Any]]:
    """A row for an artifact and for each one it was made from, itself first.

    `from` has the folders of its parents by role, null for one that is missing.
    """
    rows = []
    for at in nearest_first([node]):
        row: dict[str, Any] = {
            "artifact": at.name,
            "folder": str(at.folder),
            "manifest": at.identity,
            "fault": str(at.fault) if at.fault else None,
        }
        if at.record:
            row |= {"stage": at.record.stage, "commit": at.record.code.get("commit"), "finished": at.record.finished}
            used = [d for role in ("source", "labels", "base", "scorer") for d in at.record.of_role(role)]
            row["sources"] = [{"name": d.get("name"), "digest": d.get("digest")} for d in [*used, *at.record.imported]]
        row["from"] = {role: str(parent.folder) if parent else None for role, parent in sorted(at.parents.items())}
        rows.append(row)
    return rows
