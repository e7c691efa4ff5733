"""Who may enter: each labeler has a token, which is exchanged for a cookie. Only digests of the two are stored.

Tokens and cookies are long and random, so a plain sha256 protects them: there is no short list of likely ones to try.
"""

import secrets
import time
from collections import defaultdict
from dataclasses import dataclass
from threading import Lock
from typing import TypedDict

import sqlalchemy as sa

from tunetrail.errors import ConfigError
from tunetrail.labeling.app.database import assignments, events, labelers, names, sessions
from tunetrail.labeling.app.store import Store
from tunetrail.provenance.manifest import sha256_bytes

SESSION_HOURS = 12


@dataclass(frozen=True)
class Session:
    """Someone who has entered."""

    pseudonym: str
    admin: bool
    csrf: str


class Member(TypedDict):
    """A line of the roster."""

    pseudonym: str
    role: str
    """labeler or admin."""
    name: str | None
    """None once it was deleted."""
    active: bool
    """May still enter."""
    events: int


def _digest(secret: str) -> str:
    return sha256_bytes(secret.encode(errors="replace"))


def add_labeler(store: Store, name: str, admin: bool = False) -> tuple[str, str]:
    """A new pseudonym and its token. The token is not stored, so it cannot be shown again."""
    if not name.strip():
        raise ConfigError("a labeler needs a name; it is stored separately and can be deleted")
    token = secrets.token_urlsafe(24)
    with store.writing() as connection:
        number = connection.execute(sa.select(sa.func.count()).select_from(labelers)).scalar_one() + 1
        pseudonym = f"human-{number}"  # rows are never deleted, so no pseudonym is used twice
        role = "admin" if admin else "labeler"
        connection.execute(labelers.insert().values(pseudonym=pseudonym, role=role, token=_digest(token)))
        connection.execute(names.insert().values(pseudonym=pseudonym, name=name.strip()))
    return pseudonym, token


def _require_labeler(connection: sa.Connection, pseudonym: str) -> None:
    if not connection.execute(sa.select(labelers.c.role).where(labelers.c.pseudonym == pseudonym)).first():
        raise ConfigError(f"{pseudonym}: no such labeler; tunetrail label list shows them")


def renew_token(store: Store, pseudonym: str) -> str:
    """A new token, which replaces the old one and ends its sessions."""
    token = secrets.token_urlsafe(24)
    with store.writing() as connection:
        _require_labeler(connection, pseudonym)
        connection.execute(labelers.update().where(labelers.c.pseudonym == pseudonym).values(token=_digest(token)))
        connection.execute(sessions.delete().where(sessions.c.pseudonym == pseudonym))
    return token


def forget(store: Store, pseudonym: str) -> None:
    """Deletes a labeler's name and locks them out. Their answers stay, under the pseudonym."""
    with store.writing() as connection:
        _require_labeler(connection, pseudonym)
        connection.execute(names.delete().where(names.c.pseudonym == pseudonym))
        connection.execute(labelers.update().where(labelers.c.pseudonym == pseudonym).values(token=None))
        connection.execute(sessions.delete().where(sessions.c.pseudonym == pseudonym))
        connection.execute(
            assignments.update()
            .where(assignments.c.labeler == pseudonym, assignments.c.state == "open")
            .values(state="undone", draft=None)
        )
    store.database.scrub("names")


def roster(store: Store) -> list[Member]:
    """All labelers, in the order in which they were added."""
    done = sa.select(sa.func.count()).where(events.c.labeler == labelers.c.pseudonym).scalar_subquery()
    query = sa.select(labelers, names.c.name, done.label("events")).join_from(
        labelers, names, names.c.pseudonym == labelers.c.pseudonym, isouter=True
    )
    with store.reading() as connection:
        return [
            {
                "pseudonym": row.pseudonym,
                "role": row.role,
                "name": row.name,
                "active": row.token is not None,
                "events": row.events,
            }
            for row in connection.execute(query.order_by(sa.func.length(labelers.c.pseudonym), labelers.c.pseudonym))
        ]


def enter(store: Store, token: str) -> str | None:
    """A cookie for a token; None for a wrong one."""
    of_token = sa.select(labelers.c.pseudonym).where(labelers.c.token == _digest(token))
    with store.reading() as connection:
        if connection.execute(of_token).scalar() is None:
            return None  # before the lock is taken, so that guessing makes nobody wait
    with store.writing() as connection:
        known = connection.execute(of_token).scalar()
        if known is None:
            return None
        cookie, now = secrets.token_urlsafe(24), store.clock.now()
        connection.execute(sessions.delete().where(sessions.c.expires < now))
        connection.execute(
            sessions.insert().values(
                cookie=_digest(cookie),
                pseudonym=known,
                csrf=secrets.token_urlsafe(24),
                expires=now + 3600 * SESSION_HOURS,
            )
        )
        return cookie


def session(store: Store, cookie: str | None) -> Session | None:
    """The session of a cookie; None for a wrong or expired one."""
    if not cookie:
        return None
    query = sa.select(sessions, labelers.c.role).join(labelers, labelers.c.pseudonym == sessions.c.pseudonym)
    with store.reading() as connection:
        row = connection.execute(query.where(sessions.c.cookie == _digest(cookie))).first()
    if row is None or row.expires < store.clock.now():
        return None
    return Session(row.pseudonym, row.role == "admin", row.csrf)


def leave(store: Store, cookie: str) -> None:
    with store.writing() as connection:
        connection.execute(sessions.delete().where(sessions.c.cookie == _digest(cookie)))


class Rate:
    """A rate limit for each key: at most `burst` requests at once, and `per_minute` in the long run."""

    def __init__(self, per_minute: float, burst: int):
        self.speed, self.burst = per_minute / 60, burst
        self._remaining: dict[str, tuple[float, float]] = defaultdict(lambda: (burst, 0.0))
        self._lock = Lock()

    def allows(self, key: str, now: float | None = None) -> bool:
        now = time.monotonic() if now is None else now
        with self._lock:
            remaining, then = self._remaining[key]
            remaining = min(self.burst, remaining + (now - then) * self.speed)
            allowed = remaining >= 1
            self._remaining[key] = (remaining - allowed, now)
            if len(self._remaining) > 10_000:  # bounds the memory; everybody starts with a full burst again
                self._remaining.clear()
            return allowed
