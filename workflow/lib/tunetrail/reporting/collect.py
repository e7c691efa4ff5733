"""Collects everything that the report shows: artifacts with their records, and the evaluated models."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tunetrail.errors import DataError, DiskError
from tunetrail.files import read_jsonl
from tunetrail.provenance import memory
from tunetrail.provenance.findings import Finding
from tunetrail.provenance.manifest import MANIFEST, METRICS, SIGNATURE, DigestCache, identity
from tunetrail.provenance.record import Record, read_record
from tunetrail.provenance.verify import Verifier

ORDER = (
    "base",
    "data",
    "sft",
    "completions",
    "tasks",
    "comparisons",
    "reward",
    "policy",
    "methods",
    "evaluation",
    "head_to_head",
)
"""The kinds of artifacts, upstream first."""
SIMULATED_LABELERS = ("simulated", "reward_model", "llm")
CHANGED = ("parent-changed", "parent-record-changed", "labels-changed", "source-changed", "base-moved", "import-moved")
"""Findings of the audit that make an artifact stale but not unsound."""
POLICY_COLOURS = 6
"""How many colours the palette has for policies; a seventh policy gets the first one again."""


def read_json(path: Path) -> Any:
    """The content of a JSON file; None if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


@dataclass
class Artifact:
    """One artifact folder with its record."""

    role: str
    folder: Path
    href: str
    """Relative path from the page to the folder."""
    manifest: str
    """sha256 of manifest.json."""
    metrics: dict
    record: Record | None
    """None if provenance.json is missing or not a record."""
    unsound: bool = False
    """Whether the audit found an error."""
    stale: list[str] = field(default_factory=list)
    """Roles of the parents that changed after this artifact was made."""

    @property
    def stage(self) -> str:
        return self.record.stage if self.record else self.role.partition(".")[0]

    @property
    def attempts(self) -> Sequence[Mapping[str, Any]]:
        return self.record.attempts if self.record else []

    @property
    def seconds(self) -> float | None:
        """The duration of all attempts, without killed ones, which could not write theirs."""
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

    @property
    def resumed_at(self) -> list[int]:
        """The steps from which attempts after the first resumed; 0 for an attempt that found no saved state."""
        states = [(a.get("state_in") or {}).get("name", "") for a in self.attempts[1:]]
        return [int(step) if (step := name.rpartition("-")[2]).isdigit() else 0 for name in states]

    @cached_property
    def history(self) -> list[dict]:
        path = self.folder / "history.jsonl"
        return read_jsonl(path) if path.exists() else []


@dataclass
class Model:
    """An evaluated model."""

    name: str
    """Its name on the page; on a page with several runs it starts with the run's name."""
    series: str
    """`base`, `sft`, `p0` … `p5`: the name of its colour."""
    artifact: Artifact
    """Its evaluation."""
    samples: list[dict]
    sentence: list[dict]
    preferences: list[dict]
    sentence_in_sft_rows: int = 0
    """How many rows of the sft split contain the probe sentence."""
    trained: Artifact | None = None
    """The policy; None for base and sft."""

    @property
    def subject(self) -> str:
        """Its name in its run."""
        return self.artifact.role.partition(".")[2]

    @property
    def best_of(self) -> int | None:
        """n, for best-of-n."""
        return self.trained.config.get("n") if self.trained else None

    @property
    def metrics(self) -> dict:
        return self.artifact.metrics

    def interval(self, key: str) -> dict | None:
        return self.metrics.get(key)


