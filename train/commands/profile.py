"""`cmae profile`: a new profile, or `show` and `diff` of those that are already there."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from cmae.train.config import Config
from cmae.train.config_parser import Parser
from cmae.train.profiling.analysis.records import Profile, load_profile
from cmae.train.profiling.config import ProfileConfig
from cmae.train.profiling.report.terminal import print_profile


def profile_run(config: Config, options: ProfileConfig) -> int:
    """Profile, print what was found, and write it as JSON and HTML.

    Args:
        config: Configuration of the run.
        options: How long to measure, and where the files go.
    """
    from cmae.train.profiling.profiler import profile

    found = profile(config, options)
    if os.environ.get("RANK", "0") != "0":
        # Under torchrun the first rank prints and writes for all.
        return 0
    found.save(options.out / "profile.json")
    console = Console(highlight=False)
    print_profile(found, console)
    _write_report(found, options.out / "report.html", console)
    return 0


def profile_tools(arguments: Sequence[str]) -> int | None:
    """Run `show` or `diff`; None when the arguments ask for neither, and so for a new profile.

    Raises:
        ValueError: A file is no profile.
    """
    if not arguments or arguments[0] not in _TOOLS:
        return None
    return _TOOLS[arguments[0]](arguments[1:])


def _show(arguments: Sequence[str]) -> int:
    parser = Parser(prog="cmae profile show", description="Print a profile; draw it where asked.")
    parser.add_argument("profile", type=Path, help="profile.json of `cmae profile`")
    parser.add_argument("--html", type=Path, default=None, help="HTML report to write")
    parsed = parser.parse_args(list(arguments))
    profile, console = load_profile(parsed.profile), Console(highlight=False)
    print_profile(profile, console)
    if parsed.html is not None:
        _write_report(profile, parsed.html, console)
    return 0


def _diff(arguments: Sequence[str]) -> int:
    from cmae.train.profiling.report.diff import diff_profiles, print_diff

    parser = Parser(prog="cmae profile diff", description="What changed between two profiles.")
    parser.add_argument("before", type=Path, help="the older profile.json")
    parser.add_argument("after", type=Path, help="the newer one")
    parser.add_argument("--html", type=Path, default=None, help="HTML report to write")
    parsed = parser.parse_args(list(arguments))
    diff = diff_profiles(load_profile(parsed.before), load_profile(parsed.after))
    console = Console(highlight=False)
    print_diff(diff, console)
    if parsed.html is not None:
        from cmae.train.profiling.report.html import write_diff_html

        write_diff_html(diff, parsed.html)
        console.print(f"wrote {parsed.html}", soft_wrap=True)
    return 0


def _write_report(profile: Profile, path: Path, console: Console) -> None:
    from cmae.train.profiling.report.html import write_html

    write_html(profile, path)
    console.print(f"wrote {path}", soft_wrap=True)


_TOOLS: dict[str, Callable[[Sequence[str]], int]] = {"show": _show, "diff": _diff}
