"""A run whose base is a model from another run: what makes it stale, and its lineage through both."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import tunetrail
from tunetrail.cli import main
from tunetrail.files import write_jsonl
from tunetrail.monitor.dag import read_run
from tunetrail.provenance import exports, lineage
from tunetrail.provenance.findings import VerifyResult
from tunetrail.provenance.manifest import MANIFEST, sha256_file
from tunetrail.provenance.record import read_record
from tunetrail.provenance.signing import TrustPolicy
from tunetrail.provenance.verify import Verifier

from ..conftest import Project

FIRST = {
    "run": "round1",
    "seed": 1,
    "precision": "fp32",
    "base": {"source": "random", "hidden_size": 16, "layers": 1, "heads": 2, "licence": "MIT"},
    "data": {
        "demonstrations": [{"source": "file", "path": "answers.jsonl"}],
        "preferences": [{"source": "file", "path": "pairs.jsonl"}],
        "duplicates": "drop",
    },
    "sft": None,
    "policies": {"dpo": {"method": "dpo", "learning_rate": 1.0e-3, "batch_size": 4}},
    "retention": None,
    "evaluation": {"max_new_tokens": 4, "bootstrap": 100},
}
POLICY = "results/round1/policies/dpo"


@pytest.fixture(scope="module")
def round1(stage_server, tmp_path_factory) -> Project:
    """A project with a policy trained on recorded preferences."""
    project = Project(tmp_path_factory.mktemp("rounds"), stage_server.path)
    write_jsonl(project.folder / "answers.jsonl", [{"prompt": f"say {i}", "completion": f"{i}!"} for i in range(30)])
    write_jsonl(
        project.folder / "pairs.jsonl",
        [{"prompt": f"ask {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(30)],
    )
    (project.folder / "round1.yaml").write_text(yaml.safe_dump(FIRST))
    project.run("--", f"{POLICY}/manifest.json", config="round1.yaml")
    return project


@pytest.fixture
def project(round1, tmp_path, monkeypatch) -> Project:
    """A copy of it as the current folder."""
    lineage.run_of.cache_clear()
    shutil.copytree(round1.folder, tmp_path / "copy", symlinks=True)
    copy = Project.__new__(Project)
    copy.folder, copy.path, copy.python = tmp_path / "copy", round1.path, round1.python
    monkeypatch.chdir(copy.folder)
    return copy


def begin_with(path: str, run: str = "round2") -> str:
    """The config of a run whose base is this folder."""
    config = FIRST | {"run": run, "base": {"source": "local", "path": path}}
    Path(f"{run}.yaml").write_text(yaml.safe_dump(config))
    return f"{run}.yaml"


def make(project: Project, config: str, artifact: str = "base") -> str:
    return project.run("--", f"results/{config.removesuffix('.yaml')}/{artifact}/manifest.json", config=config)


def why_base(config: str) -> str:
    """Why `base` would be made again; empty if it would not."""
    return next(job.why for job in read_run("profiles/local", [Path(config)])[1] if job.name == "base")


def audit(run: str) -> VerifyResult:
    """The code under test may be uncommitted."""
    return Verifier(recursive=True, policy=TrustPolicy(allow_dirty=True)).run([Path(run)])


def told(capsys, *arguments: str, code: int = 0) -> dict | list:
    assert main(["audit", *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_the_lineage_spans_both_runs(project, capsys):
    config = begin_with(f"{POLICY}/model")
    make(project, config, "data")
    record = read_record(Path("results/round2/base"))
    assert record.parents["model"]["name"] == "../../round1/policies/dpo"
    assert not record.of_role("base")

    rows = {row["artifact"]: row for row in told(capsys, "trace", "results/round2/data")}
    assert rows.keys() == {"round2/data", "round2/base", "round1/policies/dpo", "round1/data", "round1/base"}
    assert rows["round2/base"]["from"] == {"model": str(Path(POLICY).absolute())}
    found = told(capsys, "trace", "--reverse", "labeler:recorded")
    assert {str(Path("results", name).absolute()) for name in ("round1/policies/dpo", "round2/base")} <= {
        *found["retrain"]
    }

    result = audit("results/round2")
    assert result.findings == []
    assert {"round1/base", "round2/base"} <= set(result.artifacts)
    for kind in exports.FORMATS:
        assert exports.export(Path("results/round2/base"), kind), kind
    card = exports.export(Path("results/round2/base"), "model-card")
    assert "license: mit" in card  # of the base of round 1
    assert f"- dpo: manifest `{sha256_file(Path(POLICY) / MANIFEST)}`" in card
    spdx = json.loads(exports.export(Path("results/round2/base"), "spdx"))["@graph"]
    kinds = [each["relationshipType"] for each in spdx if each["type"] == "Relationship"]
    assert (
        kinds.count("descendantOf") == 3
    )  # round2/base from the policy, that from round1/base, that from random weights


def test_a_policy_is_not_measured_on_what_another_run_trained_it_on(project):
    """Another seed splits the same pairs otherwise."""
    config = FIRST | {"run": "other", "seed": 2, "base": {"source": "local", "path": f"{POLICY}/model"}}
    Path("other.yaml").write_text(yaml.safe_dump(config))
    reply = project.snakemake("--", "results/other/data/manifest.json", config="other.yaml")
    assert reply.returncode == 65
    assert re.search(
        r"base\.path: the model in results/other/base, or one that it descends from, was trained on \d+ of the \d+ "
        r"rows that this run measures on, such as 'ask \d+'; pin a test set that no run trained on",
        Path("logs/other/data.log").read_text(),
    )


def test_base_becomes_stale_with_the_artifact_and_refuses_an_edited_one(project):
    config = begin_with(f"{POLICY}/model")
    make(project, config)
    assert why_base(config) == ""
    weights = Path(POLICY, "model/model.safetensors")
    os.utime(weights)
    assert why_base(config) == ""

    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert why_base(config).startswith("config: folder_content: ")
    reply = project.snakemake("--", "results/round2/base/manifest.json", config=config)
    assert reply.returncode == 65
    assert f"{weights}: differs from its manifest" in reply.stderr
    weights.write_bytes(content)

    record = Path(POLICY, "provenance.json")
    own = record.read_bytes()
    record.write_bytes(Path("results/round1/base/provenance.json").read_bytes())
    reply = project.snakemake("--", "results/round2/base/manifest.json", config=config)
    assert reply.returncode == 65
    assert f"{record}: is the record of another manifest.json" in reply.stderr
    record.write_bytes(own)
    make(project, config)
    assert not audit("results/round2").findings

    first = FIRST | {"policies": {"dpo": FIRST["policies"]["dpo"] | {"beta": 0.5}}}
    Path("round1.yaml").write_text(yaml.safe_dump(first))
    make(project, "round1.yaml", "policies/dpo")
    assert why_base(config).startswith("config: folder_content: ")
    make(project, config)
    made_from = read_record(Path("results/round2/base")).parents["model"]["manifest"]
    assert made_from == sha256_file(Path(POLICY, "manifest.json"))


def test_a_copy_of_the_artifact_keeps_its_record(project, capsys):
    shutil.copytree(POLICY, "models/taken")
    config = begin_with("models/taken/model")
    make(project, config)
    assert read_record(Path("results/round2/base")).parents["model"]["name"] == "../../../models/taken"
    result = audit("results/round2")
    assert {finding.name for finding in result.findings} == {"not-sealed", "parent-elsewhere"}
    elsewhere = " ".join(finding.message for finding in result.findings if finding.name == "parent-elsewhere")
    assert "/base, manifest" in elsewhere
    assert "/data, manifest" in elsewhere
    told(capsys, "trace", "results/round2/base", code=2)  # the copy's parents are not next to it
    found = told(capsys, "trace", "--reverse", "labeler:recorded", "--in", "results/round2")
    assert str(Path("results/round2/base").absolute()) in found["retrain"]

    Path("link").symlink_to(Path(POLICY, "model").absolute())
    make(project, begin_with("link", "round3"))
    assert read_record(Path("results/round3/base")).parents["model"]["name"] == "../../round1/policies/dpo"


def older(path: Path) -> None:
    os.utime(path, (1e9, 1e9))


def newer_in_place(path: Path) -> None:
    os.utime(path)


@pytest.mark.parametrize("set_time", [older, newer_in_place])
def test_a_folder_without_a_record_is_a_source_and_new_weights_make_base_stale(
    project, set_time: Callable[[Path], None]
):
    shutil.copytree(f"{POLICY}/model", "models/plain")
    Path("models/plain/.git").mkdir()
    config = begin_with("models/plain")
    make(project, config)
    record = read_record(Path("results/round2/base"))
    assert record.parents == {}
    [base] = record.of_role("base")
    assert "../../../models/plain/model.safetensors" in base["annotations"]["files"]
    Path("models/plain/.git/index").write_text("none of the model's")
    assert why_base(config) == ""

    weights = Path("models/plain/model.safetensors")
    shutil.copy("results/round1/base/model/model.safetensors", weights)
    set_time(weights)
    assert "config: folder_content: " in why_base(config)
    make(project, config)
    assert read_record(Path("results/round2/base")).of_role("base") != [base]
    assert why_base(config) == ""


def test_a_run_cannot_replace_its_own_base(project):
    config = begin_with(f"{POLICY}/model", run="round1")
    reply = project.snakemake("--dry-run", config=config)
    assert reply.returncode == 78
    assert (
        f"round1.yaml: base.path: {POLICY}/model was made by the run round1 itself, whose base it would replace; give "
        "the run that begins with it a name of its own, such as `run: round1-2`\n" in reply.stderr
    )
    reply = project.snakemake("--dry-run", config=begin_with(POLICY))
    assert f"base.path: {POLICY} has no config.json; its model is in {POLICY}/model\n" in reply.stderr


def test_another_version_is_reported_and_reruns_nothing(project, capsys):
    target = f"{POLICY}/manifest.json"
    for path in Path("results/round1").rglob("provenance.json"):
        content, builder = path.read_text(), f'"tunetrail":"{tunetrail.__version__}"}}'  # not the installed package
        assert content.count(builder) == 1
        path.write_text(content.replace(builder, '"tunetrail":"0.1.0"}'))
    assert "Nothing to be done" in project.run("--dry-run", "--", target, config="round1.yaml")

    assert main(["status", "--configfile", "round1.yaml"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^policies/dpo +done", out, re.MULTILINE)
    assert "  dpo, made by 0.1.0; changed since: " in out
    assert main(["status", "--configfile", "round1.yaml", "--json"]) == 0
    found = {s["name"]: s["other_version"] for s in json.loads(capsys.readouterr().out)}
    assert found["policies/dpo"]["made_by"] == "0.1.0"
    assert found["policies/dpo"]["changed_since"]
    assert found["report"] is None  # not made yet
    assert main(["plan", "--configfile", "round1.yaml"]) == 0
    assert "  data, made by 0.1.0; changed since: rows carry `messages`" in capsys.readouterr().out
