"""Reading and writing files: JSON, JSON lines, and syncing to disk."""

import errno
import json
import logging
import os
import stat
from collections.abc import Iterable, Mapping
from io import BufferedReader
from pathlib import Path
from tempfile import mkstemp
from typing import Any

log = logging.getLogger("tunetrail")

MAX_JSON = 2**26
"""The most bytes of an untrusted JSON file: a manifest of 400,000 files."""
MAX_DEPTH = 64
"""The most levels of nesting in such a file."""
HOLES = 1000
"""A file over 1 GB that is so many times larger than its disk space is nearly all holes; reading it may take years."""


def open_regular(path: Path) -> BufferedReader:
    """Opens a regular file for reading, without ever waiting. Raises OSError for a FIFO, device, socket or folder."""
    try:
        kind = os.stat(path).st_mode  # opening a device may have effects
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC) if stat.S_ISREG(kind) else None
    except ValueError:
        raise OSError(errno.EINVAL, "no file can have this name", str(path)) from None
    if handle is None:
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    found = os.fstat(handle)
    is_hollow = found.st_size > 2**30 and found.st_size > HOLES * 512 * found.st_blocks
    if is_hollow:  # a file system may count the blocks of a new file late
        is_hollow = os.lseek(handle, 0, os.SEEK_HOLE) < found.st_size
        os.lseek(handle, 0, os.SEEK_SET)
    if not stat.S_ISREG(found.st_mode) or is_hollow:
        os.close(handle)
        raise OSError(errno.EINVAL, "a file of holes" if is_hollow else "not a regular file", str(path))
    return os.fdopen(handle, "rb")


def read_regular(path: Path, limit: int = MAX_JSON) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises OSError for other files."""
    with open_regular(path) as f:
        content = f.read(limit + 1) or b""
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit / 2**20:g} MiB", str(path))
    return content


def parse_json(content: bytes) -> Any:
    """The value of an untrusted JSON text. Raises ValueError if it is invalid, or nested deeper than MAX_DEPTH."""
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for found in level
            if isinstance(found, dict | list)
            for item in (found.values() if isinstance(found, dict) else found)
        ]
        if not level:
            return value
    raise ValueError("nested too deeply")


def _umask() -> int:
    """The umask of this process, which can only be read by setting it."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file completely or not at all. A link at `path` is replaced, not followed."""
    handle, pending = mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(content)
            os.fchmod(f.fileno(), 0o666 & ~_umask())
            f.flush()
            os.fsync(f.fileno())
        os.replace(pending, path)
    except BaseException:
        os.unlink(pending)
        raise
    sync(path.parent)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal bytes. Raises ValueError for NaN and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def read_jsonl(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def _row(line: bytes | str, keys: Iterable[str]) -> dict | None:
    """The JSON object in a line; None if there is none, or if it lacks a key."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and row.keys() >= set(keys) else None


def read_finished_rows(path: Path, *keys: str) -> list[dict]:
    """The rows of a JSONL file that a killed stage was appending to; a half-written last line is removed from it.

    A power failure or a bad disk may have damaged the file. Then the rows before the first that is not an object with
    these keys count, and the damaged file is kept next to it.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    lines = whole.split(b"\n")[:-1]
    rows = []
    for line in lines:
        if (row := _row(line, keys)) is None:
            break
        rows.append(row)
    if len(rows) < len(lines):
        aside = set_aside(path)
        log.warning(
            "%s: damaged in line %d; set aside as %s, going on from the rows before", path, len(rows) + 1, aside
        )
        path.write_bytes(b"".join(line + b"\n" for line in lines[: len(rows)]))
    elif len(whole) < len(content):
        os.truncate(path, len(whole))
    return rows


def set_aside(path: Path) -> str:
    """Renames a damaged file, so that it can be inspected later; returns its new name."""
    aside = path.with_name(f"{path.name}.damaged")
    path.rename(aside)
    return aside.name


def whole_rows(lines: Iterable[str], *keys: str) -> list[Any]:
    """The objects with these keys in JSON lines that another process writes.

    Rows that are incomplete or damaged are left out.
    """
    return [row for line in lines if (row := _row(line, keys)) is not None]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    with path.open("w", encoding="utf-8") as f:
        f.writelines(canonical_json(row) + "\n" for row in rows)


def write_json(path: Path, value: Any) -> None:
    path.write_text(
        json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def follow_umask(folder: Path) -> None:
    """Gives a folder and everything in it the permissions of the umask: safetensors writes 0600.

    Folders keep their setgid bit.
    """
    umask = _umask()
    for path in [folder, *folder.rglob("*")]:
        is_dir = path.is_dir()
        path.chmod((0o777 if is_dir else 0o666) & ~umask | (path.stat().st_mode & stat.S_ISGID if is_dir else 0))


def settle(folder: Path) -> None:
    """Syncs a folder and everything in it to disk, with the permissions of the umask."""
    follow_umask(folder)
    for path in [folder, *folder.rglob("*")]:
        sync(path)


def rename_durably(pending: Path, path: Path) -> None:
    """Renames a file, or a folder with synced files, so that a power failure leaves it complete in its new place."""
    sync(pending)
    pending.rename(path)
    sync(path.parent)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by dotted key; an empty mapping is a leaf.

    >>> flatten({"a": {"b": 1, "c": {}}, "d": [2]})
    {'a.b': 1, 'a.c': {}, 'd': [2]}
    """
    if isinstance(value, dict) and value:
        return {k: v for key, item in value.items() for k, v in flatten(item, f"{prefix}{key}.").items()}
    return {prefix.removesuffix("."): value}


def changed(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Key -> [in A, in B] where two mappings differ, sorted by key; None if it is absent."""
    return {key: [a.get(key), b.get(key)] for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)}
