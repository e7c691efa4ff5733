"""The labeling store: tasks, the chain of events, the queue."""

import json

import pytest
import sqlalchemy as sa

from tunetrail.errors import ConfigError, DataError
from tunetrail.labeling.app import queue
from tunetrail.labeling.app.store import START, Store


def ranking(name: str, k: int = 3, **more) -> dict:
    return {"id": name, "prompt": f"prompt of {name}", "completions": [f"{name}, output {i}" for i in range(k)]} | more


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(f"sqlite:///{tmp_path}/labels.db")


def answer(store: Store, labeler: str, ranks: list[int] | None = None, **more) -> dict:
    """Answers a labeler's next task; ranks are in the task's order."""
    given = queue.next_task(store, labeler)
    k = len(given.shown)
    ranks = ranks or list(range(1, k + 1))
    queue.submit(store, labeler, given.nonce, {"ranks": [ranks[i] for i in given.shown], **more})
    return given.task


def test_an_answer_comes_back_in_the_tasks_order(store):
    store.publish([ranking("a"), ranking("b", 2)], {"overlap": 2})
    assert store.labels() == []
    answer(store, "human-1", [2, 1, 2])
    (row,) = store.labels()
    assert (row["task"], row["labeler"], row["ranks"], sorted(row["shown"])) == ("a", "human-1", [2, 1, 2], [0, 1, 2])
    assert store.progress() | {"wanted": 4, "have": 1, "complete": 0} == store.progress()
    assert store.fault() is None


def test_publishing_the_same_again_changes_nothing(store):
    assert store.head() == START
    store.publish([ranking("a")], {"overlap": 2})
    head = store.head()
    store.publish([ranking("a")], {"overlap": 2})
    assert store.head() == head
    store.publish([ranking("a")], {"overlap": 3})
    assert store.head() != head


def test_undo_is_an_event_and_gives_the_task_back(store):
    store.publish([ranking("a")])
    answer(store, "human-1", [1, 2, 2])
    assert queue.undo(store, "human-1")
    assert store.labels() == []
    again = queue.next_task(store, "human-1")
    assert [again.draft["ranks"][again.shown.index(i)] for i in range(3)] == [1, 2, 2]
    answer(store, "human-1", [3, 2, 1])
    assert [row["ranks"] for row in store.labels()] == [[3, 2, 1]]
    assert [event["kind"] for event in store.events()] == ["publish", "ranking", "undo", "ranking"]


@pytest.mark.parametrize("statement", ["UPDATE events SET kind = 'x'", "DELETE FROM events", "UPDATE tasks SET id = 'x'", "DELETE FROM tasks"])  # fmt: skip
def test_the_database_refuses_to_change_what_was(store, statement):
    store.publish([ranking("a")])
    with pytest.raises(sa.exc.DatabaseError, match="only ever added"), store.writing() as connection:
        connection.execute(sa.text(statement))
    assert store.fault() is None


def test_a_chain_that_was_edited_behind_the_databases_back_is_found(store):
    store.publish([ranking("a"), ranking("b")])
    answer(store, "human-1")
    answer(store, "human-1")
    with store.writing() as connection:
        connection.execute(sa.text("DROP TRIGGER events_no_UPDATE"))
        content = json.loads(connection.execute(sa.text("SELECT content FROM events WHERE number = 2")).scalar())
        content["ranks"] = [3, 2, 1]
        connection.execute(sa.text("UPDATE events SET content = :c WHERE number = 2"), {"c": json.dumps(content)})
    assert store.fault() == "event 2 is not what was written"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (ranking("a", 1), "task 'a': a ranking needs 2 to 9 completions, here are 1"),
        (ranking("a", gold={"ranks": [1, 3, 3]}), "task 'a': 'gold' must be"),
        (ranking("a", model="x"), "task 'a': unknown key 'model'"),
    ],
)
def test_a_bad_task_is_one_line(store, task, message):
    with pytest.raises(DataError, match=message):
        store.publish([task])
    with pytest.raises(ConfigError, match="overlap: 0 is too small"):
        store.publish([], {"overlap": 0})
