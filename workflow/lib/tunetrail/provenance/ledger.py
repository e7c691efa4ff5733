"""The ledger of a run: which artifacts it has had, in the order they were sealed, each line chained to the one before.

`results/<run>/ledger.jsonl`, canonical JSON a line. Only the head process writes it, when jobs have ended. Whoever can
write the run's folder can also write a ledger of their own, so its head (the sha256 of the last line) has to be kept
elsewhere to prove anything: `audit seal` prints it and can write it to a file you name or into a signed git tag.
"""

import fcntl
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from tunetrail.errors import DataError
from tunetrail.provenance.manifest import (
    MANIFEST,
    canonical,
    identity,
    is_canonical,
    sha256_bytes,
)
from tunetrail.provenance.record import read_record

LEDGER = "ledger.jsonl"
START = "0" * 64
"""What the first line is chained to."""


@dataclass
class Ledger:
    """The lines of a ledger that hold together."""

    path: Path
    entries: list[dict]
    hashes: list[str]
    """sha256 of each line."""
    fault: str | None = None
    """What is wrong with the first line that does not; the lines from there on are not in `entries`."""

    refused: list[str] = field(default_factory=list)
    """Artifacts that were not sealed: their record is missing, or of another manifest."""

    @property
    def head(self) -> str:
        return self.hashes[-1] if self.hashes else START

    @property
    def latest(self) -> dict[str, dict]:
        """The last entry of each artifact, by its path in the run."""
        return {entry["artifact"]: entry for entry in self.entries}


def read_ledger(run: Path) -> Ledger:
    """Reads as far as the chain holds. A run without a ledger has an empty one."""
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
        try:
            entry = json.loads(line)
            texts = [entry[key] for key in ("artifact", "manifest", "record", "previous")]
            whole = is_canonical(entry, line) and len(entry) == 5 and all(isinstance(text, str) for text in texts)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            whole = False
        if not whole:
            ledger.fault = f"line {number + 1} is not what was written"
        elif entry["number"] != number or entry["previous"] != ledger.head:
            ledger.fault = f"line {number + 1} does not follow the line before it"
        else:
            ledger.entries.append(entry)
            ledger.hashes.append(sha256_bytes(line))
            continue
        break
    return ledger


def artifacts(run: Path) -> list[Path]:
    """Every finished artifact below a run's folder, shards included; links to folders are followed, each once."""
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
    """Appends a line forevery artifact that is new or was made again. Raises DataError when the ledger is broken."""
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
            try:
                name.encode()
                record, manifest = read_record(folder), identity(folder)
                fits = record.manifest == manifest
            except (DataError, UnicodeEncodeError, OSError):
                fits = False
            if not fits:  # nobody should vouch for it
                ledger.refused.append(name)
                continue
            now = {
                "artifact": name,
                "manifest": manifest,
                "record": record.digest,
            }
            before = latest.get(now["artifact"])
            if before and before | now == before:
                continue
            line = canonical(now | {"number": len(ledger.entries), "previous": ledger.head})
            f.write(line + b"\n")
            ledger.entries.append(json.loads(line))
            ledger.hashes.append(sha256_bytes(line))
        f.flush()
        os.fsync(f.fileno())
    return ledger
