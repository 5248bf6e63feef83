"""The keys of a configuration, read from its dataclasses: annotation, default and attribute docstring."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple


class Key(NamedTuple):
    """One setting."""

    name: str
    """Dotted, as on the command line."""
    kind: str
    default: str
    meaning: str


class Section(NamedTuple):
    """The settings of one dataclass."""

    name: str
    """Dotted; empty for the root."""
    meaning: str
    keys: list[Key]


def walk_sections(config: type[Any], name: str = "") -> Iterator[Section]:
    """The dataclass's own settings, then those of each dataclass among its fields.

    Args:
        config: Dataclass to walk.
        name: Dotted key under which it stands.

    Raises:
        ValueError: A field has no docstring.
    """
    types = typing.get_type_hints(config)
    notes = {key: note for base in reversed(config.__mro__) for key, note in _notes(base).items()}
    keys, nested = [], []
    for field in dataclasses.fields(config):
        dotted = f"{name}.{field.name}".lstrip(".")
        inner = _dataclass_in(types[field.name])
        if inner is not None:
            nested.append((inner, dotted))
            continue
        if field.name not in notes:
            raise ValueError(f"{config.__name__}.{field.name} has no docstring; say what it does")
        annotation, meaning = notes[field.name]
        keys.append(Key(dotted, annotation, _default(field), meaning))
    yield Section(name, inspect.getdoc(config) or "", keys)
    for inner, dotted in nested:
        yield from walk_sections(inner, dotted)


def _notes(config: type[Any]) -> dict[str, tuple[str, str]]:
    """(annotation, docstring) of the fields that this class itself declares."""
    if not dataclasses.is_dataclass(config):
        return {}
    tree = ast.parse(textwrap.dedent(inspect.getsource(config)))
    body = tree.body[0].body  # type: ignore[attr-defined]
    found = {}
    for line, after in itertools.pairwise(body):
        if isinstance(line, ast.AnnAssign) and isinstance(after, ast.Expr):
            text = " ".join(ast.literal_eval(after.value).split())
            found[ast.unparse(line.target)] = (_show_type(line.annotation), text)
    return found


def _show_type(node: ast.expr) -> str:
    """An annotation in words: `'a' or 'b'`, `int or null`."""
    if isinstance(node, ast.BinOp):
        return f"{_show_type(node.left)} or {_show_type(node.right)}"
    if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("Literal"):
        choices = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return ", ".join(str(ast.literal_eval(choice)) for choice in choices)
    text = ast.unparse(node)
    return {"None": "null", "Path": "path", "str": "text", "bool": "true, false"}.get(text, text)


def _dataclass_in(annotation: Any) -> type[Any] | None:
    """The dataclass that a field holds, alone or beside None."""
    found = [annotation, *typing.get_args(annotation)]
    return next((t for t in found if isinstance(t, type) and dataclasses.is_dataclass(t)), None)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return _show_value(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return _show_value(field.default_factory())
    return "required"


def _show_value(value: Any) -> str:
    """A value as a recipe writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_show_value, value))}]"
    return str(value) if isinstance(value, Path) or value != "" else "''"


def render_sections(config: type[Any]) -> str:
    """Markdown: a heading and a table for each dataclass."""
    pages = []
    for section in walk_sections(config):
        rows = [
            f"| `{k.name}` | {k.kind} | `{_cell(k.default)}` | {_cell(k.meaning)} |"
            for k in section.keys
        ]
        table = "\n".join(
            ["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows]
        )
        title = f"## {section.name or 'Top level'}\n\n{section.meaning}"
        pages.append(f"{title}\n\n{table}" if rows else title)
    return "\n\n".join(pages)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
