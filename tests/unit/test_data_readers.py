"""Readers on rows as in real files: what they must understand, and what they must refuse, naming the line."""

import datetime
import gzip
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pandas as pd
import pytest

from tests.sources import rows_of
from tunetrail.config.data import DataConfig, FileSource, HubSource
from tunetrail.data.invalid import Invalid
from tunetrail.data.readers import check_sources, demonstrations, feedback, preferences
from tunetrail.errors import DataError

SHARED = Path(__file__).parents[2].parent / "shared/data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="../shared/data (real human data) is not on this machine")

GOOD = {"prompt": "Q", "completion": "A"}
RANKED = {"prompt": "Q", "completions": ["a", "b"], "ranks": [1, 2]}


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A function that writes rows, text or bytes to a file and returns its source."""
    monkeypatch.chdir(tmp_path)

    def write(content, name: str = "d.jsonl", **more) -> FileSource:
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
        return FileSource(source="file", path=name, **more)

    return write


def parquet(rows: list[dict]) -> bytes:
    return pd.DataFrame(rows).to_parquet()


# ----------------------------------------------------------------------------- refused


def one_of(rows: int, name: str = "d.jsonl") -> str:
    """The last line of the message if one row of a file is bad."""
    return f"\n{name}: 1 of {rows} rows is invalid; fix them, or leave them out with data.invalid: drop"


JSON = "; every line must hold one JSON object"
BAD_DEMONSTRATIONS = {
    "half a character": (
        '{"prompt": "\\ud800", "completion": "A"}\n',
        "d.jsonl:1: 'prompt' holds half of a surrogate pair, which is no character; remove it",
    ),
    "a message without role": (
        [{"messages": [{"content": "x", "name": "n"}]}],
        "d.jsonl:1: 'messages[0]' must have 'role' and 'content'",
    ),
    "a message that is a text": ([{"messages": ["x"]}], "d.jsonl:1: 'messages[0]' must have 'role' and 'content'"),
    "a message in parts": (
        [{"messages": [user("x") | {"content": [{"type": "text"}]}]}],
        "d.jsonl:1: 'content' must be a text, got list",
    ),
    "the assistant first": (
        [{"messages": [assistant("x")]}],
        "d.jsonl:1: 'messages' needs a turn of the assistant after one of the user",
    ),
    "no user before the assistant": (
        [{"messages": [{"role": "system", "content": "s"}, assistant("x")]}],
        "d.jsonl:1: 'messages' needs a turn of the assistant after one of the user",
    ),
    "a bad byte far down": (
        b'{"text": "a"}\n' * 40 + b'{"text": "\xff"}\n',
        "d.jsonl:41: not UTF-8; convert the file with iconv" + one_of(41),
    ),
    "a cut last line": (
        '{"text": "a"}\n{"text": "b',
        "d.jsonl:2: not valid JSON (Unterminated string starting at: line 1 column 10 (char 9))" + JSON + one_of(2),
    ),
    "two objects in a line": (
        '{"text": "a"} {"text": "b"}\n',
        "d.jsonl:1: not valid JSON (Extra data: line 1 column 15 (char 14))" + JSON,
    ),
    "a JSON array": ('[{"text": "a"}]\n', "d.jsonl:1: must be a JSON object, got list"),
    "a number": ('{"text": NaN}\n', "d.jsonl:1: 'text' must be a text, got float"),
    "only white lines": ("\n \n", "d.jsonl: holds no rows"),
}
BAD_PREFERENCES = {
    "an order of texts": (
        [RANKED | {"order": [0, "1"]}],
        "d.jsonl:1: 'order' must name each of the 2 completions once, counting from 0",
    ),
    "an order that is a number": (
        [RANKED | {"order": 5}],
        "d.jsonl:1: 'order' must name each of the 2 completions once, counting from 0",
    ),
    "a time that is a number": (
        [RANKED | {"time": 5}],
        "d.jsonl:1: 'time' must be a text such as 2026-01-01T12:00:00Z, got int",
    ),
    "a labeler that is a list": ([RANKED | {"labeler": ["ann"]}], "d.jsonl:1: 'labeler' must be a name, got list"),
    "no ranks": (
        [{"prompt": "Q", "completions": ["a", "b"]}],
        "d.jsonl:1: 'ranks' must be 2 whole numbers from 1 (best), one per completion",
    ),
    "half ranks": (
        [RANKED | {"ranks": [1, 1.5]}],
        "d.jsonl:1: 'ranks' must be 2 whole numbers from 1 (best), one per completion",
    ),
    "true for a rank": (
        [RANKED | {"ranks": [True, 2]}],
        "d.jsonl:1: 'ranks' must be 2 whole numbers from 1 (best), one per completion",
    ),
    "no prompt": ([{"completions": ["a", "b"], "ranks": [1, 2]}], "d.jsonl:1: 'prompt' must be a text, got NoneType"),
    "chosen of several turns": (
        [{"prompt": [user("q")], "chosen": [assistant("1"), user("2"), assistant("3")], "rejected": [assistant("x")]}],
        "d.jsonl:1: 'chosen' must be one message of the assistant, or the prompt's messages and then that one",
    ),
    "rejected of the user": (
        [{"prompt": [user("q")], "chosen": [assistant("x")], "rejected": [user("y")]}],
        "d.jsonl:1: 'rejected' must be one message of the assistant, or the prompt's messages and then that one",
    ),
    "chosen after another prompt": (
        [{"prompt": "q", "chosen": [user("r"), assistant("x")], "rejected": [user("q"), assistant("y")]}],
        "d.jsonl:1: 'chosen' must be one message of the assistant, or the prompt's messages and then that one",
    ),
    "a chat beside a text": (
        [{"prompt": "q", "chosen": "x", "rejected": [assistant("y")]}],
        "d.jsonl:1: 'rejected' must be a text, got list",
    ),
    "a prompt of the assistant": (
        [{"prompt": [user("q"), assistant("x")], "chosen": "a", "rejected": "b"}],
        "d.jsonl:1: 'prompt' must end with a turn of the user",
    ),
    "chats without a user": (
        [
            {
                "chosen": [{"role": "system", "content": "s"}, assistant("x")],
                "rejected": [{"role": "system", "content": "s"}, assistant("y")],
            }
        ],
        "d.jsonl:1: the turn before the last of 'chosen' and 'rejected' must be the user's",
    ),
    "the second row": (
        [RANKED, RANKED | {"completions": ["a", " a"]}],
        "d.jsonl:2: two of its responses are the same text; remove the row" + one_of(2),
    ),
    "labels that are no list": (
        [{"prompt": "Q", "a": "x", "b": "y", "labels": 1}],
        "d.jsonl:1: 'labels' must be a non-empty list of 0 (tie), 1 (a is better) or 2 (b is better)",
    ),
}
BAD_FILES = {
    "more cells than the header": (
        "d.csv",
        b"prompt,completion\nQ,A,extra\n",
        "d.csv: rows have more cells than the header; quote cells that hold a comma",
    ),
    "more cells further down": (
        "d.csv",
        b"prompt,completion\nQ,A\nQ,A,x\n",
        "d.csv: cannot be read as CSV: Error tokenizing data. C error: Expected 2 fields in line 3, saw 3",
    ),
    "fewer cells": (
        "d.csv",
        b"prompt,completion\nQ,A\nR\n",
        "d.csv:2: 'completion' is empty; remove the row or fill it" + one_of(2, "d.csv"),
    ),
    "Latin-1": ("d.csv", b"prompt,completion\nQ,\xff\n", "d.csv: not UTF-8; convert the file with iconv"),
    "a cut gzip": (
        "d.csv.gz",
        gzip.compress(b"prompt,completion\nQ,A\n" * 99, mtime=0)[:40],
        "d.csv.gz: the gzip file is cut short or damaged; copy it again",
    ),
    "no gzip": ("d.parquet.gz", b"PAR1", "d.parquet.gz: the gzip file is cut short or damaged; copy it again"),
    "a missing value": (
        "d.parquet",
        parquet([GOOD, {"prompt": "R", "completion": None}]),
        "d.parquet:2: 'completion' must be a text, got NoneType" + one_of(2, "d.parquet"),
    ),
    "numbers": (
        "d.parquet",
        parquet([{"prompt": 1, "completion": "A"}]),
        "d.parquet:1: 'prompt' must be a text, got int",
    ),
    "no rows": ("d.parquet", pd.DataFrame({"text": []}).to_parquet(), "d.parquet: holds no rows"),
    "gz of an unknown format": (
        "d.json.gz",
        b"",
        "d.json.gz: unknown format; the name must end in .jsonl, .csv or .parquet (.gz may follow)",
    ),
    "no suffix": ("d", b"", "d: unknown format; the name must end in .jsonl, .csv or .parquet (.gz may follow)"),
}


@pytest.mark.parametrize("case", BAD_DEMONSTRATIONS)
def test_bad_demonstrations_are_refused(file, case):
    content, message = BAD_DEMONSTRATIONS[case]
    with pytest.raises(DataError) as error:
        check_sources(DataConfig(demonstrations=[file(content)]))
    assert str(error.value) == message


@pytest.mark.parametrize("case", BAD_PREFERENCES)
def test_bad_preferences_are_refused(file, case):
    content, message = BAD_PREFERENCES[case]
    with pytest.raises(DataError) as error:
        check_sources(DataConfig(preferences=[file(content)]))
    assert str(error.value) == message


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused(file, case):
    name, content, message = BAD_FILES[case]
    with pytest.raises(DataError) as error:
        check_sources(DataConfig(demonstrations=[file(content, name)]))
    assert str(error.value) == message


LONG = "A" * 3_000_000
BOMBS = {
    "one line": ("d.jsonl.gz", gzip.compress(json.dumps(GOOD | {"completion": LONG}).encode())),
    "many lines": ("d.jsonl.gz", gzip.compress((json.dumps(GOOD) + "\n").encode() * 100_000)),
    "CSV": ("d.csv.gz", gzip.compress(b"prompt,completion\n" + b"Q,A\n" * 1_000_000)),
    "gzipped Parquet": ("d.parquet.gz", gzip.compress(b"\0" * 3_000_000)),
    "Parquet": ("d.parquet", parquet([{"prompt": "Q", "completion": "A" * 10_000}] * 2_000)),
    "no archive at all": ("d.jsonl", json.dumps(GOOD | {"completion": LONG})),
}


@pytest.mark.parametrize("case", BOMBS)
def test_a_file_that_unpacks_to_more_than_its_limit_is_refused(file, case):
    name, content = BOMBS[case]
    with pytest.raises(DataError) as error:
        check_sources(DataConfig(demonstrations=[file(content, name, unpacked_mb=2)]))
    assert str(error.value) == (
        f"{name}: unpacks to more than 2 MB; split the file, or raise unpacked_mb of its source"
    )


def test_the_error_for_endless_nesting_is_one_line(file):
    with pytest.raises(
        DataError, match=r"^d\.jsonl:1: not valid JSON \([^\n]+\); every line must hold one JSON object$"
    ):
        rows_of(demonstrations, file("[" * 200_000 + "\n"))


@pytest.mark.parametrize("value", [None, "", "  "])
def test_an_empty_group_is_refused(file, value):
    """An empty value is not a group: it would put all such rows into one split."""
    with pytest.raises(DataError, match=r"^d\.jsonl:1: 'user', which group names, is empty; fill it$"):
        rows_of(demonstrations, file([GOOD | {"user": value}], group="user"))


def test_a_row_without_a_mapped_column_can_be_left_out(file):
    invalid: list[Invalid] = []
    rows = [{"question": "Q", "completion": "A"}, GOOD]
    assert len(rows_of(demonstrations, file(rows, columns={"prompt": "question"}), invalid)) == 1
    message = "has no column 'question' (columns maps prompt to it); its columns are prompt, completion"
    assert invalid == [("d.jsonl:2", message)]


def test_a_file_with_only_invalid_rows_is_refused_even_if_they_may_be_left_out(file):
    with pytest.raises(DataError) as error:
        rows_of(demonstrations, file([{"prompt": "", "completion": "A"}] * 2), [])
    assert str(error.value).splitlines() == [
        "d.jsonl:1: 'prompt' is empty; remove the row or fill it (2 such rows: 1, 2)",
        "d.jsonl: none of its 2 rows is valid",
    ]


def bad_lines() -> str:
    """20 lines, 9 of them good, with mistakes of seven kinds, after a byte order mark and with line ends of Windows."""
    good, empty = json.dumps(GOOD), json.dumps(GOOD | {"completion": " "})
    messages = [{"messages": [user("a"), assistant("b"), user("c"), {"role": r, "content": "d"}]} for r in "xy"]
    lines = [good, empty, "{", good, empty, '{"a', good, empty, "[1]", good, empty, "{", good, '{"prompt": 3}']
    lines += [good] * 4
    return "\ufeff" + "\r\n".join(lines + [json.dumps(m) for m in messages]) + "\r\n"


def test_one_pass_counts_every_mistake_by_kind_and_names_the_first_rows(file):
    with pytest.raises(DataError) as error:
        check_sources(DataConfig(demonstrations=[file(bad_lines())]))
    *kinds, last = str(error.value).splitlines()
    assert kinds[0] == ("d.jsonl:2: 'completion' is empty; remove the row or fill it (4 such rows: 2, 5, 8, …)")
    assert kinds[1].startswith("d.jsonl:3: not valid JSON (Expecting property name")
    assert kinds[1].endswith("; every line must hold one JSON object (2 such rows: 3, 12)")
    assert [line.split(": ")[0] for line in kinds[2:]] == ["d.jsonl:6", "d.jsonl:9", "d.jsonl:14", "d.jsonl"]
    assert kinds[5] == "d.jsonl: 2 more, of 2 other kinds"
    assert last == "d.jsonl: 11 of 20 rows are invalid; fix them, or leave them out with data.invalid: drop"


def test_lines_that_are_no_rows_can_be_left_out(file):
    invalid: list[Invalid] = []
    assert len(rows_of(demonstrations, file(bad_lines()), invalid)) == 9
    assert [row.where for row in invalid][:3] == ["d.jsonl:2", "d.jsonl:3", "d.jsonl:5"]
    check_sources(DataConfig(demonstrations=[file(bad_lines())], invalid="drop"))


def test_the_mistakes_of_all_sources_are_reported_together(file):
    with pytest.raises(DataError) as error:
        check_sources(
            DataConfig(
                demonstrations=[file([GOOD | {"prompt": 1}], "a.jsonl"), file(b"PAR1", "b.parquet.gz")],
                preferences=[file([RANKED | {"order": 5}], "c.jsonl")],
            )
        )
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == ["a.jsonl", "b.parquet.gz", "c.jsonl"]


# ----------------------------------------------------------------------------- understood


def test_two_columns_may_swap_names(file):
    (row,) = rows_of(demonstrations, file([GOOD], columns={"prompt": "completion", "completion": "prompt"}))
    assert (row["messages"], row["completion"]) == ([user("A")], "Q")


def test_group_may_name_a_mapped_column_by_either_name(file):
    rows = [{"question": "Q", "completion": "A", "who": 7}]
    by_source = file(rows, columns={"prompt": "question"}, group="question")
    by_ours = file(rows, columns={"prompt": "question", "user": "who"}, group="user")
    assert [rows_of(demonstrations, source)[0]["group"] for source in (by_source, by_ours)] == ["Q", "7"]


def test_all_rows_of_a_conversation_share_a_group(file):
    """A conversation is identified by the user's first message, whatever follows."""
    first, second = [user("Hi  There"), assistant("1")], [user("and now?"), assistant("2")]
    system = {"role": "system", "content": "s"}
    chats = rows_of(demonstrations, file([{"messages": first + second}, {"messages": [system, *first]}]))
    assert [row["group"] for row in chats] == ["hi there"] * 3
    hh = "\n\nHuman: hi there\n\nAssistant: 1"
    pairs = [{"chosen": hh, "rejected": hh + "!"}]
    pairs += [
        {
            "chosen": hh + f"\n\nHuman: and now?\n\nAssistant: {x}",
            "rejected": hh + "\n\nHuman: and now?\n\nAssistant: no",
        }
        for x in "ab"
    ]
    assert [row["group"] for row in rows_of(preferences, file(pairs))] == ["hi there"] * 3


