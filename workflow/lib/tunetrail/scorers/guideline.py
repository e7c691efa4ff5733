"""Checks the first sentence of a docstring against PEP 257, as pydocstyle 6.3 does."""

import re

from pydocstyle.checker import ConventionChecker

RULES = {"period": "D400", "imperative": "D401", "no_signature": "D402", "capital": "D403"}
"""Rule -> pydocstyle's code. A fifth rule is our own: `one_sentence`, on one line."""
_NEXT_SENTENCE = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!cf)(?<!vs)(?<!\b[A-Z])[.!?]\s+[A-Z]")
_WORD = re.compile(r"\w+")
_DEFINITION = re.compile(r"\bdef\s+(\w+)")


def guideline(prompt: str, completion: str) -> dict[str, float]:
    """Rule -> 1 if kept, 0 if broken; `all` -> whether all are kept; `total` -> how many.

    The prompt gives the name of the function, with which a signature would begin. A completion of fewer than two words
    is no sentence and keeps no rule.
    """
    text = completion.strip()
    text = text if len(_WORD.findall(text)) >= 2 else ""
    names = _DEFINITION.findall(prompt)
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    source = f'def {names[0] if names else "function"}():\n    """{quoted}"""\n'
    broken = {error.code for error in ConventionChecker().check_source(source, "completion.py")} if text else set()
    kept = {rule: float(bool(text) and code not in broken) for rule, code in RULES.items()}
    kept["one_sentence"] = float(bool(text) and "\n" not in text and not _NEXT_SENTENCE.search(text))
    return kept | {"all": float(all(kept.values())), "total": sum(kept.values())}
