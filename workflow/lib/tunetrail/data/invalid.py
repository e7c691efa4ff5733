"""Invalid rows: counted by kind, the first of each kind shown, and what would help."""

import logging
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from tunetrail.errors import DataError

log = logging.getLogger("tunetrail")
SHOWN = 3
"""Rows of a kind that are named."""
KINDS = 5
"""Kinds of mistakes that are shown, the most frequent first."""


class Invalid(NamedTuple):
    """A row that cannot be used."""

    where: str
    """File and line."""
    what: str
    """What is wrong, and how to fix it."""


def first_few(words: Sequence[str]) -> str:
    """
    >>> first_few(["d.jsonl:3", "d.jsonl:8", "d.jsonl:9", "d.jsonl:12"])
    'd.jsonl:3, d.jsonl:8, d.jsonl:9, …'
    """
    return ", ".join([*words[:SHOWN], *(["…"] if len(words) > SHOWN else [])])


def _line(rows: Sequence[Invalid]) -> str:
    """One kind of mistake: its first row, how often it was made, and where."""
    first = f"{rows[0].where}: {rows[0].what}"
    places = [row.where.rpartition(":") for row in rows]
    one_file = len({name for name, _, _ in places}) == 1
    shown = [number if one_file else f"{name}:{number}" for name, _, number in places]
    return first if len(rows) == 1 else f"{first} ({len(rows)} such rows: {first_few(shown)})"


class Finding(NamedTuple):
    """A line about rows that cannot be used."""

    line: str
    fix: str = ""
    """What would help, where it is not said yet."""


def found_invalid(name: str, invalid: Sequence[Invalid], rows: int) -> list[Finding]:
    """A finding for each kind of mistake, and a last one with how many there are.

    Args:
        name: what the rows are of, such as the file.
        invalid: at least one.
        rows: how many there are, valid ones too.
    """
    kinds: dict[str, list[Invalid]] = {}
    for row in invalid:
        kinds.setdefault(re.sub(r"\d+", "0", row.what), []).append(row)
    by_size = sorted(kinds.values(), key=len, reverse=True)
    findings = [Finding(_line(kind)) for kind in by_size[:KINDS]]
    if others := sum(map(len, by_size[KINDS:])):
        findings.append(Finding(f"{name}: {others} more, of {len(by_size) - KINDS} other kinds"))
    if len(invalid) < rows:
        are = "is" if len(invalid) == 1 else "are"
        fix = "fix them, or leave them out with data.invalid: drop"
        findings.append(Finding(f"{name}: {len(invalid)} of {rows} rows {are} invalid", fix))
    elif rows > 1:
        findings.append(Finding(f"{name}: none of its {rows} rows is valid"))
    return findings


def leave_out(findings: Sequence[Finding], choice: Literal["error", "drop"]) -> None:
    """Says which rows are left out, or raises DataError."""
    if choice == "error":
        raise DataError("\n".join("; ".join(filter(None, finding)) for finding in findings))
    for finding in findings:
        log.info("data: left out: %s", finding.line)
