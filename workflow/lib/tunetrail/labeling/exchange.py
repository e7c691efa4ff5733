"""Labels to and from other tools: `tunetrail label export` and `tunetrail label import`.

Between formats labels are items, {"id", "prompt", "completions" [K], "rankings": [{"labeler", "ranks" [K], …}]}; ranks
count from 1 (best) and equal ranks are a tie. What a tie becomes:

    jsonl         a line a ranking: equal ranks, and nothing is lost. `data.preferences` and the labeler `recorded` read it
    trl           a line for each pair of a ranking that was decided: prompt, chosen, rejected. A tied pair gives none.
                  With `id` and `labeler`, which are added, all ranks can be told from the others, but a ranking that
                  ties everything is gone. A foreign line without them is a ranking of two
    label-studio  one bucket of the Ranker, `LABEL_STUDIO` being the labeling interface; a Ranker without buckets, which
                  knows no ties, is read too
    argilla       the RankingQuestion has no ties in Argilla's SDK: those tied follow each other as the labeler saw them,
                  and the text question `ranks` holds the true ranks and is believed before it. Records as Argilla's
                  database has them, {"value", "rank"} with ties, are read too. Argilla wants one K a dataset

Ratings, flags, comments and times go into jsonl only. Demonstrations are a format of their own, which is only written:
prompt, completion and the author's pseudonym as `labeler`; `data.demonstrations` reads it.
"""

import json
import uuid
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from tunetrail.errors import DataError
from tunetrail.labeling.quality import by_task, counted
from tunetrail.preferences.ranks import dense

EXTRAS = ("ratings", "flags", "all_bad", "comment", "seconds")
"""What a ranking has beside labeler, ranks, order and time, in jsonl."""
LABEL_STUDIO = """<View>
  <Text name="prompt" value="$prompt"/>
  <List name="items" value="$items" title="Responses"/>
  <Ranker name="rank" toName="items">
    {buckets}
  </Ranker>
  <TextArea name="labeler" toName="prompt"/>
</View>""".format(buckets="\n    ".join(f'<Bucket name="{n}" title="{n}"/>' for n in range(1, 10)))
"""The labeling interface of Label Studio that its format is for."""
Item = dict[str, Any]
Row = dict[str, Any]


def items_of(tasks: Iterable[dict], labels: Iterable[dict]) -> list[Item]:
    """The rankings that count, by task; a task without any is left out."""
    answers = by_task(counted(labels))
    return [
        {"id": task["id"], "prompt": task["prompt"], "completions": task["completions"]}
        | {"rankings": [_own(label) for label in answers[task["id"]]]}
        for task in tasks
        if task["id"] in answers
    ]


def _own(label: dict) -> dict:
    named = {"labeler": label["labeler"], "ranks": label["ranks"], "order": label["shown"], "time": label["at"]}
    return named | {key: label[key] for key in EXTRAS}


def demonstrations(tasks: Iterable[dict], labels: Iterable[dict]) -> list[Row]:
    """The answers that labelers wrote, with their pseudonyms."""
    prompts = {task["id"]: task["prompt"] for task in tasks}
    return [
        {"prompt": prompts[row["task"]], "completion": row["text"], "labeler": row["labeler"], "id": row["task"]}
        for row in labels
        if row["kind"] == "demonstration" and row["skipped"] is None and not row["repeat"]
    ]


def as_tasks(items: Iterable[Item]) -> list[dict]:
    """The items as tasks to be ranked here."""
    return [{"id": item["id"], "prompt": item["prompt"], "completions": item["completions"]} for item in items]


def _checked(ranks: Any, k: int) -> list[int]:
    """Ranks as others count them, without gaps. Raises ValueError."""
    if not isinstance(ranks, list) or len(ranks) != k or not all(type(rank) is int and rank > 0 for rank in ranks):
        raise ValueError(f"needs a rank from 1 for each of its {k} completions")
    return dense(ranks)


def _text(row: Row, key: str) -> str:
    if not isinstance(row.get(key), str) or not row[key]:
        raise ValueError(f"'{key}' must be a text")
    return row[key]


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(text, str) for text in value):
        raise ValueError("'completions' must be a list of at least two texts")
    return value


def _joined(items: Iterable[Item]) -> list[Item]:
    """Items of the same id and texts as one, in the order in which they came first."""
    found: dict[tuple, Item] = {}
    for item in items:
        key = item["id"], item["prompt"], *item["completions"]
        if key in found:
            found[key]["rankings"] += item["rankings"]
        else:
            found[key] = item
    return list(found.values())


# ----------------------------------------------------------------------------- jsonl


def to_jsonl(items: Iterable[Item]) -> list[Row]:
    return [
        {key: item[key] for key in ("id", "prompt", "completions")} | ranking
        for item in items
        for ranking in item["rankings"]
    ]


