"""Rankings recorded earlier, looked up in a JSONL file.

A line has one of the shapes that `tunetrail.preferences.formats` describes, with a text for its prompt, or the shape of
`comparisons.jsonl`, where "rankings" is a list of {"ranks", "labeler", "time", "order"}.

A line belongs to a row when

1. its prompt equals the row's rendered prompt or, failing that, the row's last user message (surrounding white space is
   ignored); and
2. it ranks every completion of the row (surrounding white space is ignored). If it ranks more, their ranks are left out
   and the gaps are closed.

Each such line contributes its rankings, so there may be several labelers, with a line each.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tunetrail.config.comparisons import RecordedLabeler
from tunetrail.contract.stage import Stage
from tunetrail.data.files import jsonl_lines
from tunetrail.data.invalid import Invalid, found_invalid
from tunetrail.errors import DataError
from tunetrail.labeling.labels import Labels
from tunetrail.preferences.formats import BadRow, checked_text, parse_preference
from tunetrail.preferences.ranks import dense
from tunetrail.preferences.rows import Ranking, SampledRow
from tunetrail.provenance.manifest import sha256_file


@dataclass
class Recorded:
    """One ranking of the file."""

    line: int
    prompt: str
    completions: list[str]
    ranking: Ranking

    def of(self, completions: list[str]) -> Ranking | None:
        """The ranking of these completions; None if one of them was not ranked."""
        place = {completion: i for i, completion in enumerate(self.completions)}
        if not all(completion.strip() in place for completion in completions):
            return None
        places = [place[completion.strip()] for completion in completions]
        return {
            "labeler": self.ranking["labeler"],
            "ranks": dense([self.ranking["ranks"][i] for i in places]),
            "order": [places.index(i) for i in self.ranking["order"] if i in places],
            "time": self.ranking["time"],
            "scores": None,
        }


def _parse(row: dict, line: int) -> Iterator[Recorded]:
    """The rankings of one row. Raises ValueError and TypeError."""
    prompt = checked_text(row, "prompt").strip()
    for ranking in row.get("rankings", [{}]):
        parsed = parse_preference(row | ranking, allow_empty=True)
        completions = [completion.strip() for completion in parsed["completions"]]
        for one in parsed["rankings"]:
            yield Recorded(line, prompt, completions, one)


def read_rankings(path: Path, columns: dict[str, str]) -> dict[str, list[Recorded]]:
    """The rankings of a file by prompt.

    Args:
        columns: our name of a column -> the file's name, if they differ.

    Raises DataError that names the bad lines.
    """
    by_prompt: dict[str, list[Recorded]] = defaultdict(list)
    ours = {theirs: name for name, theirs in columns.items()}
    count, bad = 0, []
    for line, row in jsonl_lines(path):
        count += 1
        try:
            if isinstance(row, BadRow):
                raise row
            for recorded in _parse({ours.get(key, key): value for key, value in row.items()}, line):
                by_prompt[recorded.prompt].append(recorded)
        except (ValueError, TypeError) as e:
            bad.append(Invalid(f"{path}:{line}", str(e)))
    if bad:
        raise DataError("\n".join(finding.line for finding in found_invalid(str(path), bad, count)))
    return by_prompt


def _short(prompt: str) -> str:
    text = " ".join(prompt.split())
    return repr(text if len(text) <= 60 else f"{text[:59]}…")


def rank(rows: list[SampledRow], config: RecordedLabeler, stage: Stage) -> Labels:
    """Raises DataError for a row that the file does not rank."""
    recorded = read_rankings(config.path, config.columns)

    rankings = []
    for row in rows:
        prompt = row["prompt"].strip()
        if prompt not in recorded:
            prompt = row["messages"][-1]["content"].strip()
        if prompt not in recorded:
            raise DataError(
                f"{config.path}: no line ranks completions of the prompt {_short(prompt)} (row {row['id']})"
            )
        matching = [ranking for entry in recorded[prompt] if (ranking := entry.of(row["completions"]))]
        if not matching:
            entry = recorded[prompt][0]
            unranked = next(c for c in row["completions"] if c.strip() not in entry.completions)
            raise DataError(
                f"{config.path}:{entry.line}: does not rank the completion {_short(unranked)} "
                f"of the prompt {_short(prompt)} (row {row['id']}); add a line that ranks all its completions"
            )
        rankings.append(matching)
    return Labels(rankings, source={"files": {os.path.relpath(config.path): sha256_file(config.path)}})
