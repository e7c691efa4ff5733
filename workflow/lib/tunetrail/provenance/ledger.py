"""The ledger of a run: which artifacts it has had, in the order they were sealed, each line chained to the one before.

`results/<run>/ledger.jsonl`, one line of canonical JSON per artifact. Only the head process writes it, when jobs have
ended. Whoever can write the run's folder can also write a ledger of their own. To prove anything, keep its head (the
sha256 of the last line) elsewhere: `audit seal` prints it, and writes it to a file that you name.
"""

import fcntl
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from tunetrail.errors import DataError
from tunetrail.provenance.manifest import MANIFEST, canonical, identity, is_canonical, sha256_bytes
from tunetrail.provenance.record import read_record
from tunetrail.provenance.schema import LedgerEntry

LEDGER = "ledger.jsonl"
START = "0" * 64
"""The digest that the first line is chained to."""


@dataclass
class Ledger:
    """The lines of a ledger as far as its chain is intact."""

    path: Path
    entries: list[LedgerEntry]
    hashes: list[str]
    """sha256 of each line."""
    fault: str | None = None
    """What is wrong with the first broken line; the lines from there on are not in `entries`."""
    refused: list[str] = field(default_factory=list)
    """Artifacts that were not sealed because their record is missing, or belongs to another manifest."""

    @property
    def head(self) -> str:
        return self.hashes[-1] if self.hashes else START

    @property
    def latest(self) -> dict[str, LedgerEntry]:
        """The last entry of each artifact, by its path in the run."""
        return {entry["artifact"]: entry for entry in self.entries}


def read_ledger(run: Path) -> Ledger:
    """Reads a ledger as far as its chain is intact. A run without a ledger has an empty one."""
    path = run / LEDGER
    ledger = Ledger(path, [], [])
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as e:
        ledger.fault = f"it cannot be read ({e.strerror})"
        return ledger
    lines = content.split(b"\n")
    if lines.pop() != b"":
        ledger.fault = "its last line is cut off"
    for number, line in enumerate(lines):
        entry = _parse(line)
        if entry is None:
            ledger.fault = f"line {number + 1} is not what was written"
            break
        if entry["number"] != number or entry["previous"] != ledger.head:
            ledger.fault = f"line {number + 1} does not follow the line before it"
            break
        ledger.entries.append(entry)
        ledger.hashes.append(sha256_bytes(line))
    return ledger


def _parse(line: bytes) -> LedgerEntry | None:
    """The entry in a line; None if it is not one that `seal` would write."""
    try:
        entry = json.loads(line)
        texts = [entry[key] for key in ("artifact", "manifest", "record", "previous")]
        whole = "number" in entry and len(entry) == 5 and all(isinstance(text, str) for text in texts)
        return entry if whole and is_canonical(entry, line) else None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def artifacts(run: Path) -> list[Path]:
    """Every finished artifact below a run's folder, shards included. Follows links to folders, each folder once."""
    found, seen = [], set()
    for root, folders, names in os.walk(run, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        if MANIFEST in names:
            found.append(Path(root))
    return sorted(found)


def seal(run: Path) -> Ledger:
    """Appends a line for every artifact that is new or was made again. Raises DataError if the ledger is broken."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / LEDGER).open("ab") as f:
        fcntl.lockf(f, fcntl.LOCK_EX)
        ledger = read_ledger(run)
        if ledger.fault:
            raise DataError(
                f"{ledger.path}: {ledger.fault}; nothing is sealed on top of it. Restore the file from a copy, or "
                "move it away to begin a new chain"
            )
        latest = ledger.latest
        for folder in artifacts(run):
            name = folder.relative_to(run).as_posix()
            digests = _digests(folder, name)
            if digests is None:
                ledger.refused.append(name)
                continue
            manifest, record = digests
            before = latest.get(name)
            if before and (before["manifest"], before["record"]) == digests:
                continue
            entry: LedgerEntry = {
                "artifact": name,
                "manifest": manifest,
                "record": record,
                "number": len(ledger.entries),
                "previous": ledger.head,
            }
            line = canonical(entry)
            f.write(line + b"\n")
            ledger.entries.append(entry)
            ledger.hashes.append(sha256_bytes(line))
        f.flush()
        os.fsync(f.fileno())
    return ledger


def _digests(folder: Path, name: str) -> tuple[str, str] | None:
    """sha256 of an artifact's manifest and record; None if they do not match, or its name is not UTF-8."""
    try:
        name.encode()
        record, manifest = read_record(folder), identity(folder)
    except (DataError, UnicodeEncodeError, OSError):
        return None
    return (manifest, record.digest) if record.manifest == manifest else None
