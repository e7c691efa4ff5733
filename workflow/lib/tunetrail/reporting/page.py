"""Renders the page: one HTML file with its style, script and figures inside. Everything from the run is escaped.

The order of the sections is in page.html.j2. Numbers are formatted by `numbers.py`, and only differences and sums of
numbers from the metrics files are computed here.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import jinja2
from markupsafe import Markup

from tunetrail.config.shares import PAIRED, PTX
from tunetrail.config.training import FEWEST_STEPS
from tunetrail.reporting import charts, course, dag, numbers, verdict
from tunetrail.reporting.collect import SIMULATED_LABELERS, Model, Run, reference_of
from tunetrail.reporting.figures import Figure
from tunetrail.reporting.measured import SECTIONS, comparable, is_scored, left_out, positions, sentence_sum

HERE = Path(__file__).parent
ADAPTERS = {"full": "full", "lora": "LoRA"}
"""How models are trained, in words."""


def _html(text: str) -> Markup:
    """A formatted number; a value that was not measured gets its own style."""
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
        numbers.p_value,
        numbers.divergence,
        numbers.duration,
        numbers.size,
    )
} | {"visible": charts.visible}


def banners(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """What a reader must know before reading any number, each with the names of the runs it is about."""
    runs_of: dict[str, list[str]] = {}
    for run in runs:
        for text in _banners(run):
            runs_of.setdefault(text, []).append(run.name)
    return list(runs_of.items())


def _banners(run: Run) -> list[str]:
    banners = []
    if run.labeler in SIMULATED_LABELERS:
        ranked = {
            "simulated": f"the scorer {run.artifacts['comparisons'].config.get('scorer') or 'that its config names'}",
            "reward_model": "a reward model",
            "llm": "a language model",
        }
        own = (run.metrics("comparisons") or {}).get("from_data")
        more = f" The rankings of {own} more prompts came with the data." if own else ""
        banners.append(f"Labels are simulated: comparisons were ranked by {ranked[run.labeler]}, not by people.{more}")
    if run.labeler == "human":
        people = (run.metrics("comparisons") or {}).get("labelers") or {}
        banners.append(f"Labels are human: comparisons were ranked by {len(people)} people.")
    if ((run.metrics("base") or {}).get("source") or {}).get("source") == "random":
        banners.append(
            "The base model has random weights, for tests: no result here says anything about language models."
        )
    if few := [f"{name} {steps}" for name, steps in optimizer_steps(run).items() if steps < FEWEST_STEPS]:
        banners.append(
            f"Too few optimizer steps to learn from (fewer than {FEWEST_STEPS}): {', '.join(few)}. Expect these models "
            "to be close to the models that they started from."
        )
    banners += [chosen_step(role, a.metrics) for role, a in run.artifacts.items() if "kept_step" in a.metrics]
    unmeasured = [m.metrics.get("not_measured") for m in run.models]
    if lacking := next(filter(None, unmeasured), None):
        banners.append(
            f"Not measured: {', '.join(lacking['scorers'])}, since {lacking['prompts']} evaluation prompts have no "
            "reference answer to compare with."
        )
    if unrecorded := [role for role, a in run.artifacts.items() if a.state == "unrecorded"]:
        banners.append(f"There is no record of how these were made: {', '.join(unrecorded)}.")
    altered = [role for role, a in run.artifacts.items() if a.state == "altered"]
    if altered:
        banners.append(f"The record does not match the files in its folder: {', '.join(altered)}.")
    if stale := [role for role, a in run.artifacts.items() if a.stale]:
        banners.append(f"Made from inputs that have changed since: {', '.join(stale)}. Run the workflow again.")
    return banners


def chosen_step(role: str, trained: Mapping[str, Any]) -> str:
    """Which step of a stage with early stopping is kept, and what was chosen by it."""
    ended = "stopped early," if trained["stopped_early"] else "went to its end,"
    return (
        f"{role.removeprefix('policy.')}: training {ended} after step {trained['steps']}; the weights of step "
        f"{trained['kept_step']} are kept, where the held-out loss was lowest. The held-out rows chose the step, so "
        "what is measured on them flatters the model a little; the evaluation prompts had no part in it."
    )


def optimizer_steps(run: Run) -> dict[str, int]:
    """Name of each trained model -> the number of its optimizer steps, if known."""
    key = dict.fromkeys(("sft", "reward", *PAIRED, "kto"), "steps") | {"ppo": "optimizer_steps"}
    return {
        role.removeprefix("policy."): artifact.metrics[key[artifact.stage]]
        for role, artifact in run.artifacts.items()
        if artifact.stage in key and key[artifact.stage] in artifact.metrics
    }


def uses(run: Run) -> list[dict[str, Any]]:
    """How the rows of each source are used by the stages of this run."""
    stages = {artifact.stage for artifact in run.artifacts.values()}
    if any(artifact.config.get("ptx_coef") for artifact in run.artifacts.values()):
        stages.add(PTX)
    card = run.metrics("data") or {}
    return [use | {"used_by": [name for name in use["used_by"] if name in stages]} for use in card.get("uses", [])]


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
    """(commit, whether the working tree differed from it) for each commit whose code made an artifact."""
    dirty: dict[str, bool] = {}
    for artifact in run.artifacts.values():
        state = artifact.record.code if artifact.record else {}
        if commit := state.get("commit"):
            dirty[commit] = dirty.get(commit, False) or bool(state["dirty"])
    return list(dirty.items())


def marks(run: Run) -> list[tuple[str, bool]]:
    """(mark, whether it is good) for each result of the audit."""
    names = {finding.name for finding in run.audit}
    unsound = any(finding.severity == "error" for finding in run.audit)
    warnings = (("dirty-tree", "DIRTY"), ("mixed-environment", "MIXED ENVIRONMENT"))
    return [
        ("NOT VERIFIED", False) if unsound else ("VERIFIED", True),
        ("SIGNED", True) if run.signed else ("UNSIGNED", False),
        *((mark, False) for name, mark in warnings if name in names),
    ]


def software(run: Run) -> list[tuple[str, list[str]]]:
    """The versions of Python and the packages; several if artifacts were made with different ones."""
    versions: dict[str, set[str]] = {}
    for artifact in run.artifacts.values():
        if artifact.record is None:
            continue
        pythons = {("python", attempt["python"]) for attempt in artifact.attempts}
        for name, version in artifact.record.packages.items() | pythons:
            versions.setdefault(name, set()).add(version)
    return [(name, sorted(of_package)) for name, of_package in sorted(versions.items())]


def preference_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each preference probe with the log-probs of each model."""
    rows: dict[str, dict[str, Any]] = {}
    for model in (m for run in runs for m in run.models):
        for probe in model.preferences:
            row = rows.setdefault(probe["prompt"], probe | {"models": []})
            preferred, other = probe["preferred_logp"], probe["dispreferred_logp"]
            gap = None if preferred is None or other is None else preferred - other
            row["models"].append({"model": model, "preferred": preferred, "dispreferred": other, "gap": gap})
    return list(rows.values())


