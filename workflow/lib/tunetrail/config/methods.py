"""`methods`: compares methods of fine-tuning the base model."""

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from tunetrail.config.fields import Block, Count, Flag, Name, Positive
from tunetrail.config.training import Lora


class MethodConfig(Block):
    """One method of fine-tuning: all weights, unless `lora` or `prompt_tokens` is set."""

    learning_rate: Positive = Field(
        description="constant; about 10 times more with LoRA than for all weights, and 1000 times more for a prompt"
    )
    lora: Lora | None = Field(default=None, description="train a LoRA adapter (Hu et al. 2021)")
    prompt_tokens: Count | None = Field(
        default=None, description="train this many vectors in front of the text (prompt tuning, Lester et al. 2021)"
    )
    four_bit: Flag = Field(
        default=False,
        description="hold the frozen weights in 4 bits (QLoRA, Dettmers et al. 2023), with lora; needs bitsandbytes",
    )

    @property
    def kind(self) -> str:
        """The method in words."""
        if self.lora is None:
            return "prompt tuning" if self.prompt_tokens else "full"
        return "4-bit LoRA" if self.four_bit else "LoRA"

    @model_validator(mode="after")
    def _parts_fit(self):
        if self.lora is not None and self.prompt_tokens is not None:
            raise ValueError("lora and prompt_tokens are two methods; give each a name of its own")
        if self.four_bit and self.lora is None:
            raise ValueError("four_bit holds frozen weights; train an adapter on them (lora)")
        return self


class MethodsConfig(Block):
    """Fine-tunes the base model on the sft split by several methods and measures what each learns and forgets."""

    more_steps: ClassVar[str] = "raise steps"

    compare: Annotated[dict[Name, MethodConfig], Field(min_length=1)] = Field(
        description="name: block; how each method trains"
    )
    steps: Count = Field(default=12, description="optimizer steps of each method")
    points: Count = Field(default=4, description="how often both losses are measured, at regular intervals")
    batch_size: Count = Field(default=4, description="rows per optimizer step, and per forward pass when measuring")
    max_length: Count = Field(default=1024, description="the most tokens of a row; raw text is cut into blocks")
