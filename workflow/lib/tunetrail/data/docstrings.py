"""The embedded demonstrations: functions of the machine's own Python standard library and what their authors said of
them.
"""

import ast
import platform
import re
import sysconfig
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


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring's first paragraph, on one line.

    >>> first_sentence("Return x.  See y.\\n\\nMore.")
    'Return x.'
    """
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s", paragraph, maxsplit=1)[0]


def functions(source: str) -> Iterator[tuple[str, str]]:
    """(code without its docstring, first sentence) of every documented function with a body in a module's source."""
    for node in ast.walk(ast.parse(source)):
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


def pairs() -> list[dict]:
    """{prompt, completion, group} of the whole library, the module being the group; each function once, in order."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, dict] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED & set(relative.parts):
            continue
        try:
            for code, sentence in functions(path.read_text(encoding="utf-8")):
                found.setdefault(code, {"prompt": code, "completion": sentence, "group": relative.as_posix()})
        except (SyntaxError, UnicodeDecodeError):
            continue  # lib has files that are not meant to be parsed
    return list(found.values())


def origin() -> dict:
    return {"version": f"CPython {platform.python_version()} standard library", "licence": "PSF-2.0"}
