"""The embedded demonstrations: functions of the local Python standard library, and how their authors describe them."""

import ast
import contextlib
import os
import platform
import re
import sysconfig
from collections import deque
from collections.abc import Iterator
from pathlib import Path

# The docstrings of tests and of vendored or generated code are not written for readers.
_SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "turtledemo",
    "__pycache__",
    "ensurepip",
}
MIN_WORDS = 3
_DOCUMENTED = re.compile(
    r"""
    ^[ \t]*(?:async[ ]+)?def\b                # a function's head, whose lines start no other block and
    (?:(?:[^\n]*[^:\s])?[ \t]*\n(?![ \t]*(?:async|def|class)\b))*  # end in no colon
    [^\n]*:[ \t]*(?:\#[^\n]*)?\n             # up to the last one,
    (?:[ \t]*(?:\#[^\n]*)?\n)*               # empty lines and comments,
    [ \t]*[rRuU]?["']                        # and a docstring
    """,
    re.MULTILINE | re.VERBOSE,
)


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring's first paragraph, on one line.

    >>> first_sentence("Return x.  See y.\\n\\nMore.")
    'Return x.'
    """
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s", paragraph, maxsplit=1)[0]


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Yields every statement in the order of `ast.walk`, which would also visit all expressions."""
    waiting = deque([tree])
    while waiting:
        node = waiting.popleft()
        yield node
        for block in ("body", "handlers", "orelse", "finalbody", "cases"):
            if isinstance(parts := getattr(node, block, None), list):
                waiting.extend(parts)


def functions(source: str) -> Iterator[tuple[str, str]]:
    """Yields (code without docstring, first sentence) for each documented function in the source that has a body."""
    for node in _statements(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        body = node.body[1:]
        if not docstring or all(isinstance(statement, ast.Pass) for statement in body):
            continue
        sentence = first_sentence(docstring)
        if len(sentence.split()) >= MIN_WORDS:
            node.body = body
            yield ast.unparse(node), sentence


def modules() -> Iterator[tuple[str, str]]:
    """Yields (path in the library, source) of every module to read, sorted by path."""
    root, paths = Path(sysconfig.get_path("stdlib")), []
    for folder, below, names in os.walk(root):
        below[:] = set(below) - _SKIPPED
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    for path in sorted(paths):
        with contextlib.suppress(UnicodeDecodeError):  # some files are deliberately not UTF-8
            yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")


def pairs() -> list[dict]:
    """{prompt, completion, group} of each distinct function of the library, in order; the group is its module."""
    rows: dict[str, dict] = {}
    for group, source in modules():
        with contextlib.suppress(SyntaxError):
            for code, sentence in functions(source):
                rows.setdefault(code, {"prompt": code, "completion": sentence, "group": group})
    return list(rows.values())


def most_pairs() -> dict[str, int]:
    """Module -> an upper bound on its number of `pairs`, in a 30th of the time, since nothing is parsed."""
    counts = {group: len(_DOCUMENTED.findall(source)) for group, source in modules()}
    return {group: count for group, count in counts.items() if count}


def origin() -> dict:
    return {"version": f"CPython {platform.python_version()} standard library", "licence": "PSF-2.0"}
