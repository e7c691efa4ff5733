"""Who gets which task, and what becomes of it.

A labeler has one task open at a time, leased until `expires`; drafts renew the lease. Each assignment has a random
nonce, which the page sends back. The nonce identifies the task, so a page cannot answer a task that its labeler was not
given; and since it is unique among events, nothing is stored twice.
"""

import json
import secrets
from dataclasses import dataclass
from typing import Any, TypedDict

import sqlalchemy as sa

from tunetrail.labeling.app.answers import TEXT, Answer, Refused, as_answer, as_skip
from tunetrail.labeling.app.choosing import GAP, PUBLISHED, choose, of_labeler, shown_order
from tunetrail.labeling.app.database import assignments, events, places
from tunetrail.labeling.app.store import Settings, Store
from tunetrail.labeling.tasks import Task
from tunetrail.preferences.ranks import pairwise_agreement


@dataclass(frozen=True)
class Stored:
    """What became of an answer."""

    event: int
    """The number of the event that stores it."""
    training: bool


@dataclass(frozen=True)
class Assignment:
    """A task as one labeler was given it."""

    nonce: str
    digest: str
    """The digest of the task."""
    task: Task
    purpose: str
    """label, gold, training or repeat."""
    shown: list[int]
    """[K], the order in which the completions are shown."""
    opened: float
    expires: float
    draft: dict | None

    @property
    def outputs(self) -> list[str]:
        """The completions in the order shown."""
        return [self.task["completions"][i] for i in self.shown]


class Finished(TypedDict):
    """One of a labeler's last answers, for the home page."""

    event: int
    prompt: str
    state: str
    """answered or skipped."""
    purpose: str


class Feedback(TypedDict):
    """A training task with its solution, all in the order shown."""

    prompt: str
    outputs: list[str]
    ranks: list[int]
    """[K], as the labeler gave them."""
    gold: list[int]
    """[K]"""
    order: list[int]
    """[K], the outputs from best to worst by the solution."""
    agreement: float | None


def _assignment(store: Store, connection: sa.Connection, row: sa.Row) -> Assignment:
    return Assignment(
        nonce=row.nonce,
        digest=row.task,
        task=store.task(connection, row.task),
        purpose=row.purpose,
        shown=json.loads(row.shown),
        opened=row.opened,
        expires=row.expires,
        draft=json.loads(row.draft) if row.draft else None,
    )


def _open(connection: sa.Connection, labeler: str) -> sa.Row | None:
    """A labeler's open assignment; after an undo, the one that was taken back, while the other one waits."""
    open_ = of_labeler(labeler).where(assignments.c.state == "open", assignments.c.task.in_(PUBLISHED))
    return connection.execute(open_.order_by(assignments.c.expires.desc()).limit(1)).first()


def next_task(store: Store, labeler: str) -> Assignment | None:
    """The task that a labeler has open, or a new one; None if nothing is left for them."""
    with store.writing(durable=False) as connection:
        settings, now = store.settings(connection), store.clock.now()
        expires = now + 60 * settings.lease_minutes
        row = _open(connection, labeler)
        if row and row.expires <= now and not _room(connection, settings, row, now):
            _set(connection, row.nonce, state="undone")  # others have answered it in the meantime
            row = None
        if row:
            _set(connection, row.nonce, expires=expires)
        else:
            chosen = choose(connection, settings, store.secret(connection), labeler, now)
            if chosen is None:
                return None
            row = _assign(store, connection, settings, labeler, *chosen, now)
        return _assignment(store, connection, row)


def _assign(
    store: Store, connection: sa.Connection, settings: Settings, labeler: str, digest: str, purpose: str, now: float
) -> sa.Row:
    """Opens a task for a labeler, with the newest draft that they left when an earlier lease ran out, if any."""
    k = len(store.task(connection, digest)["completions"])
    shown = json.dumps(shown_order(store.secret(connection), digest, labeler, purpose, k))
    same = {"task": digest, "labeler": labeler, "purpose": purpose, "shown": shown}  # a draft fits this order only
    draft = (
        sa.select(assignments.c.draft)
        .where(*(assignments.c[key] == value for key, value in same.items()))
        .where(assignments.c.state == "undone", assignments.c.draft.is_not(None))
        .order_by(assignments.c.opened.desc())
        .limit(1)
    )
    values = same | {
        "nonce": secrets.token_urlsafe(16),
        "state": "open",
        "opened": now,
        "expires": now + 60 * settings.lease_minutes,
        "draft": connection.execute(draft).scalar(),
    }
    connection.execute(assignments.insert().values(values))
    return connection.execute(sa.select(assignments).where(assignments.c.nonce == values["nonce"])).one()


