"""Whether a site's Slurm can run the workflow, before it does: what the profile asks for beside what the site has.

Each check ends as one `Check`; what does not hold comes with its mend. What a rule asks for is what Snakemake evaluates
from the profile, written by the same code as its sbatch line; the last word on it has `sbatch --test-only`.
"""

import fcntl
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunetrail.errors import ConfigError
from tunetrail.launch.resources import SLURM, gpus, sbatch_options
from tunetrail.launch.time_limit import parse_time_left
from tunetrail.monitor.dag import Job

COMMANDS = ("sinfo", "sbatch", "srun", "squeue", "scontrol", "scancel")
SOUND, FINDING, UNKNOWN = 0, 1, 2
UP = ("idle", "mixed", "allocated", "completing", "reserved", "planned")
"""States of a node that runs jobs, or will once others end."""
MIN_JOB_AGE = 60
"""Seconds; three times the profile's slurm-init-seconds-before-status-checks."""
SEEN_SECONDS = 60
"""How long a file from a node may take to show up here; also the profile's latency-wait."""


@dataclass(frozen=True)
class Check:
    """What one look told."""

    name: str
    level: int
    """SOUND, FINDING, or UNKNOWN where it could not be looked."""
    text: str
    mend: str = ""

    def __str__(self) -> str:
        word = {SOUND: "ok", FINDING: "FINDING", UNKNOWN: "unknown"}[self.level]
        return f"{word:8} {self.name}: {self.text}" + (f"; {self.mend}" if self.mend else "")


@dataclass(frozen=True)
class Nodes:
    """The nodes of one kind in a partition, as sinfo tells."""

    partition: str
    up: bool
    minutes: float
    """The partition's time limit; infinite where there is none."""
    mem_mb: int
    cpus: int
    gpus: dict[str, int]
    """Type ("" without) -> GPUs a node."""
    state: str
    count: int


def read_gres(text: str) -> dict[str, int]:
    """
    >>> read_gres("gpu:a100:4(S:0-1),shard:8,gpu:2")
    {'a100': 4, '': 2}
    """
    found: dict[str, int] = {}
    for entry in re.sub(r"\([^)]*\)", "", text).split(","):
        name, *rest = entry.strip().split(":")
        if name == "gpu":
            kind = rest[0] if rest and not rest[0].isdigit() else ""
            count = int(rest[-1]) if rest and rest[-1].isdigit() else 1
            found[kind] = found.get(kind, 0) + count
    return found


def read_sinfo(text: str) -> list[Nodes]:
    """The lines of `sinfo -h -a -e -o %R|%a|%l|%m|%c|%G|%T|%D`."""
    found = []
    for line in text.splitlines():
        name, up, limit, memory, cpus, gres, state, count = line.split("|")
        minutes = parse_time_left(limit)
        found.append(
            Nodes(name, up == "up", math.inf if minutes is None else minutes, int(memory), int(cpus), read_gres(gres), state, int(count))
        )  # fmt: skip
    return found


@dataclass(frozen=True)
class Wish:
    """What a rule asks of each node."""

    rule: str
    partition: str
    minutes: float
    mem_mb: int
    cpus: int
    gpus: dict[str, int]
    options: dict[str, str]
    """Of sbatch."""
    launcher: str = "inline"


def wishes(jobs: list[Job]) -> list[Wish]:
    """One for each rule. Raises ConfigError where no rule names a partition: the profile is none for Slurm."""
    found: dict[str, Wish] = {}
    for job in jobs:
        given = {name: job.resources[name] for name in SLURM if job.resources.get(name) not in (None, "", "<TBD>")}
        n, nodes = gpus(given), int(given.get("nodes") or 1)
        kinds = read_gres(str(given.get("gres") or "")) or (
            {str(given.get("gpu_model") or ""): math.ceil(n / nodes)} if n else {}
        )
        cpus = int(given.get("cpus_per_gpu") or 0) * math.ceil(n / nodes) or int(
            given.get("cpus_per_task") or job.threads
        )
        found.setdefault(
            job.rule,
            Wish(job.rule, str(given.get("slurm_partition", "")), float(given.get("runtime") or 0), int(given.get("mem_mb") or 0), cpus, kinds, sbatch_options(given, job.threads), str(job.resources.get("launcher") or "inline")),
        )  # fmt: skip
    if not any(wish.partition for wish in found.values()):
        raise ConfigError(
            "no rule has a slurm_partition in this profile; give --profile the one for your Slurm site, such as profiles/slurm"
        )
    return list(found.values())


