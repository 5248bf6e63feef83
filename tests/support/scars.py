"""Formatter scars: trailing comments for whose sake the formatter spread brackets over several lines."""

from __future__ import annotations

import io
import tokenize
from dataclasses import dataclass

LINE_LENGTH = 100


@dataclass
class Bracket:
    """A pair of brackets; rows are counted from 1."""

    first_row: int
    last_row: int = 0
    commas: int = 0
    ends_with_comma: bool = False

    @property
    def is_single(self) -> bool:
        """Holds one element, with or without a comma after it."""
        return self.commas == int(self.ends_with_comma)


def find_scars(text: str) -> list[int]:
    """Rows of trailing comments that stand after a closing bracket, or beside the only element in brackets.

    Only where all of it, without the comment, would fit on one line.
    """
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    brackets, lines = _brackets(tokens), text.splitlines()
    starts = {t.start[0]: t.start[1] for t in tokens if t.type == tokenize.COMMENT}
    code = [line[: starts.get(row)].rstrip() for row, line in enumerate(lines, start=1)]
    trailing = [row for row in starts if code[row - 1]]
    return [row for row in trailing if any(_is_scar(row, one, code) for one in brackets)]


def _brackets(tokens: list[tokenize.TokenInfo]) -> list[Bracket]:
    """Pairs that are spread over several lines."""
    stack: list[Bracket] = []
    found = []
    for token in tokens:
        if token.type in (tokenize.COMMENT, tokenize.NL):
            continue
        is_sign = token.type == tokenize.OP
        if is_sign and token.string in ")]}":
            closed = stack.pop()
            closed.last_row = token.start[0]
            found.append(closed)
        elif stack:
            stack[-1].ends_with_comma = token.string == ","
            stack[-1].commas += token.string == ","
        if is_sign and token.string in "([{":
            stack.append(Bracket(token.start[0]))
    return [one for one in found if one.last_row > one.first_row]


def _is_scar(row: int, bracket: Bracket, code: list[str]) -> bool:
    is_after = row == bracket.last_row and code[row - 1].lstrip()[0] in ")]}"
    is_beside = bracket.is_single and bracket.first_row <= row < bracket.last_row
    if not (is_after or is_beside):
        return False
    head, *rest = code[bracket.first_row - 1 : bracket.last_row]
    joined = head + "".join(f" {line.strip()}" for line in rest)
    return len(joined.replace("( ", "(").replace(", )", ")").replace(" )", ")")) <= LINE_LENGTH
