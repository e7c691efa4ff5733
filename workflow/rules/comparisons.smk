# Scatter: each shard samples K completions of its share of the prompts.
use rule stage as completions with:
    pathvars:
        artifact="completions/{shard}",
        config="completions",
    input:
        unpack(reads("completions")),
    localrule: is_submitted("completions")
    params:
        stage="completions",
        launch=launched("completions"),
        part=lambda wildcards: f" --part {wildcards.shard.replace('-of-', '/')}",


# What people are to rank, where they do.
use rule stage as tasks with:
    pathvars:
        artifact="tasks",
        config="tasks",
    input:
        unpack(reads("tasks")),
    localrule: True
    params:
        stage="tasks",
        launch=launched("tasks"),


# Gather: a labeler ranks the completions of every prompt best to worst.
use rule stage as comparisons with:
    pathvars:
        artifact="comparisons",
        config="comparisons",
    input:
        unpack(reads("comparisons")),
    retries: 0 if HUMAN else None
    # People's answers are on this machine, and while they rank there is nothing to queue or to retry.
    localrule: HUMAN or is_submitted("comparisons")
    params:
        stage="comparisons",
        launch=launched("comparisons"),
