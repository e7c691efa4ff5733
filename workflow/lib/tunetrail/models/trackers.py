"""Sends training metrics to TensorBoard, W&B, MLflow or trackio, as `report_to` says.

Nothing is read back from there: the report uses metrics files and histories. The choice is not part of a stage's config
but comes in $TUNETRAIL_REPORT_TO, so changing it retrains nothing. Each package reads its own addresses and keys
(WANDB_API_KEY, MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID, …).
"""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tunetrail.errors import ConfigError

VARIABLE = "TUNETRAIL_REPORT_TO"
PROJECT = "tunetrail"


def chosen() -> list[str]:
    return [name for name in os.environ.get(VARIABLE, "tensorboard").split(",") if name]


def check(names: Sequence[str], source: str = "config") -> None:
    """Raises ConfigError if the package of a tracker is not installed; packages are called like their trackers."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{source}: report_to: {', '.join(missing)} is not installed; pip install {' '.join(missing)}, or take "
            "it out of the list"
        )


def _run_name(output: Path) -> str:
    """
    >>> _run_name(Path("/home/me/results/demo/sft")), _run_name(Path("/home/me/results/demo/policies/ppo"))
    ('demo/sft', 'demo/policies/ppo')
    """
    return "/".join(output.resolve().parts[-3:]).removeprefix("results/")


def trainer_options(output: Path, state: Path) -> dict[str, Any]:
    """Keyword arguments for transformers.TrainingArguments. Sets the environment variables that its callbacks read.

    A stage that resumes continues the same run in W&B and trackio; in MLflow and TensorBoard each attempt is a new run.
    """
    check(chosen())
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(state / "tensorboard")
    os.environ.setdefault("WANDB_PROJECT", PROJECT)
    os.environ.setdefault("MLFLOW_EXPERIMENT_NAME", PROJECT)
    os.environ |= {"WANDB_DIR": str(state), "WANDB_RUN_ID": state.name, "WANDB_RESUME": "allow"}
    return {"report_to": chosen(), "run_name": _run_name(output), "project": PROJECT}


def accelerator_options(state: Path) -> dict[str, Any]:
    """Keyword arguments for accelerate.Accelerator."""
    from accelerate.utils import ProjectConfiguration

    check(chosen())
    folder = ProjectConfiguration(project_dir=str(state), logging_dir=str(state / "tensorboard"))
    return {"log_with": chosen(), "project_config": folder}


@contextmanager
def tracking(accelerator: Any, output: Path, state: Path) -> Iterator[None]:
    """Lets `accelerator.log` reach the trackers, and closes them on leaving, even after an error.

    `accelerator.end_training` would also end the process group.
    """
    name = _run_name(output)
    options = {
        "wandb": {"name": name, "id": state.name, "resume": "allow", "dir": str(state)},
        "mlflow": {"run_name": name},
        "trackio": {"name": name, "resume": "allow"},
    }
    accelerator.init_trackers(os.environ.get("WANDB_PROJECT", PROJECT), init_kwargs=options)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
