"""Data preparation: readers and their messages, splits, duplicates, the stage."""

import gzip
import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from tests.sources import rows_of
from tunetrail.config.data import DataConfig, FileSource
from tunetrail.contract.runner import main
from tunetrail.data import docstrings
from tunetrail.data.readers import check_sources, demonstrations, preferences, prompts
from tunetrail.data.splits import _shingles, assign_groups, duplicates_across, histogram, jaccard
from tunetrail.data.tables import merged
from tunetrail.errors import DataError
from tunetrail.files import read_jsonl, write_json
from tunetrail.models.tiny import tiny_tokenizer
from tunetrail.preferences.formats import parse_transcript
from tunetrail.provenance.manifest import list_files, sha256_file
from tunetrail.stages import data as data_stage

SHARED = Path(__file__).parents[2].parent / "shared/data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="../shared/data (real human data) is not on this machine")


EVEN = {"sft": 0.5, "reward": 0.15, "rl": 0.15, "evaluation": 0.1, "heldout": 0.1}
SHARES = {
    "demonstrations": EVEN,
    "preferences": {"reward": 0.4, "rl": 0.4, "evaluation": 0.1, "heldout": 0.1},
    "text": {"sft": 0.5 / 0.6, "heldout": 0.1 / 0.6},
}


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def source(path: Path, **more) -> FileSource:
    return FileSource(source="file", path=path, **more)


# ----------------------------------------------------------------------------- good rows


def test_the_three_demonstration_shapes(tmp_path):
    rows = rows_of(demonstrations, source(write(tmp_path / "d.jsonl", [
        {"text": "raw"},
        {"prompt": "Q", "completion": "A"},
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "1"}, {"role": "assistant",
            "content": "2"},
                      {"role": "user", "content": "3"}, {"role": "assistant", "content": "4"}]},
    ])))  # fmt: skip
    assert rows[0] == {"text": "raw", "group": "raw"}
    assert rows[1] == {"messages": [{"role": "user", "content": "Q"}], "completion": "A", "group": "q"}
    assert [row["completion"] for row in rows[2:]] == ["2", "4"]
    assert [len(row["messages"]) for row in rows[2:]] == [2, 4]


def test_prompts_without_answers(tmp_path):
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "1"}]
    rows = [{"prompt": "Q", "completion": "not read"}, {"messages": chat}, {"prompt": chat}]
    found = [row for _, row in prompts(source(write(tmp_path / "p.jsonl", rows)))]
    assert found[0] == {"messages": [{"role": "user", "content": "Q"}], "group": "q"}
    assert [row["messages"] for row in found[1:]] == [chat, chat]
    for bad, message in (
        ({"question": "Q"}, "p.jsonl:1: must have either prompt or messages; its columns are question; map others"),
        ({"messages": [*chat, {"role": "assistant", "content": "2"}]}, "'messages' must end with a turn of the user;"),
    ):
        with pytest.raises(DataError, match=message):
            list(prompts(source(write(tmp_path / "p.jsonl", [bad]))))


def test_columns_and_groups_are_mapped(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"instruction": "Q", "output": "A", "user": 7}])
    (row,) = rows_of(
        demonstrations, source(path, columns={"prompt": "instruction", "completion": "output"}, group="user")
    )
    assert (row["completion"], row["group"]) == ("A", "7")


@pytest.mark.parametrize("name", ["d.csv", "d.parquet", "d.jsonl.gz"])
def test_formats_give_the_same_rows(tmp_path, name):
    path, rows = tmp_path / name, [{"prompt": "Q", "completion": "NA"}, {"prompt": "2", "completion": "b"}]
    if name.endswith(".gz"):
        with gzip.open(path, "wt") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
    else:
        frame = pd.DataFrame(rows)
        frame.to_csv(path, index=False) if name.endswith("csv") else frame.to_parquet(path)
    assert [row["completion"] for row in rows_of(demonstrations, source(path))] == ["NA", "b"]


