"""Make clean shards from damaged ones: keep every byte that is good, leave out and list what is not.

A repaired folder holds a tar for each source shard (same name, same order of the records), its index,
`classes.json` if the source has one, `dataset.json`, and `repaired.jsonl` with a line for everything that is
not as it was. `cmae shards verify` finds no problem in it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from cmae.pipeline.formats.atomic import atomic_write
from cmae.pipeline.formats.dataset_folder import CLASSES_FILE, load_classes
from cmae.pipeline.formats.jpeg import MAX_PIXELS, BadImageError, Decode
from cmae.pipeline.formats.parallel import no_progress, run_threads
from cmae.pipeline.formats.shard_index import (
    build_index,
    index_path,
    load_index_unchecked,
    save_index,
    tar_digest,
)
from cmae.pipeline.formats.tar import IMAGE_EXTENSIONS, NO_LABEL, TarGroup, TarRecord, record_of
from cmae.pipeline.shards.output_folder import (
    claim_folder,
    is_finished,
    mark_begun,
    mark_complete,
    write_json,
)
from cmae.pipeline.shards.recover import Damage, salvage_groups
from cmae.pipeline.shards.shard_tar import ShardTar
from cmae.pipeline.shards.verify import IndexedBytes, check_image

REPAIRED_FILE = "repaired.jsonl"
_OTHER_IMAGES = frozenset({"png", "webp", "bmp", "gif", "tif", "tiff"})


@dataclass(frozen=True)
class RepairPolicy:
    """What becomes of records that could be treated in more than one way."""

    duplicates: Literal["rename", "drop"] = "rename"
    """A key that occurs again: give it a new name, or keep the first record only. One with the same bytes as
    before is dropped either way."""
    unlabelled: Literal["drop", "keep"] = "drop"
    """A record without a label, or with one beyond `classes.json`, where other records have one."""
    reencode: bool = False
    """Make JPEGs (quality 95, no chroma subsampling) of images in other formats, instead of dropping them."""
    decode: Decode = "none"
    """Also decode every image, and drop those that fail."""


class RepairReport(NamedTuple):
    """Counts over the whole folder after `repair_shards`."""

    num_shards: int
    num_samples: int
    num_dropped: int
    """Records left out."""
    num_renamed: int
    num_reencoded: int
    num_damages: int
    """Stretches of the source tars in which nothing could be recognised."""


class _Decision(NamedTuple):
    """What to do with one group of members. `key` is None when it is dropped."""

    key: str | None
    reencode: bool
    label: int


class _Finding(NamedTuple):
    """One group as the first pass saw it."""

    key: str
    offset: int
    label: int
    digest: bytes
    """Of the image's bytes."""
    fault: str
    """Why the image cannot be used; '' when it can."""
    reencode: bool


def repair_shards(
    shards: Sequence[str | Path],
    out_dir: str | Path,
    policy: RepairPolicy = RepairPolicy(),  # frozen
    *,
    workers: int | None = None,
    progress: Callable[[int], None] = no_progress,
) -> RepairReport:
    """Write clean copies of shards; reads the source twice, and can be stopped and run again.

    Good records keep their bytes, members and order. Records around a damage of a tar are recovered, images
    that cannot be used are dropped, and keys become unique.

    Args:
        shards: Local tar files; an index beside one lends its CRC32 for each record that still lies where it
            says, even if the tar has changed.
        out_dir: A folder of its own; made if missing.
        policy: See there.
        workers: Threads.
        progress: Called with 1 after each shard of each of the two passes.

    Raises:
        ValueError: The folder holds something else; two shards have the same name; nothing usable is left.
        OSError: A file that cannot be read or written.
    """
    paths = [Path(shard).resolve() for shard in shards]
    out = Path(out_dir).expanduser().resolve()
    _check_names(out, paths)
    settings = _settings(paths, policy)
    claim_folder(out, settings)
    mark_begun(out, settings)
    classes = _common_classes(paths)
    stop = threading.Event()
    found = run_threads(
        lambda path: list(_look(path, policy, stop)),
        paths,
        workers=workers,
        progress=progress,
        stop=stop,
    )
    decisions, lines = _decide(paths, found, policy, num_classes=len(classes or ()))
    if classes is not None:
        write_json(out / CLASSES_FILE, classes)
    with atomic_write(out / REPAIRED_FILE) as file:
        file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
    run_threads(
        lambda item: _write_shard(*item, out=out, stop=stop),
        list(zip(paths, decisions, strict=True)),
        workers=workers,
        progress=progress,
        stop=stop,
    )
    return _finish(out, paths, settings, decisions, lines, num_classes=len(classes or ()))


