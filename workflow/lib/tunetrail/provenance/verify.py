"""Checks whether an artifact is unchanged, and consistent with the record of how it was made.

Every doubt is a finding with a name, a severity and one line that says what is wrong and how to fix it:

    error       something has changed                                     exit code 1
    incomplete  something that would prove it is missing                  exit code 2
    warning     sound, but a policy may forbid it (1 with --strict)       exit code 3

An artifact that passes has been consistent since it was sealed. Nothing here can prove that a job did what its record
claims.
"""

import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from tunetrail.errors import DataError
from tunetrail.provenance.file_check import FileCheck
from tunetrail.provenance.findings import VerifyResult
from tunetrail.provenance.leftovers import check_leftovers
from tunetrail.provenance.lineage import Lineage, Node, Runs
from tunetrail.provenance.manifest import MANIFEST, SIGNATURE, DigestCache, is_inside
from tunetrail.provenance.record_check import RecordCheck
from tunetrail.provenance.run_folder import LEDGER, artifacts
from tunetrail.provenance.seal_check import SealCheck
from tunetrail.provenance.signing import TrustPolicy, signers
from tunetrail.provenance.versions import other_versions
from tunetrail.terminal import escape


class Verifier:
    """Checks each artifact once.

    Args:
        cache: digests that a quick audit may trust; None: every byte is read.
        recursive: also check everything the artifacts were made from, down to the raw data.
        anchors: heads of ledgers that were kept elsewhere; every ledger that is used must lead to one.
        ledger: False for a run that is not finished, and therefore not sealed.
    """

    def __init__(
        self,
        *,
        cache: DigestCache | None = None,
        recursive: bool = False,
        policy: TrustPolicy | None = None,
        anchors: Collection[str] = (),
        ledger: bool = True,
    ):
        self.recursive, self.policy, self.with_ledger = recursive, policy or TrustPolicy(), ledger
        self.lineage, self.runs, self.result = Lineage(), Runs(), VerifyResult()
        self.file_check = FileCheck(self.result, cache.sha256 if cache else None)
        self.record_check = RecordCheck(self.result, self.policy, self.runs, recursive)
        self.seal_check = SealCheck(self.result, self.policy, self.runs, anchors)

    def run(self, paths: list[Path]) -> VerifyResult:
        """Checks artifacts (folders, or manifests) and runs (folders with a ledger). Raises DataError for others."""
        for path in paths:
            self._add(path)
        nodes = self.nodes
        self.result.artifacts = [escape(node.name) for node in nodes]
        self.file_check.run(nodes)
        for node in nodes:
            if node.record and node.record.place and (run := self.runs.of(node.folder)):
                self.runs.made.setdefault(run, Counter())[node.record.place.run] += 1
        for node in nodes:
            self._manifest(node)
            self.record_check.run(node)
            self._signature(node)
        if self.with_ledger:
            self.seal_check.ledgers()
        self.result.renamed = {
            escape(run): escape(name) for run in self.runs.made if (name := self.runs.made_as(run)) != run.name
        }
        self.result.other_versions = other_versions({escape(node.name): node.record for node in nodes})
        self.result.sort()
        return self.result

    @property
    def nodes(self) -> list[Node]:
        """The artifacts that were checked."""
        return sorted(self.lineage.nodes.values(), key=lambda node: node.folder)

    def _add(self, path: Path) -> None:
        """Adds the artifact or run that a path names. Raises DataError if it is neither."""
        folder = Path(os.path.abspath(path.parent if path.name == MANIFEST else path))
        if os.path.lexists(folder / LEDGER):
            self.runs.named.append(folder)
            self._add_run(folder)
        elif os.path.lexists(folder / MANIFEST):
            self.lineage.add(folder, self.recursive)
        elif run := self.runs.of(folder):
            name = folder.relative_to(run).as_posix()
            if name not in self.runs.latest(run):
                raise DataError(f"{path}: no artifact and no run")
            self.result.add("manifest-missing", name, "the ledger has it; restore the folder from a copy")
        else:
            raise DataError(f"{path}: no artifact (a folder with {MANIFEST}) and no run (a folder with {LEDGER})")

    def _add_run(self, run: Path) -> None:
        found = artifacts(run)
        for folder in found:
            self.lineage.add(folder, self.recursive)
        check_leftovers(self.result, run, found)
        for name in self.runs.latest(run):
            if not is_inside(name) or not os.path.lexists(run / name / MANIFEST):
                message = "the ledger has it; restore the folder from a copy, or run its stage again and seal"
                self.result.add("artifact-missing", name, message)

    # ------------------------------------------------------------------------- seals and signatures

    def _manifest(self, node: Node) -> None:
        """The manifest against the record, and both against the ledger."""
        if node.is_unreadable:
            return
        if node.record and node.record.manifest != node.identity:
            message = f"the record is of manifest {node.record.manifest[:16]}…, this is {node.identity[:16]}…"
            self.result.add("manifest-changed", node, message)
        if self.with_ledger:
            self.seal_check.run(node)

    def _signature(self, node: Node) -> None:
        name, names, missing = escape(node.name), list[str](), "no key of the policy signed it"
        if not os.path.lexists(node.folder / SIGNATURE):
            missing = "the policy requires one: tunetrail audit seal RUN --key KEY"
        else:
            try:
                names = signers(node.folder, node.record, self.policy)
            except DataError as e:
                self.result.add("signature-false", node, f"{e}; sign it again, or find out who did")
                return
        if names:
            self.result.signed[name] = names
            return
        self.result.unsigned.append(name)
        if self.policy.require_signature:
            self.result.add("signature-missing", node, missing)