def test_preference_shapes(tmp_path):
    hh = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    rows = rows_of(preferences, source(write(tmp_path / "p.jsonl", [
        {"prompt": "Q", "chosen": "good", "rejected": "bad"},
        {"chosen": hh + " yes", "rejected": hh + " no"},
        {"prompt": "K", "completions": ["x", "y", "z"], "ranks": [3, 1, 3], "labeler": "ann", "order": [2, 1, 0],
            "time": "2026-01-01"},
        {"prompt": "K", "completions": ["x", "y", "z"], "ranks": [1, 2, 3], "labeler": "bob"},
        {"prompt": "P", "a": "left", "b": "right", "labels": [1, 2, 0]},
    ])))  # fmt: skip
    pair, transcript, several, annotated = rows
    assert pair["completions"] == ["good", "bad"]
    assert pair["rankings"][0]["ranks"] == [1, 2]
    assert [m["content"] for m in transcript["messages"]] == ["a", "b", "c"]
    assert transcript["completions"] == ["yes", "no"]
    assert [(r["labeler"], r["ranks"]) for r in several["rankings"]] == [("ann", [2, 1, 2]), ("bob", [1, 2, 3])]
    assert several["rankings"][0]["order"] == [2, 1, 0]
    assert [(r["labeler"], r["ranks"]) for r in annotated["rankings"]] == [
        ("annotator-0", [1, 2]),
        ("annotator-1", [2, 1]),
        ("annotator-2", [1, 1]),
    ]


def test_transcripts_keep_their_text():
    turns = parse_transcript("\n\nHuman: Hi: there\n\nsecond paragraph\n\nAssistant: Yes.")
    assert turns == [
        {"role": "user", "content": "Hi: there\n\nsecond paragraph"},
        {"role": "assistant", "content": "Yes."},
    ]


# ----------------------------------------------------------------------------- bad rows

