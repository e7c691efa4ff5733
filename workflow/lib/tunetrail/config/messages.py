"""Pydantic's validation errors as lines `file: key: what is wrong`."""

import difflib
from types import NoneType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import Tag

from tunetrail.config.fields import PATTERNS, Block
from tunetrail.config.run import Config


def _bare(annotation: Any) -> Any:
    """A type without its constraints and without `| None`."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    kept = [a for a in get_args(annotation) if a is not NoneType]
    if NoneType in get_args(annotation):
        return _bare(kept[0] if len(kept) == 1 else Union[tuple(kept)])  # noqa: UP007
    return annotation


def _is_block(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Block)


def _variants(annotation: Any) -> dict[str, type[Block]]:
    """The blocks of a union by the value of `source`, `labeler`, `method` or `scorer` that distinguishes them, or by
    tags that no file has."""
    variants: dict[str, type[Block]] = {
        tag.tag: get_args(part)[0]
        for part in get_args(annotation)
        if get_origin(part) is Annotated
        for tag in get_args(part)[1:]
        if isinstance(tag, Tag)
    }
    for block in filter(_is_block, get_args(annotation)):
        tag = block.model_fields.keys() & {"source", "labeler", "method", "scorer"} - (
            {"scorer"} if "labeler" in block.model_fields else set()
        )
        variants |= {get_args(block.model_fields[name].annotation)[0]: block for name in tag}
    return variants


def _locate(loc: tuple) -> tuple[str, Any]:
    """(key as in the file, its type) of pydantic's path, which also names variants of unions."""
    key = ""
    place: Any = Config
    for part in loc:
        if part in (variants := _variants(place)):
            place = variants[part]
            continue
        if _is_block(place):
            place = _bare(place.model_fields[part].annotation) if part in place.model_fields else None
        elif get_origin(place) in (list, dict) and part != "[key]":
            place = _bare(get_args(place)[-1])
        else:
            continue
        key += f"[{part}]" if isinstance(part, int) and key else f".{part}" if key else str(part)
    return key, place


RENAMED = {"tournament": "head_to_head"}
"""Key of an earlier version -> its current name."""
RENAMED_VALUES = {
    "comparisons.labeler": {
        "reference": "was renamed to simulated",
        "reward_model": "is now a scorer: name one under scorers, `{scorer: reward_model, path: …}`, and rank by it: "
        "`labeler: simulated` with its name as `scorer`",
    }
}
"""Key -> value of an earlier version -> what replaced it."""
REMOVED = {
    "export_merged": "is always done: model/ has the merged weights, adapter/ the adapter",
    "dropout": "is always off: log-probs must be functions of the text alone",
    "kl_estimator": "is always k1: k2 and k3 in the reward do not have the gradient of the KL",
}
"""Key of an earlier version -> why it was removed."""
_WORDS = {
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "path_type": "must be a path",
    "list_type": "must be a list",
    "string_too_short": "must not be empty",
}


def error_lines(error: Any, source: str) -> list[str]:
    """One pydantic error as lines `file: key: what is wrong`."""
    key, _ = _locate(error["loc"])
    kind, given = error["type"], repr(error.get("input"))
    given = given if len(given) <= 80 else given[:80] + "…"
    if kind in ("extra_forbidden", "invalid_key"):
        what = "unknown key; see config/README.md for the keys of this block"
        _, block = _locate(error["loc"][:-1])
        if (last := str(error["loc"][-1])) in RENAMED:
            what = f"was renamed to {RENAMED[last]}"
        elif last in REMOVED:
            what = f"{REMOVED[last]}; remove the key"
        elif near := difflib.get_close_matches(last, block.model_fields, n=1, cutoff=0.7):
            what = f"unknown key; did you mean {near[0]}?"
    elif kind == "missing":
        what = "is required"
    elif kind == "value_error":
        lines = str(error["ctx"]["error"]).split("\n")
        return [f"{source}: {key}: {line}" if key else f"{source}: {line}" for line in lines]
    elif kind == "union_tag_not_found":
        key, what = f"{key}.{error['ctx']['discriminator']}".replace("'", ""), "is required"
    elif kind == "union_tag_invalid":
        key = f"{key}.{error['ctx']['discriminator']}".replace("'", "")
        tag = error["ctx"]["tag"]
        what = f"must be one of {error['ctx']['expected_tags']}, got '{tag}'"
        if tag in RENAMED_VALUES.get(key, {}):
            what = f"{tag} {RENAMED_VALUES[key][tag]}"
    elif kind in ("model_type", "model_attributes_type", "dict_type"):
        what = (
            "is empty; give it keys, or remove it if it is optional"
            if error["input"] is None
            else f"must be a block of keys, got {given}"
        )
    elif kind == "string_type":
        quotes = "; put it in quotes" if isinstance(error["input"], int | float) else ""
        what = f"must be a text, got {given}{quotes}"
    elif kind == "string_pattern_mismatch":
        what = f"{PATTERNS[error['ctx']['pattern']]}, got {given}"
    else:
        message = (
            error["msg"].removeprefix("Input should be ").removeprefix("String should ").removeprefix("List should ")
        )
        prefix = "must be " if error["msg"].startswith("Input should be ") else "should "
        what = f"{_WORDS.get(kind, prefix + message)}, got {given}"
    return [f"{source}: {key}: {what}"]
