"""The audit trail: what was asked, and every event since, each chained to the one before by its sha256.

Replaying the events gives the current answers to the tasks that the last publish event names. The table `places` lists
these tasks for the queue; `Store.fault` compares it with the event.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any, TypedDict, cast

import sqlalchemy as sa

from tunetrail import __version__
from tunetrail.errors import ConfigError, DataError
from tunetrail.labeling.app.database import Database, events, labelers, notes, places, tasks
from tunetrail.labeling.app.events import Event
from tunetrail.labeling.labels import Label
from tunetrail.labeling.tasks import Task, checked_task
from tunetrail.provenance.manifest import canonical, sha256_bytes

START = "0" * 64
"""What the first event is chained to."""
NO_TASKS = sha256_bytes(canonical([]))
RUN = "run"
"""The note in a store that says which run's tasks it holds."""


@dataclass(frozen=True)
class Settings:
    """How tasks are handed out."""

    overlap: int = 1
    """Labelers per task."""
    per_labeler: int | None = None
    """The most answers from one labeler; None: no limit."""
    lease_minutes: float = 30
    """How long an untouched task stays with its labeler."""
    skips: int = 2
    """A task that this many labelers skipped is given to nobody else."""
    training: int = 0
    """How many gold tasks come first, with feedback."""
    gold_every: int = 10
    """How many other tasks come before each gold task; 0: no gold tasks."""
    repeat_every: int = 20
    """How many other tasks come before each task that is repeated; 0: no repeats."""
    ratings: bool = True
    """Offer a rating from 1 to 7 as well; it stays optional."""
    guidelines: str = ""
    """Markdown."""
    seed: int = 0
    """The seed of the order in which completions are shown."""

    def __post_init__(self) -> None:
        for name, low in {
            "overlap": 1,
            "skips": 1,
            "training": 0,
            "gold_every": 0,
            "repeat_every": 0,
            "per_labeler": 1,
        }.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"labeling setting {name}: {value} is too small; at least {low}")
        if self.lease_minutes <= 0:
            raise ConfigError(f"labeling setting lease_minutes: {self.lease_minutes} must be above 0")

    @classmethod
    def names(cls) -> list[str]:
        return [f.name for f in fields(cls)]

    @classmethod
    def of(cls, settings: dict) -> "Settings":
        if unknown := set(settings) - set(cls.names()):
            raise ConfigError(f"labeling setting {min(unknown)!r}: unknown; there are {', '.join(cls.names())}")
        return cls(**settings)

    @property
    def guidelines_digest(self) -> str:
        return sha256_bytes(self.guidelines.encode())


class Progress(TypedDict):
    """How far labeling is, over the tasks without gold."""

    tasks: int
    overlap: int
    wanted: int
    """Answers: `overlap` per task."""
    have: int
    """Answers so far, at most `overlap` per task."""
    complete: int
    """Tasks with all their answers."""
    retired: int
    """Incomplete tasks that too many labelers skipped, or that some skipped and every other labeler has seen."""
    stuck: int
    """Incomplete tasks that nobody who may enter can answer."""
    skips: int
    labelers: dict[str, int]
    """Pseudonym -> answers."""
    settled: bool
    """No answer is wanted any more."""


_COPIED = (
    "task",
    "labeler",
    "ranks",
    "ratings",
    "flags",
    "all_bad",
    "comment",
    "text",
    "shown",
    "seconds",
    "skipped",
    "at",
)
"""What a label takes over from its event."""


def _label(event: Event) -> Label:
    """The label that an answer or a skip gives."""
    purpose = event["purpose"]
    label = {key: event[key] for key in _COPIED} | {  # type: ignore[literal-required]
        "kind": event["task_kind"],
        "event": event["number"],
        "repeat": purpose == "repeat",
        "training": purpose == "training",
        "gold": purpose in ("gold", "training"),
    }
    return cast(Label, label)


