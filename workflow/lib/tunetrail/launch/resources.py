"""Turns the resources that the profile gives a rule into requests to Slurm."""

import shlex
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from tunetrail.stages.registry import STAGES

SLURM = (
    "slurm_account", "slurm_partition", "runtime", "mem_mb", "mem_mb_per_cpu", "gpu", "gpu_model", "gres",
    "cpus_per_gpu",
    "cpus_per_task", "nodes", "tasks", "tasks_per_gpu", "tasks_per_node", "constraint", "qos", "slurm_extra",
)  # fmt: skip
"""Resources that decide where and with what a job runs."""
LAUNCH = ("launcher", "array")
"""Our own resources: `launcher` inline or submitit; `array` 1 if jobs that start together become one array."""
LAUNCHERS = ("inline", "submitit")
SRUN = ("--kill-on-bad-exit=1", "--wait=300")
"""Of several processes: where one fails the others, which may wait for it in a collective, are ended; where it is done
the first, which publishes, has this many seconds more."""
_SHORT = {"-A": "account", "-p": "partition", "-t": "time", "-C": "constraint", "-D": "chdir"}
_OTHERS = {"parsable", "job-name", "output", "export", "comment", "chdir"}
"""Options in the plugin's command that are not about resources."""


class _Resources(dict):
    """Resources as the plugin reads them: by key and by attribute."""

    __getattr__ = dict.__getitem__


def gpus(resources: Mapping[str, Any]) -> int:
    """GPUs of the whole job: `gpu`, or `gres` (gpu:4, gpu:a100:4) times the nodes."""
    gres = str(resources.get("gres") or "")
    if gres.startswith("gpu"):
        last = gres.rpartition(":")[2]
        return (int(last) if last.isdigit() else 1) * int(resources.get("nodes") or 1)
    return int(resources.get("gpu") or (1 if resources.get("gpu_model") else 0))


def processes(stage: str, resources: Mapping[str, Any]) -> int:
    """Processes per node: `tasks_per_node`, or one per GPU; 1 for stages that cannot be distributed."""
    if stage not in STAGES or not STAGES[stage].distributed:
        return 1
    nodes = int(resources.get("nodes") or 1)
    return int(resources.get("tasks_per_node") or max(1, gpus(resources) // nodes))


def sbatch_options(resources: Mapping[str, Any], threads: int) -> dict[str, str]:
    """Long options of sbatch, as the Slurm executor plugin would give them to a rule with these resources.

    The plugin's own functions make them, so that both launchers request the same. An option without a value
    has "".
    """
    # Imported here, since they import pandas.
    from snakemake_executor_plugin_slurm.submit_string import get_submit_command
    from snakemake_executor_plugin_slurm.utils import set_gres_string

    job = SimpleNamespace(resources=_Resources(resources), threads=threads)
    account, partition = resources.get("slurm_account"), resources.get("slurm_partition")
    params = {
        "run_uuid": "", "slurm_logfile": "", "comment_str": "", "workdir": "",
        "account": f"-A {shlex.quote(account)}" if account else "",
        "partition": f"-p {shlex.quote(partition)}" if partition else "",
    }  # fmt: skip
    words = shlex.split(get_submit_command(job, params) + set_gres_string(job))[1:]
    options: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("--") or word in _SHORT:
            name, _, value = word.removeprefix("--").partition("=") if word.startswith("--") else (_SHORT[word], "", "")
            options[name] = value
        else:
            options[name] = word
    return {name: value for name, value in options.items() if name not in _OTHERS}
