"""Text from files and stores, made safe to print."""

from __future__ import annotations


def printable(text: str, *, limit: int = 200) -> str:
    r"""One line without control characters: `\x1b` and the like are spelled out, and the middle is cut.

    A name in a tar may hold line feeds and escape sequences: printed raw, it could forge a line of output.
    """
    if len(text) > limit:
        text = f"{text[: limit // 2]}...{text[-limit // 4 :]}"
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