def _look(path: Path, policy: RepairPolicy, stop: threading.Event) -> Iterator[_Finding | Damage]:
    """First pass: judge every group of a shard."""
    stored = IndexedBytes(load_index_unchecked(path))
    for group in salvage_groups(path):
        if stop.is_set():
            raise InterruptedError(f"{path.name} was stopped")
        yield group if isinstance(group, Damage) else _judge(group, stored, policy)


def _judge(group: TarGroup, stored: IndexedBytes, policy: RepairPolicy) -> _Finding:
    record = record_of(group) or _foreign_record(group)
    if record is None:
        first = next(iter(group.members.values()))
        what = ", ".join(group.members)
        return _Finding(
            group.key, first.byte_offset, NO_LABEL, b"", f"no image, only {what}", False
        )
    fault, reencode = "", False
    try:
        stored.check(record)
        try:
            check_image(record.image, policy.decode)
        except BadImageError:
            if not (policy.reencode and _can_reencode(record.image)):
                raise
            reencode = True
    except BadImageError as error:
        fault = str(error)
    label = stored.label(record) if record.label == NO_LABEL else record.label
    digest = hashlib.sha256(record.image).digest()
    return _Finding(group.key, record.byte_offset, label, digest, fault, reencode)


def _foreign_record(group: TarGroup) -> TarRecord | None:
    """The record of a group whose image is not even named as a JPEG."""
    renamed = {
        "jpg" if extension in _OTHER_IMAGES else extension: member
        for extension, member in group.members.items()
    }
    return record_of(TarGroup(group.key, renamed))


def _can_reencode(image: bytes) -> bool:
    try:
        _open_other(image)
    except BadImageError:
        return False
    return True


def reencode_as_jpeg(image: bytes) -> bytes:
    """RGB JPEG of the first frame of an image that Pillow reads; transparency is dropped.

    Raises:
        BadImageError: Pillow cannot read it, it is truncated, or above the pixel limit.
    """
    file = io.BytesIO()
    _open_other(image).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def _open_other(image: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is lower
            with Image.open(io.BytesIO(image)) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise BadImageError(f"too large: {opened.width} x {opened.height}")
                if opened.mode.startswith("I"):  # 16 bits: Pillow would clip at 255
                    return Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8)).convert(
                        "RGB"
                    )
                return opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadImageError(f"Pillow cannot decode it: {error}") from error


def _decide(
    paths: Sequence[Path],
    found: Sequence[Sequence[_Finding | Damage]],
    policy: RepairPolicy,
    *,
    num_classes: int,
) -> tuple[list[list[_Decision]], list[dict[str, Any]]]:
    """What becomes of every group of every shard, and the lines of `repaired.jsonl`."""
    labels = _Labels(found, policy, num_classes)
    keys = _Keys(
        policy, taken={one.key for shard in found for one in shard if isinstance(one, _Finding)}
    )
    decisions: list[list[_Decision]] = []
    lines: list[dict[str, Any]] = []
    for path, shard in zip(paths, found, strict=True):
        decisions.append([])
        for one in shard:
            if isinstance(one, Damage):
                what = f"bytes {one.start} to {one.end}: {one.what}"
                lines.append({"shard": path.name, "action": "damage", "reason": what})
                continue
            reason = one.fault or labels.fault(one)
            key, note = (None, reason) if reason else keys.claim(one)
            decisions[-1].append(_Decision(key, one.reencode, one.label))
            line = {"shard": path.name, "key": one.key, "offset": one.offset}
            if key is None:
                lines.append(line | {"action": "dropped", "reason": note})
            elif key != one.key:
                lines.append(line | {"action": "renamed", "reason": note, "new_key": key})
            if key is not None and one.reencode:
                lines.append(line | {"action": "reencoded", "reason": "now a JPEG of quality 95"})
    return decisions, lines


class _Labels:
    """Which labels are a fault."""

    def __init__(
        self, found: Sequence[Sequence[_Finding | Damage]], policy: RepairPolicy, num_classes: int
    ) -> None:
        usable = (
            one for shard in found for one in shard if isinstance(one, _Finding) and not one.fault
        )
        self._needed = policy.unlabelled == "drop" and any(one.label != NO_LABEL for one in usable)
        self._num_classes = num_classes

    def fault(self, one: _Finding) -> str:
        if self._needed and one.label == NO_LABEL:
            return "no integer label in .cls or .json, and other records have one"
        if self._needed and self._num_classes and one.label >= self._num_classes:
            return f"label {one.label} is beyond the {self._num_classes} names in {CLASSES_FILE}"
        return ""


