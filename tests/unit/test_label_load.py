"""Many labelers at once, a killed server, a database on a network: no answer is lost or stored twice."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from http.client import HTTPException

import pytest

from tests.labels import Scripted, at_once, postgres, postgres_programs, ranking, served_alone
from tunetrail.labeling.app import access, queue
from tunetrail.labeling.app.database import as_url, network_file_system
from tunetrail.labeling.app.store import Store

pytestmark = pytest.mark.slow

LABELERS, RANKINGS = 20, 50
if postgres_programs() is None and os.environ.get("CI"):
    raise RuntimeError("PostgreSQL is not installed; .ci/run installs it")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/labels.db"
    elif postgres_programs() is None:
        pytest.skip("PostgreSQL is not installed")
    else:
        with postgres() as address:
            yield address


def tasks(n: int) -> list[dict]:
    return [ranking(f"t{i:04}", 2 + i % 8) for i in range(n)]


def test_twenty_labelers_at_once_lose_nothing(url):
    store = Store(url)
    store.publish(tasks(LABELERS * RANKINGS // 2 + 20), {"overlap": 2, "repeat_every": 0})
    with served_alone(url) as (_, address):
        done = at_once(store, address, LABELERS, RANKINGS)
    told = [event for labeler in done for event in labeler.stored]
    rows = store.labels()
    assert len(told) == LABELERS * RANKINGS
    assert sorted(told) == [row["event"] for row in rows] == list(range(2, LABELERS * RANKINGS + 2))
    assert store.fault() is None
    assert len({(row["task"], row["labeler"]) for row in rows}) == len(rows)
    per_task = [sum(row["task"] == task["id"] for row in rows) for task in tasks(10)]
    assert per_task == [2] * 10


@pytest.mark.parametrize("seed", range(3))
def test_a_server_that_is_killed_stores_an_answer_whole_or_not_at_all(tmp_path, seed):
    """The server is killed while labelers submit; each then repeats the answer that was not confirmed."""
    url = f"sqlite:///{tmp_path}/labels.db"
    store = Store(url)
    store.publish(tasks(200), {})
    tokens = [access.add_labeler(store, f"labeler {n}")[1] for n in range(4)]
    unsure: dict[str, tuple[str, list[int]]] = {}
    told: list[int] = []

    def work(labeler: Scripted) -> None:
        while (given := labeler.task()) is not None:
            nonce, k = given
            unsure[labeler.token] = (nonce, list(range(1, k + 1)))
            labeler.submit(*unsure[labeler.token])
            del unsure[labeler.token]
            told.append(labeler.stored[-1])

    def until_it_breaks(labeler: Scripted) -> None:
        try:
            work(labeler)
        except (OSError, HTTPException) as e:  # no reply, or half of one
            broken.append(e)

    broken: list[Exception] = []
    with served_alone(url) as (process, address):
        threads = [threading.Thread(target=until_it_breaks, args=(Scripted(address, token),)) for token in tokens]
        for thread in threads:
            thread.start()
        time.sleep(0.2 + random.Random(seed).random() / 3)
        while True:
            while len(unsure) < 2 and not broken:
                time.sleep(0.0005)
            process.send_signal(signal.SIGSTOP)  # or all might be answered before it is killed
            time.sleep(0.05)
            if unsure or broken:
                break
            process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGKILL)
        for thread in threads:
            thread.join()
    assert len(broken) == 4, "each labeler lost the connection"
    assert unsure, "the server was killed during a submit"
    assert store.fault() is None
    assert set(told) <= {row["event"] for row in store.labels()}, "every confirmed answer is stored"
    with served_alone(url) as (_, address):
        for token, (nonce, ranks) in unsure.items():
            Scripted(address, token).submit(nonce, ranks)
    rows = store.labels()
    assert len(rows) == len(told) + len(unsure)
    assert len({row["task"] for row in rows}) == len(rows)
    assert store.fault() is None


def test_two_processes_do_not_fork_the_chain(tmp_path):
    url = f"sqlite:///{tmp_path}/labels.db"
    Store(url).publish(tasks(20), {"overlap": 4})
    script = (
        "import sys; from tunetrail.labeling.app import queue; from tunetrail.labeling.app.store import Store\n"
        "store = Store(sys.argv[1])\n"
        "while given := queue.next_task(store, sys.argv[2]):\n"
        "    queue.submit(store, sys.argv[2], given.nonce, {'ranks': list(range(1, len(given.shown) + 1))})\n"
    )
    workers = [subprocess.Popen([sys.executable, "-c", script, url, f"human-{n}"]) for n in range(4)]
    assert [worker.wait(60) for worker in workers] == [0] * 4
    store = Store(url)
    assert store.fault() is None
    rows = [row for row in store.labels() if not row["repeat"]]
    assert len(rows) == 80


def test_a_network_file_system_is_detected_and_reported(tmp_path, monkeypatch):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 0:1 / / rw - ext4 /dev/sda rw\n"
        f"23 22 0:2 / {tmp_path}/home rw - nfs4 server:/home rw\n"
        f"24 23 0:3 / {tmp_path}/home/local rw - xfs /dev/sdb rw\n"
        f"25 22 0:4 / {tmp_path}/my\\040disk rw - fuse.sshfs server: rw\n"
    )
    for path, found in {
        "labels.db": None,
        "home/labels.db": "nfs4",
        "home2/labels.db": None,
        "home/local/x": None,
        "my disk/x": "fuse.sshfs",
    }.items():
        assert network_file_system(tmp_path / path, mounts) == found
    assert network_file_system(tmp_path, tmp_path / "nothing") is None
    monkeypatch.setattr("tunetrail.labeling.app.database.network_file_system", lambda path: "nfs4")
    store = Store(f"{tmp_path}/labels.db")
    assert "on a network file system (nfs4)" in store.database.warnings[0]
    with store.reading() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "delete"
    store.publish([ranking("a")])
    given = queue.next_task(store, "human-1")
    queue.submit(store, "human-1", given.nonce, {"ranks": [1, 2, 3]})
    assert store.fault() is None


def test_a_password_is_not_shown():
    assert "secret" not in as_url("postgresql://me:secret@host/db").render_as_string()
