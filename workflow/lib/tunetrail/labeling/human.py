"""People who rank on a page of their own: `tunetrail label serve`.

The tasks that the stage `tasks` wrote are published in the store, which does nothing where they are the ones that are
on. Once every task has its quota of rankings the answers are exported, and the artifact holds beside its comparisons

    labels.jsonl   every current answer as `Store.labels` gives it, with those that do not count: gold tasks, training,
                   repeats and skips
    events.jsonl   the whole chain of events up to then, a line each; the sha256 of a line is named by the next one, and
                   that of the last is the chain's head, which the record of everything learnt from the labels holds

Until then Waiting is raised. Names of labelers are in neither; they are known by pseudonyms.
"""

from dataclasses import asdict

from tunetrail.config.comparisons import HumanLabeler
from tunetrail.contract.stage import Stage
from tunetrail.errors import ConfigError, DataError, Waiting
from tunetrail.files import write_jsonl
from tunetrail.labeling.app.store import RUN, Settings, Store
from tunetrail.labeling.labels import Labels
from tunetrail.labeling.quality import by_task, counted, measure
from tunetrail.provenance.manifest import canonical


def settings_of(config: HumanLabeler, seed: int) -> Settings:
    """The settings that tasks are published with. Raises ConfigError."""
    try:
        guidelines = config.guidelines.read_text(encoding="utf-8") if config.guidelines else ""
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"comparisons.guidelines: {config.guidelines}: cannot be read ({e})") from None
    return Settings.of(config.model_dump(include=set(Settings.names())) | {"guidelines": guidelines, "seed": seed})


def claim(store: Store, run: str) -> None:
    """Raises ConfigError where the store holds the tasks of another run or of no run, whose labelers would lose theirs."""
    if (other := store.noted(RUN)) != run and store.tasks():
        whose = f"the run {other}" if other else "`tunetrail label serve --tasks`"
        raise ConfigError(f"comparisons.store: {store.database.shown} holds the tasks of {whose}; name another store")
    store.note(RUN, run)


def snapshot(store: Store) -> tuple[str, list[dict], list[dict], dict]:
    """(head, events, labels, progress), all of one moment though people go on."""
    while True:
        head = store.head()
        found = head, list(store.events()), store.labels(), store.progress()
        if store.head() == head:
            return found


def ranking_of(label: dict) -> dict:
    """A label as the ranking of a comparison row."""
    return {
        "labeler": label["labeler"],
        "ranks": label["ranks"],
        "order": label["shown"],
        "time": label["at"],
        "scores": None,
    }


def rank(rows: list[dict], config: HumanLabeler, stage: Stage) -> Labels:
    """Raises Waiting before the quota is reached, ConfigError, and DataError for a store that was tampered with or
    completions that are not those of the tasks."""
    store = Store(config.store)
    tasks = stage.rows("tasks", "tasks.jsonl")
    settings = settings_of(config, stage.seed)
    shown = {task["id"]: task["completions"] for task in tasks}
    if other := next((row["id"] for row in rows if shown.get(row["id"]) != row["completions"]), None):
        raise DataError(
            f"tasks: the completions of {other} are not those of the shards; delete the tasks' folder and run again"
        )
    if fault := store.fault():
        raise DataError(f"comparisons.store: {config.store}: {fault}; restore it from a copy")
    claim(store, stage.output.parent.name)
    store.publish(tasks, asdict(settings))
    head, events, labels, progress = snapshot(store)
    if not progress["settled"]:
        stuck = f"; {progress['stuck']} tasks need more labelers: `tunetrail label add`" if progress["stuck"] else ""
        raise Waiting(
            f"for people: {progress['have']} of {progress['wanted']} rankings are there; start their page with `tunetrail "
            f"label serve --store {config.store}`, and run the same command again when they have finished{stuck}"
        )
    write_jsonl(stage.work / "labels.jsonl", labels)
    (stage.work / "events.jsonl").write_bytes(b"".join(canonical(event) + b"\n" for event in events))
    count = counted(labels)
    answers, numbers = by_task(count), {label["event"] for label in count}
    measured = measure(labels, tasks)
    measured["outliers"] = len(measured["outliers"])
    del measured["longer_wins"]  # the stage says it of every labeler, and counts texts of one length too
    return Labels(
        [[ranking_of(label) for label in answers.get(row["id"], [])] for row in rows],
        metrics={"quality": measured, "skips": progress["skips"]},
        source={
            "events": len(events),
            "chain_head": head,
            "guideline": sorted(
                {e["guidelines"] for e in events if e["number"] in numbers} - {Settings().guidelines_digest}
            ),
        },
    )
