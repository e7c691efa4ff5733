"""Labels exported for other tools and imported again."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.sources import rows_of
from tunetrail.cli import main
from tunetrail.config.data import FileSource
from tunetrail.data.readers import demonstrations, preferences
from tunetrail.errors import DataError
from tunetrail.labeling import exchange, recorded
from tunetrail.labeling.app import queue
from tunetrail.labeling.app.store import Store
from tunetrail.preferences.ranks import dense

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
NAMES = ["human-1", "human-2", "human-10"]


@st.composite
def items(draw, all_tied: bool = True) -> list[exchange.Item]:
    """Tasks of 2 to 9 distinct texts that some labelers ranked, with ties."""
    found = []
    for n in range(draw(st.integers(1, 3))):
        texts = draw(st.lists(TEXT, min_size=2, max_size=9, unique=True))
        k, rankings = len(texts), []
        for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True)):
            ranks = dense(draw(st.lists(st.integers(1, k), min_size=k, max_size=k)))
            if not all_tied and len(set(ranks)) == 1:
                ranks[0] = 2
            ranking = {"labeler": name, "ranks": ranks, "order": draw(st.permutations(range(k))), "time": "2026-01-01"}
            extras = {"ratings": None, "flags": [[]] * k, "all_bad": False, "comment": "é", "seconds": 1.5}
            rankings.append(ranking | extras)
        found.append({"id": f"t{n}", "prompt": draw(TEXT), "completions": texts, "rankings": rankings})
    return found


def there_and_back(given: list[exchange.Item], form: str, folder) -> list[exchange.Item]:
    path = folder / form
    path.write_text(exchange.written(exchange.EXPORT[form](given)), encoding="utf-8")
    return exchange.read(path, form)


def ranks_by_text(found: list[exchange.Item]) -> dict:
    """What every format must preserve: the rank that each labeler gave to each text of a prompt."""
    return {
        (item["id"], item["prompt"], ranking["labeler"]): dict(zip(item["completions"], ranking["ranks"], strict=True))
        for item in found
        for ranking in item["rankings"]
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exchange")


@given(given=items())
def test_jsonl_loses_nothing(folder, given):
    assert there_and_back(given, "jsonl", folder) == given


@given(given=items(all_tied=False))
def test_trl_pairs_determine_all_ranks_unless_all_are_tied(folder, given):
    found = there_and_back(given, "trl", folder)
    assert ranks_by_text(found) == ranks_by_text(given)
    assert len(found) == len(given)  # the pairs of two labelers belong to one task


def item(ranks: list[int], order: list[int] | None = None) -> exchange.Item:
    texts = ["a", "b", "c"][: len(ranks)]
    ranking = {"labeler": "human-1", "ranks": ranks} | ({"order": order} if order else {})
    return {"id": "t", "prompt": "p", "completions": texts, "rankings": [ranking]}


def test_a_tied_pair_has_no_line_in_trl():
    tied, all_tied = item([2, 1, 1], [0, 2, 1]), item([1, 1, 1])
    pairs = [(row["chosen"], row["rejected"]) for row in exchange.to_trl([tied])]
    assert pairs == [("b", "a"), ("c", "a")]
    assert exchange.to_trl([all_tied]) == []


def test_pairs_without_id_and_labeler_are_rankings_of_two(tmp_path):
    (tmp_path / "trl").write_text('{"prompt": "p", "chosen": "y", "rejected": "x"}\n' * 2)
    assert ranks_by_text(exchange.read(tmp_path / "trl", "trl")) == {
        ("line-1", "p", "recorded"): {"y": 1, "x": 2},
        ("line-2", "p", "recorded"): {"y": 1, "x": 2},
    }


PAIR = {"id": "t", "prompt": "p", "labeler": "l"}
BAD = [
    ("jsonl", '{"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2]}\n{"prompt": "p"', "bad:2: not valid JSON"),
    (
        "jsonl",
        '\n{"prompt": "p", "completions": ["a", "b"], "ranks": [1]}',
        "bad:2: 'ranks' must be 2 whole numbers from 1 (best), one per completion",
    ),
    ("trl", '{"prompt": "p", "chosen": "a"}', "bad:1: 'rejected' must be a text"),
    (
        "trl",
        "\n".join(json.dumps(PAIR | {"chosen": a, "rejected": b}) for a, b in ("ab", "bc", "ca")),
        "bad:1: the pairs of id 't' by l do not form a ranking",
    ),
    ("trl", "[]", "bad:1: must be a JSON object, got list"),
]


@pytest.mark.parametrize(("form", "content", "message"), BAD)
def test_the_error_for_a_bad_file_is_one_line_that_names_the_place(tmp_path, form, content, message):
    (tmp_path / "bad").write_text(content)
    with pytest.raises(DataError) as error:
        exchange.read(tmp_path / "bad", form)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------- the command


@pytest.fixture
def store(tmp_path) -> str:
    """One ranking with a tie, one gold task, one skip and one demonstration."""
    path = f"{tmp_path}/labels.db"
    store = Store(path)
    tasks = [
        {"id": "r", "prompt": "Rank.", "completions": ["a", "b", "c"]},
        {"id": "s", "prompt": "Skip.", "completions": ["a", "b"]},
        {"id": "d", "kind": "demonstration", "prompt": "Write."},
        {"id": "g", "prompt": "Gold.", "completions": ["a", "b"], "gold": {"ranks": [1, 2]}},
    ]
    store.publish(tasks, {"gold_every": 1})
    while task := queue.next_task(store, "human-1"):
        if task.task["id"] == "s":
            queue.skip(store, "human-1", task.nonce, {"reason": "unclear"})
            continue
        ranks = [
            {"a": 2, "b": 1, "c": 2}[text] if len(task.shown) == 3 else i + 1 for i, text in enumerate(task.outputs)
        ]
        answer = {"text": "Written by a person."} if task.task["kind"] == "demonstration" else {"ranks": ranks}
        queue.submit(store, "human-1", task.nonce, answer)
    assert len(store.labels()) == 4
    return path


def test_exported_labels_can_be_trained_on(store, tmp_path):
    ranked, written = tmp_path / "ranked.jsonl", tmp_path / "written.jsonl"
    assert main(["label", "export", "--store", store, "--format", "jsonl", "--output", str(ranked)]) == 0
    (row,) = rows_of(preferences, FileSource(source="file", path=ranked))
    assert row["messages"] == [{"role": "user", "content": "Rank."}]
    assert [(r["labeler"], r["ranks"]) for r in row["rankings"]] == [("human-1", [2, 1, 2])]
    assert recorded.read_rankings(ranked, {})["Rank."][0].ranking["ranks"] == [2, 1, 2]

    assert main(["label", "export", "--store", store, "--format", "demonstrations", "--output", str(written)]) == 0
    (row,) = rows_of(demonstrations, FileSource(source="file", path=written))
    assert (row["completion"], row["labeler"]) == ("Written by a person.", "human-1")


def test_from_pairs_through_jsonl_to_the_page(store, tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    assert main(["label", "export", "--store", store, "--format", "trl", "--output", str(path)]) == 0
    assert main(["label", "import", str(path), "--format", "trl"]) == 0
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (row["labeler"], row["ranks"]) == ("human-1", [2, 1, 2])
    assert main(["label", "import", str(path), "--format", "trl", "--tasks", "--output", str(tmp_path / "tasks")]) == 0
    tasks = [json.loads(line) for line in (tmp_path / "tasks").read_text().splitlines()]
    Store(f"{tmp_path}/other.db").publish(tasks)
    assert tasks == [{"id": "r", "prompt": "Rank.", "completions": ["a", "b", "c"]}]
    assert main(["label", "import", str(tmp_path / "tasks"), "--format", "trl"]) == 2
    assert "tasks:1: 'chosen' must be a text" in capsys.readouterr().err
