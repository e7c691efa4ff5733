"""The page: one HTML file with its style, script and figures inside; everything from the run is escaped.

The order of the sections is in page.html.j2. Numbers are formatted by `numbers.py`, and nothing is
computed here but differences and sums of what the metrics files hold.
"""

import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tunetrail.provenance.manifest import SIGNATURE
from tunetrail.reporting import charts, dag, numbers, verdict
from tunetrail.reporting.collect import SIMULATED_LABELERS, Model, Run

HERE = Path(__file__).parent
TOP = 5
"""Next tokens listed at each position of the probe sentence."""


def _html(text: str) -> Markup:
    """A formatted number, with what was not measured set apart."""
    if text == numbers.NOT_MEASURED:
        return Markup('<span class="missing">{}</span>').format(text)
    return Markup('<span class="number">{}</span>').format(text)


def _filter(write: Callable[..., str]) -> Callable[..., Markup]:
    return lambda *args, **options: _html(write(*args, **options))


FILTERS = {
    write.__name__: _filter(write)
    for write in (
        numbers.number,
        numbers.interval,
        numbers.percent,
        numbers.percent_interval,
        numbers.duration,
        numbers.size,
    )
} | {"visible": charts.visible}


def banners(run: Run) -> list[str]:
    """What a reader must know before any number."""
    found = []
    if run.labeler in SIMULATED_LABELERS:
        ranked = {
            "reference": "chrF against the author's own text",
            "reward_model": "a reward model",
            "llm": "a language model",
        }
        found.append(f"Labels are simulated: comparisons were ranked by {ranked[run.labeler]}, not by people.")
    if run.labeler == "human":
        people = (run.metrics("comparisons") or {}).get("labelers") or {}
        found.append(f"Labels are human: comparisons were ranked by {len(people)} people.")
    if ((run.metrics("base") or {}).get("source") or {}).get("source") == "random":
        found.append(
            "The base model has random weights, for tests: no result here says anything about language models."
        )
    altered = [role for role, a in run.artifacts.items() if a.state == "altered"]
    if altered:
        found.append(f"The record does not belong to the files it lies beside: {', '.join(altered)}.")
    if stale := [role for role, a in run.artifacts.items() if a.stale]:
        found.append(f"Made from inputs that have changed since: {', '.join(stale)}. Run the workflow again.")
    return found


def base_model(run: Run) -> str:
    """The base model in a few words."""
    source = (run.metrics("base") or {}).get("source") or {}
    match source.get("source"):
        case "pypi":
            return f"{Path(source['gguf']).stem} ({source['package']} {source['version']})"
        case "hub":
            return f"{source['repo']} @ {source['revision'][:12]}"
        case "local":
            return Path(source["path"]).name
        case "random":
            return "random weights"
    return numbers.NOT_MEASURED


def code(run: Run) -> list[tuple[str, bool]]:
    """Each commit whose code made an artifact, and whether the tree ever differed from it."""
    found: dict[str, bool] = {}
    for artifact in run.artifacts.values():
        state = artifact.record.code if artifact.record else {}
        if commit := state.get("commit"):
            found[commit] = found.get(commit, False) or bool(state["dirty"])
    return list(found.items())


def marks(run: Run) -> list[str]:
    """What a reader of the audit should know of a run whose files are all what they were."""
    names = {finding.name for finding in run.audit}
    signed = all((a.folder / SIGNATURE).exists() for a in run.artifacts.values())
    known = (("dirty-tree", "DIRTY"), ("mixed-environment", "MIXED ENVIRONMENT"))
    return ([] if signed else ["UNSIGNED"]) + [mark for name, mark in known if name in names]


def software(run: Run) -> list[tuple[str, list[str]]]:
    """Versions of Python and the packages; more than one where artifacts were made with different ones."""
    versions: dict[str, set[str]] = {}
    for artifact in run.artifacts.values():
        if artifact.record is None:
            continue
        pythons = {("python", attempt["python"]) for attempt in artifact.attempts}
        for name, version in artifact.record.packages.items() | pythons:
            versions.setdefault(name, set()).add(version)
    return [(name, sorted(found)) for name, found in sorted(versions.items())]


def sentence_sum(model: Model) -> float | None:
    """Log-probability of the probe sentence in nats, of its measured positions."""
    probs = [p["prob"] for p in model.sentence if p.get("prob")]
    return sum(math.log(p) for p in probs) if probs else None


def positions(run: Run) -> list[dict[str, Any]]:
    """The probe sentence: for each position the token and, for each model, its probability and the likeliest tokens."""
    probed = [m for m in run.models if m.sentence]
    if not probed:
        return []
    return [
        {
            "token": position["token"],
            "models": [
                {"model": m, "prob": m.sentence[i].get("prob"), "top": (m.sentence[i].get("top") or [])[:TOP]}
                for m in probed
                if i < len(m.sentence)
            ],
        }
        for i, position in enumerate(probed[0].sentence)
    ]


