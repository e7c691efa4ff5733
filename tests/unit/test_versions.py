"""What is reported about results of another version of tunetrail."""

import json

import pytest

import tunetrail
from tests.audited_run import make_run
from tunetrail.cli import main
from tunetrail.errors import DiskError
from tunetrail.provenance import versions
from tunetrail.provenance.lineage import run_of
from tunetrail.stages.registry import STAGES

CHANGELOG = """# Changelog

## Unreleased

### Changed results

What a stage writes.

- `sft`, `dpo`: `model/` is merged,
  and loads anywhere.
- `reward`: three baselines.

### Changed

- `sft`: no result of it.

## [0.2.0] - 2027-01-02

### Changed results
- `sft`: another schedule.

## 0.1.0
### Changed results
- `sft`: there is one.
"""


@pytest.fixture
def changelog(tmp_path, monkeypatch):
    path = tmp_path / "CHANGELOG.md"
    path.write_text(CHANGELOG)
    monkeypatch.setattr(versions, "CHANGELOG", path)
    monkeypatch.setattr(tunetrail, "__version__", "0.3.0.dev0")
    return path


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A sealed run of version 0.1.0."""
    monkeypatch.setattr(tunetrail, "__version__", "0.1.0")
    run_of.cache_clear()
    return make_run(tmp_path / "made")


def test_items_are_read_by_version_and_stage():
    found = [(c.version, sorted(c.stages), c.text) for c in versions.read_changes(CHANGELOG)]
    assert found == [
        ("Unreleased", ["dpo", "sft"], "`model/` is merged, and loads anywhere."),
        ("Unreleased", ["reward"], "three baselines."),
        ("0.2.0", ["sft"], "another schedule."),
        ("0.1.0", ["sft"], "there is one."),
    ]


def test_a_record_that_cannot_be_read_is_left_out(run, monkeypatch):
    """Say one that a colleague made with umask 077."""
    read = versions.read_record

    def refuse(folder):
        if folder.name == "sft":
            raise DiskError(f"{folder}: Permission denied")
        return read(folder)

    monkeypatch.setattr(versions, "read_record", refuse)
    assert versions.records_of({"sft": run / "sft", "base": run / "base"}).keys() == {"base"}


def test_our_changelog_names_existing_stages():
    changes = versions.read_changes(versions.CHANGELOG.read_text(encoding="utf-8"))
    assert set().union(*(change.stages for change in changes)) <= STAGES.keys()
    section = (
        versions.CHANGELOG.read_text(encoding="utf-8").partition("### Changed results\n")[2].partition("\n### ")[0]
    )
    assert len(changes) == section.count("\n- ") > 5


def test_verify_lists_changes_since_and_finds_nothing_wrong(run, changelog, capsys):
    assert main(["audit", "verify", "--recursive", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["findings"] == []
    since = {other["artifact"]: other["changed_since"] for other in found["other_versions"]}
    assert since["sft"] == ["`model/` is merged, and loads anywhere.", "another schedule."]
    assert since["reward"] == ["three baselines."]
    assert since["base"] == since["data"] == []
    assert {other["made_by"] for other in found["other_versions"]} == {"0.1.0"}

    assert main(["audit", "verify", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  sft, made by 0.1.0; changed since: `model/` is merged, and loads anywhere. another schedule." in lines
    assert (
        "  base, comparisons, data, evaluation, made by 0.1.0; the changelog names no change of what they write"
        in lines
    )


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ("0.1.0", None),
        ("0.2.0", "  sft, made by 0.1.0; changed since: another schedule."),
        ("0.0.9", "newer than this one, which does not know what has changed"),
        ("0.0.9+ours", "newer than this one, which does not know what has changed"),
    ],
)
def test_only_versions_in_between_count(run, changelog, monkeypatch, capsys, installed, said):
    monkeypatch.setattr(tunetrail, "__version__", installed)
    changelog.write_text(CHANGELOG.replace("## Unreleased", "## 0.3.0"))
    assert main(["audit", "verify", str(run)]) == 0
    out = capsys.readouterr().out
    assert ("made by" in out) == (said is not None)
    assert said is None or said in out


def test_without_a_changelog_it_says_so(run, changelog, capsys):
    changelog.unlink()
    assert main(["audit", "verify", str(run)]) == 0
    assert "made by 0.1.0; what has changed since is in CHANGELOG.md of the project, which is not here" in (
        capsys.readouterr().out
    )
