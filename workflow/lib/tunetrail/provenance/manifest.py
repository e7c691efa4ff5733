"""Manifests identify artifacts: path, size and sha256 of every file; dtype, shape and sha256 of every tensor.

`manifest.json` is canonical JSON (RFC 8785), so an artifact's identity is what `sha256sum manifest.json` prints, and
equal content gives an equal identity. Equal tensors need not give equal safetensors files; the digests of tensors
distinguish weights that were saved again from weights that differ.
"""

import hashlib
import json
import os
import re
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import rfc8785

from tunetrail.errors import DataError
from tunetrail.files import canonical_json
from tunetrail.provenance.schema import FileEntry, TensorEntry

MANIFEST, PROVENANCE, METRICS = "manifest.json", "provenance.json", "metrics.json"
SIGNATURE = "provenance.dsse.json"
UNLISTED_FILES = (MANIFEST, PROVENANCE, SIGNATURE)
"""Files of an artifact that its manifest does not list."""
CHUNK = 2**22
"""How many bytes are read at once."""


def sha256_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """sha256 of any JSON value, for comparisons within one run. Identities are `sha256_bytes` of canonical files."""
    return sha256_bytes(canonical_json(value).encode())


def canonical(value: Any) -> bytes:
    """JSON according to RFC 8785. Raises ValueError for NaN, infinity and integers above 2^53."""
    return rfc8785.dumps(value)


def is_canonical(value: Any, content: bytes) -> bool:
    """Whether these bytes are the canonical form of the value."""
    try:
        return canonical(value) == content
    except ValueError:  # NaN, an integer or a number out of range, half a character
        return False


def identity(folder: Path) -> str:
    """sha256 of the artifact's manifest file."""
    return sha256_file(folder / MANIFEST)


# ----------------------------------------------------------------------------- tensors


def safetensors_header(f: BinaryIO) -> tuple[dict, int]:
    """(header without its metadata, where the data starts) of an open safetensors file. Raises DataError if broken.

    https://github.com/huggingface/safetensors#format
    """
    try:
        (length,) = struct.unpack("<Q", f.read(8))
        size = os.fstat(f.fileno()).st_size
        if length > size - 8:
            raise ValueError("header longer than the file")
        header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        for entry in header.values():
            if not isinstance(entry["dtype"], str) or not all(isinstance(n, int) for n in entry["shape"]):
                raise ValueError("a tensor without type or shape")
        spans = sorted(tuple(entry["data_offsets"]) for entry in header.values())
        if spans and (
            spans[0][0] != 0 or spans[-1][1] != size - 8 - length or any(a[1] != b[0] for a, b in pairwise(spans))
        ):
            raise ValueError("the tensors do not fill the file")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error) as e:
        raise DataError(f"{f.name}: not a whole safetensors file ({e})") from None
    return header, 8 + length


def hash_safetensors(path: Path) -> tuple[str, list[TensorEntry]]:
    """(sha256 of the file; name, dtype, shape and sha256 of each tensor, by name). Reads each byte once."""
    with path.open("rb") as f:
        header, start = safetensors_header(f)
        f.seek(0)
        whole = hashlib.sha256(f.read(start))
        tensors: list[TensorEntry] = []
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            digest = hashlib.sha256()
            remaining = end - begin
            while remaining and (chunk := f.read(min(remaining, CHUNK))):
                whole.update(chunk)
                digest.update(chunk)
                remaining -= len(chunk)
            tensors.append(
                {"name": name, "dtype": entry["dtype"], "shape": entry["shape"], "sha256": digest.hexdigest()}
            )
    return whole.hexdigest(), sorted(tensors, key=lambda t: t["name"])


# ----------------------------------------------------------------------------- files


NFS = re.compile(r"\.nfs[0-9a-f]{16,}")
"""What a network file system leaves of a file that is removed while somebody has it open; it goes by itself."""


def walk(folder: Path) -> list[Path]:
    """Every file and link below `folder`, whatever the link points to, sorted by path; not what NFS has left there."""
    paths = []
    for root, folders, names in os.walk(folder):  # follows no links to folders
        paths += [Path(root, name) for name in names if not NFS.fullmatch(name)]
        paths += [Path(root, name) for name in folders if Path(root, name).is_symlink()]
    return sorted(paths)


def parallel(function: Any, paths: list[Path]) -> list[Any]:
    """Applies `function` to each path on all cores (hashing releases the GIL), large files first; results are in
    order."""
    by_size = sorted(range(len(paths)), key=lambda i: -paths[i].lstat().st_size)
    results: list[Any] = [None] * len(paths)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, result in zip(by_size, pool.map(lambda i: function(paths[i]), by_size), strict=True):
            results[i] = result
    return results


def _own_files(folder: Path) -> list[Path]:
    return [path for path in walk(folder) if path.relative_to(folder).as_posix() not in UNLISTED_FILES]


