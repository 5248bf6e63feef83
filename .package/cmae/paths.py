"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path

from cmae.errors import CmaeError


def expand_home(path: str | Path) -> Path:
    """A path with its leading `~` or `~user` replaced by that folder, as a shell does it.

    Raises:
        CmaeError: The path begins with `~/` and nobody says where that is.
    """
    found = os.path.expanduser(path)
    if str(found).split("/", 1)[0] == "~":
        raise CmaeError(
            f"{path} begins with ~, the home folder, but HOME is not set and the user of number {os.getuid()} "
            "has no account here: give the whole path, or set HOME"
        )
    return Path(found)


def check_output(path: Path, *, key: str, suffixes: tuple[str, ...] = ()) -> None:
    """Refuse a file that could not be written when the work is done.

    Args:
        path: File to write.
        key: Option that names it.
        suffixes: Endings that it may have, in lower case; empty = any.

    Raises:
        CmaeError: It has another ending, is a folder, or lies where nothing can be written.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        raise CmaeError(
            f"{key} is {path}: the name must end in {' or '.join(suffixes)}, for instance "
            f"{path.with_name((path.name or 'out') + suffixes[0])}",
            key=key,
        )
    if path.is_dir():
        raise CmaeError(f"{key} is {path}, a folder: name a file in it", key=key)
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise CmaeError(
            f"{key} is {path}, but {folder} is no folder that can be written to: name another file",
            key=key,
        )
