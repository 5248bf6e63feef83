"""Make clean shards from damaged ones: keep every byte that is good, leave out and list what is not.

A repaired folder holds a tar for each source shard (same name, same order of the records), its index,
`classes.json` if the source has one, `dataset.json`, and `repaired.jsonl` with a line for everything that is
not as it was, or that was left though it may be bad. Nothing is dropped on a suspicion. A shard without a
fault is copied to the byte.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from cmae.errors import CmaeError
from cmae.paths import expand_home
from cmae.pipeline.formats.atomic import atomic_write
from cmae.pipeline.formats.dataset_folder import CLASSES_FILE, load_classes
from cmae.pipeline.formats.images.pixels import decode_any
from cmae.pipeline.formats.members.file_names import IMAGE_EXTENSIONS
from cmae.pipeline.formats.members.labels import NO_LABEL
from cmae.pipeline.formats.members.member_counts import DAMAGED, MemberCounts, sum_members
from cmae.pipeline.formats.parallel import no_progress, run_threads
from cmae.pipeline.formats.shard_index import build_index, index_path, save_index, tar_digest
from cmae.pipeline.formats.shard_tar import ShardTar, padded
from cmae.pipeline.shards.output_folder import (
    claim_folder,
    is_finished,
    mark_begun,
    mark_complete,
    remove_leftovers,
    write_json,
)
from cmae.pipeline.shards.recover import Damage
from cmae.pipeline.shards.repair_look import (
    Entry,
    Kept,
    Lost,
    RepairPolicy,
    Sample,
    ShardLook,
    look,
)
from cmae.pipeline.shards.verify import Problem, verify_shards

__all__ = ["REPAIRED_FILE", "RepairPolicy", "RepairReport", "reencode_as_jpeg", "repair_shards"]

REPAIRED_FILE = "repaired.jsonl"

DEFAULT_POLICY = RepairPolicy()

_COPIED, _JOINED, _RENAMED, _REENCODED = (
    "copied",
    "joined to its sample",
    "renamed",
    "encoded again",
)
_CHUNK = 16 << 20


class RepairReport(NamedTuple):
    """Counts over the whole folder after `repair_shards`."""

    num_shards: int
    num_samples: int
    num_dropped: int
    """Entries and samples left out."""
    num_renamed: int
    num_reencoded: int
    num_damages: int
    """Stretches of the source tars in which nothing could be recognised."""
    num_joined: int
    """Parts of samples that lay apart."""
    num_suspect: int
    """Samples kept though something about them may be wrong."""
    members: MemberCounts
    """What became of every entry of the source tars."""
    problems: tuple[Problem, ...]
    """What `verify_shards` finds in the repaired ones."""


class _Piece(NamedTuple):
    """Some bytes of a repaired tar."""

    start: int
    """In the source."""
    size: int
    name: str = ""
    """Of the member, for which a header is made; '' where whole blocks are copied, headers included."""
    reencode: bool = False
    data: bytes = b""
    """What to write instead of bytes of the source."""


@dataclass
class _Plan:
    """What the repaired copy of one shard holds."""

    pieces: list[_Piece] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)
    """Of `repaired.jsonl`."""
    members: MemberCounts = field(default_factory=MemberCounts)
    num_samples: int = 0
    is_unchanged: bool = True


def repair_shards(
    shards: Sequence[str | Path],
    out_dir: str | Path,
    policy: RepairPolicy = DEFAULT_POLICY,
    *,
    workers: int | None = None,
    progress: Callable[[int], None] = no_progress,
) -> RepairReport:
    """Write clean copies of shards, and verify them; can be stopped and run again.

    Good records keep their bytes, members and order. Records around a damage of a tar are recovered, images
    that cannot be used are dropped, parts of a sample that lie apart are joined, and keys become unique.

    Args:
        shards: Local tar files; an index beside one lends its CRC32 for each record that still lies where it
            says, even if the tar has changed. A link is a shard of its own: its name, index and
            `classes.json` are those of the place where it lies.
        out_dir: A folder of its own; made if missing.
        policy: What becomes of records that could be treated in more than one way.
        workers: Threads.
        progress: Called with 1 after each shard of each of the three passes.

    Raises:
        CmaeError: The folder holds something else; two shards have the same name; nothing usable is left; a
            shard changed meanwhile.
        OSError: A file that cannot be read or written.
    """
    paths = [Path(shard).absolute() for shard in shards]
    out = expand_home(out_dir).absolute()
    _check_names(out, paths)
    digests = [tar_digest(path) for path in paths]
    settings = _settings(paths, digests, policy)
    claim_folder(out, settings)
    remove_leftovers(out / path.name for path in paths)
    mark_begun(out, settings)
    classes = _common_classes(paths)
    stop = threading.Event()
    threads: dict[str, Any] = {"workers": workers, "progress": progress, "stop": stop.set}
    looks = run_threads(lambda path: look(path, policy, stop), paths, **threads)
    plans = _Planner(looks, policy, num_classes=len(classes or ())).plans(paths, looks)
    if classes is not None:
        write_json(out / CLASSES_FILE, classes)
    with atomic_write(out / REPAIRED_FILE) as file:
        lines = [line for plan in plans for line in plan.lines]
        file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
    run_threads(
        lambda item: _write_shard(*item, out=out, stop=stop),
        list(zip(paths, digests, plans, strict=True)),
        **threads,
    )
    return _finish(out, paths, settings, plans, policy, num_classes=len(classes or ()), **threads)


def reencode_as_jpeg(image: bytes) -> bytes:
    """RGB JPEG of the first frame of an image that Pillow reads; transparency is dropped.

    Raises:
        BadImageError: Pillow cannot read it, it is truncated, or above the pixel limit.
    """
    file = io.BytesIO()
    decode_any(image).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


class _Planner:
    """Decides over all shards together: labels and keys are those of a data set."""

    def __init__(
        self, looks: Sequence[ShardLook], policy: RepairPolicy, *, num_classes: int
    ) -> None:
        samples = [one for look in looks for one in look.items if isinstance(one, Sample)]
        self._policy = policy
        self._num_classes = num_classes
        self._keys = _Keys(policy, taken={sample.key for sample in samples})
        self._has_labels = any(one.label != NO_LABEL for one in samples if not one.entry.fault)

    def plans(self, paths: Sequence[Path], looks: Sequence[ShardLook]) -> list[_Plan]:
        """What to write for each shard."""
        return [self._plan(path, one) for path, one in zip(paths, looks, strict=True)]

    def _plan(self, path: Path, look: ShardLook) -> _Plan:
        plan = _Plan(is_unchanged=look.has_end)
        line = {"shard": path.name}
        for item in look.items:
            if isinstance(item, Damage):
                what = f"bytes {item.start} to {item.end}: {item.what}"
                plan.lines.append(line | {"action": "damage", "reason": what})
                plan.members.add(DAMAGED, what)
                plan.is_unchanged = False
            elif isinstance(item, Kept):
                self._keep_entry(plan, item.entry)
            elif isinstance(item, Lost):
                self._drop_entry(plan, line, item)
            else:
                self._add_sample(plan, line, item)
        return plan

    def _keep_entry(self, plan: _Plan, entry: Entry) -> None:
        member = entry.member
        if entry.is_link:
            # What it leads to may not be in the repaired tar.
            plan.pieces.append(_Piece(member.byte_offset, member.size, member.name))
            plan.is_unchanged = False
        else:
            plan.pieces.append(_Piece(member.start, member.end - member.start))
        plan.members.add(_RENAMED if entry.is_link else _COPIED, member.name)

    def _drop_entry(self, plan: _Plan, line: dict[str, Any], item: Lost) -> None:
        member, text = item.entry.member, item.entry.label_text
        about = {"member": member.name, "offset": member.byte_offset, "action": "dropped"}
        label = {"label": text} if text else {}
        reason = ": ".join(filter(None, (item.reason, item.detail)))
        plan.lines.append(line | about | {"reason": reason} | label)
        plan.members.add(f"dropped: {item.reason}", member.name)
        plan.is_unchanged = False

    def _add_sample(self, plan: _Plan, line: dict[str, Any], sample: Sample) -> None:
        about = {"key": sample.key, "offset": sample.entry.member.byte_offset}
        line = line | about
        doubt = self._doubt(sample)
        reason = sample.entry.fault or (doubt if self._policy.unlabelled == "drop" else "")
        key, note = (None, reason) if reason else self._keys.claim(sample)
        if key is None:
            label = {} if sample.label == NO_LABEL else {"label": sample.label}
            plan.lines.append(line | {"action": "dropped", "reason": note} | label)
            for entry in sample.members.values():
                plan.members.add("dropped: its image cannot be used", entry.member.name)
            plan.is_unchanged = False
            return
        if sample.is_renamed or key != sample.key:
            note = note or "the name has more than one dot, or WebDataset passes over it"
            change = {"action": "renamed", "reason": note, "new_key": key}
            plan.lines.append(line | {"member": sample.entry.member.name} | change)
        for name, text in sample.joined.items():
            what = {"action": "joined", "member": name, "reason": "lay apart from its image"}
            plan.lines.append(line | what | ({"label": text} if text else {}))
        if sample.entry.reencode:
            what = {"action": "reencoded", "reason": "now a JPEG of quality 95"}
            plan.lines.append(line | what)
        for suspicion in filter(None, (sample.entry.suspicion, doubt)):
            plan.lines.append(line | {"action": "kept", "reason": suspicion})
        plan.num_samples += 1
        _add_pieces(plan, line, sample, key)

    def _doubt(self, sample: Sample) -> str:
        """What is wrong with the label of a sample; '' if nothing is, or nobody needs it."""
        if not self._has_labels:
            return ""
        if sample.label == NO_LABEL:
            unread = [one for one in sample.members.values() if isinstance(one.label, str)]
            if unread:
                return f"{unread[0].label}: {unread[0].member.name} says {unread[0].label_text}"
            return "no integer label in .cls or .json, and other records have one"
        if self._num_classes and sample.label >= self._num_classes:
            return f"label {sample.label} is beyond the {self._num_classes} names in {CLASSES_FILE}"
        return ""


def _add_pieces(plan: _Plan, line: dict[str, Any], sample: Sample, key: str) -> None:
    """The members of a sample: copied whole where they keep their name and payload."""
    is_renamed = sample.is_renamed or key != sample.key
    members = dict(sample.members)
    if sample.label not in (NO_LABEL, sample.stated_label):
        unread = members.pop("cls", None)
        if unread is not None:
            plan.members.add("dropped: replaced by the label of the index", unread.member.name)
        label = str(sample.label).encode()
        plan.pieces.append(_Piece(0, 0, f"{key}.cls", data=label))
        if sample.label_of is None:
            reason = f"label {sample.label} is that of the index"
            plan.lines.append(line | {"action": "relabelled", "reason": reason})
        plan.is_unchanged = False
    for extension, entry in members.items():
        is_image = extension == sample.image
        to_jpg = is_image and (entry.reencode or extension not in IMAGE_EXTENSIONS)
        member = entry.member
        fate = _COPIED
        if is_renamed or to_jpg or entry.is_link:
            name = f"{key}.{'jpg' if to_jpg else extension}"
            reencode = is_image and entry.reencode
            plan.pieces.append(_Piece(member.byte_offset, member.size, name, reencode))
            fate = _REENCODED if reencode else _RENAMED
        else:
            plan.pieces.append(_Piece(member.start, member.end - member.start))
        if member.name in sample.joined:
            fate = _JOINED
        plan.members.add(fate, member.name)
        plan.is_unchanged &= fate == _COPIED


class _Keys:
    """Gives every record a key of its own."""

    def __init__(self, policy: RepairPolicy, taken: set[str]) -> None:
        self._policy = policy
        self._taken = taken
        self._first: dict[str, bytes] = {}

    def claim(self, one: Sample) -> tuple[str | None, str]:
        """The key to write under (None = drop), and the reason where it is not the record's own."""
        digest = one.entry.digest
        if one.key not in self._first:
            self._first[one.key] = digest
            return one.key, ""
        if self._first[one.key] == digest:
            return None, "the key and the image occur before"
        if self._policy.duplicates == "drop":
            return None, "the key occurs before"
        number = 2
        while f"{one.key}_dup{number}" in self._taken:
            number += 1
        key = f"{one.key}_dup{number}"
        self._taken.add(key)
        return key, "the key occurs before with another image"


