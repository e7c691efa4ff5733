"""The audit finds and names all kinds of damage, without false alarms. The run is made up; its records are real."""

import json
import os
import random
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf.json_format import ParseDict
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from safetensors.torch import load_file, save_file

from tunetrail.cli import main
from tunetrail.errors import ConfigError
from tunetrail.provenance import lineage as lines
from tunetrail.provenance.findings import FINDINGS
from tunetrail.provenance.ledger import read_ledger, seal
from tunetrail.provenance.manifest import DigestCache, build, canonical, identity, sha256_bytes, sha256_file
from tunetrail.provenance.record import dependency, read_record
from tunetrail.provenance.signing import read_policy
from tunetrail.provenance.verify import Verifier
from tunetrail.stages.registry import STAGES

from ..audited_run import flip, forge_ledger, ledger_lines, make_run, weights, write_config
from ..records import ATTEMPT, seal_folder


def verify(*paths: Path, **options):
    lines.run_of.cache_clear()
    return Verifier(recursive=True, **options).run(list(paths))


def names(result) -> set[str]:
    return {finding.name for finding in result.findings}


def edit_json(path: Path, change) -> dict:
    content = json.loads(path.read_bytes())
    change(content)
    path.write_bytes(canonical(content))
    return content


# ----------------------------------------------------------------------------- no false alarm


def test_an_untouched_run_is_sound(original):
    result = verify(original)
    assert (result.findings, result.exit_code(), len(result.artifacts)) == ([], 0, 7)
    assert len(result.unsigned) == 7
    assert result.bytes_read == sum(
        p.stat().st_size
        for p in original.rglob("*")
        if p.is_file()
        and p.name not in ("manifest.json", "provenance.json", "ledger.jsonl")
        and p.parent.name != "config"
    )


def test_touched_moved_and_copied_runs_are_sound(run, tmp_path):
    for path in run.rglob("*"):
        os.utime(path, (1, 1))
    assert verify(run).findings == []
    moved = tmp_path / "elsewhere/deep/r2"
    moved.parent.mkdir(parents=True)
    run.rename(moved)
    assert verify(moved).findings == []
    assert verify(moved / "evaluation/dpo/manifest.json").exit_code() == 0
    assert len(verify(moved / "evaluation/dpo").artifacts) == 7  # down to the base


def test_a_parent_that_was_moved_within_the_run_is_found_by_its_digest(run):
    (run / "policies/dpo").rename(run / "policies/kept")
    result = verify(run / "evaluation/dpo")
    assert names(result) == {"not-sealed", "place-changed", "config-missing"}  # under its new name
    assert result.exit_code() == 1


def test_a_rerun_with_the_same_bytes_raises_no_alarm(run):
    attempts = [ATTEMPT | {"start": "2026-02-02T00:00:00+00:00"}]
    seal_folder(run / "sft", "sft", {"base": run / "base", "data": run / "data"}, {"learning_rate": 5e-5}, attempts)
    assert names(verify(run)) == {"record-changed", "parent-record-changed"}  # it is not sealed yet
    assert names(verify(run, ledger=False)) == {"parent-record-changed"}
    seal(run)
    assert verify(run).findings == []


def test_an_artifact_on_another_disk_linked_into_the_run_is_part_of_it(run, tmp_path):
    (run / "sft").rename(tmp_path / "scratch")
    (run / "sft").symlink_to(tmp_path / "scratch")
    assert verify(run).findings == []
    assert len(verify(run).artifacts) == 7


def test_weights_that_were_saved_again_do_not_count_as_changed(run):
    path = run / "reward/model/model.safetensors"
    save_file(dict(reversed(load_file(path).items())), path, {"saved": "again", "format": "pt"})
    result = verify(run)
    assert [(f.name, f.artifact, f.message) for f in result.findings] == [
        ("file-resaved", "reward", "model/model.safetensors was saved again; all 2 tensors are what they were")
    ]
    assert (result.exit_code(), result.exit_code(strict=True)) == (3, 1)


# ----------------------------------------------------------------------------- what it must catch


def add(run):
    (run / "sft/model/extra.bin").write_bytes(b"x")


