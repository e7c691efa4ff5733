"""One of several processes of a stage, started by srun: python -m tunetrail.launch.task COMMAND…

Gives torch.distributed the rank and the number of processes, runs the command, and tells srun how it ended.
"""

import os
import subprocess
import sys

from tunetrail.launch.supervise import for_srun, option, supervise


def distributed_environment() -> dict[str, str]:
    """The variables that torch.distributed reads (env://), from those that srun sets for this step."""
    nodes = os.environ["SLURM_STEP_NODELIST"]
    hosts = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True).stdout
    step = int(os.environ["SLURM_JOB_ID"]) * 31 + int(os.environ["SLURM_STEP_ID"])
    return {
        "MASTER_ADDR": hosts.split()[0],
        "MASTER_PORT": str(20000 + step % 20000),
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": os.environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
    }


def main(command: list[str]) -> int:
    os.environ |= distributed_environment()
    return for_srun(supervise(command, None, option(command, "--state"), requeues=False), int(os.environ["RANK"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
