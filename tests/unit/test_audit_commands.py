"""The audit's commands: seal, verify, trace, diff, show, export, card, reproduce."""

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tunetrail.cli import main
from tunetrail.errors import DataError
from tunetrail.files import write_json
from tunetrail.provenance import drawing
from tunetrail.provenance import lineage as lines
from tunetrail.provenance.manifest import build, identity, sha256_file

from ..audited_run import flip, ledger_lines, make_run
from ..records import ATTEMPT, seal_folder

# ----------------------------------------------------------------------------- trace, diff, command line


def trace(capsys, run, what) -> list[str]:
    lines.run_of.cache_clear()
    assert main(["audit", "trace", "--reverse", what, "--in", str(run), "--json"]) == 0
    return [Path(p).relative_to(run.resolve()).as_posix() for p in json.loads(capsys.readouterr().out)["retrain"]]


def test_a_reverse_trace_lists_the_checkpoints_to_retrain(run, capsys):
    everything = ["policies/dpo", "reward", "sft"]
    assert trace(capsys, run, "dataset:rows") == everything
    assert trace(capsys, run, "group:heapq") == everything
    assert trace(capsys, run, "labeler:bob") == ["policies/dpo", "reward"]
    assert trace(capsys, run, "package:TRL==1.16.0") == ["base", *everything]
    assert trace(capsys, run, str(run / "sft")) == everything
    for nobody in ("group:nowhere", "labeler:carol", "package:trl==9", "dataset:rows2"):
        assert main(["audit", "trace", "--reverse", nobody, "--in", str(run)]) == 2
        assert f"{nobody}: no artifact here comes from it" in capsys.readouterr().err
    assert main(["audit", "trace", "--reverse", "rows", "--in", str(run)]) == 2
    assert "rows: name dataset:NAME, group:NAME" in capsys.readouterr().err


def test_a_trace_prints_a_tree_and_draws_it(run, tmp_path, capsys):
    assert main(["audit", "trace", str(run / "evaluation/dpo"), "--svg", str(tmp_path / "l.svg")]) == 0
    out = capsys.readouterr().out
    for text in (
        "evaluation/dpo",
        "model: policies/dpo",
        "comparisons: comparisons",
        "base: someone/model",
        "as above",
    ):
        assert text in out
    assert (tmp_path / "l.svg").read_text().count("<rect") == 8  # seven artifacts on a sheet
    shutil.rmtree(run / "reward")
    lines.run_of.cache_clear()
    assert main(["audit", "trace", str(run / "evaluation/dpo")]) == 2
    assert "reward: missing" in capsys.readouterr().out


def test_a_drawing_puts_parents_to_the_left_and_survives_a_record_that_names_its_own_artifact():
    assert drawing.columns([set(), {0}, {0, 1}, {0}]) == [0, 1, 2, 1]
    assert drawing.reduced([set(), {0}, {0, 1}, {0}]) == [set(), {0}, {1}, {0}]
    assert drawing.acyclic([set(), {0, 1}, {1}]) == [set(), {0}, {1}]
    assert sorted(map(len, drawing.acyclic([{1}, {0}]))) == [0, 1]


def test_a_diff_fits_on_one_screen(run, tmp_path, capsys):
    other = make_run(tmp_path / "second", seed=0)
    with (other / "data/sft.jsonl").open("a") as f:
        f.write('{"group": "heapq", "id": "3"}\n')
    path = other / "policies/dpo/model/model.safetensors"
    tensors = load_file(path)
    tensors["a"][0, 0] += 1
    save_file(tensors, path, {"format": "pt"})
    seal_folder(other / "data", "data", {"base": other / "base"})
    seal_folder(other / "sft", "sft", {"base": other / "base", "data": other / "data"})
    seal_folder(other / "policies/dpo", "dpo", {"policy": other / "sft"}, {"beta": 0.3}, [ATTEMPT | {"host": "node8"}])
    lines.run_of.cache_clear()
    assert main(["audit", "diff", str(run / "policies/dpo"), str(other / "policies/dpo")]) == 1
    out = capsys.readouterr().out
    for text in (
        "sft.jsonl: both 2, only A 0, only B 1",
        "dpo.beta: 0.1 -> 0.3",
        "dpo.host: node7 -> node8",
        "tensors: 1 equal, 1 differ, 0 only in A, 0 only in B",
    ):
        assert text in out
    norm = float(load_file(run / "policies/dpo/model/model.safetensors")["a"].norm())
    assert f"a: moved by {1 / norm:.2%} of its norm, 1.00e+00 at most" in out
    assert len(out.splitlines()) < 50
    assert main(["audit", "diff", str(run / "sft"), str(run / "sft")]) == 0
    assert "equal: the same files" in capsys.readouterr().out