def adapter_pairs(runs: Sequence[Run]) -> list[tuple[Model | None, Model | None, dict]]:
    """The pairs of `forgetting` in which one model was fully trained and the other by an adapter."""
    return [
        (run.model(pair["first"]), run.model(pair["second"]), pair)
        for run in runs
        for pair in run.head_to_head.get("forgetting") or []
        if set(pair["adapters"]) == set(ADAPTERS)
    ]


def preference_changes(runs: Sequence[Run]) -> list[tuple[Model | None, Model | None, dict]]:
    """(model before, model after, how the log-probs of held-out pairs changed) for each training."""
    return [
        (run.model(change["before"]), run.model(change["after"]), change)
        for run in runs
        for change in run.head_to_head.get("preferences") or []
    ]


def boilerplate(prompts: list[str]) -> tuple[str, str]:
    """The whole lines that all prompts begin and end with: the chat template. Empty for a single prompt."""
    if len(set(prompts)) < 2:
        return "", ""
    start = os.path.commonprefix(prompts)  # noqa: RUF071
    start = start[: start.rfind("\n") + 1]
    end = os.path.commonprefix([p[len(start) :][::-1] for p in prompts])[::-1]  # noqa: RUF071
    # A line that ends with a marker (`…<|im_end|>`) belongs to the template from the marker on.
    cut = end.find("<|") if "<|" in end else end.find("\n")
    return start, end[cut:] if cut >= 0 else ""


def samples(runs: Sequence[Run], limit: int) -> dict[str, Any]:
    """The first `limit` prompts with each model's answers and their gains over the reference of its run."""
    sampled = [(run, m) for run in runs for m in run.models if m.samples]
    if not sampled:
        return {"rows": [], "start": "", "end": "", "total": 0}
    answers = {m.name: {row["id"]: row for row in m.samples} for _, m in sampled}
    first = sampled[0][1].samples
    start, end = boilerplate([row["prompt"] for row in first])
    rows = []
    for row in first[:limit]:
        model_answers = []
        for run, m in sampled:
            if answer := answers[m.name].get(row["id"]):
                reference = run.model(run.reference)
                before = answers[reference.name].get(row["id"]) if reference and reference.samples else None
                gains = {key: None if m is reference else _gain(answer, before, key) for key in ("gold", "reward")}
                model_answers.append({"model": m, "gains": gains} | answer)
        rows.append(
            {
                "id": row["id"],
                "prompt": row["prompt"][len(start) : len(row["prompt"]) - len(end)],
                "reference": row.get("reference"),
                "answers": model_answers,
                "gains": {f"{key} {a['model'].name}": gain for a in model_answers for key, gain in a["gains"].items()},
            }
        )
    return {"rows": rows, "start": start, "end": end, "total": len(first)}


