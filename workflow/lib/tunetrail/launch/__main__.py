"""See `tunetrail.launch`. Exits with the stage's code, which is also in the file EXIT_CODE for the head process."""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunetrail.contract.runner import is_finished
from tunetrail.errors import ConfigError, TunetrailError
from tunetrail.launch.resources import SRUN, gpus, processes
from tunetrail.launch.supervise import EXIT_CODE, option, supervise
from tunetrail.terminal import LINES, escape


def _step(command: list[str], stage: str, resources: Mapping[str, Any], threads: int) -> list[str]:
    """The command as a step of the Slurm job around us: only a step gets SIGTERM when the job ends."""
    n = processes(stage, resources)
    if int(resources.get("nodes") or 1) > 1:
        raise ConfigError(
            f"nodes: {resources['nodes']} needs `launcher: submitit` in set-resources: {stage} of the profile"
        )
    cores = int(resources.get("cpus_per_gpu") or 0) * gpus(resources) or int(resources.get("cpus_per_task") or threads)
    step = ["srun", "--overlap", "--nodes=1", f"--ntasks={n}", f"--cpus-per-task={max(1, cores // n)}", *SRUN]
    return step + ([sys.executable, "-m", "tunetrail.launch.task"] if n > 1 else []) + command


def _run(args: argparse.Namespace) -> int:
    """Runs the stage and returns its exit code. Raises TunetrailError if it cannot be started."""
    if args.resources.get("launcher", "inline") == "submitit":
        from tunetrail.launch.submit import launch

        return launch(args.command, args.stage, args.resources, args.threads, args.jobs, args.log)
    in_job = "SLURM_JOB_ID" in os.environ and shutil.which("srun") is not None
    if in_job and processes(args.stage, args.resources) > 1 and is_finished(args.command[3:], declare=True):
        return 0
    command = _step(args.command, args.stage, args.resources, args.threads) if in_job else args.command
    return supervise(command, args.log, option(args.command, "--state"), requeues=in_job)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tunetrail.launch")
    parser.add_argument("--stage", required=True)
    parser.add_argument("--jobs", type=Path, required=True, help="folder for the ids of submitted jobs")
    parser.add_argument("--resources", type=json.loads, required=True, help="those of the rule, JSON")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("command", nargs="+", help="-- and the stage's command")
    args = parser.parse_args(argv)
    note = option(args.command, "--state") / EXIT_CODE
    note.unlink(missing_ok=True)
    try:
        code = _run(args)
    except TunetrailError as e:
        print(f"{args.stage}: error: {escape(e, LINES)}", file=sys.stderr)
        code = e.exit_code
    if code:  # a killed one leaves none
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(str(code), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
