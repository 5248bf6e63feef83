"""`cmae profile`: a new profile, or `show` and `diff` of those that are already there."""

from __future__ import annotations

from pathlib import Path

from cmae.paths import check_output
from cmae.train.config import Config
from cmae.train.machine import is_first_rank
from cmae.train.monitor.console import PlainConsole
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

    check_output(options.out / "profile.json", key="profile.out")
    found = profile(config, options)
    if not is_first_rank():
        # Under torchrun the first rank prints and writes for all.
        return 0
    found.save(options.out / "profile.json")
    console = PlainConsole()
    print_profile(found, console)
    _write_report(found, options.out / "report.html", console)
    return 0


def show(path: Path, *, html: Path | None) -> int:
    """Print a profile.

    Args:
        path: File `profile.json`.
        html: HTML report to write.

    Raises:
        ValueError: The file is no profile.
    """
    if html is not None:
        check_output(html, key="--html")
    profile, console = load_profile(path), PlainConsole()
    print_profile(profile, console)
    if html is not None:
        _write_report(profile, html, console)
    return 0


def diff(before: Path, after: Path, *, html: Path | None) -> int:
    """Print what changed between two profiles.

    Args:
        before: File of the older one.
        after: File of the newer one.
        html: HTML report to write.

    Raises:
        ValueError: A file is no profile.
    """
    from cmae.train.profiling.report.diff import diff_profiles, print_diff

    if html is not None:
        check_output(html, key="--html")
    found = diff_profiles(load_profile(before), load_profile(after))
    console = PlainConsole()
    print_diff(found, console)
    if html is not None:
        from cmae.train.profiling.report.html import write_diff_html

        write_diff_html(found, html)
        console.print(f"wrote {html}", soft_wrap=True)
    return 0


def _write_report(profile: Profile, path: Path, console: PlainConsole) -> None:
    from cmae.train.profiling.report.html import write_html

    write_html(profile, path)
    console.print(f"wrote {path}", soft_wrap=True)