GOOD = {"prompt": "Q", "completion": "A"}
PAIR = {"prompt": "Q", "chosen": "a", "rejected": "b"}
DEMO_SHAPES = (
    "must have one of the shapes text; prompt, completion; or messages; its columns are {}; map others with columns"
)
BAD_DEMONSTRATIONS = [
    (["{not json\n"], "d.jsonl:1: not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 "
                      "(char 1)); every line must hold one JSON object"),
    (["[1]\n"], "d.jsonl:1: must be a JSON object, got list"),
    ([], "d.jsonl: holds no rows"),
    (["\n", {"prompt": "Q", "completion": ""}], "d.jsonl:2: 'completion' is empty; remove the row or fill it"),
    ([{"prompt": 5, "completion": "A"}], "d.jsonl:1: 'prompt' must be a text, got int"),
    ([{"prompt": "Q", "completion": None}], "d.jsonl:1: 'completion' must be a text, got NoneType"),
    ([{"text": " \n"}], "d.jsonl:1: 'text' is empty; remove the row or fill it"),
    ([{"question": "Q", "answer": "A"}], "d.jsonl:1: " + DEMO_SHAPES.format("answer, question")),
    ([{"prompt": "Q"}], "d.jsonl:1: " + DEMO_SHAPES.format("prompt")),
    ([GOOD | {"text": "t"}], "d.jsonl:1: " + DEMO_SHAPES.format("completion, prompt, text")),
    ([{"messages": []}], "d.jsonl:1: 'messages' must be a non-empty list of messages"),
    ([{"messages": "hello"}], "d.jsonl:1: 'messages' must be a non-empty list of messages"),
    ([{"messages": [{"role": "user"}]}], "d.jsonl:1: 'messages[0]' must have 'role' and 'content'"),
    ([{"messages": [{"role": "bot", "content": "x"}]}], "d.jsonl:1: 'messages[0].role' must be system, user or "
                                                        "assistant, got 'bot'"),
    ([{"messages": [{"role": "user", "content": ""}]}], "d.jsonl:1: 'content' is empty; remove the row or fill it"),
    ([{"messages": [{"role": "user", "content": "x"}]}], "d.jsonl:1: 'messages' needs a turn of the assistant after "
                                                         "one of the user"),
    ([{"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "s"}]}],
        "d.jsonl:1: 'messages[1]': a system message must come first"),
]  # fmt: skip
PREFERENCE_SHAPES = (
    "must have one of the shapes prompt, chosen, rejected; chosen, rejected (transcripts); prompt, "
    "completions, ranks; or prompt, a, b, labels; its columns are {}; map others with columns"
)
BAD_PREFERENCES = [
    ([GOOD], "d.jsonl:1: " + PREFERENCE_SHAPES.format("completion, prompt")),
    ([PAIR | {"rejected": "a "}], "d.jsonl:1: two of its responses are the same text; remove the row"),
    ([PAIR | {"chosen": ""}], "d.jsonl:1: 'chosen' is empty; remove the row or fill it"),
    ([PAIR | {"prompt": ["x"]}], "d.jsonl:1: 'prompt[0]' must have 'role' and 'content'"),
    ([{"chosen": "plain", "rejected": "text"}], "d.jsonl:1: a transcript must start with '\\n\\nHuman: ' and hold "
                                                "'\\n\\nAssistant: '"),
    ([{"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: y"}],
        "d.jsonl:1: 'chosen' and 'rejected' must be the same conversation up to the last turn"),
    ([{"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: a\n\nAssistant: "}], "d.jsonl:1: the last "
        "turn of 'rejected' is empty; remove the row"),
    ([{"chosen": "\n\nHuman: a\n\nAssistant: x\n\nHuman: c", "rejected": "\n\nHuman: a\n\nAssistant: "
        "x\n\nHuman: d"}], "d.jsonl:1: the last turn of 'chosen' and 'rejected' must be the assistant's"),
    ([{"prompt": "Q", "completions": ["a"], "ranks": [1]}], "d.jsonl:1: 'completions' must be a list of at least two "
        "texts"),
    ([{"prompt": "Q", "completions": ["a", "b"], "ranks": [1]}], "d.jsonl:1: 'ranks' must be 2 whole numbers from 1 "
        "(best), one per completion"),
    ([{"prompt": "Q", "completions": ["a", "b"], "ranks": [0, 1]}], "d.jsonl:1: 'ranks' must be 2 whole numbers from "
        "1 (best), one per completion"),
    ([{"prompt": "Q", "completions": ["a", 3], "ranks": [1, 2]}], "d.jsonl:1: 'completions' must be a text, got int"),
    ([{"prompt": "Q", "completions": ["a", "b"], "ranks": [1, 2], "order": [0, 0]}], "d.jsonl:1: 'order' must name "
        "each of the 2 completions once, counting from 0"),
    ([{"prompt": "Q", "a": "x", "b": "y", "labels": [3]}], "d.jsonl:1: 'labels' must be a non-empty list of 0 (tie), "
                                                           "1 (a is better) or 2 (b is better)"),
    ([{"prompt": "Q", "a": "x", "b": "y", "labels": []}], "d.jsonl:1: 'labels' must be a non-empty list of 0 (tie), "
                                                          "1 (a is better) or 2 (b is better)"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "message"), BAD_DEMONSTRATIONS)
def test_bad_demonstrations(tmp_path, monkeypatch, rows, message):
    monkeypatch.chdir(tmp_path)
    config = DataConfig(demonstrations=[source(write(Path("d.jsonl"), rows))])
    with pytest.raises(DataError) as error:
        check_sources(config)
    assert str(error.value) == message


@pytest.mark.parametrize(("rows", "message"), BAD_PREFERENCES)
def test_bad_preferences(tmp_path, monkeypatch, rows, message):
    monkeypatch.chdir(tmp_path)
    config = DataConfig(preferences=[source(write(Path("d.jsonl"), [PAIR, *rows][1:]))])
    with pytest.raises(DataError) as error:
        check_sources(config)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.txt", b"x", "d.txt: unknown format; the name must end in .jsonl, .csv or .parquet (.gz may follow)"),
        ("d.jsonl", b'{"text": "\xff"}\n', "d.jsonl:1: not UTF-8; convert the file with iconv"),
        ("d.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 1000, mtime=0)[:60], "d.jsonl.gz: the gzip file is cut short "
            "or "
            "damaged; copy it again"),
        ("d.jsonl.gz", b'{"text": "x"}\n', "d.jsonl.gz: the gzip file is cut short or damaged; copy it again"),
        ("d.csv", b"", "d.csv: cannot be read as CSV: No columns to parse from file"),
        ("d.csv", b"prompt,completion\nQ,\n", "d.csv:1: 'completion' is empty; remove the row or fill it"),
        ("d.csv", b"prompt,completion\n", "d.csv: holds no rows"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    with pytest.raises(DataError) as error:
        rows_of(demonstrations, source(Path(name)))
    assert str(error.value) == message


def test_a_damaged_parquet_file_is_one_line(tmp_path):
    path = tmp_path / "d.parquet"
    path.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"d\.parquet: cannot be read as Parquet: [^\n]+$"):
        rows_of(demonstrations, source(path))


def test_invalid_rows_can_be_left_out(tmp_path):
    path = write(tmp_path / "d.jsonl", [GOOD, GOOD | {"completion": ""}, GOOD | {"prompt": "R"}])
    invalid = []
    assert len(rows_of(demonstrations, source(path), invalid)) == 2
    assert invalid == [(f"{path}:2", "'completion' is empty; remove the row or fill it")]


def test_missing_columns_are_named(tmp_path):
    path = write(tmp_path / "d.jsonl", [GOOD])
    with pytest.raises(
        DataError,
        match=r"d.jsonl:1: has no column 'question' \(columns maps prompt to it\); its columns are prompt, completion",
    ):
        rows_of(demonstrations, source(path, columns={"prompt": "question"}))
    with pytest.raises(DataError, match=r"d\.jsonl:1: has no column 'user', which group names"):
        rows_of(demonstrations, source(path, group="user"))


# ----------------------------------------------------------------------------- docstrings


def test_docstring_pairs_by_hand():
    code = '''
def f(x):
    """Return x,
    doubled.  And more.

    Details.
    """
    return 2 * x

def only_pass():
    """Nothing to see in here."""
    pass

def short(x):
    """Too short."""
    return x
'''
    assert list(docstrings.functions(code)) == [("def f(x):\n    return 2 * x", "Return x, doubled.")]


def test_the_standard_library_has_thousands():
    pairs = docstrings.pairs()
    assert len(pairs) > 3000
    assert len({p["prompt"] for p in pairs}) == len(pairs)
    assert not any('"""' + p["completion"] in p["prompt"] for p in pairs)
    assert not any({"test", "tests"} & set(Path(p["group"]).parts) for p in pairs)
    found, most = Counter(p["group"] for p in pairs), docstrings.most_pairs()
    assert all(most[group] >= count for group, count in found.items())
    assert sum(most.values()) < 1.1 * len(pairs)


# ----------------------------------------------------------------------------- splits and duplicates


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from("abcdefghijklmnopqrstuvwxyz"), min_size=1, max_size=200), st.integers(0, 5))
def test_every_group_goes_to_one_split_whatever_the_order(groups, seed):
    assigned = assign_groups(groups, EVEN, seed)
    assert set(assigned) == set(groups)
    shuffled = groups.copy()
    random.Random(0).shuffle(shuffled)
    assert assign_groups(shuffled, EVEN, seed) == assigned


