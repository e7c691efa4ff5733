"""The table of stages: everything that other code needs to know about a stage without running it.

Rules, launchers, the report, exports, the audit and the tests of both profiles read it. A new stage is a module
`tunetrail.stages.<name>`, a block in the config, a rule and a line here, all with the same name (but not `count`,
`index` or another method of lists: Snakemake reserves those).

An artifact is named by its folder below `results/<run>/`: `sft`, `policies/ppo`, `evaluation/base`,
`completions/0-of-2`. Importing this module imports no stage.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunetrail.config.base_model import LocalModel
from tunetrail.config.comparisons import LlmJudge
from tunetrail.config.imported import ImportedModel
from tunetrail.config.run import Config
from tunetrail.config.scorers import ScorerConfig, needed
from tunetrail.config.shares import PAIRED
from tunetrail.provenance.manifest import MANIFEST, DigestCache, artifact_around, digest_of, visible_files
from tunetrail.provenance.sampling import sample

Inputs = dict[str, str]
"""Role -> artifact."""
Wildcard = Literal["", "policy", "subject", "shard"]


@dataclass(frozen=True)
class StageInfo:
    """One stage."""

    name: str
    """The name of its module, its rule and, unless `block` is set, its block in the config."""
    inputs: Callable[[Config, str], Inputs]
    """(config, value of the wildcard) -> the artifacts it reads, by role."""
    makes: Literal["model", "data", "measurement", "page"]
    block: str = ""
    wildcard: Wildcard = ""
    """Distinguishes the artifacts of this stage; empty if it has only one."""
    folder: str = ""
    """The folder of its artifacts, if it is not named like the stage."""
    files: tuple[str, ...] = ()
    """Config keys of the user's own files that it reads; a key that ends with a dot stands for all keys below it."""
    also_reads: tuple[str, ...] = ()
    """Keys that it reads in addition to its own block and the seed."""
    runs_model: bool = True
    """Whether it reads `precision`."""
    distributed: bool = False
    """Whether it can run as several processes, one per GPU."""
    gpu: bool = False
    """Whether the Slurm profile gives it a GPU."""

    @property
    def module(self) -> str:
        return f"tunetrail.stages.{self.name}"

    @property
    def family(self) -> str:
        """The folder that contains its artifacts, or is its only artifact."""
        return self.folder or self.name

    @property
    def pattern(self) -> str:
        """The name of its artifacts, with the wildcard in braces.

        >>> STAGES["ppo"].pattern, STAGES["sft"].pattern
        ('policies/{policy}', 'sft')
        """
        return f"{self.family}/{{{self.wildcard}}}" if self.wildcard else self.name

    @property
    def has_config_each(self) -> bool:
        """Whether each of its artifacts has its own config file; shards share one."""
        return self.wildcard in ("policy", "subject")

    @property
    def config_pattern(self) -> str:
        """The name of its resolved config, with the wildcard in braces."""
        return f"{self.family}.{{{self.wildcard}}}" if self.has_config_each else self.name


# ----------------------------------------------------------------------------- who reads what


def start_of(config: Config, subject: str = "") -> str:
    """The model that a policy starts from and is compared with; for other subjects, the default start of policies."""
    own = getattr(config.policies.get(subject), "start", None)
    return own or ("sft" if config.sft else "base")


def subjects(config: Config) -> list[str]:
    """The models that are evaluated."""
    return ["base", *(["sft"] if config.sft else []), *config.policies]


def trained_subjects(config: Config) -> list[str]:
    """The models with their own weights, so without best-of-n."""
    return [
        name for name in subjects(config)
        if name not in config.policies or config.policies[name].method != "best_of_n"
    ]  # fmt: skip


def model_of(subject: str) -> str:
    """The artifact that holds a model."""
    return subject if subject in ("base", "sft") else f"policies/{subject}"


def shards(config: Config) -> list[str]:
    n = config.completions.shards if config.completions else 0
    return [f"{i}-of-{n}" for i in range(n)]


def has_people(config: Config) -> bool:
    """Whether people rank the completions."""
    return config.comparisons is not None and config.comparisons.labeler == "human"


def has_comparisons(config: Config) -> bool:
    return config.completions is not None or bool(config.data.preferences)


def _comparisons(config: Config) -> str:
    """The artifact with the comparisons, which were collected or came with the data."""
    return "comparisons" if config.completions else "data"


def _shards(config: Config) -> Inputs:
    return {f"shard{i}": f"completions/{shard}" for i, shard in enumerate(shards(config))}


def _ranked(config: Config, _: str) -> Inputs:
    tasks = {"tasks": "tasks"} if has_people(config) else {}
    return {"data": "data"} | _shards(config) | tasks


def _scored(config: Config, _: str) -> Inputs:
    """An imported reward model needs no comparisons, but is tested on them if there are any."""
    compared = {"comparisons": _comparisons(config)} if has_comparisons(config) else {}
    return {"policy": start_of(config), "data": "data"} | compared


