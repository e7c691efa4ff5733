"""The cost of a rerun, from records or else benchmarks; unknown costs are reported as unknown."""

from pathlib import Path

import pytest

from tunetrail.monitor import plan
from tunetrail.monitor.dag import Job

from ..records import ATTEMPT, seal_folder


def make(folder: Path, name: str, attempts: list[dict] | None = None, benchmark: str | None = None, **changes) -> Job:
    artifact, tsv = folder / "results/r" / name, folder / f"{name}.tsv"
    if attempts is not None:
        artifact.mkdir(parents=True)
        seal_folder(artifact, name, attempts=attempts)
    if benchmark is not None:
        tsv.write_text(benchmark)
    given = {
        "name": name, "rule": name, "manifest": artifact / "manifest.json", "state": None, "log": None,
        "benchmark": tsv, "threads": 4, "resources": {}, "needed": True, "why": "forced",
    }  # fmt: skip
    return Job(**given | changes)


HOUR = ATTEMPT | {"seconds": 3600.0}
BENCHMARK = "s\th:m:s\tcpu_time\n1800.0\t0:30:00\t3500\n"


def test_core_hours_are_seconds_times_the_cores_of_the_job(tmp_path):
    found = plan.cost(make(tmp_path, "sft", [HOUR, HOUR]))
    assert (found.hours, found.unit, found.at_least) == (pytest.approx(8), "core-hours", False)


def test_gpu_hours_count_every_process(tmp_path):
    found = plan.cost(make(tmp_path, "ppo", [HOUR | {"gpus": ["H100", "H100"], "world_size": 2}]))
    assert (found.hours, found.unit) == (pytest.approx(2), "GPU-hours")


def test_the_duration_of_a_killed_attempt_is_unknown(tmp_path):
    found = plan.cost(
        make(tmp_path, "sft", [HOUR | {"seconds": None, "ended": {"outcome": "killed", "message": None}}, HOUR])
    )
    assert (found.hours, found.at_least) == (pytest.approx(4), True)


def test_the_benchmark_is_used_if_there_is_no_record(tmp_path):
    found = plan.cost(make(tmp_path, "sft", benchmark=BENCHMARK))
    assert (found.hours, found.unit, found.at_least) == (pytest.approx(2), "core-hours", True)
    found = plan.cost(make(tmp_path, "ppo", benchmark=BENCHMARK, resources={"gres": "gpu:h100:4"}))
    assert (found.hours, found.unit) == (pytest.approx(2), "GPU-hours")


@pytest.mark.parametrize("benchmark", [None, "", "s\th:m:s\nNA\tNA\n", "x\n1\n"])
def test_unknown_costs_are_not_counted_as_zero(tmp_path, benchmark):
    steps = plan.plan([make(tmp_path, "sft", benchmark=benchmark)])
    assert steps[0].cost.hours is None
    assert plan.total(steps) == {"hours": {}, "stages": 1, "unknown": 1, "at_least": False}
    assert "unknown" in plan.as_text(steps).splitlines()[0]


def test_only_existing_artifacts_are_at_stake(tmp_path):
    jobs = [
        make(tmp_path, "sft", [HOUR]),
        make(tmp_path, "reward", benchmark=BENCHMARK),
        make(tmp_path, "report"),
        make(tmp_path, "data", [HOUR], needed=False),
    ]
    found = plan.as_json(plan.plan(jobs))
    assert [step["name"] for step in found["steps"]] == ["sft", "reward", "report"]
    assert found["at_stake"] == {
        "hours": {"core-hours": pytest.approx(4)},
        "stages": 1,
        "unknown": 0,
        "at_least": False,
    }
    assert found["total"] == {"hours": {"core-hours": pytest.approx(6)}, "stages": 3, "unknown": 1, "at_least": True}
    *_, last = plan.as_text(plan.plan(jobs)).splitlines()
    assert last == "3 stages would run. At stake, what is made and would be made again: 4.00 core-hours, in 1 stages."


def test_nothing_to_do():
    assert plan.as_text([]) == "Nothing to do: all is made, and up to date."


def test_shards_share_one_line(tmp_path):
    steps = plan.plan([make(tmp_path, f"completions/{i}-of-9", [HOUR], rule="completions") for i in range(9)])
    assert plan.as_text(steps).splitlines()[0] == "completions (9)  again  36.00 core-hours  forced"
