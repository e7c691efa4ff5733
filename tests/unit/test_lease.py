"""Only one process may write to a folder; when another may take over."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tunetrail.contract import lease as lease_module
from tunetrail.contract.lease import hold, holder
from tunetrail.errors import DiskError, Interrupted, Superseded

HOLD = """
import sys, time
from pathlib import Path
from tunetrail.errors import TunetrailError
from tunetrail.contract.lease import hold

with hold(Path(sys.argv[1]), give_up=lambda: False, say=print) as lease:
    print("held", lease.generation, flush=True)
    while "deaf" in sys.argv or not lease.requested_by():
        time.sleep(0.05)
        try:
            lease.check()
        except TunetrailError as e:
            print(e, flush=True)
            sys.exit(e.exit_code)
    print("asked by", lease.requested_by(), flush=True)
"""


@pytest.fixture
def other(tmp_path, monkeypatch):
    """Starts another process that holds the lease until it is requested."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(lease_module, "POLL_SECONDS", 0.05)
    started = []

    def start(job: str | None = None, seconds: str = "60", *more: str) -> subprocess.Popen:
        environment = os.environ | {"TUNETRAIL_LEASE_SECONDS": seconds} | ({"SLURM_JOB_ID": job} if job else {})
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path / "lock"), *more],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "held 1\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def never() -> bool:
    return False


def test_a_second_writer_is_refused_and_learns_who_holds_the_lease(other, tmp_path):
    process = other()
    path = tmp_path / "lock"
    assert holder(path) == f"process {process.pid} on {os.uname().nodename}"
    with (
        pytest.raises(
            Interrupted, match=rf"{path}: in use by process {process.pid} on \S+; wait for it to end, then run again"
        ),
        hold(path, never, print),
    ):
        pass
    process.kill()
    process.wait()
    assert holder(path) is None
    with hold(path, never, print) as lease:  # a killed process holds no lease
        assert (lease.generation, lease.lost(), lease.requested_by()) == (1, False, None)


@pytest.mark.parametrize(("theirs", "mine"), [(None, "7"), ("7", None)])
def test_only_cluster_jobs_request_a_lease(other, tmp_path, monkeypatch, theirs, mine):
    other(theirs)
    if mine:
        monkeypatch.setenv("SLURM_JOB_ID", mine)
    with pytest.raises(Interrupted), hold(tmp_path / "lock", never, print):
        pass
    assert not (tmp_path / "lock.wanted").exists()


def test_a_later_job_requests_the_lease_and_waits(other, tmp_path, monkeypatch):
    process = other("5")
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    said: list[str] = []
    with hold(tmp_path / "lock", never, said.append) as lease:
        assert process.wait(10) == 0
        assert process.stdout.read() == f"asked by process {os.getpid()} on {os.uname().nodename}, job 9\n"
        assert lease.requested_by() is None  # the request is fulfilled
    assert said == [
        f"{tmp_path}: process {process.pid} on {os.uname().nodename}, job 5 works on this; it was asked to save and "
        "leave"
    ]


def test_a_request_that_is_not_renewed_expires(tmp_path):
    with hold(tmp_path / "lock", never, print) as lease:
        lease.request_file.write_text("process 1 on nowhere, job 3")
        assert lease.requested_by() == "process 1 on nowhere, job 3"
        old = time.time() - lease_module.REQUEST_SECONDS - 1
        os.utime(lease.request_file, (old, old))
        assert lease.requested_by() is None


def test_a_waiting_process_gives_up_when_told_to(other, tmp_path, monkeypatch):
    process = other("5")
    process.send_signal(signal.SIGSTOP)
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    asked = iter([False, False, True])
    with pytest.raises(Interrupted, match="in use by"), hold(tmp_path / "lock", lambda: next(asked), print):
        pass


def test_a_silent_writer_is_superseded_and_notices_before_it_writes(other, tmp_path, monkeypatch):
    process = other("5", seconds="0.6")
    process.send_signal(signal.SIGSTOP)  # like a node that lost the file server: its lock is still held
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("TUNETRAIL_LEASE_SECONDS", "0.6")
    said: list[str] = []
    with hold(tmp_path / "lock", never, said.append) as lease:
        assert lease.generation == 2
        assert said[-1].endswith("has been silent for 1 s; taking over")
        process.send_signal(signal.SIGCONT)
        assert process.wait(10) == Superseded.exit_code
        assert "another attempt has taken over while this one was silent" in process.stdout.read()
        assert not lease.lost()
        assert holder(tmp_path / "none") is None


def test_an_active_writer_keeps_its_lease(other, tmp_path, monkeypatch):
    process = other("5", "0.6", "deaf")
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setenv("TUNETRAIL_LEASE_SECONDS", "0.6")
    end = time.monotonic() + 1.5
    with pytest.raises(Interrupted), hold(tmp_path / "lock", lambda: time.monotonic() > end, print):
        pass
    assert process.poll() is None
    assert list(tmp_path.glob("lock.[0-9]*")) == []


def test_only_one_of_two_processes_can_take_over(tmp_path):
    """Generations are created exclusively."""
    first = tmp_path / "lock"
    Path(first).touch()
    (tmp_path / "lock.2").touch()
    with hold(first, never, print) as lease:
        assert lease.generation == 2
        (tmp_path / "lock.3").touch()
        assert lease.lost()
        with pytest.raises(Superseded):
            lease.check()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_the_error_for_a_file_system_without_locks_is_one_line(tmp_path, monkeypatch, number):
    """Lustre without -o flock reports ENOSYS, NFS without its lock server ENOLCK."""

    def lockf(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lease_module.fcntl, "lockf", lockf)
    with (
        pytest.raises(DiskError, match=r"lock: its file system has no locks \(.*; put the clone on one that has"),
        hold(tmp_path / "lock", lambda: True, print),
    ):
        pass
    assert DiskError.exit_code == 74
