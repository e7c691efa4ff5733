"""A line of progress in a log is read as it was written."""

import io
import logging

import pytest

from tunetrail.contract.progress import ProgressBar, ProgressLine, parse


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "line",
    [
        ProgressLine("sft", 3, 9, "steps", 0.724, 125.0, "loss 5.2854"),
        ProgressLine("evaluation of dpo-beta-0.1", 0, 6, "parts", 0.0, None),
        ProgressLine("completions", 1_000_000, 1_000_000, "prompts", 1.5e6, 0.0, "a: 1/2 b, 3/s"),
    ],
)
def test_what_is_written_is_read(line):
    assert parse(str(line)) == line
    assert parse(str(line).rstrip()) == line  # a line without a note ends in blanks


@pytest.mark.parametrize("text", ["", "sft: resuming from checkpoint-3", "sft: error: 3/9 are bad", "loss 5.2854"])
def test_other_lines_tell_no_progress(text):
    assert parse(text) is None


def test_a_bar_without_a_terminal_logs_what_is_read(caplog):
    with caplog.at_level(logging.INFO, "tunetrail"), ProgressBar("sft", 4, "steps", done=1, every_seconds=0) as bar:
        bar.advance(2, "loss 1.0")
    (message,) = caplog.messages
    found = parse(message)
    assert (found.label, found.done, found.total, found.unit, found.note) == ("sft", 3, 4, "steps", "loss 1.0")
    assert found.rate > 0
    assert found.left is not None


def test_a_bar_on_a_terminal_draws_and_logs_nothing(monkeypatch, caplog):
    monkeypatch.setattr("sys.stderr", Terminal())
    with caplog.at_level(logging.INFO, "tunetrail"), ProgressBar("sft", 4, "steps") as bar:
        bar.advance(4, "loss 1.0")
    assert bar.bar.tasks[0].completed == 4
    assert not caplog.messages
