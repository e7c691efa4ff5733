"""`policies.<name>` with `method: ppo`."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from tunetrail.config.fields import (
    Block,
    Checkpoints,
    Count,
    Flag,
    Fraction,
    Name,
    NonNegative,
    Positive,
    Text,
    no_flags,
)
from tunetrail.config.scorers import Weight
from tunetrail.config.training import Training

REWARD_MODEL = "reward_model"
"""The name of the run's own reward model in `reward`."""


class Vllm(Block):
    """vLLM samples the episodes, through TRL. Needs GPUs, and has never been run; resuming is then not exact to the
    byte."""

    server: Text | None = Field(
        default=None, description="URL of a running `vllm serve`; null: vLLM shares the GPUs that train"
    )
    gpu_memory: Annotated[float, Field(gt=0, lt=1), no_flags] = Field(
        default=0.3, description="share of a GPU's memory that vLLM takes if it shares the GPUs"
    )


class PpoConfig(Training):
    """Proximal policy optimisation (Schulman et al. 2017; Ziegler et al. 2019; Ouyang et al. 2022)."""

    more_steps: ClassVar[str] = "raise steps or epochs, lower minibatch_size, or add data"
    method: Literal["ppo"]
    learning_rate: Positive = Field(default=1e-5, description="of the policy; about 10 times more with LoRA")
    critic_learning_rate: Positive | None = Field(default=None, description="of the critic; null: learning_rate")
    advantage: Literal["gae", "rloo", "grpo"] = Field(
        default="gae",
        description="gae: PPO with a critic. rloo (Ahmadian et al. 2024), grpo (Shao et al. 2024): no critic; "
        "episodes of the same prompt are compared with each other",
    )
    critic: Literal["separate", "shared"] = Field(
        default="separate",
        description="a separate model that starts from the reward model, or a value head on the policy, which takes "
        "less memory",
    )
    batch_size: Count = Field(default=64, description="episodes (a prompt and its response) per iteration")
    minibatch_size: Count | None = Field(
        default=None, description="episodes per optimizer step, a divisor of batch_size; null: batch_size"
    )
    completions_per_prompt: Count = Field(
        default=1, description="episodes per prompt in a batch, which share its prefill; a divisor of batch_size"
    )
    steps: Count = Field(description="iterations of rollout and update; raise it if the reward still rises at the end")
    checkpoints: Checkpoints = 0
    schedule: Literal["constant", "linear"] = Field(
        default="constant", description="of the learning rates; linear: down to 0 over all steps"
    )
    epochs: Count = Field(default=4, description="passes over each batch of episodes")
    max_new_tokens: Count = Field(default=64, description="tokens; longer responses are cut off")
    temperature: Positive = Field(default=1.0, description="of sampling, and of every log-prob")
    vllm: Vllm | None = Field(default=None, description="vLLM samples the episodes; null: our own decoder does")
    sharded: Flag = Field(
        default=False,
        description="shard weights, gradients and optimizer state over the processes of the stage (FSDP), for "
        "models that do not fit on one GPU",
    )
    kl_coef: NonNegative = Field(
        default=0.05,
        description="score per nat (with grpo: deviations of a prompt's scores); weight of the per-token KL penalty. "
        "Raise it if text degenerates",
    )
    kl_target: Positive | None = Field(
        default=None, description="nats per episode; adapts kl_coef (Ziegler et al. 2019); null: fixed"
    )
    kl_horizon: Positive = Field(default=10000, description="episodes over which kl_coef adapts to kl_target")
    stop_kl: Positive | None = Field(
        default=None, description="nats per token; a minibatch that has moved further ends the update; null: no limit"
    )
    ptx_coef: NonNegative = Field(
        default=0.0,
        description="weight of the loss on as many demonstrations of the sft split as a minibatch has episodes "
        "(PPO-ptx, Ouyang et al. 2022)",
    )
    entropy_coef: NonNegative = Field(default=0.0, description="score per nat; a bonus for entropy")
    gamma: Fraction = Field(default=1.0, description="discount per token")
    lam: Fraction = Field(default=0.95, description="lambda of generalised advantage estimation")
    clip_range: Positive = Field(default=0.2, description="of the ratio of new to old probability, around 1")
    value_clip_range: Positive = Field(
        default=0.2, description="units of the score; how far an update may move a value"
    )
    value_coef: NonNegative = Field(default=0.1, description="weight of the value loss")
    whiten_rewards: Flag = Field(default=False, description="scale rewards to variance 1, keeping their mean")
    missing_eos_score: Annotated[float, no_flags] | None = Field(
        default=-1.0,
        description="score of a response cut off at max_new_tokens; null: its own. Must be given if "
        "scorers may give complete responses less than the default",
    )
    missing_eos_penalty: NonNegative = Field(
        default=0.0, description="units of the score, subtracted from cut-off responses; with missing_eos_score: null"
    )
    length_penalty: NonNegative = Field(default=0.0, description="units of the score, subtracted for each token")
    normalize_scores: Flag = Field(
        default=False,
        description="normalise the scores of an iteration to mean 0 and deviation 1, before clipping and penalties",
    )
    score_clip: Positive | None = Field(
        default=None, description="clip scores to this size on both sides, before penalties; null: do not clip"
    )
    reward: Annotated[dict[Name, Weight], Field(min_length=1)] = Field(
        default={REWARD_MODEL: 1.0},
        description="name: weight of what to learn from; `reward_model` is the run's own, all others are scorers. "
        "With only scorers, a run needs neither comparisons nor a reward model",
    )
    gold: Name | None = Field(
        default="chrf",
        description="scorer that is logged to detect over-optimisation and never trained on; null: none. A scorer that "
        "needs reference answers is left out if the rl split has none",
    )

    @property
    def scorer_keys(self) -> dict[str, str]:
        """Key -> the name of the scorer that it gives."""
        terms = {f"reward.{name}": name for name in self.reward if name != REWARD_MODEL}
        return terms | ({"gold": self.gold} if self.gold else {})

    @property
    def has_separate_critic(self) -> bool:
        return self.advantage == "gae" and self.critic == "separate"

    @property
    def uses_reward_model(self) -> bool:
        return REWARD_MODEL in self.reward

    @property
    def optimizer_steps(self) -> int:
        """Steps of all iterations together, if `stop_kl` ends none of them early."""
        return self.steps * self.epochs * (self.batch_size // (self.minibatch_size or self.batch_size))

    @property
    def prompts_per_batch(self) -> int:
        return self.batch_size // self.completions_per_prompt

    @model_validator(mode="after")
    def _sizes_divide(self):
        minibatch = self.minibatch_size or self.batch_size
        if self.batch_size % minibatch:
            raise ValueError(f"batch_size ({self.batch_size}) must be a multiple of minibatch_size ({minibatch})")
        if self.batch_size % self.completions_per_prompt:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of completions_per_prompt "
                f"({self.completions_per_prompt})"
            )
        if self.micro_batch_size and minibatch % self.micro_batch_size:
            raise ValueError(
                f"minibatch_size ({minibatch}) must be a multiple of micro_batch_size ({self.micro_batch_size})"
            )
        return self

    @model_validator(mode="after")
    def _parts_fit(self):
        if self.advantage != "gae" and self.completions_per_prompt == 1:
            raise ValueError(
                f"advantage {self.advantage} compares episodes of a prompt: set completions_per_prompt to 2 or more"
            )
        if self.missing_eos_penalty and self.missing_eos_score is not None:
            raise ValueError("missing_eos_penalty has no effect with missing_eos_score; set missing_eos_score to null")
        return self
