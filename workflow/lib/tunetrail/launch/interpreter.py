"""Decides which Python runs the jobs."""

import shutil
import subprocess
import sys


def job_python() -> str:
    """`python` if the PATH has this environment's, else this interpreter: `.venv/bin/snakemake` needs no activation."""
    python = shutil.which("python")
    if python is None:
        return sys.executable
    command = [python, "-c", "import sys; print(sys.prefix)"]
    reply = subprocess.run(command, capture_output=True, text=True, check=False)
    return "python" if reply.stdout.strip() == sys.prefix else sys.executable
