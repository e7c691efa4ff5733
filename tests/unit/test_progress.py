"""Progress: a bar on a terminal, lines in a log, and rows in the stage's state folder."""

import io
import logging

import pytest

from tunetrail.contract import progress
from tunetrail.contract.progress import ProgressBar, read_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / progress.FILE
    progress.write_to(path)
    yield path
    progress.write_to(None)


def test_a_bar_without_a_terminal_logs_a_line_and_writes_a_row(rows, caplog):
    with caplog.at_level(logging.INFO, "tunetrail"), ProgressBar("sft", 4, "steps", done=1, every_seconds=0) as bar:
        bar.advance(2, "loss 1.0", {"loss": 1.0})
    (message,) = caplog.messages
    assert message.startswith("sft: 3/4 steps, ")
    assert message.endswith("left  loss 1.0")
    (row,) = read_progress(rows)
    assert [row[key] for key in ("label", "done", "total", "unit", "note")] == ["sft", 3, 4, "steps", "loss 1.0"]
    assert row["values"] == {"loss": 1.0}
    assert row["rate"] > 0
    assert row["left"] is not None


def test_a_bar_on_a_terminal_draws_logs_nothing_and_writes_rows(rows, monkeypatch, caplog):
    monkeypatch.setattr("sys.stderr", Terminal())
    with caplog.at_level(logging.INFO, "tunetrail"), ProgressBar("sft", 4, "steps") as bar:
        bar.advance(4, "loss 1.0")
    assert bar.bar.tasks[0].completed == 4
    assert not caplog.messages
    assert [row["done"] for row in read_progress(rows)] == [4]


def test_pieces_in_quick_succession_share_a_row(rows):
    with ProgressBar("sft", 100, "steps", every_seconds=1000) as bar:
        for _ in range(100):
            bar.advance()
    assert [row["done"] for row in read_progress(rows)] == [100]


def test_a_row_that_is_still_being_written_is_ignored(rows):
    with ProgressBar("sft", 1, "steps") as bar:
        bar.advance()
    with rows.open("a") as f:
        f.write('{"time": "20')
    assert len(read_progress(rows)) == 1
    assert read_progress(rows.with_name("none.jsonl")) == []


def test_a_row_truncated_by_a_full_disk_loses_only_itself_and_the_next(rows):
    with ProgressBar("sft", 4, "steps", every_seconds=0) as bar:
        bar.advance()
        with rows.open("a") as f:
            f.write('{"time": "20')
        for _ in range(3):
            bar.advance()
    assert [row["done"] for row in read_progress(rows)] == [1, 3, 4]


def test_a_file_that_cannot_be_written_stops_nothing(tmp_path):
    progress.write_to(tmp_path / "no" / progress.FILE)
    with ProgressBar("sft", 1, "steps") as bar:
        bar.advance()
    progress.write_to(None)
    assert bar.done == 1
