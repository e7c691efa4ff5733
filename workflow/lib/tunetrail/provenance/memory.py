"""What artifacts took of memory when they were made, next to what was planned, from their records."""

from collections.abc import Mapping

from tunetrail.provenance.record import Record


def peak(record: Record) -> int | None:
    """The most bytes that an attempt used; None where no attempt could write it down."""
    return max((attempt["peak_bytes"] for attempt in record.attempts if attempt.get("peak_bytes")), default=None)


def planned(record: Record) -> int | None:
    """Bytes that the stage expected to need for the rows that it had; None where it did not plan."""
    return max((attempt["planned"]["bytes"] for attempt in record.attempts if attempt.get("planned")), default=None)


def taken(record: Record) -> str:
    """In words, with the plan's error; empty where either is not known."""
    most, expected = peak(record), planned(record)
    return f"{most / 1e9:.1f} GB (plan {expected / most - 1:+.0%})" if most and expected else ""


def as_lines(records: Mapping[str, Record]) -> list[str]:
    """What to print: one line of all artifacts whose need was planned."""
    found = [f"{name} {words}" for name, record in records.items() if (words := taken(record))]
    return [f"Memory at most: {', '.join(found)}"] if found else []
