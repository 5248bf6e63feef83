"""Labels of ImageNet's validation images, which have none in their archive: from the development kit."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

from cmae.errors import CmaeError
from cmae.paths import expand_home
from cmae.pipeline.shards.originals.source import ImageSource
from cmae.printable import printable

_GROUND_TRUTH = re.compile(r"(^|/)data/ILSVRC2012_validation_ground_truth\.txt$")
_META = re.compile(r"(^|/)data/meta\.mat$")
_NUMBER = re.compile(r"_(\d{8})\.[A-Za-z]+$")
_MAX_FILE_BYTES = 64 << 20


class _Devkit(NamedTuple):
    classes: list[str]
    """WordNet ids, sorted: the order in which the folders of the training images are numbered."""
    labels: list[int]
    """Position in `classes` of each validation image."""


def label_validation(source: ImageSource, devkit: str | Path) -> ImageSource:
    """Give ImageNet's validation images the labels that the training folders n01440764, ... have.

    Args:
        source: Images named `ILSVRC2012_val_00000001.JPEG` and so on, without labels.
        devkit: `ILSVRC2012_devkit_t12.tar.gz`, or the folder that it unpacks to.

    Raises:
        CmaeError: The images have labels already or other names, or the kit lacks a file, is damaged, or
            has fewer labels than an image's number.
    """
    if source.classes:
        raise CmaeError(
            f"--devkit labels images that lie in no class folders; these lie in {len(source.classes)}, such "
            f"as {printable(source.classes[0])}: leave --devkit out, or give --layout flat"
        )
    kit = _read_devkit(expand_home(devkit))
    images = []
    for image in source.images:
        match = _NUMBER.search(image.path)
        if match is None or not 1 <= int(match[1]) <= len(kit.labels):
            raise CmaeError(
                f"{printable(image.path)} is not named as one of the {len(kit.labels)} validation images "
                f"that {devkit} labels, ILSVRC2012_val_00000001.JPEG and so on: leave out --devkit, or it"
            )
        images.append(image._replace(label=kit.labels[int(match[1]) - 1]))
    return ImageSource(tuple(images), tuple(kit.classes), source.files, source.archive)


def _read_devkit(path: Path) -> _Devkit:
    truth, meta = _read_files(path)
    synsets = _leaf_synsets(meta, path)
    classes = sorted(synsets.values())
    number_of = {name: number for number, name in enumerate(classes)}
    labels = []
    for number, line in enumerate(truth.split(), start=1):
        if not line.isdigit() or int(line) not in synsets:
            raise CmaeError(
                f"{path}: line {number} of the ground truth is {printable(repr(line))}, no id of the "
                f"{len(synsets)} classes of meta.mat: fetch the kit again"
            )
        labels.append(number_of[synsets[int(line)]])
    return _Devkit(classes, labels)


def _read_files(path: Path) -> tuple[bytes, bytes]:
    """Contents of ground truth and meta.mat."""
    found: dict[re.Pattern[str], bytes] = {}
    try:
        if path.is_dir():
            for pattern, name in (
                (_GROUND_TRUTH, "data/ILSVRC2012_validation_ground_truth.txt"),
                (_META, "data/meta.mat"),
            ):
                found[pattern] = (path / name).read_bytes()
        else:
            with tarfile.open(path) as tar:
                for member in tar:
                    for pattern in (_GROUND_TRUTH, _META):
                        if pattern.search(member.name) and member.size <= _MAX_FILE_BYTES:
                            file = tar.extractfile(member)
                            found[pattern] = file.read() if file else b""
    except (OSError, tarfile.TarError, EOFError) as error:
        raise CmaeError(
            f"--devkit {path} cannot be read ({error}): give ILSVRC2012_devkit_t12.tar.gz, or the folder "
            "that it unpacks to"
        ) from error
    if len(found) < 2:
        raise CmaeError(
            f"--devkit {path} does not hold data/meta.mat and data/ILSVRC2012_validation_ground_truth.txt: "
            "give ILSVRC2012_devkit_t12.tar.gz, the kit of tasks 1 and 2"
        )
    return found[_GROUND_TRUTH], found[_META]


def _leaf_synsets(meta: bytes, path: Path) -> dict[int, str]:
    """WordNet id by ILSVRC2012_ID, of the synsets that are classes: those without children."""
    from scipy.io import loadmat

    try:
        table: Any = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        return {
            int(row["ILSVRC2012_ID"]): str(row["WNID"])
            for row in table.reshape(-1)
            if not int(row["num_children"])
        }
    except Exception as error:  # scipy raises whatever a field makes it raise
        raise CmaeError(f"--devkit {path}: meta.mat cannot be read ({error})") from error