def rename(run):
    (run / "sft/model/config.json").rename(run / "sft/model/konfig.json")


def swap_with_another_run(run):
    other = make_run(run.parent / "other", seed=3)
    shutil.copy(other / "reward/model/model.safetensors", run / "reward/model/model.safetensors")


def edit_and_recompute(run):
    """Edits a file as somebody would who knows how manifests are made."""
    path = run / "reward/model/config.json"
    path.write_text('{"seed": 9}')
    edit_json(run / "reward/manifest.json", lambda m: m.update(build(run / "reward")))


def edit_record(run):
    edit_json(
        run / "evaluation/dpo/provenance.json",
        lambda s: s["predicate"]["buildDefinition"]["externalParameters"]["config"].update(seed=18),
    )


def edit_parent_record(run):
    edit_json(
        run / "sft/provenance.json",
        lambda s: s["predicate"]["buildDefinition"]["externalParameters"]["config"].update(seed=18),
    )


def retrain_parent(run):
    shutil.rmtree(run / "sft")
    weights(run / "sft", 77)
    seal_folder(run / "sft", "sft", {"base": run / "base", "data": run / "data"})
    seal(run)


def sparse(run):
    with (run / "sft/model/huge.bin").open("wb") as f:
        f.truncate(10 * 2**30)


def grow_sparse(run):
    with (run / "sft/model/config.json").open("r+b") as f:
        f.truncate(10 * 2**30)


def not_utf8(run):
    Path(os.fsdecode(os.fsencode(run / "sft") + b"/caf\xe9.txt")).write_text("x")


def link_outside(run):
    path = run / "sft/model/config.json"
    content = path.read_text()
    (run.parent / "outside.json").write_text(content)
    path.unlink()
    path.symlink_to(run.parent / "outside.json")


def dotted_path(run):
    def change(manifest):
        manifest["files"].append({"path": "../base/metrics.json", "size": 1, "sha256": "0" * 64})

    edit_json(run / "reward/manifest.json", change)


def swap_state(run):
    edit_json(
        run / "sft/provenance.json",
        lambda s: s["predicate"]["buildDefinition"]["internalParameters"]["attempts"][1]["state_in"].update(
            digest="9" * 64
        ),
    )


def link_artifact(run):
    moved = run.parent / "moved"
    (run / "evaluation/dpo").rename(moved)
    (run / "evaluation/dpo").symlink_to(moved)
    edit_record(run)


def nested_ledger(run):
    edit_record(run)
    forge_ledger(run / "evaluation")


def link_record(run):
    (run / "sft/provenance.json").rename(run.parent / "p.json")
    (run / "sft/provenance.json").symlink_to(run.parent / "p.json")


def older_state(run):
    def change(statement):
        attempts = statement["predicate"]["buildDefinition"]["internalParameters"]["attempts"]
        attempts[1]["states_out"] = [{"name": "checkpoint-3", "digest": "3" * 64}]
        attempts[2]["state_in"] = {"name": "checkpoint-1", "digest": "1" * 64}

    edit_json(run / "sft/provenance.json", change)


def link_loop(run):
    (run / "sft/model/config.json").unlink()
    (run / "sft/model/config.json").symlink_to("config.json")


def record_folder(run):
    (run / "sft/provenance.json").unlink()
    (run / "sft/provenance.json").mkdir()


