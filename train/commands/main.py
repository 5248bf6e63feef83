"""The command `cmae`: one parser, whose subcommands add their arguments when they are called."""

from __future__ import annotations

import argparse
import codecs
import difflib
import errno
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import cmae
from cmae.errors import CmaeError
from cmae.printable import MAX_LINE, printable, printable_lines
from cmae.train.commands.registry import COMMANDS, Command
from cmae.train.machine import is_first_rank
from cmae.train.monitor.sinks import LastingStream

_EPILOG = """\
start with `cmae demo`, or `cmae doctor` on a new machine

exit codes
    0  done
    1  an error that the message explains, or a check that found something wrong
    2  a command line that cannot be understood
   75  stopped by SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 or SIGXCPU, with a checkpoint: start it again
  130  stopped by Ctrl-C
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the console script's entry.

    A `CmaeError`, and a file that the system refuses, become one message; every other exception is a defect
    and keeps its traceback.

    Args:
        argv: Words after `cmae`; None takes those of this process.

    Returns:
        The exit code; `cmae --help` lists them.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    prog = " ".join(["cmae", *_named(words, COMMANDS)])
    with _lasting_output() as keep_stdout:
        try:
            if words[:1] == ["launch"] and not {"-h", "--help"} & set(words[1:2]):
                from cmae.train.commands.launch import launch

                return launch(words[1:])
            parsed = build_parser().parse_args(words)
            if not parsed.only_shows:
                keep_stdout()
            code: int = parsed.run()
            sys.stdout.flush()
            return code
        except CmaeError as error:
            if not error.is_on_every_rank or is_first_rank():
                _print_error(prog, error)
            return error.exit_code
        except BrokenPipeError:
            # Nobody reads any more, as after `| head`.
            return 1
        except OSError as error:
            if error.filename is None and error.errno not in (
                errno.ENOSPC,
                errno.EDQUOT,
                errno.EIO,
            ):
                raise
            # The system's own words and the file's name say all.
            _print_error(prog, error)
            return 1
        except KeyboardInterrupt:
            print(f"{prog}: interrupted", file=sys.stderr)
            return 130


@contextmanager
def _lasting_output() -> Iterator[Callable[[], None]]:
    """A closed terminal must not end what runs: stderr outlives it, and stdout once the result is called."""
    with ExitStack() as stack:
        _fill_closed()
        _spell_out(stack)
        _plain_messages(stack)
        stack.callback(LastingStream(sys.stdout).settle)

        def keep(name: str) -> None:
            stream = LastingStream(getattr(sys, name))
            stack.callback(setattr, sys, name, getattr(sys, name))
            stack.callback(stream.settle)
            setattr(sys, name, stream)

        keep("stderr")
        if sys.stdout is None:
            keep("stdout")
        yield lambda: keep("stdout")


def _print_error(prog: str, error: Exception) -> None:
    """Print an error; lines after the first are indented, so that none can pass for another message."""
    first, *others = (printable(line, limit=MAX_LINE) for line in str(error).split("\n"))
    print("\n  ".join([f"{prog}: error: {first}", *others]), file=sys.stderr)


def _spell_out(stack: ExitStack) -> None:
    """Print what the terminal's encoding lacks in other characters: a bar of # is better than no table."""
    codecs.register_error("cmae", _in_other_characters)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stack.callback(stream.reconfigure, errors=stream.errors)
            stream.reconfigure(errors="cmae")


_OTHER_CHARACTERS = {"█": "#", "▒": ":", "░": ".", "→": ">", "µ": "u", "–": "-", "×": "x", "…": "~"}
_OTHER_CHARACTERS |= dict.fromkeys("▏▎▍▌▋▊▉", "#")


def _in_other_characters(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    found = error.object[error.start : error.end]
    spelled = "".join(
        _OTHER_CHARACTERS.get(one) or one.encode("ascii", "backslashreplace").decode()
        for one in found
    )
    return spelled, error.end


def _plain_messages(stack: ExitStack) -> None:
    """Log lines and warnings without control characters, where nobody has set up logging."""
    if (last_resort := logging.lastResort) is not None:
        stack.callback(last_resort.setFormatter, last_resort.formatter)
        last_resort.setFormatter(_PlainFormatter())
    format_before: Any = warnings.formatwarning

    def format_plain(message: Warning | str, *place: Any, **more: Any) -> str:
        text: str = format_before(printable(str(message), limit=MAX_LINE), *place, **more)
        return text

    stack.callback(setattr, warnings, "formatwarning", format_before)
    warnings.formatwarning = format_plain


class _PlainFormatter(logging.Formatter):
    """One line for a message, and an indented traceback."""

    def format(self, record: logging.LogRecord) -> str:
        text = printable(record.getMessage(), limit=MAX_LINE)
        if record.exc_info:
            lines = printable_lines(self.formatException(record.exc_info)).split("\n")
            text = "\n  ".join([text, *lines])
        return text


def _fill_closed() -> None:
    """Take the numbers of closed standard streams, or the next file would get what libraries print."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _named(words: Sequence[str], commands: Mapping[str, Command]) -> Iterator[str]:
    """The words that name the command, up to the first that names none."""
    if words and words[0] in commands:
        yield words[0]
        yield from _named(words[1:], commands[words[0]].commands)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _LateParser(
        prog="cmae",
        description="Pretrain Contrastive Masked Autoencoders from sharded images.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"cmae {cmae.__version__}")
    _add_commands(parser, COMMANDS)
    return parser


def _add_commands(parser: _LateParser, commands: dict[str, Command]) -> None:
    parser.set_defaults(run=lambda: print(parser.format_help()) or 0, only_shows=True)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, command in commands.items():
        subparser = subparsers.add_parser(name, help=command.summary, command=command)
        if command.commands:
            subparser.description = command.description or command.summary
            _add_commands(subparser, command.commands)


class _LateParser(argparse.ArgumentParser):
    """A parser that gets its arguments when its command is called: `cmae --help` loads nothing else."""

    def __init__(self, *, command: Command | None = None, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)
        self._command = command

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the command's words, if there is a command; its namespace holds what runs it."""
        command = self._command
        is_inside = command is not None and bool(args) and args[0] in command.commands
        if command is None or command.build is None or is_inside:
            return super().parse_known_args(args, namespace)
        from cmae.train.config_parser import Parser

        parser = Parser(prog=self.prog, description=command.description or command.summary)
        run = command.build(parser)
        parsed = parser.parse_args(args)
        return argparse.Namespace(run=lambda: run(parsed), only_shows=command.only_shows), []

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Name the nearest command where there is none of this name."""
        if action.choices is not None and value not in action.choices:
            close = difflib.get_close_matches(value, action.choices, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            names = ", ".join(action.choices)
            self.error(f"there is no command {value!r}{hint}; the commands are {names}")

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print.

        Raises:
            UsageError: Always.
        """
        from cmae.train.config_parser import UsageError

        raise UsageError(f"{message}; see `{self.prog} --help`")
