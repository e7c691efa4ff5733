"""`policies.<name>` with `method: kto`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tunetrail.config.dpo import Beta, Offline
from tunetrail.config.fields import Integer, Positive


class KtoConfig(Offline):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024) with TRL's KTOTrainer, on single responses that were liked
    or disliked, `data.feedback`.
    """

    method: Literal["kto"]
    beta: Beta = 0.1
    batch_size: Annotated[Integer, Field(ge=2)] = Field(
        default=16, description="responses per optimizer step; the KL to the reference is estimated from them"
    )
    loss: Literal["kto", "apo_zero_unpaired"] = Field(
        default="kto", description="one of TRL's losses; apo_zero_unpaired has no KL term and takes less time"
    )
    desirable_weight: Positive = Field(
        default=1.0,
        description="weight of liked responses. If there are fewer of one kind, raise its weight: weight times "
        "number should be 1 to 4/3 times as much for liked responses as for disliked ones",
    )
    undesirable_weight: Positive = Field(default=1.0, description="weight of disliked responses")

    @model_validator(mode="after")
    def _several_at_once(self):
        if self.micro_batch_size == 1:
            raise ValueError("micro_batch_size must be at least 2 with kto")
        return self
