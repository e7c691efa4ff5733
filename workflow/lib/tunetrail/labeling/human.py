"""People rank on the page of `tunetrail label serve`.

The tasks that the stage `tasks` wrote are published in the store; publishing the current tasks again does nothing. Once
every task has its quota of rankings the answers are exported, and the artifact holds, next to its comparisons,

    labels.jsonl   every current answer (`Label`), including those that do not count: gold tasks, training, repeats and
                   skips
    events.jsonl   the whole chain of events up to then, one per line; each event holds the sha256 of the line before
                   it, and the sha256 of the last line is the chain's head, which the record of everything learnt from
                   the labels holds

Until then Waiting is raised. Neither file holds labelers' names; they are known by pseudonyms.
"""

from dataclasses import asdict

from tunetrail.config.comparisons import HumanLabeler
from tunetrail.contract.stage import Stage
from tunetrail.errors import ConfigError, DataError, Waiting
from tunetrail.files import write_jsonl
from tunetrail.labeling.app.events import Event
from tunetrail.labeling.app.store import RUN, Progress, Settings, Store
from tunetrail.labeling.labels import Label, Labels, RankedLabel, by_task, counted
from tunetrail.labeling.quality import measure
from tunetrail.labeling.tasks import Task
from tunetrail.preferences.rows import Ranking, SampledRow
from tunetrail.provenance.manifest import canonical


def settings_of(config: HumanLabeler) -> Settings:
    """The settings that tasks are published with. Raises ConfigError."""
    try:
        guidelines = config.guidelines.read_text(encoding="utf-8") if config.guidelines else ""
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"comparisons.guidelines: {config.guidelines}: cannot be read ({e})") from None
    return Settings.of(config.model_dump(include=set(Settings.names())) | {"guidelines": guidelines})


def claim(store: Store, run: str) -> None:
    """Raises ConfigError if the store holds tasks of another run, or of no run, which publishing would withdraw."""
    if (other := store.noted(RUN)) != run and store.tasks():
        whose = f"the run {other}" if other else "`tunetrail label serve --tasks`"
        raise ConfigError(f"comparisons.store: {store.database.shown} holds the tasks of {whose}; name another store")
    store.note(RUN, run)


def snapshot(store: Store) -> tuple[str, list[Event], list[Label], Progress]:
    """(head, events, labels, progress), all from the same moment while people keep ranking."""
    while True:
        head = store.head()
        current = head, list(store.events()), store.labels(), store.progress()
        if store.head() == head:
            return current


def ranking_of(label: RankedLabel) -> Ranking:
    """A label as the ranking of a comparison row."""
    return {
        "labeler": label["labeler"],
        "ranks": label["ranks"],
        "order": label["shown"],
        "time": label["at"],
        "scores": None,
    }


def rank(rows: list[SampledRow], config: HumanLabeler, stage: Stage) -> Labels:
    """Publishes the tasks, and exports the labels once they are complete.

    Raises:
        Waiting: the quota is not reached.
        ConfigError: the store belongs to another run, or a setting is wrong.
        DataError: the store was tampered with, or the completions are not those of the tasks.
    """
    store = Store(config.store)
    tasks: list[Task] = stage.rows("tasks", "tasks.jsonl")  # type: ignore[assignment]
    settings = settings_of(config)
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
            f"for people: {progress['have']} of {progress['wanted']} rankings collected; start their page with "
            f"`tunetrail label serve --store {config.store}`, and run the same command again when they have "
            f"finished{stuck}"
        )
    write_jsonl(stage.work / "labels.jsonl", labels)  # type: ignore[arg-type]
    (stage.work / "events.jsonl").write_bytes(b"".join(canonical(event) + b"\n" for event in events))
    training_data = counted(labels)
    answers, numbers = by_task(training_data), {label["event"] for label in training_data}
    guidelines = {event["guidelines"] for event in events if event["number"] in numbers}
    quality = measure(labels, tasks)
    # The stage measures longer_wins for every labeler, and counts completions of equal length as well.
    metrics = {name: value for name, value in quality.items() if name != "longer_wins"}
    return Labels(
        [[ranking_of(label) for label in answers.get(row["id"], [])] for row in rows],
        metrics={"quality": metrics | {"outliers": len(quality["outliers"])}, "skips": progress["skips"]},
        source={
            "events": len(events),
            "chain_head": head,
            "guideline": sorted(guidelines - {Settings().guidelines_digest}),
        },
    )
