"""Checks that need no job: commands, partitions, preemption, limits, and sbatch's own test."""

import re
import shutil
import subprocess

from tunetrail.monitor.site import SOUND, Check, Nodes, ResourceRequest, finding, read_settings, unknown

COMMANDS = ("sinfo", "sbatch", "srun", "squeue", "scontrol", "scancel")
UP = ("idle", "mixed", "allocated", "completing", "reserved", "planned")
"""States of a node that runs jobs, or will once other jobs end."""
MIN_JOB_AGE = 60
"""Seconds; three times the profile's slurm-init-seconds-before-status-checks."""


def check_commands() -> list[Check]:
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        return [
            unknown(
                "commands",
                f"not found here: {', '.join(missing)}",
                "run this on a login node, or load the module that brings Slurm's commands",
            )
        ]
    return [Check("commands", SOUND, ", ".join(COMMANDS))]


def run(command: list[str], seconds: float) -> tuple[int, str, str]:
    """(exit code, stdout, stderr); 124 if it took too long."""
    try:
        reply = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return 124, "", f"no answer within {seconds:.0f} s"
    return reply.returncode, reply.stdout, reply.stderr


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"


def _holds(kind: str, n: int, nodes: Nodes) -> bool:
    return (sum(nodes.gpus.values()) if kind == "" else nodes.gpus.get(kind, 0)) >= n


def misfits(request: ResourceRequest, nodes: list[Nodes]) -> list[Check]:
    """What a rule requests that no node of its partition has."""
    own, name = [n for n in nodes if n.partition == request.partition], f"rule {request.rule}"
    if not own:
        return []  # reported once, for the partition
    where, checks = f"set-resources: {request.rule} of the profile", []
    limit, memory, cpus = max(n.minutes for n in own), max(n.mem_mb for n in own), max(n.cpus for n in own)
    if request.minutes > limit:
        checks.append(
            finding(
                name,
                f"asks for {request.minutes:g} minutes, {request.partition} gives at most {limit:g}",
                f"set runtime to {limit:g} in {where}; the stage goes on in the next job",
            )
        )
    if request.mem_mb > memory:
        checks.append(
            finding(
                name,
                f"asks for {request.mem_mb} MB per node, those of {request.partition} have at most {memory}",
                f"lower mem_mb in {where}, or name another partition",
            )
        )
    if request.cpus > cpus:
        checks.append(
            finding(
                name,
                f"asks for {request.cpus} CPUs per node, those of {request.partition} have at most {cpus}",
                f"lower cpus_per_gpu (or set-threads) in {where}",
            )
        )
    for kind, n in request.gpus.items():
        if not any(_holds(kind, n, m) for m in own):
            has = ", ".join(sorted({f"{k or 'gpu'}:{c}" for m in own for k, c in m.gpus.items()})) or "none"
            checks.append(
                finding(
                    name,
                    f"asks for {n} GPUs{f' of type {kind}' if kind else ''} per node, those of {request.partition} "
                    f"have {has}",
                    f"change gres in {where}, or name a partition with such GPUs",
                )
            )
    return checks


def check_partitions(asked: list[ResourceRequest], nodes: list[Nodes]) -> list[Check]:
    """Whether each partition that rules name exists, is up, and has a working node."""
    checks = []
    known = sorted({n.partition for n in nodes})
    for name in sorted({request.partition for request in asked}):
        rules = ", ".join(request.rule for request in asked if request.partition == name)
        own = [n for n in nodes if n.partition == name]
        working = sum(n.count for n in own if n.state.rstrip("*~#!%$@^-+") in UP and not n.state.endswith("*"))
        label = f"partition {name or '(none)'}"
        if not name:
            checks.append(
                finding(
                    label,
                    f"{rules}: no partition is named, and the site's default may have no GPU",
                    "give them a slurm_partition in the profile",
                )
            )
        elif not own:
            checks.append(
                finding(
                    label,
                    f"there is none ({rules} go there)",
                    f"name one of {', '.join(known)} at the top of the profile",
                )
            )
        elif not any(n.up for n in own):
            checks.append(finding(label, f"is not up ({rules} go there)", "name another, or ask the site"))
        elif not working:
            states = ", ".join(sorted({n.state for n in own}))
            checks.append(
                finding(label, f"no node of it works: {states}", "name another, or ask the site; sinfo -R says why")
            )
        else:
            checks.append(Check(label, SOUND, f"up, {working} of {sum(n.count for n in own)} nodes work ({rules})"))
    return checks


def check_preemption(asked: list[ResourceRequest], partitions: str, nodes: str) -> list[Check]:
    """Finds partitions in which preempted jobs are not requeued: Snakemake would never learn that they are gone.

    Args:
        partitions: `scontrol -o show partition`.
        nodes: the lines `partition|node` of `sinfo -h -a -N -o %R|%N`.
    """
    of = {found["PartitionName"]: found for found in map(read_settings, partitions.splitlines()) if found}
    tier = {name: int(found["PriorityTier"]) for name, found in of.items()}
    on: dict[str, set[str]] = {}
    for name, node in (line.split("|") for line in nodes.splitlines()):
        on.setdefault(name, set()).add(node)
    found = []
    for name in sorted({request.partition for request in asked if request.launcher == "inline"} & of.keys()):
        above = sorted(other for other in of if tier[other] > tier[name] and on.get(other, set()) & on.get(name, set()))
        if above and of[name]["PreemptMode"].startswith("CANCEL"):
            rules = ", ".join(
                request.rule for request in asked if request.partition == name and request.launcher == "inline"
            )
            found.append(
                finding(
                    f"partition {name}",
                    f"jobs of {', '.join(above)} cancel those of it (PreemptMode=CANCEL), and snakemake would wait "
                    f"for them forever ({rules} go there)",
                    "give these rules `launcher: submitit`, whose jobs are submitted again, or name a partition that "
                    "requeues",
                )
            )
    return found


def check_job_age(config: str) -> list[Check]:
    """Whether the controller remembers ended jobs for long enough (`scontrol show config`), if sacct is
    there.
    """
    age = re.match(r"\d+", read_settings(config).get("MinJobAge", ""))
    if age and int(age[0]) < MIN_JOB_AGE and shutil.which("sacct"):
        return [
            finding(
                "scontrol show config",
                f"Slurm forgets a job {age[0]} s after its end (MinJobAge); snakemake then asks sacct, which never "
                "tells of a cancelled job",
                "set slurm-init-seconds-before-status-checks in the profile to a third of that, or ask the site for "
                f"{MIN_JOB_AGE}",
            )
        ]
    return []


def check_request(request: ResourceRequest) -> Check:
    """What Slurm itself says about the rule's sbatch line. Nothing is submitted."""
    options = [f"--{name}={value}" if value else f"--{name}" for name, value in request.options.items()]
    code, _, said = run(["sbatch", "--test-only", *options, "--wrap=true"], 60)
    name = f"rule {request.rule}"
    if code == 124:
        return unknown(name, f"sbatch: {said}", "look again once slurmctld answers (scontrol ping)")
    if code:
        reason = last_line(said).removeprefix("allocation failure: ").removeprefix("sbatch: error: ")
        return finding(
            name,
            f"Slurm refuses sbatch {' '.join(options)} ({reason})",
            "change the rule's resources or the account in the profile",
        )
    return Check(name, SOUND, " ".join(options))
