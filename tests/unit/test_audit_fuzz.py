"""Random mutants of a whole run: the audit neither hangs nor fails, and calls none of them sound.

A mutant is a run whose structure is known: files, folders, JSON values, lines of the ledger. $TUNETRAIL_MUTANTS sets
how many there are.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tunetrail.errors import DataError
from tunetrail.provenance import lineage as lines
from tunetrail.provenance.ledger import read_ledger, seal
from tunetrail.provenance.manifest import canonical
from tunetrail.provenance.verify import Verifier

from ..audited_run import forge_ledger, make_run

MUTANTS = int(os.environ.get("TUNETRAIL_MUTANTS", "500"))
SECONDS = 60
"""After which a mutant counts as a hang, on a machine that does other things too."""
ODD = st.sampled_from(
    [None, True, 0, -1, 2**63, 1e999, 0.5, "", "a\0b", "..", "/etc/passwd", "\ud800", "a" * 5000, "0" * 64, "\x1b[2J\n",
     [], {}, [[]], {"": None}, [{"name": 1}]]
)  # fmt: skip


@dataclass
class Sound:
    """A run to take mutants of, next to its raw data."""

    run: Path
    head: str
    """Anchored."""
    content: dict[str, Any] = field(repr=False)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Iterator[Sound]:
    run = make_run(tmp_path_factory.mktemp("sound"))
    before = snapshot(run)
    yield Sound(run, read_ledger(run).head, before)
    assert snapshot(run) == before  # no mutation reached the original


def copy(run: Path, to: Path) -> Path:
    """A copy that shares the files: mutations replace a file and write into none."""
    shutil.rmtree(to, ignore_errors=True)
    for root, _, names in os.walk(run.parent.parent):
        folder = os.path.join(to, os.path.relpath(root, run.parent.parent))
        os.makedirs(folder)
        for name in names:
            os.link(os.path.join(root, name), os.path.join(folder, name))
    return to / "results" / run.name


def snapshot(run: Path) -> dict[str, Any]:
    """Everything in a folder but empty folders: kind, target and content."""
    return {
        path.relative_to(run).as_posix(): os.readlink(path) if path.is_symlink()
        else path.read_bytes() if path.is_file() else "special"
        for path in run.rglob("*") if path.is_symlink() or not path.is_dir()
    }  # fmt: skip


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


# ----------------------------------------------------------------------------- mutations


def files(run: Path) -> list[Path]:
    return sorted(path for path in run.rglob("*") if path.is_file() and not path.is_symlink())


def folders(run: Path) -> list[Path]:
    return sorted(path for path in run.rglob("*") if path.is_dir() and not path.is_symlink())


def flip(draw, run: Path) -> None:
    path = draw(st.sampled_from(files(run)))
    content = bytearray(path.read_bytes() or b"x")
    content[draw(st.integers(0, len(content) - 1))] ^= draw(st.integers(1, 255))
    replace(path, bytes(content))


def resize(draw, run: Path) -> None:
    path = draw(st.sampled_from(files(run)))
    content = path.read_bytes()
    replace(path, content[: draw(st.integers(0, max(0, len(content) - 1)))] + draw(st.binary(max_size=8)))


def substitute(draw, run: Path) -> None:
    """Another kind of thing in a file's place, or nothing."""
    path = draw(st.sampled_from(files(run)))
    other = draw(st.sampled_from(files(run)))
    kind = draw(st.sampled_from(["nothing", "fifo", "folder", "link", "link outside", "device", "other", "swap"]))
    content, theirs = path.read_bytes(), other.read_bytes()
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
        (path / "x").write_text("x")
    elif kind.startswith("link"):
        path.symlink_to(other if kind == "link" else "/etc/passwd")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind != "nothing":
        path.write_bytes(theirs)
    if kind == "swap" and other != path:
        replace(other, content)


def stray(draw, run: Path) -> None:
    folder = draw(st.sampled_from([run, *folders(run)]))
    name = draw(
        st.sampled_from(["x", ".x", "manifest.json", "ledger.jsonl", "provenance.json", "a\nb", "x.jsonl", "\udce9"])
    )
    if not os.path.lexists(folder / name):
        draw(st.sampled_from([
            lambda path: path.write_bytes(b"x"), os.mkfifo, lambda path: path.symlink_to("."),
            lambda path: path.symlink_to("/"), lambda path: (path.mkdir(), (path / "manifest.json").write_text("{}")),
        ]))(folder / name)  # fmt: skip


