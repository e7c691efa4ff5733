"""One writer per folder, even when a node was cut off and its job restarts elsewhere.

The writer holds the newest of the files NAME, NAME.2, NAME.3, …: it keeps a lock on it, which ends with the process,
and renews its time every few seconds. A later attempt

- takes over the file at once if its lock is free: the writer died;
- creates the next file if the lock is held but the time was not renewed for `lease_seconds()`: the writer hangs, or its
  node has lost the file server, which keeps the lock for it. If it comes back, `Lease.lost` stops it before it writes;
- is refused otherwise. But if both are jobs of a cluster, it asks the writer to save and leave, and waits: its
  own job was requeued or submitted again.

Times are those of the file server, since the clocks of two nodes may differ. Tested only on local file systems.
"""

import errno
import fcntl
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tunetrail.errors import DiskError, Interrupted, Superseded

POLL_SECONDS = 1.0
REQUEST_SECONDS = 30.0
"""A request to take over counts only while it is renewed: the process that made it may have been cancelled."""


def lease_seconds() -> float:
    """How long a writer may be silent: $TUNETRAIL_LEASE_SECONDS (default 60)."""
    return float(os.environ.get("TUNETRAIL_LEASE_SECONDS") or 60)


def myself() -> str:
    """The name of this writer for others."""
    job = os.environ.get("SLURM_JOB_ID")
    return f"process {os.getpid()} on {socket.gethostname()}" + (f", job {job}" if job else "")


def _newest(path: Path) -> tuple[int, Path]:
    """(generation, file) of the newest lease file, or the first one if there is none yet."""
    files = {1: path}
    for other in path.parent.glob(f"{path.name}.*"):
        if (number := other.name.rpartition(".")[2]).isdigit():
            files[int(number)] = other
    generation = max(files)
    return generation, files[generation]


def _server_time(path: Path) -> float:
    """Seconds since the epoch by the clock of the folder's file server."""
    probe = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink()
    return now


def _lock(handle: IO[str]) -> bool:
    """Tries to lock; returns whether nobody else has the lock. Raises DiskError on a file system without locks."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as e:
        if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        raise DiskError(
            f"{handle.name}: its file system has no locks ({e.strerror}), and two writers could meet; put the clone "
            "on one that has (Lustre is mounted with -o flock), `tunetrail doctor` looks"
        ) from None
    return True


def _lock_after_probe(handle: IO[str]) -> bool:
    """Like `_lock`, but tries again after a moment: `holder` has the lock while it looks."""
    time.sleep(0.2)
    return _lock(handle)


def holder(path: Path) -> str | None:
    """Who holds the lease; None if nobody does. The holder must not call it: closing the file would release the
    lock."""
    _, newest = _newest(path)
    try:
        with newest.open("r+", errors="replace") as handle:
            return None if _lock(handle) else handle.read().strip() or "another process"
    except FileNotFoundError:
        return None


class Lease:
    """The lease that a writer holds. Made by `hold`."""

    def __init__(self, path: Path, generation: int, file: Path, handle: IO[str]):
        self.path, self.generation, self.file, self.handle = path, generation, file, handle
        self.request_file = path.with_name(f"{path.name}.wanted")
        self.ended = threading.Event()
        handle.seek(0)
        handle.truncate()
        handle.write(myself())
        handle.flush()
        self.renewing = threading.Thread(target=self._renew, daemon=True)
        self.renewing.start()

    def _renew(self) -> None:
        while not self.ended.wait(lease_seconds() / 6):
            try:
                os.utime(self.file)
            except OSError:  # the file server is unreachable: others decide by our silence
                continue

    def lost(self) -> bool:
        """Whether another writer has taken over: then nothing more may be written."""
        _server_time(self.path)  # a folder that has just changed is read again from its server
        return _newest(self.path)[0] != self.generation

    def requested_by(self) -> str | None:
        """Who requests that this writer leaves, if anyone does."""
        try:
            requested_at = self.request_file.stat().st_mtime
            return (
                self.request_file.read_text(errors="replace").strip()
                if _server_time(self.path) - requested_at < REQUEST_SECONDS
                else None
            )
        except OSError:
            return None

    def check(self) -> None:
        """Raises Superseded if another writer has taken over."""
        if self.lost():
            raise Superseded(
                f"{self.path}: another attempt has taken over while this one was silent; it goes on, this one ends"
            )

    def end(self) -> None:
        self.ended.set()
        self.renewing.join()
        self.handle.close()


def _acquire(path: Path, give_up: Callable[[], bool], say: Callable[[str], None]) -> Lease:
    request_file, announced = path.with_name(f"{path.name}.wanted"), False
    while True:
        generation, newest = _newest(path)
        handle = newest.open("a+", errors="replace")
        if _lock(handle) or _lock_after_probe(handle):
            if _newest(path)[0] == generation:
                os.utime(newest)
                request_file.unlink(missing_ok=True)
                return Lease(path, generation, newest, handle)
            handle.close()
            continue
        handle.seek(0)
        other = handle.read().strip() or "another process"
        handle.close()
        if _server_time(path) - newest.stat().st_mtime > lease_seconds():
            following = path.with_name(f"{path.name}.{generation + 1}")
            try:
                os.close(os.open(following, os.O_CREAT | os.O_EXCL, 0o666))
                say(f"{path.parent}: {other} has been silent for {lease_seconds():.0f} s; taking over")
            except FileExistsError:
                pass
            continue
        if not (", job " in other and ", job " in myself()) or give_up():
            raise Interrupted(f"{newest}: in use by {other}; wait for it to end, then run again")
        request_file.write_text(myself())
        if not announced:
            say(f"{path.parent}: {other} works on this; it was asked to save and leave")
            announced = True
        time.sleep(POLL_SECONDS)


@contextmanager
def hold(path: Path, give_up: Callable[[], bool], say: Callable[[str], None]) -> Iterator[Lease]:
    """Holds the lease on `path`'s folder.

    Args:
        give_up: called while waiting for another writer to leave; True gives up.
        say: called with the reason for waiting.

    Raises Interrupted if another writer has it and cannot be asked to leave, or does not leave in time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lease = _acquire(path, give_up, say)
    try:
        yield lease
    finally:
        lease.end()