def test_splits_are_near_their_shares_and_depend_on_the_seed():
    groups = [f"g{i % 100}" for i in range(1000)]
    assigned = assign_groups(groups, EVEN, 0)
    counts = {s: sum(assigned[g] == s for g in groups) for s in ("sft", "reward", "rl", "evaluation", "heldout")}
    assert counts == {"sft": 500, "reward": 150, "rl": 150, "evaluation": 100, "heldout": 100}
    assert assigned != assign_groups(groups, EVEN, 1)
    none = {"reward": 0.5, "evaluation": 0.25, "heldout": 0.25}
    assert set(assign_groups(groups, none, 0).values()) == {"reward", "evaluation", "heldout"}


LONG = "the quick brown fox jumps over the lazy dog and runs far away into the deep dark forest of old trees near us"


def test_exact_and_near_duplicates_across_splits_are_found():
    near = LONG.replace("near us", "near them")  # 21 shingles, one differs: 20/22
    assert jaccard(_shingles(LONG), _shingles(near)) == pytest.approx(20 / 22)
    texts = [LONG, "THE  quick " + LONG[10:], near, "something else entirely, with words of its own"]
    splits = ["sft", "evaluation", "rl", "sft"]
    assert duplicates_across(texts, splits, 0.9) == [(1, 0), (1, 2)]  # evaluation's row stays
    assert duplicates_across(texts, splits, 0.95) == [(1, 0)]
    assert duplicates_across(texts, splits, 1.0) == [(1, 0)]
    assert duplicates_across(texts, ["sft"] * 4, 0.9) == []