def list_files(folder: Path, cache: "DigestCache | None" = None, hidden: bool = True) -> list[FileEntry]:
    """Relative path, size in bytes and sha256 of every file below `folder`, sorted by path.

    Args:
        cache: digests of files that have not changed since they were hashed; None: every byte is read.
        hidden: whether to include hidden files, such as those of git and of the hub's downloads.
    """
    paths = _own_files(folder) if hidden else visible_files(folder)
    digests = parallel((cache or DigestCache(None)).sha256, paths)
    return [
        {"path": path.relative_to(folder).as_posix(), "size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests, strict=True)
    ]


def digest_of(path: Path, cache: "DigestCache | None" = None) -> str | None:
    """sha256 of a file, or over the names and contents of a folder's visible files; None if there is neither.

    Args:
        cache: see `list_files`.
    """
    if path.is_dir():
        return sha256_json(list_files(path, cache, hidden=False))
    return sha256_file(path) if path.is_file() else None


def build(folder: Path) -> dict[str, list[dict]]:
    """`files` and `tensors` of a folder. Raises DataError for a broken safetensors file or a name that is not UTF-8."""
    paths = _own_files(folder)
    for path in paths:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise DataError(f"{str(path)!r}: a file name must be UTF-8; rename it") from None

    def hash_file(path: Path) -> tuple[str, list[TensorEntry]]:
        return hash_safetensors(path) if path.suffix == ".safetensors" else (sha256_file(path), [])

    files: list[dict] = []
    tensors: list[dict] = []
    for path, (digest, found) in zip(paths, parallel(hash_file, paths), strict=True):
        name = path.relative_to(folder).as_posix()
        files.append({"path": name, "size": path.stat().st_size, "sha256": digest})
        tensors += [{"file": name, **tensor} for tensor in found]
    return {"files": files, "tensors": tensors}


def read_manifest(path: Path) -> dict:
    """The manifest of a folder. Raises DataError if there is none, or the file is not a manifest."""
    try:
        manifest = json.loads(path.read_bytes())
        for entry in manifest["files"]:
            assert isinstance(entry["path"], str)
            assert isinstance(entry["size"], int)
            assert len(entry["sha256"]) == 64
        for tensor in manifest.get("tensors", []):
            assert tensor.keys() == {"file", "name", "dtype", "shape", "sha256"}
        return manifest
    except FileNotFoundError:
        raise DataError(f"{path}: no manifest; run the stage that makes this folder first") from None
    except ValueError as e:
        raise DataError(f"{path}: not valid JSON ({e}); delete the folder and run its stage again") from None
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror})") from None
    except (LookupError, TypeError, AttributeError, AssertionError, RecursionError):
        raise DataError(f"{path}: is no manifest; delete the folder and run its stage again") from None


def is_inside(name: str) -> bool:
    """Whether a path in a manifest stays inside its folder."""
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and path.as_posix() == name


# ----------------------------------------------------------------------------- folders from outside a run

BLOCK, BLOCKS = 2**12, 256
"""How many bytes per block, and blocks per file, `sample` reads."""


def visible_files(folder: Path) -> list[Path]:
    """Every file below `folder` except hidden ones, such as those of git and of the hub's downloads."""
    return [path for path in walk(folder) if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def sample(folder: Path) -> str:
    """A digest of names, sizes and evenly spaced blocks of a folder's files, to tell models apart quickly.

    At most 1 MB per file is read, so that each start of Snakemake can afford it. Training changes nearly every weight;
    files of up to 1 MB are read completely. This is not a digest of the content: stages and audits read every byte.
    """
    digest = hashlib.sha256()
    for path in visible_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode(errors="surrogateescape"))
        step = max(BLOCK, size // BLOCKS)
        with path.open("rb", buffering=0) as f:
            for start in range(0, size, step):
                f.seek(start)
                digest.update(f.read(BLOCK))
    return digest.hexdigest()[:16]


def artifact_around(folder: Path) -> Path | None:
    """The artifact that a folder is or is inside of: the nearest folder, from there up, with a record; else None.

    A link into an artifact counts as the folder it points to.
    """
    for start in (Path(os.path.abspath(folder)), folder.resolve()):
        artifact = next((at for at in (start, *start.parents) if (at / PROVENANCE).is_file()), None)
        if artifact:
            return artifact if folder.is_absolute() else Path(os.path.relpath(artifact))
    return None


# ----------------------------------------------------------------------------- cache of digests


class DigestCache:
    """sha256 of files that have not changed since any process of the run hashed them; without a folder, this object.

    A file counts as unchanged while its device, inode, size, mtime and ctime are; ctime cannot be set back. An entry is
    a small file, written atomically by a rename. Stages and quick audits use the cache. Deep audits do not: bit rot
    changes none of these.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.known: dict[tuple[int, ...], str] = {}
        """What this object has looked up before: stamp -> sha256."""

    def sha256(self, path: Path) -> str:
        before = _stamp(path)
        if digest := self.known.get(before):
            return digest
        entry = None if self.folder is None else self.folder / f"{before[0]}-{before[1]}"
        if entry is not None:
            try:
                *stamp, digest = entry.read_text().split()
                if tuple(map(int, stamp)) == before:
                    self.known[before] = digest
                    return digest
            except (OSError, ValueError):
                pass
        digest = sha256_file(path)
        self.remember(path, digest, before)
        return digest

    def remember(self, path: Path, digest: str, stamp: tuple[int, ...] | None = None) -> None:
        """Stores a digest that was just computed. `stamp` is that of the file before it was read."""
        stamp = stamp or _stamp(path)
        if stamp != _stamp(path):
            return
        self.known[stamp] = digest
        folder = self.folder
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            pending = folder / f".{os.getpid()}-{threading.get_ident()}"  # two threads may hash two links to one file
            pending.write_text(" ".join(map(str, (*stamp, digest))))
            pending.rename(folder / f"{stamp[0]}-{stamp[1]}")
        except OSError:  # a cache that cannot be written only costs time
            self.folder = None


def _stamp(path: Path) -> tuple[int, ...]:
    s = path.stat()
    return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns
