"""`policies.<name>` with `method: dpo`."""

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from tunetrail.config.fields import Checkpoints, Count, NonNegative, Positive, no_flags
from tunetrail.config.training import Epochs

DpoLoss = Literal[
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard",
    "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft",
]  # fmt: skip


def _known_losses(value: Any) -> Any:
    """Gives one message for a value that is neither a loss nor a list of losses."""
    *names, last = (f"'{name}'" for name in get_args(DpoLoss))
    for name in value if isinstance(value, list) and value else [value]:
        if name not in get_args(DpoLoss):
            raise ValueError(f"must be {', '.join(names)} or {last}, or a list of them, got {name!r}")
    return value


class Offline(Epochs):
    """Shared by policies that learn from people's choices without sampling."""

    learning_rate: Positive = Field(default=1e-5, description="peak; about 10 times more with LoRA")
    start: Literal["sft", "base"] | None = Field(
        default=None, description="model to train, also the reference; null: sft, or base if there is none"
    )
    checkpoints: Checkpoints = 0

    @model_validator(mode="after")
    def _one_way_of_keeping(self):
        if self.checkpoints and self.patience is not None:
            raise ValueError(
                "checkpoints are spread over all steps, and patience keeps the best alone; remove either of them"
            )
        return self


class FromPairs(Offline):
    """Shared by policies that learn from pairs of responses."""

    batch_size: Count = Field(default=16, description="pairs per optimizer step")
    pairs_per_prompt: Count | None = Field(
        default=None, description="the most pairs per prompt, those with the widest gaps in rank first; null: all"
    )


Beta = Annotated[
    Positive,
    Field(description="pull towards the reference; lower values move further from it for more reward"),
]


class DpoConfig(FromPairs):
    """Direct preference optimisation (Rafailov et al. 2023) with TRL's DPOTrainer."""

    method: Literal["dpo"]
    beta: Beta = 0.1
    loss: Annotated[DpoLoss | Annotated[list[DpoLoss], Field(min_length=1)], BeforeValidator(_known_losses)] = Field(
        default="sigmoid",
        description="one of TRL's losses, or a list to add up. sft is the mean loss per token of the preferred "
        "responses: `[sigmoid, sft]` keeps them from becoming less likely",
    )
    loss_weights: list[NonNegative] | None = Field(
        default=None, description="a weight for each loss, in the same order; null: 1 for each"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5), no_flags] = Field(
        default=0.0, description="assumed share of wrong labels; for the losses sigmoid, robust and exo_pair"
    )

    @property
    def losses(self) -> list[DpoLoss]:
        return self.loss if isinstance(self.loss, list) else [self.loss]

    @model_validator(mode="after")
    def _weights_fit(self):
        if self.loss_weights is not None and len(self.loss_weights) != len(self.losses):
            raise ValueError(
                f"loss_weights must have one weight for each loss, here are {len(self.loss_weights)} for "
                f"{len(self.losses)} ({', '.join(self.losses)})"
            )
        if self.loss_weights is not None and not any(self.loss_weights):
            raise ValueError("loss_weights must not all be 0")
        return self

    @model_validator(mode="after")
    def _smoothing_fits(self):
        if "exo_pair" in self.losses and self.label_smoothing == 0:
            raise ValueError("loss exo_pair needs label_smoothing above 0")
        if self.label_smoothing and not {"sigmoid", "robust", "exo_pair"} & set(self.losses):
            raise ValueError(f"label_smoothing has no effect with loss {', '.join(self.losses)}; remove it")
        return self
