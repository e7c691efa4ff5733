"""`policies.<name>` with `method: orpo` or `method: simpo`."""

from typing import Literal

from pydantic import Field

from tunetrail.config.dpo import FromPairs
from tunetrail.config.fields import NonNegative, Positive


class OrpoConfig(FromPairs):
    """Odds ratio preference optimisation (Hong et al. 2024): learns from pairs without a reference model or a separate
    SFT stage. Its loss includes fine-tuning on the preferred responses, so it starts from the base model.
    """

    method: Literal["orpo"]
    start: Literal["sft", "base"] = Field(
        default="base",
        description="model to train; the paper starts from base, since the loss fine-tunes as well",
    )
    odds_ratio_weight: Positive = Field(
        default=0.1,
        description="weight of the odds-ratio loss next to the fine-tuning loss (λ); higher values make the "
        "dispreferred response less likely",
    )


class SimpoConfig(FromPairs):
    """Simple preference optimisation (Meng et al. 2024): learns from pairs without a reference model, by log-probs per
    token. Nothing pulls the policy back to its start, so choose the learning rate with care.
    """

    method: Literal["simpo"]
    start: Literal["sft", "base"] | None = Field(
        default=None, description="model to train; null: sft, or base if there is none"
    )
    beta: Positive = Field(default=2.0, description="scale of the log-probs per token")
    gamma: NonNegative = Field(
        default=1.0,
        description="margin by which the preferred response should win, in units of beta times the log-prob per "
        "token; start with half of beta",
    )
