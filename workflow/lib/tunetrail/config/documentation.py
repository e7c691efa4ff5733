"""The JSON schema of the config, and the tables of every key in config/README.md."""

import inspect
import json

from pydantic import BaseModel

from tunetrail.config.base_model import HubModel, LocalModel, PypiModel, RandomModel
from tunetrail.config.best_of_n import BestOfNConfig
from tunetrail.config.comparisons import (
    CompletionsConfig,
    HumanLabeler,
    LlmJudge,
    LlmLabeler,
    RecordedLabeler,
    SimulatedLabeler,
)
from tunetrail.config.data import DataConfig, DocstringSource, FileSource, HubSource, Limits, Shares, TopicsSource
from tunetrail.config.dpo import DpoConfig
from tunetrail.config.evaluation import (
    PALMETTO,
    PREFERENCE_PROBES,
    EvaluationConfig,
    HeadToHeadConfig,
    LmEvalConfig,
    PreferenceProbe,
    ReportConfig,
    RetentionConfig,
)
from tunetrail.config.imported import ImportedModel
from tunetrail.config.kto import KtoConfig
from tunetrail.config.loading import LISTS, NEVER_SWEPT
from tunetrail.config.methods import MethodConfig, MethodsConfig
from tunetrail.config.ppo import PpoConfig, Vllm
from tunetrail.config.reference_free import OrpoConfig, SimpoConfig
from tunetrail.config.run import Config
from tunetrail.config.scorers import (
    ChrfScorer,
    ExactScorer,
    GuidelineScorer,
    LengthScorer,
    PythonScorer,
    RegexScorer,
    RewardModelScorer,
    SumScorer,
)
from tunetrail.config.training import Lora, RewardConfig, SftConfig


def schema() -> dict:
    """The JSON schema of the config file, where any key of a policy may also be a list: a sweep."""
    described = Config.model_json_schema() | {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "tunetrail",
    }
    for model in (PpoConfig, DpoConfig, OrpoConfig, SimpoConfig, KtoConfig, BestOfNConfig):
        properties = described["$defs"][model.__name__]["properties"]
        for key, value in properties.items():
            if key not in NEVER_SWEPT + LISTS:
                properties[key] = {"anyOf": [value, {"type": "array", "items": value, "minItems": 1}]}
    return described


_TABLES = "data.demonstrations[], data.preferences[], data.feedback[], data.prompts[]"
_BLOCKS: list[tuple[str, str, type[BaseModel]]] = [
    ("", "", Config),
    ("base", "source: pypi", PypiModel),
    ("base", "source: hub", HubModel),
    ("base", "source: local", LocalModel),
    ("base", "source: random", RandomModel),
    ("data", "", DataConfig),
    ("data.demonstrations[]", "source: docstrings", DocstringSource),
    ("data.demonstrations[]", "source: topics", TopicsSource),
    (_TABLES, "source: file", FileSource),
    (_TABLES, "source: hub", HubSource),
    ("data.shares", "", Shares),
    ("data.limits", "", Limits),
    ("sft", "", SftConfig),
    ("completions", "", CompletionsConfig),
    ("comparisons", "labeler: simulated", SimulatedLabeler),
    ("comparisons", "labeler: recorded", RecordedLabeler),
    ("comparisons", "labeler: llm", LlmLabeler),
    ("comparisons", "labeler: human", HumanLabeler),
    ("scorers.<name>", "scorer: chrf", ChrfScorer),
    ("scorers.<name>", "scorer: guideline", GuidelineScorer),
    ("scorers.<name>", "scorer: exact", ExactScorer),
    ("scorers.<name>", "scorer: regex", RegexScorer),
    ("scorers.<name>", "scorer: length", LengthScorer),
    ("scorers.<name>", "scorer: python", PythonScorer),
    ("scorers.<name>", "scorer: reward_model", RewardModelScorer),
    ("scorers.<name>", "scorer: sum", SumScorer),
    ("reward", "", RewardConfig),
    ("sft, reward", "path or repo", ImportedModel),
    ("policies.<name>", "method: dpo", DpoConfig),
    ("policies.<name>", "method: orpo", OrpoConfig),
    ("policies.<name>", "method: simpo", SimpoConfig),
    ("policies.<name>", "method: kto", KtoConfig),
    ("policies.<name>", "method: ppo", PpoConfig),
    ("policies.<name>", "method: best_of_n", BestOfNConfig),
    ("sft.lora, reward.lora, policies.<name>.lora", "", Lora),
    ("policies.<name>.vllm", "", Vllm),
    ("retention", "", RetentionConfig),
    ("methods", "", MethodsConfig),
    ("methods.compare.<name>", "", MethodConfig),
    ("evaluation", "", EvaluationConfig),
    ("evaluation.preferences[]", "", PreferenceProbe),
    ("head_to_head", "", HeadToHeadConfig),
    ("head_to_head.judge", "", LlmJudge),
    ("lm_eval", "", LmEvalConfig),
    ("report", "", ReportConfig),
]


KEYS_START, KEYS_END = "<!-- keys -->", "<!-- end of keys -->"


def _describe(spec: dict) -> str:
    """A JSON schema's type in words.

    >>> _describe({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]})
    'whole number, at least 1; or null'
    """
    if options := spec.get("anyOf"):
        options_in_words = [
            "list of these" if "enum" in option.get("items", {}) and option["items"] in options else _describe(option)
            for option in options
        ]
        return "; or ".join(dict.fromkeys(options_in_words))
    if "const" in spec or "enum" in spec:
        return ", ".join(f"`{json.dumps(v).strip(chr(34))}`" for v in spec.get("enum", [spec.get("const")]))
    if "type" not in spec:  # a reference, or the variants of a union
        return "block"
    match spec["type"]:
        case "array":
            item, comma, rest = _describe(spec["items"]).partition(",")
            return f"list of {item}{comma}{rest}" if item.startswith("`") else f"list of {item}s{comma}{rest}"
        case "object":
            return "blocks by name" if spec.get("additionalProperties", {}).get("type") != "string" else "texts by name"
        case "string":
            return "path" if spec.get("format") == "path" else "text"
        case "boolean":
            return "`true`, `false`"
        case "null":
            return "null"
    words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    bounds = [f"{words[bound]} {spec[bound]:g}" for bound in words if bound in spec]
    return ", ".join(["whole number" if spec["type"] == "integer" else "number", *bounds])


def document() -> str:
    """The tables of config/README.md: every key of every block with its type, default and meaning."""
    lines = []
    for path, variant, model in _BLOCKS:
        properties = model.model_json_schema()["properties"]
        title = f"`{path}`" if path else "Top level"
        heading = f"### {title} with `{variant}`" if variant else f"### {title}"
        lines += [heading, "", inspect.cleandoc(model.__doc__ or ""), ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        tag = variant.partition(":")[0]
        # The key that tells variants apart comes first; then those of the block itself, then the shared ones.
        order = sorted(model.model_fields, key=lambda n: (n != tag, n not in model.__annotations__))
        for name in order:
            field = model.model_fields[name]
            if field.is_required():
                default = "required"
            elif isinstance(field.default, BaseModel) or field.default == PREFERENCE_PROBES:
                default = "its block's own"
            elif field.default == PALMETTO:
                default = "a sentence about Palmetto"
            else:
                default = f"`{json.dumps(field.default)}`"
            meaning = "chooses this block" if name == tag else field.description
            lines.append(f"| `{name}` | {_describe(properties[name])} | {default} | {meaning} |")
        lines.append("")
    return "\n".join(lines)
