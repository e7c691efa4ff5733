"""The ledger of a run: which artifacts it has had, in the order they were sealed, each line chained to the one before.

`results/<run>/ledger.jsonl`, one line of canonical JSON per artifact. Only the head process writes it, when jobs have
ended. Whoever can write the run's folder can also write a ledger of their own. To prove anything, keep its head (the
sha256 of the last line) elsewhere: `audit seal` prints it, and writes it to a file that you name.
"""

import fcntl
import os
import stat
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tunetrail.errors import DataError, DiskError, TunetrailError
from tunetrail.files import parse_json, read_regular
from tunetrail.provenance.manifest import NOT_A_FILE, cannot_read, canonical, identity, is_canonical, sha256_bytes
from tunetrail.provenance.record import read_record
from tunetrail.provenance.run_folder import LEDGER, artifacts
from tunetrail.provenance.schema import LedgerEntry

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
    """What is wrong with the first line that does not hold; the lines from there on are not in `entries`."""
    is_readable: bool = True
    torn: int = 0
    """Bytes of a last line that was not written to its end."""
    refused: dict[str, str] = field(default_factory=dict)
    """Artifacts that were not sealed, and why."""

    @property
    def head(self) -> str:
        return self.hashes[-1] if self.hashes else START

    @property
    def latest(self) -> dict[str, LedgerEntry]:
        """The last entry of each artifact, by its path in the run."""
        return {entry["artifact"]: entry for entry in self.entries}

    @cached_property
    def by_artifact(self) -> dict[str, list[LedgerEntry]]:
        """The entries of each artifact, oldest first; of a ledger that is not being written."""
        found: dict[str, list[LedgerEntry]] = {}
        for entry in self.entries:
            found.setdefault(entry["artifact"], []).append(entry)
        return found

    def anchored(self, heads: Collection[str]) -> int | None:
        """The number of the last line with one of these hashes; None where no line has one."""
        return next((n for n in reversed(range(len(self.hashes))) if self.hashes[n] in heads), None)


def read_ledger(run: Path) -> Ledger:
    """Reads a ledger as far as its chain is intact. A run without a ledger has an empty one."""
    path = run / LEDGER
    try:
        content = read_regular(path) if os.path.lexists(path) else b""
    except OSError as e:
        return Ledger(path, [], [], f"it cannot be read ({e.strerror})", is_readable=e.errno in NOT_A_FILE)
    return _parse_ledger(path, content)


def _parse_ledger(path: Path, content: bytes) -> Ledger:
    ledger = Ledger(path, [], [])
    if path.is_symlink():
        ledger.fault = "it is a link"
        return ledger
    *lines, torn = content.split(b"\n")
    if torn:
        ledger.fault, ledger.torn = "its last line is cut off", len(torn)
    for number, line in enumerate(lines):
        entry = _parse(line)
        if entry is None:
            ledger.fault, ledger.torn = f"line {number + 1} is not what was written", 0
            break
        if entry["number"] != number or entry["previous"] != ledger.head:
            ledger.fault, ledger.torn = f"line {number + 1} does not follow the line before it", 0
            break
        ledger.entries.append(entry)
        ledger.hashes.append(sha256_bytes(line))
    return ledger


def _parse(line: bytes) -> LedgerEntry | None:
    """The entry in a line; None if it is not one that `seal` would write."""
    try:
        entry = parse_json(line)
        texts = [entry[key] for key in ("artifact", "manifest", "record", "previous")]
        whole = "number" in entry and len(entry) == 5 and all(isinstance(text, str) for text in texts)
        return entry if whole and is_canonical(entry, line) else None
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def seal(run: Path) -> Ledger:
    """Appends a line for every artifact that is new or was made again.

    A line that a crash cut off is removed first, and counted in `torn`. Raises DataError where the ledger is broken or
    not the only one here, DiskError where it cannot be written.
    """
    path = run / LEDGER
    try:
        run.mkdir(parents=True, exist_ok=True)
        _refuse_nested(run)
        # Through no link, and not waiting for whoever reads a FIFO.
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0) as f:
            if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):
                raise DataError(f"{path}: not a regular file; remove it and seal again")
            fcntl.lockf(f, fcntl.LOCK_EX)
            content = f.read()  # by this handle: closing another one of the same file would release the lock
            ledger = _parse_ledger(path, content)
            if ledger.torn:
                os.ftruncate(f.fileno(), len(content) - ledger.torn)
            elif ledger.fault:
                raise DataError(
                    f"{path}: {ledger.fault}; nothing is sealed on top of it. Restore the file from a copy, or move it "
                    "away to begin a new chain"
                )
            added = _new_lines(run, ledger)
            if added and os.write(f.fileno(), added) != len(added):
                raise DiskError(f"{path}: cannot be written to its end; make room and seal again")
            os.fsync(f.fileno())
    except OSError as e:
        raise _cannot_seal(path, e) from None
    return ledger


def _cannot_seal(path: Path, error: OSError) -> TunetrailError:
    if path.is_symlink():
        return DataError(f"{path}: is a link; put the file itself there")
    found = cannot_read(path, error)
    return type(found)(f"{error.filename or path}: cannot be sealed ({error.strerror})")


def _refuse_nested(run: Path) -> None:
    """Raises DataError where a run lies in another, or another in it: which ledger would vouch for an artifact?"""
    within = next((above for above in Path(os.path.abspath(run)).parents if os.path.lexists(above / LEDGER)), None)
    if within:
        raise DataError(f"{run}: is part of the run {within}, which has a {LEDGER}; seal that, or remove its ledger")
    for folder in {above for artifact in artifacts(run) for above in artifact.parents if above.is_relative_to(run)}:
        if folder != run and os.path.lexists(folder / LEDGER):
            raise DataError(f"{folder / LEDGER}: a second ledger within the run {run}; remove it, or seal {folder}")


def _new_lines(run: Path, ledger: Ledger) -> bytes:
    """The lines to append, which the ledger then has."""
    latest, added = ledger.latest, []
    for folder in artifacts(run):
        name = folder.relative_to(run).as_posix()
        try:
            manifest, record = _digests(folder, name)
        except (TunetrailError, OSError) as e:
            ledger.refused[name] = str(e)
            continue
        before = latest.get(name)
        if before and (before["manifest"], before["record"]) == (manifest, record):
            continue
        entry: LedgerEntry = {
            "artifact": name,
            "manifest": manifest,
            "record": record,
            "number": len(ledger.entries),
            "previous": ledger.head,
        }
        line = canonical(entry)
        added.append(line + b"\n")
        ledger.entries.append(entry)
        ledger.hashes.append(sha256_bytes(line))
    return b"".join(added)


def _digests(folder: Path, name: str) -> tuple[str, str]:
    """sha256 of an artifact's manifest and record. Raises DataError where they do not agree, or belong elsewhere."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError("its name is not UTF-8") from None
    record, manifest = read_record(folder), identity(folder)
    if record.manifest != manifest:
        raise DataError("its record is of another manifest")
    if record.place and record.place.artifact != name:
        raise DataError(f"it was made as {record.place.artifact}")
    return manifest, record.digest