def test_byte_order_marks_and_windows_line_ends_are_read(file):
    rows = b'{"prompt": "Q", "completion": "A"}\r\n\r\n{"prompt": "R", "completion": "B"}\r\n'
    assert [row["completion"] for row in rows_of(demonstrations, file(b"\xef\xbb\xbf" + rows))] == ["A", "B"]
    assert len(rows_of(demonstrations, file(b"\xef\xbb\xbfprompt,completion\r\nQ,A\r\n", "d.csv"))) == 1


def test_a_csv_prompt_that_looks_like_a_list_is_a_text(file):
    table = pd.DataFrame(
        {
            "prompt": ["[3, 1, 2]", "[not json", json.dumps([user("chat")])],
            "completions": ['["a", "b"]'] * 3,
            "ranks": ["[2, 1]"] * 3,
            "labeler": ["0", "", "ann"],
            "time": ["", "2026", ""],
        }
    )
    rows = rows_of(preferences, file(table.to_csv(index=False), "d.csv"))
    assert [row["messages"] for row in rows] == [[user("[3, 1, 2]")], [user("[not json")], [user("chat")]]
    assert [row["rankings"][0]["labeler"] for row in rows] == ["0", "recorded", "ann"]
    assert [row["rankings"][0]["time"] for row in rows] == [None, "2026", None]
    assert rows[0]["rankings"][0]["ranks"] == [2, 1]


