"""Launching a stage: what is requested from Slurm, what signals do, when a job is requeued."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tunetrail.errors import TunetrailError
from tunetrail.launch import resources as asked
from tunetrail.launch import submit
from tunetrail.launch import supervise as supervising
from tunetrail.launch.supervise import EXIT_CODE, await_slurm_decision, progress
from tunetrail.launch.time_limit import minutes_left, parse_time_left, stage_environment
from tunetrail.stages.registry import STAGES

ROOT = Path(__file__).parents[2]
STAGE = """
import signal, sys, time
from pathlib import Path

state = Path(sys.argv[sys.argv.index("--state") + 1]) / "f"
state.mkdir(parents=True, exist_ok=True)
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
(state / "log.txt").write_text("x")
print("working", flush=True)
for _ in range(int(sys.argv[1]) if sys.argv[1].isdigit() else 10**6):
    time.sleep(0.05)
    if told:
        (state / "checkpoint-1").write_text("saved")
        print("saved", flush=True)
        sys.exit(75)
sys.exit(3)
"""


def launch(folder: Path, *command: str, **environment: str) -> subprocess.Popen:
    (folder / "stage.py").write_text(STAGE)
    variables = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | environment
    return subprocess.Popen(
        [sys.executable, "-m", "tunetrail.launch", "--stage", "sft", "--jobs", "jobs", "--resources", "{}", "--log",
            "log", "--", sys.executable, "stage.py", *command, "--state", "state"],
        cwd=folder, env=variables, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_output_goes_to_the_log_and_the_exit_code_is_the_stages(tmp_path):
    process = launch(tmp_path, "2")
    assert process.communicate(timeout=60)[1] == "working\n"
    assert process.returncode == 3
    assert (tmp_path / "log").read_text() == "working\n"


def test_a_stage_that_fails_leaves_its_exit_code_for_the_head(tmp_path):
    """The code is no progress: otherwise a job that saves nothing would be requeued."""
    launch(tmp_path, "2").wait()
    assert (tmp_path / "state" / EXIT_CODE).read_text() == "3"
    assert progress(tmp_path / "state") == set()
    (tmp_path / "log").unlink()
    process = launch(tmp_path)
    while not ((tmp_path / "log").exists() and (tmp_path / "log").read_text()):
        time.sleep(0.02)  # a stage that is killed before it works leaves no exit code
    process.send_signal(signal.SIGTERM)
    process.wait()
    assert (tmp_path / "state" / EXIT_CODE).read_text() == "75"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_signals_reach_the_stage_as_sigterm_and_it_saves(tmp_path, signum):
    process = launch(tmp_path)
    while not (tmp_path / "log").exists() or not (tmp_path / "log").read_text():
        time.sleep(0.02)
    process.send_signal(signum)
    assert process.communicate(timeout=60)[1].endswith("saved\n")
    assert process.returncode == 75


def stand_ins(folder: Path, **scripts: str) -> str:
    """Puts these programs first on the PATH."""
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize(("state", "saved", "requeued", "waits"), [
    ("RUNNING", True, True, True),  # the time limit: requeued
    ("RUNNING", False, False, False),  # nothing was saved: it would loop forever
    ("COMPLETING", True, False, True),  # cancelled or preempted: Slurm decides
    ("", True, False, True),
])  # fmt: skip
def test_when_a_job_is_requeued(tmp_path, monkeypatch, state, saved, requeued, waits):
    monkeypatch.setenv("PATH", stand_ins(tmp_path, squeue=f"echo {state}", scontrol=f'echo "$@" > {tmp_path}/told'))
    slept: list[float] = []
    monkeypatch.setattr(supervising.time, "sleep", slept.append)
    await_slurm_decision("42", saved)
    told = tmp_path / "told"
    assert (told.read_text() if told.exists() else "") == ("requeue 42\n" if requeued else "")
    assert bool(slept) == waits


def test_a_job_that_slurm_does_not_requeue_ends(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PATH", stand_ins(tmp_path, squeue="echo RUNNING", scontrol="echo not allowed >&2; exit 1"))
    monkeypatch.setattr(supervising.time, "sleep", lambda s: pytest.fail("it waits"))
    await_slurm_decision("42", True)
    assert "scontrol requeue 42: not allowed" in capfd.readouterr().err


def test_progress_is_state_that_can_be_resumed(tmp_path):
    state = tmp_path / "f"
    (state / "tensorboard").mkdir(parents=True)
    for name in ("log.txt", "attempts.jsonl", "lock", "lock.2", "tensorboard/events.out.tfevents.1"):
        (state / name).write_text("x")
    assert progress(tmp_path) == set()
    (state / "completions.jsonl").write_text("{}\n")
    before = progress(tmp_path)
    (state / "completions.jsonl").write_text("{}\n{}\n")
    assert len(progress(tmp_path) - before) == 1


@pytest.mark.parametrize("damage", [b"", b"{", b"\0" * 9, b"\xff", b"[]", b'{"job": "1"}'])
def test_a_damaged_file_of_a_job_is_set_aside(tmp_path, capsys, damage):
    (tmp_path / "tiny.sft.json").write_bytes(damage)
    assert submit.Jobs(tmp_path).read("tiny.sft") is None
    assert (tmp_path / "tiny.sft.json.damaged").read_bytes() == damage
    assert capsys.readouterr().err == (
        f"{tmp_path}/tiny.sft.json: damaged; set aside as tiny.sft.json.damaged, another job is submitted\n"
    )
    assert submit.Jobs(tmp_path).read("tiny.sft") is None


# ----------------------------------------------------------------------------- what Slurm is asked for


@pytest.mark.parametrize(("resources", "options"), [
    ({"slurm_partition": "cpu", "runtime": 60, "mem_mb": 8000}, {"partition": "cpu", "time": "60", "mem": "8000",
        "ntasks": "1", "cpus-per-task": "3"}),
    ({"gres": "gpu:a100:4", "cpus_per_gpu": 8, "nodes": 2, "qos": "high"}, {"nodes": "2", "qos": "high",
        "cpus-per-gpu": "8", "gres": "gpu:a100:4"}),
    ({"gpu": 8, "gpu_model": "h100", "slurm_account": "lab 7", "slurm_extra": "--exclusive"}, {"account": "lab 7",
        "cpus-per-task": "3", "exclusive": "", "gpus": "h100:8"}),
])  # fmt: skip
def test_resources_become_the_same_options_as_with_the_plugin(resources, options):
    assert asked.sbatch_options(resources, threads=3) == options


@pytest.mark.parametrize(("stage", "resources", "n"), [
    ("sft", {}, 1), ("sft", {"gres": "gpu:1"}, 1), ("ppo", {"gres": "gpu:a100:4", "nodes": 2}, 4), ("dpo", {"gpu": 8,
        "nodes": 2}, 4),
    ("reward", {"gpu_model": "h100"}, 1), ("sft", {"tasks_per_node": 3}, 3), ("sft", {"gres": "gpu"}, 1),
    ("completions", {"gres": "gpu:8"}, 1), ("evaluation", {"tasks_per_node": 2}, 1),
])  # fmt: skip
def test_processes_of_a_node(stage, resources, n):
    assert asked.processes(stage, resources) == n


def test_the_launcher_imports_no_torch():
    """There may be a hundred of them on a login node."""
    script = (
        "import sys, tunetrail.launch.__main__, tunetrail.launch.submit; print(sorted({'torch', 'transformers', "
        "'pandas'} & sys.modules.keys()))"
    )
    reply = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert reply.stdout.strip() == "[]"


def test_training_stages_may_use_several_nodes():
    distributed = {name for name, stage in STAGES.items() if stage.distributed}
    assert distributed == {"sft", "reward", "dpo", "orpo", "simpo", "kto", "ppo"}


def one_of_several(tmp_path: Path, rank: int, *command: str) -> subprocess.CompletedProcess:
    """Runs a command as srun would run one of four processes on two nodes."""
    path = stand_ins(tmp_path, scontrol="printf 'gpu3\\ngpu4\\n'")
    variables = {
        "SLURM_STEP_NODELIST": "gpu[3-4]",
        "SLURM_JOB_ID": "12",
        "SLURM_STEP_ID": "1",
        "SLURM_PROCID": str(rank),
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_LOCALID": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", "tunetrail.launch.task", sys.executable, "-c", *command, "--state", "state"],
        env=os.environ | variables | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_each_of_several_processes_reports_its_rank(tmp_path):
    show = (
        "import os, json; print(json.dumps({k: os.environ[k] for k in ('MASTER_ADDR', 'MASTER_PORT', 'RANK', "
        "'WORLD_SIZE', 'LOCAL_RANK')}))"
    )
    reply = one_of_several(tmp_path, 3, show)
    assert json.loads(reply.stdout) == {
        "MASTER_ADDR": "gpu3",
        "MASTER_PORT": "20373",
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
    }


@pytest.mark.parametrize(
    ("rank", "code", "told"),
    [(0, 0, 0), (0, 75, 75), (0, 1, 1), (2, 0, 0), (2, 75, 0), (2, 76, 0), (2, 1, 1), (2, -9, 137)],
)
def test_srun_kills_the_other_processes_only_after_a_failure(tmp_path, monkeypatch, rank, code, told):
    """With --kill-on-bad-exit. A failing process gives the first one time to exit, which does the same for the
    others."""
    slept: list[float] = []
    monkeypatch.setattr(supervising.time, "sleep", slept.append)
    end = f"import os; os.kill(os.getpid(), {-code})" if code < 0 else f"raise SystemExit({code})"
    own = supervising.supervise([sys.executable, "-c", end], None, tmp_path, requeues=False)
    assert supervising.for_srun(own, rank) == told
    assert bool(slept) == (told > 0 if rank else told == 75)


def test_each_process_exits_with_its_commands_code(tmp_path):
    assert one_of_several(tmp_path, 0, "raise SystemExit(3)").returncode == 3


# ----------------------------------------------------------------------------- submitit

LAUNCHER = """
import sys
from pathlib import Path
from tunetrail.launch import submit

