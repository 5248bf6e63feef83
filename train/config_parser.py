"""A run's configuration from recipes and dotted overrides, on the command line and in Python."""

from __future__ import annotations

import argparse
import difflib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings

from cmae.errors import CmaeError
from cmae.model import ModelConfig
from cmae.train.config import Config
from cmae.train.old_keys import OLD_KEYS, Moved, new_value, update_keys, what_became

RECIPES = files("cmae.train") / "recipes"

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class UsageError(CmaeError):
    """A command line that cannot be understood."""

    exit_code = 2


class Parser(ArgumentParser):
    """jsonargparse's parser: errors are raised, an unknown option names the nearest, - stands for _ too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what argparse would print.

        Raises:
            UsageError: Always.
        """
        raise UsageError(f"{message}; see `{self.prog} --help`") from ex

    def _parse_optional(self, arg_string: str) -> Any:
        """Find the option that a word names; argparse's own hook.

        Raises:
            UsageError: It names none.
        """
        found = super()._parse_optional(arg_string)
        name, equals, value = arg_string.partition("=")
        if not _is_unknown(found) or self._is_of_subcommand(name):
            return found
        found = super()._parse_optional(f"--{name[2:].replace('-', '_')}{equals}{value}")
        if _is_unknown(found):
            self.error(f"there is no option {name}{nearest(name.lstrip('-'), self.settings())}")
        return found

    def _is_of_subcommand(self, name: str) -> bool:
        """Whether a subcommand has this option: argparse looks at all words before it hands some on."""
        if self._subcommands_action is None:
            return False
        return any(
            name in one._option_string_actions for one in self._subcommands_action.choices.values()
        )

    def settings(self) -> list[str]:
        """Dotted names of everything that can be set."""
        return [name[2:] for name in self._option_string_actions if name.startswith("--")]

    def set_to(self, parsed: Namespace, key: str, value: Any) -> None:
        """Set one option as if it were given on the command line."""
        self._option_string_actions[f"--{key}"](self, parsed, value, f"--{key}")


def _is_unknown(found: Any) -> bool:
    """Whether argparse took a word for an option that it does not know; newer versions list candidates."""
    first = found[0] if isinstance(found, list) else found
    return first is not None and first[0] is None


def nearest(name: str, known: list[str]) -> str:
    """A remark that names the known name most like this one; '' where none is."""
    leaves = {one.rsplit(".", 1)[-1]: one for one in known}
    close = difflib.get_close_matches(name, known, n=1)
    close = close or difflib.get_close_matches(name.rsplit(".", 1)[-1], leaves, n=1)
    return f" (did you mean {leaves.get(close[0], close[0])!r}?)" if close else ""


class _Recipe(ActionConfigFile):
    """`--recipe`: every setting of the file, as if it stood on the command line in its place."""

    def __call__(
        self, parser: Any, cfg: Any, values: Any, option_string: str | None = None
    ) -> None:
        """Apply one recipe."""
        for key, value in _leaves(read_recipe(values), parser.settings(), str(values)):
            try:
                parser.set_to(cfg, key, value)
            except (TypeError, ValueError) as error:
                raise CmaeError(f"{values}: {key} is {value!r}: {error}", key=key) from error


class _OldOption(argparse.Action):
    """An option that was moved or dropped."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: Any,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Set what took its place, and warn."""
        assert isinstance(parser, Parser)
        key = self.option_strings[0][2:]
        new, value = OLD_KEYS[key], values[0]
        if isinstance(new, Moved):
            parser.set_to(namespace, new.to, new_value(new, value))
        elif new.only is not None and yaml.safe_load(value) not in new.only:
            parser.error(f"--{key} {value}: {new.reason}; leave it out")
        warnings.warn(what_became(key), stacklevel=2)


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(
        Path(entry.name).stem for entry in RECIPES.iterdir() if entry.name.endswith(".yaml")
    )


