"""Collects what a record says about code, software, hardware and energy."""

import os
import platform
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import tunetrail
from tunetrail.provenance.manifest import sha256_file, sha256_json

ENVIRONMENT = (
    "ACCELERATE_MIXED_PRECISION",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "PYTHONHASHSEED",
    "SLURM_JOB_NUM_NODES",
    "SLURM_JOB_PARTITION",
    "TUNETRAIL_CHECKPOINT_MINUTES",
    "TUNETRAIL_DEADLINE",
    "TUNETRAIL_TIME_LIMIT",
    "WORLD_SIZE",
)
"""Environment variables that a record may contain: an allowlist, so that no secret gets in."""


def _git(*arguments: str) -> bytes | None:
    command = ["git", "-C", str(Path(__file__).parent), "-c", "core.quotepath=off", *arguments]
    try:
        reply = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return reply.stdout if reply.returncode == 0 else None


@cache
def code_state() -> dict[str, Any]:
    """Commit, whether the tree differs from it, the diff, untracked files, and a digest of the library's own files."""
    library = Path(tunetrail.__file__).parent
    files = {p.relative_to(library).as_posix(): sha256_file(p) for p in sorted(library.rglob("*.py"))}
    state: dict[str, Any] = {"commit": None, "dirty": None, "diff": None, "untracked": {}}
    commit, root = _git("rev-parse", "HEAD"), _git("rev-parse", "--show-toplevel")
    # An environment with this package installed may be inside somebody else's checkout.
    tracked = _git("ls-files", "--error-unmatch", str(Path(__file__)))
    if commit is None or root is None or tracked is None:
        state["reason"] = "not a git checkout, or git is not installed"
    else:
        top = root.decode().strip()
        diff = _git("-C", top, "diff", "--no-ext-diff", "--no-color", "--binary", "HEAD") or b""
        ours = ("Snakefile", "workflow", "config", "profiles")
        untracked = _git("-C", top, "ls-files", "--others", "--exclude-standard", "--", *ours) or b""
        state |= {
            "commit": commit.decode().strip(),
            "dirty": bool(diff or untracked),
            "untracked": {
                name: sha256_file(Path(top, name))
                for name in untracked.decode(errors="replace").splitlines()
                if Path(top, name).is_file()
            },
        }
        state["diff"] = diff or None
    return state | {"library": sha256_json(files)}


@cache
def packages() -> dict[str, str]:
    """Every installed distribution and its version.

    From the names of their folders: reading their metadata takes 100 times as long.
    """
    versions: dict[str, str] = {}
    for entry in sys.path:
        for folder in Path(entry).glob("*.dist-info"):
            name, _, version = folder.name.removesuffix(".dist-info").rpartition("-")
            versions.setdefault(re.sub(r"[-_.]+", "-", name).lower(), version)
    return dict(sorted(versions.items()))


def lock_file() -> dict | None:
    path = Path(tunetrail.__file__).parents[3] / "envs/requirements.txt"
    return {"name": "envs/requirements.txt", "digest": {"sha256": sha256_file(path)}} if path.exists() else None


def environment() -> dict[str, Any]:
    """Where this attempt runs: host, job, nodes, devices, software, determinism. Does not import torch."""
    torch = sys.modules.get("torch")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else []
    return {
        "host": socket.gethostname(),
        "job_id": os.environ.get("SLURM_JOB_ID"),
        "partition": os.environ.get("SLURM_JOB_PARTITION"),
        "nodes": os.environ.get("SLURM_JOB_NODELIST"),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "gpus": gpus,
        "driver": _driver() if gpus else None,
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__ if torch else None,
        "code": code_state()["library"],
        "packages": sha256_json(packages()),
        "deterministic": torch.are_deterministic_algorithms_enabled() if torch else None,
        "variables": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


@cache
def _cpu() -> str:
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match[1] if match else platform.machine()


def _driver() -> str | None:
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except OSError:
        return None


def peak_bytes() -> int:
    """The most memory that this process has used: what torch took of its GPU, or without one the resident set."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def energy_joules() -> float | None:
    """The processors' energy counter, from an arbitrary start; None if there is none to read."""
    total = 0
    for counter in Path("/sys/class/powercap").glob("intel-rapl:?"):
        try:
            total += int((counter / "energy_uj").read_text())
        except (OSError, ValueError):
            return None
    return total / 1e6 or None


def device_hours(attempts: Iterable[Mapping[str, Any]]) -> float:
    """Hours of all attempts times their processes, without killed attempts, whose duration is unknown."""
    return sum((a.get("seconds") or 0) * a.get("world_size", 1) for a in attempts) / 3600
