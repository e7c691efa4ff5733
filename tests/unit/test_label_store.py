"""The label store: tasks, the chain of events, the queue."""

import hashlib
import json
import os
import stat
import threading
import time
from pathlib import Path

import pytest
import rfc8785
import sqlalchemy as sa

from tests.labels import ranking
from tunetrail import __version__
from tunetrail.errors import ConfigError, DataError
from tunetrail.labeling.app import access, choosing, queue
from tunetrail.labeling.app.answers import TEXT, Refused
from tunetrail.labeling.app.store import START, Store
from tunetrail.labeling.tasks import checked_task


@pytest.fixture(params=["lite", "postgresql"])
def store(request) -> Store:
    return request.getfixturevalue(request.param)


def answer(store: Store, labeler: str, ranks: list[int] | None = None, **more) -> dict:
    """Answers a labeler's next task; ranks are in the task's order."""
    given = queue.next_task(store, labeler)
    k = len(given.shown)
    ranks = ranks or list(range(1, k + 1))
    queue.submit(store, labeler, given.nonce, {"ranks": [ranks[i] for i in given.shown], **more})
    return given.task


def test_labels_are_in_the_tasks_order_of_completions(store):
    store.publish([ranking("a"), ranking("b", 2)], {"overlap": 2})
    assert store.labels() == []
    answer(store, "human-1", [2, 1, 2])
    (row,) = store.labels()
    assert (row["task"], row["labeler"], row["ranks"], sorted(row["shown"])) == ("a", "human-1", [2, 1, 2], [0, 1, 2])
    assert store.progress() | {"wanted": 4, "have": 1, "complete": 0} == store.progress()
    assert store.fault() is None


def test_publishing_the_same_tasks_again_changes_nothing(store):
    assert store.head() == START
    store.publish([ranking("a")], {"overlap": 2})
    head = store.head()
    store.publish([ranking("a")], {"overlap": 2})
    assert store.head() == head
    store.publish([ranking("a")], {"overlap": 3})
    assert store.head() != head


def test_undo_is_an_event_and_reopens_the_task(store):
    store.publish([ranking("a")])
    answer(store, "human-1", [1, 2, 2])
    assert queue.undo(store, "human-1")
    assert store.labels() == []
    again = queue.next_task(store, "human-1")
    assert [again.draft["ranks"][again.shown.index(i)] for i in range(3)] == [1, 2, 2]
    answer(store, "human-1", [3, 2, 1])
    assert [row["ranks"] for row in store.labels()] == [[3, 2, 1]]
    assert [event["kind"] for event in store.events()] == ["publish", "ranking", "undo", "ranking"]


CHANGES = ["UPDATE events SET kind = 'x'", "DELETE FROM events", "UPDATE tasks SET id = 'x'", "DELETE FROM tasks"]


@pytest.mark.parametrize(
    "statement",
    [
        *CHANGES,
        "INSERT OR REPLACE INTO events SELECT number, 'x', labeler, nonce, content, digest FROM events",
        "INSERT OR REPLACE INTO events SELECT 99, 'x', labeler, nonce, content, digest FROM events",
        "REPLACE INTO tasks SELECT digest, 'x', content FROM tasks",
    ],
)
def test_sqlite_refuses_to_change_stored_rows(lite, statement):
    refuses(lite, statement)


@pytest.mark.parametrize(
    "statement",
    [
        *CHANGES,
        "TRUNCATE events",
        "INSERT INTO events SELECT * FROM events ON CONFLICT (number) DO UPDATE SET kind = 'x'",
    ],
)
def test_postgresql_refuses_to_change_stored_rows(postgresql, statement):
    refuses(postgresql, statement)


def refuses(store: Store, statement: str) -> None:
    store.publish([ranking("a")])
    with pytest.raises(sa.exc.DatabaseError, match="only ever added"), store.writing() as connection:
        connection.execute(sa.text(statement))
    assert store.fault() is None