def _learnt_from(config: Config, policy: str) -> Inputs:
    inputs = {"policy": start_of(config), "data": "data"}
    return inputs | ({"reward": "reward"} if config.policies[policy].uses_reward_model else {})  # type: ignore[union-attr]


def _evaluated(config: Config, subject: str) -> Inputs:
    inputs = {"model": model_of(subject), "data": "data"}
    if subject != start_of(config, subject):
        inputs["sft"] = start_of(config, subject)
    if config.reward:
        inputs["reward"] = "reward"
    if config.retention:
        inputs["retention"] = "retention"
    if has_comparisons(config):
        inputs["comparisons"] = _comparisons(config)
    return inputs


def _evaluations(config: Config, _: str = "") -> Inputs:
    """Sorted, so that the order of policies in the config changes nothing."""
    return {f"evaluation.{subject}": f"evaluation/{subject}" for subject in sorted(subjects(config))}


def _reported(config: Config, _: str) -> Inputs:
    single = [name for name in enabled(config) if STAGES[name].wildcard == "" and name != "report"]
    inputs = {name: name for name in single if name != "head_to_head"}
    inputs |= {f"policy.{name}": f"policies/{name}" for name in config.policies}
    inputs |= {f"evaluation.{name}": f"evaluation/{name}" for name in subjects(config)}
    inputs |= {"head_to_head": "head_to_head"}
    if config.lm_eval:
        inputs |= {f"lm_eval.{name}": f"lm_eval/{name}" for name in trained_subjects(config)}
    return inputs


_TABLE = (
    StageInfo("base", lambda c, _: {}, "model", files=("base.path",), runs_model=False),
    StageInfo("data", lambda c, _: {"base": "base"}, "data", files=("data.",), also_reads=("shares",),
        runs_model=False),
    StageInfo("retention", lambda c, _: {"base": "base"}, "data", files=("retention.path",), gpu=True),
    StageInfo("sft", lambda c, _: {"base": "base", "data": "data"}, "model", distributed=True, gpu=True),
    StageInfo(
        "completions", lambda c, _: {"model": start_of(c), "data": "data"}, "data", wildcard="shard", gpu=True,
    ),
    StageInfo("tasks", lambda c, _: _shards(c), "data", block="comparisons", files=("comparisons.gold",),
        runs_model=False),
    StageInfo("comparisons", _ranked, "data", files=("comparisons.path",)),
    StageInfo(
        "reward", _scored, "model",
        distributed=True, gpu=True,
    ),
    *(
        StageInfo(
            name, lambda c, policy: {"policy": start_of(c, policy), "comparisons": _comparisons(c)}, "model",
            block="policies", wildcard="policy", folder="policies", distributed=True, gpu=True,
        ) for name in PAIRED
    ),
    StageInfo(
        "kto", lambda c, policy: {"policy": start_of(c, policy), "data": "data"}, "model",
        block="policies", wildcard="policy", folder="policies", distributed=True, gpu=True,
    ),
    StageInfo(
        "ppo", _learnt_from, "model",
        block="policies", wildcard="policy", folder="policies", distributed=True, gpu=True,
    ),
    StageInfo(
        "best_of_n", lambda c, _: {"policy": start_of(c), "reward": "reward"}, "model",
        block="policies", wildcard="policy", folder="policies",
    ),
    StageInfo(
        "methods", lambda c, _: {"base": "base", "data": "data", "retention": "retention"}, "measurement", gpu=True,
    ),
    StageInfo("evaluation", _evaluated, "measurement", wildcard="subject", also_reads=("data.chat", "data.system"),
        gpu=True),
    StageInfo("head_to_head", _evaluations, "measurement", also_reads=("evaluation.bootstrap",)),
    StageInfo("lm_eval", lambda c, subject: {"model": model_of(subject)}, "measurement", wildcard="subject", gpu=True),
    StageInfo("report", _reported, "page", runs_model=False),
)  # fmt: skip
STAGES: Mapping[str, StageInfo] = {stage.name: stage for stage in _TABLE}
"""All stages by name, upstream first."""


# ----------------------------------------------------------------------------- questions


def start(name: str, run: Callable[..., dict]) -> int:
    """Runs a stage's command: `run` under the contract. Returns the exit code."""
    from tunetrail.contract.runner import main

    return main(run, distributed=STAGES[name].distributed)


def enabled(config: Config) -> list[str]:
    """The stages that a run has, upstream first."""
    methods = {policy.method for policy in config.policies.values()}

    def has(stage: StageInfo) -> bool:
        if stage.wildcard == "policy":
            return stage.name in methods
        if stage.name == "tasks":
            return has_people(config)
        return getattr(config, stage.block or stage.name) is not None

    return [name for name, stage in STAGES.items() if has(stage)]


