"""What this machine knows of models on the Hugging Face hub."""

from contextlib import suppress
from pathlib import Path

from tunetrail.files import read_regular


def resolved_revision(repo: str, revision: str) -> str | None:
    """The commit that a repository's tag or branch points to; None if this machine never resolved it."""
    from huggingface_hub.constants import HF_HUB_CACHE

    path = Path(HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "refs" / revision
    with suppress(OSError, ValueError):
        return read_regular(path, 2**10).decode().strip()
    return None
