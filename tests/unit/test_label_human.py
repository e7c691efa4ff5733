"""The labeler human: tasks are published, rankings are collected, and the run waits until they are complete."""

import json
from functools import partial

import pytest

from tests.labels import ranking
from tests.unit.test_comparisons_stage import ROWS, artifact, make_row
from tunetrail.config.comparisons import HumanLabeler
from tunetrail.contract.runner import main
from tunetrail.files import read_jsonl, write_json, write_jsonl
from tunetrail.labeling.app import access, queue
from tunetrail.labeling.app.store import START, Settings, Store
from tunetrail.labeling.tasks import read_tasks
from tunetrail.models.tiny import tiny_tokenizer
from tunetrail.provenance.manifest import sha256_bytes
from tunetrail.provenance.record import read_record
from tunetrail.stages import comparisons, tasks

__all__ = ["artifact"]
KINDS = {"tasks": tasks.run, "comparisons": comparisons.run}


@pytest.fixture
def run(tmp_path, artifact):
    """A function that runs one of the two stages on the same shard and returns (exit code, output folder)."""
    tiny_tokenizer().save_pretrained(tmp_path / "base" / "model")
    base = artifact("base")

    def call(name: str, rows=ROWS, run="demo", **config):
        given = HumanLabeler(labeler="human", store=str(tmp_path / "labels.db"), **config).model_dump(mode="json")
        config_file = tmp_path / f"{name}.json"
        write_json(config_file, {"stage": name, "seed": 0, "precision": "fp32", "config": given})
        inputs = {"base": base, "shard0": artifact("shard0", {"duplicates_removed": 0}, completions=rows)}
        if name == "comparisons":
            inputs |= {"data": artifact("data"), "tasks": tmp_path / run / "tasks/manifest.json"}
        arguments = [f"--config={config_file}", f"--output={tmp_path / run / name / 'manifest.json'}"]
        arguments += [f"--state={tmp_path / 'state' / name}", *(f"--input={role}={p}" for role, p in inputs.items())]
        return main(KINDS[name], arguments), tmp_path / run / name

    return call


def by_length(texts: list[str]) -> list[int]:
    lengths = sorted({-len(text) for text in texts})
    return [1 + lengths.index(-len(text)) for text in texts]


def answer(store: Store, labeler: str, most: int = 100) -> None:
    """Ranks at most `most` tasks by length: longer is better, equal lengths are a tie."""
    for _ in range(most):
        if (given := queue.next_task(store, labeler)) is None:
            return
        queue.submit(store, labeler, given.nonce, {"ranks": by_length(given.outputs), "seconds": 5})


def test_tasks_contain_only_what_people_see(run):
    code, folder = run("tasks")
    assert code == 0
    found = read_tasks(folder / "tasks.jsonl")
    assert [(task["split"], task["id"]) for task in found] == [
        ("heldout", "h0"),
        *(("reward", f"r{i}") for i in range(4)),
    ]
    assert found[0] == {
        "id": "h0",
        "kind": "ranking",
        "prompt": "Q h0",
        "completions": ROWS[0]["completions"],
        "draft": None,
        "gold": None,
        "split": "heldout",
    }
    assert json.loads((folder / "metrics.json").read_text()) == {
        "tasks": 5,
        "gold": 0,
        "by_split": {"heldout": 1, "reward": 4},
    }


def test_the_template_around_a_prompt_is_not_shown(run):
    messages = [{"role": "user", "content": "What is it?"}]
    prompt = tiny_tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    _, folder = run("tasks", [make_row(f"r{i}") | {"prompt": prompt, "messages": messages} for i in range(2)])
    assert {task["prompt"] for task in read_tasks(folder / "tasks.jsonl")} == {"What is it?"}


