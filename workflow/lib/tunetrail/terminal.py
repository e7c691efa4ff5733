"""Text from elsewhere on a terminal: file names, model output and records cannot forge a line or move the cursor."""


def escape(text: object, keep: str = "") -> str:
    r"""The text with every character that does not print as a backslash sequence.

    Control characters, line separators, what reverses the direction of writing, and bytes that are not UTF-8.

    Args:
        keep: characters to leave as they are, such as "\n" in text of several lines.

    >>> escape("a\nSOUND \x1b[2J\u202e")
    'a\\nSOUND \\x1b[2J\\u202e'
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c in keep or c.isprintable() else c.encode("unicode_escape").decode() for c in text)
