"""What the name of a file says: image, label, or something that an operating system left behind."""

from __future__ import annotations

import re

from cmae.pipeline.formats.members.labels import LABEL_EXTENSIONS

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "jpe", "jfif"})
"""Lower-case extensions of JPEGs; of a member of a tar, everything after the first dot."""

OTHER_IMAGE_EXTENSIONS = frozenset(
    [
        "png",
        "webp",
        "gif",
        "bmp",
        "tif",
        "tiff",
        "ppm",
        "pgm",
        "avif",
        "heic",
        "heif",
        "jp2",
        "j2k",
        "jxl",
    ]
)
"""Extensions of images that the loader does not read."""

MAX_NAME_BYTES = 1024
"""Longer names are left out: an index keeps all keys at the width of the longest."""

_SIDE_FILES = frozenset({".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini"})
_SIDE_FOLDERS = frozenset(
    {"__macosx", "@eadir", ".ipynb_checkpoints", ".appledouble", ".trashes", "$recycle.bin"}
)
_WEBDATASET_META = re.compile(r"__[^/]*__($|/)")  # names that WebDataset skips
_READ_EXTENSIONS = IMAGE_EXTENSIONS | OTHER_IMAGE_EXTENSIONS | LABEL_EXTENSIONS


def last_extension(name: str) -> str:
    """Lower-case text after the last dot of the file name; '' without one."""
    return name.rpartition("/")[2].rpartition(".")[2].lower() if "." in name else ""


def is_read(name: str) -> bool:
    """Whether the payload of a member matters: its name says image or label."""
    return last_extension(name) in _READ_EXTENSIONS


def is_side_file(name: str) -> bool:
    """Whether macOS, Windows, a NAS or a notebook put the file beside others: `._x`, `@eaDir/x`."""
    *folders, file = name.lower().split("/")
    if file.startswith("._") or file in _SIDE_FILES:
        return True
    return not _SIDE_FOLDERS.isdisjoint(folders)


def split_name(name: str) -> tuple[str, str] | None:
    """Key and lower-case extension of a member by WebDataset's rule; None where it has none.

    The key ends at the first dot of the file name. Of a hidden file, the folder's name is the key. Side files
    have none: what WebDataset would make samples of, such as the thumbnails of a NAS, are no images of the
    data set.
    """
    folder, slash, file = name.rpartition("/")
    base, dot, extension = file.partition(".")
    last = folder.rpartition("/")[2]
    if not dot or not (base or (last and "." not in last)):
        return None
    if _WEBDATASET_META.match(name) or is_side_file(name):
        return None
    return folder + slash + base, extension.lower()