def test_an_event_edited_without_the_triggers_is_detected(lite):
    lite.publish([ranking("a"), ranking("b")])
    answer(lite, "human-1")
    answer(lite, "human-1")
    with lite.writing() as connection:
        connection.execute(sa.text("DROP TRIGGER events_no_update"))
        content = json.loads(connection.execute(sa.text("SELECT content FROM events WHERE number = 2")).scalar())
        content["ranks"] = [3, 2, 1]
        connection.execute(sa.text("UPDATE events SET content = :c WHERE number = 2"), {"c": json.dumps(content)})
    assert lite.fault() == "event 2 is not what was written"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (ranking("a", 1), "task 'a': a ranking needs 2 to 9 completions, here are 1"),
        (ranking("a", gold={"ranks": [1, 3, 3]}), "task 'a': 'gold' must be"),
        (ranking("a", model="x"), "task 'a': unknown key 'model'"),
    ],
)
def test_the_error_for_a_bad_task_is_one_line(store, task, message):
    with pytest.raises(DataError, match=message):
        store.publish([task])
    with pytest.raises(ConfigError, match="overlap: 0 is too small"):
        store.publish([], {"overlap": 0})


def purposes(store: Store, labeler: str, most: int = 100) -> list[tuple[str, str]]:
    """Answers all of a labeler's tasks and returns their (id, purpose) in order."""
    found = []
    while len(found) < most and (given := queue.next_task(store, labeler)):
        found.append((given.task["id"], given.purpose))
        queue.submit(store, labeler, given.nonce, {"ranks": list(range(1, len(given.shown) + 1))})
    return found