submit.shutil.which = str
submit.GATHER_SECONDS = 60
submit._submit(submit.Jobs(Path("jobs")), sys.argv[1], "key", ["command", sys.argv[1]], "completions", {"array": 1}, 1)
"""


class Slurm:
    """Stands in for submitit's executor."""

    def __init__(self):
        self.submitted: list[list[str]] = []

    def map_array(self, function, commands):
        self.submitted.append([stage.command[1] for stage in commands])
        return [submit.submitit.SlurmJob("jobs", f"7_{n}", tasks=[0]) for n in range(len(commands))]


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Slurm:
    monkeypatch.chdir(tmp_path)
    found = Slurm()
    monkeypatch.setattr(submit, "_executor", lambda *_: found)
    monkeypatch.setattr(submit.shutil, "which", str)
    monkeypatch.setattr(submit, "GATHER_SECONDS", 0)
    return found


def test_an_array_has_all_waiting_requests_except_those_of_killed_launchers(tmp_path, slurm):
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    dead, waiting = (
        subprocess.Popen([sys.executable, "launcher.py", name], cwd=tmp_path) for name in ("dead", "waiting")
    )
    try:
        while len(list(tmp_path.glob("jobs/completions.*/*"))) < 2:
            assert dead.poll() is None
            time.sleep(0.05)
        dead.kill()
        dead.wait()
        jobs = submit.Jobs(Path("jobs"))
        job = submit._submit(jobs, "mine", "key", ["command", "mine"], "completions", {"array": 1}, 1)
    finally:
        waiting.kill()
        waiting.wait()
    assert slurm.submitted == [["mine", "waiting"]]
    assert job.job_id == "7_0"
    assert jobs.read("waiting")[0].job_id == "7_1"
    assert jobs.read("dead") is None


