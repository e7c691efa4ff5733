"""Writes the lock: exact versions of everything the installed environment needs.

    python envs/lock.py     (make lock)

`requirements.txt` holds the closure of tunetrail's dependencies, `requirements-test.txt` what the tests
add to it, `tunetrail.yaml` the same versions as a conda environment, for `--sdm conda`.
"""

import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

HERE = Path(__file__).parent
TEST = [
    "hypothesis",
    "in-toto-attestation",
    "jsonschema",
    "mypy",
    "pandas-stubs",
    "playwright",
    "psycopg[binary]",
    "pytest",
    "pytest-xdist",
    "roc-validator",
    "ruff",
    "setproctitle",
    "snakedeploy",
    "snakefmt",
    "types-PyYAML",
    "types-jsonschema",
]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(names: list[str]) -> dict[str, str]:
    """Name -> version of the packages and all they require here, without extras."""
    found: dict[str, str] = {}
    queue = [Requirement(name) for name in names]
    seen = set()
    while queue:
        requirement = queue.pop()
        key = (normal(requirement.name), *sorted(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            package = distribution(requirement.name)
        except PackageNotFoundError:
            continue  # an optional requirement of another platform
        found[normal(requirement.name)] = package.version.split("+")[0]
        for text in package.requires or []:
            child = Requirement(text)
            extras = [{"extra": extra} for extra in requirement.extras] or [{"extra": ""}]
            if child.marker is None or any(child.marker.evaluate(extra) for extra in extras):
                queue.append(child)
    return found


def main() -> None:
    needed = closure(["tunetrail", "setuptools"])  # setuptools builds the package itself
    del needed["tunetrail"]
    extra = {name: version for name, version in closure(TEST).items() if name not in needed}
    pins = [f"{name}=={version}" for name, version in sorted(needed.items())]
    (HERE / "requirements.txt").write_text("# make lock\n" + "\n".join(pins) + "\n")
    (HERE / "requirements-test.txt").write_text(
        "# make lock\n" + "".join(f"{n}=={v}\n" for n, v in sorted(extra.items()))
    )
    lines = ["# make lock", "channels: [conda-forge]", "dependencies:", "  - python=3.11", "  - pip", "  - pip:"]
    (HERE / "tunetrail.yaml").write_text("\n".join([*lines, *(f"      - {pin}" for pin in pins)]) + "\n")


if __name__ == "__main__":
    main()
