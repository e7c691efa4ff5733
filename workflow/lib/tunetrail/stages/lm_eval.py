"""Tasks of the language-model evaluation harness (Gao et al. 2021) on one model. Needs the package lm-eval.

    python -m tunetrail.stages.lm_eval --config C.json --input model=… --output … --state …

The artifact lm_eval/<subject> is an input of the report under the role `lm_eval.<subject>`. metrics.json:

    subject            the model
    version            of the package
    tasks              [{"task", "metric", "value", "stderr": null if the harness gives none, "n",
                       "higher_is_better"}]

The harness keeps its tasks' data sets in the cache of the hub library; nodes without network access need them there.
The record has the files in `include_path`, and changing one reruns the stage. Data that these files refer to is not
recorded.
"""

import importlib.util
import sys
from importlib.metadata import version

from tunetrail.config.evaluation import LmEvalConfig
from tunetrail.contract.stage import Stage
from tunetrail.errors import ConfigError
from tunetrail.models.loading import load_causal_lm, load_tokenizer
from tunetrail.models.runtime import device, prepare, use_bf16
from tunetrail.provenance.manifest import sha256_file, sha256_json
from tunetrail.provenance.record import dependency
from tunetrail.stages.registry import start


def table(results: dict) -> list[dict]:
    """The harness's results, one row per task and metric."""
    rows = []
    for task, measured in sorted(results["results"].items()):
        for key, value in sorted(measured.items()):
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = measured.get(f"{metric}_stderr,{filtered}")
            n = results.get("n-samples", {}).get(task, {}).get("effective")
            rows.append(
                {
                    "task": task,
                    "metric": metric if filtered == "none" else f"{metric} ({filtered})",
                    "value": float(value),
                    "stderr": float(error) if isinstance(error, int | float) else None,
                    "n": n,
                    "higher_is_better": results.get("higher_is_better", {}).get(task, {}).get(metric),
                }
            )
    return rows


def run(stage: Stage) -> dict:
    """Raises ConfigError if the package is not installed or does not know a task."""
    config = LmEvalConfig(**stage.config)
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "lm_eval.tasks: the package lm-eval is not installed; run `pip install lm-eval`, or set lm_eval to null"
        )
    prepare(stage.seed, "lm_eval")
    stage.draft.about = ("model",)
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    include = None if config.include_path is None else str(config.include_path)
    tasks = TaskManager(include_path=include)
    if unknown := [name for name in config.tasks if not tasks.match_tasks([name])]:
        raise ConfigError(
            f"lm_eval.tasks: the harness knows no {', '.join(unknown)}; `lm-eval ls tasks` lists them, "
            "lm_eval.include_path adds yours"
        )
    folder = stage.inputs["model"].folder / "model"
    model = load_causal_lm(folder).to(device()).eval()
    if use_bf16(stage.shared["precision"]):
        model = model.bfloat16()
    seed = stage.seed % 2**32
    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=load_tokenizer(folder), batch_size=config.batch_size),
        tasks=config.tasks,
        task_manager=tasks,
        num_fewshot=config.few_shot,
        limit=config.limit,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        log_samples=False,
        bootstrap_iters=1000,
    )
    if config.include_path is not None:
        files = {str(path): sha256_file(path) for path in config.own_files()}
        stage.draft.dependencies.append(dependency("tasks", str(config.include_path), sha256_json(files), files=files))
    installed = version("lm_eval")
    stage.draft.dependencies.append(
        dependency(
            "evaluator", f"lm-eval {installed}", uri=f"pkg:pypi/lm-eval@{installed}", reason="not part of the lock"
        )
    )
    return {"subject": stage.shared["subject"], "version": installed, "tasks": table(results)}


if __name__ == "__main__":
    sys.exit(start("lm_eval", run))