def _gain(answer: dict, before: dict | None, key: str) -> float | None:
    """The difference between the means over both models' samples of a prompt."""
    if before is None or answer.get(key) is None or before.get(key) is None:
        return None
    return mean(answer[key]) - mean(before[key])


def _flat(content: Mapping, prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def made_with(run: Run) -> dict[str, str]:
    """What a run was made with, by name: the config of every artifact, code, software and machines."""
    facts = {
        name: value
        for role, artifact in run.artifacts.items()
        for name, value in _flat(artifact.config, f"config of {role}: ").items()
    }
    attempts = [attempt for artifact in run.artifacts.values() for attempt in artifact.attempts]
    for key in ("host", "cpu", "gpus", "driver"):
        values = {", ".join(v) if isinstance(v := attempt.get(key), list) else v for attempt in attempts}
        facts[key] = ", ".join(sorted(filter(None, values))) or "none"
    facts["base model"] = base_model(run)
    facts["code"] = ", ".join(f"{commit[:12]}{' DIRTY' if dirty else ''}" for commit, dirty in code(run))
    facts |= {name: " and ".join(versions) for name, versions in software(run)}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(name, value for each run) of everything in `made_with` that differs between the runs; a dash for no value."""
    facts = [made_with(run) for run in runs]
    names = dict.fromkeys(name for of_run in facts for name in of_run)
    rows = [(name, [of_run.get(name, "–") for of_run in facts]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def sources(runs: Sequence[Run], wanted: Callable[[str], bool]) -> list[tuple[str, str]]:
    """(role, start of the manifest digest) of the artifacts that a figure was drawn from."""
    return [(role, a.manifest[:12]) for run in runs for role, a in run.artifacts.items() if wanted(role)]


def draw(runs: Sequence[Run], figures: Mapping[str, Figure]) -> dict[str, tuple[str, str]]:
    """Name -> (SVG for a wide screen, SVG for a phone) for the figures with content."""
    specs = {name: (spec(runs, False), spec(runs, True)) for name, spec in figures.items()}
    return {name: (charts.svg(wide), charts.svg(narrow)) for name, (wide, narrow) in specs.items() if wide}


def render(runs: Sequence[Run], figures: dict[str, tuple[str, str]], title: str | None, limit: int) -> str:
    """The HTML for one run, or for several side by side.

    Args:
        figures: from `draw`; they are our own and therefore not escaped.
        limit: how many prompts are shown with their answers.
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
    models = [model for run in runs for model in run.models]
    policies = [model for run in runs for model in run.policies]
    without, scored = left_out(runs, figures), is_scored(runs)
    ppo = {f"policy.{m.subject}" for m in policies if m.metrics.get("method") == "ppo"}
    return environment.get_template("page.html.j2").render(
        runs=runs,
        several=len(runs) > 1,
        title=title or ", ".join(run.name for run in runs),
        css=read("page.css"),
        js=read("page.js"),
        figures={name: tuple(Markup(picture) for picture in pair) for name, pair in figures.items()},
        dag=dag.layout,
        banners=banners,
        uses=uses,
        base_model=base_model,
        code=code,
        software=software,
        marks=marks,
        models=models,
        policies=policies,
        learners=[m for m in policies if m.trained and m.trained.history],
        reference=reference_of(runs),
        outcomes=[(run, m, verdict.outcome(match)) for run in runs for m in run.policies if (match := run.match_of(m))],
        left_out=without,
        scored=scored,
        unmeasured=[words for id, words in SECTIONS.items() if id in without or (id == "results" and not scored)],
        sentences=[text for run in runs for text in verdict.sentences(run)],
        method_rows=course.method_rows,
        taught=[run for run in runs if run.metrics("methods")],
        contexts=course.contexts,
        positions=positions(runs),
        incomparable=comparable(runs)[1],
        sentence_sum=sentence_sum,
        preference_rows=preference_rows(runs),
        preference_changes=preference_changes(runs),
        adapters=ADAPTERS,
        adapter_pairs=adapter_pairs(runs),
        samples=samples(runs, limit),
        differences=differences(runs) if len(runs) > 1 else [],
        ppo_learners=sources(runs, lambda role: role in ppo),
        trained=sources(runs, lambda role: role in ("sft", "reward") or role.startswith("policy.")),
        sources=lambda *starts: sources(runs, lambda role: role.partition(".")[0] in starts),
    )
