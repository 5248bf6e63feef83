"""`cmae profile`."""

from __future__ import annotations

from cmae.train.config import Config
from cmae.train.profiling.config import ProfileConfig
from cmae.train.profiling.profiler import profile
from cmae.train.profiling.records import Profile


def run(config: Config, options: ProfileConfig) -> int:
    """Profile, write `profile.json` and print what was found."""
    found = profile(config, options)
    path = options.out / "profile.json"
    found.save(path)
    print("\n".join(lines(found)))
    print(f"wrote {path}")
    return 0


def lines(found: Profile) -> list[str]:
    """The profile as plain text."""
    total = found.step_ms.value
    out = ["", found.verdict.sentence, "", f"step {total:.1f} ms, of which"]
    for part in found.parts:
        ms = part.ms
        out.append(
            f"  {part.name:<15} {ms.value:9.1f} ms  {100 * ms.value / total:5.1f} %"
            f"  [{ms.low:.1f}, {ms.high:.1f}]  {part.note}"
        )
    out.append("")
    for phase in found.phases:
        rate = phase.images_per_s
        out.append(
            f"  {phase.name:<15} {rate.value:9.1f} images/s  [{rate.low:.1f}, {rate.high:.1f}]  {phase.what}"
        )
    out.append("")
    for action in found.actions:
        settings = " ".join(f"--{key} {value}" for key, value in action.overrides.items())
        out.append(
            f"  {action.what} {settings}: {action.predicted_images_per_s:.1f} images/s, "
            f"then {action.then_binds} binds"
        )
    return [*out, "", *found.notes]
