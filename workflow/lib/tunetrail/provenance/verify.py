"""Is an artifact still what it was, and did it come about as its record says?

Every doubt is a finding with a name, a severity and one line that says what is wrong and how to mend it:

    error       something is not what it was                              exit code 1
    incomplete  something that would prove it is not there                exit code 2
    warning     sound, but a policy may forbid it (1 with --strict)       exit code 3

What passes has been consistent since it was sealed; that a job did what its record claims nothing here can prove.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from tunetrail.errors import DataError
from tunetrail.provenance.ledger import LEDGER, Ledger, artifacts, read_ledger
from tunetrail.provenance.lineage import Lineage, Node, run_of
from tunetrail.provenance.manifest import (
    MANIFEST,
    PROVENANCE,
    SIGNATURE,
    UNLISTED_FILES,
    DigestCache,
    hash_safetensors,
    is_canonical,
    is_inside,
    parallel,
    read_manifest,
    sha256_file,
    walk,
)
from tunetrail.provenance.record import exact
from tunetrail.provenance.signing import Policy, signers

NFS = re.compile(r"\.nfs[0-9a-f]{16,}")
"""What a network file system leaves of a file that is removed while somebody has it open."""
Severity = Literal["error", "incomplete", "warning"]
FINDINGS: dict[str, tuple[Severity, str]] = {
    "manifest-missing": ("error", "the folder has no manifest"),
    "manifest-edited": ("error", "manifest.json is not what a stage wrote"),
    "manifest-changed": ("error", "the manifest is not the one that was recorded or sealed"),
    "unsafe-path": ("error", "the manifest lists a path outside the folder"),
    "link-outside": ("error", "a link leads out of the folder"),
    "file-missing": ("error", "a file of the manifest is gone"),
    "file-added": ("error", "a file is not in the manifest"),
    "file-changed": ("error", "a file is not what the manifest says"),
    "tensors-changed": ("error", "weights are not what the manifest says"),
    "file-resaved": ("warning", "the file was saved again, every tensor is what it was"),
    "record-missing": ("error", "there is no provenance record"),
    "record-edited": ("error", "provenance.json is not what a stage wrote"),
    "record-changed": ("error", "the record is not the one that was sealed"),
    "parent-missing": ("error", "what it was made from is gone"),
    "parent-changed": ("error", "what it was made from is another by now"),
    "parent-record-changed": ("error", "the record of what it was made from is another by now"),
    "labels-changed": ("error", "the labels were changed or corrected after it was made"),
    "source-changed": ("error", "the raw data is not what was read"),
    "base-moved": ("error", "the base model's tag or folder is another by now"),
    "state-swapped": ("error", "an attempt went on from a state that no attempt before it left"),
    "ledger-broken": ("error", "the ledger's chain does not hold"),
    "ledger-not-anchored": ("error", "the ledger does not lead to the anchored head"),
    "artifact-missing": ("error", "an artifact of the ledger is gone"),
    "not-sealed": ("incomplete", "it is in no ledger, or has changed since it was sealed last"),
    "signature-false": ("error", "a signature does not hold"),
    "signature-missing": ("error", "the policy requires a signature"),
    "policy-dirty": ("error", "the policy forbids code that no commit holds"),
    "policy-not-sealed": ("error", "the policy requires that it is sealed"),
    "dirty-tree": ("warning", "it was made by code that no commit holds"),
    "config-drift": ("warning", "the run's config is another than the one it was made with"),
    "mixed-environment": ("warning", "hardware or software changed between its attempts"),
}
"""Name -> severity, meaning."""


@dataclass(frozen=True)
class Finding:
    name: str
    artifact: str
    message: str
    folder: str | None = None

    @property
    def severity(self) -> Severity:
        return FINDINGS[self.name][0]

    def __str__(self) -> str:
        return f"{self.severity}: {self.artifact}: {self.name}: {self.message}"


@dataclass
class Verdict:
    """What `verify` found."""

    findings: list[Finding] = field(default_factory=list)
    artifacts: list[str] = field(default_factory=list)
    unsigned: list[str] = field(default_factory=list)
    signed: dict[str, list[str]] = field(default_factory=dict)
    """artifact -> names of the policy's keys that signed it."""
    heads: dict[str, str] = field(default_factory=dict)
    """ledger -> its head."""
    bytes_read: int = 0
    not_at_hand: set[str] = field(default_factory=set)
    """Raw data and labels outside the run that are not where they were read, and were therefore not checked."""

    def exit_code(self, strict: bool = False) -> int:
        severities = {f.severity for f in self.findings}
        if "error" in severities or (strict and "warning" in severities):
            return 1
        return 2 if "incomplete" in severities else 3 if "warning" in severities else 0

    def as_json(self, strict: bool = False) -> dict:
        return {
            "exit_code": self.exit_code(strict),
            "artifacts": self.artifacts,
            "findings": [asdict(f) | {"severity": f.severity} for f in self.findings],
            "signed": self.signed,
            "unsigned": self.unsigned,
            "heads": self.heads,
            "bytes_read": self.bytes_read,
            "not_at_hand": sorted(self.not_at_hand),
        }