def _holds(kind: str, n: int, nodes: Nodes) -> bool:
    return (sum(nodes.gpus.values()) if kind == "" else nodes.gpus.get(kind, 0)) >= n


def misfits(wish: Wish, nodes: list[Nodes]) -> list[Check]:
    """What a rule asks for that no node of its partition has."""
    mine, name = [n for n in nodes if n.partition == wish.partition], f"rule {wish.rule}"
    if not mine:
        return []  # told once, for the partition
    where, found = f"set-resources: {wish.rule} of the profile", []
    limit, memory, cpus = max(n.minutes for n in mine), max(n.mem_mb for n in mine), max(n.cpus for n in mine)
    if wish.minutes > limit:
        found.append(
            Check(
                name,
                FINDING,
                f"asks for {wish.minutes:g} minutes, {wish.partition} gives at most {limit:g}",
                f"set runtime to {limit:g} in {where}; the stage goes on in the next job",
            )
        )
    if wish.mem_mb > memory:
        found.append(
            Check(
                name,
                FINDING,
                f"asks for {wish.mem_mb} MB a node, those of {wish.partition} have at most {memory}",
                f"lower mem_mb in {where}, or name another partition",
            )
        )
    if wish.cpus > cpus:
        found.append(
            Check(
                name,
                FINDING,
                f"asks for {wish.cpus} CPUs a node, those of {wish.partition} have at most {cpus}",
                f"lower cpus_per_gpu (or set-threads) in {where}",
            )
        )
    for kind, n in wish.gpus.items():
        if not any(_holds(kind, n, m) for m in mine):
            has = ", ".join(sorted({f"{k or 'gpu'}:{c}" for m in mine for k, c in m.gpus.items()})) or "none"
            found.append(
                Check(
                    name,
                    FINDING,
                    f"asks for {n} GPUs{f' of type {kind}' if kind else ''} a node, those of {wish.partition} have {has}",
                    f"change gres in {where}, or name a partition with such GPUs",
                )
            )
    return found


def check_commands() -> list[Check]:
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        return [
            Check(
                "commands",
                UNKNOWN,
                f"not found here: {', '.join(missing)}",
                "run this on a login node, or load the module that brings Slurm's commands",
            )
        ]
    return [Check("commands", SOUND, ", ".join(COMMANDS))]


def _run(command: list[str], seconds: float) -> tuple[int, str, str]:
    """(exit code, stdout, stderr); 124 where it took too long."""
    try:
        reply = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return 124, "", f"no answer within {seconds:.0f} s"
    return reply.returncode, reply.stdout, reply.stderr


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"


def check_partitions(asked: list[Wish], nodes: list[Nodes]) -> list[Check]:
    """Whether each partition that rules name is there, is up, and has a node that works."""
    found = []
    known = sorted({n.partition for n in nodes})
    for name in sorted({wish.partition for wish in asked}):
        rules = ", ".join(wish.rule for wish in asked if wish.partition == name)
        mine = [n for n in nodes if n.partition == name]
        working = sum(n.count for n in mine if n.state.rstrip("*~#!%$@^-+") in UP and not n.state.endswith("*"))
        label = f"partition {name or '(none)'}"
        if not name:
            found.append(
                Check(
                    label,
                    FINDING,
                    f"{rules}: no partition is named, and the site's default may have no GPU",
                    "give them a slurm_partition in the profile",
                )
            )
        elif not mine:
            found.append(
                Check(
                    label,
                    FINDING,
                    f"there is none ({rules} go there)",
                    f"name one of {', '.join(known)} at the top of the profile",
                )
            )
        elif not any(n.up for n in mine):
            found.append(Check(label, FINDING, f"is not up ({rules} go there)", "name another, or ask the site"))
        elif not working:
            states = ", ".join(sorted({n.state for n in mine}))
            found.append(
                Check(
                    label, FINDING, f"no node of it works: {states}", "name another, or ask the site; sinfo -R says why"
                )
            )
        else:
            found.append(Check(label, SOUND, f"up, {working} of {sum(n.count for n in mine)} nodes work ({rules})"))
    return found


