"""Errors a user can mend, and the exit codes that go with them.

Every error a stage raises on purpose is a `TunetrailError`: its message is one line that names the
file, line or key, what is wrong and how to mend it. Anything else is a fault of ours and keeps its
traceback.
"""

PEOPLE = "for people"
"""What the message of Waiting begins with."""


class TunetrailError(Exception):
    """A mistake the user can mend. `exit_code` follows sysexits.h."""

    exit_code = 1
    word = "error"


class DataError(TunetrailError):
    """The data is bad (EX_DATAERR)."""

    exit_code = 65


class ConfigError(TunetrailError):
    """The configuration is bad (EX_CONFIG)."""

    exit_code = 78


class Interrupted(TunetrailError):
    """Stopped before the end with progress saved (EX_TEMPFAIL): run the same command again."""

    exit_code = 75
    word = "interrupted"


class Waiting(Interrupted):
    """People have not finished: nothing was lost and nothing can be done before they have."""

    word = "waiting"


class Displaced(Interrupted):
    """Another attempt of the same stage has this one's place: it goes on, and nothing is to be run again."""

    exit_code = 76