def _room(connection: sa.Connection, settings: Settings, row: sa.Row, now: float) -> bool:
    """Whether a task needs an answer in addition to those that others gave or are giving."""
    if row.purpose != "label":
        return True
    taken = sa.or_(
        assignments.c.state == "answered", sa.and_(assignments.c.state == "open", assignments.c.expires > now)
    )
    others = sa.select(sa.func.count()).where(
        assignments.c.task == row.task, assignments.c.purpose == "label", assignments.c.nonce != row.nonce, taken
    )
    return connection.execute(others).scalar_one() < settings.overlap


def _set(connection: sa.Connection, nonce: str, **values) -> None:
    connection.execute(assignments.update().where(assignments.c.nonce == nonce).values(values))


def _given(connection: sa.Connection, labeler: str, nonce: str) -> sa.Row:
    """The assignment with this nonce. Raises Refused if this labeler was not given it."""
    possible = nonce.isascii() and nonce.isprintable()
    row = connection.execute(of_labeler(labeler).where(assignments.c.nonce == nonce)).first() if possible else None
    if row is None:
        raise Refused("this task was not given to you", 404)
    return row


def save_draft(store: Store, labeler: str, nonce: str, draft: dict) -> float:
    """Saves an unfinished answer and renews the lease; returns when the lease ends."""
    text = json.dumps(draft)
    if len(text) > 12 * TEXT:  # JSON may need twelve characters for one
        raise Refused("the draft is too long", 413)
    with store.writing(durable=False) as connection:
        row, settings, now = _given(connection, labeler, nonce), store.settings(connection), store.clock.now()
        if row.state != "open":
            raise Refused("this task is no longer open", 409)
        expires = row.expires
        if expires > now or _room(connection, settings, row, now):
            expires = now + 60 * settings.lease_minutes
        _set(connection, nonce, draft=text, expires=expires)
        return expires


def submit(store: Store, labeler: str, nonce: str, sent: dict) -> Stored:
    """Stores an answer; the same answer sent again changes nothing.

    Raises Refused for a task that was given to somebody else, an invalid answer, a different answer under a used nonce,
    and a task that others have answered since the lease ran out.
    """
    with store.writing() as connection:
        row = _given(connection, labeler, nonce)
        task = store.task(connection, row.task)
        answer = as_answer(sent, task["kind"], len(task["completions"]))
        return Stored(_finish(store, connection, row, task, answer, None), row.purpose == "training")


def skip(store: Store, labeler: str, nonce: str, sent: dict) -> int:
    """Passes a task on and returns the event's number. The task does not come back to this labeler.

    Args:
        sent: {"reason", "comment", "seconds"}.
    """
    reason, empty = as_skip(sent)
    with store.writing() as connection:
        row = _given(connection, labeler, nonce)
        return _finish(store, connection, row, store.task(connection, row.task), empty, reason)


def _event_content(connection: sa.Connection, number: int) -> dict[str, Any]:
    return json.loads(connection.execute(sa.select(events.c.content).where(events.c.number == number)).scalar_one())


def _finish(
    store: Store, connection: sa.Connection, row: sa.Row, task: Task, answer: Answer, skipped: str | None
) -> int:
    """Stores the event that finishes an assignment; its number."""
    settings, now, shown = store.settings(connection), store.clock.now(), json.loads(row.shown)

    def in_task_order(values: list | None) -> list | None:
        return [values[shown.index(i)] for i in range(len(shown))] if values else values

    content = {
        "task": task["id"],
        "task_digest": row.task,
        "task_kind": task["kind"],
        "purpose": row.purpose,
        "shown": shown,
        "ranks": in_task_order(answer.ranks),
        "ratings": in_task_order(answer.ratings),
        "flags": in_task_order(answer.flags),
        "all_bad": answer.all_bad,
        "comment": answer.comment,
        "text": answer.text,
        "skipped": skipped,
    }
    if row.state in ("answered", "skipped"):
        stored = _event_content(connection, row.event)
        if stored | content == stored:
            return row.event
        raise Refused("you have answered this task already; undo that answer to change it", 409)
    if row.state != "open":
        raise Refused("this task is no longer yours", 409)
    if connection.execute(sa.select(places.c.task).where(places.c.task == row.task)).first() is None:
        raise Refused("this task has been withdrawn; other tasks were published in the meantime", 409)
    if row.expires <= now and not _room(connection, settings, row, now):
        raise Refused("your time for this task has run out, and others have answered it in the meantime", 409)
    number = store.append(
        connection,
        "skip" if skipped else task["kind"],
        labeler=row.labeler,
        nonce=row.nonce,
        seconds=max(0.0, min(answer.seconds, round(now - row.opened, 1))),  # never more than our own clock says
        opened=round(row.opened, 3),
        guidelines=settings.guidelines_digest,
        **content,
    )
    _set(connection, row.nonce, state="skipped" if skipped else "answered", event=number, draft=None)
    return number


