"""The peak memory of artifacts when they were made, next to the plan, from their records."""

from collections.abc import Mapping

from tunetrail.provenance.record import Record


def peak(record: Record) -> int | None:
    """The most bytes that any attempt used; None if no attempt recorded it."""
    return max((attempt["peak_bytes"] for attempt in record.attempts if attempt.get("peak_bytes")), default=None)


def planned(record: Record) -> int | None:
    """The bytes that the stage expected to need for its rows; None if it did not plan."""
    return max((attempt["planned"]["bytes"] for attempt in record.attempts if attempt.get("planned")), default=None)


def taken(record: Record) -> str:
    """The peak in words, with the plan's error; empty if either is unknown."""
    most, expected = peak(record), planned(record)
    return f"{most / 1e9:.1f} GB (plan {expected / most - 1:+.0%})" if most and expected else ""


def as_lines(records: Mapping[str, Record]) -> list[str]:
    """The line to print about all artifacts with a plan, if any."""
    found = [f"{name} {words}" for name, record in records.items() if (words := taken(record))]
    return [f"Memory at most: {', '.join(found)}"] if found else []
