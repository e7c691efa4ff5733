"""Starts a stage's command: here, as a step of its Slurm job, or as a separate job through submitit.

    python -m tunetrail.launch --stage S --jobs J --resources '{…}' --log L -- python -m tunetrail.stages.S …

Stages know nothing about it. Nothing here imports torch, so that a launcher that waits for a job stays small.
"""