def test_near_duplicates_agree_with_brute_force():
    rng = random.Random(1)
    words = [f"w{i}" for i in range(12)]
    texts = [" ".join(rng.choices(words, k=8)) for _ in range(30)]
    texts += [t + " " + rng.choice(words) for t in texts]  # 6 of 7 shingles shared: 0.857
    splits = [rng.choice(["sft", "evaluation"]) for _ in texts]
    found = {b for _, b in duplicates_across(texts, splits, 0.8)}
    brute = set()
    for i, j in itertools.permutations(range(len(texts)), 2):
        if (
            splits[i] == "evaluation"
            and splits[j] == "sft"
            and jaccard(_shingles(texts[i]), _shingles(texts[j])) >= 0.8
        ):
            brute.add(j)
    assert brute
    assert found == brute


def test_histogram_by_hand():
    assert histogram([]) is None
    assert histogram([1, 1, 3]) == {
        "mean": 5 / 3,
        "min": 1,
        "max": 3,
        "histogram": {"edges": [1.0, 2.0, 3.0], "counts": [2, 1]},
    }


# ----------------------------------------------------------------------------- the stage


@pytest.fixture
def run_data(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path / "base/model")
    LlamaConfig(max_position_embeddings=4096).save_pretrained(tmp_path / "base/model")
    manifest = {"schema": 1, "stage": "base", "tokenizer": "t", "files": list_files(tmp_path / "base")}
    write_json(tmp_path / "base/manifest.json", manifest)

    def run(config: DataConfig, seed: int = 0) -> tuple[int, str, Path]:
        Path("data.json").write_text(
            json.dumps({"stage": "data", "seed": seed, "shares": SHARES, "config": config.model_dump(mode="json")})
        )
        capfd.readouterr()
        code = main(
            data_stage.run,
            ["--config=data.json", "--input=base=base/manifest.json", "--output=data/manifest.json", "--state=state"],
        )
        return code, capfd.readouterr().err, Path("data")

    return run


def numbered(n, **more):
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
    return [
        {"prompt": " ".join(words[int(d)] for d in f"{i:05d}") + f" number {i}", "completion": f"answer {i}"} | more
        for i in range(n)
    ]


def test_stage_writes_disjoint_splits_and_a_card(run_data, tmp_path):
    path = write(
        tmp_path / "d.jsonl", numbered(60) + [{"text": f"raw prose number {i} about things"} for i in range(40)]
    )
    code, error, out = run_data(
        DataConfig(
            demonstrations=[source(path, licence="MIT")], limits={"sft": 20}, system="Be brief.", near_duplicate=1.0
        )
    )
    assert code == 0, error
    card = json.loads((out / "metrics.json").read_text())
    rows = {split: read_jsonl(out / f"{split}.jsonl") for split in card["splits"]}
    assert len(rows["sft"]) == 20
    assert card["splits"]["sft"]["rows"] == 20
    assert card["sources"][0] | {"digest": None} == {
        "source": "d.jsonl",
        "version": None,
        "digest": None,
        "licence": "MIT",
        "kind": "demonstrations",
        "shape": "prompt/text",
        "split": None,
        "rows": 100,
        "invalid_rows": 0,
    }
    ids = [row["id"] for split in rows.values() for row in split]
    assert len(ids) == len(set(ids))
    row = rows["evaluation"][0]
    assert row["prompt"].startswith("<|system|>Be brief.<|eos|><|user|>")
    assert row["prompt"].endswith("<|eos|><|assistant|>")
    assert not any("text" in row for split in ("reward", "rl", "evaluation") for row in rows[split])
    assert any("text" in row for row in rows["sft"])
    assert card["splits"]["evaluation"]["digest"] == sha256_file(out / "evaluation.jsonl")
    first = (out / "manifest.json").read_bytes()
    assert (
        run_data(
            DataConfig(
                demonstrations=[source(path, licence="MIT")], limits={"sft": 20}, system="Be brief.", near_duplicate=1.0
            )
        )[0]
        == 0
    )
    assert (out / "manifest.json").read_bytes() == first


