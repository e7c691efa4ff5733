"""What a run would do, and the cost of existing artifacts that it would make again: a dry run with recorded
runtimes."""

import csv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunetrail.errors import DataError, DiskError
from tunetrail.launch.resources import gpus
from tunetrail.monitor.dag import Job
from tunetrail.monitor.status import group_name, grouped, shared
from tunetrail.provenance.environment import device_hours
from tunetrail.provenance.record import read_record


@dataclass(frozen=True)
class Cost:
    """The cost of making an artifact. None is unknown."""

    hours: float | None
    """GPU-hours, or core-hours if no GPU was used."""
    unit: str
    """GPU-hours or core-hours."""
    source: str
    """Where the number comes from, or why it is unknown."""
    at_least: bool = False
    """An attempt was killed, so its duration is unknown."""


@dataclass(frozen=True)
class Step:
    """A stage that would run."""

    name: str
    rule: str
    why: str
    remakes: bool
    """Whether its artifact exists, so that its work would be done again."""
    cost: Cost
    """The cost of the artifact that exists, or existed."""


def cost(job: Job) -> Cost:
    """The cost of the existing artifact, from its record, else from the benchmark of its last run.

    A job's cores are those that it would get now, since records do not have them.
    """
    try:
        attempts = read_record(job.manifest.parent).attempts
    except (DataError, DiskError):
        return _benchmarked(job)
    killed = any(attempt.get("seconds") is None for attempt in attempts)
    if all(attempt.get("seconds") is None for attempt in attempts):
        return _benchmarked(job)
    if any(attempt.get("gpus") for attempt in attempts):
        return Cost(device_hours(attempts), "GPU-hours", "its record", killed)
    seconds = sum(attempt.get("seconds") or 0 for attempt in attempts)
    return Cost(seconds / 3600 * job.threads, "core-hours", "its record", killed)


def _benchmarked(job: Job) -> Cost:
    n = gpus(job.resources)
    unit = "GPU-hours" if n else "core-hours"
    try:
        with (job.benchmark or Path("no benchmark")).open() as f:
            seconds = [float(row["s"]) for row in csv.DictReader(f, delimiter="\t")]
    except (OSError, ValueError, KeyError):
        seconds = []
    if not seconds:
        return Cost(None, unit, "neither a record nor a benchmark of it is there")
    return Cost(sum(seconds) / 3600 * (n or job.threads), unit, str(job.benchmark), at_least=True)


def plan(jobs: list[Job]) -> list[Step]:
    """The stages that would run, parents first."""
    return [Step(job.name, job.rule, job.why, job.manifest.exists(), cost(job)) for job in jobs if job.needed]


def total(steps: list[Step]) -> dict[str, Any]:
    """Hours by unit, the number of their stages, and the number of stages whose hours are unknown."""
    known = [step.cost for step in steps if step.cost.hours is not None]
    hours: dict[str, float] = {}
    for c in known:
        hours[c.unit] = hours.get(c.unit, 0.0) + (c.hours or 0.0)
    return {
        "hours": hours,
        "stages": len(steps),
        "unknown": len(steps) - len(known),
        "at_least": any(c.at_least for c in known),
    }


def _hours(hours: float | None, unit: str, at_least: bool) -> str:
    if hours is None:
        return "unknown"
    return f"{'at least ' if at_least else ''}{'under 0.01' if hours < 0.01 else f'{hours:.2f}'} {unit}"


def said(t: dict[str, Any]) -> str:
    """A total in words: the known hours, and for how many stages they are unknown."""
    if not t["hours"]:
        return "unknown"
    hours = " and ".join(_hours(n, unit, t["at_least"]) for unit, n in sorted(t["hours"].items()))
    return hours + (f", and {t['unknown']} stages of unknown cost" if t["unknown"] else "")


def as_text(steps: list[Step]) -> str:
    """What would run and why, and what is at stake. Several stages of one rule share a line."""
    if not steps:
        return "Nothing to do: all is made, and up to date."
    rows = [
        (
            group_name(group),
            "again" if group[0].remakes else "new",
            said(total(group)),
            shared([step.why for step in group]),
        )
        for group in grouped(steps, lambda step: (step.rule, step.remakes))
    ]
    widths = [max(len(row[n]) for row in rows) for n in range(3)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows
    ]
    remade = [step for step in steps if step.remakes]
    stake = (
        f"At stake, what is made and would be made again: {said(total(remade))}, in {len(remade)} stages."
        if remade
        else "Nothing that is made would be made again."
    )
    return "\n".join([*lines, "", f"{len(steps)} stages would run. {stake}"])


def as_json(steps: list[Step]) -> dict[str, Any]:
    return {
        "steps": [asdict(step) for step in steps],
        "at_stake": total([step for step in steps if step.remakes]),
        "total": total(steps),
    }