@pytest.mark.parametrize("name", ["d.parquet", "d.parquet.gz", "my.csv.parquet"])
def test_parquet_cells_become_plain_values(file, name):
    rows = [
        RANKED | {"order": [1, 0], "time": pd.Timestamp("2026-01-02T03:04:05Z"), "labeler": 0},
        RANKED | {"prompt": "R", "order": None, "time": None, "labeler": 1},
    ]
    content = parquet(rows)
    first, second = rows_of(preferences, file(gzip.compress(content) if name.endswith("gz") else content, name))
    ranking = {"labeler": "0", "ranks": [1, 2], "order": [1, 0], "time": "2026-01-02T03:04:05+00:00", "scores": None}
    assert first["rankings"] == [ranking]
    assert second["rankings"] == [ranking | {"labeler": "1", "order": [0, 1], "time": None}]
    json.dumps([first, second])  # no numpy types are left
    chat = parquet([{"messages": [user("Q"), assistant("A")]}])
    assert (
        rows_of(demonstrations, file(gzip.compress(chat) if name.endswith("gz") else chat, name))[0]["completion"]
        == "A"
    )


def test_labelers_keep_their_names(file):
    """A labeler called 0 is not a missing labeler."""
    rows = rows_of(preferences, file([RANKED | {"labeler": name} for name in (0, 1, "", None, "ann")]))
    assert [ranking["labeler"] for row in rows for ranking in row["rankings"]] == [
        "0",
        "1",
        "recorded",
        "recorded",
        "ann",
    ]