CASES = {
    "a bit of weights": (
        lambda run: flip(run / "reward/model/model.safetensors"), "tensors-changed", "reward",
        "model/model.safetensors: 1 of 2 tensors differ, b first; restore it from a copy",
    ),
    "a bit of the tokenizer": (
        lambda run: flip(run / "sft/model/tokenizer.json"), "file-changed", "sft", "model/tokenizer.json has sha256",
    ),
    "a bit of the model's config": (
        lambda run: flip(run / "sft/model/config.json", 2), "file-changed", "sft", "model/config.json has sha256",
    ),
    "a bit of the data": (lambda run: flip(run / "data/sft.jsonl"), "file-changed", "data", "sft.jsonl has sha256"),
    "a label": (
        lambda run: flip(run / "comparisons/comparisons.jsonl", -20), "file-changed", "comparisons",
        "comparisons.jsonl has sha256",
    ),
    "a file added": (add, "file-added", "sft", "model/extra.bin is not in the manifest; remove it"),
    "a file removed": (
        lambda run: (run / "sft/model/config.json").unlink(), "file-missing", "sft", "model/config.json is gone",
    ),
    "a file renamed": (rename, "file-added", "sft", "model/konfig.json is not in the manifest"),
    "another run's weights": (swap_with_another_run, "tensors-changed", "reward", "2 of 2 tensors differ"),
    "a manifest computed again": (edit_and_recompute, "manifest-changed", "reward", "the record is of manifest"),
    "a field of a record": (edit_record, "record-changed", "evaluation/dpo", "was sealed"),
    "a parent's record": (
        edit_parent_record, "parent-record-changed", "reward", "the record of policy (sft) is not the one it had then",
    ),
    "a parent deleted": (
        lambda run: shutil.rmtree(run / "sft"), "parent-missing", "reward", "policy (../sft, manifest",
    ),
    "a parent made again": (retrain_parent, "parent-changed", "reward", "policy was manifest"),
    "a parent's record deleted": (
        lambda run: (run / "sft/provenance.json").unlink(), "record-missing", "sft", "no record",
    ),
    "a sparse file added": (sparse, "file-added", "sft", "model/huge.bin is not in the manifest"),
    "a file grown to 10 GB": (grow_sparse, "file-changed", "sft", "model/config.json has 10737418240 bytes, not 11"),
    "a name that is not UTF-8": (not_utf8, "file-added", "sft", "caf\\udce9.txt is not in the manifest"),
    "a link out of the folder": (link_outside, "link-outside", "sft", "it was not read"),
    "a path with ..": (
        dotted_path, "unsafe-path", "reward", "../base/metrics.json would leave the folder; it was not read",
    ),
    "a state of another attempt": (
        swap_state, "state-swapped", "sft",
        "went on from checkpoint-2 (9999999999999999…), which the attempt before it did not leave",
    ),
    "a line of the ledger removed": (
        ledger_lines(lambda x: x.pop(2)), "ledger-broken", "ledger.jsonl", "line 3 does not follow the line before it",
    ),
    "lines of the ledger swapped": (
        ledger_lines(lambda x: x.insert(1, x.pop(3))), "ledger-broken", "ledger.jsonl", "line 2 does not follow",
    ),
    "the ledger's tail cut": (ledger_lines(lambda x: x.pop()), "not-sealed", "sft", "it is not in ledger.jsonl"),
    "an artifact replaced by a link to an edited copy": (
        link_artifact, "record-changed", "evaluation/dpo", "was sealed",
    ),
    "a ledger of one's own further down": (
        nested_ledger, "ledger-broken", "evaluation/ledger.jsonl", "a second ledger within the run",
    ),
    "a record that is a link": (
        link_record, "link-outside", "sft", "provenance.json is a link; put the file itself there",
    ),
    "a file in the guise of a network file system's": (
        lambda run: (run / "sft/.nfs_evil.py").write_text("x"), "file-added", "sft",
        ".nfs_evil.py is not in the manifest",
    ),
    "an older state of the same run": (older_state, "state-swapped", "sft", "went on from checkpoint-1"),
    "a link that leads to itself": (link_loop, "file-changed", "sft", "model/config.json is no file any more"),
    "a record that is a folder": (record_folder, "record-edited", "sft", "cannot be read"),
    "half a line of the ledger": (
        ledger_lines(lambda x: x.append('{"artifact"')), "ledger-broken", "ledger.jsonl", "its last line is cut off",
    ),
    "an artifact and its children gone": (
        lambda run: shutil.rmtree(run / "evaluation"), "artifact-missing", "evaluation/dpo", "the ledger has it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_catches(run, case):
    tamper, name, artifact, message = CASES[case]
    tamper(run)
    result = verify(run)
    found = [f for f in result.findings if f.name == name and f.artifact == artifact]
    assert found, result.findings
    assert any(message in f.message for f in found), found
    assert result.exit_code() in (1, 2)
    assert result.exit_code() == 1 or FINDINGS[name][0] == "incomplete"
    assert "\n" not in "".join(f.message for f in result.findings)


def test_only_the_anchored_head_reveals_that_an_older_entry_was_removed(run):
    """The removed entry is about an artifact that was made again later."""
    retrain_parent(run)
    head = read_ledger(run).head
    ledger_lines(lambda x: x.pop())(run)
    assert "ledger-not-anchored" in names(verify(run, anchors=[head]))


def test_a_rewritten_ledger_does_not_lead_to_the_anchored_head(run):
    head = read_ledger(run).head
    assert verify(run, anchors=[head]).findings == []
    edit_record(run)
    (run / "ledger.jsonl").unlink()
    seal(run)
    assert names(verify(run)) == {"config-drift"}  # whoever can write the run can do this
    result = verify(run, anchors=[head])
    assert names(result) == {"ledger-not-anchored", "config-drift"}
    assert result.exit_code() == 1


def test_correcting_labels_makes_all_models_trained_on_them_stale(tmp_path):
    run = make_run(tmp_path)
    labels = tmp_path / "raw/labels.jsonl"
    original = labels.read_text()
    for change in ('{"ranks": [2, 1]}\n', original + '{"ranks": [2, 1], "corrects": 1}\n'):
        labels.write_text(change)
        result = verify(run)
        stale = {f.artifact for f in result.findings if f.name == "labels-changed"}
        assert stale == {"comparisons", "reward", "policies/dpo", "evaluation/dpo"}
        assert result.exit_code() == 1
    labels.write_text(original)
    assert verify(run).findings == []
    (tmp_path / "raw/rows.jsonl").write_text("{}\n")
    assert [(f.name, f.artifact) for f in verify(run).findings] == [("source-changed", "data")]


def test_a_tag_that_moved_is_found(run, tmp_path, monkeypatch):
    refs = tmp_path / "hub/models--someone--model/refs"
    refs.mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (refs / "v1").write_text("c" * 40)
    assert verify(run).findings == []
    (refs / "v1").write_text("d" * 40)
    [finding] = verify(run).findings
    assert (finding.name, finding.artifact) == ("base-moved", "base")
    assert finding.message == "someone/model@v1 was commit cccccccccccc, it is dddddddddddd now; pin the commit"


def test_a_dirty_tree_a_drifted_config_and_a_mixed_environment_are_warnings(run):
    seal_folder(
        run / "evaluation/dpo",
        "evaluation",
        {"model": run / "policies/dpo", "reward": run / "reward"},
        attempts=[ATTEMPT, ATTEMPT | {"python": "3.12.1"}],
        about=("model",),
        dirty=True,
        untracked={"config/new.yaml": "0" * 64},
    )
    write_config(run, "policies/dpo", {"stage": "dpo", "seed": 17, "config": {"beta": 0.2}})
    seal(run)
    result = verify(run)
    assert {(f.name, f.artifact): f.message.removesuffix("; the record has the diff") for f in result.findings} == {
        ("dirty-tree", "evaluation/dpo"): "the code differed from commit fde7df5d8a2d, 1 untracked files",
        ("mixed-environment", "evaluation/dpo"): "python changed between attempts: 3.11.7, then 3.12.1",
        ("config-drift", "policies/dpo"): "config/policies.dpo.json has another config.beta; run snakemake to make "
        "it again",
    }  # fmt: skip
    assert (result.exit_code(), result.exit_code(strict=True)) == (3, 1)


def test_config_drift_is_found_for_every_stage(tmp_path):
    """Each artifact is compared with the config file that its rule reads: shards share one, subjects have one each."""
    for stage, info in STAGES.items():
        artifact = info.pattern.replace(f"{{{info.wildcard}}}", "1-of-2" if info.wildcard == "shard" else "x")
        run = tmp_path / stage
        (run / artifact).mkdir(parents=True)
        (run / artifact / "metrics.json").write_text("{}")
        seal_folder(run / artifact, stage, config={"batch_size": 8})
        seal(run)
        for batch_size, findings in ((8, []), (4, [("config-drift", artifact)])):
            content = {"stage": stage, "seed": 17, "config": {"batch_size": batch_size}}
            write_config(run, artifact, content)
            assert [(f.name, f.artifact) for f in verify(run).findings] == findings


def test_two_threads_may_cache_two_links_to_one_file(tmp_path, monkeypatch):
    """Models kept during training are links. Both entries are written before either is renamed."""
    (tmp_path / "model").write_bytes(b"weights")
    (tmp_path / "link").hardlink_to(tmp_path / "model")
    both, write = threading.Barrier(2, timeout=20), Path.write_text
    monkeypatch.setattr(Path, "write_text", lambda path, text: (write(path, text), both.wait()))
    caches = [DigestCache(tmp_path / "digests") for _ in range(2)]  # one alone would remember the other link's digest
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(DigestCache.sha256, caches, [tmp_path / "model", tmp_path / "link"]))
    assert found == 2 * [sha256_bytes(b"weights")]
    assert all(cache.folder is not None for cache in caches)
    assert len(list((tmp_path / "digests").iterdir())) == 1


def test_a_quick_check_finds_an_edit_whose_times_were_set_back(run, tmp_path):
    def quick() -> Any:  # of another process: one remembers what it has hashed
        return verify(run, cache=DigestCache(tmp_path / "digests"))

    assert quick().findings == []
    hashed = len(list((tmp_path / "digests").iterdir()))
    assert hashed == len(
        {
            (p.stat().st_ino)
            for p in run.rglob("*")
            if p.is_file()
            and p.parent.name != "config"
            and p.name not in ("manifest.json", "provenance.json", "ledger.jsonl")
        }
    )
    for entry in (tmp_path / "digests").iterdir():  # the answer comes from the cache: a wrong entry is believed
        if entry.read_text().split()[1] == str((run / "sft/model/config.json").stat().st_ino):
            right = entry.read_text()
            entry.write_text(right[:-64] + "0" * 64)
            assert names(quick()) == {"file-changed"}
            assert verify(run).findings == []
            entry.write_text(right)
    flip(run / "sft/model/config.json", 2)
    assert names(quick()) == {"file-changed"}


def test_random_single_byte_edits_are_all_caught(run):
    """Anywhere in the artifacts and in the ledger."""
    rng = random.Random(0)
    files = sorted(p for p in run.rglob("*") if p.is_file() and p.parent.name != "config")
    weights_of_files = [p.stat().st_size for p in files]
    for _ in range(200):
        [path] = rng.choices(files, weights_of_files)
        content = path.read_bytes()
        place = rng.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ rng.randrange(1, 256)]) + content[place + 1 :])
        result = verify(run)
        assert result.exit_code() != 0, (path, place)
        assert result.findings, (path, place)
        path.write_bytes(content)
    assert verify(run).findings == []