def test_the_stage_exits_with_75_until_the_quota_is_reached_and_then_exports_everything(run, tmp_path, capfd):
    run("tasks")
    capfd.readouterr()
    guidelines = tmp_path / "guidelines.md"
    guidelines.write_text("Be *kind*.")
    run = partial(run, guidelines=guidelines)
    code, folder = run("comparisons", overlap=2)
    said = capfd.readouterr().err
    assert (code, said.count("\n")) == (75, 1)
    path = tmp_path / "labels.db"
    assert said.startswith(
        "comparisons: waiting: for people: 0 of 10 rankings collected; start their page with "
        f"`tunetrail label serve --store {path}`"
    )
    assert not folder.exists()

    store = Store(str(path))
    answer(store, "human-1")
    assert run("comparisons", overlap=2)[0] == 75
    assert "5 of 10 rankings collected" in capfd.readouterr().err
    answer(store, "human-2", 3)
    answer(store, "human-3")
    assert run("comparisons", overlap=2)[0] == 0

    rows = read_jsonl(folder / "comparisons.jsonl")
    assert [len(row["rankings"]) for row in rows] == [2] * 5
    for row in rows:
        assert row["rankings"][0]["ranks"] == by_length(row["completions"])
    assert all(sorted(r["order"]) == [0, 1, 2] and r["time"] for row in rows for r in row["rankings"])
    labels = read_jsonl(folder / "labels.jsonl")
    assert len(labels) == 10
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["labelers"] == {f"human-{i}": {"rankings": n} for i, n in ((1, 5), (2, 3), (3, 2))}
    assert metrics["quality"]["agreement"]["mean"] == metrics["agreement"] == 1
    assert "longer_wins" in metrics.keys() - metrics["quality"].keys(), "one number must not have two definitions"

    # The chain in the artifact can be followed to its head without the store, and the record names it.
    head = START
    for line in (folder / "events.jsonl").read_bytes().splitlines():
        assert json.loads(line)["previous"] == head
        head = sha256_bytes(line)
    assert head == store.head()
    record = read_record(folder)
    about = record.annotations("labels")
    assert (about["chain_head"], about["events"]) == (head, 11)
    assert about["labelers"] == ["human-1", "human-2", "human-3"]
    assert about["guideline"] == [sha256_bytes(b"Be *kind*.")]
    assert set(record.parents) == {"base", "data", "shard0", "tasks"}
    # attempts that only waited for people are left out
    assert [attempt["ended"]["outcome"] for attempt in record.attempts] == ["done"]


def test_an_exported_label_set_does_not_change_until_more_labels_are_requested(run, tmp_path):
    run("tasks")
    store = Store(str(tmp_path / "labels.db"))
    run("comparisons")
    answer(store, "human-1")
    _, folder = run("comparisons")
    before = (folder / "manifest.json").read_bytes()
    assert queue.undo(store, "human-1")
    assert run("comparisons")[0] == 75  # an explicit rerun rebuilds the artifact
    assert (folder / "manifest.json").read_bytes() == before
    assert run("comparisons", overlap=2)[0] == 75
    answer(store, "human-1")
    answer(store, "human-2")
    assert run("comparisons", overlap=2)[0] == 0
    assert json.loads((folder / "metrics.json").read_text())["rankings"] == 10


def test_tasks_skipped_by_too_many_labelers_are_left_out(run, tmp_path, capfd):
    run("tasks")
    store = Store(str(tmp_path / "labels.db"))
    run("comparisons", skips=1)
    given = queue.next_task(store, "human-1")
    queue.skip(store, "human-1", given.nonce, {"reason": "broken"})
    answer(store, "human-1")
    code, folder = run("comparisons", skips=1)
    assert code == 0
    assert given.task["id"] not in {row["id"] for row in read_jsonl(folder / "comparisons.jsonl")}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["prompts"], metrics["left_out"], metrics["skips"]) == (4, 2, 1)  # and one prompt has one completion


def test_skipping_every_task_is_an_error(run, tmp_path, capfd):
    run("tasks")
    store = Store(str(tmp_path / "labels.db"))
    run("comparisons", skips=1)
    while given := queue.next_task(store, "human-1"):
        queue.skip(store, "human-1", given.nonce, {"reason": "broken"})
    assert run("comparisons", skips=1)[0] == 65
    assert "only 0 prompts of the reward split were ranked" in capfd.readouterr().err