@dataclass
class Run:
    """Everything that the report shows about a run."""

    name: str
    artifacts: dict[str, Artifact]
    """By role, upstream first: the report's inputs, and artifacts known only from records (shards of completions)."""
    parents: dict[str, dict[str, str]]
    """Role -> role of each parent -> the role of that parent as the artifact's input."""
    audit: list[Finding]
    """The findings of the audit."""
    signed: bool
    """Whether every artifact is signed."""
    models: list[Model]
    """base, sft, then the policies in the order of the config."""

    def metrics(self, role: str) -> dict | None:
        artifact = self.artifacts.get(role)
        return artifact.metrics if artifact else None

    def model(self, name: str) -> Model | None:
        return next((m for m in self.models if m.subject == name), None)

    @property
    def policies(self) -> list[Model]:
        return [m for m in self.models if m.subject not in ("base", "sft")]

    @property
    def head_to_head(self) -> dict:
        """The metrics of the head-to-head comparison; empty if there is none."""
        return self.metrics("head_to_head") or {}

    @property
    def reference(self) -> str:
        """The model that policies start from and are compared with: sft, or base if no sft was trained."""
        return self.head_to_head.get("reference") or ("sft" if self.model("sft") else "base")

    def match_of(self, model: Model, kind: str = "sampled") -> dict | None:
        """The model against the reference, from the head-to-head comparison; None if they were not compared.

        Args:
            kind: the compared responses, `sampled` or `greedy`.
        """
        for pair in (self.head_to_head.get(kind) or {}).get("pairs", []):
            sides = pair["first"], pair["second"]
            if sides == (model.subject, self.reference):
                return pair
            if sides == (self.reference, model.subject):
                return reversed_pair(pair)
        return None

    def forgotten(self, model: Model) -> dict:
        """How the model differs from base on unrelated text, `nll` and `choices`; empty if it was not measured."""
        pairs = self.head_to_head.get("forgetting") or []
        return next((pair for pair in pairs if (pair["first"], pair["second"]) == (model.subject, "base")), {})

    @cached_property
    def shifts(self) -> list[dict]:
        """Next-token probabilities of the probe sentence before and after each training."""
        artifact = self.artifacts.get("head_to_head")
        return (read_json(artifact.folder / "probes.json") or {}).get("pairs", []) if artifact else []

    @property
    def labeler(self) -> str | None:
        """The kind of labeler that ranked the comparisons; None if none were collected."""
        artifact = self.artifacts.get("comparisons")
        if artifact is None:
            return None
        if kind := artifact.config.get("labeler"):
            return kind
        kinds = {re.sub(r"-\d+$", "", name) for name in artifact.metrics.get("labelers") or {}}
        if not kinds:
            return "not recorded"
        return next((kind for kind in (*SIMULATED_LABELERS, "human") if kind in kinds), "recorded")

    def findings(self, artifact: Artifact) -> list[Finding]:
        """The audit's findings about one artifact."""
        return [finding for finding in self.audit if finding.folder == str(artifact.folder.resolve())]

    @property
    def memory(self) -> list[str]:
        """What its stages took of memory, next to what they planned."""
        return memory.as_lines({name: a.record for name, a in self.artifacts.items() if a.record})

    @property
    def device_hours(self) -> float:
        return sum(a.record.usage["device_hours"] for a in self.artifacts.values() if a.record)

    @property
    def seconds(self) -> float | None:
        known = [a.seconds for a in self.artifacts.values() if a.seconds is not None]
        return sum(known) if known else None

    @property
    def unknown_attempts(self) -> int:
        """How many attempts were killed, so that their duration is unknown."""
        return sum(a.get("seconds") is None for artifact in self.artifacts.values() for a in artifact.attempts)


def reference_of(runs: Sequence[Run]) -> str:
    """The models that a page's policies are compared with, in words."""
    return " or ".join(dict.fromkeys(run.reference for run in runs))


def reversed_pair(pair: dict) -> dict:
    """A pair of the head-to-head comparison from the other model's side; its tests stay the same."""
    ends = {"mean": "mean", "low": "high", "high": "low"}
    counts = {"wins": "losses", "losses": "wins"}

    def reverse(value: dict | None, whole: int) -> dict | None:
        if value is None:
            return None
        reversed_ends = {a: whole - value[b] for a, b in ends.items()}
        return value | reversed_ends | {a: value[b] for a, b in counts.items() if b in value}

    values = {key: reverse(pair[key], 1) for key in ("win_rate", "length_controlled")}
    values["difference"] = reverse(pair["difference"], 0)
    return pair | values | {"first": pair["second"], "second": pair["first"]}