def read_recipe(name: str | Path) -> dict[str, Any]:
    """Settings of a recipe as nested dicts, in the names of this version.

    Args:
        name: YAML file, or name of a recipe that ships with the package.

    Raises:
        CmaeError: Neither of them, not YAML, or a setting that this version cannot give.
    """
    source = Path(name) if Path(name).is_file() else RECIPES / f"{name}.yaml"
    if not source.is_file():
        raise CmaeError(
            f"--recipe {name}: it must be a YAML file, or one of {', '.join(recipe_names())}"
            f"{nearest(str(name), recipe_names())}",
            key="recipe",
        )
    try:
        content = yaml.safe_load(source.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CmaeError(f"{name} is not YAML: {error}", key=str(name)) from error
    if not isinstance(content, dict):
        raise CmaeError(
            f"{name} holds a {type(content).__name__}; it must hold sections such as `optim:`",
            key=str(name),
        )
    updated = update_keys(content)
    if updated.refused:
        raise CmaeError(f"{name}: {'; '.join(updated.refused)}; leave it out", key=str(name))
    if updated.notes:
        warnings.warn(f"{name}: {'; '.join(updated.notes)}", stacklevel=2)
    return updated.settings


def _leaves(
    content: Mapping[str, Any], known: list[str], source: str, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested sections.

    Raises:
        CmaeError: A key is not known.
    """
    for name, value in content.items():
        key = f"{prefix}{name}"
        is_section = any(one.startswith(f"{key}.") for one in known)
        if is_section and isinstance(value, Mapping):
            yield from _leaves(value, known, source, f"{key}.")
        elif key in known and not is_section:
            yield key, value
        else:
            what = "is a section, and holds" if is_section else "is no setting; found"
            hint = "" if is_section else nearest(key, known)
            raise CmaeError(f"{source}: {key} {what} {value!r}{hint}", key=key, found=value)


def add_config(parser: Parser) -> None:
    """Add a run's configuration: recipes, dotted overrides, `--print_config`."""
    parser.usage = f"{parser.prog} [--recipe NAME_OR_FILE] [--KEY VALUE ...]"
    parser.add_argument(
        "--recipe",
        action=_Recipe,
        help=f"YAML file, or one of: {', '.join(recipe_names())}. Several may be given; what comes "
        "later on the command line wins.",
    )
    parser.add_class_arguments(Config)
    parser.link_arguments("model.img_size", "data.views.img_size")
    for key in OLD_KEYS:
        parser.add_argument(
            f"--{key}",
            action=_OldOption,
            nargs=1,
            dest=argparse.SUPPRESS,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )


def instantiate(parser: Parser, parsed: Namespace) -> Any:
    """Every section of parsed arguments as its dataclass, by name.

    Raises:
        CmaeError: A value is out of range, or values do not fit each other.
    """
    try:
        return parser.instantiate(parsed)
    except CmaeError as error:
        # These two know no sections.
        if error.key in {field.name for field in fields(ModelConfig)}:
            raise error.within("model") from error
        if error.key.startswith("views."):
            raise error.within("data") from error
        raise


def to_config(sections: Any) -> Config:
    """The sections that a run has, as one object; sections of single commands are left out."""
    return Config(**{field.name: sections[field.name] for field in fields(Config)})


def parse_config(arguments: Sequence[str]) -> Config:
    """The configuration that words of a command line give.

    Args:
        arguments: Words as after `cmae pretrain`.

    Raises:
        CmaeError: A recipe or a key is not known, a value is out of range, or values do not fit each other.
    """
    parser = Parser(prog="cmae pretrain")
    add_config(parser)
    return to_config(instantiate(parser, parser.parse_args(list(arguments))))


def load_recipe(*recipes: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """The configuration of a run, from recipes and values in Python.

    Args:
        *recipes: YAML files or names of recipes that ship with the package; later ones override earlier ones.
        overrides: Values by dotted key, such as {"data.shards": "/data/*.tar"}, which override all recipes.

    Raises:
        CmaeError: A recipe or a key is not known, a value is out of range, or values do not fit each other.
    """
    arguments = [word for recipe in recipes for word in ("--recipe", str(recipe))]
    for key, value in (overrides or {}).items():
        plain = str(value) if isinstance(value, str | Path) else json.dumps(value, default=str)
        arguments.append(f"--{key}={plain}")
    return parse_config(arguments)
