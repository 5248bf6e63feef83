"""A run's configuration from recipes and dotted overrides, on the command line and in Python."""

from __future__ import annotations

import argparse
import difflib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import (
    ActionConfigFile,
    ArgumentParser,
    Namespace,
    get_loader,
    set_loader,
    set_parsing_settings,
)

from cmae.errors import CmaeError
from cmae.model import ModelConfig
from cmae.paths import expand_home
from cmae.pipeline import LoaderConfig
from cmae.pipeline.loader.config import FROM_THE_RUN
from cmae.pipeline.remote.schemes import may_be_pipe, redact
from cmae.printable import printable
from cmae.train.config import Config
from cmae.train.old_keys import OLD_KEYS, Moved, new_value, update_keys, what_became

RECIPES = files("cmae.train") / "recipes"

set_parsing_settings(docstring_parse_attribute_docstrings=True)

_load_yaml = get_loader("yaml")


def _load_value(stream: str) -> Any:
    """A value of the command line; a path in another encoding than the locale's is text, and no YAML."""
    try:
        return _load_yaml(stream)
    except UnicodeError:
        return stream


set_loader("yaml", _load_value, (yaml.YAMLError,))


_ON_THE_COMMAND_LINE = ("allow_pipe", "recipe", "print_config", "help", "h")
"""Options that no recipe may give."""

_OPTIONS = "data.storage_options"
_BAD_OPTIONS = (
    f"{_OPTIONS} must be a mapping such as {{endpoint_url: https://host, anon: true}} without class_path; "
    "what was found is not shown, for it may hold secrets"
)

MAX_RECIPE_BYTES = 1 << 20
"""Larger recipes are refused; the longest list of settings is a hundredth of it."""

MAX_RECIPE_VALUES = 100_000
"""Mappings, lists and values of a recipe, each counted as often as an alias repeats it."""

MAX_RECIPE_DEPTH = 32
"""Mappings and lists inside each other."""


class UsageError(CmaeError):
    """A command line that cannot be understood."""

    exit_code = 2


class Parser(ArgumentParser):
    """jsonargparse's parser: errors are raised, an unknown option names the nearest, - stands for _ too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.recipe_pipes: dict[str, str] = {}
        """Shard patterns of recipes that may run a shell, and the recipe of each."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what argparse would print.

        Raises:
            UsageError: Always.
        """
        if "storage_options" in message:
            message = _BAD_OPTIONS
        raise UsageError(f"{redact(message)}; see `{self.prog} --help`") from ex

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse words of a command line; argparse's own method.

        Raises:
            UsageError: They cannot be understood.
            CmaeError: A recipe names a `pipe:` and --allow_pipe is not among the words.
        """
        self.recipe_pipes.clear()
        parsed = _with_homes(super().parse_args(*args, **kwargs))
        if self.recipe_pipes and not parsed.get("allow_pipe"):
            shards = parsed.get("data.shards")
            for one in [shards] if isinstance(shards, str) else shards or []:
                if source := self.recipe_pipes.get(one):
                    raise CmaeError(
                        f"{source}: data.shards holds a `pipe:`, or braces that can make one: a command of "
                        "the recipe's author in a shell. If you trust it, add --allow_pipe to the command "
                        "line; or give --data.shards there"
                    )
        return parsed

    def _parse_optional(self, arg_string: str) -> Any:
        """Find the option that a word names; argparse's own hook.

        Raises:
            UsageError: It names none.
        """
        found = super()._parse_optional(arg_string)
        if not _is_unknown(found):
            return found
        name, equals, value = arg_string.partition("=")
        found = super()._parse_optional(f"--{name[2:].replace('-', '_')}{equals}{value}")
        if _is_unknown(found):
            self.error(f"there is no option {name}{nearest(name.lstrip('-'), self.settings())}")
        return found

    def settings(self) -> list[str]:
        """Dotted names of everything that can be set."""
        return [name[2:] for name in self._option_string_actions if name.startswith("--")]

    def set_to(self, parsed: Namespace, key: str, value: Any) -> None:
        """Set one option as if it were given on the command line."""
        self._option_string_actions[f"--{key}"](self, parsed, value, f"--{key}")


def _with_homes(parsed: Any) -> Any:
    """The same arguments with `~` expanded in every path, which the shell leaves in `--out=~/x`."""
    for key, value in list(parsed.items()):
        if isinstance(value, Path):
            parsed[key] = expand_home(value)
        elif isinstance(value, list) and any(isinstance(one, Path) for one in value):
            parsed[key] = [expand_home(one) for one in value]
    return parsed


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

    folder = "."

    def __call__(
        self, parser: Any, cfg: Any, values: Any, option_string: str | None = None
    ) -> None:
        """Apply one recipe."""
        content = read_recipe(values, folder=self.folder)
        for key, value in _leaves(content, parser.settings(), str(values)):
            if key == "data.shards":
                patterns = value if isinstance(value, list) else [value]
                pipes = filter(may_be_pipe, map(str, patterns))
                parser.recipe_pipes.update(dict.fromkeys(pipes, str(values)))
            try:
                parser.set_to(cfg, key, value)
            except (TypeError, ValueError) as error:
                reason = _BAD_OPTIONS if key == _OPTIONS else f"{key} is {value!r}: {error}"
                raise CmaeError(redact(f"{values}: {reason}"), key=key) from error


class _EvaluationRecipe(_Recipe):
    """`--recipe` of fine-tuning and probes."""

    folder = "evaluation"


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


def recipe_names(folder: str = ".") -> list[str]:
    """Names of the files that ship with the package: recipes of pretraining, or those in a folder of them."""
    return sorted(
        Path(entry.name).stem
        for entry in _recipes_of(folder).iterdir()
        if entry.name.endswith(".yaml")
    )


