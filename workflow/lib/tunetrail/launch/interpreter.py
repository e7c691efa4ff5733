"""Which Python runs the jobs."""

import shutil
import subprocess
import sys


def job_python() -> str:
    """`python` where PATH has this environment's, else this interpreter: `.venv/bin/snakemake` needs no activation."""
    found = shutil.which("python")
    if found is None:
        return sys.executable
    command = [found, "-c", "import sys; print(sys.prefix)"]
    reply = subprocess.run(command, capture_output=True, text=True, check=False)
    return "python" if reply.stdout.strip() == sys.prefix else sys.executable
