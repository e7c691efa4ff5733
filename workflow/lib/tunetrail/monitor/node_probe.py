"""Checks made on a node by a small job: the shared folder and its locks, the software, the GPUs."""

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tunetrail.monitor.site import SOUND, Check, ResourceRequest, finding, unknown
from tunetrail.monitor.site_checks import last_line, run

SEEN_SECONDS = 60
"""How long a file from a node may take to show up here; also the profile's latency-wait."""
PROBE = """
import fcntl, importlib, json, os, platform, sys
folder, name = sys.argv[1], sys.argv[2]
report = {"host": platform.node(), "python": sys.version.split()[0], "missing": []}
report["visible"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")
try:
    report["head"] = open(os.path.join(folder, "head")).read()
    work = os.path.join(folder, "." + name)
    os.mkdir(work)
    with open(os.path.join(work, ".report"), "w") as f:
        f.write(report["head"])
    os.rename(work, os.path.join(folder, name))
    os.rename(os.path.join(folder, name, ".report"), os.path.join(folder, name, "report"))
    with open(os.path.join(folder, "lock"), "r+") as f:
        try:
            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            report["lock"] = "free"
        except (BlockingIOError, PermissionError):
            report["lock"] = "held"
        except OSError as e:
            report["lock"] = str(e)
except OSError as e:
    report["disk"] = str(e)
for module in ("tunetrail.contract", "torch", "transformers", "trl", "snakemake"):
    try:
        importlib.import_module(module)
    except Exception as e:
        report["missing"].append(f"{module} ({type(e).__name__}: {e})")
torch = sys.modules.get("torch")
report["torch_gpus"] = torch.cuda.device_count() if torch and hasattr(torch, "cuda") else 0
report["cuda"] = getattr(torch.version, "cuda", None) if torch and hasattr(torch, "version") else None
print("REPORT " + json.dumps(report))
"""
"""The program for a node: publishes a file as a stage does, and looks for the lock that the doctor holds like a lease.

It uses only Python's standard library, since the question is whether ours is available.
"""


def check_node(request: ResourceRequest, folder: Path, wait_seconds: float) -> list[Check]:
    """Checks the shared folder, the software and the GPUs on a node of the rule's partition, with a small job."""
    name = f"node of {request.partition}"
    kind = next(iter(request.gpus), None)
    gres = [f"--gres=gpu{f':{kind}' if kind else ''}:1"] if kind is not None else []
    kept = [f"--{key}={value}" for key, value in request.options.items() if key in ("account", "qos", "constraint")]
    command = [
        "srun",
        f"--partition={request.partition}",
        *kept,
        *gres,
        "--nodes=1",
        "--ntasks=1",
        "--cpus-per-task=1",
        "--mem=4000",
        "--time=10",
        f"--immediate={wait_seconds:.0f}",
        "--job-name=tunetrail-doctor",
        sys.executable,
        "-c",
        PROBE,
        str(folder),
        request.partition,
    ]
    code, out, said = run(command, wait_seconds + 300)
    line = next((line for line in out.splitlines() if line.startswith("REPORT ")), None)
    if line is None:
        if code == 124 or "immediate" in said.lower() or "Unable to allocate" in said:
            return [
                unknown(
                    name,
                    f"no job ran within {wait_seconds:.0f} s ({last_line(said)})",
                    "look again when it is less busy, or with a longer --wait",
                )
            ]
        return [
            finding(
                name,
                f"{sys.executable} does not run there ({last_line(said)})",
                "put the environment and the clone on a file system that the nodes mount",
            )
        ]
    return read_report(
        name,
        json.loads(line.removeprefix("REPORT ")),
        folder / request.partition / "report",
        (folder / "head").read_text(),
        bool(gres),
    )


def _shows_up(path: Path, content: str, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(FileNotFoundError):
            # Listing a folder makes a file server's client refresh it.
            if all(p in p.parent.iterdir() for p in (path.parent, path)) and path.read_text() == content:
                return True
        time.sleep(0.5)
    return False


def read_report(name: str, report: dict[str, Any], written: Path, content: str, with_gpu: bool) -> list[Check]:
    """The checks from the report of the job on a node.

    Args:
        written: the file that it wrote in the shared folder, which then has `content`.
    """
    problems = [
        *_folder_problems(name, report, written, content),
        *_software_problems(name, report),
        *(_gpu_problems(name, report) if with_gpu else []),
    ]
    gpu = f", {report['torch_gpus']} GPU seen" if with_gpu else ""
    text = f"{report['host']}: shares this folder, imports the software on Python {report['python']}{gpu}"
    return problems or [Check(name, SOUND, text)]


def _folder_problems(name: str, report: dict[str, Any], written: Path, content: str) -> list[Check]:
    host, shared = report["host"], written.parents[2]
    if "disk" in report:
        text = f"{host} cannot read and write {shared} ({report['disk']})"
        return [finding(name, text, "clone to a file system that the nodes mount and you may write to")]
    if report["head"] != content or not _shows_up(written, content, SEEN_SECONDS):
        text = f"what {host} writes to {shared} is not seen here within {SEEN_SECONDS} s"
        fix = "clone to a file system that all nodes share, or raise latency-wait in the profile"
        return [finding(name, text, fix)]
    if report["lock"] == "free":
        text = (
            f"{host} does not see a lock that is held here in {shared}, and two attempts at one stage could both write"
        )
        fix = "clone to a file system with locks across nodes (NFS not mounted with nolock, Lustre with -o flock)"
        return [finding(name, text, fix)]
    if report["lock"] != "held":
        text = f"{shared} has no locks on {host} ({report['lock']}), and no stage starts without"
        fix = "clone to a file system with locks across nodes (Lustre is mounted with -o flock)"
        return [finding(name, text, fix)]
    return []


def _software_problems(name: str, report: dict[str, Any]) -> list[Check]:
    if not report["missing"]:
        return []
    text = f"{report['host']} cannot import {', '.join(report['missing'])}"
    return [
        finding(name, text, "install envs/requirements.txt where the nodes see it, and start from that environment")
    ]


def _gpu_problems(name: str, report: dict[str, Any]) -> list[Check]:
    host = report["host"]
    if not report["visible"]:
        text = f"Slurm gave no GPU to a job on {host} that asked for one (CUDA_VISIBLE_DEVICES is empty)"
        return [finding(name, text, "check gres in the profile; else ask the site about its gres.conf")]
    if not report["torch_gpus"]:
        build = f"built for CUDA {report['cuda']}" if report["cuda"] else "built without CUDA"
        text = f"torch, {build}, sees no GPU on {host} although Slurm gave {report['visible']}"
        fix = "install torch for CUDA (envs/), or one that the driver there (nvidia-smi) can run"
        return [finding(name, text, fix)]
    return []
