"""What comes from elsewhere cannot forge a line on a terminal or move its cursor, whichever command prints it."""

import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunetrail.cli import main
from tunetrail.cli.model import _plainly
from tunetrail.monitor import failure, status
from tunetrail.provenance import lineage as lines
from tunetrail.provenance.ledger import seal
from tunetrail.provenance.manifest import canonical
from tunetrail.terminal import LINES, PROSE, Formatter, escape

from ..records import seal_folder

EVIL = "a\nSOUND: 7 artifacts \x1b[2J\x9b1A\r\u202e\u2028\x7f"
SHOWN = r"a\nSOUND: 7 artifacts \x1b[2J\x9b1A\r\u202e\u2028\x7f"


def is_clean(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text) and "\nSOUND: 7 artifacts" not in text


@given(st.text())
def test_what_is_escaped_prints_on_one_line(text):
    assert escape(text).isprintable()
    assert escape(escape(text)) == escape(text)
    assert set(escape(text, LINES)) - {"\n"} <= set(escape(text)) | set(text)


def test_what_prints_stays_as_it_is():
    assert escape(EVIL) == SHOWN
    assert escape("größer, 数字, 🙂") == "größer, 数字, 🙂"
    assert escape(Path("caf\udce9")) == r"caf\udce9"
    assert escape("a\tb\n👩\u200d💻", PROSE) == "a\tb\n👩\u200d💻"


@pytest.fixture
def evil(run) -> Path:
    """A run with evil names in files, records and the ledger."""
    (run / "sft" / EVIL).write_text("x")
    (run / EVIL).write_text("x")
    path = run / "data/provenance.json"
    statement = json.loads(path.read_bytes())
    build = statement["predicate"]["buildDefinition"]
    for dependency in build["resolvedDependencies"]:
        if dependency["annotations"]["role"] == "source":
            dependency |= {"name": f"[red]{EVIL}"}
            dependency["annotations"]["files"] = {EVIL: "0" * 64}
    build["internalParameters"]["attempts"][0] |= {"host": EVIL, "ended": {"outcome": "failed", "message": EVIL}}
    statement["predicate"]["runDetails"]["builder"]["version"]["tunetrail"] = EVIL
    path.write_bytes(canonical(statement))
    seal_folder(run / "sft", "sft", {"base": run / "base", EVIL: run / "data"})
    (run / "sft" / EVIL).unlink()
    (run / "sft" / EVIL).write_text("other")
    seal(run)
    lines.run_of.cache_clear()
    return run


@pytest.mark.parametrize("command", [
    "verify --recursive {run}", "verify --recursive --json {run}", "trace {run}/sft", "trace --json {run}/sft",
    "show {run}/data", "diff {run}/data {run}/sft", "seal {run}",
])  # fmt: skip
def test_the_audit_prints_nothing_evil(evil, command, capsys):
    main(["audit", *command.format(run=evil).split()])
    out, err = capsys.readouterr()
    assert out
    assert is_clean(out)
    assert is_clean(err)


def test_a_wrong_path_is_shown_escaped(tmp_path, capsys):
    """A message may have lines, and each has our prefix."""
    assert main(["audit", "verify", str(tmp_path / EVIL)]) == 2
    err = capsys.readouterr().err
    assert is_clean(err)
    assert all(line.startswith("tunetrail: error: ") for line in err.splitlines())


def test_what_a_model_says_moves_no_cursor(capsys):
    _plainly(["model"], iter([["one\x1b"], ["one\x1b[2Jtwo\r"]]))
    _plainly(["a\x1b", "b"], iter([["one\x1b[2J", "two\tthree\nfour"]]))
    assert capsys.readouterr().out == "one\\x1b[2Jtwo\\r\n[a\\x1b]\none\\x1b[2J\n[b]\ntwo\tthree\nfour\n"


def test_status_and_the_last_words_of_a_run(capsys):
    found = [status.StageStatus(name=f"policies/{EVIL}", rule="ppo", state="waiting", detail=EVIL)]
    status.print_status(found, "snakemake")
    assert is_clean(capsys.readouterr().out)
    assert is_clean(failure.summary(found, [EVIL]))


def test_a_log_line_is_one_line_and_a_traceback_stays():
    record = logging.LogRecord("tunetrail", logging.INFO, "f.py", 1, "left out: %s", (EVIL,), None)
    assert Formatter("%(message)s").format(record) == f"left out: {SHOWN}"
    try:
        raise ValueError("x")
    except ValueError as e:
        record = logging.LogRecord("t", logging.ERROR, "f.py", 1, "failed", (), (type(e), e, e.__traceback__))
    assert "\nTraceback" in Formatter("%(message)s").format(record)
