"""Compares every file of an artifact with its manifest."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tunetrail.errors import DataError
from tunetrail.files import changed
from tunetrail.provenance.findings import VerifyResult
from tunetrail.provenance.lineage import Node
from tunetrail.provenance.manifest import (
    MANIFEST,
    NFS,
    NOT_A_FILE,
    UNLISTED_FILES,
    hash_safetensors,
    is_canonical,
    is_inside,
    parallel,
    parse_manifest,
    scan,
    sha256_file,
)
from tunetrail.provenance.schema import FileEntry, Manifest, TensorEntry


class ToHash(NamedTuple):
    """An existing file with the right size, whose content must still be compared."""

    node: Node
    name: str
    entry: FileEntry
    tensors: list[TensorEntry]


class Hashed(NamedTuple):
    """What a file holds now."""

    sha256: str = ""
    tensors: list[TensorEntry] | None = None
    """None where they were not looked at."""
    fault: str = ""
    error: OSError | None = None


class FileCheck:
    """Compares the files of artifacts with their manifests and notes what differs.

    Args:
        cached: digests that may be trusted; None: every byte is read, and every tensor hashed.
    """

    def __init__(self, result: VerifyResult, cached: Callable[[Path], str] | None):
        self.result, self.cached = result, cached

    def run(self, nodes: list[Node]) -> None:
        """Checks the artifacts; all files are hashed in parallel."""
        todo = [file for node in nodes for file in self._listed(node)]
        sizes = [file.entry["size"] for file in todo]
        self.result.bytes_read += sum(sizes)
        for file, now in zip(todo, parallel(self._hash, todo, sizes), strict=True):
            self._compare(file, now)

    def _hash(self, file: ToHash) -> Hashed:
        path = file.node.folder / file.name
        try:
            if self.cached:
                return Hashed(self.cached(path))
            is_weights = bool(file.tensors) or file.name.endswith(".safetensors")
            return Hashed(*hash_safetensors(path)) if is_weights else Hashed(sha256_file(path))
        except DataError:
            return Hashed(fault="is no whole safetensors file any more")
        except OSError as e:
            return Hashed(error=e)

    def _compare(self, file: ToHash, now: Hashed) -> None:
        node, name, expected = file.node, file.name, file.entry["sha256"]
        if now.error and now.error.errno not in NOT_A_FILE:
            self.result.add("unreadable", node, f"{name} cannot be read ({now.error.strerror}); ask its owner")
        elif now.error or now.fault:
            message = now.fault or "is no file any more"
            self.result.add("file-changed", node, f"{name} {message}; restore it from a copy")
        elif now.sha256 == expected:
            if now.tensors is not None and now.tensors != file.tensors:
                message = f"{MANIFEST} names other tensors than {name} has; restore it from a copy"
                self.result.add("manifest-edited", node, message)
        elif file.tensors:
            self._tensors(node, name, file.tensors, now.tensors)
        else:
            message = f"{name} has sha256 {now.sha256[:16]}…, not {expected[:16]}…; restore it from a copy"
            self.result.add("file-changed", node, message)

    def _manifest(self, node: Node) -> Manifest | None:
        """The manifest of an artifact, if it is one."""
        if isinstance(node.unread, DataError):
            self.result.add("manifest-edited", node, f"{node.unread}; restore it from a copy")
        elif node.unread:
            self.result.add("unreadable", node, f"{node.unread}; ask its owner")
        if node.unread:
            return None
        try:
            manifest = parse_manifest(node.content, node.folder / MANIFEST)
        except DataError as e:
            self.result.add("manifest-edited", node, f"{e}, or restore it from a copy")
            return None
        if not is_canonical(manifest, node.content):
            self.result.add("manifest-edited", node, f"{MANIFEST} is not in canonical form; restore it from a copy")
        return manifest

    def _listed(self, node: Node) -> list[ToHash]:
        """Looks at the names, kinds and sizes of an artifact's files; returns those to hash."""
        manifest = node.manifest = self._manifest(node)
        for name in UNLISTED_FILES:
            if (node.folder / name).is_symlink():
                self.result.add("link-outside", node, f"{name} is a link; put the file itself there")
        if manifest is None:
            return []
        tensors: dict[str, list[TensorEntry]] = {}
        for tensor in manifest.get("tensors", []):
            tensors.setdefault(tensor["file"], []).append(
                {"name": tensor["name"], "dtype": tensor["dtype"], "shape": tensor["shape"], "sha256": tensor["sha256"]}
            )
        listed = {entry["path"]: entry for entry in manifest["files"]}
        if len(listed) < len(manifest["files"]) or not tensors.keys() <= listed.keys():
            message = f"{MANIFEST} names a file twice, or tensors of a file it does not name; restore it from a copy"
            self.result.add("manifest-edited", node, message)
        try:
            there = scan(node.folder)
        except OSError as e:
            folder = os.path.relpath(str(e.filename), node.folder)
            self.result.add("unreadable", node, f"the folder {folder} cannot be read ({e.strerror}); ask its owner")
            return []
        for name in sorted(there.keys() - listed.keys() - set(UNLISTED_FILES)):
            if not NFS.fullmatch(name.rpartition("/")[2]):
                self.result.add("file-added", node, f"{name} is not in the manifest; remove it")
        return [
            ToHash(node, name, entry, tensors.get(name, []))
            for name, entry in listed.items()
            if self._is_comparable(node, entry, there.get(name), tensors.get(name, []))
        ]

    def _is_comparable(
        self, node: Node, entry: FileEntry, status: os.stat_result | None, tensors: list[TensorEntry]
    ) -> bool:
        """Whether a listed file is a plain file in its folder with the right size; notes what it is if not."""
        name = entry["path"]
        if not is_inside(name):
            self.result.add("unsafe-path", node, f"{name} would leave the folder; it was not read")
            return False
        if status is None:
            self.result.add("file-missing", node, f"{name} is gone; restore it from a copy")
            return False
        if stat.S_ISLNK(status.st_mode):
            path = node.folder / name
            if not _is_below(path, node.folder):
                target = os.readlink(path)
                self.result.add("link-outside", node, f"{name} is a link to {target}; it was not read")
                return False
            try:
                status = path.stat()
            except OSError:
                self.result.add("file-changed", node, f"{name} is no file any more")
                return False
        if not stat.S_ISREG(status.st_mode):
            self.result.add("file-changed", node, f"{name} is no file any more")
        elif status.st_size != entry["size"]:
            self._other_size(node, entry, status.st_size, tensors)
        else:
            return True
        return False

    def _other_size(self, node: Node, entry: FileEntry, size: int, tensors: list[TensorEntry]) -> None:
        """Of a file with another size: weights that were saved again, or something else."""
        if not (tensors and self._tensors(node, entry["path"], tensors, None)):
            message = f"{entry['path']} has {size} bytes, not {entry['size']}; restore it from a copy"
            self.result.add("file-changed", node, message)

    def _tensors(self, node: Node, name: str, expected: list[TensorEntry], now: list[TensorEntry] | None) -> bool:
        """Which tensors of a changed file differ. Returns whether none does."""
        if now is None:
            try:
                _, now = hash_safetensors(node.folder / name)
            except (DataError, OSError):
                message = f"{name} is no whole safetensors file any more; restore it from a copy"
                self.result.add("file-changed", node, message)
                return False
        if now == expected:
            message = f"{name} was saved again; all {len(now)} tensors are what they were"
            self.result.add("file-resaved", node, message)
            return True
        before, after = ({t["name"]: t for t in of} for of in (expected, now))
        names = list(changed(before, after))
        first = f"{names[0]} first" if names else "their order"
        difference = f"{len(names)} of {len(before)} tensors differ, {first}"
        self.result.add("tensors-changed", node, f"{name}: {difference}; restore it from a copy")
        return False


def _is_below(path: Path, folder: Path) -> bool:
    """Whether a link leads to something below the folder."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
