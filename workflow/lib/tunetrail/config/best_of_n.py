"""`policies.<name>` with `method: best_of_n`."""

from typing import Annotated, Literal

from pydantic import Field

from tunetrail.config.fields import Block, Integer


class BestOfNConfig(Block):
    """Keeps the one of n samples of the SFT model that the reward model scores highest; nothing is trained."""

    method: Literal["best_of_n"]
    n: Annotated[Integer, Field(ge=2, le=1024)] = Field(default=4, description="samples per prompt, at evaluation")
