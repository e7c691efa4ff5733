"""The tables, and how the database is opened.

`tasks` and `events` are the audit trail: rows are only ever added, and the database refuses to change or delete them.
The other tables are working state: which tasks are published, who works on what, who may enter. Only `names` links a
pseudonym to a person.
"""

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from tunetrail.errors import ConfigError

tables = sa.MetaData()

tasks = sa.Table(
    "tasks",
    tables,
    sa.Column("digest", sa.String(64), primary_key=True),
    sa.Column("id", sa.Text, nullable=False),
    sa.Column("content", sa.Text, nullable=False),  # canonical JSON; its sha256 is the digest
)
events = sa.Table(
    "events",
    tables,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("labeler", sa.Text),
    sa.Column("nonce", sa.Text, unique=True),
    sa.Column("content", sa.Text, nullable=False),  # canonical JSON, with the digest of the event before
    sa.Column("digest", sa.String(64), nullable=False, unique=True),  # its sha256
)
AUDITED = (tasks, events)

places = sa.Table(  # the published tasks, in order
    "places",
    tables,
    sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("task", sa.String(64), nullable=False, unique=True),
    sa.Column("gold", sa.Boolean, nullable=False),
)
assignments = sa.Table(  # a task as one labeler was given it
    "assignments",
    tables,
    sa.Column("nonce", sa.Text, primary_key=True),
    sa.Column("task", sa.String(64), nullable=False),
    sa.Column("labeler", sa.Text, nullable=False),
    sa.Column("purpose", sa.Text, nullable=False),  # label | gold | training | repeat
    sa.Column("state", sa.Text, nullable=False),  # open | answered | skipped | undone
    sa.Column("shown", sa.Text, nullable=False),
    sa.Column("opened", sa.Float, nullable=False),
    sa.Column("expires", sa.Float, nullable=False),
    sa.Column("draft", sa.Text),
    sa.Column("event", sa.Integer),
    sa.Index("assignments_task", "task", "labeler"),
    sa.Index("assignments_labeler", "labeler", "state"),
)
labelers = sa.Table(
    "labelers",
    tables,
    sa.Column("pseudonym", sa.Text, primary_key=True),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("token", sa.String(64), unique=True),  # sha256; null: locked out
)
names = sa.Table(
    "names", tables, sa.Column("pseudonym", sa.Text, primary_key=True), sa.Column("name", sa.Text, nullable=False)
)
sessions = sa.Table(
    "sessions",
    tables,
    sa.Column("cookie", sa.String(64), primary_key=True),  # sha256
    sa.Column("pseudonym", sa.Text, nullable=False),
    sa.Column("csrf", sa.Text, nullable=False),
    sa.Column("expires", sa.Float, nullable=False),
)
notes = sa.Table(  # where the page was last served, whose tasks these are, the secret
    "notes", tables, sa.Column("key", sa.Text, primary_key=True), sa.Column("value", sa.Text, nullable=False)
)

NETWORK_FILE_SYSTEMS = (
    "nfs",
    "lustre",
    "gpfs",
    "beegfs",
    "cifs",
    "smb",
    "ceph",
    "afs",
    "9p",
    "fuse.sshfs",
    "glusterfs",
    "orangefs",
    "pvfs",
    "panfs",
    "wekafs",
    "fuse.glusterfs",
    "fuse.ceph",
)
SERVER_TIME = "SELECT extract(epoch FROM clock_timestamp())"
LOCK = 0x7475_6E65
"""The PostgreSQL advisory lock that a writer holds."""


