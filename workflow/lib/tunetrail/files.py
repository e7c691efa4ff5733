"""Files as everything here reads and writes them: JSON, JSON lines, and getting them onto the disk."""

import errno
import json
import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import mkstemp
from typing import Any, BinaryIO

MAX_JSON = 2**26
"""Bytes of a JSON file from elsewhere: a manifest of 400,000 files."""
MAX_DEPTH = 64
"""Levels of nesting in such a file."""
HOLES = 1000
"""A file over 1 GB whose size is that many times the room it takes is nearly all holes; reading one may take years."""


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file to read, and never waits: a FIFO, a device, a socket and a folder raise OSError."""
    try:
        kind = os.stat(path).st_mode  # opening a device may do something
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC) if stat.S_ISREG(kind) else None
    except ValueError:
        raise OSError(errno.EINVAL, "no file can have this name", str(path)) from None
    if handle is None:
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    found = os.fstat(handle)
    is_hollow = found.st_size > 2**30 and found.st_size > HOLES * 512 * found.st_blocks
    if not stat.S_ISREG(found.st_mode) or is_hollow:
        os.close(handle)
        raise OSError(errno.EINVAL, "a file of holes" if is_hollow else "not a regular file", str(path))
    return os.fdopen(handle, "rb")


def read_regular(path: Path, limit: int = MAX_JSON) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises OSError for any other."""
    with open_regular(path) as f:
        content = f.read(limit + 1) or b""
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit / 2**20:g} MiB", str(path))
    return content


def parse_json(content: bytes) -> Any:
    """The value of a JSON text from elsewhere. Raises ValueError where it is none, or nested beyond MAX_DEPTH."""
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


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, through no link: what stood at `path` is replaced."""
    handle, pending = mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(content)
            umask = os.umask(0)
            os.umask(umask)
            os.fchmod(f.fileno(), 0o666 & ~umask)
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


def read_finished_rows(path: Path) -> list[dict]:
    """The rows of a JSONL file that a killed stage was appending to; a half-written last line is cut off."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def whole_rows(lines: Iterable[str]) -> list[Any]:
    """The rows of JSON lines that another process writes; one that is being written, or was cut short, is left out."""
    rows = []
    for line in lines:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


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


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by dotted key; an empty mapping is a leaf.

    >>> flatten({"a": {"b": 1, "c": {}}, "d": [2]})
    {'a.b': 1, 'a.c': {}, 'd': [2]}
    """
    if isinstance(value, dict) and value:
        return {k: v for key, item in value.items() for k, v in flatten(item, f"{prefix}{key}.").items()}
    return {prefix.removesuffix("."): value}


def changed(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Key -> [in A, in B] where two mappings differ, sorted by key; None where it is absent."""
    return {key: [a.get(key), b.get(key)] for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)}
