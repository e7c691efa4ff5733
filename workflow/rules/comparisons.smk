# Scatter: each shard samples K completions of its share of the prompts.
use rule stage as completions with:
    input:
        unpack(reads("completions")),
    pathvars:
        artifact="completions/{shard}",
    localrule: is_submitted("completions")
    params:
        part=lambda wildcards: f" --part {wildcards.shard.replace('-of-', '/')}",


# The tasks to rank, if people do that.
use rule stage as tasks with:
    input:
        unpack(reads("tasks")),
    pathvars:
        artifact="tasks",
    localrule: True


# Gather: a labeler ranks the completions of every prompt from best to worst.
use rule stage as comparisons with:
    input:
        unpack(reads("comparisons")),
    pathvars:
        artifact="comparisons",
    retries: 0 if HUMAN else None
    # People's answers are on this machine, and waiting for them needs no queue and no retries.
    localrule: HUMAN or is_submitted("comparisons")