# ----------------------------------------------------------------------------- signatures


def test_signatures(run, keys, capsys):
    policy = read_policy(keys / "policy.yaml")
    assert names(verify(run, policy=policy)) == {"signature-missing"}
    assert main(["audit", "seal", str(run), "--key", str(keys / "stranger.pem")]) == 0
    result = verify(run, policy=policy)
    assert {f.message for f in result.findings} == {"no key of the policy signed it"}
    assert main(["audit", "seal", str(run), "--key", str(keys / "lab.pem")]) == 0
    result = verify(run, policy=policy)
    assert result.findings == []
    assert (result.unsigned, result.signed["reward"]) == ([], ["lab"])
    # The envelope's payload is the record, signed over DSSE's pre-authentication encoding: openssl agrees.
    envelope = json.loads((run / "reward/provenance.dsse.json").read_bytes())
    import base64

    payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"]
    assert payload == (run / "reward/provenance.json").read_bytes()
    (keys / "message").write_bytes(b"DSSEv1 %d %b %d %b" % (len(kind), kind.encode(), len(payload), payload))
    (keys / "signature").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    command = [
        "openssl",
        "pkeyutl",
        "-verify",
        "-pubin",
        "-inkey",
        keys / "lab.pub",
        "-rawin",
        "-in",
        keys / "message",
        "-sigfile",
        keys / "signature",
    ]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0

    def forge(change):
        envelope = json.loads((run / "reward/provenance.dsse.json").read_bytes())
        change(envelope)
        (run / "reward/provenance.dsse.json").write_bytes(canonical(envelope))
        return [f.message.partition(";")[0] for f in verify(run, policy=policy).findings if f.artifact == "reward"]

    right = (run / "reward/provenance.dsse.json").read_bytes()
    other = json.loads((run / "sft/provenance.dsse.json").read_bytes())
    assert forge(lambda e: e["signatures"][0].update(sig=other["signatures"][0]["sig"])) == [
        "the signature in the name of lab is false"
    ]
    (run / "reward/provenance.dsse.json").write_bytes(right)
    assert forge(lambda e: e.update(payload=other["payload"])) == ["the envelope holds another record"]
    (run / "reward/provenance.dsse.json").write_bytes(b"{")
    assert "signature-false" in names(verify(run))  # even without a policy
    capsys.readouterr()