def test_training_gold_and_repeats_are_interspersed(store):
    gold = [ranking(f"g{n}", gold={"ranks": [1, 2, 2]}) for n in range(4)]
    plain = [ranking(f"t{n:02}", 5) for n in range(30)]
    store.publish([*gold, *plain], {"training": 1, "gold_every": 10, "repeat_every": 10})
    came = purposes(store, "human-1")
    assert came[0] == ("g0", "training")
    assert [name for name, purpose in came if purpose == "label"] == [task["id"] for task in plain]
    before = [sum(purpose == "label" for _, purpose in came[:n]) for n, (_, p) in enumerate(came) if p == "gold"]
    assert [(n - 1) // 10 for n in before] == [0, 1, 2], "one after each of ten others"
    assert [name for name, purpose in came if purpose == "gold"] == ["g1", "g2", "g3"]
    again = [(n, name) for n, (name, purpose) in enumerate(came) if purpose == "repeat"]
    first = {name: n for n, (name, purpose) in enumerate(came) if purpose == "label"}
    assert len(again) == 3
    assert len({name for _, name in again}) == 3
    assert all(n - first[name] > choosing.GAP for n, name in again)
    rows = store.labels()
    assert [row["task"] for row in rows if row["repeat"]] == [name for _, name in again]
    by_task = {row["task"]: row["shown"] for row in rows if not row["repeat"]}
    assert any(row["shown"] != by_task[row["task"]] for row in rows if row["repeat"]), "shown in another order"
    assert store.progress() | {"have": 30, "complete": 30, "settled": True} == store.progress()


def test_where_gold_and_repeats_come_and_the_orders_shown_are_the_stores_secret(tmp_path):
    """Whoever knows the tasks, the settings and the code cannot compute them; a store that is opened again can."""
    gold = [ranking(f"g{n}", gold={"ranks": [1, 2, 2]}) for n in range(4)]
    rows = [*gold, *(ranking(f"t{n:02}", 5) for n in range(40))]
    came, orders, said = [], [], []
    for name in ("a", "b"):
        store = Store(f"{tmp_path}/{name}.db")
        store.publish(rows, {"gold_every": 10, "repeat_every": 10})
        came.append([purpose for _, purpose in purposes(store, "human-1")])
        orders.append([event["shown"] for event in store.events() if event["kind"] == "ranking"])
        with Store(f"{tmp_path}/{name}.db").writing() as connection:
            said.append(store.secret(connection))
            assert choosing.shown_order(said[-1], sha256_of(rows[4]), "human-1", "label", 5) in orders[-1]
    assert said[0] != said[1]
    assert sorted(came[0]) == sorted(came[1])
    assert came[0] != came[1]
    assert orders[0] != orders[1]
    assert not [event for event in store.events() if said[-1] in json.dumps(event)]


def sha256_of(row: dict) -> str:
    return hashlib.sha256(rfc8785.dumps(checked_task(row, ""))).hexdigest()


def test_tasks_and_labelers_have_quotas(store):
    store.publish([ranking(f"t{n}") for n in range(4)], {"overlap": 2, "per_labeler": 3})
    assert len(purposes(store, "human-1")) == 3
    assert len(purposes(store, "human-2")) == 3
    assert [name for name, _ in purposes(store, "human-3")] == ["t3"]
    assert store.progress() | {"wanted": 8, "have": 7, "complete": 3, "settled": False} == store.progress()
    assert [name for name, _ in purposes(store, "human-4")] == ["t3"]
    assert store.progress()["settled"]


def test_skips_do_not_count_towards_a_labelers_quota(store):
    store.publish([ranking(f"t{n}") for n in range(3)], {"per_labeler": 2})
    queue.skip(store, "human-1", queue.next_task(store, "human-1").nonce, {"reason": "broken"})
    assert len(purposes(store, "human-1")) == 2


def test_a_skipped_task_is_retired_when_nobody_else_can_take_it(store):
    ada, _ = access.add_labeler(store, "Ada")
    access.add_labeler(store, "Eve, who looks on", admin=True)
    store.publish([ranking("a"), ranking("b")], {"overlap": 1, "skips": 2})
    queue.skip(store, ada, queue.next_task(store, ada).nonce, {"reason": "expertise"})
    answer(store, ada)
    assert queue.next_task(store, ada) is None
    assert store.progress() | {"retired": 1, "stuck": 0, "settled": True} == store.progress()
    access.add_labeler(store, "Bob")
    assert store.progress() | {"retired": 0, "stuck": 0, "settled": False} == store.progress()


def test_tasks_that_no_labeler_can_take_are_counted_as_stuck(store):
    store.publish([ranking("a"), ranking("b"), ranking("c")], {"overlap": 2, "per_labeler": 2})
    assert store.progress()["stuck"] == 3
    ada, _ = access.add_labeler(store, "Ada")
    assert store.progress()["stuck"] == 0
    answer(store, ada)
    assert store.progress()["stuck"] == 1, "nobody is there for the second answer"
    access.add_labeler(store, "Bob")
    assert store.progress()["stuck"] == 0
    answer(store, ada)
    assert store.progress() | {"stuck": 0, "settled": False} == store.progress()
    answer(store, "human-2")
    answer(store, "human-2")
    assert store.progress()["stuck"] == 1, "both have given what one may give, and c is left"


def test_demonstrations_are_not_repeated(lite):
    lite.publish([{"id": f"d{n}", "kind": "demonstration", "prompt": "p"} for n in range(12)], {"repeat_every": 2})
    came = 0
    while given := queue.next_task(lite, "human-1"):
        assert given.purpose == "label"
        queue.submit(lite, "human-1", given.nonce, {"text": "x"})
        came += 1
    assert came == 12


def test_the_last_answers_give_away_neither_gold_nor_repeats(lite):
    gold = [ranking(f"g{n}", gold={"ranks": [1, 2, 2]}) for n in range(3)]
    plain = [ranking(f"t{n:02}") for n in range(30)]
    lite.publish([*gold, *plain], {"training": 1, "gold_every": 5, "repeat_every": 5})
    came = 0
    while given := queue.next_task(lite, "human-1"):
        assert queue.answered(lite, "human-1") == max(0, came - 1), "all but the training"
        assert given.task["prompt"] not in [row["prompt"] for row in queue.finished(lite, "human-1")]
        if came % 7 == 3:  # after an undo another one is open, and what was open waits
            queue.undo(lite, "human-1")
            again = queue.next_task(lite, "human-1")
            open_now = {given.task["prompt"], again.task["prompt"]}
            assert not open_now & {row["prompt"] for row in queue.finished(lite, "human-1")}
            queue.submit(lite, "human-1", again.nonce, {"ranks": [1, 2, 3]})
        queue.submit(lite, "human-1", given.nonce, {"ranks": [1, 2, 3]})
        came += 1
    assert {row["repeat"] for row in lite.labels()} == {True, False}


def test_a_withdrawn_task_accepts_no_answer(store):
    store.publish([ranking("a")])
    given = queue.next_task(store, "human-1")
    store.publish([ranking("b")])
    with pytest.raises(Refused, match="has been withdrawn"):
        queue.submit(store, "human-1", given.nonce, {"ranks": [1, 2, 3]})
    assert [event["kind"] for event in store.events()] == ["publish", "publish"]


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM places",
        "UPDATE places SET position = 9 WHERE position = 0",
        "UPDATE places SET gold = NOT gold WHERE position = 0",
    ],
)
def test_a_changed_list_of_published_tasks_is_detected(store, statement):
    assert store.fault() is None
    store.publish([ranking("a"), ranking("b")])
    answer(store, "human-1")
    assert store.fault() is None
    with store.writing() as connection:
        connection.execute(sa.text(statement))
    store.publish([ranking("a"), ranking("b")])
    assert "published" in store.fault()