def test_preferences_become_comparisons_prompts_and_demonstrations(run_data, tmp_path):
    rows = [{"prompt": p["prompt"], "completions": ["bad", "best", "mid"], "ranks": [3, 1, 2]} for p in numbered(60)]
    code, error, out = run_data(
        DataConfig(preferences=[source(write(tmp_path / "p.jsonl", rows))], chat=False, near_duplicate=1.0)
    )
    assert code == 0, error
    comparisons = read_jsonl(out / "comparisons.jsonl")
    assert {row["split"] for row in comparisons} == {"reward", "heldout"}
    others = {row["prompt"] for split in ("evaluation", "rl") for row in read_jsonl(out / f"{split}.jsonl")}
    assert others
    assert not others & {row["prompt"] for row in comparisons}
    assert read_jsonl(out / "sft.jsonl") == []
    assert {row["completion"] for row in read_jsonl(out / "evaluation.jsonl")} == {"best"}


BAD_STAGES = [
    (numbered(3), {}, "data.shares.reward: no row is left for this split; 3 rows in 3 groups are too few for these "
                      "shares: add data, use finer groups, pin a source to this split, or set the share to 0 "
                      "if no stage needs it"),
    (numbered(60, completion="x" * 90), {"max_completion_tokens": 80}, "data.max_completion_tokens: 60 of 60 rows have "
                                                                       "an answer of more than 80 tokens: "),
    (numbered(60), {"max_prompt_tokens": 10}, "data.max_prompt_tokens: 60 of 60 rows have a prompt of more than 10 "
                                              "tokens: "),
    ([{"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "b"}, {"role": "user",
        "content": "c"}, {"role": "assistant", "content": "d"}]} for i in range(60)], {"chat": False},
            "is a conversation, but data.chat is false; set it to true (60 such rows: "),
    ([{"prompt": f"{LONG} {i}", "completion": "x"} for i in range(60)], {}, "rows repeat a row of another split, "
        "such as "),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "config", "message"), BAD_STAGES)
def test_stage_refuses(run_data, tmp_path, rows, config, message):
    code, error, out = run_data(DataConfig(demonstrations=[source(write(tmp_path / "d.jsonl", rows))], **config))
    assert code == 65
    assert message in error
    assert all(line.startswith("data: error: ") for line in error.splitlines())
    assert not (out / "manifest.json").exists()


def test_too_long_and_duplicate_rows_can_be_dropped(run_data, tmp_path):
    rows = numbered(60) + [{"prompt": f"too long {i}", "completion": "x" * 100} for i in range(5)]
    path = write(tmp_path / "d.jsonl", rows)
    code, error, out = run_data(
        DataConfig(demonstrations=[source(path)], max_completion_tokens=50, too_long="drop", near_duplicate=1.0)
    )
    assert code == 0, error
    assert json.loads((out / "metrics.json").read_text())["dropped"]["too_long"] == 5


# ----------------------------------------------------------------------------- real human data


@needs_shared
def test_real_data_reads():
    invalid = []
    hh = rows_of(preferences, source(SHARED / "hh-harmless-base/comparisons.jsonl.gz"), invalid)
    assert len(hh) + len(invalid) >= 1790  # a few pairs come twice
    assert len(invalid) == 6  # three empty turns, three conversations that diverge early
    assert all(row["messages"][-1]["role"] == "user" for row in hh)
    pandalm = rows_of(preferences, source(SHARED / "pandalm/pairs.jsonl.gz"), [])  # some outputs are empty
    assert {r["labeler"] for row in pandalm for r in row["rankings"]} >= {"annotator-0", "annotator-1", "annotator-2"}
    assert any(r["ranks"] == [1, 1] for row in pandalm for r in row["rankings"])
    assert len(rows_of(demonstrations, source(SHARED / "self-instruct/demonstrations.jsonl.gz"))) == 427


def test_a_row_in_sources_of_different_weight_is_refused():
    row = {"id": "a", "kind": "feedback", "where": "f.jsonl:1", "weight": 1.0, "ratings": [1]}
    assert merged([row, row | {"ratings": [2]}]) == [row | {"ratings": [1, 2]}]
    with pytest.raises(
        DataError, match=r"first g\.jsonl:1 \(5\) and f\.jsonl:1 \(1\); give both sources the same weight"
    ):
        merged([row, row | {"where": "g.jsonl:1", "weight": 5.0}])
