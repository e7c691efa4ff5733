"""The comparisons stage, run as in the pipeline: manifests in, an artifact out."""

import hashlib
import json
import os

import pytest

from tunetrail.contract.runner import main
from tunetrail.files import read_jsonl, write_json, write_jsonl
from tunetrail.models.tiny import tiny_tokenizer
from tunetrail.preferences.summary import longer_wins, summarize
from tunetrail.provenance.manifest import list_files
from tunetrail.provenance.record import read_record
from tunetrail.scorers.chrf import chrf
from tunetrail.stages.comparisons import run

REF = "Return the absolute value of the argument."
COMPLETIONS = ["Open the window", "Return the absolute value of the number.", "Return a value."]


def make_row(row_id, split="reward", completions=COMPLETIONS, ref=REF):
    return {
        "id": row_id, "group": row_id, "split": split, "prompt": f"Q {row_id}",
        "messages": [{"role": "user", "content": f"Q {row_id}"}], "reference": ref,
        "completions": completions, "finished": [True] * len(completions),
    }  # fmt: skip


ROWS = [make_row(f"r{i}") for i in (3, 1, 2, 0)] + [
    make_row("h0", split="heldout"),
    make_row("alone", completions=["one"]),
]


@pytest.fixture
def artifact(tmp_path):
    """A function that seals a folder of files with a manifest and returns the manifest's path."""

    def seal(name, metrics=None, **files):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for file, rows in files.items():
            write_jsonl(folder / f"{file}.jsonl", rows)
        write_json(folder / "metrics.json", metrics or {})
        write_json(
            folder / "manifest.json", {"schema": 1, "stage": name, "tokenizer": "t", "files": list_files(folder)}
        )
        return folder / "manifest.json"

    return seal


@pytest.fixture
def compare(tmp_path, artifact):
    """A function that runs the stage on shards of rows and returns (exit code, output folder)."""
    tiny_tokenizer().save_pretrained(tmp_path / "base" / "model")

    def call(*shards, seed=0, name="comparisons", own=None, **config):
        content = {
            "stage": "comparisons",
            "seed": seed,
            "precision": "fp32",
            "config": {"labeler": "simulated"} | config,
        }
        write_json(tmp_path / "config.json", content)
        data = artifact("data") if own is None else artifact(f"{name}-data", comparisons=own)
        inputs = {"data": data, "base": artifact("base")}
        for i, rows in enumerate(shards):
            inputs[f"shard{i}"] = artifact(f"{name}-shard{i}", metrics={"duplicates_removed": i + 1}, completions=rows)
        arguments = ["--config", str(tmp_path / "config.json"), "--output", str(tmp_path / name / "manifest.json")]
        arguments += ["--state", str(tmp_path / "state" / name)]
        arguments += [part for role, path in inputs.items() for part in ("--input", f"{role}={path}")]
        return main(run, arguments), tmp_path / name

    return call


def test_the_artifact_holds_rankings_metrics_and_a_record(compare):
    code, folder = compare(ROWS[:2], ROWS[2:], labelers=2)
    assert code == 0
    rows = read_jsonl(folder / "comparisons.jsonl")
    assert [(row["split"], row["id"]) for row in rows] == [("heldout", "h0"), *(("reward", f"r{i}") for i in range(4))]
    for row in rows:
        assert [r["labeler"] for r in row["rankings"]] == ["simulated-0", "simulated-1"]
        assert all(r["ranks"] == [3, 1, 2] for r in row["rankings"])
        assert row["rankings"][0]["scores"] == [chrf(c, REF) for c in COMPLETIONS]
    assert set(rows[0]) == {*ROWS[0], "rankings"}

    assert json.loads((folder / "metrics.json").read_text()) == {
        "prompts": 5,
        "prompts_by_split": {"heldout": 1, "reward": 4},
        "completions_per_prompt": 3.0,
        "rankings": 10,
        "ties": 0.0,
        "labelers": {"simulated-0": {"rankings": 5}, "simulated-1": {"rankings": 5}},
        "agreement": 1.0,
        "longer_wins": pytest.approx((1 + 1 + 0.5) / 3),  # the missing two have equal lengths
        "duplicates_removed": 3,
        "left_out": 1,
        "from_data": 0,
    }
    (labels,) = read_record(folder).of_role("labels")
    assert labels["digest"]["sha256"] == hashlib.sha256((folder / "comparisons.jsonl").read_bytes()).hexdigest()
    assert labels["annotations"]["rankings"] == 10
    assert labels["annotations"]["labelers"] == ["simulated-0", "simulated-1"]


