"""Checks whether an artifact is unchanged, and consistent with the record of how it was made.

Every doubt is a finding with a name, a severity and one line that says what is wrong and how to fix it:

    error       something has changed                                     exit code 1
    incomplete  something that would prove it is missing                  exit code 2
    warning     sound, but a policy may forbid it (1 with --strict)       exit code 3

An artifact that passes has been consistent since it was sealed. Nothing here can prove that a job did what its record
claims.
"""

import os
from pathlib import Path

from tunetrail.errors import DataError
from tunetrail.provenance.file_check import FileCheck
from tunetrail.provenance.findings import VerifyResult, printable
from tunetrail.provenance.ledger import LEDGER, Ledger, artifacts
from tunetrail.provenance.lineage import Lineage, Node, Runs
from tunetrail.provenance.manifest import MANIFEST, PROVENANCE, SIGNATURE, DigestCache, is_inside, sha256_file
from tunetrail.provenance.record_check import RecordCheck
from tunetrail.provenance.signing import TrustPolicy, signers
from tunetrail.provenance.versions import other_versions


class Verifier:
    """Checks each artifact once.

    Args:
        cache: digests that a quick audit may trust; None: every byte is read.
        recursive: also check everything that the artifacts were made from, down to the raw data.
        anchor: the head of a ledger, kept elsewhere.
        ledger: False for a run that is not finished and therefore not sealed.
    """

    def __init__(
        self,
        *,
        cache: DigestCache | None = None,
        recursive: bool = False,
        policy: TrustPolicy | None = None,
        anchor: str | None = None,
        ledger: bool = True,
    ):
        self.recursive, self.policy = recursive, policy or TrustPolicy()
        self.anchor, self.with_ledger = anchor, ledger
        self.lineage, self.runs, self.result = Lineage(), Runs(), VerifyResult()
        self.file_check = FileCheck(self.result, cache.sha256 if cache else sha256_file)
        self.record_check = RecordCheck(self.result, self.policy, self.runs, recursive)

    def run(self, paths: list[Path]) -> VerifyResult:
        """Checks artifacts (folders, or manifests) and runs (folders with a ledger). Raises DataError for others."""
        for path in paths:
            self._add(path)
        nodes = self.nodes
        self.result.artifacts = [printable(node.name) for node in nodes]
        self.file_check.run(nodes)
        for node in nodes:
            self._manifest(node)
            self.record_check.run(node)
            self._signature(node)
        for ledger in self.runs.ledgers.values():
            self._ledger(ledger)
        self.result.other_versions = other_versions({printable(node.name): node.record for node in nodes})
        self.result.sort()
        return self.result

    @property
    def nodes(self) -> list[Node]:
        """The artifacts that were checked."""
        return sorted(self.lineage.nodes.values(), key=lambda node: node.folder)

    def _add(self, path: Path) -> None:
        """Adds the artifact or run that a path names. Raises DataError if it is neither."""
        folder = Path(os.path.abspath(path.parent if path.name == MANIFEST else path))
        if (folder / LEDGER).exists():
            self.runs.named.append(folder)
            self._add_run(folder)
        elif (folder / MANIFEST).exists():
            self.lineage.add(folder, self.recursive)
        elif run := self.runs.of(folder):
            name = folder.relative_to(run).as_posix()
            if name not in self.runs.latest(run):
                raise DataError(f"{path}: no artifact and no run")
            self.result.add("manifest-missing", name, "the ledger has it; restore the folder from a copy")
        else:
            raise DataError(f"{path}: no artifact (a folder with {MANIFEST}) and no run (a folder with {LEDGER})")

    def _add_run(self, run: Path) -> None:
        for folder in artifacts(run):
            try:
                self.lineage.add(folder, self.recursive)
            except DataError as e:
                self.result.add("manifest-missing", folder.relative_to(run).as_posix(), str(e))
        for other in sorted(run.rglob(LEDGER)):
            if other.parent != run:
                name = other.relative_to(run).as_posix()
                self.result.add("ledger-broken", name, "a second ledger within the run; remove it")
        for name in self.runs.latest(run):
            if is_inside(name) and not (run / name / MANIFEST).exists():
                message = "the ledger has it; restore the folder from a copy, or run its stage again and seal"
                self.result.add("artifact-missing", name, message)

    # ------------------------------------------------------------------------- seals and signatures

    def _manifest(self, node: Node) -> None:
        """Compares the manifest with the record, and both with the ledger."""
        if node.record and node.record.manifest != node.identity:
            message = f"the record is of manifest {node.record.manifest[:16]}…, this is {node.identity[:16]}…"
            self.result.add("manifest-changed", node, message)
        if not self.with_ledger:
            return
        run = self.runs.of(node.folder)
        if run is None:
            self._not_sealed(node, f"there is no {LEDGER} above it; seal its run: tunetrail audit seal RUN")
            return
        entry = self.runs.latest(run).get(node.folder.relative_to(run).as_posix())
        record = node.record.digest if node.record else None
        if entry is None:
            self._not_sealed(node, f"it is not in {LEDGER}; if you trust it: tunetrail audit seal {printable(run)}")
        elif entry["manifest"] != node.identity and entry["record"] != record:
            self._not_sealed(
                node, "it was made again, or replaced, since it was last sealed; if you trust it, seal its run again"
            )
        elif entry["manifest"] != node.identity:
            message = f"manifest {entry['manifest'][:16]}… was sealed, this is {node.identity[:16]}…"
            self.result.add("manifest-changed", node, message)
        elif entry["record"] != record:
            digests = f"record {entry['record'][:16]}… was sealed, this is {(record or 'none')[:16]}…"
            self.result.add("record-changed", node, f"{digests}; restore {PROVENANCE} from a copy")

    def _not_sealed(self, node: Node, message: str) -> None:
        self.result.add("policy-not-sealed" if self.policy.require_sealed else "not-sealed", node, message)

    def _ledger(self, ledger: Ledger) -> None:
        self.result.heads[printable(ledger.path)] = ledger.head
        if ledger.fault:
            self.result.add("ledger-broken", LEDGER, f"{ledger.fault}; restore it from a copy")
            return
        # An anchor belongs to a run that was named, not to the runs of its parents.
        anchored = self.runs.named or list(self.runs.ledgers)[:1]
        if self.anchor is not None and ledger.path.parent in anchored and self.anchor not in ledger.hashes:
            message = f"no line has the anchored hash {self.anchor[:16]}…: the ledger was rewritten or its tail was cut"
            self.result.add("ledger-not-anchored", LEDGER, message)

    def _signature(self, node: Node) -> None:
        name, names, missing = printable(node.name), list[str](), "no key of the policy signed it"
        if not (node.folder / SIGNATURE).exists():
            missing = "the policy requires one: tunetrail audit seal RUN --key KEY"
        else:
            try:
                names = signers(node.folder, self.policy)
            except DataError as e:
                self.result.add("signature-false", node, f"{e}; sign it again, or find out who did")
                return
        if names:
            self.result.signed[name] = names
            return
        self.result.unsigned.append(name)
        if self.policy.require_signature:
            self.result.add("signature-missing", node, missing)