def _write_shard(path: Path, digest: str, plan: _Plan, *, out: Path, stop: threading.Event) -> None:
    """Second pass: write the repaired copy of a shard, and index it."""
    target = out / path.name
    if (not plan.num_samples and not plan.is_unchanged) or is_finished(target):
        return
    with atomic_write(target) as file, open(path, "rb") as source:
        if plan.is_unchanged:
            _copy(source, file, 0, os.fstat(source.fileno()).st_size, stop)
        else:
            tar = ShardTar(file)
            for piece in plan.pieces:
                _write_piece(tar, source, piece, stop)
            tar.end()
        if tar_digest(path) != digest:
            raise CmaeError(
                f"{path} changed while it was read: repair it again when it is complete"
            )
    save_index(build_index(target), index_path(target))


def _write_piece(tar: ShardTar, source: IO[bytes], piece: _Piece, stop: threading.Event) -> None:
    if piece.name:
        data = piece.data or os.pread(source.fileno(), piece.size, piece.start)
        tar.add(piece.name, reencode_as_jpeg(data) if piece.reencode else data)
        return
    _copy(source, tar, piece.start, piece.size, stop)
    tar.add_raw(bytes(padded(tar.size) - tar.size))  # the last member of a file that was cut


def _copy(
    source: IO[bytes], out: IO[bytes] | ShardTar, start: int, size: int, stop: threading.Event
) -> None:
    """Copy bytes as they are."""
    source.seek(start)
    while size and (data := source.read(min(size, _CHUNK))):
        if stop.is_set():
            raise InterruptedError("stopped")
        if isinstance(out, ShardTar):
            out.add_raw(data)
        else:
            out.write(data)
        size -= len(data)


