"""The whole config of a run, and how its blocks must fit together."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from tunetrail.config.base_model import BaseModelConfig
from tunetrail.config.best_of_n import BestOfNConfig
from tunetrail.config.comparisons import ComparisonsConfig, CompletionsConfig
from tunetrail.config.data import DataConfig, TopicsSource
from tunetrail.config.dpo import DpoConfig
from tunetrail.config.evaluation import (
    EvaluationConfig,
    HeadToHeadConfig,
    LmEvalConfig,
    ReportConfig,
    RetentionConfig,
)
from tunetrail.config.fields import Block, Name, NonNegativeInt
from tunetrail.config.ppo import PpoConfig
from tunetrail.config.training import RewardConfig, SftConfig

PolicyConfig = Annotated[PpoConfig | DpoConfig | BestOfNConfig, Field(discriminator="method")]


class Config(Block):
    """A run. Only `run`, `base` and `data` must be given."""

    run: Name = Field(
        description="names the run and its folder `results/<run>/`; change it to keep another run's results"
    )
    seed: NonNegativeInt = Field(default=0, description="of everything random: splits, order, sampling, labelers")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="bf16: autocast over fp32 weights; auto: where the hardware has it"
    )
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(
        default=["tensorboard"],
        description="where to watch training while it goes on; nothing is read back, and changing it trains nothing "
        "again. All but the first are packages to install",
    )
    base: BaseModelConfig = Field(description="the model to start from")
    data: DataConfig = Field(description="what to learn from")
    sft: SftConfig | None = Field(
        default=None, description="fine-tuning on demonstrations; null: start from the base model"
    )
    completions: CompletionsConfig | None = Field(
        default=None, description="sampling of K responses a prompt; null: comparisons come with the data"
    )
    comparisons: ComparisonsConfig | None = Field(
        default=None, description="who ranks what was sampled; goes with completions"
    )
    reward: RewardConfig | None = Field(default=None, description="the reward model, for ppo and best_of_n; null: none")
    policies: dict[Name, PolicyConfig] = Field(
        default={}, description="name: block, as many as you like; a list where one value is due is a sweep"
    )
    retention: RetentionConfig | None = Field(
        default=RetentionConfig(), description="unrelated text that must not be forgotten; null: not measured"
    )
    evaluation: EvaluationConfig = Field(default=EvaluationConfig(), description="of base, sft and every policy")
    head_to_head: HeadToHeadConfig = Field(
        default=HeadToHeadConfig(), description="every model against every other, where all evaluations meet"
    )
    lm_eval: LmEvalConfig | None = Field(
        default=None, description="tasks of the evaluation harness on every model; null: none"
    )
    report: ReportConfig = Field(default=ReportConfig(), description="the page about the run")

    @field_validator("policies")
    @classmethod
    def _names_are_free(cls, policies):
        if taken := sorted(set(policies) & {"base", "sft"}):
            raise ValueError(f"'{taken[0]}' names a stage; choose another name for the policy")
        return policies

    @model_validator(mode="after")
    def _stages_fit(self):
        data, problems = self.data, []
        if self.sft is not None and not data.demonstrations:
            problems.append("sft: needs data.demonstrations; set sft to null to start from the base model")
        if self.sft is not None and data.demonstrations and data.shares.sft == 0:
            problems.append("data.shares.sft: is 0, but sft is to be trained")
        if self.completions is not None:
            if not data.demonstrations:
                problems.append("completions: needs prompts from data.demonstrations")
            if self.comparisons is None:
                problems.append("comparisons: needed, to rank what completions samples")
            if data.preferences:
                problems.append("completions: drop it or data.preferences; comparisons come from one of them")
        elif self.comparisons is not None:
            problems.append(
                "comparisons: needs completions to rank; comparisons read from a file go under data.preferences"
            )
        # A lone comparisons block has been told of already; it need not be told of in three places.
        has_comparisons = self.completions is not None or self.comparisons is not None or bool(data.preferences)
        if has_comparisons and data.shares.reward == 0:
            problems.append("data.shares.reward: is 0, but comparisons are to be collected from that split")
        if data.shares.evaluation == 0:
            problems.append("data.shares.evaluation: is 0, but every run is evaluated; give it a share")
        if self.reward is not None and data.shares.heldout == 0:
            problems.append("data.shares.heldout: is 0, but the reward model is tested on that split")
        if (
            not data.preferences
            and data.demonstrations
            and all(isinstance(s, TopicsSource) for s in data.demonstrations)
        ):
            problems.append("data.demonstrations: topics is raw text; add a source of prompts, which evaluation needs")
        if self.reward is not None and not has_comparisons:
            problems.append("reward: needs comparisons: give completions and comparisons, or data.preferences")
        for name, policy in self.policies.items():
            if policy.method == "dpo" and not has_comparisons:
                problems.append(
                    f"policies.{name}: dpo needs comparisons: give completions and comparisons, or data.preferences"
                )
            if policy.method in ("ppo", "best_of_n") and self.reward is None:
                problems.append(f"policies.{name}: {policy.method} needs a reward model: add a reward block")
            if policy.method == "ppo" and data.shares.rl == 0:
                problems.append(f"policies.{name}: ppo needs prompts, but data.shares.rl is 0")
            if policy.method == "ppo" and data.limits.rl is not None and data.limits.rl < policy.prompts_per_batch:
                problems.append(
                    f"data.limits.rl: {data.limits.rl} rows are fewer than one batch "
                    f"(policies.{name}.batch_size: {policy.batch_size})"
                )
            if policy.method == "ppo" and policy.ptx_coef and data.shares.sft == 0:
                problems.append(f"policies.{name}: ptx_coef needs demonstrations, but data.shares.sft is 0")
        for key, block, limit in (("sft", self.sft, data.limits.sft), ("reward", self.reward, data.limits.reward)):
            if block is not None and limit is not None and limit < block.batch_size:
                problems.append(
                    f"data.limits.{key}: {limit} rows are fewer than one batch ({key}.batch_size: {block.batch_size})"
                )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def files(self) -> dict[str, Path]:
        """Every path the config names, by key."""
        found: dict[str, Path] = {}

        def walk(value: Any, key: str) -> None:
            if isinstance(value, Path):
                found[key] = value
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
        return found
