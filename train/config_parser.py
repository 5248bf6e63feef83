"""The parser of a run's configuration: recipes, dotted overrides, errors that name the nearest key."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from cmae.train.config import Config

RECIPES = files("cmae.train") / "recipes"


class Parser(ArgumentParser):
    """jsonargparse's parser, whose errors are one line and name the nearest key."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error with a suggestion and exit with 2."""
        hints = [self._nearest(name) for name in _unknown_names(message)]
        lines = [f"{self.prog}: error: {message}", *filter(None, hints)]
        lines.append(f"see `{self.prog} --help`")
        print("\n".join(lines), file=sys.stderr)
        raise SystemExit(2)

    def _nearest(self, name: str) -> str:
        known = [action.dest for action in self._actions if action.dest]
        leaves = {dest.rsplit(".", 1)[-1]: dest for dest in known}
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        close = close or difflib.get_close_matches(name.rsplit(".", 1)[-1], leaves, n=1, cutoff=0.6)
        return f"did you mean {leaves.get(close[0], close[0])!r}?" if close else ""


def with_underscores(word: str) -> str:
    """The option `--max-size=512` as jsonargparse knows it, `--max_size=512`; other words as they are."""
    name, equals, value = word.partition("=")
    is_option = re.fullmatch(r"--[a-z][a-z0-9_.-]*", name) is not None
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if is_option else word


def _unknown_names(message: str) -> list[str]:
    found = re.search(r"unrecognized arguments: (.*)", message)
    if found:
        return [word.lstrip("-").split("=")[0] for word in found[1].split() if word.startswith("-")]
    return re.findall(r"does not accept (?:option|nested key) '([^']+)'", message)


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(
        Path(entry.name).stem for entry in RECIPES.iterdir() if entry.name.endswith(".yaml")
    )


def find_recipes(arguments: Sequence[str]) -> list[str]:
    """Replace names of shipped recipes after `--recipe` by their paths.

    Raises:
        ValueError: neither a shipped recipe nor a file.
    """
    found, expect = [], False
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if expect:
            found.append(_recipe_path(argument))
        elif flag == "--recipe" and equals:
            found.append(f"--recipe={_recipe_path(value)}")
        else:
            found.append(argument)
        expect = argument == "--recipe"
    return found


def _recipe_path(name: str) -> str:
    if Path(name).is_file():
        return name
    if name in recipe_names():
        return str(RECIPES / f"{name}.yaml")
    close = difflib.get_close_matches(name, recipe_names(), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(
        f"--recipe {name}: {hint}it must be a YAML file, or one of {', '.join(recipe_names())}"
    )


def build_config_parser(prog: str, description: str) -> Parser:
    """Parser of a run's configuration: recipes, dotted overrides, `--print_config`."""
    from cmae.train.config import Config

    usage = f"{prog} [--recipe NAME_OR_FILE] [--KEY VALUE ...]"
    parser = Parser(prog=prog, usage=usage, description=description)
    parser.add_argument(
        "--recipe",
        action=ActionConfigFile,
        help=f"YAML file, or one of: {', '.join(recipe_names())}. Later ones override earlier ones.",
    )
    parser.add_class_arguments(Config)
    parser.link_arguments("model.img_size", "data.views.img_size")
    return parser


def read_config(parser: Parser, arguments: Sequence[str]) -> Config:
    """The configuration that recipes and overrides make together.

    Raises:
        ValueError: a value is out of range, or values do not fit each other.
    """
    return build_config(parser, parser.parse_args(find_recipes(arguments)))


def build_config(parser: Parser, parsed: Namespace) -> Config:
    """The configuration in parsed arguments; a command's own options are passed over.

    Raises:
        ValueError: a value is out of range, or values do not fit each other.
    """
    return to_config(build_sections(parser, parsed))


def build_sections(parser: Parser, parsed: Namespace) -> Any:
    """Every section as its dataclass, by name."""
    try:
        return parser.instantiate(parsed)
    except ValueError as error:
        raise ValueError(_with_section(str(error))) from error


def to_config(sections: Any) -> Config:
    """The sections that a run has, as one object; sections of single commands are left out."""
    from cmae.train.config import Config

    return Config(**{field.name: sections[field.name] for field in fields(Config)})


def _with_section(message: str) -> str:
    """Complete the key that starts a message of ModelConfig or ViewConfig, which know no sections."""
    from cmae.model import ModelConfig

    key = message.split("=")[0]
    if key in {field.name for field in fields(ModelConfig)}:
        return f"model.{message}"
    return f"data.{message}" if message.startswith("views.") else message
