"""The types of config values, and the base class of every block."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _no_flag(value: Any) -> Any:
    """Refuses booleans: Python takes true for 1, but in a config it is a mistake."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number, got {value}")
    return value


def module_names(value: Any) -> Any:
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"must be all-linear or a list of layer names, got {value!r}")
    return value


# A number may come as a string: Snakemake's YAML 1.1 reads 1e-5 as one.
no_flags = BeforeValidator(_no_flag)
Fraction = Annotated[float, Field(ge=0, le=1), no_flags]
OpenFraction = Annotated[float, Field(ge=0, lt=1), no_flags]
Positive = Annotated[float, Field(gt=0), no_flags]
NonNegative = Annotated[float, Field(ge=0), no_flags]
Integer = Annotated[int, Field(strict=True)]
Count = Annotated[Integer, Field(ge=1)]
NonNegativeInt = Annotated[Integer, Field(ge=0)]
Flag = Annotated[bool, Field(strict=True)]

# Patterns for texts, and the messages about them.
_PACKAGE, _VERSION = r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$", r"^[A-Za-z0-9][A-Za-z0-9.!+_-]*$"
_NAME, _SHA256, _REPO, _URL = r"^[a-z0-9][a-z0-9._-]*$", r"^[0-9a-f]{64}$", r"^[\w.-]+/[\w.-]+$", r"^https?://"
PATTERNS = {
    _NAME: "must be lower-case letters, digits, '.', '_' and '-', the first a letter or digit",
    _SHA256: "must be 64 hexadecimal digits in lower case",
    _REPO: "must be owner/name",
    _PACKAGE: "must be the name of a package: letters, digits, '.', '_' and '-', a letter or digit at both ends",
    _VERSION: "must be an exact version, such as 0.1.2",
    _URL: "must start with http:// or https://",
}
Name = Annotated[str, Field(pattern=_NAME, max_length=80)]
Sha256 = Annotated[str, Field(pattern=_SHA256)]
Repo = Annotated[str, Field(pattern=_REPO)]
Package = Annotated[str, Field(pattern=_PACKAGE)]
Version = Annotated[str, Field(pattern=_VERSION)]
Url = Annotated[str, Field(pattern=_URL)]
Text = Annotated[str, Field(min_length=1)]


class Block(BaseModel):
    """A block of the config: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


Checkpoints = Annotated[
    NonNegativeInt,
    Field(description="models kept at regular intervals and evaluated like the last; each takes disk space"),
]
