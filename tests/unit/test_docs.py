"""config/README.md and the JSON schema agree with the code, so they cannot go stale."""

import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from tunetrail import errors
from tunetrail.cli import main
from tunetrail.config import documentation
from tunetrail.config.data import SPLITS, FileSource
from tunetrail.config.documentation import KEYS_END, KEYS_START, document, schema
from tunetrail.config.fields import Block
from tunetrail.config.loading import expand_sweeps
from tunetrail.config.run import Config
from tunetrail.data.readers import demonstrations, feedback, preferences, prompts

ROOT = Path(__file__).parents[2]
README = (ROOT / "config/README.md").read_text(encoding="utf-8")
TABLES = README.partition(KEYS_START)[2].partition(KEYS_END)[0]


def blocks(annotation) -> set[type[Block]]:
    """Every block that a key of this type may have, and the blocks inside it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        inside = (blocks(field.annotation) for field in annotation.model_fields.values())
        return {annotation}.union(*inside)
    return set().union(*map(blocks, getattr(annotation, "__args__", ())))


REACHABLE = sorted(blocks(Config), key=lambda block: block.__name__)


def table_of(block: type[Block]) -> list[dict[str, str]]:
    """The README's table of a block: rows by heading. Read as Markdown, not by the code that wrote it."""
    title = next((path, variant) for path, variant, model in documentation._BLOCKS if model is block)
    heading = (f"`{title[0]}`" if title[0] else "Top level") + (f" with `{title[1]}`" if title[1] else "")
    section = TABLES.partition(f"### {heading}\n")[2].partition("\n### ")[0]
    header, _, *rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_the_walk_finds_every_block():
    assert {block.__name__ for block in REACHABLE} >= {
        "Config",
        "PypiModel",
        "TopicsSource",
        "Lora",
        "PpoConfig",
        "PreferenceProbe",
    }
    assert set(REACHABLE) == {model for _, _, model in documentation._BLOCKS}


@pytest.mark.parametrize("block", REACHABLE, ids=lambda block: block.__name__)
def test_every_key_is_in_the_readme_with_its_true_default(block):
    rows = {row["key"].strip("`"): row for row in table_of(block)}
    assert rows.keys() == block.model_fields.keys()
    for key, field in block.model_fields.items():
        default, meaning = rows[key]["default"], rows[key]["meaning"]
        assert len(meaning) >= 4
        if field.is_required():
            assert default == "required"
        elif default.startswith("`"):
            assert json.loads(default.strip("`")) == field.default
        else:  # too long for a table
            assert isinstance(field.default, BaseModel | list | str)
            assert len(str(field.default)) > 20 or isinstance(field.default, BaseModel)


@pytest.mark.parametrize("block", REACHABLE, ids=lambda block: block.__name__)
def test_every_key_and_block_has_a_meaning(block):
    assert block.__doc__
    for key, field in block.model_fields.items():
        tag = isinstance(field.annotation, type) is False and str(field.annotation).startswith("typing.Literal")
        assert field.description or (tag and field.is_required()), f"{block.__name__}.{key} has no description"


def test_generated_files_are_fresh(tmp_path, capsys):
    """`make schema` writes both."""
    assert json.loads((ROOT / "workflow/schemas/config.schema.json").read_text(encoding="utf-8")) == schema()
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schema()
    assert main(["config", "document"]) == 0
    assert capsys.readouterr().out == document()
    (tmp_path / "README.md").write_text(README.replace("| `beta` |", "| `gamma` |"), encoding="utf-8")
    assert main(["config", "document", "--write", str(tmp_path / "README.md")]) == 0
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == README


def fenced(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.partition(KEYS_START)[0], re.DOTALL)


def test_every_example_row_can_be_read(tmp_path):
    """The readers accept every example row as it is."""
    shown = fenced("json")
    assert len(shown) == 10
    for i, row in enumerate(shown):
        (tmp_path / f"{i}.jsonl").write_text(row, encoding="utf-8")
        source = FileSource(source="file", path=tmp_path / f"{i}.jsonl")
        keys = json.loads(row).keys()
        if keys & {"chosen", "ranks", "labels"}:
            read = preferences
        elif "label" in keys:
            read = feedback
        else:
            read = demonstrations if keys & {"text", "completion"} or "assistant" in row else prompts
        assert len(list(read(source))) == 1, row


def test_the_documented_sweep_has_the_documented_names():
    import yaml

    (shown,) = (text for text in fenced("yaml") if "beta: [" in text)
    names = list(expand_sweeps(yaml.safe_load(shown)["policies"]))
    assert names == re.findall(r"dpo-beta-[\d.]*\d", shown)


def test_every_split_exit_code_and_variable_is_documented():
    for split in SPLITS:
        assert f"| `{split}` | " in README
    for error in (errors.DataError, errors.ConfigError, errors.DiskError, errors.Interrupted, errors.Superseded):
        assert f"| {error.exit_code} | " in README
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "workflow/lib/tunetrail/contract").glob("*.py")]
    variables = set(re.findall(r"TUNETRAIL_[A-Z_]+", "".join(sources)))
    assert variables == set(re.findall(r"TUNETRAIL_[A-Z_]+", README))
    assert "| `TUNETRAIL_CHECKPOINT_MINUTES` | minutes | 10 |" in README


def test_every_mentioned_file_exists():
    for path in re.findall(r"`((?:config|workflow|profiles)/[\w./-]*)`", README):
        assert (ROOT / path).exists(), path


def test_resources_are_no_keys():
    """Science lives in the config, resources in the profiles."""
    keys = {key for block in REACHABLE for key in block.model_fields}
    assert not keys & {"mem_mb", "runtime", "threads", "cpus", "gpus", "gpu", "partition", "account", "slurm_partition"}
