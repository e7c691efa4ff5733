"""`policies.<name>` with `method: dpo`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tunetrail.config.fields import Checkpoints, Count, Positive, no_flags
from tunetrail.config.training import Epochs

DpoLoss = Literal[
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard",
    "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft",
]  # fmt: skip


class DpoConfig(Epochs):
    """Direct preference optimisation (Rafailov et al. 2023) by TRL's DPOTrainer."""

    method: Literal["dpo"]
    learning_rate: Positive = Field(default=1e-5, description="peak; about 10 times more with LoRA")
    batch_size: Count = Field(default=16, description="pairs per optimizer step")
    beta: Positive = Field(
        default=0.1, description="pull to the reference; lower: further from the SFT model for more reward"
    )
    loss: DpoLoss = Field(default="sigmoid", description="one of TRL's")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5), no_flags] = Field(
        default=0.0, description="assumed share of wrong labels; for the losses sigmoid, robust and exo_pair"
    )
    pairs_per_prompt: Count | None = Field(
        default=None, description="pairs per prompt at most, the widest gaps in rank first; null: all"
    )
    checkpoints: Checkpoints = 0

    @model_validator(mode="after")
    def _smoothing_fits(self):
        if self.loss == "exo_pair" and self.label_smoothing == 0:
            raise ValueError("loss exo_pair needs label_smoothing above 0")
        if self.label_smoothing and self.loss not in ("sigmoid", "robust", "exo_pair"):
            raise ValueError(f"label_smoothing has no effect with loss {self.loss}; remove it")
        return self
