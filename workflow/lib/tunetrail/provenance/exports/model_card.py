"""A README.md as Hugging Face reads it, https://huggingface.co/docs/hub/model-cards.

`base_model` is the first published ancestor. The text is in model_card.md.j2. A model has three cards: the one
in its folder, written before the model was evaluated; the one that `export` prints of a finished artifact; and the one
in a folder that `tunetrail model export` made. The first is part of the artifact: it names no commit, time, path or
place in the run, so that equal models have equal cards.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from tunetrail.errors import DataError
from tunetrail.provenance.exports.common import licence_of, lineage_of, record_of
from tunetrail.provenance.lineage import Lineage, Node, is_checkpoint, made_by, nearest_first, run_of
from tunetrail.provenance.manifest import MANIFEST, METRICS, PROVENANCE, read_manifest
from tunetrail.provenance.models import is_reward_model
from tunetrail.provenance.record import Record
from tunetrail.provenance.run_folder import artifacts
from tunetrail.provenance.schema import Dependency

TEMPLATE = Path(__file__).with_name("model_card.md.j2")


@dataclass(frozen=True)
class Subject:
    """The subject of a card: a model and everything it was made from."""

    stage: str
    model: Path
    """The folder with its config.json."""
    parents: Mapping[str, Node | None]
    """By role."""
    own: list[Dependency]
    """What its stage used in addition to its inputs."""
    has_adapter: bool = False

    @property
    def upstream(self) -> list[Node]:
        """Everything that it was made from and that has a record, nearest first."""
        return [node for node in nearest_first([p for _, p in sorted(self.parents.items()) if p]) if node.record]

    def of_role(self, role: str) -> list[Dependency]:
        """Its own dependencies of this role and those of everything upstream, each once."""
        upstream = (d for node in self.upstream for d in record_of(node).dependencies)
        matching = [d for d in [*self.own, *upstream] if d["annotations"]["role"] == role]
        return [d for n, d in enumerate(matching) if d not in matching[:n]]

    @property
    def imported(self) -> Dependency | None:
        """Its source, if its stage imported it."""
        return next((d for d in self.own if d["annotations"]["role"] == self.stage != "base"), None)

    @property
    def origin(self) -> Dependency | None:
        """The nearest model from elsewhere: an import, or a base that others can fetch (from a hub or an index)."""
        taken = [d for node in self.upstream if record_of(node).stage == "sft" for d in record_of(node).imported]
        return self.imported or next(iter(taken), None) or next((d for d in self.of_role("base") if d.get("uri")), None)

    @property
    def licence(self) -> str | None:
        """The licence of the nearest model from elsewhere that states one; an import without one leaves it open."""
        if self.imported:
            return self.imported["annotations"].get("licence")
        own = [d["annotations"].get("licence") for d in self.own if d["annotations"]["role"] == "base"]
        start = [self.parents[role] for role in ("policy", "base", "model", "sft") if self.parents.get(role)]
        return next(filter(None, [*own, *(licence_of(parent) for parent in start if parent)]), None)

    @property
    def started_from(self) -> str | None:
        """The stage of the model that training started from."""
        parent = self.parents.get("policy") or self.parents.get("base")
        return parent.record.stage if parent and parent.record else None


# ----------------------------------------------------------------------------- what was measured


def _is_interval(value: Any) -> bool:
    return isinstance(value, dict) and {"mean", "low", "high"} <= value.keys() and value["mean"] is not None


def intervals(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The intervals among metrics, those one level down as `key.name`; without those per source or labeler, whose names
    may be paths and people.
    """
    result = {}
    for key, value in metrics.items():
        if _is_interval(value):
            result[key] = value
        elif isinstance(value, dict) and "_by_" not in key:
            result |= {f"{key}.{name}": inner for name, inner in value.items() if _is_interval(inner)}
    return result


