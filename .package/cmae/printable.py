"""Text from files, stores and users, made safe to print."""

from __future__ import annotations


def printable(text: str, *, limit: int = 200) -> str:
    r"""One line without control characters: `\x1b` and the like are spelled out, and the middle is cut.

    A name in a tar may hold line feeds, escape sequences and marks that turn the direction of writing: printed
    raw, it could forge a line of output.

    Args:
        text: Any text.
        limit: Characters above which the middle is left out; a path that is to be copied needs thousands.
    """
    if len(text) > limit:
        text = f"{text[: limit // 2]}...{text[-limit // 4 :]}"
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


MAX_LINE = 4000
"""Characters of a line of output."""


def printable_lines(text: str) -> str:
    """The same for text of several lines, each on its own: for text whose line feeds are this program's."""
    return "\n".join(printable(line, limit=MAX_LINE) for line in text.split("\n"))
