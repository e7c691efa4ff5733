"""`sft`, `reward`, and the settings that all trained stages share."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from tunetrail.config.fields import (
    Block,
    Count,
    Flag,
    NonNegative,
    OpenFraction,
    Positive,
    Text,
    module_names,
)
from tunetrail.config.imported import ImportedModel, trained_or_imported


class Lora(Block):
    """A low-rank adapter (Hu et al. 2021) with PEFT: less memory in training and small checkpoints. Needs about 10
    times the learning rate. `model/` gets full weights with the adapter merged in, `adapter/` the adapter alone.
    """

    r: Count = Field(default=16, description="rank; raise it if the adapter cannot learn enough")
    alpha: Positive = Field(default=32.0, description="scale; the update is multiplied by alpha / r")
    target_modules: Annotated[Text | Annotated[list[Text], Field(min_length=1)], BeforeValidator(module_names)] = Field(
        default="all-linear", description="names of the linear layers that get an adapter, such as `[q_proj, v_proj]`"
    )


def _auto_or_flag(value: Any) -> Any:
    if value != "auto" and not isinstance(value, bool):
        raise ValueError(f"must be auto, true or false, got {value!r}")
    return value


FEWEST_STEPS = 10
"""A stage with fewer optimizer steps hardly learns. Adam averages gradients over about 1 / (1 - 0.9) = 10 steps, and
a step moves no weight further than about the learning rate: before the tenth, little has moved, and only the first
batches determine where to."""


class Training(Block):
    """Shared by all trained stages."""

    more_steps: ClassVar[str]
    """How the user can make it take more optimizer steps."""

    lora: Lora | None = Field(default=None, description="train a LoRA adapter; null: train all weights")
    learning_rate: Positive = Field(description="peak learning rate; lower it if the loss is unstable")
    batch_size: Count = Field(default=16, description="rows per optimizer step")
    micro_batch_size: Count | None = Field(
        default=None, description="rows per forward pass, a divisor of the batch; lower it if memory runs out"
    )
    gradient_checkpointing: Annotated[Literal["auto", True, False], BeforeValidator(_auto_or_flag)] = Field(
        default="auto",
        description="true: keep only each layer's input and recompute the rest in the backward pass, for a third more "
        "time and a fraction of the memory; auto: only if the training would not fit. Results are the same",
    )
    max_grad_norm: Positive = Field(default=1.0, description="gradients are clipped to this L2 norm")

    @model_validator(mode="after")
    def _micro_divides(self):
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of micro_batch_size ({self.micro_batch_size})"
            )
        return self


class Epochs(Training):
    """Training over a fixed data set."""

    more_steps: ClassVar[str] = "raise epochs, lower batch_size, or add data"

    epochs: Count = Field(default=1, description="passes over the data")
    warmup: OpenFraction = Field(default=0.05, description="share of the steps over which the learning rate rises")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="shape of the learning rate after the warm-up"
    )
    weight_decay: NonNegative = Field(default=0.0, description="of AdamW, per unit of learning rate")
    max_length: Count = Field(
        default=1024,
        description="the most tokens of prompt and response; longer rows are an error, raw text is cut into blocks",
    )
    four_bit: Flag = Field(
        default=False,
        description="with lora: hold the frozen weights in 4 bits while training (QLoRA, Dettmers et al. 2023), and "
        "the reference too; needs bitsandbytes",
    )

    evaluate_every: Count | None = Field(
        default=None,
        description="optimizer steps between measurements of the loss on the held-out split; null: none on the way",
    )
    patience: Count | None = Field(
        default=None,
        description="early stopping: training ends after this many measurements in a row without a lower held-out "
        "loss, and the weights of the lowest are kept. null: train to the end, keep the last. Needs evaluate_every",
    )

    def rows_at_once(self, share: int) -> int:
        """How many rows of a process' share of a batch go through the model together, at most `micro_batch_size`."""
        return next(n for n in range(min(self.micro_batch_size or share, share), 0, -1) if share % n == 0)

    @model_validator(mode="after")
    def _patience_measures(self):
        if self.patience is not None and self.evaluate_every is None:
            raise ValueError("patience counts measurements of the held-out loss; set evaluate_every too")
        return self

    @model_validator(mode="after")
    def _four_bits_below_an_adapter(self):
        if self.four_bit and self.lora is None:
            raise ValueError("four_bit holds frozen weights; train an adapter on them (lora)")
        return self


def few_steps(name: str, steps: int, more_steps: str, at_most: str = "") -> str | None:
    """The warning about a stage with too few optimizer steps to learn from; None if they are enough.

    Args:
        more_steps: what to do about it, from its block.
        at_most: put before the number if it is a bound.
    """
    if steps >= FEWEST_STEPS:
        return None
    return (
        f"{name}: {at_most}{steps} optimizer step{'' if steps == 1 else 's'}, fewer than {FEWEST_STEPS}: next to "
        f"nothing can be learnt; {more_steps}"
    )


class SftConfig(Epochs):
    """Fine-tuning on demonstrations with TRL's SFTTrainer; the loss is on answers, and on all of raw text."""

    learning_rate: Positive = Field(default=5e-5, description="peak; about 10 times more with LoRA")
    batch_size: Count = Field(default=16, description="demonstrations per optimizer step")
    packing: Flag = Field(
        default=False,
        description="put several short raw texts into one row of up to max_length tokens, without attention between "
        "them: less padding. Such a row counts as one in batch_size, so there are fewer steps",
    )


class RewardConfig(Epochs):
    """The K-wise reward model (Ouyang et al. 2022), which starts from the SFT model."""

    learning_rate: Positive = Field(default=2e-5, description="peak; about 10 times more with LoRA")
    head_learning_rate: Positive | None = Field(
        default=None, description="peak for the score head, which starts from scratch; null: learning_rate"
    )
    warm_start: Literal["probe"] | None = Field(
        default=None,
        description="probe: the head starts as the best linear predictor of the rankings from the SFT model's hidden "
        "states; null: random",
    )
    pooling: Literal["last", "mean"] = Field(
        default="last", description="read the score from the last token's state, or from the mean over the response"
    )
    batch_size: Count = Field(default=8, description="prompts per optimizer step, each with its K responses")


_Imported = Annotated[ImportedModel, Tag("imported")]
SftBlock = Annotated[Annotated[SftConfig, Tag("trained")] | _Imported, Discriminator(trained_or_imported)]
RewardBlock = Annotated[Annotated[RewardConfig, Tag("trained")] | _Imported, Discriminator(trained_or_imported)]
