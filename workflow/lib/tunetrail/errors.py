"""Errors that a user can fix, and their exit codes.

Every error that a stage raises on purpose is a `TunetrailError`: its message is one line that names the file, line or
key, what is wrong and how to fix it. Anything else is a bug and keeps its traceback.
"""


class TunetrailError(Exception):
    """A mistake that the user can fix. `exit_code` follows sysexits.h."""

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
    """People have not finished ranking. Nothing is lost, and nothing can be done until they have."""

    word = "waiting"


class Superseded(Interrupted):
    """Another attempt of the same stage has taken over and continues; nothing needs to be run again."""

    exit_code = 76


class DiskError(TunetrailError):
    """A file cannot be read or written as required (EX_IOERR)."""

    exit_code = 74