def test_seal_and_verify_print_results_and_set_exit_codes(run, tmp_path, capsys, monkeypatch):
    lines.run_of.cache_clear()
    anchor = tmp_path / "head.txt"
    assert main(["audit", "seal", str(run), "--anchor", str(anchor)]) == 0
    assert anchor.read_text().split()[0] in capsys.readouterr().out
    assert main(["audit", "verify", "--deep", "--recursive", "--anchor", str(anchor), str(run)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("SOUND: 7 artifacts, 0.00 GB compared, 0 findings, UNSIGNED\n")
    assert "\nhead of " in out
    flip(run / "reward/model/config.json", 2)
    assert main(["audit", "verify", str(run / "reward"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [f["name"] for f in found["findings"]] == ["file-changed"]
    assert main(["audit", "verify", str(run / "reward")]) == 1
    assert capsys.readouterr().out.startswith("error: reward: file-changed: model/config.json has sha256 ")
    assert main(["audit", "verify", str(tmp_path / "nothing")]) == 2
    assert "nothing: no artifact" in capsys.readouterr().err
    assert main(["audit", "seal", str(tmp_path / "nothing")]) == 2
    ledger_lines(lambda x: x.pop(0))(run)
    assert main(["audit", "seal", str(run)]) == 2
    assert "nothing is sealed on top of it" in capsys.readouterr().err
    assert main(["audit", "verify", "--deep", "--quick", str(run)]) == 2
    assert "--deep, --quick: choose one" in capsys.readouterr().err


def test_show_prints_a_record(run, capsys):
    assert main(["audit", "show", str(run / "sft")]) == 0
    out = capsys.readouterr().out
    assert f"manifest  {sha256_file(run / 'sft/manifest.json')}" in out
    assert "input     base: ../base" in out
    assert out.count("attempt   ") == 3
    (run / "sft/provenance.json").write_text("[]")
    assert main(["audit", "show", str(run / "sft")]) == 2
    assert "is no provenance record" in capsys.readouterr().err


def test_a_name_that_is_not_utf8_is_not_published(tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("x")
    with pytest.raises(DataError, match="a file name must be UTF-8"):
        build(tmp_path)


# ----------------------------------------------------------------------------- other formats


def export(capsys, folder: Path, kind: str) -> str:
    lines.run_of.cache_clear()
    assert main(["audit", "export", str(folder), "--format", kind]) == 0
    return capsys.readouterr().out


def test_export_slsa(run, capsys):
    assert export(capsys, run / "reward", "slsa").encode() == (run / "reward/provenance.json").read_bytes() + b"\n"


def test_export_prov(run, capsys):
    from prov.model import ProvDerivation, ProvDocument, ProvEntity

    document = ProvDocument.deserialize(content=export(capsys, run / "policies/dpo", "prov"), format="json")
    labels = {str(e.label) for e in document.get_records(ProvEntity)}
    assert {"policies/dpo", "sft", "base", "data", "comparisons", "someone/model", "rows"} == labels
    derived = {tuple(str(value) for _, value in r.formal_attributes[:2]) for r in document.get_records(ProvDerivation)}
    assert (f"tt:{identity(run / 'policies/dpo')}", f"tt:{identity(run / 'sft')}") in derived


def test_export_spdx(run, capsys, tmp_path):
    from spdx_python_model import v3_0_1 as model

    (tmp_path / "s.json").write_text(export(capsys, run / "policies/dpo", "spdx"))
    objects = model.SHACLObjectSet()
    with (tmp_path / "s.json").open("rb") as f:
        model.JSONLDDeserializer().read(f, objects)  # checks types, ranges and cardinalities
    assert not objects.missing_ids
    packages = {p._id: p.name for p in objects.foreach_type(model.software_Package)}
    assert set(packages.values()) == {"policies/dpo", "sft", "base", "data", "comparisons", "someone/model", "rows"}
    relations = {
        (packages[r.from_._id], r.relationshipType.rpartition("/")[2], packages[r.to[0]._id])
        for r in objects.foreach_type(model.Relationship)
    }
    assert {
        ("policies/dpo", "descendantOf", "sft"),
        ("policies/dpo", "trainedOn", "comparisons"),
        ("sft", "descendantOf", "base"),
        ("sft", "trainedOn", "data"),
        ("base", "descendantOf", "someone/model"),
    } <= relations


def test_export_model_card(run, capsys):
    from huggingface_hub import ModelCard

    text = export(capsys, run / "policies/dpo", "model-card")
    assert main(["audit", "card", str(run / "policies/dpo")]) == 0
    assert capsys.readouterr().out == text
    card = ModelCard(text)
    assert (card.data.base_model, card.data.license) == ("someone/model", "apache-2.0")
    assert [r.metric_value for r in card.data.eval_results] == [0.61]
    for line in (
        "- accuracy: 0.61 [0.55, 0.67], n = 96",
        f"`{identity(run / 'policies/dpo')}`",
        "- labels by ann, bob",
        "- data: rows, licence CC0-1.0",
    ):
        assert line in text
    assert 'AutoModelForCausalLM.from_pretrained("model")' in text
    assert "reward_bias" not in text
    assert "adapter/" not in text
    assert main(["audit", "card", str(run / "data")]) == 2
    assert "a card is of a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"rope_theta": 1e5, "rope_parameters": {"rope_theta": 1e5}}, "Needs transformers 4.57 or later"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e5}}}, "Needs transformers 5.0 or later"),
        ({}, "Needs transformers 4.57 or later"),  # positions are learnt, or there are none
        ({"reward_pooling": "last"}, "is the logit less `config.reward_bias`"),
        ({"reward_pooling": "mean"}, "is the mean over its tokens"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            'AutoModelForSequenceClassification.from_pretrained("model")',
        ),
    ],
)
def test_a_card_explains_how_to_load_the_model(run, capsys, config, line):
    folder = run / "policies/dpo"
    write_json(folder / "model/config.json", config)
    (folder / "adapter").mkdir()
    seal_folder(folder, "dpo", {"policy": run / "sft"})
    text = export(capsys, folder, "model-card")
    assert line in text
    assert (
        "`adapter/` is the LoRA adapter that is merged into these weights, for use on the model that training" in text
    )
    assert "started from, `sft`." in text


# ----------------------------------------------------------------------------- reproduce


def test_the_tiers_of_a_reproduction(run, tmp_path):
    from tunetrail.provenance.reproduce import compare

    def again(change=lambda folder: None) -> str:
        other = tmp_path / "again"
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(run / "sft", other)
        change(other)
        seal_folder(other, "sft", {"base": run / "base"})
        return compare(run / "sft", other, 1e-3).tier

    def moved(by: float):
        def change(folder: Path) -> None:
            path = folder / "model/model.safetensors"
            tensors = load_file(path)
            tensors["a"] *= 1 + by
            save_file(tensors, path, {"format": "pt"})

        return change

    def with_losses(folder: Path) -> None:
        moved(0.5)(folder)
        (folder / "history.jsonl").write_text('{"loss": 1.5}\n')

    assert again() == "same file bytes"
    assert (
        again(
            lambda f: save_file(load_file(f / "model/model.safetensors"), f / "model/model.safetensors", {"new": "1"})
        )
        == "same tensors"
    )
    assert again(moved(5e-4)) == "within tolerance"
    assert again(moved(5e-3)) == "different"
    (run / "sft/history.jsonl").write_text('{"loss": 1.5}\n')
    assert again(with_losses) == "same first losses"
    (run / "sft/history.jsonl").write_text('{"loss": 2.5}\n')
    assert again(with_losses) == "different"


def test_export_ro_crate(run, capsys, tmp_path, monkeypatch):
    """By the format's own validator; the terms it would fetch come from the library's copy."""
    import rdflib.plugins.shared.jsonld.context as reader
    import rocrate
    from rocrate_validator import models, services
    from rocrate_validator.utils import http

    text = (Path(rocrate.__file__).parent / "data/ro-crate.jsonld").read_text()

    class Reply:
        status_code, headers, ok = 200, {"Content-Type": "application/ld+json"}, True

        def json(self):
            return json.loads(text)

    monkeypatch.setattr(http.HttpRequester, "get", lambda self, url, **kwargs: Reply(), raising=False)
    monkeypatch.setattr(reader, "source_to_json", lambda *args, **kwargs: (json.loads(text), None))

    def issues(content: str) -> list[str]:
        crate = tmp_path / "crate"
        crate.mkdir(exist_ok=True)
        (crate / "ro-crate-metadata.json").write_text(content)
        result = services.validate(services.ValidationSettings(
            rocrate_uri=str(crate), profile_identifier="ro-crate-1.1", requirement_severity=models.Severity.REQUIRED,
            skip_availability_check=True,
        ))  # fmt: skip
        return [str(issue.message) for issue in result.get_issues()]

    content = export(capsys, run / "policies/dpo", "ro-crate")
    assert issues(content) == []
    graph = {e["@id"]: e for e in json.loads(content)["@graph"]}
    assert graph[graph["./"]["mainEntity"]["@id"]]["name"] == "policies/dpo"
    assert (
        graph["./"]["license"] == {"@id": "https://spdx.org/licenses/Apache-2.0"}
        or graph["./"]["license"] == "https://spdx.org/licenses/Apache-2.0"
    )
    broken = json.loads(content)
    broken["@graph"] = [e for e in broken["@graph"] if e["@id"] != "ro-crate-metadata.json"]
    assert issues(json.dumps(broken))