def rename(draw, run: Path) -> None:
    path = draw(st.sampled_from(folders(run)))
    to = path.with_name(draw(st.sampled_from(["x", ".x", "reward2", "dpo~1.work", ".dpo~1.work"])))
    if not os.path.lexists(to):
        path.rename(to)


def exchange(draw, run: Path) -> None:
    a, b = draw(
        st.sampled_from([("sft", "base"), ("policies/dpo", "reward"), ("evaluation/dpo", "data"), ("sft", "reward")])
    )
    if all((run / name).is_dir() for name in (a, b)):
        (run / a).rename(run / "aside")
        (run / b).rename(run / a)
        (run / "aside").rename(run / b)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    found = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += [(value, key), *places(item)]
    return found


def edit(draw, run: Path) -> None:
    """A value of a JSON file replaced, removed, doubled or nested, in canonical form: only its meaning tells."""
    path = draw(st.sampled_from([p for p in files(run) if p.suffix == ".json"] or files(run)))
    try:
        content = json.loads(path.read_bytes())
        found = places(content)
    except (ValueError, RecursionError):
        return
    if not found:
        return
    container, key = draw(st.sampled_from(found))
    how = draw(st.sampled_from(["replace", "replace", "remove", "double", "nest"]))
    if how == "replace":
        container[key] = draw(ODD)
    elif how == "remove":
        del container[key]
    elif how == "double" and isinstance(container, list):
        container.insert(key, container[key])
    else:
        for _ in range(draw(st.sampled_from([1, 70, 400]))):
            container[key] = [container[key]]
    try:
        text = canonical(content) + (b"\n" if path.parent.name == "config" else b"")
    except (ValueError, RecursionError):
        text = json.dumps(content).encode()
    replace(path, text)


def ledger(draw, run: Path) -> None:
    path = run / "ledger.jsonl"
    if path.is_symlink() or not path.is_file():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    how = draw(st.sampled_from(["drop", "double", "tear", "shuffle", "forge", "empty"]))
    if how == "drop" and lines:
        lines.pop(draw(st.integers(0, len(lines) - 1)))
    elif how == "double" and lines:
        lines.append(lines[0])
    elif how == "tear" and lines:
        lines[-1] = lines[-1][: draw(st.integers(0, len(lines[-1]) - 1))]
    elif how == "shuffle":
        lines.reverse()
    elif how == "empty":
        lines.clear()
    replace(path, b"".join(lines))
    if how == "forge":  # whoever can write the run can do this
        try:
            forge_ledger(run)
        except OSError:
            return


def seal_again(draw, run: Path) -> None:
    path = run / "ledger.jsonl"
    if path.is_file() and not path.is_symlink():
        replace(path, path.read_bytes())  # it is appended to, and linked to the original
    try:
        seal(run)
    except DataError:
        return


MUTATIONS: list[Callable[..., None]] = [
    flip,
    resize,
    substitute,
    stray,
    rename,
    exchange,
    edit,
    edit,
    edit,
    ledger,
    seal_again,
]


# ----------------------------------------------------------------------------- what must hold


@settings(
    max_examples=MUTANTS, deadline=None, database=None, derandomize="TUNETRAIL_MUTANTS" not in os.environ,
    phases=(Phase.generate,), suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(data=st.data())
def test_no_mutant_of_a_run_is_sound_and_none_stops_the_audit(sound, tmp_path_factory, data):
    mutant = copy(sound.run, tmp_path_factory.getbasetemp() / "mutant")
    applied = data.draw(st.lists(st.sampled_from(MUTATIONS), min_size=1, max_size=4))
    for mutate in applied:
        if files(mutant) and folders(mutant):
            mutate(data.draw, mutant)
    is_same = snapshot(mutant) == sound.content

    def hang(*_: object) -> None:
        raise TimeoutError(f"a hang after {[mutate.__name__ for mutate in applied]}")

    signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        lines.run_of.cache_clear()
        code = Verifier(recursive=True, anchors=[sound.head]).run([mutant]).exit_code()
    except DataError:  # no run any more
        code = 2
    finally:
        signal.alarm(0)
    assert (code == 0) == is_same, [mutate.__name__ for mutate in applied]
