"""Runs a stage as a separate Slurm job through submitit: on several nodes, with one id for all its attempts.

The launcher is one of Snakemake's local jobs. It submits with the resources that the profile gives the rule, writes the
job's id into the state folder, passes the job's output on and ends with the stage's exit code. If the head process died
and was started again, the launcher finds the id and waits for that job instead of submitting another; if the stage's
config or inputs have changed since, it cancels that job first. Ctrl-C cancels the job. Without Slurm, submitit's local
executor does the same on this machine.
"""

import atexit
import fcntl
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import submitit
from submitit.core.core import Job

from tunetrail.contract.runner import is_finished
from tunetrail.errors import TunetrailError
from tunetrail.files import rename_durably, set_aside, whole_rows
from tunetrail.launch.resources import SRUN, gpus, processes, sbatch_options
from tunetrail.launch.supervise import CLEAN_EXITS, for_srun, option, supervise
from tunetrail.provenance.manifest import sha256_json

POLL_SECONDS = 2.0
GATHER_SECONDS = 3.0
"""How long a launcher waits for other launchers of its stage, to submit all of them as one array."""
SIGNAL_SECONDS = 60
"""How long before a time limit Slurm signals the job; the stage's own clock is earlier (`contract.stop`)."""
STOPPING = (signal.SIGINT, signal.SIGTERM)
ALIVE = {
    "PENDING",
    "RUNNING",
    "CONFIGURING",
    "COMPLETING",
    "SUSPENDED",
    "REQUEUED",
    "REQUEUE_HOLD",
    "REQUEUE_FED",
    "STOPPED",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
    "SPECIAL_EXIT",
}
"""States of a job that has not ended."""


class StageCommand:
    """What each process of the job runs: the stage's command, as one of the processes of torch.distributed."""

    def __init__(self, command: Sequence[str], folder: Path):
        self.command, self.folder = list(command), folder

    def __call__(self) -> int:
        os.chdir(self.folder)
        environment = submitit.JobEnvironment()
        environment.paths.result_pickle.unlink(missing_ok=True)  # from before this job was requeued
        if environment.num_tasks > 1:
            # A node may have failed after everything was published, so that no state is left to resume from.
            if "SLURM_RESTART_COUNT" in os.environ and is_finished(self.command[3:], environment.global_rank == 0):
                return 0
            # runtime.device counts the GPUs of a node: all must be visible
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        code = supervise(self.command, None, option(self.command, "--state"), requeues=environment.global_rank == 0)
        # submitit exits with 0 whatever this returns, so srun would not notice that a process failed.
        atexit.register(os._exit, for_srun(code, environment.global_rank))
        return code


def _executor(folder: Path, name: str, stage: str, resources: Mapping[str, Any], threads: int) -> Any:
    on_each_node = processes(stage, resources)
    if shutil.which("srun") is None:
        local = submitit.LocalExecutor(folder)
        minutes = int(resources.get("runtime") or 10**6)  # without a scheduler there is no time limit
        # Without a number, submitit hides the GPUs.
        local.update_parameters(timeout_min=minutes, tasks_per_node=on_each_node, gpus_per_node=gpus(resources))
        return local
    options = sbatch_options(resources, threads)
    options.pop("ntasks", None)
    cores = (
        [f"--cpus-per-task={options['cpus-per-task']}"] if "cpus-per-task" in options else []
    )  # srun does not inherit it
    executor = submitit.SlurmExecutor(folder)
    executor.update_parameters(
        job_name=name,
        nodes=int(options.pop("nodes", 1)),
        ntasks_per_node=on_each_node,
        signal_delay_s=SIGNAL_SECONDS,
        time=int(resources.get("runtime") or 60),
        stderr_to_stdout=True,
        wckey=None,
        srun_args=[*cores, *SRUN],
        additional_parameters={"requeue": True}
        | {key: value or True for key, value in options.items() if key != "time"},
    )
    return executor


def _is_alive(job: Job) -> bool:
    if isinstance(job, submitit.LocalJob):  # its id is that of submitit's process, whichever launcher started it
        return (job._process is None or job._process.poll() is None) and _process(job.job_id) is not None
    reply = subprocess.run(
        ["squeue", "-h", "-t", "all", "-j", job.job_id, "-o", "%T"], capture_output=True, text=True, check=False
    )
    if reply.returncode and "Invalid job id" not in reply.stderr:
        return True  # the controller is unreachable: nothing is known
    return any(line.strip() in ALIVE for line in reply.stdout.splitlines())