def test_reading_sees_one_moment(store):
    store.publish([ranking("a")])
    with store.reading() as connection:
        before = store.settings(connection)
        store.publish([ranking("a")], {"overlap": 3})
        assert store.settings(connection) == before


def test_a_task_that_enough_labelers_skipped_is_retired(store):
    store.publish([ranking("a"), ranking("b")], {"skips": 2})
    for labeler in ("human-1", "human-2"):
        given = queue.next_task(store, labeler)
        assert given.task["id"] == "a"
        queue.skip(store, labeler, given.nonce, {"reason": "broken", "comment": "the prompt is cut off"})
    assert queue.next_task(store, "human-3").task["id"] == "b"
    assert [row["skipped"] for row in store.labels()] == ["broken", "broken"]
    assert store.progress() | {"retired": 1, "skips": 2, "settled": False} == store.progress()
    queue.undo(store, "human-2")
    assert store.progress()["retired"] == 0


def test_an_expired_lease_is_renewed_if_nobody_else_took_the_task(store, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(store.clock, "now", lambda: now[0])
    store.publish([ranking("a")], {"lease_minutes": 10})
    given = queue.next_task(store, "human-1")
    assert queue.next_task(store, "human-2") is None
    now[0] += 601
    assert queue.next_task(store, "human-2").task["id"] == "a"
    with pytest.raises(Refused, match="has run out"):
        queue.submit(store, "human-1", given.nonce, {"ranks": [1, 2, 3]})
    now[0] += 601  # the other left too
    queue.save_draft(store, "human-1", given.nonce, {"comment": "back"})
    assert queue.next_task(store, "human-2") is None, "the draft took the lease again"
    queue.submit(store, "human-1", given.nonce, {"ranks": [1, 2, 3]})
    assert len(store.labels()) == 1


def test_setting_the_machines_clock_moves_no_lease_and_no_duration(tmp_path, monkeypatch):
    """An hour back or a day ahead, while the store is open; and back before it is opened again."""
    store = Store(f"{tmp_path}/labels.db")
    store.publish([ranking("a"), ranking("b")], {"lease_minutes": 10})
    given = queue.next_task(store, "human-1")
    real = time.time()
    for seconds in (86_400, -3600):
        monkeypatch.setattr("time.time", lambda seconds=seconds: real + seconds)
        assert queue.next_task(store, "human-2").task["id"] == "b", "a is still the first labeler's"
    again = Store(f"{tmp_path}/labels.db")
    assert queue.next_task(again, "human-2").task["id"] == "b"
    queue.submit(again, "human-1", given.nonce, {"ranks": [1, 2, 3], "seconds": 5})
    assert 0 <= store.labels()[0]["seconds"] < 5


def test_a_draft_survives_while_another_labeler_holds_the_lease(store, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(store.clock, "now", lambda: now[0])
    store.publish([ranking("a", 5)], {"lease_minutes": 10})
    given = queue.next_task(store, "human-1")
    queue.save_draft(store, "human-1", given.nonce, {"comment": "half"})
    now[0] += 601
    assert queue.next_task(store, "human-2").task["id"] == "a"
    assert queue.next_task(store, "human-1") is None
    now[0] += 601  # the other left too
    again = queue.next_task(store, "human-1")
    assert (again.nonce != given.nonce, again.draft) == (True, {"comment": "half"})


def test_a_draft_may_be_as_long_as_an_answer(store):
    store.publish([{"id": "d", "kind": "demonstration", "prompt": "p"}])
    given = queue.next_task(store, "human-1")
    queue.save_draft(store, "human-1", given.nonce, {"text": "語" * TEXT})
    queue.submit(store, "human-1", given.nonce, {"text": "語" * TEXT})


def test_answers_stay_with_tasks_whose_content_is_unchanged(store):
    store.publish([ranking("a"), ranking("b")])
    answer(store, "human-1")
    answer(store, "human-1")
    store.publish([ranking("b"), ranking("a", 4)])
    assert [row["task"] for row in store.labels()] == ["b"]
    assert queue.next_task(store, "human-1").task["completions"] == ranking("a", 4)["completions"]
    store.publish([ranking("a"), ranking("b")])
    assert {row["task"] for row in store.labels()} == {"a", "b"}


def test_the_time_spent_continues_after_an_undo(store, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(store.clock, "now", lambda: now[0])
    store.publish([ranking("a"), ranking("b")])
    given = queue.next_task(store, "human-1")
    now[0] += 40
    queue.submit(store, "human-1", given.nonce, {"ranks": [1, 2, 3], "seconds": 30})
    assert queue.next_task(store, "human-1").task["id"] == "b"
    queue.undo(store, "human-1")
    again = queue.next_task(store, "human-1")
    assert (again.task["id"], again.draft["seconds"]) == ("a", 30)
    now[0] += 10
    queue.submit(store, "human-1", again.nonce, {"ranks": [1, 2, 3], "seconds": 35})
    assert store.labels()[0]["seconds"] == 35
    assert queue.next_task(store, "human-1").task["id"] == "b"


def test_every_event_records_the_order_shown_and_the_guidelines(store):
    store.publish([ranking("a", 9)], {"guidelines": "Be fair."})
    answer(store, "human-1")
    published, event = store.events()
    assert published["settings"]["guidelines"] == "Be fair."
    assert event["guidelines"] == hashlib.sha256(b"Be fair.").hexdigest()
    assert sorted(event["shown"]) == list(range(9))
    assert event["version"] == __version__
    with store.reading() as connection:
        content = store.task(connection, event["task_digest"])
    assert hashlib.sha256(rfc8785.dumps(content)).hexdigest() == event["task_digest"]
    assert hashlib.sha256(rfc8785.dumps(event)).hexdigest() == store.head()
    assert event["previous"] == hashlib.sha256(rfc8785.dumps(published)).hexdigest()


# ----------------------------------------------------------------------------- files


def modes(folder: Path) -> dict[str, str]:
    return {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in folder.iterdir()}


@pytest.mark.parametrize("old", [False, True])
def test_nobody_else_reads_the_store_not_even_its_first_byte(tmp_path, monkeypatch, old):
    """Nor its log, which SQLite gives the mode of the file: one that was left open is closed first."""
    if old:
        (tmp_path / "labels.db").touch(0o644)
        (tmp_path / "labels.db").chmod(0o644)
    connected = []
    create_engine = sa.create_engine

    def connect(*args, **options):
        connected.append(modes(tmp_path))
        return create_engine(*args, **options)

    monkeypatch.setattr(sa, "create_engine", connect)
    before = os.umask(0)
    try:
        store = Store(f"{tmp_path}/labels.db")
        with store.writing() as connection:
            store.append(connection, "undo", None, None)
            assert modes(tmp_path) == dict.fromkeys(("labels.db", "labels.db-wal", "labels.db-shm"), "0o600")
    finally:
        os.umask(before)
    assert connected == [{"labels.db": "0o600"}]


def test_a_backup_is_whole_while_people_answer(lite, tmp_path):
    lite.publish([ranking(f"t{n}") for n in range(40)])
    ended = threading.Thread(target=lambda: [answer(lite, "human-1") for _ in range(40)])
    ended.start()
    heads = []
    for n in range(3):
        heads.append(lite.backup(tmp_path / f"copy-{n}.db"))
    ended.join()
    for n, head in enumerate(heads):
        copy = Store(f"{tmp_path}/copy-{n}.db", create=False)
        assert (copy.fault(), copy.head(), len(copy.tasks())) == (None, head, 40)
        assert head in digests(lite)
    assert stat.S_IMODE((tmp_path / "copy-0.db").stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match=r"copy-0\.db: is there already; name a new file"):
        lite.backup(tmp_path / "copy-0.db")


def digests(store: Store) -> list[str]:
    with store.reading() as connection:
        return list(connection.execute(sa.text("SELECT digest FROM events")).scalars())


def test_a_backup_of_a_store_that_was_tampered_with_is_refused(lite, tmp_path):
    lite.publish([ranking("a"), ranking("b")])
    with lite.writing() as connection:
        connection.execute(sa.text("DELETE FROM places"))
    with pytest.raises(DataError, match="the list of tasks that are on is not what was published"):
        lite.backup(tmp_path / "copy.db")
    assert not list(tmp_path.glob("*copy*"))
