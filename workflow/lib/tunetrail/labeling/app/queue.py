"""Who gets which task, and what becomes of it.

A labeler has one task open at a time, leased until `expires`; drafts renew the lease. Each assignment has a random
nonce, which the page sends back: it names the task, so a page can answer nothing that was not given to its labeler, and
since the events hold it once, nothing is stored twice.
"""

import json
import secrets
import time
from collections import Counter
from dataclasses import dataclass

import sqlalchemy as sa

from tunetrail.labeling.app.answers import TEXT, Answer, Refused, as_answer, as_skip
from tunetrail.labeling.app.database import assignments, events, places
from tunetrail.labeling.app.store import Settings, Store
from tunetrail.preferences.ranks import generator, pairwise_agreement

GAP = 5
"""A task is not shown again to its labeler before so many others."""


@dataclass(frozen=True)
class Stored:
    """What became of an answer."""

    event: int
    training: bool


@dataclass(frozen=True)
class Assignment:
    """A task before its labeler."""

    nonce: str
    digest: str
    task: dict
    purpose: str
    shown: list[int]
    opened: float
    expires: float
    draft: dict | None

    @property
    def outputs(self) -> list[str]:
        """The completions in the order shown."""
        return [self.task["completions"][i] for i in self.shown]


def _assignment(store: Store, connection: sa.Connection, row: sa.Row) -> Assignment:
    return Assignment(
        row.nonce, row.task, store.task(connection, row.task), row.purpose, json.loads(row.shown), row.opened, row.expires,
        json.loads(row.draft) if row.draft else None,
    )  # fmt: skip


def shown_order(settings: Settings, digest: str, labeler: str, purpose: str, k: int) -> list[int]:
    """The order in which a labeler sees a task's completions, [k]; another one when it comes again."""
    again = "again" if purpose == "repeat" else ""
    return generator(settings.seed, "shown", digest, labeler, again).permutation(k).tolist()


def _mine(labeler: str) -> sa.Select:
    return sa.select(assignments).where(assignments.c.labeler == labeler)


