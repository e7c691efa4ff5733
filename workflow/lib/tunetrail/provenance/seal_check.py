"""Compares artifacts with the ledgers of their runs, and ledgers with heads that were kept elsewhere."""

import os
from collections.abc import Collection

from tunetrail.provenance.findings import VerifyResult
from tunetrail.provenance.ledger import Ledger
from tunetrail.provenance.lineage import Node, Runs, run_of
from tunetrail.provenance.manifest import PROVENANCE
from tunetrail.provenance.run_folder import LEDGER
from tunetrail.provenance.schema import LedgerEntry
from tunetrail.provenance.signing import TrustPolicy
from tunetrail.terminal import escape


class SealCheck:
    """Notes artifacts that no ledger, or no anchored ledger, vouches for.

    Args:
        anchors: heads that were kept elsewhere; if empty, no ledger needs to lead to one.
    """

    def __init__(self, result: VerifyResult, policy: TrustPolicy, runs: Runs, anchors: Collection[str]):
        self.result, self.policy, self.runs, self.anchors = result, policy, runs, anchors

    def run(self, node: Node) -> None:
        """Compares an artifact with the ledger of its run."""
        run = self.runs.of(node.folder)
        if run is None:
            self._not_sealed(node, f"there is no {LEDGER} above it; seal its run: tunetrail audit seal RUN")
            return
        name = node.folder.relative_to(run).as_posix()
        entry = self.runs.latest(run).get(name)
        record = node.record.digest if node.record else None
        if entry is None:
            self._not_sealed(node, f"it is not in {LEDGER}; if you trust it: tunetrail audit seal {run}")
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
        else:
            self._after_anchor(node, self.runs.ledger(run), entry)

    def _not_sealed(self, node: Node, message: str) -> None:
        self.result.add("policy-not-sealed" if self.policy.require_sealed else "not-sealed", node, message)

    def _after_anchor(self, node: Node, ledger: Ledger, entry: LedgerEntry) -> None:
        """Notes an artifact that was sealed after the anchored line, which proves nothing: anyone who can write the run
        can append."""
        anchored = ledger.anchored(self.anchors)
        if anchored is None or entry["number"] <= anchored:
            return
        lines = f"line {entry['number'] + 1} sealed it, and the anchored head is of line {anchored + 1}"
        before = [e for e in ledger.by_artifact[entry["artifact"]] if e["number"] <= anchored]
        if before and before[-1]["manifest"] != entry["manifest"]:
            then = f"manifest {before[-1]['manifest'][:16]}…"
            message = f"{lines}, when it was {then}; if you made it again, anchor the new head"
            self.result.add("replaced-after-anchor", node, message)
        else:
            self.result.add("sealed-after-anchor", node, f"{lines}; if you trust it, anchor the new head")

    def ledgers(self) -> None:
        """Checks every ledger that was used, by itself and against the anchored heads."""
        led = [ledger for ledger in self.runs.ledgers.values() if ledger.anchored(self.anchors) is not None]
        lost = [head for head in self.anchors if not any(head in ledger.hashes for ledger in led)]
        for run, ledger in self.runs.ledgers.items():
            self.result.heads[escape(ledger.path)] = ledger.head
            name = LEDGER if run in self.runs.named else os.path.relpath(ledger.path)
            if ledger.fault:
                fix = "tunetrail audit seal cuts it off" if ledger.torn else "restore it from a copy"
                self.result.add("ledger-broken" if ledger.is_readable else "unreadable", name, f"{ledger.fault}; {fix}")
            if within := run_of(run):
                self.result.add("ledger-broken", name, f"a second ledger, within the run {within}; remove it")
            if self.anchors and ledger not in led and not ledger.fault:
                if run in self.runs.named or lost:
                    message = "no line has the anchored hash: the ledger was rewritten, or its tail was cut"
                    self.result.add("ledger-not-anchored", name, message)
                else:
                    self.result.add("run-not-anchored", name, "give the head of this run too: --anchor HEAD")
