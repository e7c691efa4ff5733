"""The audit of a whole run with the tiny model: sealed by the head process, sound, and every random edit is found."""

import json
import random
import re
import shutil
import subprocess

import pytest

from tunetrail.cli import main
from tunetrail.provenance import lineage
from tunetrail.provenance.findings import FINDINGS
from tunetrail.provenance.ledger import artifacts
from tunetrail.provenance.manifest import read_manifest
from tunetrail.provenance.record import read_record
from tunetrail.provenance.verify import Verifier

from ..conftest import ROOT


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """A copy of the finished run in another folder, as on another machine."""
    folder = tmp_path_factory.mktemp("elsewhere") / "tiny"
    shutil.copytree(tiny_run.folder / "results/tiny", folder)
    return folder


def test_the_head_process_sealed_the_run_and_the_copy_is_sound(run):
    result = Verifier(recursive=True).run([run])
    assert result.findings == []
    assert len(result.artifacts) == len(artifacts(run)) == 20
    assert result.bytes_read > 5e6


def test_records_have_what_an_auditor_needs(run):
    reward = read_record(run / "reward")
    assert reward.of_role("labels")
    assert reward.annotations("labels")["labelers"] == ["simulated-0", "simulated-1"]
    assert {d["annotations"]["role"] for d in reward.dependencies} >= {
        "code",
        "lock",
        "packages",
        "tokenizer",
        "labels",
        "parent:policy",
        "parent:comparisons",
        "parent:data",
    }
    for name in ("sft", "reward", "policies/dpo", "policies/ppo", "policies/ppo-lora"):
        usage = read_record(run / name).usage
        assert usage["training_flops"] > 0, name
        assert usage["device_hours"] > 0
    assert read_record(run / "data").usage["training_flops_reason"]
    attempt = reward.attempts[-1]
    assert attempt["deterministic"] is True
    assert attempt["torch"]
    assert attempt["world_size"] == 1
    evaluation = read_record(run / "evaluation/dpo")
    assert evaluation.statement["subject"][1]["digest"] == {"sha256": read_record(run / "policies/dpo").manifest}
    tensors = read_manifest(run / "policies/dpo/manifest.json")["tensors"]
    assert len(tensors) == 2 * 20  # of the model and of its checkpoint
    assert {t["dtype"] for t in tensors} == {"F32"}


def test_two_hundred_random_single_byte_edits_are_all_caught(run):
    rng = random.Random(1)
    files = [p for folder in artifacts(run) for p in sorted(folder.rglob("*")) if p.is_file()]
    for n in range(200):
        path = rng.choice(files) if n % 2 else rng.choices(files, [p.stat().st_size for p in files])[0]
        content = path.read_bytes()
        place = rng.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ rng.randrange(1, 256)]) + content[place + 1 :])
        result = Verifier(recursive=True).run([run])
        path.write_bytes(content)
        assert result.exit_code() != 0, (path, place)


def test_a_merged_adapter_is_sound_and_its_base_is_in_the_tree(run, capsys):
    lineage.run_of.cache_clear()
    assert main(["audit", "trace", str(run / "policies/ppo-lora"), "--json"]) == 0
    rows = {row["artifact"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["policies/ppo-lora"]["from"]["policy"] == str(run / "sft")
    assert rows["sft"]["from"]["base"] == str(run / "base")


@pytest.mark.parametrize("artifact", ["data", "policies/ppo-lora"])
def test_a_stage_is_reproduced_from_its_record(tiny_run, artifact, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tiny_run.folder)
    folder = f"results/tiny/{artifact}"
    assert main(["audit", "reproduce", folder, "--scratch", str(tmp_path / "again"), "--json"]) == 0
    out = capfd.readouterr().out
    assert json.loads(out[out.index("{\n") :])["tier"] == "same file bytes"


def test_a_stage_with_a_missing_input_cannot_be_reproduced(run, tmp_path, capsys):
    copy = tmp_path / "tiny"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "sft")
    lineage.run_of.cache_clear()
    assert main(["audit", "reproduce", str(copy / "policies/dpo"), "--scratch", str(tmp_path / "again")]) == 2
    assert re.search(r"its input policy \(\.\./\.\./sft\) is gone; restore it first", capsys.readouterr().err)


DOCS = [ROOT / "README.md", ROOT / "workflow/lib/tunetrail/provenance/README.md"]
COMMANDS = sorted(
    {
        line.split("#")[0].strip()
        for doc in DOCS
        for line in doc.read_text().splitlines()
        if line.startswith("    tunetrail audit")
    }
)


def test_the_commands_in_the_docs_work(tiny_run, tmp_path, monkeypatch, capfd):
    """As documented, but with the tiny run instead of the demo."""
    shutil.copytree(tiny_run.folder, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", "lab.pem"], check=True)
    subprocess.run(["openssl", "pkey", "-in", "lab.pem", "-pubout", "-out", "lab.pub"], check=True)
    (tmp_path / "copy/policy.yaml").write_text("keys: {lab: lab.pub}\nrequire_signature: true\n")
    assert len(COMMANDS) > 9
    for command in sorted(
        COMMANDS, key=lambda c: ("--policy" in c, "seal" not in c)
    ):  # signed before signatures are required
        lineage.run_of.cache_clear()
        code = main(command.replace("results/demo", "results/tiny").split()[1:])
        assert code == (1 if " diff " in command else 0), command
        assert capfd.readouterr().out


def test_the_docs_list_the_findings():
    listed = re.findall(r"^\| `([a-z-]+)` \| (\w+) \| (.+) \|$", DOCS[1].read_text(), re.MULTILINE)
    assert listed == [(name, severity, meaning) for name, (severity, meaning) in FINDINGS.items()]
