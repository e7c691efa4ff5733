"""Reads sources of data in tests."""

from collections.abc import Callable
from typing import Any

from tunetrail.data.invalid import Invalid


def rows_of(reader: Callable[..., Any], source: Any, invalid: list[Invalid] | None = None) -> list[Any]:
    """The rows of a source, without their places.

    Args:
        reader: one of `tunetrail.data.readers`, such as `demonstrations`.
    """
    return [row for _, row in reader(source, invalid)]
