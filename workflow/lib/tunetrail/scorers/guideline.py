"""PEP 257 for the first sentence of a docstring, as pydocstyle 6.3 reads it."""

import re

from pydocstyle.checker import ConventionChecker

RULES = {"period": "D400", "imperative": "D401", "no_signature": "D402", "capital": "D403"}
"""Rule -> pydocstyle's code. A fifth is ours: `one_sentence`, on one line."""
_NEXT_SENTENCE = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!cf)(?<!vs)[.!?]\s+[A-Z]")
_DEFINITION = re.compile(r"\bdef\s+(\w+)")


def guideline(prompt: str, completion: str) -> dict[str, float]:
    """Rule -> 1 where it is kept, 0 where it is broken; `all` -> whether all are; `total` -> how many.

    The prompt tells the name of the function, which a signature would begin with. An empty completion keeps none.
    """
    text = completion.strip()
    names = _DEFINITION.findall(prompt)
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    source = f'def {names[-1] if names else "function"}():\n    """{quoted}"""\n'
    broken = {error.code for error in ConventionChecker().check_source(source, "completion.py")} if text else set()
    kept = {rule: float(bool(text) and code not in broken) for rule, code in RULES.items()}
    kept["one_sentence"] = float(bool(text) and "\n" not in text and not _NEXT_SENTENCE.search(text))
    return kept | {"all": float(all(kept.values())), "total": sum(kept.values())}
