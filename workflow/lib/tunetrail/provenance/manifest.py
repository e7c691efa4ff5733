"""Manifests identify artifacts: path, size and sha256 of every file; dtype, shape and sha256 of every tensor.

`manifest.json` is canonical JSON (RFC 8785), so an artifact's identity is what `sha256sum manifest.json` prints, and
equal content gives an equal identity. Equal tensors need not give equal safetensors files; the digests of tensors
distinguish weights that were saved again from weights that differ.
"""

import errno
import hashlib
import os
import re
import struct
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import rfc8785
from pydantic import TypeAdapter, ValidationError

from tunetrail.errors import DataError, DiskError, TunetrailError
from tunetrail.files import MAX_JSON, canonical_json, open_regular, parse_json, read_regular
from tunetrail.provenance.schema import FileEntry, Manifest, TensorEntry

Item = TypeVar("Item")
Result = TypeVar("Result")
MANIFEST, PROVENANCE, METRICS = "manifest.json", "provenance.json", "metrics.json"
SIGNATURE = "provenance.dsse.json"
UNLISTED_FILES = (MANIFEST, PROVENANCE, SIGNATURE)
"""Files of an artifact that its manifest does not list."""
CHUNK = 2**22
"""Bytes read at once."""
SMALL = 2**18
"""Bytes up to which a file is read at once."""
BATCH = 256
"""Small files that a thread hashes in a row."""


def sha256_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path) -> str:
    """Of a regular file. Raises OSError for any other."""
    with open_regular(path) as f:
        if os.fstat(f.fileno()).st_size <= SMALL:  # file_digest allocates as much
            return sha256_bytes(f.read() or b"")
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
        if _is_plain(value):  # json writes the same several times as fast
            return canonical_json(value).encode() == content
        return canonical(_doubles(value)) == content
    except (ValueError, RecursionError, OverflowError):  # NaN, an integer or a number out of range, half a character
        return False


def _doubles(value: Any) -> Any:
    """The value with whole numbers from 2^53 on as what RFC 8785 takes them for: 4e18 is written without exponent."""
    if isinstance(value, dict):
        return {key: _doubles(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_doubles(item) for item in value]
    return float(value) if isinstance(value, int) and abs(value) >= 2**53 else value


def _is_plain(value: Any) -> bool:
    """Whether a JSON value has no number but small integers and no key but ASCII: RFC 8785 differs in others alone."""
    level = [value]
    while level:
        below: list[Any] = []
        for found in level:
            if isinstance(found, dict):
                if not "".join(found).isascii():
                    return False
                below += found.values()
            elif isinstance(found, list):
                below += found
            elif isinstance(found, float) or (isinstance(found, int) and abs(found) >= 2**53):
                return False
        level = below
    return True


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
        if length > min(size - 8, MAX_JSON):
            raise ValueError("header longer than the file, or than any is")
        header = parse_json(f.read(length))
        header.pop("__metadata__", None)
        for entry in header.values():
            if not isinstance(entry["dtype"], str) or not all(type(n) is int for n in entry["shape"]):
                raise ValueError("a tensor without type or shape")
            if [type(n) for n in entry["data_offsets"]] != [int, int]:
                raise ValueError("a tensor without a place")
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
    with open_regular(path) as f:
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
    """Every file and link below `folder`, whatever the link points to, sorted by path; not what NFS has left there.

    Raises OSError where a folder cannot be read.
    """
    found = []
    for root, folders, names in os.walk(folder, onerror=_raise):  # follows no links to folders
        found += [Path(root, name) for name in names if not NFS.fullmatch(name)]
        found += [Path(root, name) for name in folders if Path(root, name).is_symlink()]
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def scan(folder: Path) -> dict[str, os.stat_result]:
    """Every file and link below a folder, by path from there -> its own status: no link is followed.

    Raises OSError where a folder cannot be read.
    """
    found, todo = {}, [""]
    while todo:
        start = todo.pop()
        with os.scandir(os.path.join(folder, start)) as entries:
            for entry in entries:
                name = start + entry.name
                if entry.is_dir(follow_symlinks=False):
                    todo.append(f"{name}/")
                else:
                    found[name] = entry.stat(follow_symlinks=False)
    return found


def parallel(function: Callable[[Item], Result], items: Sequence[Item], sizes: Sequence[int]) -> list[Result]:
    """`function` of each item, in order, on all cores: hashing releases the interpreter. Large files start first.

    Args:
        sizes: bytes of each item; small ones share a task.
    """
    by_size = sorted(range(len(items)), key=lambda i: -sizes[i])
    large = sum(size > SMALL for size in sizes)
    tasks = [by_size[i : i + 1] for i in range(large)]
    tasks += [by_size[i : i + BATCH] for i in range(large, len(items), BATCH)]
    results: list[Any] = [None] * len(items)

    def work(task: list[int]) -> None:
        for i in task:
            results[i] = function(items[i])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(work, tasks))
    return results