def test_a_signal_while_it_submits_waits_until_the_id_is_written(tmp_path, slurm, monkeypatch):
    came: list[str] = []
    jobs = submit.Jobs(Path("jobs"))
    before = signal.signal(signal.SIGINT, lambda *_: came.append(jobs.read("mine")[0].job_id))
    write = slurm.map_array
    monkeypatch.setattr(slurm, "map_array", lambda *a: (os.kill(os.getpid(), signal.SIGINT), write(*a))[1])
    try:
        submit._submit(jobs, "mine", "key", ["command", "mine"], "completions", {"array": 1}, 1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert came == ["7_0"]


def left(folder: Path, task: int, value: object) -> None:
    """The result that submitit keeps for one process of job 7."""
    (folder / f"7_{task}_result.pkl").write_bytes(pickle.dumps(value))


def test_the_first_process_says_how_a_job_ended_or_another_does_if_it_was_killed(tmp_path):
    job = submit.submitit.SlurmJob(tmp_path, "7", tasks=[0, 1])
    assert submit._outcome(job) is None
    left(tmp_path, 1, ("success", 75))  # it left with the others, which were requeued
    assert submit._outcome(job) is None
    left(tmp_path, 1, ("success", 137))
    with pytest.raises(TunetrailError, match=r"process 1 of job 7 ended with 137, .*; see \S*7_1_log.out"):
        submit._outcome(job)
    left(tmp_path, 0, ("success", 65))
    assert submit._outcome(job) == 65
    left(tmp_path, 0, ("error", "Traceback\n  x\nValueError: no"))
    with pytest.raises(TunetrailError, match="job 7 failed: ValueError: no; see"):
        submit._outcome(job)


# ----------------------------------------------------------------------------- the time that is left


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("30:00", 30),
        ("1:30:00", 90),
        ("2-00:00:00", 2880),
        ("1-02:00:30", 1560.5),
        ("0:45", 0.75),
        ("0:00", 0),
        ("UNLIMITED", None),
        ("NOT_SET", None),
        ("INVALID", None),
        ("", None),
    ],
)
def test_slurm_time_left(text, minutes):
    assert parse_time_left(text) == minutes