def lines(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The numbers, texts and intervals of metrics, formatted for readers."""
    result = {}
    for key, value in metrics.items():
        if isinstance(value, float):
            result[key] = f"{value:.4g}"
        elif isinstance(value, int | str):
            result[key] = f"{value:,}" if isinstance(value, int) else value
        result |= {
            name: f"{v['mean']:.4g} [{v['low']:.4g}, {v['high']:.4g}], n = {v['n']}"
            for name, v in intervals({key: value}).items()
        }
    return result


def _evaluations(node: Node) -> Iterator[dict[str, Any]]:
    """The metrics of every evaluation of this artifact in its run."""
    run = run_of(node.folder)
    for folder in artifacts(run) if run else []:
        path = folder / PROVENANCE
        if not path.exists():
            continue
        record = Record(path.read_bytes(), str(path))
        subjects = {s["digest"]["sha256"] for s in record.statement["subject"][1:]}
        if record.stage == "evaluation" and node.identity in subjects:
            yield json.loads((folder / METRICS).read_text())


def results(node: Node, step: int | None = None) -> dict[str, dict[str, Any]]:
    """The metrics with an interval of this model's evaluation in the same run.

    Args:
        step: the step of a checkpoint kept along the way, if that is meant.
    """
    for metrics in _evaluations(node):
        if step is None:
            return intervals(metrics)
        points = (metrics.get("frontier") or {}).get("points", [])
        return intervals(next((point for point in points if point["step"] == step), {}))
    return {}


# ----------------------------------------------------------------------------- the card


def _is_on_hub(source: Dependency) -> bool:
    return "files" not in source["annotations"] and "/" in source["name"]


def _without_path(source: Dependency) -> Dependency:
    """A file by its name alone: its place on somebody's machine is private."""
    return source if "files" not in source["annotations"] else source | {"name": Path(source["name"]).name}


def least_transformers(config: dict[str, Any]) -> str:
    """The oldest version of transformers that reads this config.json correctly, see `models.saving`.

    4.57 was tested; version 4 silently uses its defaults for rotary embeddings in a form that it does not know.
    """
    return "5.0" if config.get("rope_parameters") and "rope_theta" not in config else "4.57"


def _card(subject: Subject, title: str, measured: dict[str, str], evaluated: Mapping[str, Any], **facts: Any) -> str:
    base, licence = subject.origin, subject.licence
    # An imported model was trained elsewhere: the run's data and labels only tested it.
    sources = [] if subject.imported else subject.of_role("source")
    labels = [] if subject.imported else subject.of_role("labels")
    held_out: dict[str, Any] = {"dataset_type": "held-out", "dataset_name": "held-out prompts of the run"}
    data = ModelCardData(
        library_name="transformers",
        license=licence.lower() if licence else None,
        base_model=base["name"] if base and (base.get("uri") or "").startswith("pkg:huggingface/") else None,
        base_model_relation=None if subject.stage == "base" else "finetune",
        datasets=sorted({d["name"] for d in sources if _is_on_hub(d)}) or None,
        tags=["tunetrail", subject.stage],
        model_name=title,
        eval_results=[
            EvalResult("text-generation", metric_type=k, metric_name=k, metric_value=round(v["mean"], 4), **held_out)
            for k, v in evaluated.items()
        ]
        or None,
    )
    config = json.loads((subject.model / "config.json").read_text())
    card = ModelCard.from_template(
        data,
        str(TEMPLATE),
        title=title,
        stage=subject.stage,
        base=base and _without_path(base),
        licence=licence,
        upstream=[(made_by(record_of(node)), node.identity) for node in subject.upstream],
        sources=[_without_path(source) for source in sources],
        labelers=sorted({name for d in labels for name in d["annotations"].get("labelers", [])}),
        measured=measured,
        has_intervals=any("[" in text for text in measured.values()),
        config=config,
        auto_class=f"AutoModelFor{'SequenceClassification' if is_reward_model(config) else 'CausalLM'}",
        least_transformers=least_transformers(config),
        has_adapter=subject.has_adapter,
        started_from=subject.started_from,
        **facts,
    )
    return f"{card}\n"


def of_stage(
    stage: str, work: Path, inputs: Mapping[str, Path], own: list[Dependency], metrics: Mapping[str, Any]
) -> str:
    """The card in the model folder of a stage that is about to publish.

    Args:
        work: what becomes the artifact, with `model/`.
        inputs: the folders of its inputs, by role.
        own: what the stage used in addition.
        metrics: what it measured.
    """
    lineage = Lineage()
    parents = {role: lineage.add(folder) for role, folder in inputs.items()}
    subject = Subject(stage, work / "model", parents, own, (work / "adapter").is_dir())
    return _card(subject, stage, lines(metrics), {}, place=".")


def of_artifact(folder: Path, model: Path | None = None, title: str | None = None, step: int | None = None) -> str:
    """The full card of a published model, with what evaluation measured. Raises DataError if a record is missing.

    Args:
        model: the folder that `tunetrail model export` filled, where the card will be; None: the artifact's own.
        step: the step of a checkpoint kept along the way, to describe instead of the final model.
    """
    node, _ = lineage_of(folder)
    if not is_checkpoint(node):
        raise DataError(f"{folder}: holds no model; a card is of a checkpoint")
    record, evaluated = record_of(node), results(node, step)
    has_adapter = model is None and (folder / "adapter").is_dir()
    subject = Subject(record.stage, model or folder / "model", node.parents, record.dependencies, has_adapter)
    return _card(
        subject,
        title or node.name,
        lines(evaluated),
        evaluated,
        place="model" if model is None else ".",
        record=record,
        identity=node.identity,
        tensors=len(read_manifest(folder / MANIFEST).get("tensors", [])),
        step=step,
        has_gguf=model is not None and (model / "model.gguf").exists(),
    )


def export(folder: Path) -> str:
    return of_artifact(folder)
