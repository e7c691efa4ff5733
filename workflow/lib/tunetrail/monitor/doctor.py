"""Checks in advance whether a site's Slurm can run the workflow: what the profile requests against what the site has.

Each check gives one `Check`; problems come with their fixes. The requests of a rule are those that Snakemake evaluates
from the profile, turned into sbatch options by the code that submits it; `sbatch --test-only` decides in the end.
"""

import fcntl
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tunetrail.monitor.dag import Job
from tunetrail.monitor.node_probe import check_node
from tunetrail.monitor.site import FINDING, SOUND, UNKNOWN, Check, read_sinfo, requests, unknown
from tunetrail.monitor.site_checks import (
    check_commands,
    check_job_age,
    check_partitions,
    check_preemption,
    check_request,
    last_line,
    misfits,
    run,
)


def diagnose(jobs: list[Job], with_jobs: bool, wait_seconds: float, tell: Callable[[Check], None]) -> list[Check]:
    """Every check in turn, each reported as soon as it is known.

    Args:
        with_jobs: also run a small job in each partition.
        wait_seconds: for such a job to begin.
    """
    found: list[Check] = []

    def add(checks: list[Check]) -> None:
        for check in checks:
            found.append(check)
            tell(check)

    asked = requests(jobs)
    add(check_commands())
    if found[-1].level:
        return found
    code, out, said = run(["sinfo", "-h", "-a", "-e", "-o", "%R|%a|%l|%m|%c|%G|%T|%D"], 60)
    if code:
        add([unknown("sinfo", last_line(said), "see whether slurmctld answers: scontrol ping")])
        return found
    nodes = read_sinfo(out)
    add(check_partitions(asked, nodes))
    add(
        check_preemption(
            asked,
            run(["scontrol", "-o", "show", "partition"], 60)[1],
            run(["sinfo", "-h", "-a", "-N", "-o", "%R|%N"], 60)[1],
        )
    )
    add(check_job_age(run(["scontrol", "show", "config"], 60)[1]))
    there = {n.partition for n in nodes}
    for request in asked:
        if request.partition in there:
            add(misfits(request, nodes) or [check_request(request)])
    if with_jobs:
        # The rule with the largest request in each partition represents it: one with a GPU, if there is one.
        chosen = {
            request.partition: request
            for request in sorted(asked, key=lambda request: len(request.gpus))
            if request.partition in there
        }
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=Path.cwd()) as name:
            folder = Path(name)
            (folder / "head").write_text(f"{time.time_ns()}")
            with (folder / "lock").open("w") as lock:
                with suppress(OSError):  # without locks the nodes report it
                    fcntl.lockf(lock, fcntl.LOCK_EX)
                for partition in sorted(chosen):
                    add(check_node(chosen[partition], folder, wait_seconds))
    return found


def exit_code(found: list[Check]) -> int:
    """1 if there is something to fix, 2 if something could not be checked, else 0."""
    levels = {check.level for check in found}
    return FINDING if FINDING in levels else UNKNOWN if UNKNOWN in levels else SOUND