def test_conversational_preferences_are_read(file):
    chat = [user("q"), assistant("1"), user("r")]
    rows = rows_of(preferences, file([
        {"prompt": chat, "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        {"prompt": "Q", "chosen": [user("Q"), assistant("good")], "rejected": [user("Q"), assistant("bad")]},
        {"chosen": [*chat, assistant("fine")], "rejected": [*chat, assistant("bad")]},
        {"prompt": chat, "completions": ["bad", "good"], "ranks": [9, 4]},
    ]))  # fmt: skip
    assert [row["messages"] for row in rows] == [chat, [user("Q")], chat, chat]
    assert [row["completions"] for row in rows] == [["good", "bad"], ["good", "bad"], ["fine", "bad"], ["bad", "good"]]
    assert rows[3]["rankings"][0]["ranks"] == [2, 1]


def test_all_annotators_of_a_repeated_pair_are_kept(file):
    pair = {"prompt": "Q", "a": "x", "b": "y"}
    (row,) = rows_of(preferences, file([pair | {"labels": [0, 1, 2]}, pair | {"labels": [2]}]))
    assert [(r["labeler"], r["ranks"]) for r in row["rankings"]] == [
        ("annotator-0", [1, 1]), ("annotator-1", [1, 2]), ("annotator-2", [2, 1]), ("annotator-0", [2, 1]),
    ]  # fmt: skip


RATED = {"prompt": "Q", "completion": "A", "label": True}


def test_feedback_is_read_in_every_spelling_and_ratings_of_one_response_are_joined(file):
    rows = [
        RATED | {"labeler": "ann"},
        RATED | {"label": False, "labeler": "bob"},
        {"prompt": [user("q"), assistant("1"), user("r")], "completion": [assistant("B")], "label": 0},
    ]
    found = [row for _, row in feedback(file(rows))]
    assert found == [
        {"messages": [user("Q")], "completion": "A", "group": "q",
         "ratings": [{"labeler": "ann", "label": True}, {"labeler": "bob", "label": False}]},
        {"messages": [user("q"), assistant("1"), user("r")], "completion": "B", "group": "q",
         "ratings": [{"labeler": "recorded", "label": False}]},
    ]  # fmt: skip
    table = file("prompt,completion,thumb\nQ,A,True\nR,B,0\n", "d.csv", columns={"label": "thumb"})
    assert [row["ratings"][0]["label"] for _, row in feedback(table)] == [True, False]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (RATED | {"label": "up"}, "'label' must be true (liked) or false (disliked), got 'up'"),
        (RATED | {"label": None}, "'label' must be true (liked) or false (disliked), got None"),
        (RATED | {"label": -1}, "'label' must be true (liked) or false (disliked), got -1"),
        (RATED | {"completion": " "}, "'completion' is empty; remove the row or fill it"),
        (RATED | {"prompt": [user("Q"), assistant("A")]}, "'prompt' must end with a turn of the user"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "must have prompt, completion and label, but lacks "
            "completion, label; its columns are chosen, prompt, rejected; map others with columns"),
    ],
)  # fmt: skip
def test_bad_feedback_is_refused(file, row, message):
    with pytest.raises(DataError) as error:
        check_sources(DataConfig(feedback=[file([row])]))
    assert str(error.value) == f"d.jsonl:1: {message}"


