"""Compares every record with everything that it names: inputs, outside data, saved states, the run's config."""

import os
from itertools import pairwise
from pathlib import Path

from tunetrail.errors import DataError
from tunetrail.files import canonical_json, changed, flatten, parse_json, read_regular
from tunetrail.provenance.findings import VerifyResult
from tunetrail.provenance.hub import resolved_revision
from tunetrail.provenance.lineage import Node, Runs
from tunetrail.provenance.manifest import METRICS, NOT_A_FILE, PROVENANCE, is_canonical, sha256_file
from tunetrail.provenance.record import Record, exact_integers
from tunetrail.provenance.run_folder import config_of
from tunetrail.provenance.schema import RecordedParent
from tunetrail.provenance.signing import TrustPolicy
from tunetrail.terminal import escape

MODELS = {"base": "base-moved", "sft": "import-moved", "reward": "import-moved", "scorer": "import-moved"}
"""Role of models from outside the run, and of the user's own scorers -> what it means if they differ."""
OUTSIDE = {"labels": "labels-changed"} | MODELS
"""Role of files from outside the run -> what it means if they differ; of any other role they are a source."""
MACHINE = ("cpu", "gpus", "driver", "python", "torch", "world_size", "code", "packages")
"""Keys of an attempt that should not change from one attempt to the next."""


