"""What this machine knows of models on the Hugging Face hub."""

from pathlib import Path


def resolved_revision(repo: str, revision: str) -> str | None:
    """The commit that a repository's tag or branch points to; None if this machine never resolved it."""
    from huggingface_hub.constants import HF_HUB_CACHE

    path = Path(HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "refs" / revision
    return path.read_text().strip() if path.is_file() else None
