"""Text from elsewhere on a terminal: file names, model output and records cannot forge a line or move the cursor."""

import logging

LINES = "\n"
"""To keep in text that is made of lines, each of which is known to be ours."""
PROSE = "\n\t\u200c\u200d"
"""To keep in what a model says: lines, tabs, and what joins letters of some scripts and emoji."""


def escape(text: object, keep: str = "") -> str:
    r"""The text with every character that does not print as a backslash sequence.

    Control characters, line separators, what reverses the direction of writing, and bytes that are not UTF-8.

    Args:
        keep: characters to leave as they are.

    >>> escape("a\nSOUND \x1b[2J\u202e")
    'a\\nSOUND \\x1b[2J\\u202e'
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c in keep or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Formatter(logging.Formatter):
    """Escapes messages; tracebacks stay as they are."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = escape(record.message)
        return super().formatMessage(record)