class RecordCheck:
    """Compares records with everything that they name and notes differences.

    Args:
        recursive: also compare inputs, raw data and labels.
    """

    def __init__(self, result: VerifyResult, policy: TrustPolicy, runs: Runs, recursive: bool):
        self.result, self.policy, self.runs, self.recursive = result, policy, runs, recursive
        self._digests: dict[Path, str | None] = {}

    def run(self, node: Node) -> None:
        record = node.record
        if record is None:
            exists = os.path.lexists(node.folder / PROVENANCE)
            wrong = "record-edited" if exists else "record-missing"
            self.result.add(wrong if isinstance(node.fault, DataError) else "unreadable", node, str(node.fault))
            return
        if not is_canonical(record.statement, record.content):
            self.result.add("record-edited", node, f"{PROVENANCE} is not in canonical form; restore it from a copy")
        if self.recursive:
            for role, recorded in record.parents.items():
                self._parent(node, role, recorded)
            self._outside_files(node, record)
            self._revisions(node, record)
        self._manifest(node, record)
        self._place(node, record)
        self._code(node, record)
        self._states(node, record)
        self._machines(node, record)
        self._config(node, record)

    def _manifest(self, node: Node, record: Record) -> None:
        """Compares what the record and the manifest both state."""
        if node.manifest is None:
            return
        metrics = next((entry["sha256"] for entry in node.manifest["files"] if entry["path"] == METRICS), None)
        for what, said, found in (
            ("stage", record.stage, node.manifest.get("stage")),
            ("tokenizer", record.tokenizer, node.manifest.get("tokenizer")),
            (METRICS, record.metrics, metrics),
        ):
            if said != found:
                message = f"{what} is {str(said)[:16]} by the record and {str(found)[:16]} by the manifest"
                self.result.add("record-contradicts", node, f"{message}; restore both from a copy")

    def _place(self, node: Node, record: Record) -> None:
        """Compares where the artifact is with where it was made. A run may be renamed, a single artifact may not."""
        run = self.runs.of(node.folder)
        if run is None:
            return
        if record.place is None:
            self.result.add("place-unknown", node, "run its stage again to have it recorded")
        elif record.place.artifact != (here := node.folder.relative_to(run).as_posix()):
            message = f"it was made as {record.place.artifact} and lies at {here}; move it back"
            self.result.add("place-changed", node, message)
        elif record.place.run not in (made := self.runs.made_as(run), run.name):
            message = f"it was made in the run {record.place.run}, the others here in {made}; restore it from a copy"
            self.result.add("place-changed", node, message)

    def _parent(self, node: Node, role: str, recorded: RecordedParent) -> None:
        parent, then = node.parents.get(role), f"manifest {recorded['manifest'][:16]}…"
        if parent is None and self.runs.of(node.folder) is None and not any(node.parents.values()):
            # A copy of artifacts without their run.
            where = os.path.normpath(node.folder / recorded["name"])
            message = f"{role} ({where}, {then}) is not there; copy it too, or verify the run it was made in"
            self.result.add("parent-elsewhere", node, message)
        elif parent is None:
            message = f"{role} ({recorded['name']}, {then}) is not there; restore it from a copy"
            self.result.add("parent-missing", node, message)
        elif parent.is_unreadable:
            return  # a finding about the parent
        elif parent.identity != recorded["manifest"]:
            now = f"{parent.name} is {parent.identity[:16]}… now"
            message = f"{role} was {then}, {now}; run this stage again, or restore what it was made from"
            self.result.add("parent-changed", node, message)
        elif recorded["record"] and not self._has_record(parent, recorded):
            message = f"the record of {role} ({parent.name}) is not the one it had then"
            self.result.add("parent-record-changed", node, message)

    def _has_record(self, parent: Node, recorded: RecordedParent) -> bool:
        """Whether a parent's record is the recorded one, or both were sealed because its stage ran again with equal
        bytes."""
        if parent.record is None:
            return False
        if parent.record.digest == recorded["record"]:
            return True
        run = self.runs.of(parent.folder)
        if run is None:
            return False
        name = parent.folder.relative_to(run).as_posix()
        sealed = {(e["manifest"], e["record"]) for e in self.runs.ledger(run).by_artifact.get(name, [])}
        return {(recorded["manifest"], recorded["record"]), (parent.identity, parent.record.digest)} <= sealed

    def _outside_files(self, node: Node, record: Record) -> None:
        """Raw data, labels, local models and scorers, as far as they are still where they were read."""
        for role, dependency in zip(record.roles, record.dependencies, strict=True):
            finding = OUTSIDE.get(role, "source-changed")
            for name, expected in dependency["annotations"].get("files", {}).items():
                path = Path(os.path.normpath(node.folder / name))
                digest = self._digest(path)
                if digest is None:
                    self.result.not_at_hand.add(escape(path))
                elif digest != expected:
                    message = f"{path} is not what was read when this was made; run the stages from there again, or "
                    self.result.add(finding, node, f"{message}restore it")

    def _digest(self, path: Path) -> str | None:
        """sha256 of a file that many records may name; None if there is no file that may be read.

        Files of the kernel may not be read: they may be endless, or reading them may do something.
        """
        if path not in self._digests:
            try:
                is_kernels = os.path.realpath(path).startswith(("/proc/", "/sys/", "/dev/"))
                self._digests[path] = None if is_kernels else sha256_file(path)
            except (OSError, ValueError):  # no file can have this name
                self._digests[path] = None
        return self._digests[path]

    def _revisions(self, node: Node, record: Record) -> None:
        for finding, dependency in [(MODELS[role], found) for role in MODELS for found in record.of_role(role)]:
            revision, commit = dependency["annotations"].get("revision"), dependency["annotations"].get("commit")
            now = resolved_revision(dependency.get("name", ""), revision) if revision else None
            if now and commit and now != commit:
                change = f"{dependency['name']}@{revision} was commit {commit[:12]}, it is {now[:12]} now"
                self.result.add(finding, node, f"{change}; pin the commit")

    def _code(self, node: Node, record: Record) -> None:
        code = record.code
        if not code.get("dirty") or self.policy.allow_dirty is True:
            return
        commit = (code.get("commit") or "")[:12]
        untracked = f", {len(code['untracked'])} untracked files" if code.get("untracked") else ""
        has_diff = any(b.get("name") == "code.diff" and "content" in b for b in record.run.get("byproducts", []))
        diff = "; the record has the diff" if has_diff else ""
        finding = "dirty-tree" if self.policy.allow_dirty is None else "policy-dirty"
        self.result.add(finding, node, f"the code differed from commit {commit}{untracked}{diff}")

    def _states(self, node: Node, record: Record) -> None:
        """Checks that attempts chain: each resumes from a state that an earlier one saved."""
        saved: set[str] = set()
        for attempt in record.attempts:
            state = attempt.get("state_in")
            if state is not None and state["digest"] not in saved:
                message = (
                    f"the attempt of {attempt['start']} went on from {state['name']} ({state['digest'][:16]}…), "
                    "which the attempt before it did not leave"
                )
                self.result.add("state-swapped", node, message)
            if "states_out" in attempt:  # the last two: an attempt never goes back further
                saved = {state["digest"] for state in attempt["states_out"]}

    def _machines(self, node: Node, record: Record) -> None:
        for before, after in pairwise(record.attempts):
            for key in MACHINE:
                values = before.get(key), after.get(key)
                if values[0] != values[1] and None not in values:
                    message = f"{key} changed between attempts: {values[0]}, then {values[1]}"
                    self.result.add("mixed-environment", node, message)

    def _config(self, node: Node, record: Record) -> None:
        """Compares the config that the artifact was made with to the run's current one."""
        run = self.runs.of(node.folder)
        path = config_of(run, node.folder.relative_to(run).as_posix()) if run else None
        if run is None or path is None:
            return
        name = path.relative_to(run)
        try:
            content = read_regular(path)
            config = parse_json(content)
            is_whole = isinstance(config, dict) and content == f"{canonical_json(config)}\n".encode()
        except FileNotFoundError:
            self.result.add("config-missing", node, f"{name} is gone; restore it from a copy, or run snakemake")
            return
        except OSError as e:
            wrong = "config-edited" if e.errno in NOT_A_FILE else "unreadable"
            self.result.add(wrong, node, f"{name} cannot be read ({e.strerror}); restore it from a copy")
            return
        except ValueError:
            is_whole = False
        if not is_whole or path.is_symlink():
            self.result.add("config-edited", node, f"{name} is not what Snakemake wrote; restore it from a copy")
        elif exact_integers(config) != record.config_file:
            keys = list(changed(flatten(record.config_file), flatten(exact_integers(config))))
            change = f"{name} has another {', '.join(keys[:3])}"
            self.result.add("config-drift", node, f"{change}; run snakemake to make it again")
