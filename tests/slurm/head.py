"""snakemake as on a cluster, but asking for the state of its jobs every second, not every twenty to 180.

python -m tests.slurm.head --profile slurm …
"""

import sys

from snakemake.cli import main
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor

RemoteExecutor.next_seconds_between_status_checks = property(lambda self: 1, lambda self, value: None)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