def preference_rows(run: Run) -> list[dict[str, Any]]:
    """Each preference probe with the log-probabilities of each model."""
    found: dict[str, dict[str, Any]] = {}
    for model in run.models:
        for probe in model.preferences:
            row = found.setdefault(probe["prompt"], probe | {"models": []})
            preferred, other = probe["preferred_logp"], probe["dispreferred_logp"]
            gap = None if preferred is None or other is None else preferred - other
            row["models"].append({"model": model, "preferred": preferred, "dispreferred": other, "gap": gap})
    return list(found.values())


def boilerplate(prompts: list[str]) -> tuple[str, str]:
    """What all prompts begin and end with, in whole lines: the chat template. Empty for a single prompt."""
    if len(set(prompts)) < 2:
        return "", ""
    start = os.path.commonprefix(prompts)  # noqa: RUF071
    start = start[: start.rfind("\n") + 1]
    end = os.path.commonprefix([p[len(start) :][::-1] for p in prompts])[::-1]  # noqa: RUF071
    # A line that an end marker closes (`…<|im_end|>`) belongs to the template from the marker on.
    cut = end.find("<|") if "<|" in end else end.find("\n")
    return start, end[cut:] if cut >= 0 else ""


def samples(run: Run, limit: int) -> dict[str, Any]:
    """The first `limit` prompts with what each model answered."""
    sampled = [m for m in run.models if m.samples]
    if not sampled:
        return {"rows": [], "start": "", "end": "", "total": 0}
    answers = {m.name: {row["id"]: row for row in m.samples} for m in sampled}
    first = sampled[0].samples
    start, end = boilerplate([row["prompt"] for row in first])
    rows = []
    for row in first[:limit]:
        theirs = [(m, answers[m.name][row["id"]]) for m in sampled if row["id"] in answers[m.name]]
        sft = answers.get("sft", {}).get(row["id"])
        rows.append(
            {
                "id": row["id"],
                "prompt": row["prompt"][len(start) : len(row["prompt"]) - len(end)],
                "reference": row.get("reference"),
                "answers": [{"model": m, "gain": _gain(a, sft, "gold")} | a for m, a in theirs],
                "gains": {
                    f"{key} {m.name}": _gain(a, sft, key)
                    for m, a in theirs
                    if m.name != "sft"
                    for key in ("gold", "reward")
                },
            }
        )
    return {"rows": rows, "start": start, "end": end, "total": len(first)}


def _gain(answer: dict, sft: dict | None, key: str) -> float | None:
    if sft is None or answer.get(key) is None or sft.get(key) is None:
        return None
    return answer[key] - sft[key]


def sources(run: Run, roles: Iterable[str]) -> list[tuple[str, str]]:
    """(role, start of its manifest digest): what a figure was drawn from."""
    return [(role, run.artifacts[role].manifest[:12]) for role in roles if role in run.artifacts]


def render(run: Run, figures: dict[str, tuple[str, str]], title: str | None, limit: int) -> str:
    """The HTML.

    Args:
        figures: name -> SVG for a wide screen and for a phone, both ours and therefore not escaped.
        limit: prompts shown side by side.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= FILTERS
    read = lambda name: Markup((HERE / name).read_text(encoding="utf-8"))  # noqa: E731
    evaluations = [m.artifact.role for m in run.models]
    return environment.get_template("page.html.j2").render(
        run=run,
        title=title or run.name,
        css=read("page.css"),
        js=read("page.js"),
        figures={name: tuple(Markup(picture) for picture in pair) for name, pair in figures.items()},
        dag=dag.layout(run),
        banners=banners(run),
        base_model=base_model(run),
        code=code(run),
        software=software(run),
        errors=any(finding.severity == "error" for finding in run.audit),
        marks=marks(run),
        picture=Markup(run.picture),
        learners=[m for m in run.policies if (a := run.artifacts.get(f"policy.{m.name}")) and a.history],
        outcomes=[(m, verdict.outcome(m.interval("win_rate_vs_sft"))) for m in run.policies],
        sentences=verdict.sentences(run),
        folder=f"results/{run.name}",
        positions=positions(run),
        sentence_sum=sentence_sum,
        preference_rows=preference_rows(run),
        samples=samples(run, limit),
        evaluations=sources(run, evaluations),
        ppo_learners=sources(run, [f"policy.{m.name}" for m in run.policies if m.metrics.get("method") == "ppo"]),
        trained=sources(run, [r for r, a in run.artifacts.items() if a.history]),
        sources=lambda *roles: sources(run, roles),
    )
