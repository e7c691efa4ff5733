"""How a stage's command is started: here, as a step of its Slurm job, or as a job of its own through submitit.

    python -m tunetrail.launch --stage S --jobs J --resources '{…}' --log L -- python -m tunetrail.stages.S …

The stages know nothing of it. No torch is imported here: a launcher that waits for a job is small.
"""
