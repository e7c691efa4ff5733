"""Which task a labeler gets next, and in which order its outputs are shown."""

from collections import Counter
from collections.abc import Sequence

import sqlalchemy as sa

from tunetrail.labeling.app.database import assignments, events, places
from tunetrail.labeling.app.store import Settings
from tunetrail.preferences.ranks import generator

PUBLISHED = sa.select(places.c.task)
"""The digests of the published tasks."""
GAP = 5
"""A task is repeated only after at least this many others."""


def of_labeler(labeler: str) -> sa.Select:
    """A labeler's assignments."""
    return sa.select(assignments).where(assignments.c.labeler == labeler)


def shown_order(secret: str, digest: str, labeler: str, purpose: str, k: int) -> list[int]:
    """[k]: the order in which a labeler sees a task's completions; a repeat has an order of its own."""
    occasion = "again" if purpose == "repeat" else ""
    return generator(secret, "shown", digest, labeler, occasion).permutation(k).tolist()


def _is_due(secret: str, purpose: str, labeler: str, every: int, counts: Counter[str]) -> bool:
    """Whether a gold task or repeat comes next: there is one per `every` other tasks, at a secret place among them."""
    if not every:
        return False
    n = counts[purpose]
    return counts["label"] > n * every + int(generator(secret, purpose, labeler, n).integers(every))


def choose(
    connection: sa.Connection, settings: Settings, secret: str, labeler: str, now: float
) -> tuple[str, str] | None:
    """The digest and purpose of what a labeler gets next; None if nothing is left for them.

    Args:
        secret: of the store: without it nobody can compute where gold tasks and repeats come.
    """
    done = connection.execute(
        of_labeler(labeler)
        .where(assignments.c.state.in_(("answered", "skipped")), assignments.c.task.in_(PUBLISHED))
        .order_by(assignments.c.event)
    ).all()
    counts = Counter(row.purpose for row in done)
    unseen = ~sa.exists().where(
        assignments.c.task == places.c.task, assignments.c.labeler == labeler, assignments.c.state != "undone"
    )
    gold = sa.select(places.c.task).where(places.c.gold, unseen).order_by(places.c.position).limit(1)
    if counts["training"] < settings.training and (digest := connection.execute(gold).scalar()):
        return digest, "training"
    given = sum(row.purpose == "label" and row.state == "answered" for row in done)
    if settings.per_labeler is not None and given >= settings.per_labeler:
        return None
    if _is_due(secret, "gold", labeler, settings.gold_every, counts) and (digest := connection.execute(gold).scalar()):
        return digest, "gold"
    repeat_is_due = _is_due(secret, "repeat", labeler, settings.repeat_every, counts)
    if repeat_is_due and (digest := _to_repeat(connection, secret, labeler, done)):
        return digest, "repeat"
    of_task = sa.select(sa.func.count()).where(assignments.c.task == places.c.task, assignments.c.purpose == "label")
    answered = of_task.where(assignments.c.state == "answered").scalar_subquery()
    skipped = of_task.where(assignments.c.state == "skipped").scalar_subquery()
    leased = of_task.where(assignments.c.state == "open", assignments.c.expires > now).scalar_subquery()
    free = sa.and_(~places.c.gold, unseen, answered + leased < settings.overlap, skipped < settings.skips)
    digest = connection.execute(sa.select(places.c.task).where(free).order_by(places.c.position).limit(1)).scalar()
    return (digest, "label") if digest else None


def _to_repeat(connection: sa.Connection, secret: str, labeler: str, done: Sequence[sa.Row]) -> str | None:
    """A task that a labeler ranked some time ago, drawn from those not repeated yet.

    Args:
        done: the labeler's finished assignments, in order.
    """
    repeated = {row.task for row in done if row.purpose == "repeat"}
    ranked = sa.select(events.c.number).where(events.c.labeler == labeler, events.c.kind == "ranking")
    rankings = set(connection.execute(ranked).scalars())
    earlier = [row.task for row in done[:-GAP] if row.purpose == "label" and row.event in rankings]
    candidates = [task for task in earlier if task not in repeated]
    if not candidates:
        return None
    return candidates[int(generator(secret, "repeated", labeler, len(repeated)).integers(len(candidates)))]