def network_file_system(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str | None:
    """The type of the network file system that holds a path; None if it is local or cannot be determined."""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return None
    real, file_system, longest = os.path.realpath(path), "", -1
    for line in lines:
        before, _, after = line.partition(" - ")
        mount = before.split()[4].replace("\\040", " ")
        inside = real == mount or real.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= longest:  # a later mount covers an earlier one
            file_system, longest = after.split()[0], len(mount)
    return file_system if file_system.startswith(NETWORK_FILE_SYSTEMS) else None


def make_private(path: Path) -> None:
    """Makes the file, if there is none, and lets nobody but its owner read it, from before its first byte.

    SQLite gives its write-ahead log and its shared memory the mode of the file.
    """
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    for file in (path, *(path.with_name(path.name + end) for end in ("-wal", "-shm", "-journal"))):
        if file.exists():
            file.chmod(0o600)


def as_url(store: str) -> sa.URL:
    """A store's URL; a plain path is an SQLite file. Raises ConfigError for databases that are neither."""
    try:
        url = sa.make_url(store if "://" in store else f"sqlite:///{store}")
    except SQLAlchemyError:
        raise ConfigError(f"{store}: not a database's URL; give a path or postgresql://user@host/name") from None
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername not in ("sqlite", "postgresql+psycopg"):
        raise ConfigError(f"{url.render_as_string()}: labels are kept in SQLite or PostgreSQL, not in {url.drivername}")
    if url.drivername == "sqlite" and not url.database:
        raise ConfigError(f"{store}: name the file, as in sqlite:///state/labels.db")
    return url


class Database:
    """An open database. `reading` sees one moment; of `writing` there is only one at a time, among all processes."""

    def __init__(self, store: str, create: bool = True):
        """Raises ConfigError if it cannot be opened, or holds no labels and must not be created."""
        self.url = as_url(store)
        self.lite = self.url.drivername == "sqlite"
        self.warnings: list[str] = []
        self._turn = threading.Lock()  # first come, first served, where SQLite would poll
        if self.lite:
            path = Path(str(self.url.database))
            if create:
                path.parent.mkdir(parents=True, exist_ok=True)
            elif not path.is_file():
                raise ConfigError(f"{self.shown}: there is no such file; name the labels with --store")
            network = network_file_system(path)
            if network:
                self.warnings.append(
                    f"{path}: on a network file system ({network}), where SQLite's locks are unreliable. Serve from "
                    "one machine only and keep copies, or use a local disk or postgresql://"
                )
            try:
                make_private(path)
            except OSError as e:
                raise ConfigError(f"{self.shown}: cannot be opened ({e.strerror})") from None
            self.engine = sa.create_engine(
                self.url, pool_size=40, connect_args={"timeout": 30, "check_same_thread": False}
            )
            # A write-ahead log needs shared memory, which a network file system does not provide.
            self._listen("DELETE" if network else "WAL")
        else:
            try:
                self.engine = sa.create_engine(self.url, pool_size=20, max_overflow=20, pool_pre_ping=True)
            except ModuleNotFoundError:
                raise ConfigError(f"{self.shown}: PostgreSQL needs its driver: pip install 'psycopg[binary]'") from None
        try:
            if not create and not sa.inspect(self.engine).has_table(events.name):
                raise ConfigError(f"{self.shown}: holds no labels; name them with --store")
            self._create()
        except SQLAlchemyError as e:
            raise ConfigError(
                f"{self.shown}: cannot be opened ({str(getattr(e, 'orig', e)).strip().splitlines()[0]})"
            ) from None

    @property
    def shown(self) -> str:
        """The URL without its password."""
        return self.url.render_as_string()

    def _listen(self, journal: str) -> None:
        @sa.event.listens_for(self.engine, "connect")
        def connect(connection, _record):  # the driver would begin transactions too late
            connection.isolation_level = None
            for pragma in (f"journal_mode={journal}", "secure_delete=ON"):
                connection.execute(f"PRAGMA {pragma}").close()

        @sa.event.listens_for(self.engine, "begin")
        def begin(connection):
            # Lock before reading: two writers that read first would both chain to the same event.
            options = connection.get_execution_options()
            connection.exec_driver_sql(f"PRAGMA synchronous={'FULL' if options.get('durable') else 'NORMAL'}")
            connection.exec_driver_sql("BEGIN IMMEDIATE" if options.get("alone") else "BEGIN")

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        # A transaction of SQLite sees one moment anyway; in PostgreSQL each statement would see a new one.
        options = {} if self.lite else {"isolation_level": "REPEATABLE READ"}
        with self.engine.connect().execution_options(**options) as connection:
            yield connection

    @contextmanager
    def writing(self, durable: bool = True) -> Iterator[sa.Connection]:
        """A transaction: all of it is stored at the end, or nothing if an error leaves the block.

        Args:
            durable: wait for the disk. Without it a power failure may lose the transaction, as a whole.
        """
        options = {"alone": True, "durable": durable}
        with self._turn, self.engine.connect().execution_options(**options) as connection, connection.begin():
            if not self.lite:
                if not durable:
                    connection.execute(sa.text("SET LOCAL synchronous_commit = off"))
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK)))
            yield connection

    def time(self, connection: sa.Connection) -> float:
        """Seconds since the epoch by the clock that all who use the database share: the server's, or this machine's."""
        return time.time() if self.lite else float(connection.execute(sa.text(SERVER_TIME)).scalar_one())

    def checkpoint(self) -> None:
        """Moves what is in SQLite's write-ahead log into the file itself, and empties the log."""
        if self.lite:
            connection = self.engine.raw_connection()
            connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").close()
            connection.close()

    def copy_to(self, target: Path) -> None:
        """Writes all of one moment into a new file, while others read and write. Raises ConfigError for PostgreSQL."""
        if not self.lite:
            raise ConfigError(f"{self.shown}: PostgreSQL makes its copies itself: pg_dump")
        make_private(target)
        source, copy = self.engine.raw_connection(), sqlite3.connect(target)
        try:
            source.driver_connection.backup(copy)  # type: ignore[union-attr]
        finally:
            copy.close()
            source.close()

    def scrub(self, table: str) -> None:
        """Removes a table's deleted rows from the database's files as well."""
        if self.lite:
            self.checkpoint()
            return
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as alone:
            alone.exec_driver_sql(f"VACUUM {table}")

    def _create(self) -> None:
        with self.writing() as connection:
            tables.create_all(connection)
            for table in AUDITED:
                for statement in self._refusals(table):
                    connection.execute(sa.text(statement))

    def _refusals(self, table: sa.Table) -> list[str]:
        """The statements that make the database refuse to change or delete rows."""
        if self.lite:
            unique = " OR ".join(f"{c.name} = NEW.{c.name}" for c in table.c if c.unique or c.primary_key)
            clauses = {
                "update": "UPDATE",
                "delete": "DELETE",
                "replace": "INSERT",  # INSERT OR REPLACE deletes without asking the trigger above
            }
            taken = f"WHEN EXISTS (SELECT 1 FROM {table} WHERE {unique})"
            return [
                f"CREATE TRIGGER IF NOT EXISTS {table}_no_{what} BEFORE {clause} ON {table} "
                f"{taken if what == 'replace' else ''} BEGIN SELECT RAISE(ABORT, '{table} are only ever added'); END"
                for what, clause in clauses.items()
            ]
        return [
            "CREATE OR REPLACE FUNCTION tunetrail_refuse() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION '% are only ever added', TG_TABLE_NAME; END $$",
            f"CREATE OR REPLACE TRIGGER {table}_fixed BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION tunetrail_refuse()",
        ]
