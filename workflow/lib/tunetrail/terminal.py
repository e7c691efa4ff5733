"""Escapes untrusted text for terminals: file names, model output and records cannot forge lines or move the cursor."""

import logging

LINES = "\n"
"""Characters to keep in text made of our own lines."""
PROSE = "\n\t\u200c\u200d"
"""Characters to keep in model output: line breaks, tabs, and the joiners of some scripts and emoji."""


def escape(text: object, keep: str = "") -> str:
    r"""The text with every unprintable character as a backslash sequence.

    These are control characters, line separators, marks that reverse the writing direction, and invalid UTF-8.

    Args:
        keep: characters to leave unchanged.

    >>> escape("a\nSOUND \x1b[2J\u202e")
    'a\\nSOUND \\x1b[2J\\u202e'
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c in keep or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Formatter(logging.Formatter):
    """Escapes messages but not tracebacks."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = escape(record.message)
        return super().formatMessage(record)
