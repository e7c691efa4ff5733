"""One head process per run: who holds the run, and what becomes of a head that was stopped for too long.

A head that a terminal, a hibernating laptop or a hung login node has stopped does not renew its lease, and another may
take over. When it continues, it must not touch what its successor makes: it ends before it acts.
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
"""Of the runs that this process is the head of: several where a workflow has them as modules."""


def hold_run(state: Path) -> None:
    """Keeps a second Snakemake off the run with this state folder for as long as this process lives.

    It ends with the process, unlike Snakemake's own lock. Ends the process where another Snakemake has the run.
    """
    try:
        _leases.append(_until_the_end.enter_context(hold(state / "head", give_up=lambda: True, say=print)))
    except TunetrailError as error:
        print(f"another snakemake is working on this run: {error}" if error.exit_code == 75 else error, file=sys.stderr)
        sys.exit(error.exit_code)
    look_before_acting(end_if_superseded)


def end_if_superseded() -> None:
    """Ends this process at once where another Snakemake has taken over a run that it was the head of.

    At once, since Snakemake would remove the outputs of the jobs that it takes for its own. They go on where they are.
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
