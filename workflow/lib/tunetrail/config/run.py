"""The whole config of a run, and the checks that its blocks are consistent."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from tunetrail.config.base_model import BaseModelConfig
from tunetrail.config.best_of_n import BestOfNConfig
from tunetrail.config.comparisons import ComparisonsConfig, CompletionsConfig
from tunetrail.config.data import DataConfig, TopicsSource
from tunetrail.config.dpo import DpoConfig, FromPairs, Offline
from tunetrail.config.evaluation import (
    EvaluationConfig,
    HeadToHeadConfig,
    LmEvalConfig,
    ReportConfig,
    RetentionConfig,
)
from tunetrail.config.fields import Block, Name, NonNegativeInt
from tunetrail.config.kto import KtoConfig
from tunetrail.config.methods import MethodsConfig
from tunetrail.config.ppo import REWARD_MODEL, PpoConfig
from tunetrail.config.reference_free import OrpoConfig, SimpoConfig
from tunetrail.config.scorers import ScorerConfig, known, problems_of_sums, unknown, weighted_range
from tunetrail.config.shares import share_of, shares
from tunetrail.config.training import RewardBlock, RewardConfig, SftBlock, SftConfig

PolicyConfig = Annotated[
    PpoConfig | DpoConfig | OrpoConfig | SimpoConfig | KtoConfig | BestOfNConfig, Field(discriminator="method")
]

RESERVED = (
    *("base", "comparisons", "completions", "config", "data", "evaluation", "head_to_head", "ledger.jsonl", "lm_eval"),
    *("manifest.json", "methods", "metrics.json", "policies", "provenance.dsse.json", "provenance.json", "report"),
    *("retention", "reward", "sft", "tasks"),
)
"""What else has a name in a run's folder, or in an artifact's: no policy may have it too."""


class Config(Block):
    """A run. Only `run`, `base` and `data` must be given."""

    run: Name = Field(
        description="names the run and its folder `results/<run>/`; change it to keep the results of an earlier run"
    )
    seed: NonNegativeInt = Field(default=0, description="seed of everything random: splits, order, sampling, labelers")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="bf16: autocast over fp32 weights; auto: bf16 if the hardware supports it"
    )
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(
        default=["tensorboard"],
        description="where to watch training while it runs; nothing is read back, and changing it retrains nothing. "
        "All but the first need their packages installed",
    )
    base: BaseModelConfig = Field(description="the model to start from")
    data: DataConfig = Field(description="what to learn from")
    sft: SftBlock | None = Field(
        default=None,
        description="fine-tuning on demonstrations, or a model that was fine-tuned elsewhere; null: start from the "
        "base model",
    )
    completions: CompletionsConfig | None = Field(
        default=None, description="sampling of K responses per prompt; null: comparisons come with the data"
    )
    comparisons: ComparisonsConfig | None = Field(
        default=None, description="who ranks what was sampled; goes with completions"
    )
    scorers: dict[Name, ScorerConfig] = Field(
        default={},
        description="name: block; scorers for labelers, policies and the evaluation. `chrf`, `exact`, "
        "`guideline` and `length` are built in",
    )
    reward: RewardBlock | None = Field(
        default=None,
        description="the reward model, for ppo and best_of_n, trained here or imported; null: none",
    )
    policies: dict[Name, PolicyConfig] = Field(
        default={}, description="name: block, as many as you like; a list instead of a single value is a sweep"
    )
    retention: RetentionConfig | None = Field(
        default=RetentionConfig(), description="unrelated text, to measure forgetting; null: not measured"
    )
    methods: MethodsConfig | None = Field(
        default=None, description="methods of fine-tuning the base model, compared on the sft split; null: none"
    )
    evaluation: EvaluationConfig = Field(
        default=EvaluationConfig(), description="evaluation of base, sft and every policy"
    )
    head_to_head: HeadToHeadConfig = Field(
        default=HeadToHeadConfig(), description="comparison of every model with every other"
    )
    lm_eval: LmEvalConfig | None = Field(
        default=None, description="tasks of the evaluation harness on every model; null: none"
    )
    report: ReportConfig = Field(default=ReportConfig(), description="the page about the run")

    @field_validator("policies")
    @classmethod
    def _names_are_free(cls, policies):
        if taken := sorted(set(policies) & set(RESERVED)):
            raise ValueError(f"'{taken[0]}' names something else in a run; choose another name for the policy")
        return policies

    @field_validator("scorers")
    @classmethod
    def _no_scorer_is_the_reward_model(cls, scorers):
        if REWARD_MODEL in scorers:
            raise ValueError(f"'{REWARD_MODEL}' names the run's own reward model; choose another name for the scorer")
        return scorers

    @model_validator(mode="after")
    def _stages_fit(self):
        problems = [problem for check in CHECKS for problem in check(self)]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def shares(self) -> dict[str, dict[str, float]]:
        """Kind of row -> split -> share of that kind's groups, see `config.shares`."""
        return shares(self)

    @property
    def trained_sft(self) -> SftConfig | None:
        """None if there is none, or it is imported."""
        return self.sft if isinstance(self.sft, SftConfig) else None

    @property
    def trained_reward(self) -> RewardConfig | None:
        """None if there is none, or it is imported."""
        return self.reward if isinstance(self.reward, RewardConfig) else None

    def files(self) -> dict[str, Path]:
        """Every path the config names, by key."""
        paths: dict[str, Path] = {}

        def walk(value: Any, key: str) -> None:
            if isinstance(value, Path):
                paths[key] = value
            elif isinstance(value, BaseModel):
                for name in type(value).model_fields:
                    walk(getattr(value, name), f"{key}.{name}" if key else name)
            elif isinstance(value, list):
                for i, item in enumerate(value):
                    walk(item, f"{key}[{i}]")
            elif isinstance(value, dict):
                for name, item in value.items():
                    walk(item, f"{key}.{name}")

        walk(self, "")
        return paths