def read_settings(text: str) -> dict[str, str]:
    """`Name = value` lines of `scontrol show config`, or the `Name=value` words of one of `scontrol -o show partition`.

    >>> read_settings("PartitionName=gpu PreemptMode=CANCEL")["PreemptMode"]
    'CANCEL'
    """
    return dict(re.findall(r"^(\w+) *= (.*)$", text, re.MULTILINE) or re.findall(r"(\w+)=(\S*)", text))


def check_preemption(asked: list[Wish], partitions: str, nodes: str) -> list[Check]:
    """Partitions where a job that is preempted is not requeued: nothing tells Snakemake that it is gone.

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
    for name in sorted({wish.partition for wish in asked if wish.launcher == "inline"} & of.keys()):
        above = sorted(other for other in of if tier[other] > tier[name] and on.get(other, set()) & on.get(name, set()))
        if above and of[name]["PreemptMode"].startswith("CANCEL"):
            rules = ", ".join(wish.rule for wish in asked if wish.partition == name and wish.launcher == "inline")
            found.append(
                Check(
                    f"partition {name}",
                    FINDING,
                    f"jobs of {', '.join(above)} cancel those of it (PreemptMode=CANCEL), and snakemake would wait for them for ever ({rules} go there)",
                    "give these rules `launcher: submitit`, whose jobs are submitted again, or name a partition that requeues",
                )
            )
    return found


def check_job_age(config: str) -> list[Check]:
    """Whether the controller remembers jobs that are over for long enough (`scontrol show config`), where sacct is there."""
    age = re.match(r"\d+", read_settings(config).get("MinJobAge", ""))
    if age and int(age[0]) < MIN_JOB_AGE and shutil.which("sacct"):
        return [
            Check(
                "scontrol show config",
                FINDING,
                f"Slurm forgets a job {age[0]} s after its end (MinJobAge); snakemake then asks sacct, which never tells of a cancelled job",
                f"set slurm-init-seconds-before-status-checks in the profile to a third of that, or ask the site for {MIN_JOB_AGE}",
            )
        ]
    return []


def check_request(wish: Wish) -> Check:
    """What Slurm itself says of the rule's sbatch line. Nothing is submitted."""
    options = [f"--{name}={value}" if value else f"--{name}" for name, value in wish.options.items()]
    code, _, said = _run(["sbatch", "--test-only", *options, "--wrap=true"], 60)
    name = f"rule {wish.rule}"
    if code == 124:
        return Check(name, UNKNOWN, f"sbatch: {said}", "look again once slurmctld answers (scontrol ping)")
    if code:
        reason = _last(said).removeprefix("allocation failure: ").removeprefix("sbatch: error: ")
        return Check(
            name,
            FINDING,
            f"Slurm refuses sbatch {' '.join(options)} ({reason})",
            "change the rule's resources or the account in the profile",
        )
    return Check(name, SOUND, " ".join(options))


# ----------------------------------------------------------------------------- on a node

