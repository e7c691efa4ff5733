"""The findings of an audit, and its result."""

from dataclasses import asdict, dataclass, field
from typing import Literal

from tunetrail.provenance.lineage import Node
from tunetrail.provenance.versions import OtherVersion
from tunetrail.provenance.versions import as_json as versions_as_json
from tunetrail.terminal import escape

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
    "unreadable": ("incomplete", "a file or folder cannot be read"),
    "file-resaved": ("warning", "the file was saved again, every tensor is unchanged"),
    "record-missing": ("error", "there is no provenance record"),
    "record-edited": ("error", "provenance.json is not what a stage wrote"),
    "record-changed": ("error", "the record is not the one that was sealed"),
    "record-contradicts": ("error", "record and manifest do not agree on stage, metrics or tokenizer"),
    "place-changed": ("error", "it was made in another place, or in another run"),
    "place-unknown": ("warning", "its record, of an early version, does not say where it was made"),
    "parent-missing": ("error", "what it was made from is gone"),
    "parent-elsewhere": ("incomplete", "what it was made from is not here, and no run says whether it should be"),
    "parent-changed": ("error", "what it was made from has changed since"),
    "parent-record-changed": ("error", "the record of what it was made from has changed since"),
    "labels-changed": ("error", "the labels were changed or corrected after it was made"),
    "source-changed": ("error", "the raw data is not what was read"),
    "base-moved": ("error", "the base model's tag or folder has changed since"),
    "import-moved": ("error", "an imported model or a scorer of one's own has changed since"),
    "state-swapped": ("error", "an attempt resumed from a state that no earlier attempt had saved"),
    "ledger-broken": ("error", "the ledger's chain does not hold"),
    "ledger-not-anchored": ("error", "the ledger does not lead to the anchored head"),
    "replaced-after-anchor": ("error", "it was replaced after the head was anchored"),
    "sealed-after-anchor": ("incomplete", "it was sealed after the head was anchored"),
    "run-not-anchored": ("incomplete", "no anchored head is of the run it comes from"),
    "artifact-missing": ("error", "an artifact of the ledger is gone"),
    "stray-file": ("error", "a file in the run's folder belongs to no artifact"),
    "stray-folder": ("error", "a folder in the run's folder holds files and no artifact"),
    "hidden-folder": ("error", "a hidden folder in the run's folder holds files"),
    "unfinished": ("warning", "a stage is at work, or was killed"),
    "config-missing": ("incomplete", "the run's config of a stage is gone"),
    "config-edited": ("error", "the run's config of a stage is not what Snakemake wrote"),
    "config-unused": ("warning", "no artifact was made with this config of the run"),
    "not-sealed": ("incomplete", "it is in no ledger, or has changed since it was last sealed"),
    "signature-false": ("error", "a signature does not hold"),
    "signature-missing": ("error", "the policy requires a signature"),
    "policy-dirty": ("error", "the policy forbids uncommitted code"),
    "policy-not-sealed": ("error", "the policy requires that it be sealed"),
    "dirty-tree": ("warning", "it was made by uncommitted code"),
    "config-drift": ("warning", "the run's config is no longer the one it was made with"),
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


LONGEST = 600
"""Characters of a message."""


@dataclass
class VerifyResult:
    """The result of `verify`."""

    found: dict[Finding, None] = field(default_factory=dict)
    """In the order of `sort`, each once."""
    artifacts: list[str] = field(default_factory=list)
    unsigned: list[str] = field(default_factory=list)
    signed: dict[str, list[str]] = field(default_factory=dict)
    """artifact -> names of the policy's keys that signed it."""
    heads: dict[str, str] = field(default_factory=dict)
    """ledger -> its head."""
    renamed: dict[str, str] = field(default_factory=dict)
    """run -> the name it was made under, where it has another now."""
    bytes_read: int = 0
    other_versions: list[OtherVersion] = field(default_factory=list)
    """Artifacts that another version of tunetrail made: no finding, but this version may give other results."""
    not_at_hand: set[str] = field(default_factory=set)
    """Raw data and labels outside the run that are no longer where they were read, so they were not checked."""

    @property
    def findings(self) -> list[Finding]:
        return list(self.found)

    def exit_code(self, strict: bool = False) -> int:
        severities = {f.severity for f in self.found}
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
            "renamed": self.renamed,
            "bytes_read": self.bytes_read,
            "other_versions": versions_as_json(self.other_versions),
            "not_at_hand": sorted(self.not_at_hand),
        }

    def sort(self) -> None:
        """Sorts findings by severity, then by artifact."""
        gravity = ("error", "incomplete", "warning")
        self.found = dict.fromkeys(
            sorted(self.found, key=lambda finding: (gravity.index(finding.severity), finding.artifact))
        )

    def add(self, name: str, artifact: Node | str, message: str) -> None:
        """Notes a finding, once."""
        assert name in FINDINGS
        message = escape(message if len(message) <= LONGEST else f"{message[:LONGEST]}…")
        if isinstance(artifact, Node):
            finding = Finding(name, escape(artifact.name), message, escape(artifact.folder))
        else:
            finding = Finding(name, escape(artifact), message)
        self.found[finding] = None