def test_every_row_comes_with_its_line(file):
    """Empty lines count, and all rows of a chat have the same line."""
    chat = {"messages": [user("1"), assistant("2"), user("3"), assistant("4")]}
    source = file(json.dumps(GOOD) + "\n\n" + json.dumps(chat))
    assert [where for where, _ in demonstrations(source)] == ["d.jsonl:1", "d.jsonl:3", "d.jsonl:3"]


# ----------------------------------------------------------------------------- hub


def test_hub_rows_are_checked_like_a_file(monkeypatch):
    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        row = {"q": "Q", "chosen": "a", "rejected": "b", "time": datetime.datetime(2026, 1, 2)}
        return datasets.Dataset.from_list([row, row | {"q": ""}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = HubSource(source="hub", repo="o/n", revision="abc", hub_split="test", subset="s", columns={"prompt": "q"})
    invalid: list[Invalid] = []
    (row,) = rows_of(preferences, source, invalid)
    assert asked == [(("o/n", "s"), {"revision": "abc", "split": "test"})]
    assert row["rankings"][0]["time"] == "2026-01-02T00:00:00"
    assert invalid == [("o/n@abc:2", "'prompt' is empty; remove the row or fill it")]


@pytest.mark.parametrize(
    ("error", "reason"), [(ConnectionError("no network\nmore"), "no network"), (AssertionError(), "AssertionError")]
)
def test_the_error_for_an_unreachable_hub_is_one_line(monkeypatch, error, reason):
    def load(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError) as raised:
        rows_of(demonstrations, HubSource(source="hub", repo="o/n", revision="abc"))
    assert str(raised.value) == f"o/n@abc: cannot be loaded from the hub: {reason}"


# ----------------------------------------------------------------------------- before any job


def test_checking_needs_no_heavy_library(tmp_path):
    """Sources are checked each time Snakemake starts."""
    (tmp_path / "d.jsonl").write_text(json.dumps(GOOD) + "\n", encoding="utf-8")
    code = (
        "import sys; from tunetrail.config.data import DataConfig; from tunetrail.data.readers import check_sources\n"
        "check_sources(DataConfig(demonstrations=[{'source': 'file', 'path': 'd.jsonl'}, {'source': 'docstrings'}]))\n"
        "print(sorted({'torch', 'transformers', 'pandas', 'datasets', 'datasketch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


PACKAGES_OF_LATER_STEPS = ("altair", "datasets", "pandas", "scipy", "sqlalchemy", "torch", "transformers", "rich")
MODULES_OF_LATER_STEPS = (
    "tunetrail.contract",
    "tunetrail.labeling",
    "tunetrail.provenance.verify",
    "tunetrail.reporting",
)


@pytest.mark.parametrize(
    "module", ["data.readers", "preferences.formats", "preferences.pairs", "preferences.ranks", "preferences.summary"]
)
def test_readers_and_rankings_import_nothing_from_later_layers(module):
    names = {*PACKAGES_OF_LATER_STEPS, *MODULES_OF_LATER_STEPS}
    code = f"import sys, tunetrail.{module}; print(sorted({names!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@needs_shared
def test_real_files_have_only_the_known_bad_rows():
    """The bad rows are empty outputs of PandaLM's models, and HH conversations that are empty or diverge early."""
    for name, rankings, bad in (("pandalm/pairs", 2817, 54), ("hh-harmless-base/comparisons", 1794, 6)):
        invalid: list[Invalid] = []
        source = FileSource(source="file", path=SHARED / f"{name}.jsonl.gz")
        rows = rows_of(preferences, source, invalid)
        assert (sum(len(row["rankings"]) for row in rows), len(invalid)) == (rankings, bad)
        assert all(row["messages"][-1]["role"] == "user" for row in rows)