def _from_jsonl(row: Row, number: int) -> Item:
    completions = _texts(row.get("completions"))
    ranking = {"labeler": str(row.get("labeler") or "recorded"), "ranks": _checked(row.get("ranks"), len(completions))}
    ranking |= {key: row[key] for key in ("order", "time", *EXTRAS) if key in row}
    name = str(row.get("id", f"line-{number}"))
    return {"id": name, "prompt": _text(row, "prompt"), "completions": completions, "rankings": [ranking]}


def from_jsonl(rows: Iterable[tuple[int, Row]]) -> list[Item]:
    return _joined(_located(rows, _from_jsonl))


# ----------------------------------------------------------------------------- TRL


def to_trl(items: Iterable[Item]) -> list[Row]:
    found = []
    for item in items:
        texts = item["completions"]
        for ranking in item["rankings"]:
            ranks = ranking["ranks"]
            for i, j in combinations(range(len(texts)), 2):
                if ranks[i] != ranks[j] and texts[i] != texts[j]:
                    better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
                    found.append(
                        {"prompt": item["prompt"], "chosen": texts[better], "rejected": texts[worse]}
                        | {"id": item["id"], "labeler": ranking["labeler"]}
                    )
    return found


def from_trl(rows: Iterable[tuple[int, Row]]) -> list[Item]:
    """In a weak order a completion's rank follows from how many are above it. Raises DataError where there is none."""
    rankings: dict[tuple, list[tuple[str, str]]] = {}
    first: dict[tuple, int] = {}

    def read(row: Row, number: int) -> None:
        prompt, chosen, rejected = (_text(row, key) for key in ("prompt", "chosen", "rejected"))
        name = row.get("id")
        key = (f"line-{number}" if name is None else str(name), prompt, str(row.get("labeler") or "recorded"))
        rankings.setdefault(key, []).append((chosen, rejected))
        first.setdefault(key, number)

    def item(key: tuple, number: int) -> Item:
        pairs = set(rankings[key])
        texts = list(dict.fromkeys(text for pair in rankings[key] for text in pair))
        above = {text: sum(rejected == text for _, rejected in pairs) for text in texts}
        ordered = {(a, b) for a in texts for b in texts if above[a] < above[b]}
        if pairs != ordered:
            raise ValueError(f"the pairs of id {key[0]!r} by {key[2]} are those of no ranking")
        ranking = {"labeler": key[2], "ranks": dense([above[text] + 1 for text in texts])}
        # Two labelers' pairs come in different orders, and shall be of one item.
        places = sorted(range(len(texts)), key=lambda i: texts[i])
        ranking["ranks"] = [ranking["ranks"][i] for i in places]  # type: ignore[index]
        return {"id": key[0], "prompt": key[1], "completions": [texts[i] for i in places], "rankings": [ranking]}

    list(_located(rows, read))
    return _joined(_located(((number, key) for key, number in first.items()), item))


# ----------------------------------------------------------------------------- Label Studio


def to_label_studio(items: Iterable[Item]) -> list[Row]:
    def annotation(ranking: dict) -> Row:
        buckets: dict[str, list[str]] = {}
        for i, rank in sorted(enumerate(ranking["ranks"]), key=lambda place: place[1]):
            buckets.setdefault(str(rank), []).append(str(i))
        ranked = {"from_name": "rank", "to_name": "items", "type": "ranker", "value": {"ranker": buckets}}
        name = {
            "from_name": "labeler",
            "to_name": "prompt",
            "type": "textarea",
            "value": {"text": [ranking["labeler"]]},
        }
        return {"result": [ranked, name]}

    return [
        {
            "data": {
                "id": item["id"],
                "prompt": item["prompt"],
                "items": [{"id": str(i), "body": text} for i, text in enumerate(item["completions"])],
            },
            "annotations": [annotation(ranking) for ranking in item["rankings"]],
        }
        for item in items
    ]


def _buckets_to_ranks(value: dict[str, list[str]], names: list[str]) -> list[int]:
    """Ranks of the items `names` from Ranker's value: buckets named 1 to 9, or the one list of a Ranker without."""
    groups = {name: places for name, places in value.items() if name != "_" or places}  # "_": what was not moved
    if len(groups) == 1 and not next(iter(groups)).isdigit():
        groups = {str(n): [place] for n, place in enumerate(next(iter(groups.values())), 1)}
    if odd := next((name for name in groups if not name.isdigit() or int(name) < 1), None):
        raise ValueError(f"bucket {odd!r}: buckets must be named 1, 2, … best first, and hold every response")
    rank_of = {place: int(name) for name, places in groups.items() for place in places}
    if sorted(rank_of) != sorted(names):
        raise ValueError("an annotation does not rank every response once")
    return dense([rank_of[name] for name in names])


def _from_label_studio(row: Row, number: int) -> Item:
    data = row["data"]
    names = [str(entry["id"]) for entry in data["items"]]
    rankings = []
    for annotation in row.get("annotations", []):
        by_name = {result["from_name"]: result["value"] for result in annotation["result"]}
        if annotation.get("was_cancelled") or "rank" not in by_name:
            continue
        who = annotation.get("completed_by")
        who = who.get("email", who.get("id")) if isinstance(who, dict) else who
        labeler = by_name["labeler"]["text"][0] if "labeler" in by_name else "recorded" if who is None else str(who)
        rankings.append({"labeler": labeler, "ranks": _buckets_to_ranks(by_name["rank"]["ranker"], names)})
    completions = _texts([entry.get("body", entry.get("title")) for entry in data["items"]])
    name = str(data.get("id", row.get("id", f"task-{number}")))
    return {"id": name, "prompt": _text(data, "prompt"), "completions": completions, "rankings": rankings}