def show(path: Path | str) -> str:
    """A name as text, also where it is not UTF-8."""
    return str(path).encode("utf-8", "backslashreplace").decode()


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
        policy: Policy | None = None,
        anchor: str | None = None,
        ledger: bool = True,
    ):
        self.with_ledger, self.roots, self.hashed = ledger, list[Path](), dict[Path, str]()
        self.latest: dict[Path, dict[str, dict]] = {}
        self.cache, self.recursive, self.policy, self.anchor = cache, recursive, policy or Policy(), anchor
        self.lineage, self.verdict = Lineage(), Verdict()
        self.ledgers: dict[Path, Ledger] = {}

    def run(self, paths: list[Path]) -> Verdict:
        """Artifacts (a folder, or its manifest) and whole runs (a folder with a ledger). Raises DataError for others."""
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
                self._find(
                    "manifest-missing",
                    folder.relative_to(run).as_posix(),
                    "the ledger has it; restore the folder from a copy",
                )
            else:
                raise DataError(f"{path}: no artifact (a folder with {MANIFEST}) and no run (a folder with {LEDGER})")
        nodes = self.nodes
        self.verdict.artifacts = [show(node.name) for node in nodes]
        self._files(nodes)
        for node in nodes:
            self._manifest(node)
            self._record(node)
            self._signature(node)
        for ledger in self.ledgers.values():
            self.verdict.heads[show(ledger.path)] = ledger.head
            if ledger.fault:
                self._find("ledger-broken", LEDGER, f"{ledger.fault}; restore it from a copy")
            elif (
                self.anchor is not None and ledger.path.parent in self._anchored() and self.anchor not in ledger.hashes
            ):
                self._find(
                    "ledger-not-anchored",
                    LEDGER,
                    f"no line has the anchored hash {self.anchor[:16]}…: the ledger was written anew or its tail was cut",
                )
        self.verdict.findings.sort(key=lambda f: (("error", "incomplete", "warning").index(f.severity), f.artifact))
        return self.verdict

    @property
    def nodes(self) -> list[Node]:
        """The artifacts that were looked at."""
        return sorted(self.lineage.nodes.values(), key=lambda node: node.folder)

    def _find(self, name: str, artifact: Node | str, message: str) -> None:
        assert name in FINDINGS
        if isinstance(artifact, Node):
            finding = Finding(name, show(artifact.name), message, show(artifact.folder))
        else:
            finding = Finding(name, show(artifact), message)
        if finding not in self.verdict.findings:
            self.verdict.findings.append(finding)

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
                self._find("manifest-missing", folder.relative_to(run).as_posix(), str(e))
        for other in sorted(run.rglob(LEDGER)):
            if other.parent != run:
                self._find(
                    "ledger-broken", other.relative_to(run).as_posix(), "a second ledger within the run; remove it"
                )
        for name in self._ledger(run).latest:
            if is_inside(name) and not (run / name / MANIFEST).exists():
                self._find(
                    "artifact-missing",
                    name,
                    "the ledger has it; restore the folder from a copy, or run its stage again and seal",
                )

    # ------------------------------------------------------------------------- bytes

    def _files(self, nodes: list[Node]) -> None:
        """Every file against its manifest. The files of all artifacts are hashed side by side."""
        todo: list[tuple[Node, Path, str, list[dict]]] = []
        for node in nodes:
            try:
                manifest = read_manifest(node.folder / MANIFEST)
            except DataError:
                self._find("manifest-edited", node, f"{MANIFEST} cannot be read; restore it from a copy")
                continue
            for name in UNLISTED_FILES:
                if (node.folder / name).is_symlink():
                    self._find("link-outside", node, f"{name} is a link; put the file itself there")
            if not is_canonical(manifest, (node.folder / MANIFEST).read_bytes()):
                self._find("manifest-edited", node, f"{MANIFEST} is not in canonical form; restore it from a copy")
            listed = {entry["path"]: entry for entry in manifest["files"]}
            tensors: dict[str, list[dict]] = {}
            for tensor in manifest.get("tensors", []):
                tensors.setdefault(tensor["file"], []).append({k: v for k, v in tensor.items() if k != "file"})
            there = {path.relative_to(node.folder).as_posix(): path for path in walk(node.folder)}
            for name in sorted(there.keys() - listed.keys() - set(UNLISTED_FILES)):
                if not NFS.fullmatch(there[name].name):
                    self._find("file-added", node, f"{show(name)} is not in the manifest; remove it")
            for name, entry in listed.items():
                path = node.folder / name
                if not is_inside(name):
                    self._find("unsafe-path", node, f"{show(name)} would leave the folder; it was not read")
                elif name not in there:
                    self._find("file-missing", node, f"{show(name)} is gone; restore it from a copy")
                elif path.is_symlink() and not _is_below(path, node.folder):
                    self._find(
                        "link-outside", node, f"{show(name)} is a link to {show(os.readlink(path))}; it was not read"
                    )
                elif not path.is_file():
                    self._find("file-changed", node, f"{show(name)} is no file any more")
                elif path.stat().st_size != entry["size"]:
                    self._find(
                        "file-changed",
                        node,
                        f"{show(name)} has {path.stat().st_size} bytes, not {entry['size']}; restore it from a copy",
                    )
                    if name.endswith(".safetensors"):
                        self._tensors(node, path, name, tensors.get(name, []))
                else:
                    todo.append((node, path, entry["sha256"], tensors.get(name, [])))
                    self.verdict.bytes_read += entry["size"]
        hashing: Callable[[Path], str] = self.cache.sha256 if self.cache else sha256_file

        def digest(path: Path) -> str:
            try:
                return hashing(path)
            except OSError as e:
                return f"unreadable: {e.strerror}"

        for (node, path, expected, expected_tensors), found in zip(
            todo, parallel(digest, [path for _, path, _, _ in todo]), strict=True
        ):
            name = path.relative_to(node.folder).as_posix()
            if found == expected:
                continue
            if expected_tensors:
                self._tensors(node, path, name, expected_tensors)
            else:
                self._find(
                    "file-changed",
                    node,
                    f"{show(name)} has sha256 {found[:16]}…, not {expected[:16]}…; restore it from a copy",
                )

    def _tensors(self, node: Node, path: Path, name: str, expected: list[dict]) -> None:
        """Which tensors of a file that differs are others."""
        try:
            _, found = hash_safetensors(path)
        except (DataError, OSError):
            self._find(
                "file-changed", node, f"{show(name)} is no whole safetensors file any more; restore it from a copy"
            )
            return
        if found == expected:
            self.verdict.findings = [
                f
                for f in self.verdict.findings
                if not (
                    f.name == "file-changed"
                    and f.artifact == show(node.name)
                    and f.message.startswith(f"{show(name)} has ")
                )
            ]
            self._find(
                "file-resaved", node, f"{show(name)} was saved again; all {len(found)} tensors are what they were"
            )
            return
        before, now = ({t["name"]: t for t in tensors} for tensors in (expected, found))
        others = sorted(n for n in before.keys() | now.keys() if before.get(n) != now.get(n))
        self._find(
            "tensors-changed",
            node,
            f"{show(name)}: {len(others)} of {len(before)} tensors differ, {others[0]} first; restore it from a copy",
        )

    # ------------------------------------------------------------------------- the record

    def _manifest(self, node: Node) -> None:
        if node.record and node.record.manifest != node.identity:
            self._find(
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
            self._find(
                "manifest-changed",
                node,
                f"manifest {entry['manifest'][:16]}… was sealed, this is {node.identity[:16]}…",
            )
        elif entry["record"] != record:
            self._find(
                "record-changed",
                node,
                f"record {entry['record'][:16]}… was sealed, this is {(record or 'none')[:16]}…; restore {PROVENANCE} from a copy",
            )

    def _not_sealed(self, node: Node, message: str) -> None:
        self._find("policy-not-sealed" if self.policy.require_sealed else "not-sealed", node, message)

    def _record(self, node: Node) -> None:
        record = node.record
        if record is None:
            missing = not (node.folder / PROVENANCE).exists()
            self._find("record-missing" if missing else "record-edited", node, f"{node.fault}")
            return
        if not is_canonical(record.statement, record.content):
            self._find("record-edited", node, f"{PROVENANCE} is not in canonical form; restore it from a copy")
        if self.recursive:
            self._parents(node)
            self._origins(node)
        code = record.code
        if code.get("dirty") and self.policy.allow_dirty is not True:
            commit = (code.get("commit") or "")[:12]
            extra = f", {len(code['untracked'])} untracked files" if code.get("untracked") else ""
            kept = any(b.get("name") == "code.diff" and "content" in b for b in record.run.get("byproducts", []))
            name = "dirty-tree" if self.policy.allow_dirty is None else "policy-dirty"
            self._find(
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
                self._find(
                    "parent-missing",
                    node,
                    f"{role} ({recorded['name']}, manifest {recorded['manifest'][:16]}…) is not there; restore it from a copy",
                )
            elif parent.identity != recorded["manifest"]:
                self._find(
                    "parent-changed",
                    node,
                    f"{role} was manifest {recorded['manifest'][:16]}…, {show(parent.name)} is {parent.identity[:16]}… now; run this stage again, or restore what it was made from",
                )
            elif (
                recorded["record"]
                and (parent.record is None or parent.record.digest != recorded["record"])
                and not self._made_again_alike(parent, recorded)
            ):
                self._find(
                    "parent-record-changed",
                    node,
                    f"the record of {role} ({show(parent.name)}) is not the one it had then",
                )

    def _made_again_alike(self, parent: Node, recorded: dict) -> bool:
        """Whether the ledger shows that the parent's stage ran again and gave the same bytes: both records were sealed."""
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
                        self.verdict.not_at_hand.add(show(path))
                    elif self.hashed[path] != digest:
                        self._find(
                            name,
                            node,
                            f"{show(path)} is not what was read when this was made; run the stages from there again, or restore it",
                        )
        for dependency in node.record.of_role("base"):
            asked, commit = dependency["annotations"].get("revision"), dependency["annotations"].get("commit")
            now = resolved_revision(dependency.get("name", ""), asked) if asked and commit else None
            if now and now != commit:
                self._find(
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
                self._find(
                    "state-swapped",
                    node,
                    f"the attempt of {attempt['start']} went on from {state['name']} ({state['digest'][:16]}…), which the attempt before it did not leave",
                )
            if "states_out" in attempt:  # the last two: an attempt never goes back further
                saved = {state["digest"] for state in attempt["states_out"]}
        same = ("cpu", "gpus", "driver", "python", "torch", "world_size", "code", "packages")
        for before, after in pairwise(attempts):
            for key in same:
                if before.get(key) != after.get(key) and None not in (before.get(key), after.get(key)):
                    self._find(
                        "mixed-environment",
                        node,
                        f"{key} changed between attempts: {before.get(key)}, then {after.get(key)}",
                    )

    def _config(self, node: Node, run: Path, recorded: dict) -> None:
        kind, _, name = node.folder.relative_to(run).as_posix().partition("/")
        named = kind in ("policies", "evaluation")
        path = run / "config" / (f"{kind}.{name}.json" if named else f"{kind}.json")
        try:
            now = json.loads(path.read_text())
        except (OSError, ValueError):
            return
        if exact(now) != recorded:
            keys = sorted(_differing(recorded, exact(now)))
            self._find(
                "config-drift",
                node,
                f"{path.relative_to(run)} has another {', '.join(keys[:3])}; run snakemake to make it again",
            )

    def _signature(self, node: Node) -> None:
        name = show(node.name)
        if not (node.folder / SIGNATURE).exists():
            self.verdict.unsigned.append(name)
            if self.policy.require_signature:
                self._find("signature-missing", node, "the policy requires one: tunetrail audit seal RUN --key KEY")
            return
        try:
            names = signers(node.folder, self.policy)
        except DataError as e:
            self._find("signature-false", node, f"{e}; sign it again, or find out who did")
            return
        if names:
            self.verdict.signed[name] = names
        else:
            self.verdict.unsigned.append(name)
            if self.policy.require_signature:
                self._find("signature-missing", node, "no key of the policy signed it")


def _is_below(path: Path, folder: Path) -> bool:
    """Whether a link leads to something below the folder."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _differing(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Dotted keys at which two JSON values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [key for k in sorted(a.keys() | b.keys()) for key in _differing(a.get(k), b.get(k), f"{prefix}{k}.")]
    return [] if a == b else [prefix.rstrip(".")]


def resolved_revision(repo: str, revision: str) -> str | None:
    """The commit that a hub repository's tag or branch points to, as far as this machine knows."""
    from huggingface_hub.constants import HF_HUB_CACHE

    path = Path(HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "refs" / revision
    return path.read_text().strip() if path.is_file() else None