def _check_names(out: Path, paths: Sequence[Path]) -> None:
    """Refuse shards whose repaired copies would replace each other, or the shards themselves."""
    twice = [name for name, count in Counter(path.name for path in paths).items() if count > 1]
    if twice:
        raise CmaeError(
            f"{len(twice)} shard name(s) occur twice, such as {twice[0]}: repair each folder by itself"
        )
    folders = {
        folder for path in paths for folder in (path.parent.resolve(), path.resolve().parent)
    }
    if out.resolve() in folders:
        raise CmaeError(
            f"{out} is the folder of the shards: write the repaired ones to another one"
        )


def _settings(
    paths: Sequence[Path], digests: Sequence[str], policy: RepairPolicy
) -> dict[str, Any]:
    digest = hashlib.sha256()
    for path, one in zip(paths, digests, strict=True):
        digest.update(f"{path.name}\0{one}\n".encode(errors="surrogateescape"))
    return {"source_shards": digest.hexdigest()[:16], **vars(policy)}


def _common_classes(paths: Sequence[Path]) -> list[str] | None:
    lists = [load_classes(folder) for folder in sorted({path.parent for path in paths})]
    if any(one != lists[0] for one in lists):
        raise CmaeError(
            f"the shards lie in folders with different {CLASSES_FILE}: repair each folder by itself"
        )
    return lists[0]


