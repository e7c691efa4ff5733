"""Reports invalid rows: how many there are of each kind, the first of each, and how to fix them."""

import logging
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from tunetrail.errors import DataError

log = logging.getLogger("tunetrail")
SHOWN = 3
"""How many rows of each kind are named."""
KINDS = 5
"""How many kinds of mistakes are shown, the most frequent first."""


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
    """Describes one kind of mistake: its first row, how often it occurs, and where."""
    first = f"{rows[0].where}: {rows[0].what}"
    places = [row.where.rpartition(":") for row in rows]
    one_file = len({name for name, _, _ in places}) == 1
    shown = [number if one_file else f"{name}:{number}" for name, _, number in places]
    return first if len(rows) == 1 else f"{first} ({len(rows)} such rows: {first_few(shown)})"


class Finding(NamedTuple):
    """A line about rows that cannot be used."""

    line: str
    fix: str = ""
    """How to fix them, unless the line already says so."""


def found_invalid(name: str, invalid: Sequence[Invalid], rows: int) -> list[Finding]:
    """A finding for each kind of mistake, and a last one with the total.

    Args:
        name: where the rows come from, such as the file.
        invalid: at least one invalid row.
        rows: the number of all rows, including valid ones.
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
    """Logs which rows are left out, or raises DataError about them if `choice` is `error`."""
    if choice == "error":
        raise DataError("\n".join("; ".join(filter(None, finding)) for finding in findings))
    for finding in findings:
        log.info("data: left out: %s", finding.line)
