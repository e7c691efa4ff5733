"""One head process per run: which process holds the run, and how a head ends that was stopped for too long.

A head that was stopped by a terminal, a hibernating laptop or a hung login node does not renew its lease, so another
may take over. When the first one continues, it must not touch its successor's work: it ends before it acts.
"""

import os
import sys
from contextlib import ExitStack
from pathlib import Path

from tunetrail.contract.lease import Lease, hold
from tunetrail.errors import Superseded, TunetrailError
from tunetrail.monitor.snakemake_adapter import look_before_acting

_until_the_end = ExitStack()
_leases: list[Lease] = []
"""The leases of the runs that this process heads; several if a workflow has runs as modules."""


def hold_run(state: Path) -> None:
    """Prevents another Snakemake from working on the run with this state folder while this process lives.

    Unlike Snakemake's own lock, the lease ends with the process. Exits if another Snakemake has the run.
    """
    try:
        _leases.append(_until_the_end.enter_context(hold(state / "head", give_up=lambda: True, say=print)))
    except TunetrailError as error:
        print(f"another snakemake is working on this run: {error}" if error.exit_code == 75 else error, file=sys.stderr)
        sys.exit(error.exit_code)
    look_before_acting(end_if_superseded)


def end_if_superseded() -> None:
    """Exits at once if another Snakemake has taken over a run that this process headed.

    Snakemake's own exit would remove the outputs of jobs that it takes for its own; they continue where they are.
    """
    for lease in _leases:
        try:
            is_lost = lease.lost()
        except OSError:  # not known: a full disk must not cost the jobs their head
            continue
        if is_lost:
            print(
                f"{lease.path.parent}: another snakemake took over this run while this one was stopped; it goes on, "
                "this one ends",
                file=sys.stderr,
                flush=True,
            )
            os._exit(Superseded.exit_code)