def _finish(
    out: Path,
    paths: Sequence[Path],
    settings: dict[str, Any],
    plans: Sequence[_Plan],
    policy: RepairPolicy,
    *,
    num_classes: int,
    workers: int | None,
    progress: Callable[[int], None],
    stop: Callable[[], None],
) -> RepairReport:
    written = [out / path.name for path in paths if (out / path.name).exists()]
    num_samples = sum(plan.num_samples for plan in plans)
    if not num_samples and not written:
        raise CmaeError(
            f"no record of the {len(paths)} shards can be used; {out / REPAIRED_FILE} says why"
        )
    checked = verify_shards(written, decode=policy.decode, workers=workers, progress=progress)
    actions = Counter(line["action"] for plan in plans for line in plan.lines)
    facts = {
        "num_samples": num_samples,
        "num_shards": len(written),
        "num_bytes": sum(os.path.getsize(path) for path in written),
        "num_classes": num_classes,
    }
    mark_complete(out, settings, facts)
    return RepairReport(
        num_shards=len(written),
        num_samples=num_samples,
        num_dropped=actions["dropped"],
        num_renamed=actions["renamed"],
        num_reencoded=actions["reencoded"],
        num_damages=actions["damage"],
        num_joined=actions["joined"],
        num_suspect=actions["kept"],
        members=sum_members(plan.members for plan in plans),
        problems=checked.problems,
    )