def test_gold_answers_measure_quality_and_are_not_labels(run, tmp_path, capfd):
    gold = tmp_path / "gold.jsonl"
    write_jsonl(
        gold, [{"id": f"g{i}", "prompt": "p", "completions": ["a", "bb"], "gold": {"ranks": [2, 1]}} for i in range(2)]
    )
    run("tasks", gold=gold)
    options = {"gold": gold, "training": 1, "gold_every": 2}
    store = Store(str(tmp_path / "labels.db"))
    run("comparisons", **options)
    answer(store, "human-1")
    code, folder = run("comparisons", **options)
    assert code == 0
    labels = read_jsonl(folder / "labels.jsonl")
    assert [sum(row[key] for row in labels) for key in ("training", "gold")] == [1, 2]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["rankings"], metrics["quality"]["gold"]["mean"]) == (5, 1)
    (record,) = read_record(tmp_path / "demo/tasks").of_role("gold")
    assert record["digest"]["sha256"] == sha256_bytes(gold.read_bytes())

    write_jsonl(gold, [{"id": "g", "prompt": "p", "completions": ["a", "bb"]}])
    assert run("tasks", gold=gold)[0] == 65
    assert "gold.jsonl: task 'g' has no gold" in capfd.readouterr().err


def test_a_store_of_another_run_is_not_touched(run, tmp_path, capfd):
    run("tasks")
    run("comparisons")
    tasks_before = Store(str(tmp_path / "labels.db")).tasks()
    run("tasks", [make_row("x0"), make_row("x1")], run="other")
    assert run("comparisons", [make_row("x0"), make_row("x1")], run="other")[0] == 78
    assert "holds the tasks of the run demo; name another store" in capfd.readouterr().err
    assert Store(str(tmp_path / "labels.db")).tasks() == tasks_before


def test_a_store_with_tasks_of_no_run_is_not_touched(run, tmp_path, capfd):
    run("tasks")
    store = Store(str(tmp_path / "labels.db"))
    store.publish([ranking("a")])
    assert run("comparisons")[0] == 78
    assert "holds the tasks of `tunetrail label serve --tasks`; name another store" in capfd.readouterr().err
    assert [task["id"] for task in store.tasks()] == ["a"]


def test_completions_other_than_those_people_saw_are_refused(run, capfd):
    run("tasks")
    row = ROWS[0] | {"completions": ROWS[0]["completions"][::-1]}
    assert run("comparisons", [row, *ROWS[1:]])[0] == 65
    assert f"the completions of {row['id']} are not those" in capfd.readouterr().err


def test_a_run_does_not_wait_for_tasks_that_the_only_labeler_skipped(run, tmp_path, capfd):
    run("tasks")
    store = Store(str(tmp_path / "labels.db"))
    run("comparisons", overlap=2)
    assert "5 tasks need more labelers: `tunetrail label add`" in capfd.readouterr().err
    who, _ = access.add_labeler(store, "Ada")
    run("comparisons")
    assert "more labelers" not in capfd.readouterr().err
    queue.skip(store, who, queue.next_task(store, who).nonce, {"reason": "broken"})
    answer(store, who)
    assert run("comparisons")[0] == 0


def test_a_store_that_was_tampered_with_is_refused(run, tmp_path, capfd):
    run("tasks")
    run("comparisons")
    store = Store(str(tmp_path / "labels.db"))
    answer(store, "human-1")
    with store.database.engine.begin() as connection:
        connection.exec_driver_sql("DROP TRIGGER events_no_UPDATE")
        connection.exec_driver_sql(
            """UPDATE events SET content = replace(content, '"ranks":[', '"ranks":[ ') WHERE number = 3"""
        )
    assert run("comparisons")[0] == 65
    assert "event 3 is not what was written; restore it from a copy" in capfd.readouterr().err


def test_the_config_has_the_settings_of_the_page_with_the_same_defaults():
    config = HumanLabeler(labeler="human")
    ours = set(Settings.names()) - {"guidelines"}
    assert {name: getattr(config, name) for name in ours} == {name: getattr(Settings(), name) for name in ours}
