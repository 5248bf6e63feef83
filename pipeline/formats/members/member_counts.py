"""What became of every member of a tar: used in a sample, or left out, and why.

The sum over all fates is the number of entries in the tar: nothing is left out without being counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cmae.printable import printable

IMAGE = "image"
LABEL = "label"
BESIDE = "file beside an image, not read"
SECOND_IMAGE = "second image of a sample"
LONE_LABEL = "label without an image beside it"
UNREADABLE_LABEL = "label that cannot be read"
LABEL_OUT_OF_RANGE = "label out of range"
OTHER_LABEL = "second label of a sample, not the same"
BESIDE_IMAGE = "image file beside an image, not read"
DOTTED_IMAGE = "image with a dot in its name"
DOTTED_LABEL = "label with a dot in its name"
HIDDEN = "hidden or side file"
NO_IMAGE = "file without an image beside it"
DAMAGED = "damaged stretch"

LOST_LABELS = (LONE_LABEL, DOTTED_LABEL, UNREADABLE_LABEL, LABEL_OUT_OF_RANGE)
"""Labels that no sample has, though they are there."""

_MAX_PARTS = 20
"""Reasons that an account names one by one."""

_USED = frozenset({IMAGE, LABEL})
_HARMLESS = frozenset({BESIDE, BESIDE_IMAGE, HIDDEN, NO_IMAGE, "folder"})

_ADVICE = {
    SECOND_IMAGE: "only the first is used: `cmae shards repair` gives each a key of its own",
    LONE_LABEL: "sort the tar by name, or join them with `cmae shards repair`",
    UNREADABLE_LABEL: "a label is digits in .cls, or an integer `label` in .json: write it so",
    LABEL_OUT_OF_RANGE: "a label is an integer from 0 to 2**63 - 1",
    OTHER_LABEL: "the first one is used",
    DOTTED_IMAGE: "a key ends at the first dot of the file name: `cmae shards repair` renames them",
    DOTTED_LABEL: "a key ends at the first dot of the file name: `cmae shards repair` renames them",
    DAMAGED: "`cmae shards repair` writes what is left around it",
    "hard link": "the tar holds no second copy: write it with --hard-dereference, or use "
    "`cmae shards repair`",
    "symbolic link": "write the tar with --dereference",
    "sparse file": "write the tar without --sparse (bsdtar: --no-read-sparse)",
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

    def move(self, fate: str, to: str, count: int | None = None, example: str = "") -> None:
        """Count members that were of one fate as of another; `count` None means all of them."""
        count = self.counts[fate] if count is None else count
        self.add(to, example or self.examples[fate], count)
        self.counts[fate] -= count
        if not self.counts[fate]:
            del self.counts[fate], self.examples[fate]

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

    def line(self, what: str = "entries") -> str:
        """For people: '12 entries = 4 images + 4 labels + 3 x png image (2.png) + ...'."""
        used = {fate: count for fate, count in self.counts.items() if fate in _USED}
        rest = sorted(
            ((count, fate) for fate, count in self.counts.items() if fate not in _USED),
            reverse=True,
        )
        parts = [f"{used.get(fate, 0)} {fate}s" for fate in (IMAGE, LABEL) if fate in used]
        parts += [f"{count} x {fate} ({self.examples[fate]})" for count, fate in rest[:_MAX_PARTS]]
        if more := sum(count for count, _ in rest[_MAX_PARTS:]):
            parts.append(f"{more} x {len(rest) - _MAX_PARTS} other reasons")
        return f"{self.total} {what} = {' + '.join(parts) or '0'}"


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
