"""Reads what rules request from Slurm and what a site has into data that can be compared."""

import math
import re
from dataclasses import dataclass

from tunetrail.errors import ConfigError
from tunetrail.launch.resources import SLURM, gpus, sbatch_options
from tunetrail.launch.time_limit import parse_time_left
from tunetrail.monitor.dag import Job

SOUND, FINDING, UNKNOWN = 0, 1, 2


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    level: int
    """SOUND, FINDING, or UNKNOWN if it could not be checked."""
    text: str
    fix: str = ""

    def __str__(self) -> str:
        word = {SOUND: "ok", FINDING: "FINDING", UNKNOWN: "unknown"}[self.level]
        return f"{word:8} {self.name}: {self.text}" + (f"; {self.fix}" if self.fix else "")


def finding(name: str, text: str, fix: str) -> Check:
    return Check(name, FINDING, text, fix)


def unknown(name: str, text: str, fix: str) -> Check:
    return Check(name, UNKNOWN, text, fix)


@dataclass(frozen=True)
class Nodes:
    """The nodes of one kind in a partition, from sinfo."""

    partition: str
    up: bool
    minutes: float
    """The partition's time limit; infinite if there is none."""
    mem_mb: int
    cpus: int
    gpus: dict[str, int]
    """Type ("" without) -> GPUs per node."""
    state: str
    count: int


def read_gres(text: str) -> dict[str, int]:
    """
    >>> read_gres("gpu:a100:4(S:0-1),shard:8,gpu:2")
    {'a100': 4, '': 2}
    """
    counts: dict[str, int] = {}
    for entry in re.sub(r"\([^)]*\)", "", text).split(","):
        name, *rest = entry.strip().split(":")
        if name == "gpu":
            kind = rest[0] if rest and not rest[0].isdigit() else ""
            count = int(rest[-1]) if rest and rest[-1].isdigit() else 1
            counts[kind] = counts.get(kind, 0) + count
    return counts


def read_sinfo(text: str) -> list[Nodes]:
    """The lines of `sinfo -h -a -e -o %R|%a|%l|%m|%c|%G|%T|%D`."""
    nodes = []
    for line in text.splitlines():
        name, up, limit, memory, cpus, gres, state, count = line.split("|")
        minutes = parse_time_left(limit)
        nodes.append(
            Nodes(
                name,
                up == "up",
                math.inf if minutes is None else minutes,
                int(memory),
                int(cpus),
                read_gres(gres),
                state,
                int(count),
            )
        )
    return nodes


@dataclass(frozen=True)
class ResourceRequest:
    """What a rule requests from each node."""

    rule: str
    partition: str
    minutes: float
    mem_mb: int
    cpus: int
    gpus: dict[str, int]
    options: dict[str, str]
    """Options of sbatch."""
    launcher: str = "inline"


def requests(jobs: list[Job]) -> list[ResourceRequest]:
    """The requests of all rules. Raises ConfigError if no rule names a partition: then the profile is not for Slurm."""
    by_rule: dict[str, ResourceRequest] = {}
    for job in jobs:
        given = {name: job.resources[name] for name in SLURM if job.resources.get(name) not in (None, "", "<TBD>")}
        n, nodes = gpus(given), int(given.get("nodes") or 1)
        kinds = read_gres(str(given.get("gres") or "")) or (
            {str(given.get("gpu_model") or ""): math.ceil(n / nodes)} if n else {}
        )
        cpus = int(given.get("cpus_per_gpu") or 0) * math.ceil(n / nodes) or int(
            given.get("cpus_per_task") or job.threads
        )
        by_rule.setdefault(
            job.rule,
            ResourceRequest(
                job.rule,
                str(given.get("slurm_partition", "")),
                float(given.get("runtime") or 0),
                int(given.get("mem_mb") or 0),
                cpus,
                kinds,
                sbatch_options(given, job.threads),
                str(job.resources.get("launcher") or "inline"),
            ),
        )
    if not any(request.partition for request in by_rule.values()):
        raise ConfigError(
            "no rule has a slurm_partition in this profile; give --profile the one for your Slurm site, such as "
            "profiles/slurm"
        )
    return list(by_rule.values())


def read_settings(text: str) -> dict[str, str]:
    """`Name = value` lines of `scontrol show config`, or the `Name=value` words of one of `scontrol -o show partition`.

    >>> read_settings("PartitionName=gpu PreemptMode=CANCEL")["PreemptMode"]
    'CANCEL'
    """
    return dict(re.findall(r"^(\w+) *= (.*)$", text, re.MULTILINE) or re.findall(r"(\w+)=(\S*)", text))