PROBE = """
import fcntl, importlib, json, os, platform, sys
folder, name = sys.argv[1], sys.argv[2]
told = {"host": platform.node(), "python": sys.version.split()[0], "missing": [], "visible": os.environ.get("CUDA_VISIBLE_DEVICES", "")}
try:
    told["head"] = open(os.path.join(folder, "head")).read()
    work = os.path.join(folder, "." + name)
    os.mkdir(work)
    with open(os.path.join(work, ".told"), "w") as f:
        f.write(told["head"])
    os.rename(work, os.path.join(folder, name))
    os.rename(os.path.join(folder, name, ".told"), os.path.join(folder, name, "told"))
    with open(os.path.join(folder, "lock"), "r+") as f:
        try:
            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            told["lock"] = "free"
        except (BlockingIOError, PermissionError):
            told["lock"] = "held"
        except OSError as e:
            told["lock"] = str(e)
except OSError as e:
    told["disk"] = str(e)
for module in ("tunetrail.contract", "torch", "transformers", "trl", "snakemake"):
    try:
        importlib.import_module(module)
    except Exception as e:
        told["missing"].append(f"{module} ({type(e).__name__}: {e})")
torch = sys.modules.get("torch")
told["torch_gpus"] = torch.cuda.device_count() if torch and hasattr(torch, "cuda") else 0
told["cuda"] = getattr(torch.version, "cuda", None) if torch and hasattr(torch, "version") else None
print("TOLD " + json.dumps(told))
"""
"""What runs on a node: publishes a file as a stage does, and looks for the lock that the doctor holds, as leases are.

Python's own library will do, since whether ours is there is the question.
"""


def check_node(wish: Wish, folder: Path, wait_seconds: float) -> list[Check]:
    """Looks from a node of the rule's partition, with a small job: the shared folder, the software, the GPUs."""
    name = f"node of {wish.partition}"
    kind = next(iter(wish.gpus), None)
    gres = [f"--gres=gpu{f':{kind}' if kind else ''}:1"] if kind is not None else []
    kept = [f"--{key}={value}" for key, value in wish.options.items() if key in ("account", "qos", "constraint")]
    command = [
        "srun", f"--partition={wish.partition}", *kept, *gres, "--nodes=1", "--ntasks=1", "--cpus-per-task=1", "--mem=4000",
        "--time=10", f"--immediate={wait_seconds:.0f}", "--job-name=tunetrail-doctor", sys.executable, "-c", PROBE, str(folder), wish.partition,
    ]  # fmt: skip
    code, out, said = _run(command, wait_seconds + 300)
    line = next((line for line in out.splitlines() if line.startswith("TOLD ")), None)
    if line is None:
        if code == 124 or "immediate" in said.lower() or "Unable to allocate" in said:
            return [
                Check(
                    name,
                    UNKNOWN,
                    f"no job ran within {wait_seconds:.0f} s ({_last(said)})",
                    "look again when it is less busy, or with a longer --wait",
                )
            ]
        return [
            Check(
                name,
                FINDING,
                f"{sys.executable} does not run there ({_last(said)})",
                "put the environment and the clone on a file system that the nodes mount",
            )
        ]
    return read_told(
        name,
        json.loads(line.removeprefix("TOLD ")),
        folder / wish.partition / "told",
        (folder / "head").read_text(),
        bool(gres),
    )