def load(role: str, folder: Path, page: Path) -> Artifact:
    """Reads an artifact.

    Args:
        page: the folder that the page will be in.
    """
    try:
        record = read_record(folder)
    except (DataError, DiskError):
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
    """The edges of the DAG according to the records; adds parents that are not inputs of the report to `artifacts`.

    A parent is identified by its manifest digest, since the run may have been moved, or else by its path: then its
    manifest has changed, and the child is stale.
    """
    parents: dict[str, dict[str, str]] = {}
    todo = list(artifacts)
    while todo:
        role = todo.pop(0)
        child, parents[role] = artifacts[role], {}
        for their_role, parent in sorted((child.record.parents if child.record else {}).items()):
            folder = child.folder / parent["name"]
            at_path = next((a for a in artifacts.values() if a.folder.resolve() == folder.resolve()), None)
            same = [a for a in artifacts.values() if a.manifest == parent["manifest"]]
            artifact = at_path if at_path in same or not same else same[0]
            if artifact is None and (folder / MANIFEST).exists():
                artifact = load("", folder, page)
                number = sum(a.stage == artifact.stage for a in artifacts.values())
                artifact.role = f"{artifact.stage}.{number}"
                artifacts[artifact.role] = artifact
                todo.append(artifact.role)
            if artifact is not None:
                parents[role][artifact.role] = their_role
                if artifact.manifest != parent["manifest"]:
                    child.stale.append(artifact.role)
    return parents


def kind(role: str) -> str:
    """The entry of ORDER that a role belongs to."""
    start = role.partition(".")[0]
    return {"retention": "data", "lm_eval": "head_to_head"}.get(start, start if start in ORDER else "policy")


def collect(name: str, inputs: dict[str, Path], page: Path, cache: DigestCache) -> Run:
    """Reads a run.

    Args:
        inputs: role -> folder of the artifacts that the page is about.
        page: the folder that the page will be in.
        cache: digests of files that have not changed since they were hashed.
    """
    artifacts = {role: load(role, folder, page) for role, folder in inputs.items()}
    parents = link(artifacts, page)
    evaluated = [role.partition(".")[2] for role in inputs if role.startswith("evaluation.")]
    policies = [subject for subject in evaluated if subject not in ("base", "sft")]
    models = []
    for subject in [n for n in ("base", "sft") if n in evaluated] + policies:
        artifact = artifacts[f"evaluation.{subject}"]
        probes = read_json(artifact.folder / "probes.json") or {}
        samples = artifact.folder / "samples.jsonl"
        models.append(
            Model(
                name=subject,
                series=subject if subject in ("base", "sft") else f"p{policies.index(subject) % POLICY_COLOURS}",
                artifact=artifact,
                samples=read_jsonl(samples) if samples.exists() else [],
                sentence=probes.get("sentence") or [],
                preferences=probes.get("preferences") or [],
                sentence_in_sft_rows=probes.get("sentence_in_sft_rows") or 0,
                trained=artifacts.get(f"policy.{subject}"),
            )
        )
    artifacts = dict(sorted(artifacts.items(), key=lambda item: ORDER.index(kind(item[0]))))
    # Without the ledger: a run is sealed after it has ended, and this page is part of the run.
    audit = Verifier(cache=cache, recursive=True, ledger=False).run(list(inputs.values())).findings
    unsound = {f.folder for f in audit if f.severity == "error" and f.name not in CHANGED}
    for artifact in artifacts.values():
        artifact.unsound = str(artifact.folder.resolve()) in unsound
    signed = all((a.folder / SIGNATURE).exists() for a in artifacts.values())
    return Run(name, artifacts, parents, audit, signed, models)


def inputs_of(run: Path) -> dict[str, Path]:
    """Role -> folder of the artifacts below `results/<run>`, as the report's rule names them. Raises DataError."""
    single = ("base", "data", "sft", "comparisons", "reward", "retention", "methods", "head_to_head")
    folders = {name: run / name for name in single}
    for role, name in (("policy", "policies"), ("evaluation", "evaluation"), ("lm_eval", "lm_eval")):
        folders |= {f"{role}.{path.name}": path for path in sorted((run / name).glob("*/"))}
    folders = {role: path for role, path in folders.items() if (path / MANIFEST).exists()}
    if not any(role.startswith("evaluation.") for role in folders):
        raise DataError(f"{run}: no model of this run has been evaluated; name a folder such as results/demo")
    return folders


def together(runs: list[Run]) -> list[Run]:
    """Gives the models of several runs names and colours that distinguish them; returns the runs."""
    policies = [model for run in runs for model in run.policies]
    for i, model in enumerate(policies):
        model.series = f"p{i % POLICY_COLOURS}"
    for run in runs:
        for model in run.models:
            model.name = f"{run.name}-{model.subject}"
    return runs
