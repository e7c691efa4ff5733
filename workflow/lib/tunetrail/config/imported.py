"""Models that were made elsewhere."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from tunetrail.config.fields import Block, Repo, Text


class ImportedModel(Block):
    """A model that was made elsewhere: give `path`, or `repo` and `revision`."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [{"required": ["path"]}, {"required": ["repo"]}]})

    path: Path | None = Field(
        default=None, description="a folder that from_pretrained can load, relative to where Snakemake runs"
    )
    repo: Repo | None = Field(default=None, description="or a repository on the Hugging Face hub, owner/name")
    revision: Text | None = Field(
        default=None,
        description="with repo: a commit hash or tag; a branch may move, and then a rerun gets other weights",
    )
    licence: str | None = Field(default=None, description="SPDX name, recorded with everything made from the model")

    @property
    def name(self) -> str:
        """Its name in messages."""
        return str(self.path or self.repo)

    @model_validator(mode="after")
    def _one_model(self):
        if (self.path is None) == (self.repo is None):
            raise ValueError("give either path (a local folder) or repo (a hub repository with its revision)")
        if self.repo and not self.revision:
            raise ValueError("revision is needed with repo, so that a rerun gets the same model")
        if self.path and self.revision:
            raise ValueError("revision goes with repo; remove it")
        return self


def trained_or_imported(block: Any) -> Literal["trained", "imported"]:
    """Whether a block of `sft` or `reward` trains a model or imports one."""
    keys = block.keys() if isinstance(block, Mapping) else type(block).model_fields if isinstance(block, Block) else ()
    return "imported" if {"path", "repo", "revision"} & set(keys) else "trained"