def _process(pid: str) -> str | None:
    """Which process has this id now, by host and time of its start; None if there is none."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return None
    return (
        None
        if state == "Z"
        else f"{socket.gethostname()} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {fields[18]}"
    )


def _cancel(job: Job) -> None:
    """Cancels the job, which saves first, and waits until it has ended."""
    if isinstance(job, submitit.LocalJob):
        os.kill(int(job.job_id), signal.SIGINT)
    else:
        job.cancel()
    while _is_alive(job):
        time.sleep(POLL_SECONDS)


class Jobs:
    """The ids of the jobs that were submitted, in files that outlive the launcher."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, key: str, job: Job) -> None:
        local = _process(job.job_id) if isinstance(job, submitit.LocalJob) else None
        content = {"job": job.job_id, "key": key, "local": local, "tasks": job.num_tasks}
        pending = self.folder / f".{name}"
        pending.write_text(json.dumps(content))
        rename_durably(pending, self.folder / f"{name}.json")

    def read(self, name: str) -> tuple[Job, str] | None:
        """(the job with this name, what it was submitted for); None if there is none."""
        path = self.folder / f"{name}.json"
        try:
            found = whole_rows([path.read_text(errors="replace")], "job", "key", "local", "tasks")
        except FileNotFoundError:
            return None
        if not found:
            print(f"{path}: damaged; set aside as {set_aside(path)}, another job is submitted", file=sys.stderr)
            return None
        content = found[0]
        if content["local"] and content["local"] != _process(content["job"]):
            return None  # it has ended, and another process may have its number
        kind = submitit.LocalJob if content["local"] else submitit.SlurmJob
        return kind(self.folder, content["job"], tasks=list(range(content["tasks"]))), content["key"]

    def forget(self, name: str, job: Job) -> None:
        """Forgets the job, unless another launcher has meanwhile submitted another one under this name."""
        recorded = self.read(name)
        if recorded is None or recorded[0].job_id == job.job_id:
            (self.folder / f"{name}.json").unlink(missing_ok=True)


def _key(command: Sequence[str]) -> str:
    """Equal for two commands that do the same: their words, and the content of their config and inputs."""
    files = [command[n + 1].rpartition("=")[2] for n, word in enumerate(command) if word in ("--config", "--input")]
    return sha256_json({"command": list(command), "files": {name: Path(name).read_text() for name in files}})


@contextmanager
def _signals_deferred() -> Iterator[None]:
    """Defers signals to the end of this block: a job whose id is not yet written down could not be cancelled."""
    pending: list[int] = []
    before = {signum: signal.signal(signum, lambda n, _: pending.append(n)) for signum in STOPPING}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        for first in pending[:1]:
            signal.raise_signal(first)