# Each check yields a line per mistake.


def _has_comparisons(config: Config) -> bool:
    # A comparisons block without completions is a separate mistake, which other stages need not repeat.
    # it.
    return config.completions is not None or config.comparisons is not None or bool(config.data.preferences)


def _data_problems(config: Config) -> Iterator[str]:
    data = config.data
    if config.methods is not None and config.retention is None:
        yield "methods: needs retention, the unrelated text that a method may forget"
    if config.trained_sft and not data.demonstrations and not (data.preferences and data.sft_on_chosen):
        yield (
            "sft: needs data.demonstrations; set sft to null to start from the base model, or data.sft_on_chosen to "
            "true to train on the best responses of data.preferences"
        )
    if data.sft_on_chosen and not (data.preferences and config.trained_sft):
        yield "data.sft_on_chosen: needs data.preferences and an sft that is trained here; give them or remove the key"
    for kind, what in (("prompts", "prompts without answers"), ("feedback", "responses that may be bad")):
        for i, source in enumerate(getattr(data, kind)):
            if source.split == "sft":
                yield f"data.{kind}[{i}].split: {what} are of no use in sft; choose another split"
    for i, source in enumerate(data.prompts):
        if source.weight != 1 and config.completions is None:
            yield f"data.prompts[{i}].weight: has no effect, since nothing is trained on prompts alone; remove it"
    is_text = [isinstance(source, TopicsSource) for source in data.demonstrations]
    if len(is_text) == len(data.sources) and all(is_text):
        yield "data.demonstrations: topics is raw text; add a source of prompts, which evaluation needs"


def _comparison_problems(config: Config) -> Iterator[str]:
    data = config.data
    if config.completions is not None:
        if not data.demonstrations and not data.prompts:
            yield "completions: needs prompts from data.demonstrations or data.prompts"
        if config.comparisons is None:
            yield "comparisons: needed, to rank what completions samples"
    elif config.comparisons is not None:
        yield "comparisons: needs completions to rank; comparisons read from a file go under data.preferences"
    if config.trained_reward and not _has_comparisons(config):
        yield (
            "reward: needs comparisons: give completions and comparisons, or data.preferences; or import a reward "
            "model (path or repo)"
        )


def _needs(config: Config) -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    """(key to name in a message, split, kinds of rows, why the run cannot do without such rows in it)."""
    data = config.data
    if config.trained_sft and data.demonstrations:
        yield "data.shares.sft", "sft", ("demonstrations", "text"), "is 0, but sft is to be trained"
    if config.methods is not None:
        why = "is 0, but methods are to be compared on that split"
        yield "data.shares.sft", "sft", ("demonstrations", "text"), why
    compared: tuple[str, ...] = ("preferences",) if data.preferences else ()
    if config.completions:
        why = "is 0, but comparisons are to be collected from that split"
        yield "data.shares.reward", "reward", ("demonstrations", "prompts"), why
        compared += ("demonstrations", "prompts")
    elif data.preferences and (
        config.trained_reward or any(isinstance(policy, FromPairs) for policy in config.policies.values())
    ):
        yield "data.shares.reward", "reward", compared, "is 0, but comparisons are to be trained on"
    if data.feedback and any(policy.method == "kto" for policy in config.policies.values()):
        yield "data.shares.reward", "reward", ("feedback",), "is 0, but feedback is to be trained on"
    prompted = ("preferences", "feedback", "demonstrations", "prompts")
    why = "is 0, but every run is evaluated; give it a share"
    yield "data.shares.evaluation", "evaluation", prompted, why
    if config.trained_reward and compared:
        yield "data.shares.heldout", "heldout", compared, "is 0, but the reward model is tested on that split"
    why = "is 0, but {}.evaluate_every measures on that split"
    if config.trained_sft and config.trained_sft.evaluate_every:
        yield "data.shares.heldout", "heldout", ("demonstrations", "text"), why.format("sft")
    for name, policy in config.policies.items():
        if isinstance(policy, Offline) and policy.evaluate_every:
            kinds = compared if isinstance(policy, FromPairs) else ("feedback",)
            yield "data.shares.heldout", "heldout", kinds, why.format(f"policies.{name}")
        if policy.method == "ppo":
            yield f"policies.{name}", "rl", prompted, "ppo needs prompts, but data.shares.rl is 0"
        if policy.method == "ppo" and policy.ptx_coef and not (data.preferences and data.sft_on_chosen):
            why = "ptx_coef needs demonstrations, but data.shares.sft is 0"
            yield f"policies.{name}", "sft", ("demonstrations",), why