def _recipes_of(folder: str) -> Traversable:
    return RECIPES if folder == "." else RECIPES / folder


def read_recipe(name: str | Path, *, folder: str = ".") -> dict[str, Any]:
    """Settings of a recipe as nested dicts, in the names of this version.

    Args:
        name: YAML file, or name of a recipe that ships with the package.
        folder: Place of the names, see `recipe_names`.

    Raises:
        CmaeError: Neither of them, not YAML, or a setting that this version cannot give.
    """
    path = expand_home(name)
    source = path if path.is_file() else _recipes_of(folder) / f"{name}.yaml"
    if not source.is_file():
        raise CmaeError(
            f"--recipe {name}: it must be a YAML file, or one of {', '.join(recipe_names(folder))}"
            f"{nearest(str(name), recipe_names(folder))}",
            key="recipe",
        )
    data = source.read_bytes()
    if len(data) > MAX_RECIPE_BYTES:
        raise CmaeError(
            f"{name} has {len(data)} bytes; a recipe has at most {MAX_RECIPE_BYTES}: name another file",
            key=str(name),
        )
    try:
        content = yaml.safe_load(data.decode("utf-8")) or {}
    # PyYAML's constructors raise anything: ValueError for a date such as 2026-99-99, KeyError, ...
    except Exception as error:
        reason = redact(str(error)) or type(error).__name__
        raise CmaeError(f"{name} is not YAML: {reason}; correct it", key=str(name)) from error
    if fault := _find_fault(content):
        raise CmaeError(f"{name} {fault}: take it out", key=str(name))
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


def _find_fault(content: Any) -> str:
    """Why a recipe's content must not be looked at any further; '' where it may be."""
    waiting, seen = [(content, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if seen + len(waiting) > MAX_RECIPE_VALUES:
            return f"holds more than {MAX_RECIPE_VALUES} values, aliases followed"
        if depth > MAX_RECIPE_DEPTH:
            return f"holds more than {MAX_RECIPE_DEPTH} levels, or an alias of itself"
        if isinstance(value, dict):
            if strange := [key for key in value if not isinstance(key, str)]:
                return f"has the key {strange[0]!r}, which is no word"
            if "class_path" in value:
                return "has the key class_path, which would import and run any code that it names"
            waiting += [(one, depth + 1) for one in value.values()]
        elif isinstance(value, list):
            waiting += [(one, depth + 1) for one in value]
    return ""


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
        elif key == _OPTIONS and not isinstance(value, dict | None):
            # A string would be parsed as YAML of its own, past all checks.
            raise CmaeError(f"{source}: {_BAD_OPTIONS}", key=key)
        elif key in known and not is_section and name not in _ON_THE_COMMAND_LINE:
            yield key, value
        else:
            is_plain = isinstance(value, int | float | None)
            held = repr(value) if is_plain else f"a {type(value).__name__}"
            what = f"is a section, and holds {held}" if is_section else "is no setting"
            hint = "" if is_section else nearest(key, known)
            if key == "allow_pipe":
                what, hint = "can only be given on the command line", ""
            raise CmaeError(f"{source}: {printable(key)} {what}{hint}", key=key)


def add_config(parser: Parser) -> None:
    """Add a run's configuration: recipes, dotted overrides, `--print_config`."""
    parser.usage = f"{parser.prog} [--recipe NAME_OR_FILE] [--KEY VALUE ...]"
    parser.add_argument(
        "--recipe",
        action=_Recipe,
        help=f"YAML file, or one of: {', '.join(recipe_names())}. Several may be given; what comes "
        "later on the command line wins.",
    )
    parser.add_argument(
        "--allow_pipe",
        action="store_true",
        help="Run the shell commands that recipes give as 'pipe:' in data.shards. Without it they are "
        "refused; a 'pipe:' on the command line is yours.",
    )
    parser.add_class_arguments(Config)
    parser.link_arguments("model.img_size", "data.views.img_size")
    for action in parser._actions:
        if action.dest in {f"data.{name}" for name in FROM_THE_RUN}:
            action.help = argparse.SUPPRESS
    for key in OLD_KEYS:
        parser.add_argument(
            f"--{key}",
            action=_OldOption,
            nargs=1,
            dest=argparse.SUPPRESS,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )


def add_evaluation_settings(parser: Parser, settings: type) -> None:
    """Add the fields of a dataclass as options, and `--recipe` with the recipes of evaluation."""
    parser.add_argument(
        "--recipe",
        action=_EvaluationRecipe,
        help=f"YAML file, or one of: {', '.join(recipe_names('evaluation'))}. What comes later on the "
        "command line wins.",
    )
    parser.add_class_arguments(settings)


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
        loader = {field.name for field in fields(LoaderConfig)} - {"seed"}
        if error.key in loader or error.key.startswith("views."):
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


def load_recipe(
    *recipes: str | Path, overrides: Mapping[str, Any] | None = None, allow_pipe: bool = False
) -> Config:
    """The configuration of a run, from recipes and values in Python.

    Args:
        *recipes: YAML files or names of recipes that ship with the package; later ones override earlier ones.
        overrides: Values by dotted key, such as {"data.shards": "/data/*.tar"}, which override all recipes.
        allow_pipe: Whether a recipe's `pipe:` shards may run their commands.

    Raises:
        CmaeError: A recipe or a key is not known, a value is out of range, or values do not fit each other.
    """
    arguments = [word for recipe in recipes for word in ("--recipe", str(recipe))]
    for key, value in (overrides or {}).items():
        plain = str(value) if isinstance(value, str | Path) else json.dumps(value, default=str)
        arguments.append(f"--{key}={plain}")
    if allow_pipe:
        arguments.append("--allow_pipe")
    return parse_config(arguments)