@contextmanager
def _exclusive(requests: Path) -> Iterator[None]:
    """One launcher at a time reads and submits the requests in a folder."""
    with (requests / ".lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        yield


def _submit(
    jobs: Jobs, name: str, key: str, command: list[str], stage: str, resources: Mapping[str, Any], threads: int
) -> Job:
    """Submits a job; with `array`, all jobs of the stage that are requested within a few seconds as one array."""
    here = Path.cwd()
    if not resources.get("array") or shutil.which("srun") is None:
        with _signals_deferred():
            executor = _executor(jobs.folder, f"{stage}-{name}", stage, resources, threads)
            job = executor.submit(StageCommand(command, here))
            jobs.write(name, key, job)
        return job
    requests = jobs.folder / f"{stage}.{sha256_json({'resources': dict(resources), 'threads': threads})[:16]}"
    requests.mkdir(exist_ok=True)
    pending, launcher = requests / f".{name}", str(os.getpid())
    request = {"name": name, "key": key, "command": command, "launcher": [launcher, _process(launcher)]}
    pending.write_text(json.dumps(request))
    pending.rename(requests / name)
    time.sleep(GATHER_SECONDS)
    with _signals_deferred(), _exclusive(requests):
        if (requests / name).exists():  # otherwise another launcher has submitted it with its own
            paths = [path for path in sorted(requests.iterdir()) if path.name[0] != "."]
            pending_requests = whole_rows((path.read_text(errors="replace") for path in paths), "name", "launcher")
            # Nobody would wait for the job of a killed launcher. A launcher on another host submits its own.
            gathered = [r for r in pending_requests if _process(r["launcher"][0]) == r["launcher"][1]]
            executor = _executor(jobs.folder, stage, stage, resources, threads)
            for submitted, job in zip(
                gathered,
                executor.map_array(StageCommand.__call__, [StageCommand(r["command"], here) for r in gathered]),
                strict=True,
            ):
                jobs.write(submitted["name"], submitted["key"], job)
                (requests / submitted["name"]).unlink()
    known = jobs.read(name)
    assert known is not None
    return known[0]


def _withdraw(jobs: Jobs, stage: str, name: str) -> None:
    """Withdraws a request; if another launcher is just submitting it, it is a job once this returns."""
    for request in jobs.folder.glob(f"{stage}.*/{name}"):
        with _exclusive(request.parent):
            request.unlink(missing_ok=True)


def _outcome(job: Job) -> int | None:
    """The stage's exit code, as its first process has left it; None if it has not.

    Raises TunetrailError if submitit or another of its processes failed, which ends them all.
    """
    for n in range(job.num_tasks):
        paths = job.task(n).paths
        if paths.result_pickle.exists():
            outcome, value = pickle.loads(paths.result_pickle.read_bytes())
            if outcome != "success":
                raise TunetrailError(
                    f"job {job.job_id} failed: {str(value).strip().splitlines()[-1]}; see {paths.stdout}"
                )
            if n == 0:
                return int(value)
            if value not in CLEAN_EXITS:
                raise TunetrailError(
                    f"process {n} of job {job.job_id} ended with {value}, and so the others were ended; see "
                    f"{paths.stdout}"
                )
    return None


def _follow(job: Job, log: Path) -> int:
    """Passes the job's output on until it is over; returns the stage's exit code."""
    output, seen, silent_since = job.task(0).paths.stdout, 0, None
    with log.open("ab") as sink:
        while True:
            alive = _is_alive(job)
            if output.exists():
                with output.open("rb") as f:
                    f.seek(seen)
                    new = f.read()
                seen += len(new)
                for stream in (sys.stderr.buffer, sink):
                    stream.write(new)
                    stream.flush()
            if not alive and (code := _outcome(job)) is not None:
                return code
            if not alive:
                # The result may still be on its way through the file server.
                silent_since = silent_since or time.monotonic()
                if time.monotonic() - silent_since > 10:
                    raise TunetrailError(
                        f"job {job.job_id} ended without a result (cancelled, out of memory, or its node failed); "
                        f"see {output}; run the same command again"
                    )
            time.sleep(POLL_SECONDS)


def launch(command: list[str], stage: str, resources: Mapping[str, Any], threads: int, folder: Path, log: Path) -> int:
    """Submits the stage, or finds the job that already was, and waits. Returns the stage's exit code.

    Raises TunetrailError if the job ended without one.
    """
    jobs = Jobs(folder)
    name = ".".join(option(command, "--output").parent.parts[-2:])
    key = _key(command)
    log.write_bytes(b"")
    several = processes(stage, resources) * int(resources.get("nodes") or 1) > 1
    if several and is_finished(command[3:], declare=True):
        return 0
    job: Job | None = None

    def cancel(signum: int, _: object) -> None:
        _withdraw(jobs, stage, name)
        submitted = jobs.read(name)  # also if another launcher has submitted it with its own
        if submitted and submitted[1] == key and _is_alive(submitted[0]):
            print(f"{stage}: cancelling job {submitted[0].job_id}", file=sys.stderr)
            _cancel(submitted[0])
            jobs.forget(name, submitted[0])
        raise SystemExit(128 + signum)

    for signum in STOPPING:
        signal.signal(signum, cancel)
    found = jobs.read(name)
    if found and _is_alive(found[0]):
        if found[1] == key:
            job = found[0]
            print(f"{stage}: job {job.job_id} is there already; waiting for it", file=sys.stderr)
        else:
            print(
                f"{stage}: job {found[0].job_id} works from another config or other inputs; cancelling it",
                file=sys.stderr,
            )
            _cancel(found[0])
    if job is None:
        job = _submit(jobs, name, key, command, stage, resources, threads)
        print(f"{stage}: submitted as job {job.job_id}", file=sys.stderr)
    try:
        return _follow(job, log)
    finally:
        jobs.forget(name, job)
