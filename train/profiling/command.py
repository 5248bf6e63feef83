"""`cmae profile`."""

from __future__ import annotations

import os

from rich.console import Console

from cmae.train.config import Config
from cmae.train.profiling.config import ProfileConfig
from cmae.train.profiling.profiler import profile
from cmae.train.profiling.report.html import write_html
from cmae.train.profiling.report.terminal import print_profile
from cmae.train.profiling.report.trace import write_trace


def run(config: Config, options: ProfileConfig) -> int:
    """Profile, print what was found, and write it as JSON, HTML and Chrome trace."""
    found = profile(config, options)
    if (
        os.environ.get("RANK", "0") != "0"
    ):  # under torchrun the first rank speaks and writes for all
        return 0
    found.save(options.out / "profile.json")
    write_html(found, options.out / "report.html")
    write_trace(found, options.out / "trace.json")
    console = Console(highlight=False)
    print_profile(found, console)
    console.print(
        f"wrote profile.json, report.html and trace.json (https://ui.perfetto.dev) to {options.out}",
        soft_wrap=True,
    )
    return 0
