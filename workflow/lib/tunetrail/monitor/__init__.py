"""Inspects runs without changing them: the DAG, `status`, `plan`, `--watch`, and the doctor for a Slurm site."""