def _shows_up(path: Path, content: str, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(FileNotFoundError):
            # Listing a folder makes a file server's client look again.
            if all(p in p.parent.iterdir() for p in (path.parent, path)) and path.read_text() == content:
                return True
        time.sleep(0.5)
    return False


def read_told(name: str, told: dict[str, Any], written: Path, content: str, with_gpu: bool) -> list[Check]:
    """Checks what the job on a node told.

    Args:
        written: the file that it wrote in the shared folder, and that has `content` then.
    """
    host, shared = told["host"], written.parents[2]
    found = []
    if "disk" in told:
        found.append(
            Check(
                name,
                FINDING,
                f"{host} cannot read and write {shared} ({told['disk']})",
                "clone to a file system that the nodes mount and you may write to",
            )
        )
    elif told["head"] != content or not _shows_up(written, content, SEEN_SECONDS):
        found.append(
            Check(
                name,
                FINDING,
                f"what {host} writes to {shared} is not seen here within {SEEN_SECONDS} s",
                "clone to a file system that all nodes share, or raise latency-wait in the profile",
            )
        )
    elif told["lock"] == "free":
        found.append(
            Check(
                name,
                FINDING,
                f"{host} does not see a lock that is held here in {shared}, and two attempts at one stage could both write",
                "clone to a file system with locks across nodes (NFS not mounted with nolock, Lustre with -o flock)",
            )
        )
    elif told["lock"] != "held":
        found.append(
            Check(
                name,
                FINDING,
                f"{shared} has no locks on {host} ({told['lock']}), and no stage starts without",
                "clone to a file system with locks across nodes (Lustre is mounted with -o flock)",
            )
        )
    if told["missing"]:
        found.append(
            Check(
                name,
                FINDING,
                f"{host} cannot import {', '.join(told['missing'])}",
                "install envs/requirements.txt where the nodes see it, and start from that environment",
            )
        )
    if with_gpu and not told["visible"]:
        found.append(
            Check(
                name,
                FINDING,
                f"Slurm gave no GPU to a job on {host} that asked for one (CUDA_VISIBLE_DEVICES is empty)",
                "check gres in the profile; else ask the site about its gres.conf",
            )
        )
    elif with_gpu and not told["torch_gpus"]:
        build = f"built for CUDA {told['cuda']}" if told["cuda"] else "built without CUDA"
        found.append(
            Check(
                name,
                FINDING,
                f"torch, {build}, sees no GPU on {host} although Slurm gave {told['visible']}",
                "install torch for CUDA (envs/), or one that the driver there (nvidia-smi) can run",
            )
        )
    gpu = f", {told['torch_gpus']} GPU seen" if with_gpu else ""
    return found or [
        Check(name, SOUND, f"{host}: shares this folder, imports the software on Python {told['python']}{gpu}")
    ]


def diagnose(jobs: list[Job], with_jobs: bool, wait_seconds: float, tell: Callable[[Check], None]) -> list[Check]:
    """Every check in turn, each told as soon as it is known.

    Args:
        with_jobs: also run a small job in each partition.
        wait_seconds: for such a job to begin.
    """
    found: list[Check] = []

    def add(checks: list[Check]) -> None:
        for check in checks:
            found.append(check)
            tell(check)

    asked = wishes(jobs)
    add(check_commands())
    if found[-1].level:
        return found
    code, out, said = _run(["sinfo", "-h", "-a", "-e", "-o", "%R|%a|%l|%m|%c|%G|%T|%D"], 60)
    if code:
        add([Check("sinfo", UNKNOWN, _last(said), "see whether slurmctld answers: scontrol ping")])
        return found
    nodes = read_sinfo(out)
    add(check_partitions(asked, nodes))
    add(
        check_preemption(
            asked,
            _run(["scontrol", "-o", "show", "partition"], 60)[1],
            _run(["sinfo", "-h", "-a", "-N", "-o", "%R|%N"], 60)[1],
        )
    )
    add(check_job_age(_run(["scontrol", "show", "config"], 60)[1]))
    there = {n.partition for n in nodes}
    for wish in asked:
        if wish.partition in there:
            add(misfits(wish, nodes) or [check_request(wish)])
    if with_jobs:
        # The rule that asks for most in each partition stands for it: one with a GPU, where there is one.
        chosen = {
            wish.partition: wish for wish in sorted(asked, key=lambda wish: len(wish.gpus)) if wish.partition in there
        }
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=Path.cwd()) as name:
            folder = Path(name)
            (folder / "head").write_text(f"{time.time_ns()}")
            with (folder / "lock").open("w") as lock:
                with suppress(OSError):  # without locks the nodes tell
                    fcntl.lockf(lock, fcntl.LOCK_EX)
                for partition in sorted(chosen):
                    add(check_node(chosen[partition], folder, wait_seconds))
    return found


def exit_code(found: list[Check]) -> int:
    """1 where something is to mend, 2 where something could not be looked at, else 0."""
    levels = {check.level for check in found}
    return FINDING if FINDING in levels else UNKNOWN if UNKNOWN in levels else SOUND
