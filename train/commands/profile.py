"""`cmae profile show` and `cmae profile diff`: what can be done with profiles that are already there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from cmae.train.config_parser import Parser
from cmae.train.profiling.analysis.records import load_profile
from cmae.train.profiling.report.diff import diff_profiles, print_diff
from cmae.train.profiling.report.html import write_diff_html, write_html
from cmae.train.profiling.report.terminal import print_profile
from cmae.train.profiling.report.trace import write_trace


def profile_tools(arguments: Sequence[str]) -> int | None:
    """Run `show` or `diff`; None when the arguments ask for neither, and so for a new profile.

    Raises:
        ValueError: a file is no profile.
    """
    if not arguments or arguments[0] not in _TOOLS:
        return None
    return _TOOLS[arguments[0]](arguments[1:])


def _show(arguments: Sequence[str]) -> int:
    parser = Parser(prog="cmae profile show", description="Print a profile; draw it where asked.")
    parser.add_argument("profile", type=Path, help="profile.json of `cmae profile`")
    parser.add_argument("--html", type=Path, default=None, help="HTML report to write")
    parser.add_argument("--trace", type=Path, default=None, help="Chrome trace to write")
    parsed = parser.parse_args(list(arguments))
    profile, console = load_profile(parsed.profile), Console(highlight=False)
    print_profile(profile, console)
    if parsed.html is not None:
        write_html(profile, parsed.html)
        console.print(f"wrote {parsed.html}", soft_wrap=True)
    if parsed.trace is not None:
        write_trace(profile, parsed.trace)
        console.print(f"wrote {parsed.trace}; open it at https://ui.perfetto.dev", soft_wrap=True)
    return 0


def _diff(arguments: Sequence[str]) -> int:
    parser = Parser(prog="cmae profile diff", description="What changed between two profiles.")
    parser.add_argument("before", type=Path, help="the older profile.json")
    parser.add_argument("after", type=Path, help="the newer one")
    parser.add_argument("--html", type=Path, default=None, help="HTML report to write")
    parsed = parser.parse_args(list(arguments))
    diff = diff_profiles(load_profile(parsed.before), load_profile(parsed.after))
    console = Console(highlight=False)
    print_diff(diff, console)
    if parsed.html is not None:
        write_diff_html(diff, parsed.html)
        console.print(f"wrote {parsed.html}", soft_wrap=True)
    return 0


_TOOLS: dict[str, Callable[[Sequence[str]], int]] = {"show": _show, "diff": _diff}
