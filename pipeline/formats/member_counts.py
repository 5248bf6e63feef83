"""What became of every member of a tar: used in a sample, or left out, and why.

The sum over all fates is the number of entries in the tar: nothing is left out without being counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cmae.pipeline.formats.printable import printable

IMAGE = "image"
LABEL = "label"
BESIDE = "file beside an image, not read"
SECOND_IMAGE = "second image of a sample"
LONE_LABEL = "label without an image beside it"
UNREADABLE_LABEL = "label that cannot be read"
OTHER_LABEL = "second label of a sample, not the same"
DOTTED_IMAGE = "image with a dot in its name"
HIDDEN = "hidden or side file"
NO_IMAGE = "file without an image beside it"

_USED = frozenset({IMAGE, LABEL})
_HARMLESS = frozenset({BESIDE, HIDDEN, NO_IMAGE, "folder"})

_ADVICE = {
    SECOND_IMAGE: "only the first is used: give each a key of its own",
    LONE_LABEL: "sort the tar by name, or join them with `cmae shards repair`",
    UNREADABLE_LABEL: "a label is an integer >= 0 in .cls, or `label` in .json",
    OTHER_LABEL: "the first one is used",
    DOTTED_IMAGE: "a key ends at the first dot of the file name: name them otherwise",
    "hard link": "the tar holds no second copy: write it with --hard-dereference, or use "
    "`cmae shards repair`",
    "symbolic link": "write the tar with --dereference",
    "sparse file": "write the tar without --sparse, or use `cmae shards repair`",
}
_DEFAULT_ADVICE = "the loader reads JPEG only: `cmae shards repair --reencode true` makes JPEGs"


@dataclass
class MemberCounts:
    """Members of one tar, or of several, by fate, with one example of each."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, fate: str, example: str, count: int = 1) -> None:
        """Count members; the first example of a fate is kept."""
        self.counts[fate] = self.counts.get(fate, 0) + count
        if fate not in self.examples:
            self.examples[fate] = printable(example)

    @property
    def total(self) -> int:
        """Entries of the tar."""
        return sum(self.counts.values())

    @property
    def lost(self) -> dict[str, int]:
        """Images and labels that no sample holds, by reason."""
        return {
            fate: count
            for fate, count in self.counts.items()
            if fate not in _USED and not is_harmless(fate)
        }

    @property
    def passed_over(self) -> dict[str, int]:
        """Members that no sample needs, by reason."""
        return {fate: count for fate, count in self.counts.items() if is_harmless(fate)}

    def lost_lines(self) -> list[str]:
        """For people: '3 x png image left out, such as 2.png: ...', one line for each reason."""
        return [
            f"{count} x {fate}, such as {self.examples[fate]}: {_ADVICE.get(fate, _DEFAULT_ADVICE)}"
            for fate, count in self.lost.items()
        ]

    def line(self) -> str:
        """For people: '12 members: 4 images, 4 labels; 3 x png image, ...' over all that are there."""
        used = [f"{self.counts.get(fate, 0)} {fate}s" for fate in (IMAGE, LABEL)]
        rest = {**self.lost, **self.passed_over}
        left_out = [f"{count} x {fate} ({self.examples[fate]})" for fate, count in rest.items()]
        line = f"{self.total} members: {', '.join(used)}"
        return f"{line}; left out: {', '.join(left_out)}" if left_out else line


def is_harmless(fate: str) -> bool:
    """Whether members of this fate hold neither an image nor a label that somebody may miss."""
    return fate in _HARMLESS


def sum_members(parts: Iterable[MemberCounts]) -> MemberCounts:
    """Counts of several tars in one."""
    total = MemberCounts()
    for part in parts:
        for fate, count in part.counts.items():
            total.add(fate, part.examples[fate], count)
    return total


def from_arrays(
    fates: Iterable[str], counts: Iterable[int], examples: Iterable[str]
) -> MemberCounts:
    """Counts as an index stores them."""
    found = MemberCounts()
    for fate, count, example in zip(fates, counts, examples, strict=True):
        found.add(fate, example, count)
    return found


def to_arrays(members: MemberCounts) -> Mapping[str, list[str] | list[int]]:
    """What an index stores; see `from_arrays`."""
    return {
        "member_fates": list(members.counts),
        "member_counts": list(members.counts.values()),
        "member_examples": [members.examples[fate] for fate in members.counts],
    }