def from_label_studio(rows: Iterable[tuple[int, Row]]) -> list[Item]:
    return list(_located(rows, _from_label_studio))


# ----------------------------------------------------------------------------- Argilla


def _user(labeler: str) -> str:
    """Argilla knows its users by UUID; this one follows from the pseudonym."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"urn:tunetrail:labeler:{labeler}"))


def to_argilla(items: Iterable[Item]) -> list[Row]:
    def strict(ranking: dict) -> list[str]:
        order = ranking.get("order") or list(range(len(ranking["ranks"])))
        return [f"response-{i + 1}" for i in sorted(order, key=lambda i: (ranking["ranks"][i], order.index(i)))]

    return [
        {
            "id": item["id"],
            "fields": {"prompt": item["prompt"]}
            | {f"response-{i}": text for i, text in enumerate(item["completions"], 1)},
            "metadata": {"labelers": " ".join(ranking["labeler"] for ranking in item["rankings"])},
            "responses": {
                "ranking": [{"value": strict(r), "user_id": _user(r["labeler"])} for r in item["rankings"]],
                "ranks": [
                    {"value": " ".join(map(str, r["ranks"])), "user_id": _user(r["labeler"])} for r in item["rankings"]
                ],
            },
        }
        for item in items
    ]


def _from_argilla(row: Row, number: int) -> Item:
    fields, responses = row["fields"], row.get("responses") or {}
    names = sorted((name for name in fields if name.startswith("response")), key=lambda name: (len(name), name))
    known = {_user(name): name for name in str((row.get("metadata") or {}).get("labelers", "")).split()}
    exact = {response["user_id"]: response["value"] for response in responses.get("ranks", [])}
    rankings = []
    for response in responses.get("ranking", []):
        user, value = str(response["user_id"]), response["value"]
        if user in exact:
            ranks = [int(rank) for rank in str(exact[user]).split()]
        else:
            places = [
                (v["value"], v.get("rank") or n) if isinstance(v, dict) else (v, n) for n, v in enumerate(value, 1)
            ]
            if sorted(name for name, _ in places) != sorted(names):
                raise ValueError("a response does not rank every completion once")
            ranks = [dict(places)[name] for name in names]
        rankings.append({"labeler": known.get(user, user), "ranks": _checked(ranks, len(names))})
    name = str(row.get("id") or f"record-{number}")
    completions = _texts([fields[name] for name in names])
    return {"id": name, "prompt": _text(fields, "prompt"), "completions": completions, "rankings": rankings}


def from_argilla(rows: Iterable[tuple[int, Row]]) -> list[Item]:
    return list(_located(rows, _from_argilla))


# ----------------------------------------------------------------------------- files


class _BadRow(Exception):
    """What is wrong with which row; the reader adds the file."""


def _located(rows: Iterable[tuple[int, Any]], read: Callable[[Any, int], Any]) -> Iterator[Any]:
    for number, row in rows:
        try:
            yield read(row, number)
        except (ValueError, TypeError, LookupError, AttributeError) as e:
            what = f"has no {e}" if isinstance(e, KeyError) else str(e) or type(e).__name__
            raise _BadRow(f"{number}: {what}") from None


EXPORT: dict[str, Callable[[Iterable[Item]], list[Row]]] = {
    "jsonl": to_jsonl,
    "trl": to_trl,
    "label-studio": to_label_studio,
    "argilla": to_argilla,
}
IMPORT: dict[str, Callable[[Iterable[tuple[int, Row]]], list[Item]]] = {
    "jsonl": from_jsonl,
    "trl": from_trl,
    "label-studio": from_label_studio,
    "argilla": from_argilla,
}
LISTS = ("label-studio", "argilla")
"""Formats that are one JSON list; the others have a row a line."""


def written(rows: list[Row], form: str) -> str:
    """The content of a file in this format."""
    if form in LISTS:
        return json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(path: Path, form: str) -> list[Item]:
    """The items of a file. Raises DataError naming the line, or for a list the element (from 1)."""
    try:
        text = path.read_text(encoding="utf-8")
        if form in LISTS:
            rows = json.loads(text)
            if not isinstance(rows, list):
                raise ValueError("must be a list")
            numbered = list(enumerate(rows, 1))
        else:
            numbered = []
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    numbered.append((number, json.loads(line)))
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8; convert the file with iconv") from None
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path}: is not {'a JSON list' if form in LISTS else 'JSON, a row a line'} ({e})") from None
    try:
        return IMPORT[form](numbered)
    except _BadRow as e:
        raise DataError(f"{path}:{e}") from None