def _share_problems(config: Config) -> Iterator[str]:
    for key, split, kinds, why in _needs(config):
        given = [share_of(config, kind, split) for kind in kinds if config.data.pins(kind)]
        if any(given) or not given:  # a missing source is a separate mistake
            continue
        if any(share is not None for share in given):
            yield f"{key}: {why}"
        else:
            yield (
                f"data: every source is pinned to another split, but the run needs rows in {split}; pin a source to it "
                "(split) or leave one unpinned"
            )


def _policy_problems(config: Config) -> Iterator[str]:
    for name, policy in config.policies.items():
        if getattr(policy, "start", None) == "sft" and config.sft is None:
            yield f"policies.{name}.start: no sft model is trained; add an sft block or start from base"
        if isinstance(policy, FromPairs) and not _has_comparisons(config):
            yield (
                f"policies.{name}: {policy.method} needs comparisons: give completions and comparisons, or "
                "data.preferences"
            )
        if policy.method == "kto" and not config.data.feedback:
            yield f"policies.{name}: kto needs data.feedback: responses that were liked or disliked"
        if policy.method == "best_of_n" and config.reward is None:
            yield f"policies.{name}: best_of_n needs a reward model: add a reward block"
        if policy.method == "ppo" and policy.uses_reward_model and config.reward is None:
            yield f"policies.{name}: ppo needs a reward model: add a reward block, or name scorers under its reward"


def _limit_problems(config: Config) -> Iterator[str]:
    limits = config.data.limits
    for name, policy in config.policies.items():
        if policy.method == "ppo" and limits.rl is not None and limits.rl < policy.prompts_per_batch:
            yield (
                f"data.limits.rl: {limits.rl} rows are fewer than one batch "
                f"(policies.{name}.batch_size: {policy.batch_size})"
            )
    for key, block, limit in (
        ("sft", config.trained_sft, limits.sft),
        ("reward", config.trained_reward, limits.reward),
    ):
        if block is not None and limit is not None and limit < block.batch_size:
            yield f"data.limits.{key}: {limit} rows are fewer than one batch ({key}.batch_size: {block.batch_size})"


def _scorer_problems(config: Config) -> Iterator[str]:
    problems = [*problems_of_sums(config.scorers), *_unknown_scorers(config)]
    yield from problems or _cut_off_problems(config)


def _unknown_scorers(config: Config) -> Iterator[str]:
    blocks: dict[str, Any] = {"comparisons": config.comparisons, "evaluation": config.evaluation}
    blocks |= {f"policies.{name}": policy for name, policy in config.policies.items()}
    scorers = known(config.scorers)
    for block, value in blocks.items():
        for key, name in getattr(value, "scorer_keys", {}).items():
            if name not in scorers:
                yield f"{block}.{key}: {unknown(name, scorers)}"


def _least_score(policy: PpoConfig, config: Config) -> float:
    """The lowest score that scorers and an imported reward model may give a complete response in PPO; infinite
    if there are none: the scores of a reward model trained here are around 0."""
    of = {name: weight for name, weight in policy.reward.items() if name != REWARD_MODEL}
    is_imported = policy.uses_reward_model and config.reward is not config.trained_reward
    if not of and not is_imported:
        return math.inf
    low = -math.inf if policy.normalize_scores or is_imported else weighted_range(of, known(config.scorers))[0]
    low = max(low, -policy.score_clip) if policy.score_clip else low
    return low - policy.length_penalty * policy.max_new_tokens


def _cut_off_problems(config: Config) -> Iterator[str]:
    """The default score of a cut-off response is meant for reward models: scorers may give complete responses less."""
    for name, policy in config.policies.items():
        if policy.method != "ppo" or "missing_eos_score" in policy.model_fields_set:
            continue
        default, low = policy.missing_eos_score, _least_score(policy, config)
        if default is not None and low < default:
            least = "any number" if math.isinf(low) else f"{low:g}"
            yield (
                f"policies.{name}.missing_eos_score: its default ({default:g}) could reward a response for being cut "
                f"off, since its reward gives whole ones {least} and more: set it below what whole responses get, or "
                "to null with a missing_eos_penalty"
            )


CHECKS = (
    _data_problems,
    _comparison_problems,
    _share_problems,
    _policy_problems,
    _limit_problems,
    _scorer_problems,
)
