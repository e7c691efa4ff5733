"""Reads a config file: YAML, sweeps, validation, and the files it names."""

import itertools
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from tunetrail.config.comparisons import RecordedLabeler
from tunetrail.config.messages import error_lines
from tunetrail.config.run import Config
from tunetrail.config.scorers import RewardModelScorer
from tunetrail.errors import ConfigError


class _UniqueKeyLoader(yaml.SafeLoader):
    """A YAML loader that refuses duplicate keys, of which PyYAML would silently keep the last."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{self.name}:{line}: a key must be a word, not a list or block")
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise ConfigError(f"{self.name}:{line}: key '{key}' is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


# 1e-5 is a float in YAML 1.2 and for every reader; PyYAML's YAML 1.1 reads a string.
_FLOAT = re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_UniqueKeyLoader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file. Raises ConfigError naming file and line."""
    try:
        with path.open(encoding="utf-8") as f:
            content = yaml.load(f, _UniqueKeyLoader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e.strerror}") from None
    except (yaml.YAMLError, ValueError) as e:  # ValueError: not UTF-8, or a date such as 2024-13-45
        mark = getattr(e, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(e, "problem", None) or str(e).splitlines()[0]
        raise ConfigError(f"{where}: not valid YAML: {problem}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold keys and values at its top level")
    return content


NEVER_SWEPT = ("method", "lora", "vllm")
LISTS = ("loss", "loss_weights")
"""Keys of a policy for which a list is a single value."""


def expand_sweeps(policies: Any) -> Any:
    """Expands sweeps: a list where a policy takes one value gives one policy per combination, named after it.

    A list of losses is a single value: they are added up.

    >>> sorted(expand_sweeps({"dpo": {"method": "dpo", "beta": [0.1, 0.5]}}))
    ['dpo-beta-0.1', 'dpo-beta-0.5']
    """
    if not isinstance(policies, dict):
        return policies
    expanded: dict = {}
    for name, policy in policies.items():
        keys = policy.items() if isinstance(policy, dict) else ()
        swept = {key: values for key, values in keys if isinstance(values, list) and key not in LISTS}
        for key, values in swept.items():
            if not values:
                raise ConfigError(f"policies.{name}.{key}: a sweep needs at least one value, got an empty list")
            if key in NEVER_SWEPT or any(isinstance(v, list | dict) for v in values):
                raise ConfigError(
                    f"policies.{name}.{key}: cannot be swept; give each policy a name and a block of its own"
                )
        for combination in itertools.product(*swept.values()):
            # As a string, 1e-5 would give a policy another name than as a number.
            chosen = {
                k: float(v) if isinstance(v, str) and _FLOAT.match(v) else v
                for k, v in zip(swept, combination, strict=True)
            }
            label = "".join(f"-{k.replace('_', '-')}-{v}" for k, v in chosen.items()).lower()
            if f"{name}{label}" in expanded:
                raise ConfigError(
                    f"policies.{name}: two policies would be named {name}{label}; remove one or rename it"
                )
            expanded[f"{name}{label}"] = policy | chosen if chosen else policy
    return expanded


def parse(content: dict, source: str = "config") -> Config:
    """Validates a config. Raises ConfigError with one line per mistake."""
    try:
        content = dict(content)
        if "policies" in content:
            content["policies"] = expand_sweeps(content["policies"])
        return Config.model_validate(content)
    except ValidationError as e:
        raise ConfigError(
            "\n".join(dict.fromkeys(line for err in e.errors() for line in error_lines(err, source)))
        ) from None
    except ConfigError as e:
        raise ConfigError(f"{source}: {e}") from None


def check_files(config: Config, source: str = "config") -> None:
    """Raises ConfigError for every path in the config that does not exist, or is a folder instead of a file."""
    models = {"base.path", "sft.path", "reward.path", "head_to_head.judge.path", "lm_eval.include_path"}
    models |= {f"scorers.{name}.path" for name, s in config.scorers.items() if isinstance(s, RewardModelScorer)}
    models |= set() if isinstance(config.comparisons, RecordedLabeler) else {"comparisons.path"}
    problems = []
    for key, path in config.files().items():
        if not path.exists():
            is_beside = Path(source).parent != Path() and (Path(source).parent / path).exists()
            hint = f"; paths are relative to where Snakemake runs, which is {Path.cwd()}" if is_beside else ""
            problems.append(f"{source}: {key}: no such file or folder: {path}{hint}")
        elif path.is_dir() != (key in models):
            due = "a folder, not a file" if key in models else "a file, not a folder"
            problems.append(f"{source}: {key}: must be {due}: {path}")
    if problems:
        raise ConfigError("\n".join(problems))


def load(path: Path) -> Config:
    """Reads, validates and checks the files of a config. Raises ConfigError."""
    config = parse(read_yaml(path), str(path))
    check_files(config, str(path))
    return config