def hash_files(function: Callable[[Path], Result], paths: Sequence[Path]) -> list[Result]:
    """`function` of each file, in order, on all cores."""
    return parallel(function, paths, [path.stat().st_size for path in paths])


def _own_files(folder: Path) -> list[Path]:
    return [path for path in walk(folder) if path.relative_to(folder).as_posix() not in UNLISTED_FILES]


def list_files(folder: Path, cache: "DigestCache | None" = None, hidden: bool = True) -> list[FileEntry]:
    """Relative path, size in bytes and sha256 of every file below `folder`, sorted by path.

    Args:
        cache: digests of files that have not changed since they were hashed; None: every byte is read.
        hidden: whether to include hidden files, such as those of git and of the hub's downloads.
    """
    paths = _own_files(folder) if hidden else visible_files(folder)
    digests = hash_files((cache or DigestCache(None)).sha256, paths)
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
    for path, (digest, found) in zip(paths, hash_files(hash_file, paths), strict=True):
        name = path.relative_to(folder).as_posix()
        files.append({"path": name, "size": path.stat().st_size, "sha256": digest})
        tensors += [{"file": name, **tensor} for tensor in found]
    return {"files": files, "tensors": tensors}


_MANIFEST = TypeAdapter(Manifest)


def parse_manifest(content: bytes, source: Path) -> Manifest:
    """Raises DataError where this is no manifest."""
    try:
        manifest = parse_json(content)
    except ValueError as e:
        raise DataError(f"{source}: not valid JSON ({e}); delete the folder and run its stage again") from None
    try:
        _MANIFEST.validate_python(manifest, strict=True)
    except ValidationError as e:
        raise DataError(
            f"{source}: is no manifest ({first_error(e)}); delete the folder and run its stage again"
        ) from None
    return manifest


def read_manifest(path: Path) -> Manifest:
    """Raises DataError where there is none, or the file is no manifest."""
    try:
        content = read_regular(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no manifest; run the stage that makes this folder first") from None
    except OSError as e:
        raise cannot_read(path, e) from None
    return parse_manifest(content, path)


def first_error(error: ValidationError) -> str:
    """Where and what: the first of an error's lines."""
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg']}"


def cannot_read(path: Path, error: OSError) -> TunetrailError:
    """A file that is of the wrong kind is bad data; any other obstacle is the disk's, or a permission."""
    kind = DataError if error.errno in NOT_A_FILE else DiskError
    return kind(f"{path}: cannot be read ({error.strerror})")


NOT_A_FILE = (errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENOTDIR, errno.ENOENT, errno.ENXIO, errno.EFBIG)


def is_inside(name: str) -> bool:
    """Whether a path of a manifest stays in its folder."""
    return "\0" not in name and not {"", ".", ".."}.intersection(name.split("/"))


# ----------------------------------------------------------------------------- folders from outside a run


def visible_files(folder: Path) -> list[Path]:
    """Every file below `folder` except hidden ones, such as those of git and of the hub's downloads."""
    return [path for path in walk(folder) if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


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
