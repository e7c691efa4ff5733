"""Reports before any job starts what is bound to fail: files, rows, packages, the base model, recorded rankings.

Nothing heavy is imported, since every start of Snakemake runs this: a local base is checked by its files. The rest is
left to the stage that loads the model.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from tunetrail.config.base_model import LocalModel
from tunetrail.config.comparisons import RecordedLabeler
from tunetrail.config.data import DataConfig, FileSource
from tunetrail.config.loading import check_files
from tunetrail.config.run import Config
from tunetrail.data.readers import check_sources
from tunetrail.errors import ConfigError, DataError, TunetrailError
from tunetrail.models.trackers import check as check_trackers
from tunetrail.provenance.manifest import MANIFEST, artifact_around

SAMPLE = 1000
"""How many rows of local files are measured."""
Result = TypeVar("Result")


def check(config: Config, source: str = "config", packages: bool = True, folder: Path | None = None) -> list[str]:
    """Checks a valid config against what it names, and returns warnings.

    Args:
        source: names the config in messages.
        packages: whether jobs run in this environment, so that packages must be installed in it.
        folder: the run's folder, including a module's prefix; None: results/<run>.

    Raises ConfigError, or DataError if only data are bad, with a line for each mistake.
    """
    check_files(config, source)
    mistakes: list[TunetrailError] = []

    def tried(step: Callable[[], Result], otherwise: Result) -> Result:
        try:
            return step()
        except TunetrailError as e:
            mistakes.append(e)
            return otherwise

    if packages:
        tried(lambda: check_trackers(config.report_to, source), None)
        tried(lambda: refuse(f"{source}: {line}" for line in missing_packages(config)), None)
    no_rows: list[dict] = []
    rows = tried(lambda: check_sources(config.data), no_rows)
    tried(
        lambda: refuse(f"{source}: {line}" for line in wrong_artifacts(config, folder or Path("results", config.run))),
        None,
    )
    if isinstance(config.base, LocalModel):
        tried(lambda: check_base(config.base, config.data, rows, source), None)  # type: ignore[arg-type]
    warnings: list[str] = []
    if isinstance(config.comparisons, RecordedLabeler):
        warnings = tried(lambda: check_recorded(config.comparisons, config.data, rows), [])  # type: ignore[arg-type]
    if mistakes:
        only_data = all(isinstance(mistake, DataError) for mistake in mistakes)
        raise (DataError if only_data else ConfigError)("\n".join(map(str, mistakes)))
    return warnings


def refuse(lines: Iterator[str]) -> None:
    """Raises ConfigError with these lines, if there are any."""
    if messages := list(lines):
        raise ConfigError("\n".join(messages))


def missing_packages(config: Config) -> Iterator[str]:
    """A line for each optional package that the config needs and that is not installed."""
    if config.lm_eval is not None and importlib.util.find_spec("lm_eval") is None:
        yield "lm_eval.tasks: the package lm-eval is not installed; run `pip install lm-eval`, or set lm_eval to null"
    for name, method in (config.methods.compare if config.methods else {}).items():
        if method.four_bit and importlib.util.find_spec("bitsandbytes") is None:
            yield (
                f"methods.compare.{name}.four_bit: bitsandbytes is not installed; run `pip install bitsandbytes`, or "
                "remove the method"
            )
    blocks = {"sft": config.sft, "reward": config.reward} | {f"policies.{k}": v for k, v in config.policies.items()}
    for name, block in blocks.items():
        if getattr(block, "four_bit", False) and importlib.util.find_spec("bitsandbytes") is None:
            yield f"{name}.four_bit: bitsandbytes is not installed; run `pip install bitsandbytes`, or set it to false"
    for name, policy in config.policies.items():
        if policy.method == "ppo" and policy.vllm and importlib.util.find_spec("vllm") is None:
            yield f"policies.{name}.vllm: vLLM is not installed; run `pip install vllm`, or set vllm to null"


def wrong_artifacts(config: Config, run: Path) -> Iterator[str]:
    """A line for each imported model inside an artifact that it cannot be taken from.

    Args:
        run: the run's own folder.
    """
    for key in ("base", "sft", "reward"):
        folder = getattr(getattr(config, key), "path", None)
        artifact = artifact_around(folder) if folder else None
        if artifact is None:
            continue
        if artifact.resolve().is_relative_to(run.resolve()):
            yield (
                f"{key}.path: {folder} was made by the run {config.run} itself, whose {key} it would replace; give the "
                f"run that begins with it a name of its own, such as `run: {config.run}-2`"
            )
        elif not (artifact / MANIFEST).exists():
            yield f"{key}.path: {artifact} has no {MANIFEST}: its stage runs or was interrupted; finish its run first"


def check_base(base: LocalModel, data: DataConfig, rows: Sequence[dict], source: str) -> None:
    """Raises ConfigError for a model that the run cannot use, and DataError for rows that are certainly too long."""
    from tunetrail.models import tokenizer_files

    refuse(f"{source}: {line}" for line in tokenizer_files.problems(base.path, base, data.chat))
    if data.too_long == "error" and (base.path / "tokenizer.json").exists():
        check_lengths(base.path, data, rows)


def check_lengths(folder: Path, data: DataConfig, rows: Sequence[dict]) -> None:
    """Raises DataError for rows of a sample whose last message or answer alone is too long."""
    from tunetrail.data.invalid import leave_out
    from tunetrail.data.rendering import limits, measured
    from tunetrail.models.tokenizer_files import Counter, positions

    asked = [row for row in rows if "text" not in row]
    step = -(-len(asked) // SAMPLE) or 1
    sample = [row | {"prompt": row["messages"][-1]["content"].strip(), "max_tokens": None} for row in asked[::step]]
    lengths = measured(sample, Counter(folder))
    of = "rows" if step == 1 else "sampled rows"
    too_long = [finding for limit in limits(data, positions(folder)) if (finding := limit.finding(lengths, of))]
    if too_long:
        leave_out(too_long, "error")


def check_recorded(labeler: RecordedLabeler, data: DataConfig, rows: Sequence[dict]) -> list[str]:
    """Warns about prompts that may need rankings and are not in the file.

    Says nothing if not all prompts are in local files, or if the file has rendered prompts.

    Raises DataError if the file has none of the prompts, or lacks one that will certainly be ranked.
    """
    from tunetrail.labeling.recorded import read_rankings

    recorded = read_rankings(labeler.path, labeler.columns)
    asked = [
        row for row in rows
        if "messages" in row and not {"rankings", "ratings"} & row.keys()
        and row["pinned"] in (None, "reward", "heldout")
    ]  # fmt: skip
    prompts = {row["messages"][-1]["content"].strip(): row for row in asked}
    missing = [prompt for prompt in prompts if prompt not in recorded]
    are_all_local = all(isinstance(source, FileSource) for source in [*data.demonstrations, *data.prompts])
    are_rendered = any(prompt in name for prompt in missing[:1] for name in recorded)
    if not missing or not are_all_local or are_rendered:
        return []
    problem = (
        f"comparisons.path: {labeler.path} ranks no completions of {len(missing)} of {len(prompts)} prompts of "
        f"data.demonstrations, the first at {prompts[missing[0]]['where']}"
    )
    if len(missing) == len(prompts) or any(prompts[prompt]["pinned"] for prompt in missing):
        raise DataError(f"{problem}; add lines for them, or check the prompts and columns of the file")
    return [
        f"{problem}; the run stops at comparisons if one of them falls to reward or heldout: pin a source of ranked "
        "prompts to these splits (split)"
    ]