def _choose(connection: sa.Connection, settings: Settings, labeler: str, now: float) -> tuple[str, str] | None:
    """The digest and purpose of what a labeler gets next; None where nothing is left for them."""
    on = sa.select(places.c.task)
    done = connection.execute(
        _mine(labeler)
        .where(assignments.c.state.in_(("answered", "skipped")), assignments.c.task.in_(on))
        .order_by(assignments.c.event)
    ).all()
    counts = Counter(row.purpose for row in done)
    unseen = ~sa.exists().where(
        assignments.c.task == places.c.task, assignments.c.labeler == labeler, assignments.c.state != "undone"
    )
    gold = sa.select(places.c.task).where(places.c.gold, unseen).order_by(places.c.position).limit(1)
    if counts["training"] < settings.training and (found := connection.execute(gold).scalar()):
        return found, "training"
    given = sum(row.purpose == "label" and row.state == "answered" for row in done)
    if settings.per_labeler is not None and given >= settings.per_labeler:
        return None
    every = settings.gold_every
    if (
        every
        and counts["gold"] < (counts["label"] + every // 2) // every
        and (found := connection.execute(gold).scalar())
    ):
        return found, "gold"
    every = settings.repeat_every
    if every and counts["repeat"] < counts["label"] // every:
        repeated = {row.task for row in done if row.purpose == "repeat"}
        ranked = sa.select(events.c.number).where(events.c.labeler == labeler, events.c.kind == "ranking")
        rankings = set(connection.execute(ranked).scalars())
        earlier = [row for row in done[:-GAP] if row.purpose == "label" and row.event in rankings]
        if left := [row.task for row in earlier if row.task not in repeated]:
            drawn = generator(settings.seed, "repeat", labeler, counts["repeat"]).integers(len(left))
            return left[int(drawn)], "repeat"
    of_task = sa.select(sa.func.count()).where(assignments.c.task == places.c.task, assignments.c.purpose == "label")
    answered = of_task.where(assignments.c.state == "answered").scalar_subquery()
    skipped = of_task.where(assignments.c.state == "skipped").scalar_subquery()
    leased = of_task.where(assignments.c.state == "open", assignments.c.expires > now).scalar_subquery()
    free = sa.and_(~places.c.gold, unseen, answered + leased < settings.overlap, skipped < settings.skips)
    found = connection.execute(sa.select(places.c.task).where(free).order_by(places.c.position).limit(1)).scalar()
    return (found, "label") if found else None


def _open(connection: sa.Connection, labeler: str) -> sa.Row | None:
    """What a labeler has before them; after an undo that is what was taken back, and what was open waits."""
    on = sa.select(places.c.task)
    mine = _mine(labeler).where(assignments.c.state == "open", assignments.c.task.in_(on))
    return connection.execute(mine.order_by(assignments.c.expires.desc()).limit(1)).first()


def next_task(store: Store, labeler: str) -> Assignment | None:
    """The task that a labeler has open, or a new one; None where nothing is left for them."""
    with store.writing(durable=False) as connection:
        settings, now = store.settings(connection), time.time()
        expires = now + 60 * settings.lease_minutes
        row = _open(connection, labeler)
        if row and row.expires <= now and not _room(connection, settings, row, now):
            _set(connection, row.nonce, state="undone")  # others have answered it meanwhile
            row = None
        if row:
            _set(connection, row.nonce, expires=expires)
        else:
            chosen = _choose(connection, settings, labeler, now)
            if chosen is None:
                return None
            digest, purpose = chosen
            k = len(store.task(connection, digest)["completions"])
            values = {
                "nonce": secrets.token_urlsafe(16), "task": digest, "labeler": labeler, "purpose": purpose, "state": "open",
                "shown": json.dumps(shown_order(settings, digest, labeler, purpose, k)), "opened": now, "expires": expires,
            }  # fmt: skip
            values["draft"] = connection.execute(_left_draft(values)).scalar()
            connection.execute(assignments.insert().values(values))
            row = connection.execute(sa.select(assignments).where(assignments.c.nonce == values["nonce"])).one()
        return _assignment(store, connection, row)


def _left_draft(given: dict) -> sa.Select:
    """What a labeler had begun when their time for a task ran out, the newest; its outputs must stand as they did."""
    same = [assignments.c[key] == given[key] for key in ("task", "labeler", "purpose", "shown")]
    left = sa.select(assignments.c.draft).where(
        *same, assignments.c.state == "undone", assignments.c.draft.is_not(None)
    )
    return left.order_by(assignments.c.opened.desc()).limit(1)


def _room(connection: sa.Connection, settings: Settings, row: sa.Row, now: float) -> bool:
    """Whether a task wants an answer beside those that others gave or are giving."""
    if row.purpose != "label":
        return True
    live = sa.or_(
        assignments.c.state == "answered", sa.and_(assignments.c.state == "open", assignments.c.expires > now)
    )
    others = sa.select(sa.func.count()).where(
        assignments.c.task == row.task, assignments.c.purpose == "label", assignments.c.nonce != row.nonce, live
    )
    return connection.execute(others).scalar_one() < settings.overlap


def _set(connection: sa.Connection, nonce: str, **values) -> None:
    connection.execute(assignments.update().where(assignments.c.nonce == nonce).values(values))


def _given(connection: sa.Connection, labeler: str, nonce: str) -> sa.Row:
    """The assignment of this nonce. Raises Refused where this labeler was not given it."""
    possible = nonce.isascii() and nonce.isprintable()
    row = connection.execute(_mine(labeler).where(assignments.c.nonce == nonce)).first() if possible else None
    if row is None:
        raise Refused("this task was not given to you", 404)
    return row


def save_draft(store: Store, labeler: str, nonce: str, draft: dict) -> float:
    """Keeps what is not finished and renews the lease; returns when that ends."""
    text = json.dumps(draft)
    if len(text) > 12 * TEXT:  # JSON writes up to twelve characters for one
        raise Refused("the draft is too long", 413)
    with store.writing(durable=False) as connection:
        row, settings, now = _given(connection, labeler, nonce), store.settings(connection), time.time()
        if row.state != "open":
            raise Refused("this task is no longer open", 409)
        expires = row.expires
        if expires > now or _room(connection, settings, row, now):
            expires = now + 60 * settings.lease_minutes
        _set(connection, nonce, draft=text, expires=expires)
        return expires


def submit(store: Store, labeler: str, nonce: str, sent: dict) -> Stored:
    """Stores an answer; the same answer sent again changes nothing.

    Raises Refused for a task that is not this labeler's, an answer that cannot be, another answer under a used
    nonce, and a lease that ended when others had taken the task.
    """
    with store.writing() as connection:
        row = _given(connection, labeler, nonce)
        task = store.task(connection, row.task)
        answer = as_answer(sent, task["kind"], len(task["completions"]))
        return Stored(_finish(store, connection, row, task, answer, None), row.purpose == "training")


def skip(store: Store, labeler: str, nonce: str, sent: dict) -> int:
    """Passes a task on, {"reason", "comment", "seconds"}; it does not come back to this labeler."""
    reason, empty = as_skip(sent)
    with store.writing() as connection:
        row = _given(connection, labeler, nonce)
        return _finish(store, connection, row, store.task(connection, row.task), empty, reason)


def _finish(
    store: Store, connection: sa.Connection, row: sa.Row, task: dict, answer: Answer, skipped: str | None
) -> int:
    settings, now, shown = store.settings(connection), time.time(), json.loads(row.shown)

    def in_task_order(values: list | None) -> list | None:
        return [values[shown.index(i)] for i in range(len(shown))] if values else values

    said = {
        "task": task["id"], "task_digest": row.task, "task_kind": task["kind"], "purpose": row.purpose, "shown": shown,
        "ranks": in_task_order(answer.ranks), "ratings": in_task_order(answer.ratings), "flags": in_task_order(answer.flags),
        "all_bad": answer.all_bad, "comment": answer.comment, "text": answer.text, "skipped": skipped,
    }  # fmt: skip
    if row.state in ("answered", "skipped"):
        before = json.loads(
            connection.execute(sa.select(events.c.content).where(events.c.number == row.event)).scalar_one()
        )
        if before | said == before:
            return row.event
        raise Refused("you have answered this task already; undo that answer to change it", 409)
    if row.state != "open":
        raise Refused("this task is no longer yours", 409)
    if connection.execute(sa.select(places.c.task).where(places.c.task == row.task)).first() is None:
        raise Refused("this task is no longer on; others were published meanwhile", 409)
    if row.expires <= now and not _room(connection, settings, row, now):
        raise Refused("your time for this task had run out, and others have answered it meanwhile", 409)
    number = store.append(
        connection,
        "skip" if skipped else task["kind"],
        labeler=row.labeler,
        nonce=row.nonce,
        seconds=min(answer.seconds, round(now - row.opened, 1)),  # a page's clock cannot say more than ours
        opened=round(row.opened, 3),
        guidelines=settings.guidelines_digest,
        **said,
    )
    _set(connection, row.nonce, state="skipped" if skipped else "answered", event=number, draft=None)
    return number


def undo(store: Store, labeler: str, event: int | None = None) -> bool:
    """Takes a labeler's answer back (by default their last) and opens it again with what they had said, as a draft.

    Returns whether there was something to take back.
    """
    with store.writing() as connection:
        mine = _recent(labeler).where(assignments.c.purpose != "training")  # its solution has been seen
        if event is not None:
            mine = mine.where(assignments.c.event == event)
        row = connection.execute(mine.limit(1)).first()
        if row is None:
            return False
        said = json.loads(
            connection.execute(sa.select(events.c.content).where(events.c.number == row.event)).scalar_one()
        )
        store.append(connection, "undo", labeler, None, undoes=row.event, task=said["task"])
        shown = json.loads(row.shown)
        draft = {key: said[key] for key in ("all_bad", "comment", "text", "seconds")}
        draft |= {key: [said[key][i] for i in shown] if said[key] else None for key in ("ranks", "ratings", "flags")}
        _set(connection, row.nonce, state="undone")
        expires = time.time() + 60 * store.settings(connection).lease_minutes + 1  # later than what was open
        again = {
            "nonce": secrets.token_urlsafe(16),
            "state": "open",
            "expires": expires,
            "draft": json.dumps(draft),
            "event": None,
        }
        connection.execute(assignments.insert().values(row._asdict() | again))
        return True


def _recent(labeler: str) -> sa.Select:
    on = sa.select(places.c.task)
    mine = _mine(labeler).where(assignments.c.state.in_(("answered", "skipped")), assignments.c.task.in_(on))
    return mine.order_by(assignments.c.event.desc())


def answered(store: Store, labeler: str) -> int:
    """How many answers a labeler has given. Gold and repeats count, or the number would tell them from the others."""
    mine = _recent(labeler).where(assignments.c.state == "answered", assignments.c.purpose != "training")
    with store.reading() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(mine.subquery())).scalar_one()