def undo(store: Store, labeler: str, event: int | None = None) -> bool:
    """Takes a labeler's answer back (by default the last one) and opens its task again, with the answer as a draft.

    Returns whether there was an answer to take back.
    """
    with store.writing() as connection:
        undoable = _recent(labeler).where(assignments.c.purpose != "training")  # they have seen its solution
        if event is not None:
            undoable = undoable.where(assignments.c.event == event)
        row = connection.execute(undoable.limit(1)).first()
        if row is None:
            return False
        content, shown = _event_content(connection, row.event), json.loads(row.shown)
        store.append(connection, "undo", labeler, None, undoes=row.event, task=content["task"])
        draft = {key: content[key] for key in ("all_bad", "comment", "text", "seconds")}
        for key in ("ranks", "ratings", "flags"):
            draft[key] = [content[key][i] for i in shown] if content[key] else None
        _set(connection, row.nonce, state="undone")
        # Later than any open assignment.
        expires = store.clock.now() + 60 * store.settings(connection).lease_minutes + 1
        reopened = {
            "nonce": secrets.token_urlsafe(16),
            "state": "open",
            "expires": expires,
            "draft": json.dumps(draft),
            "event": None,
        }
        connection.execute(assignments.insert().values(row._asdict() | reopened))
        return True


def _recent(labeler: str) -> sa.Select:
    """A labeler's answers and skips, the newest first."""
    done = of_labeler(labeler).where(
        assignments.c.state.in_(("answered", "skipped")), assignments.c.task.in_(PUBLISHED)
    )
    return done.order_by(assignments.c.event.desc())


def answered(store: Store, labeler: str) -> int:
    """How many answers a labeler has given. Gold and repeats count, or the number would give them away."""
    answers = _recent(labeler).where(assignments.c.state == "answered", assignments.c.purpose != "training")
    with store.reading() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(answers.subquery())).scalar_one()


def finished(store: Store, labeler: str) -> list[Finished]:
    """A labeler's last answers to published tasks, the newest first.

    At most GAP of them, and none to a task that is open: otherwise a repeat would be listed while it is answered.
    """
    open_tasks = sa.select(assignments.c.task).where(assignments.c.labeler == labeler, assignments.c.state == "open")
    last = _recent(labeler).where(assignments.c.task.not_in(open_tasks)).limit(GAP)
    with store.reading() as connection:
        return [
            {
                "event": row.event,
                "prompt": store.task(connection, row.task)["prompt"],
                "state": row.state,
                "purpose": row.purpose,
            }
            for row in connection.execute(last)
        ]


def feedback(store: Store, labeler: str, event: int) -> Feedback | None:
    """A training task with its solution; None if the event is not a training answer of this labeler."""
    with store.reading() as connection:
        answer = _recent(labeler).where(assignments.c.event == event, assignments.c.purpose == "training")
        row = connection.execute(answer.where(assignments.c.state == "answered")).first()
        if row is None:
            return None
        given, content = _assignment(store, connection, row), _event_content(connection, event)
    assert given.task["gold"]
    ranks, gold = ([values[i] for i in given.shown] for values in (content["ranks"], given.task["gold"]["ranks"]))
    return {
        "prompt": given.task["prompt"],
        "outputs": given.outputs,
        "ranks": ranks,
        "gold": gold,
        "order": sorted(range(len(gold)), key=lambda n: gold[n]),
        "agreement": pairwise_agreement([[ranks, gold]]),
    }
