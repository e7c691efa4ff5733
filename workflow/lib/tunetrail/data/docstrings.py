"""The embedded demonstrations: functions of the machine's own Python standard library and what their authors said of
them.
"""

import ast
import contextlib
import os
import platform
import re
import sysconfig
from collections import deque
from collections.abc import Iterator
from pathlib import Path

# Tests and vendored or generated code are not documentation written for readers.
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
    """Every statement in the order of `ast.walk`, which would visit all expressions too."""
    waiting = deque([tree])
    while waiting:
        node = waiting.popleft()
        yield node
        for block in ("body", "handlers", "orelse", "finalbody", "cases"):
            if isinstance(parts := getattr(node, block, None), list):
                waiting.extend(parts)


def functions(source: str) -> Iterator[tuple[str, str]]:
    """(code without its docstring, first sentence) of every documented function with a body in a module's source."""
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
    """(path in the library, source) of every module that is read, in order."""
    root, paths = Path(sysconfig.get_path("stdlib")), []
    for folder, below, names in os.walk(root):
        below[:] = set(below) - _SKIPPED
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    for path in sorted(paths):
        with contextlib.suppress(UnicodeDecodeError):  # lib has files that are not meant to be read
            yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")


def pairs() -> list[dict]:
    """{prompt, completion, group} of the whole library, the module being the group; each function once, in order."""
    found: dict[str, dict] = {}
    for group, source in modules():
        with contextlib.suppress(SyntaxError):
            for code, sentence in functions(source):
                found.setdefault(code, {"prompt": code, "completion": sentence, "group": group})
    return list(found.values())


def most_pairs() -> dict[str, int]:
    """Module -> how many of `pairs` it has at most, in a 30th of the time: nothing is parsed."""
    counts = {group: len(_DOCUMENTED.findall(source)) for group, source in modules()}
    return {group: count for group, count in counts.items() if count}


def origin() -> dict:
    return {"version": f"CPython {platform.python_version()} standard library", "licence": "PSF-2.0"}