def test_a_policy_can_require_seals_and_clean_code(run, tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("require_sealed: true")
    assert verify(run, policy=read_policy(path)).findings == []
    whole = (run / "ledger.jsonl").read_bytes()
    ledger_lines(lambda x: x.pop())(run)
    result = verify(run, policy=read_policy(path))
    assert (names(result), result.exit_code()) == ({"policy-not-sealed"}, 1)
    (run / "ledger.jsonl").write_bytes(whole)
    seal_folder(
        run / "evaluation/dpo",
        "evaluation",
        {"model": run / "policies/dpo", "reward": run / "reward"},
        about=("model",),
        dirty=True,
    )
    seal(run)
    for content, found, code in (
        ("", {"dirty-tree"}, 3), ("allow_dirty: true", set(), 0), ("allow_dirty: false", {"policy-dirty"}, 1),
    ):  # fmt: skip
        path.write_text(content)
        result = verify(run, policy=read_policy(path))
        assert (names(result), result.exit_code()) == (found, code)


def odd(change):
    return lambda run: edit_json(run / "sft/provenance.json", lambda s: change(s["predicate"]["buildDefinition"]))


def replaced(name: str, old: bytes, new: bytes):
    """Damage: bytes of a file of the run replaced by others."""

    def damage(run: Path) -> None:
        (run / name).write_bytes((run / name).read_bytes().replace(old, new))

    return damage


def one_line(**entry):
    """Damage: a ledger with only this line."""
    line = canonical({"manifest": "a", "record": "b", "previous": "0" * 64} | entry)
    return lambda run: (run / "ledger.jsonl").write_bytes(line + b"\n")


ODD = {
    "no name of a parent": odd(lambda b: b["resolvedDependencies"][0].pop("name")),
    "no digest of a parent": odd(lambda b: b["resolvedDependencies"][0]["digest"].pop("sha256")),
    "no attempts": odd(lambda b: b["internalParameters"].update(attempts=None)),
    "no digest of a state": odd(lambda b: b["internalParameters"]["attempts"][1]["state_in"].pop("digest")),
    "attempts of another kind": odd(lambda b: b["internalParameters"].update(attempts=[3])),
    "a number out of range": replaced("sft/provenance.json", b"60", b"1e999"),
    "a list": lambda run: (run / "sft/provenance.json").write_text("[[]]"),
    "deep nesting": lambda run: (run / "sft/provenance.json").write_text("[" * 100_000),
    "a manifest of lists": lambda run: (run / "sft/manifest.json").write_text("[]"),
    "tensors that are none": (
        lambda run: edit_json(run / "sft/manifest.json", lambda m: m.update(tensors=[{"name": "a"}]))
    ),
    "a manifest that is a folder": (
        lambda run: ((run / "sft/manifest.json").unlink(), (run / "sft/manifest.json").mkdir())
    ),
    "a header without types": replaced("sft/model/model.safetensors", b"dtype", b"dtypd"),
    "a header with a short span": replaced("sft/model/model.safetensors", b"0,2048", b"002048"),
    "a ledger's artifact that is a list": one_line(artifact=["x"], number=0),
    "a line of a ledger without its number": one_line(artifact="x", numbes=0),
    "a ledger that is a folder": lambda run: ((run / "ledger.jsonl").unlink(), (run / "ledger.jsonl").mkdir()),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_malformed_content_is_a_finding_and_not_a_traceback(run, case, capsys):
    ODD[case](run)
    lines.run_of.cache_clear()
    assert main(["audit", "verify", "--recursive", str(run)]) in (1, 2)
    assert capsys.readouterr().out


def test_a_signature_whose_record_is_gone(run, keys):
    assert main(["audit", "seal", str(run), "--key", str(keys / "lab.pem")]) == 0
    (run / "reward/provenance.json").unlink()
    assert {"record-missing", "signature-false"} <= names(verify(run))


def test_a_record_of_another_manifest_is_not_sealed(run, capsys):
    edit_and_recompute(run)
    assert main(["audit", "seal", str(run)]) == 1
    assert "reward was not sealed: its record is of another manifest" in capsys.readouterr().err
    assert main(["audit", "verify", str(run), "--anchor", ""]) == 2
    assert "neither a head (64 digits) nor a file that begins with one" in capsys.readouterr().err


def test_missing_raw_data_is_named(original, tmp_path, capsys):
    shutil.copytree(original, tmp_path / "far/r")
    lines.run_of.cache_clear()
    assert main(["audit", "verify", "--recursive", str(tmp_path / "far/r")]) == 0
    assert (
        f"not checked, since not where it was read: {tmp_path}/raw/labels.jsonl, {tmp_path}/raw/rows.jsonl"
        in capsys.readouterr().out.replace("far/../", "")
    )


def test_a_scratch_folder_that_is_not_empty_is_left_alone(run, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    assert main(["audit", "reproduce", str(run / "sft"), "--scratch", str(tmp_path / "mine")]) == 2
    assert "is not empty, and not of an earlier reproduction" in capsys.readouterr().err
    assert (tmp_path / "mine/thesis.tex").exists()


@pytest.mark.parametrize(("content", "message"), [
    ("requires_signature: true", "p.yaml: requires_signature: Extra inputs are not permitted"),
    ("keys: [a]", "p.yaml: keys: Input should be a valid dictionary"),
    ("keys: {a: ]", "p.yaml: not valid YAML"),
])  # fmt: skip
def test_a_wrong_policy_is_refused(tmp_path, content, message):
    (tmp_path / "p.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        read_policy(tmp_path / "p.yaml")


# ----------------------------------------------------------------------------- records


def test_the_record_is_an_in_toto_statement_with_slsa_provenance(original):
    for path in original.rglob("provenance.json"):
        statement = json.loads(path.read_bytes())
        assert canonical(statement) == path.read_bytes()
        predicate = statement.pop("predicate")
        ParseDict(statement, statement_pb2.Statement())  # raises for a field it does not know
        ParseDict(predicate, provenance_pb2.Provenance())
    evaluation = json.loads((original / "evaluation/dpo/provenance.json").read_bytes())
    assert [s["digest"]["sha256"] for s in evaluation["subject"]] == [
        identity(original / "evaluation/dpo"),
        identity(original / "policies/dpo"),
    ]
    reward = read_record(original / "reward")
    assert reward.of_role("labels") == read_record(original / "comparisons").of_role("labels")
    assert reward.annotations("labels")["labelers"] == ["ann", "bob"]
    assert reward.annotations("labels")["chain_head"] is None
    assert "ranking page" in reward.annotations("labels")["reason"]


def test_a_seed_above_2_to_the_53_stays_exact():
    assert canonical({"a": 2**53 - 1}) == b'{"a":9007199254740991}'
    found = dependency("source", "s", seed=2**60 + 1)
    assert found["annotations"]["seed"] == "1152921504606846977"
    with pytest.raises(ValueError, match=r".+"):
        canonical({"a": float("nan")})


def test_tensor_digests_by_hand(tmp_path):
    save_file({"x": torch.tensor([1.0, -2.0])}, tmp_path / "m.safetensors")
    [tensor] = build(tmp_path)["tensors"]
    assert tensor == {
        "file": "m.safetensors", "name": "x", "dtype": "F32", "shape": [2],
        "sha256": sha256_bytes(bytes.fromhex("0000803f000000c0")),
    }  # fmt: skip
    assert build(tmp_path)["files"][0]["sha256"] == sha256_file(tmp_path / "m.safetensors")