def family_of(artifact: str) -> StageInfo | None:
    """A stage that makes artifacts in this folder (any method for `policies/x`), or None.

    >>> family_of("evaluation/base").name
    'evaluation'
    """
    family, _, value = artifact.partition("/")
    return next((s for s in _TABLE if s.family == family and bool(s.wildcard) == bool(value)), None)


def stage_of(config: Config, artifact: str) -> StageInfo:
    """The stage that makes an artifact of this run. Raises LookupError if none does."""
    family, _, value = artifact.partition("/")
    if family == "policies":
        return STAGES[config.policies[value].method]
    if (stage := family_of(artifact)) is None:
        raise LookupError(f"{artifact}: no stage makes this")
    return stage


def config_name(artifact: str) -> str | None:
    """The name of an artifact's resolved config file, without `.json`; None if no stage makes such an artifact.

    >>> config_name("policies/ppo"), config_name("completions/0-of-2"), config_name("lm_eval/sft")
    ('policies.ppo', 'completions', 'lm_eval.sft')
    """
    stage = family_of(artifact)
    value = artifact.partition("/")[2]
    return stage.config_pattern.replace(f"{{{stage.wildcard}}}", value) if stage else None


def role_of(artifact: str) -> str:
    """The role of an artifact among the report's inputs.

    >>> role_of("policies/ppo"), role_of("evaluation/base"), role_of("sft")
    ('policy.ppo', 'evaluation.base', 'sft')
    """
    return artifact.replace("policies/", "policy/").replace("/", ".")


def artifacts_of_others(config: Config, stage: str) -> dict[str, Path]:
    """Role -> manifest of the artifacts of other runs that a stage reads: imported models."""
    block = getattr(config, stage, None)
    folder = block.path if isinstance(block, LocalModel | ImportedModel) else None
    artifact = artifact_around(folder) if folder else None
    return {"model": artifact / MANIFEST} if artifact else {}


def own_files(config: Config, stage: str) -> list[Path]:
    """The user's files that a stage reads, for its rule to depend on."""
    if stage == "lm_eval":
        return config.lm_eval.own_files() if config.lm_eval else []
    if stage == "base" and isinstance(config.base, LocalModel):
        return [] if artifacts_of_others(config, stage) else visible_files(config.base.path)
    keys = STAGES[stage].files
    named = {
        key: path for key, path in config.files().items()
        if any(key == k or (k.endswith(".") and key.startswith(k)) for k in keys)
    }  # fmt: skip
    return [path for path in named.values() if not path.is_dir()]


def _scorer(scorer: ScorerConfig, digests: DigestCache) -> dict[str, Any]:
    """A scorer's definition with the digest of the user's file or folder, so that an edit reruns what uses it."""
    definition = scorer.model_dump(mode="json")
    if path := getattr(scorer, "path", None):
        definition["sha256"] = digest_of(path, digests)
    return definition


def stage_config(config: Config, name: str, digests: Path | None = None) -> dict[str, Any]:
    """The resolved config of one stage as JSON-able values: its own block and the few shared keys that it reads.

    Args:
        name: of the resolved config: `base`, `data`, …; `policies.<name>`, `evaluation.<subject>`, `lm_eval.<subject>`.
        digests: the cache with digests of the user's files and folders; None: every byte is read.
    """
    family, _, value = name.partition(".")
    block: Any = config.policies[value] if family == "policies" else getattr(config, STAGES[family].block or family)
    stage = STAGES[block.method if family == "policies" else family]
    # Tasks depend only on the gold tasks of the comparisons block; data depends on the resolved shares (`also_reads`).
    include = {"gold"} if stage.name == "tasks" else None
    exclude = {"shares"} if stage.name == "data" else None
    resolved: dict[str, Any] = {
        "stage": stage.name,
        "seed": config.seed,
        "config": block.model_dump(mode="json", include=include, exclude=exclude),
    }
    if stage.runs_model:
        resolved["precision"] = config.precision
    if stage.name == "lm_eval":
        resolved["subject"] = value
    if stage.name == "evaluation":
        method = config.policies[value].method if value in config.policies else value
        resolved["subject"] = {"name": value, "method": method}
        if (start := start_of(config, value)) != start_of(config):
            resolved["subject"]["start"] = start
    cache = DigestCache(digests)
    if isinstance(block, LocalModel) and block.path.is_dir():
        resolved["folder_content"] = sample(block.path)
    if isinstance(block, ImportedModel) and block.path:
        resolved["sha256"] = digest_of(block.path, cache)
    judge = getattr(block, "judge", block)
    if isinstance(judge, LlmJudge) and judge.path and judge.path.is_dir():
        resolved["judge_sha256"] = digest_of(judge.path, cache)
    if names := set(getattr(block, "scorer_keys", {}).values()):
        resolved["scorers"] = {name: _scorer(scorer, cache) for name, scorer in needed(names, config.scorers).items()}
    for key in stage.also_reads:
        value_of_key: Any = config
        for part in key.split("."):
            value_of_key = getattr(value_of_key, part)
        resolved[key] = value_of_key
    return resolved