class _Keys:
    """Gives every record a key of its own."""

    def __init__(self, policy: RepairPolicy, taken: set[str]) -> None:
        self._policy = policy
        self._taken = taken
        self._first: dict[str, bytes] = {}

    def claim(self, one: _Finding) -> tuple[str | None, str]:
        """The key to write under (None = drop), and the reason where it is not the record's own."""
        if one.key not in self._first:
            self._first[one.key] = one.digest
            return one.key, ""
        if self._first[one.key] == one.digest:
            return None, "the key and the image occur before"
        if self._policy.duplicates == "drop":
            return None, "the key occurs before"
        number = 2
        while f"{one.key}_dup{number}" in self._taken:
            number += 1
        key = f"{one.key}_dup{number}"
        self._taken.add(key)
        return key, "the key occurs before with another image"


def _write_shard(
    path: Path, decisions: Sequence[_Decision], *, out: Path, stop: threading.Event
) -> None:
    """Second pass: copy the kept groups of a shard, and index it."""
    target = out / path.name
    if all(one.key is None for one in decisions) or is_finished(target):
        return
    groups = (group for group in salvage_groups(path) if not isinstance(group, Damage))
    with atomic_write(target) as file:
        tar = ShardTar(file)
        for group, decision in zip(groups, decisions, strict=True):
            if stop.is_set():
                raise InterruptedError(f"{path.name} was stopped")
            if decision.key is not None:
                for extension, data in sorted(_members(group, decision).items()):
                    tar.add(f"{decision.key}.{extension}", data)
        tar.end()
    save_index(build_index(target), index_path(target))


def _members(group: TarGroup, decision: _Decision) -> dict[str, bytes]:
    members = {extension: member.data for extension, member in group.members.items()}
    record = record_of(group) or _foreign_record(group)
    if record is not None and record.label != decision.label:  # the index remembers it
        members["cls"] = str(decision.label).encode()
    if not decision.reencode:
        return members
    name = next(extension for extension in members if extension in IMAGE_EXTENSIONS | _OTHER_IMAGES)
    return {"jpg": reencode_as_jpeg(members.pop(name)), **members}


def _check_names(out: Path, paths: Sequence[Path]) -> None:
    """Refuse shards whose repaired copies would replace each other, or the shards themselves."""
    twice = [name for name, count in Counter(path.name for path in paths).items() if count > 1]
    if twice:
        raise ValueError(
            f"{len(twice)} shard name(s) occur twice, such as {twice[0]}: repair each folder by itself"
        )
    if any(path.parent == out for path in paths):
        raise ValueError(
            f"{out} is the folder of the shards: write the repaired ones to another one"
        )


def _settings(paths: Sequence[Path], policy: RepairPolicy) -> dict[str, Any]:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\0{tar_digest(path)}\n".encode())
    return {"source_shards": digest.hexdigest()[:16], **vars(policy)}


def _common_classes(paths: Sequence[Path]) -> list[str] | None:
    lists = [load_classes(folder) for folder in sorted({path.parent for path in paths})]
    if any(one != lists[0] for one in lists):
        raise ValueError(
            f"the shards lie in folders with different {CLASSES_FILE}: repair each folder by itself"
        )
    return lists[0]


def _finish(
    out: Path,
    paths: Sequence[Path],
    settings: dict[str, Any],
    decisions: Sequence[Sequence[_Decision]],
    lines: Sequence[dict[str, Any]],
    *,
    num_classes: int,
) -> RepairReport:
    actions = Counter(line["action"] for line in lines)
    written = [out / path.name for path in paths if (out / path.name).exists()]
    report = RepairReport(
        num_shards=len(written),
        num_samples=sum(one.key is not None for shard in decisions for one in shard),
        num_dropped=actions["dropped"],
        num_renamed=actions["renamed"],
        num_reencoded=actions["reencoded"],
        num_damages=actions["damage"],
    )
    if not report.num_samples:
        raise ValueError(
            f"no record of the {len(paths)} shards can be used; {out / REPAIRED_FILE} says why"
        )
    facts = {
        "num_samples": report.num_samples,
        "num_shards": report.num_shards,
        "num_bytes": sum(os.path.getsize(path) for path in written),
        "num_classes": num_classes,
    }
    mark_complete(out, settings, facts)
    return report
