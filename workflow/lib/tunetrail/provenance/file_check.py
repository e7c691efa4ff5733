"""Compares every file of an artifact with its manifest."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tunetrail.errors import DataError
from tunetrail.files import changed
from tunetrail.provenance.findings import VerifyResult, printable
from tunetrail.provenance.lineage import Node
from tunetrail.provenance.manifest import (
    MANIFEST,
    UNLISTED_FILES,
    hash_safetensors,
    is_canonical,
    is_inside,
    parallel,
    read_manifest,
    walk,
)
from tunetrail.provenance.schema import FileEntry, TensorEntry


class ToHash(NamedTuple):
    """An existing file with the right size, whose content must still be compared."""

    node: Node
    path: Path
    sha256: str
    tensors: list[TensorEntry]


class FileCheck:
    """Compares the files of artifacts with their manifests and notes what differs."""

    def __init__(self, result: VerifyResult, hashing: Callable[[Path], str]):
        self.result, self.hashing = result, hashing

    def run(self, nodes: list[Node]) -> None:
        """Checks the artifacts; all files are hashed in parallel."""
        todo = [file for node in nodes for file in self._listed(node)]
        self.result.bytes_read += sum(file.path.stat().st_size for file in todo)
        for file, digest in zip(todo, parallel(self._digest, [file.path for file in todo]), strict=True):
            name = file.path.relative_to(file.node.folder).as_posix()
            if digest == file.sha256:
                continue
            if file.tensors:
                self._tensors(file.node, file.path, name, file.tensors)
            else:
                message = (
                    f"{printable(name)} has sha256 {digest[:16]}…, not {file.sha256[:16]}…; restore it from a copy"
                )
                self.result.add("file-changed", file.node, message)

    def _digest(self, path: Path) -> str:
        try:
            return self.hashing(path)
        except OSError as e:
            return f"unreadable: {e.strerror}"

    def _listed(self, node: Node) -> list[ToHash]:
        """Checks the names, kinds and sizes of an artifact's files; returns those to hash."""
        try:
            manifest = read_manifest(node.folder / MANIFEST)
        except DataError:
            self.result.add("manifest-edited", node, f"{MANIFEST} cannot be read; restore it from a copy")
            return []
        for name in UNLISTED_FILES:
            if (node.folder / name).is_symlink():
                self.result.add("link-outside", node, f"{name} is a link; put the file itself there")
        if not is_canonical(manifest, (node.folder / MANIFEST).read_bytes()):
            self.result.add("manifest-edited", node, f"{MANIFEST} is not in canonical form; restore it from a copy")
        tensors: dict[str, list[TensorEntry]] = {}
        for tensor in manifest.get("tensors", []):
            tensors.setdefault(tensor.pop("file"), []).append(tensor)
        there = {path.relative_to(node.folder).as_posix(): path for path in walk(node.folder)}
        listed = {entry["path"]: entry for entry in manifest["files"]}
        for name in sorted(there.keys() - listed.keys() - set(UNLISTED_FILES)):
            self.result.add("file-added", node, f"{printable(name)} is not in the manifest; remove it")
        return [
            ToHash(node, node.folder / name, entry["sha256"], tensors.get(name, []))
            for name, entry in listed.items()
            if self._is_comparable(node, entry, name in there, tensors.get(name, []))
        ]

    def _is_comparable(self, node: Node, entry: FileEntry, exists: bool, tensors: list[TensorEntry]) -> bool:
        """Whether a listed file is a plain file in its folder with the right size; notes what it is if not."""
        name, path = entry["path"], node.folder / entry["path"]
        if not is_inside(name):
            self.result.add("unsafe-path", node, f"{printable(name)} would leave the folder; it was not read")
        elif not exists:
            self.result.add("file-missing", node, f"{printable(name)} is gone; restore it from a copy")
        elif path.is_symlink() and not _is_below(path, node.folder):
            target = printable(os.readlink(path))
            self.result.add("link-outside", node, f"{printable(name)} is a link to {target}; it was not read")
        elif not path.is_file():
            self.result.add("file-changed", node, f"{printable(name)} is no file any more")
        elif (size := path.stat().st_size) != entry["size"]:
            message = f"{printable(name)} has {size} bytes, not {entry['size']}; restore it from a copy"
            self.result.add("file-changed", node, message)
            if name.endswith(".safetensors"):
                self._tensors(node, path, name, tensors)
        else:
            return True
        return False

    def _tensors(self, node: Node, path: Path, name: str, expected: list[TensorEntry]) -> None:
        """Which tensors of a changed file differ."""
        try:
            _, tensors = hash_safetensors(path)
        except (DataError, OSError):
            message = f"{printable(name)} is no whole safetensors file any more; restore it from a copy"
            self.result.add("file-changed", node, message)
            return
        if tensors == expected:
            self.result.withdraw("file-changed", node, f"{printable(name)} has ")
            message = f"{printable(name)} was saved again; all {len(tensors)} tensors are what they were"
            self.result.add("file-resaved", node, message)
            return
        before, now = ({t["name"]: t for t in of} for of in (expected, tensors))
        names = list(changed(before, now))
        difference = f"{len(names)} of {len(before)} tensors differ, {names[0]} first"
        self.result.add("tensors-changed", node, f"{printable(name)}: {difference}; restore it from a copy")


def _is_below(path: Path, folder: Path) -> bool:
    """Whether a link leads to something below the folder."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
