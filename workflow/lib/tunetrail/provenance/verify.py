"""Is an artifact still what it was, and did it come about as its record says?

Every doubt is a finding with a name, a severity and one line that says what is wrong and how to fix it:

    error       something is not what it was                              exit code 1
    incomplete  something that would prove it is not there                exit code 2
    warning     sound, but a policy may forbid it (1 with --strict)       exit code 3

What passes has been consistent since it was sealed. Nothing here can prove that a job did what its record claims.
"""

import json
import os
from itertools import pairwise
from pathlib import Path

from tunetrail.errors import DataError
from tunetrail.files import flatten
from tunetrail.provenance.file_check import FileCheck
from tunetrail.provenance.findings import VerifyResult, show
from tunetrail.provenance.ledger import LEDGER, Ledger, artifacts, read_ledger
from tunetrail.provenance.lineage import Lineage, Node, run_of
from tunetrail.provenance.manifest import (
    MANIFEST,
    PROVENANCE,
    SIGNATURE,
    DigestCache,
    is_canonical,
    is_inside,
    sha256_file,
)
from tunetrail.provenance.record import exact
from tunetrail.provenance.signing import TrustPolicy, signers
from tunetrail.stages.registry import config_name


class Verifier:
    """Looks at each artifact once.

    Args:
        cache: digests that quick checks may rely on; None: every byte is read.
        recursive: also everything the artifacts were made from, down to the raw data.
        anchor: a ledger's head that was kept elsewhere.
        ledger: False: of a run that goes on and is not sealed yet.
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
        self.with_ledger, self.roots, self.hashed = ledger, list[Path](), dict[Path, str]()
        self.latest: dict[Path, dict[str, dict]] = {}
        self.cache, self.recursive, self.policy, self.anchor = cache, recursive, policy or TrustPolicy(), anchor
        self.lineage, self.result = Lineage(), VerifyResult()
        self.ledgers: dict[Path, Ledger] = {}

    def run(self, paths: list[Path]) -> VerifyResult:
        """Checks artifacts (folders, or manifests) and runs (folders with a ledger). Raises DataError for others."""
        for path in paths:
            folder = Path(os.path.abspath(path.parent if path.name == MANIFEST else path))
            if (folder / LEDGER).exists():
                self.roots.append(folder)
                self._whole_run(folder)
            elif (folder / MANIFEST).exists():
                self.lineage.add(folder, self.recursive)
            elif run := run_of(folder):
                entry = self._ledger(run).latest.get(folder.relative_to(run).as_posix())
                if entry is None:
                    raise DataError(f"{path}: no artifact and no run")
                self.result.add(
                    "manifest-missing",
                    folder.relative_to(run).as_posix(),
                    "the ledger has it; restore the folder from a copy",
                )
            else:
                raise DataError(f"{path}: no artifact (a folder with {MANIFEST}) and no run (a folder with {LEDGER})")
        nodes = self.nodes
        self.result.artifacts = [show(node.name) for node in nodes]
        FileCheck(self.result, self.cache.sha256 if self.cache else sha256_file).run(nodes)
        for node in nodes:
            self._manifest(node)
            self._record(node)
            self._signature(node)
        for ledger in self.ledgers.values():
            self.result.heads[show(ledger.path)] = ledger.head
            if ledger.fault:
                self.result.add("ledger-broken", LEDGER, f"{ledger.fault}; restore it from a copy")
            elif (
                self.anchor is not None and ledger.path.parent in self._anchored() and self.anchor not in ledger.hashes
            ):
                self.result.add(
                    "ledger-not-anchored",
                    LEDGER,
                    f"no line has the anchored hash {self.anchor[:16]}…: the ledger was rewritten or its tail was cut",
                )
        self.result.findings.sort(key=lambda f: (("error", "incomplete", "warning").index(f.severity), f.artifact))
        return self.result

    @property
    def nodes(self) -> list[Node]:
        """The artifacts that were looked at."""
        return sorted(self.lineage.nodes.values(), key=lambda node: node.folder)

    def _ledger(self, run: Path) -> Ledger:
        if run not in self.ledgers:
            self.ledgers[run] = read_ledger(run)
            self.latest[run] = self.ledgers[run].latest
        return self.ledgers[run]

    def _run_of(self, folder: Path) -> Path | None:
        """Its run: one that was named, whatever ledgers lie below it, else the nearest."""
        return next((root for root in self.roots if folder.is_relative_to(root)), None) or run_of(folder)

    def _anchored(self) -> list[Path]:
        """The runs an anchor speaks of: those that were asked for, not those of parents elsewhere."""
        return self.roots or list(self.ledgers)[:1]

    def _whole_run(self, run: Path) -> None:
        for folder in artifacts(run):
            try:
                self.lineage.add(folder, self.recursive)
            except DataError as e:
                self.result.add("manifest-missing", folder.relative_to(run).as_posix(), str(e))
        for other in sorted(run.rglob(LEDGER)):
            if other.parent != run:
                self.result.add(
                    "ledger-broken", other.relative_to(run).as_posix(), "a second ledger within the run; remove it"
                )
        for name in self._ledger(run).latest:
            if is_inside(name) and not (run / name / MANIFEST).exists():
                self.result.add(
                    "artifact-missing",
                    name,
                    "the ledger has it; restore the folder from a copy, or run its stage again and seal",
                )

    # ------------------------------------------------------------------------- the record

    def _manifest(self, node: Node) -> None:
        if node.record and node.record.manifest != node.identity:
            self.result.add(
                "manifest-changed",
                node,
                f"the record is of manifest {node.record.manifest[:16]}…, this is {node.identity[:16]}…",
            )
        run = self._run_of(node.folder)
        if not self.with_ledger:
            return
        if run is None:
            self._not_sealed(node, f"there is no {LEDGER} above it; seal its run: tunetrail audit seal RUN")
            return
        self._ledger(run)
        entry = self.latest[run].get(node.folder.relative_to(run).as_posix())
        record = node.record.digest if node.record else None
        if entry is None:
            self._not_sealed(node, f"it is not in {LEDGER}; if you trust it: tunetrail audit seal {show(run)}")
        elif entry["manifest"] != node.identity and entry["record"] != record:
            self._not_sealed(
                node, "it was made again, or replaced, since it was sealed; if you trust it, seal its run again"
            )
        elif entry["manifest"] != node.identity:
            self.result.add(
                "manifest-changed",
                node,
                f"manifest {entry['manifest'][:16]}… was sealed, this is {node.identity[:16]}…",
            )
        elif entry["record"] != record:
            self.result.add(
                "record-changed",
                node,
                f"record {entry['record'][:16]}… was sealed, this is {(record or 'none')[:16]}…; restore "
                f"{PROVENANCE} from a copy",
            )

    def _not_sealed(self, node: Node, message: str) -> None:
        self.result.add("policy-not-sealed" if self.policy.require_sealed else "not-sealed", node, message)

    def _record(self, node: Node) -> None:
        record = node.record
        if record is None:
            missing = not (node.folder / PROVENANCE).exists()
            self.result.add("record-missing" if missing else "record-edited", node, f"{node.fault}")
            return
        if not is_canonical(record.statement, record.content):
            self.result.add("record-edited", node, f"{PROVENANCE} is not in canonical form; restore it from a copy")
        if self.recursive:
            self._parents(node)
            self._origins(node)
        code = record.code
        if code.get("dirty") and self.policy.allow_dirty is not True:
            commit = (code.get("commit") or "")[:12]
            extra = f", {len(code['untracked'])} untracked files" if code.get("untracked") else ""
            kept = any(b.get("name") == "code.diff" and "content" in b for b in record.run.get("byproducts", []))
            name = "dirty-tree" if self.policy.allow_dirty is None else "policy-dirty"
            self.result.add(
                name,
                node,
                f"the code differed from commit {commit}{extra}{'; the record has the diff' if kept else ''}",
            )
        self._attempts(node, record.attempts)
        run = self._run_of(node.folder)
        if run is not None:
            self._config(node, run, record.config_file)

    def _parents(self, node: Node) -> None:
        assert node.record is not None
        for role, recorded in node.record.parents.items():
            parent = node.parents.get(role)
            if parent is None:
                self.result.add(
                    "parent-missing",
                    node,
                    f"{role} ({recorded['name']}, manifest {recorded['manifest'][:16]}…) is not there; restore it "
                    "from a copy",
                )
            elif parent.identity != recorded["manifest"]:
                self.result.add(
                    "parent-changed",
                    node,
                    f"{role} was manifest {recorded['manifest'][:16]}…, {show(parent.name)} is "
                    f"{parent.identity[:16]}… now; run this stage again, or restore what it was made from",
                )
            elif (
                recorded["record"]
                and (parent.record is None or parent.record.digest != recorded["record"])
                and not self._made_again_alike(parent, recorded)
            ):
                self.result.add(
                    "parent-record-changed",
                    node,
                    f"the record of {role} ({show(parent.name)}) is not the one it had then",
                )

    def _made_again_alike(self, parent: Node, recorded: dict) -> bool:
        """Whether the ledger shows that the parent's stage ran again with the same bytes: both records were sealed."""
        run = self._run_of(parent.folder)
        if run is None or parent.record is None:
            return False
        mine = [e for e in self._ledger(run).entries if e["artifact"] == parent.folder.relative_to(run).as_posix()]
        sealed = {(e["manifest"], e["record"]) for e in mine}
        return {(recorded["manifest"], recorded["record"]), (parent.identity, parent.record.digest)} <= sealed

    def _origins(self, node: Node) -> None:
        """What came from outside the run, where it is at hand."""
        assert node.record is not None
        for role, name in (("source", "source-changed"), ("labels", "labels-changed"), ("base", "base-moved")):
            for dependency in node.record.of_role(role):
                for name_from_here, digest in dependency["annotations"].get("files", {}).items():
                    path = Path(os.path.normpath(node.folder / name_from_here))
                    if path not in self.hashed:
                        try:
                            self.hashed[path] = sha256_file(path)
                        except OSError:
                            self.hashed[path] = ""
                    if not self.hashed[path]:
                        self.result.not_at_hand.add(show(path))
                    elif self.hashed[path] != digest:
                        self.result.add(
                            name,
                            node,
                            f"{show(path)} is not what was read when this was made; run the stages from there again, "
                            "or restore it",
                        )
        for dependency in node.record.of_role("base"):
            asked, commit = dependency["annotations"].get("revision"), dependency["annotations"].get("commit")
            now = resolved_revision(dependency.get("name", ""), asked) if asked and commit else None
            if now and now != commit:
                self.result.add(
                    "base-moved",
                    node,
                    f"{dependency['name']}@{asked} was commit {commit[:12]}, it is {now[:12]} now; pin the commit",
                )

    def _attempts(self, node: Node, attempts: list[dict]) -> None:
        """Segments must chain: an attempt begins from a state that one before it had saved."""
        saved: set[str] = set()
        for attempt in attempts:
            state = attempt.get("state_in")
            if state is not None and state["digest"] not in saved:
                self.result.add(
                    "state-swapped",
                    node,
                    f"the attempt of {attempt['start']} went on from {state['name']} ({state['digest'][:16]}…), "
                    "which the attempt before it did not leave",
                )
            if "states_out" in attempt:  # the last two: an attempt never goes back further
                saved = {state["digest"] for state in attempt["states_out"]}
        same = ("cpu", "gpus", "driver", "python", "torch", "world_size", "code", "packages")
        for before, after in pairwise(attempts):
            for key in same:
                if before.get(key) != after.get(key) and None not in (before.get(key), after.get(key)):
                    self.result.add(
                        "mixed-environment",
                        node,
                        f"{key} changed between attempts: {before.get(key)}, then {after.get(key)}",
                    )

    def _config(self, node: Node, run: Path, recorded: dict) -> None:
        if (name := config_name(node.folder.relative_to(run).as_posix())) is None:
            return
        path = run / "config" / f"{name}.json"
        try:
            now = json.loads(path.read_text())
        except (OSError, ValueError):
            return
        if exact(now) != recorded:
            before, after = flatten(recorded), flatten(exact(now))
            keys = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
            self.result.add(
                "config-drift",
                node,
                f"{path.relative_to(run)} has another {', '.join(keys[:3])}; run snakemake to make it again",
            )

    def _signature(self, node: Node) -> None:
        name = show(node.name)
        if not (node.folder / SIGNATURE).exists():
            self.result.unsigned.append(name)
            if self.policy.require_signature:
                self.result.add(
                    "signature-missing", node, "the policy requires one: tunetrail audit seal RUN --key KEY"
                )
            return
        try:
            names = signers(node.folder, self.policy)
        except DataError as e:
            self.result.add("signature-false", node, f"{e}; sign it again, or find out who did")
            return
        if names:
            self.result.signed[name] = names
        else:
            self.result.unsigned.append(name)
            if self.policy.require_signature:
                self.result.add("signature-missing", node, "no key of the policy signed it")


def resolved_revision(repo: str, revision: str) -> str | None:
    """The commit that a hub repository's tag or branch points to, as far as this machine knows."""
    from huggingface_hub.constants import HF_HUB_CACHE

    path = Path(HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "refs" / revision
    return path.read_text().strip() if path.is_file() else None