def finished(store: Store, labeler: str) -> list[dict]:
    """A labeler's last answers to the tasks that are on, the newest first: {"event", "prompt", "state", "purpose"}.

    No more than GAP, and none to a task that is open: what comes a second time would stand here beside it.
    """
    now_open = sa.select(assignments.c.task).where(assignments.c.labeler == labeler, assignments.c.state == "open")
    last = _recent(labeler).where(assignments.c.task.not_in(now_open)).limit(GAP)
    with store.reading() as connection:
        return [
            {"event": row.event, "prompt": store.task(connection, row.task)["prompt"], "state": row.state, "purpose": row.purpose}
            for row in connection.execute(last)
        ]  # fmt: skip


def feedback(store: Store, labeler: str, event: int) -> dict | None:
    """A training task with its solution, all in the order shown: {"prompt", "outputs", "ranks", "gold", "order": by
    the solution, "agreement"}.

    None where the event is not a training answer of this labeler.
    """
    with store.reading() as connection:
        mine = _recent(labeler).where(assignments.c.event == event, assignments.c.purpose == "training")
        row = connection.execute(mine.where(assignments.c.state == "answered")).first()
        if row is None:
            return None
        given = _assignment(store, connection, row)
        said = json.loads(connection.execute(sa.select(events.c.content).where(events.c.number == event)).scalar_one())
    ranks, gold = ([values[i] for i in given.shown] for values in (said["ranks"], given.task["gold"]["ranks"]))
    return {
        "prompt": given.task["prompt"], "outputs": given.outputs, "ranks": ranks, "gold": gold,
        "order": sorted(range(len(gold)), key=lambda n: gold[n]), "agreement": pairwise_agreement([[ranks, gold]]),
    }  # fmt: skip
