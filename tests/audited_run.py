"""A small made-up run for tests of the audit, and ways to damage it."""

import json
import os
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tunetrail.files import canonical_json
from tunetrail.provenance.ledger import START, seal
from tunetrail.provenance.manifest import canonical, identity, sha256_bytes, sha256_file
from tunetrail.provenance.record import dependency, labels_dependency, read_record
from tunetrail.provenance.run_folder import artifacts, config_of

from .records import ATTEMPT, seal_folder

RANKINGS = [{"labeler": "ann", "ranks": [1, 2]}, {"labeler": "bob", "ranks": [2, 1]}]


def weights(folder: Path, seed: int) -> None:
    (folder / "model").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in (("a", (64, 8)), ("b", (16,)))}
    save_file(tensors, folder / "model/model.safetensors", {"format": "pt"})
    (folder / "model/tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "model/config.json").write_text(f'{{"seed": {seed}}}')


def make_run(root: Path, seed: int = 0) -> Path:
    """results/r with base -> data -> sft -> comparisons -> reward -> policies/dpo -> evaluation/dpo, sealed."""
    run, raw = root / "results/r", root / "raw"
    raw.mkdir(parents=True)
    (raw / "rows.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    (raw / "labels.jsonl").write_text('{"ranks": [1, 2]}\n')
    folders = {
        name: run / name for name in ("base", "data", "sft", "comparisons", "reward", "policies/dpo", "evaluation/dpo")
    }
    for folder in folders.values():
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text('{"accuracy": {"mean": 0.61, "low": 0.55, "high": 0.67, "n": 96}}\n')
    for n, name in enumerate(("base", "sft", "reward", "policies/dpo")):
        weights(folders[name], 10 * seed + n)
    (folders["data"] / "sft.jsonl").write_text('{"group": "json.decoder", "id": "1"}\n{"group": "heapq", "id": "2"}\n')
    rows = [{"id": "1", "rankings": RANKINGS}]
    (folders["comparisons"] / "comparisons.jsonl").write_text(json.dumps(rows[0]) + "\n")

    seal_folder(folders["base"], "base", dependencies=[
        dependency("base", "someone/model", uri="pkg:huggingface/someone/model@v1", revision="v1", commit="c" * 40,
            licence="Apache-2.0", reason="its files are in the manifest"),
    ])  # fmt: skip
    files = {str(raw / "rows.jsonl"): sha256_file(raw / "rows.jsonl")}
    source = dependency(
        "source", "rows", files[str(raw / "rows.jsonl")], files=files, rows=1, licence="CC0-1.0", kind="demonstrations"
    )
    seal_folder(folders["data"], "data", {"base": folders["base"]}, dependencies=[source])
    states = [{"name": f"checkpoint-{i}", "digest": str(i) * 64} for i in (1, 2)]
    interrupted = {"ended": {"outcome": "interrupted", "message": "stopped by SIGTERM"}}
    killed = {"ended": {"outcome": "killed", "message": None}, "end": None, "seconds": None}
    resumed = {"state_in": states[1], "states_out": [states[1]]}
    attempts = [ATTEMPT | interrupted | {"states_out": states}, ATTEMPT | killed | resumed, ATTEMPT | resumed]
    seal_folder(
        folders["sft"], "sft", {"base": folders["base"], "data": folders["data"]}, {"learning_rate": 5e-5}, attempts
    )
    labelled = {str(raw / "labels.jsonl"): sha256_file(raw / "labels.jsonl")}
    seal_folder(
        folders["comparisons"],
        "comparisons",
        {"model": folders["sft"]},
        dependencies=[labels_dependency(folders["comparisons"] / "comparisons.jsonl", rows, {"files": labelled})],
    )
    seal_folder(folders["reward"], "reward", {"policy": folders["sft"], "comparisons": folders["comparisons"]})
    seal_folder(
        folders["policies/dpo"], "dpo", {"policy": folders["sft"], "comparisons": folders["comparisons"]}, {"beta": 0.1}
    )
    seal_folder(
        folders["evaluation/dpo"],
        "evaluation",
        {"model": folders["policies/dpo"], "reward": folders["reward"]},
        about=("model",),
    )
    for name in folders:
        write_config(run, name, read_record(folders[name]).config_file)
    seal(run)
    return run


def write_config(run: Path, artifact: str, config: dict) -> None:
    """The resolved config of an artifact's stage, as the rule `stage_config` writes it."""
    path = config_of(run, artifact)
    path.parent.mkdir(exist_ok=True)
    path.write_text(canonical_json(config) + "\n")


def flip(path: Path, place: int = -5) -> None:
    """Flips one bit; size and times stay as they were."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def forge_ledger(folder: Path) -> None:
    """A ledger for what lies in this folder, also where `seal` would refuse it: within a run."""
    lines, previous = [], START
    for number, artifact in enumerate(artifacts(folder)):
        entry = {
            "artifact": artifact.relative_to(folder).as_posix(), "manifest": identity(artifact),
            "record": sha256_file(artifact / "provenance.json"), "number": number, "previous": previous,
        }  # fmt: skip
        lines.append(canonical(entry))
        previous = sha256_bytes(lines[-1])
    (folder / "ledger.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))


def ledger_lines(change):
    def tamper(run):
        path = run / "ledger.jsonl"
        found = path.read_text().splitlines(keepends=True)
        change(found)
        path.write_text("".join(found))

    return tamper