def test_preferences_from_the_data_are_added_to_collected_comparisons(compare):
    ranking = {"labeler": "ann", "ranks": [1, 2], "order": [0, 1], "time": None, "scores": None}
    own = [
        make_row(name, split=split, completions=["good", "bad"], ref=None) | {"rankings": [ranking]}
        for name, split in (("p0", "reward"), ("p1", "reward"), ("q0", "heldout"))
    ]
    code, folder = compare(ROWS, own=own)
    assert code == 0
    rows = read_jsonl(folder / "comparisons.jsonl")
    assert [row for row in rows if row["id"] in ("p0", "p1", "q0")] == [own[2], own[0], own[1]]
    assert [row["id"] for row in rows] == ["h0", "q0", "p0", "p1", "r0", "r1", "r2", "r3"]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["from_data"], metrics["left_out"]) == (3, 1)
    assert metrics["prompts_by_split"] == {"heldout": 2, "reward": 6}
    (labels,) = read_record(folder).of_role("labels")
    assert labels["annotations"]["labelers"] == ["ann", "simulated-0"]


def test_bytes_depend_on_seed_and_noise_but_not_on_sharding(compare):
    def written(*shards, **options):
        code, folder = compare(*shards, **options)
        assert code == 0
        return (folder / "comparisons.jsonl").read_bytes()

    noisy = written(ROWS[:2], ROWS[2:], noise=20.0, name="a")
    assert written(ROWS[4:], ROWS[::-1][2:3], ROWS[:3], noise=20.0, name="b") == noisy
    assert written(ROWS, noise=20.0, seed=1, name="c") != noisy
    assert written(ROWS, name="d") != noisy


def test_summary_by_hand():
    row = make_row("x", completions=["a", "bb", "cc", "dddd"])
    row["rankings"] = [
        {
            "labeler": "ann",
            "ranks": [1, 1, 2, 3],
        },  # a-bb is tied; the shorter wins 4 pairs; bb and cc have equal lengths
        {"labeler": "bob", "ranks": [2, 1, 1, 1]},  # the longer wins 3 pairs, the others are tied
    ]
    # ann's five: a>cc, a>dddd, bb>dddd, cc>dddd go to the shorter, bb>cc counts half
    assert longer_wins([row]) == pytest.approx((0.5 + 3) / 8)
    summary = summarize([row])
    assert summary["ties"] == pytest.approx(4 / 12)
    # a-bb and bb-cc, bb-dddd, cc-dddd: one sees a tie; a-cc, a-dddd: opposite
    assert summary["agreement"] == pytest.approx((4 * 0.5 + 2 * 0) / 6)
    assert summary["labelers"] == {"ann": {"rankings": 1}, "bob": {"rankings": 1}}


def test_agreement_needs_two_labelers(compare):
    _, folder = compare(ROWS)
    assert json.loads((folder / "metrics.json").read_text())["agreement"] is None


@pytest.mark.parametrize(
    ("rows", "options", "code", "message"),
    [
        (
            [
                ROWS[0],
                make_row("alone", completions=["one"]),
                make_row("same", completions=["x", "x"]),
                make_row("h", split="heldout"),
            ],
            {},
            65,
            "only 1 of 3 prompts of the reward split have two distinct completions, at least 2 are needed",
        ),
        ([], {}, 65, "only 0 of 0 prompts"),
        ([ROWS[0], ROWS[1], ROWS[0]], {}, 65, "row r3 is in shard0 too"),
        (ROWS, {"tie": 100.0}, 65, "every pair is a tie"),
        (
            [ROWS[0], make_row("no-reference", ref=None)],
            {},
            65,
            "first that of row no-reference",
        ),
    ],
)
def test_refusals_are_one_line_and_leave_no_artifact(compare, capfd, rows, options, code, message):
    result, folder = compare(rows, **options)
    error = capfd.readouterr().err.strip()
    assert result == code
    assert message in error
    assert "\n" not in error
    assert not folder.exists()


def test_recorded_rankings_through_the_stage(compare, tmp_path, capfd):
    path = tmp_path / "people.jsonl"
    people = [
        {
            "prompt": row["prompt"],
            "completions": COMPLETIONS[::-1],
            "ranks": [1, 2, 2],
            "labeler": labeler,
            "time": "2024-05-01",
        }
        for row in ROWS
        for labeler in ("ann", "bob")
    ]
    write_jsonl(path, people)
    code, folder = compare(ROWS, labeler="recorded", path=str(path))
    assert code == 0
    rankings = [r for row in read_jsonl(folder / "comparisons.jsonl") for r in row["rankings"]]
    assert {(r["labeler"], *r["ranks"], r["time"]) for r in rankings} == {
        ("ann", 2, 2, 1, "2024-05-01"),
        ("bob", 2, 2, 1, "2024-05-01"),
    }
    files = read_record(folder).annotations("labels")["files"]
    assert files == {os.path.relpath(path, folder): hashlib.sha256(path.read_bytes()).hexdigest()}

    write_jsonl(path, people[:4])
    code, _ = compare(ROWS, labeler="recorded", path=str(path), name="again")
    assert code == 65
    assert f"{path}: no line ranks completions of the prompt 'Q " in capfd.readouterr().err
