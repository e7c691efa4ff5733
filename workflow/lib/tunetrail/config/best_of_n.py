"""`policies.<name>` with `method: best_of_n`."""

from typing import Annotated, Literal

from pydantic import Field

from tunetrail.config.fields import Block, Integer


class BestOfNConfig(Block):
    """The best of n samples of the SFT model by the reward model; nothing is trained."""

    method: Literal["best_of_n"]
    n: Annotated[Integer, Field(ge=2, le=1024)] = Field(default=4, description="samples per prompt, at evaluation")
