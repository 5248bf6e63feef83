"""The terminal: no string is read as rich's markup, and none brings control characters along."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from cmae.printable import MAX_LINE, printable, printable_lines


class PlainConsole(Console):
    """A console that shows text as it is: `runs/[exp1]` is a folder, no style, and `:car:` no picture.

    Control characters other than line feeds are spelled out, in every string and table cell. Text whose line
    feeds may be somebody else's goes through `printable` first.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"highlight": False, **options, "markup": False, "emoji": False})

    def render_str(self, text: str, **options: Any) -> Text:
        """Turn a string into text that can be printed; rich's own hook."""
        return super().render_str(printable_lines(text), **options)


def labelled(label: str, text: str, style: str = "yellow") -> Text:
    """One line of text behind a coloured label and a space.

    Args:
        label: Word or words of this program.
        text: Any text.
        style: Style of the label.
    """
    return Text.assemble((label, style), " ", printable(text, limit=MAX_LINE))