class Store:
    """Tasks, events and what follows from them. Threads and processes may share a store."""

    def __init__(self, store: str, create: bool = True):
        self.database = Database(store, create)
        self.reading, self.writing = self.database.reading, self.database.writing

    # The chain

    def append(self, connection: sa.Connection, kind: str, labeler: str | None, nonce: str | None, **content) -> int:
        """Adds an event within a writing transaction and returns its number."""
        last = connection.execute(
            sa.select(events.c.number, events.c.digest).order_by(events.c.number.desc()).limit(1)
        ).first()
        number, previous = (last.number + 1, last.digest) if last else (1, START)
        event = {
            "number": number,
            "previous": previous,
            "kind": kind,
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "labeler": labeler,
            "nonce": nonce,
            "version": __version__,
        }
        text = canonical(event | content)
        connection.execute(
            events.insert().values(
                number=number, kind=kind, labeler=labeler, nonce=nonce, content=text.decode(), digest=sha256_bytes(text)
            )
        )
        return number

    def events(self) -> Iterator[Event]:
        """All events in order."""
        with self.reading() as connection:
            for content in connection.execute(sa.select(events.c.content).order_by(events.c.number)).scalars():
                yield json.loads(content)

    def head(self) -> str:
        """The digest of the last event."""
        with self.reading() as connection:
            digest = sa.select(events.c.digest).order_by(events.c.number.desc()).limit(1)
            return connection.execute(digest).scalar() or START

    def fault(self) -> str | None:
        """The first event, task or list of tasks that is not what was written; None if everything is intact."""
        previous, number = START, 0
        with self.reading() as connection:
            for row in connection.execute(sa.select(events).order_by(events.c.number)):
                number += 1
                content = json.loads(row.content)
                columns = {key: getattr(row, key) for key in ("number", "kind", "labeler", "nonce")}
                if sha256_bytes(row.content.encode()) != row.digest or content | columns != content:
                    return f"event {row.number} is not what was written"
                if row.number != number or content["previous"] != previous:
                    return f"event {row.number} does not follow the event before it"
                previous = row.digest
            for row in connection.execute(sa.select(tasks)):
                if sha256_bytes(row.content.encode()) != row.digest:
                    return f"task {row.id} is not what was published"
            on = sa.select(tasks, places.c.gold).join(places, places.c.task == tasks.c.digest)
            rows = connection.execute(on.order_by(places.c.position)).all()
            published = self._published(connection)
            if sha256_bytes(canonical([row.digest for row in rows])) != (published["tasks"] if published else NO_TASKS):
                return "the list of tasks that are on is not what was published"
            if bad := next((row for row in rows if row.gold != (json.loads(row.content)["gold"] is not None)), None):
                return f"task {bad.id} is gold where it was published as none, or the other way round"
        return None

    # Tasks

    def publish(self, rows: Sequence[Any], settings: dict | None = None) -> None:
        """Makes these the tasks to be answered. Answers to tasks whose content is unchanged stay.

        Raises DataError for a bad task, or two with one id; ConfigError for a bad setting.
        """
        full = [
            checked_task(row, f"task {row.get('id') if isinstance(row, dict) else n!r}")
            for n, row in enumerate(rows, 1)
        ]
        repeated = [name for name, n in Counter(task["id"] for task in full).items() if n > 1]
        if repeated:
            raise DataError(f"task {repeated[0]!r}: two tasks have this id")
        chosen = Settings.of(settings or {})
        contents = [canonical(task) for task in full]
        digests = [sha256_bytes(content) for content in contents]
        request = {"tasks": sha256_bytes(canonical(digests)), "settings": asdict(chosen)}
        with self.writing() as connection:
            published = self._published(connection)
            if published and published | request == published:
                return
            known = set(connection.execute(sa.select(tasks.c.digest)).scalars())
            new = [
                {"digest": digest, "id": task["id"], "content": content.decode()}
                for digest, task, content in zip(digests, full, contents, strict=True)
                if digest not in known
            ]
            if new:
                connection.execute(tasks.insert(), new)
            connection.execute(places.delete())
            positions = [
                {"position": n, "task": digest, "gold": task["gold"] is not None}
                for n, (digest, task) in enumerate(zip(digests, full, strict=True))
            ]
            if positions:
                connection.execute(places.insert(), positions)
            self.append(connection, "publish", None, None, count=len(full), **request)

    @staticmethod
    def _published(connection: sa.Connection) -> dict | None:
        last = sa.select(events.c.content).where(events.c.kind == "publish").order_by(events.c.number.desc()).limit(1)
        content = connection.execute(last).scalar()
        return json.loads(content) if content else None

    def settings(self, connection: sa.Connection) -> Settings:
        published = self._published(connection)
        return Settings(**published["settings"]) if published else Settings()

    def task(self, connection: sa.Connection, digest: str) -> Task:
        return json.loads(connection.execute(sa.select(tasks.c.content).where(tasks.c.digest == digest)).scalar_one())

    def tasks(self) -> list[Task]:
        """The published tasks, in order."""
        on = sa.select(tasks.c.content).join(places, places.c.task == tasks.c.digest).order_by(places.c.position)
        with self.reading() as connection:
            return [json.loads(content) for content in connection.execute(on).scalars()]

    # What follows from the events

    def labels(self) -> list[Label]:
        """The current answers to the published tasks, in the order they were given."""
        with self.reading() as connection:
            published = set(connection.execute(sa.select(places.c.task)).scalars())
        current: dict[int, Label] = {}
        for event in self.events():
            if event["kind"] == "undo":
                current.pop(event["undoes"], None)
            elif event.get("task_digest") in published:
                current[event["number"]] = _label(event)
        return list(current.values())

    def progress(self) -> Progress:
        """How far labeling is."""
        with self.reading() as connection:
            settings = self.settings(connection)
            plain = sa.select(tasks.c.id).join(places, places.c.task == tasks.c.digest).where(~places.c.gold)
            ids = list(connection.execute(plain).scalars())
            may_enter = connection.execute(sa.select(labelers).where(labelers.c.token.is_not(None))).all()
        rows = [row for row in self.labels() if not (row["gold"] or row["repeat"])]
        answers = Counter(row["task"] for row in rows if row["skipped"] is None)
        skips = Counter(row["task"] for row in rows if row["skipped"] is not None)
        complete = sum(answers[name] >= settings.overlap for name in ids)
        given = Counter(row["labeler"] for row in rows if row["skipped"] is None)
        seen: dict[str, set[str]] = defaultdict(set)
        for row in rows:
            seen[row["task"]].add(row["labeler"])
        at_work = {row["labeler"] for row in rows}  # an admin who only watches is not a labeler
        people = {p.pseudonym for p in may_enter if p.role == "labeler" or p.pseudonym in at_work}
        able = {name for name in people if settings.per_labeler is None or given[name] < settings.per_labeler}

        def is_retired(name: str) -> bool:
            return skips[name] >= settings.skips or bool(skips[name] and people and people <= seen[name])

        incomplete = [name for name in ids if answers[name] < settings.overlap]
        retired = sum(is_retired(name) for name in incomplete)
        return {
            "tasks": len(ids),
            "overlap": settings.overlap,
            "wanted": settings.overlap * len(ids),
            "have": sum(min(answers[name], settings.overlap) for name in ids),
            "complete": complete,
            "retired": retired,
            "stuck": sum(not is_retired(name) and able <= seen[name] for name in incomplete),
            "skips": sum(skips.values()),
            "labelers": dict(sorted(given.items())),
            "settled": complete + retired == len(ids),
        }

    # Notes

    def note(self, key: str, value: str) -> None:
        with self.writing() as connection:
            connection.execute(notes.delete().where(notes.c.key == key))
            connection.execute(notes.insert().values(key=key, value=value))

    def noted(self, key: str) -> str | None:
        with self.reading() as connection:
            return connection.execute(sa.select(notes.c.value).where(notes.c.key == key)).scalar()