@pytest.fixture
def in_job(monkeypatch, tmp_path):
    """A Slurm job; squeue prints what the test says."""
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    for variable in ("TUNETRAIL_TIME_LIMIT", "TUNETRAIL_DEADLINE"):
        monkeypatch.delenv(variable, raising=False)

    def squeue(script: str) -> None:
        monkeypatch.setenv("PATH", stand_ins(tmp_path, squeue=script))

    return squeue


def test_a_stage_learns_when_its_job_ends(in_job, monkeypatch):
    in_job('[ "$*" = "-h -j 42 -o %L" ] && echo 1:00:00')
    assert float(stage_environment()["TUNETRAIL_DEADLINE"]) == pytest.approx(time.time() + 3600, abs=60)
    in_job("exit 1")
    assert "TUNETRAIL_DEADLINE" not in stage_environment()
    in_job("echo 1:00:00")
    for variable in (
        "TUNETRAIL_TIME_LIMIT",
        "TUNETRAIL_DEADLINE",
    ):  # what the user or an outer launcher sets has priority
        with monkeypatch.context() as patched:
            patched.setenv(variable, "10")
            assert stage_environment() == dict(os.environ)
    monkeypatch.delenv("SLURM_JOB_ID")
    assert "TUNETRAIL_DEADLINE" not in stage_environment()


def test_an_array_has_the_time_of_its_shortest_task(in_job):
    in_job("echo 2:00:00; echo 1:00:00; echo UNLIMITED")
    assert minutes_left() == 60


def test_without_squeue_there_is_no_limit(in_job, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert minutes_left() is None


def test_a_supervised_stage_gets_its_deadline(in_job, tmp_path):
    in_job("echo 1:00:00")
    code = "import os; print(os.environ['TUNETRAIL_DEADLINE'])"
    supervising.supervise([sys.executable, "-c", code], tmp_path / "log", tmp_path / "state", requeues=False)
    assert float((tmp_path / "log").read_text()) == pytest.approx(time.time() + 3600, abs=60)
