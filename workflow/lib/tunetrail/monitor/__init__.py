"""Looking at runs without touching them: the DAG, `status`, `plan`, `--watch`, and the doctor of a Slurm site."""
