"""Results of other versions of tunetrail: which version made them, and what their stages write differently since.

CHANGELOG.md has these changes by stage, in the section "Changed results" of each version:

    ### Changed results
    - `sft`, `dpo`: `model/` has the merged weights.

Another version by itself makes nothing stale; users who want the new results rerun the stages.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

import tunetrail
from tunetrail.errors import DataError, DiskError
from tunetrail.provenance.record import Record, read_record

CHANGELOG = Path(tunetrail.__file__).parents[3] / "CHANGELOG.md"
"""Missing if the library was installed without the project."""
UNRELEASED = "Unreleased"


@dataclass(frozen=True)
class OtherVersion:
    """An artifact that another version made."""

    artifact: str
    stage: str
    made_by: str
    changed_since: tuple[str, ...]
    """The changelog's items about its stage, from the version after `made_by` to this one, newest first."""


@dataclass(frozen=True)
class Change:
    """An item of the changelog."""

    version: str
    stages: frozenset[str]
    text: str


def read_changes(text: str) -> list[Change]:
    """The items of every "Changed results" in a changelog, in order."""
    changes = []
    for version, content in re.findall(r"^## \[?([^\s\]]+).*?\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL):
        for section in re.findall(r"^### Changed results\n(.*?)(?=^### |\Z)", content, re.MULTILINE | re.DOTALL):
            for names, said in re.findall(r"^- (`[^:\n]*`):\s+(.*?)(?=^- |^\n|\Z)", section, re.MULTILINE | re.DOTALL):
                changes.append(Change(version, frozenset(re.findall(r"`([^`]+)`", names)), " ".join(said.split())))
    return changes


def _is_between(change: Change, before: Version, now: Version) -> bool:
    """Whether a change came after one version and is in the other. Unreleased changes are in this version."""
    version = now if change.version == UNRELEASED else Version(change.version)
    return before < version <= now


def other_versions(records: Mapping[str, Record | None], changelog: Path | None = None) -> list[OtherVersion]:
    """The artifacts, by name, that another version made."""
    others = {name: r for name, r in records.items() if r is not None and r.version != tunetrail.__version__}
    path = changelog or CHANGELOG
    changes = read_changes(path.read_text(encoding="utf-8")) if others and path.exists() else []
    result = []
    for name, record in others.items():
        try:
            before, now = Version(record.version), Version(tunetrail.__version__)
        except InvalidVersion:  # a record's version may be any text
            result.append(OtherVersion(name, record.stage, record.version, ()))
            continue
        since = [c.text for c in changes if record.stage in c.stages and _is_between(c, before, now)]
        result.append(OtherVersion(name, record.stage, record.version, tuple(since)))
    return result


def records_of(folders: Mapping[str, Path]) -> dict[str, Record]:
    """The records that can be read, by the name of the artifact."""
    records = {}
    for name, folder in folders.items():
        try:
            records[name] = read_record(folder)
        except (DataError, DiskError):
            continue
    return records


def as_lines(found: list[OtherVersion]) -> list[str]:
    """The lines to print: one for each stage and version, those with changes first."""
    if not found:
        return []
    stages: dict[tuple[str, str], OtherVersion] = {}
    for other in found:
        stages.setdefault((other.stage, other.made_by), other)
    lines = [f"This is tunetrail {tunetrail.__version__}. What other versions made stays as it is; to make it again:"]
    lines += ["    snakemake … --forcerun STAGE"]
    same: dict[str, list[str]] = {}
    for (stage, version), other in stages.items():
        if other.changed_since:
            lines.append(f"  {stage}, made by {version}; changed since: {' '.join(other.changed_since)}")
        else:
            same.setdefault(version, []).append(stage)
    return [*lines, *(f"  {', '.join(names)}, made by {v}; {_nothing_known(v)}" for v, names in same.items())]


def _nothing_known(version: str) -> str:
    try:
        is_newer = Version(version) > Version(tunetrail.__version__)
    except InvalidVersion:
        return "that version is not known here"
    if is_newer:
        return "newer than this one, which does not know what has changed"
    if not CHANGELOG.exists():
        return f"what has changed since is in {CHANGELOG.name} of the project, which is not here"
    return "the changelog names no change of what they write"


def as_json(found: list[OtherVersion]) -> list[dict[str, Any]]:
    return [asdict(other) for other in found]
