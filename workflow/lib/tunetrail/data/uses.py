"""Accounts for every row that was read: which table uses it, or why it was left out."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

from tunetrail.config.shares import READ_BY
from tunetrail.data.tables import weighted


class Use(TypedDict):
    """Rows of one source and kind in the table of one split."""

    source: str
    kind: str
    split: str
    also_in: str | None
    """The split that they belong to, if it is another one: sft also trains on rows of the reward split."""
    used_by: list[str]
    """The stages that read such rows if a run has them; the data stage does not know which it has."""
    rows: int
    weight: float
    """How often each is in an epoch of training."""


class LeftOut(TypedDict):
    """Rows of one source and kind that are in no table."""

    source: str
    kind: str
    reason: str
    rows: int


def _by_source(rows: Iterable[dict]) -> Counter[tuple[str, str]]:
    return Counter((row["source"], row["kind"]) for row in rows)


class Account:
    """Counts the rows that each step leaves out, so that every row read is accounted for."""

    def __init__(self) -> None:
        self.reasons: Counter[tuple[str, str, str]] = Counter()

    def leave_out(self, reason: str, before: Sequence[dict], after: Sequence[dict]) -> None:
        """Counts the rows that a step did not keep."""
        for (source, kind), count in (_by_source(before) - _by_source(after)).items():
            self.reasons[source, kind, reason] += count

    @property
    def left_out(self) -> list[LeftOut]:
        return [
            {"source": source, "kind": kind, "reason": reason, "rows": count}
            for (source, kind, reason), count in sorted(self.reasons.items())
        ]

    @property
    def totals(self) -> dict[str, int]:
        """Reason -> rows."""
        totals: Counter[str] = Counter()
        for (_, _, reason), count in self.reasons.items():
            totals[reason] += count
        return dict(sorted(totals.items()))


def uses(tables: Mapping[str, Sequence[dict]]) -> list[Use]:
    """How the rows of every table are used.

    Args:
        tables: split -> the rows of its table, with "source", "kind" and "split".
    """
    rows_used: list[Use] = []
    for split, rows in tables.items():
        counts = Counter(
            (row["source"], row["kind"], row["split"], weighted(row, split).get("weight", 1.0)) for row in rows
        )
        for (source, kind, home, weight), count in sorted(counts.items()):
            rows_used.append(
                {
                    "source": source,
                    "kind": kind,
                    "split": split,
                    "also_in": home if home != split else None,
                    "used_by": list(READ_BY[kind].get(split, ())),
                    "rows": count,
                    "weight": weight,
                }
            )
    return rows_used


def lines(used: Sequence[Use], left_out: Sequence[LeftOut]) -> list[str]:
    """The lines of a text table for the log: one for each source, kind and split, and one for each reason."""
    table = [("source", "kind", "split", "used by", "rows")]
    for use in sorted(used, key=lambda use: (use["source"], use["kind"])):
        also = f" (also in {use['also_in']})" if use["also_in"] else ""
        times = "" if use["weight"] == 1 else f" x {use['weight']:g}"
        by = ", ".join(use["used_by"]) or "nothing"
        table.append((use["source"], use["kind"], use["split"] + also, by, f"{use['rows']}{times}"))
    for out in left_out:
        table.append((out["source"], out["kind"], "left out", out["reason"].replace("_", " "), str(out["rows"])))
    widths = [max(len(row[i]) for row in table) for i in range(4)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) + f"  {row[4]:>6}"
        for row in table
    ]
