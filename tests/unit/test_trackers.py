"""Trackers of training: names that the libraries know, one clear error, and numbers that arrive."""

import os
from contextlib import suppress

import pytest
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from tunetrail.config.loading import load, parse
from tunetrail.config.run import Config
from tunetrail.errors import ConfigError
from tunetrail.models import trackers
from tunetrail.stages.registry import stage_config

from ..conftest import ROOT

EVERY = ["tensorboard", "wandb", "mlflow", "trackio"]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("WANDB", "MLFLOW", "TENSORBOARD_LOGGING"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", os.environ.copy())


def test_both_libraries_know_every_choice():
    assert set(EVERY) <= INTEGRATION_TO_CALLBACK.keys() & LOGGER_TYPE_TO_CLASS.keys()


def test_the_error_for_a_missing_package_is_one_line():
    with pytest.raises(
        ConfigError, match=r"^my.yaml: report_to: no_such_tracker is not installed; pip install no_such_tracker, or"
    ):
        trackers.check(["tensorboard", "no_such_tracker"], "my.yaml")
    trackers.check(["tensorboard"])


def test_another_tracker_retrains_nothing():
    path = ROOT / "config/examples/tiny.yaml"
    config = load(path)
    other = config.model_copy(update={"report_to": ["wandb"]})
    for stage in ("sft", "reward", "policies.ppo", "policies.dpo"):
        assert stage_config(config, stage) == stage_config(other, stage)
    assert Config.model_fields["report_to"].default == ["tensorboard"]


def test_an_unknown_tracker_is_refused_by_name():
    with pytest.raises(ConfigError, match="report_to"):
        parse(
            {
                "run": "x",
                "report_to": ["wnadb"],
                "base": {"source": "random"},
                "data": {"demonstrations": [{"source": "topics"}]},
            }
        )


def test_the_trainers_options_name_run_and_project(tmp_path, monkeypatch):
    monkeypatch.setenv(trackers.VARIABLE, "tensorboard")
    options = trackers.trainer_options(tmp_path / "results/demo/sft", tmp_path / "state/demo/sft/f00")
    assert options == {"report_to": ["tensorboard"], "run_name": "demo/sft", "project": "tunetrail"}
    assert os.environ["WANDB_RUN_ID"] == "f00"  # an attempt that resumes continues the same run
    monkeypatch.setenv(trackers.VARIABLE, "")
    assert trackers.trainer_options(tmp_path / "sft", tmp_path)["report_to"] == []


def test_ppos_numbers_arrive_even_if_it_is_interrupted(tmp_path, monkeypatch):
    monkeypatch.setenv(trackers.VARIABLE, "tensorboard")
    accelerator = Accelerator(cpu=True, **trackers.accelerator_options(tmp_path))
    with suppress(KeyboardInterrupt), trackers.tracking(accelerator, tmp_path / "ppo", tmp_path):
        accelerator.log({"ppo/score": 0.25}, 1)
        accelerator.log({"ppo/score": 0.5}, 2)
        raise KeyboardInterrupt
    board = EventAccumulator(str(tmp_path / "tensorboard/tunetrail")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("ppo/score")] == [(1, 0.25), (2, 0.5)]
