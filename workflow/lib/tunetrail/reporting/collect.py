"""Reads everything the report shows: artifacts with their records, and the models that were evaluated."""

import json
import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tunetrail.contract import Stage, read_jsonl
from tunetrail.errors import DataError
from tunetrail.provenance.manifest import MANIFEST, METRICS, PROVENANCE, identity
from tunetrail.provenance.picture import svg
from tunetrail.provenance.record import Record, read_record
from tunetrail.provenance.verify import Finding, Verifier

ORDER = ("base", "data", "sft", "completions", "tasks", "comparisons", "reward", "policy", "evaluation")
"""The kinds of artifacts, upstream first."""
SIMULATED_LABELERS = ("reference", "reward_model", "llm")
POLICY_COLOURS = 6
"""Distinct colours for policies in the palette; a seventh policy takes the first one again."""


def read_json(path: Path) -> Any:
    """The content of a JSON file; None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


@dataclass
class Artifact:
    """One artifact folder with its record."""

    role: str
    folder: Path
    href: str
    """From the page to the folder, relative."""
    manifest: str
    """sha256 of manifest.json."""
    metrics: dict
    record: Record | None
    """None where provenance.json is missing or no record."""
    unsound: bool = False
    """Whether the audit found an error."""
    stale: list[str] = field(default_factory=list)
    """Roles of the parents that changed after this artifact was made."""

    @property
    def stage(self) -> str:
        return self.record.stage if self.record else self.role.partition(".")[0]

    @property
    def attempts(self) -> list[dict]:
        return self.record.attempts if self.record else []

    @property
    def seconds(self) -> float | None:
        """Time of all attempts; a killed attempt could not write how long it took and counts for nothing."""
        known = [a["seconds"] for a in self.attempts if a.get("seconds") is not None]
        return sum(known) if known else None

    @property
    def config(self) -> dict:
        return self.record.config if self.record else {}

    @property
    def state(self) -> str:
        """`done`, `resumed` (more than one attempt), `stale` (a parent has changed), `altered` or `unrecorded`."""
        if self.record is None:
            return "unrecorded"
        if self.unsound:
            return "altered"
        if self.record.manifest != self.manifest:
            return "altered"
        if self.stale:
            return "stale"
        return "resumed" if len(self.attempts) > 1 else "done"

    @cached_property
    def history(self) -> list[dict]:
        path = self.folder / "history.jsonl"
        return read_jsonl(path) if path.exists() else []


@dataclass
class Model:
    """A model that was evaluated."""

    name: str
    series: str
    """`base`, `sft`, `p0` … `p5`: its colour everywhere."""
    artifact: Artifact
    samples: list[dict]
    sentence: list[dict]
    preferences: list[dict]
    best_of: int | None
    """n of best-of-n."""

    @property
    def metrics(self) -> dict:
        return self.artifact.metrics

    def interval(self, key: str) -> dict | None:
        return self.metrics.get(key)


@dataclass
class Run:
    """All the report shows."""

    name: str
    artifacts: dict[str, Artifact]
    """By role, upstream first: the inputs, and what was found only through a record (completions shards)."""
    parents: dict[str, dict[str, str]]
    """Role -> the roles it was made from -> what they were to it."""
    audit: list[Finding]
    """What does not hold, or may not please a policy."""
    picture: str
    """SVG of the lineage."""
    models: list[Model]
    """base, sft, then the policies in the order of the config."""

    def metrics(self, role: str) -> dict | None:
        artifact = self.artifacts.get(role)
        return artifact.metrics if artifact else None

    def model(self, name: str) -> Model | None:
        return next((m for m in self.models if m.name == name), None)

    @property
    def policies(self) -> list[Model]:
        return [m for m in self.models if m.series not in ("base", "sft")]

    @property
    def labeler(self) -> str | None:
        """What kind of labeler ranked the comparisons; None where none were collected."""
        artifact = self.artifacts.get("comparisons")
        if artifact is None:
            return None
        if kind := artifact.config.get("labeler"):
            return kind
        kinds = {re.sub(r"-\d+$", "", name) for name in artifact.metrics.get("labelers") or {}}
        return next((kind for kind in SIMULATED_LABELERS if kind in kinds), "recorded")

    def findings(self, artifact: Artifact) -> list[Finding]:
        """What the audit found about one artifact."""
        return [finding for finding in self.audit if finding.folder == str(artifact.folder.resolve())]

    @property
    def device_hours(self) -> float:
        return sum(a.record.usage["device_hours"] for a in self.artifacts.values() if a.record)

    @property
    def seconds(self) -> float | None:
        known = [a.seconds for a in self.artifacts.values() if a.seconds is not None]
        return sum(known) if known else None

    @property
    def unknown_attempts(self) -> int:
        """Attempts whose length nobody could write down."""
        return sum(a.get("seconds") is None for artifact in self.artifacts.values() for a in artifact.attempts)


def load(role: str, folder: Path, page: Path) -> Artifact:
    """
    Args:
        page: folder the page will be in.
    """
    try:
        record = read_record(folder)
    except DataError:
        record = None
    return Artifact(
        role=role,
        folder=folder,
        href=Path(os.path.relpath(folder, page)).as_posix() + "/",
        manifest=identity(folder),
        metrics=read_json(folder / METRICS) or {},
        record=record,
    )


def link(artifacts: dict[str, Artifact], page: Path) -> dict[str, dict[str, str]]:
    """The edges of the DAG as the records state them; adds the parents that are no inputs of the report.

    A parent is known by its manifest digest (the run may have been moved), else by its path: then its
    manifest is another by now, and the child is stale.
    """
    parents: dict[str, dict[str, str]] = {}
    todo = list(artifacts)
    while todo:
        role = todo.pop(0)
        child, parents[role] = artifacts[role], {}
        for their_role, parent in sorted((child.record.parents if child.record else {}).items()):
            folder = child.folder / parent["name"]
            there = next((a for a in artifacts.values() if a.folder.resolve() == folder.resolve()), None)
            same = [a for a in artifacts.values() if a.manifest == parent["manifest"]]
            found = there if there in same or not same else same[0]
            if found is None and (folder / MANIFEST).exists():
                found = load("", folder, page)
                number = sum(a.stage == found.stage for a in artifacts.values())
                found.role = f"{found.stage}.{number}"
                artifacts[found.role] = found
                todo.append(found.role)
            if found is not None:
                parents[role][found.role] = their_role
                if found.manifest != parent["manifest"]:
                    child.stale.append(found.role)
    return parents


def kind(role: str) -> str:
    """The one of ORDER that a role belongs to."""
    start = role.partition(".")[0]
    return "data" if start == "retention" else start if start in ORDER else "policy"


def collect(stage: Stage) -> Run:
    """Reads the inputs of the report stage."""
    artifacts = {role: load(role, folder, stage.output) for role, folder in stage.inputs.items()}
    parents = link(artifacts, stage.output)
    evaluated = [role.partition(".")[2] for role in stage.inputs if role.startswith("evaluation.")]
    policies = [name for name in evaluated if name not in ("base", "sft")]
    models = []
    for name in [n for n in ("base", "sft") if n in evaluated] + policies:
        artifact = artifacts[f"evaluation.{name}"]
        probes = read_json(artifact.folder / "probes.json") or {}
        samples = artifact.folder / "samples.jsonl"
        trained = artifacts.get(f"policy.{name}")
        models.append(
            Model(
                name=name,
                series=name if name in ("base", "sft") else f"p{policies.index(name) % POLICY_COLOURS}",
                artifact=artifact,
                samples=read_jsonl(samples) if samples.exists() else [],
                sentence=probes.get("sentence") or [],
                preferences=probes.get("preferences") or [],
                best_of=trained.config.get("n") if trained else None,
            )
        )
    artifacts = dict(sorted(artifacts.items(), key=lambda item: ORDER.index(kind(item[0]))))
    verifier = Verifier(cache=stage.cache, recursive=True, ledger=False)
    verdict = verifier.run(list(stage.inputs.values()))
    audit = verdict.findings  # the run is sealed when it has ended, and this page is of the run
    changed = (
        "parent-changed",
        "parent-record-changed",
        "labels-changed",
        "source-changed",
        "base-moved",
    )  # it is stale
    unsound = {f.folder for f in audit if f.severity == "error" and f.name not in changed}
    for artifact in artifacts.values():
        artifact.unsound = str(artifact.folder.resolve()) in unsound
    picture = svg(
        verifier.nodes, {Path(f.folder) for f in audit if f.folder and f.severity == "error"},
        {a.folder.resolve(): f"{a.href}{PROVENANCE}" for a in artifacts.values()},
    )  # fmt: skip
    return Run(stage.output.parent.name, artifacts, parents, audit, picture, models)
