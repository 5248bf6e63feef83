"""Shard patterns: one string or a list of them becomes the ordered list of shard paths and URLs."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cmae.errors import CmaeError
from cmae.paths import expand_home
from cmae.pipeline.remote.client import Remote, RemoteConfig
from cmae.pipeline.remote.schemes import is_local, is_remote, redact, split_scheme
from cmae.pipeline.remote.stores import open_filesystem
from cmae.printable import printable

logger = logging.getLogger(__name__)

_RANGE = re.compile(r"^(\d+)\.\.(\d+)$")

_BRACES = re.compile(r"\{(\d+\.\.\d+|[^{}]*,[^{}]*)\}")

_TAR_NAME = re.compile(r"\.tar$")

_COMPRESSED_NAME = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz2|txz)$")

MAX_SHARDS = 1_000_000
"""Shards that braces may name, over all patterns."""

_GLOB_CHARACTERS = re.compile(r"[*?\[]")

_LIST_DEADLINE_S = 60.0

_MAX_BRACES = 64
"""Pairs of braces in one pattern."""

_MAX_LOOKED_UP = 10_000
"""Folders and globs that one pattern may list; names looked up in vain before the others are left."""

_MAX_DIGITS = 18
"""Of a number in braces."""


def expand_shards(
    pattern: str | Path | Sequence[str | Path], *, storage_options: Mapping[str, Any] | None = None
) -> list[str]:
    """List the shards that a pattern names.

    Braces `{000000..000004}` and `{train,val}` expand first, in any string. What is left is a file, which
    must exist, a folder (its `*.tar`, sorted), or a glob (the tar files it matches, sorted; `**` crosses
    folders). Folders and globs may lie in a store, and behind http where the server lists its folders; there
    a folder ends in `/`. A URL of one shard and a `pipe:` are kept; `file:` URLs become paths.
    The order is that of the patterns, and it is part of the data order: sample ids count shards from 0.

    Args:
        pattern: One pattern, or a list of them.
        storage_options: Options given to fsspec's file system, for stores.

    Raises:
        CmaeError: A pattern matches nothing, a named file is missing, or a shard is listed twice.
        RemoteError: A store cannot be listed.
    """
    patterns = [pattern] if isinstance(pattern, str | Path) else list(pattern)
    if not patterns:
        raise CmaeError("shards is an empty list: name at least one tar file, folder or pattern")
    shards: list[str] = []
    for one in map(str, patterns):
        try:
            shards += _expand_one(one, storage_options or {})
        except OSError as error:  # a name too long for a file system, a folder that may not be read
            raise CmaeError(
                f"shards={printable(redact(one))!r} cannot be looked up ({error.strerror or error}): correct "
                "the name, or the rights of its folder"
            ) from error
    if compressed := [shard for shard in shards if _is_compressed(shard)]:
        raise CmaeError(
            f"shards names {len(compressed)} compressed tar(s) such as {redact(compressed[0])!r}, which have "
            "no fixed offsets: unpack them (gunzip) to .tar, or stream each with 'pipe:gunzip -c x.tar.gz'"
        )
    repeated = [shard for shard, count in Counter(shards).items() if count > 1]
    if repeated:
        raise CmaeError(
            f"shards lists {len(repeated)} file(s) twice, for example {redact(min(repeated))!r}: every "
            "sample would be read twice an epoch; remove the overlap between the patterns"
        )
    return shards


def _expand_one(pattern: str, storage_options: Mapping[str, Any]) -> list[str]:
    shards: list[str] = []
    missing: list[str] = []
    if _num_expanded(pattern) > MAX_SHARDS:
        raise _too_many(pattern)
    num_listed = 0
    for number, url in enumerate(_expand_braces(pattern)):
        if number >= MAX_SHARDS:  # of braces whose ends are braces: {{1,2}..{5,600}}
            raise _too_many(pattern)
        is_file = url.startswith("file:")
        if is_file:
            # What is left is a path, whatever it begins with: `file:pipe:...` is no command.
            url = re.sub("^file:(//)?", "", url)
        if not is_file and not is_local(url):
            name, found = url, _expand_url(url, storage_options)
        else:
            path = str(expand_home(url))
            name, found = _as_path(path), [_as_path(one) for one in _expand_path(path)]
        if not found:
            missing.append(url)
        shards += found
        num_listed += found != [name]
        if len(missing) >= _MAX_LOOKED_UP:
            break
        if num_listed > _MAX_LOOKED_UP:
            raise CmaeError(
                f"shards={printable(redact(pattern))!r}: its braces stand for more than {_MAX_LOOKED_UP} "
                "folders or globs, each to be listed: name the files by braces alone, or by one glob"
            )
    if missing:
        raise CmaeError(_nothing_found(pattern, missing, num_found=len(shards)))
    return shards


def _too_many(pattern: str) -> CmaeError:
    return CmaeError(
        f"shards={redact(pattern)!r} names more than {MAX_SHARDS} files: correct the range in braces"
    )


def _as_path(name: str) -> str:
    """A file's name such that nobody takes it for a URL: `pipe:x.tar` in this folder is `./pipe:x.tar`."""
    return name if is_local(name) else os.path.join(os.curdir, name)


def _expand_url(url: str, storage_options: Mapping[str, Any]) -> list[str]:
    """List a folder or glob in a store; any other URL stands for itself."""
    is_http = split_scheme(url) in ("http", "https")
    address = url.partition("?")[0] if is_http else url  # there a question mark begins the query
    is_folder = address.endswith("/") or not (is_http or _TAR_NAME.search(address))
    if not is_remote(url) or not (is_folder or _GLOB_CHARACTERS.search(address)):
        return [url]
    wanted = f"{address.rstrip('/')}/*.tar" if is_folder else address
    remote = Remote(RemoteConfig(storage_options=storage_options, deadline_s=_LIST_DEADLINE_S))
    filesystem = open_filesystem(url, storage_options)
    found = remote.run(
        remote.retried(lambda: filesystem._glob(wanted), url=url, what="listing the shards")
    )
    shards = [filesystem.unstrip_protocol(name) for name in _tars_of(found, redact(wanted))]
    if not shards:
        raise CmaeError(
            f"shards={redact(url)!r} matches no tar file there: {redact(wanted)} is empty. Correct the URL, "
            "or name the shards with braces such as train-{000000..000099}.tar"
        )
    return shards


def _expand_path(path: str) -> list[str]:
    if os.path.isdir(path):
        return _tars_of(glob.glob(os.path.join(glob.escape(path), "*")), path)
    if os.path.exists(path):  # before the glob: a file name may hold brackets
        return [path]
    if _GLOB_CHARACTERS.search(path):
        matches = glob.glob(path, recursive=True)
        return _tars_of(matches, path)
    return []


def _tars_of(found: Sequence[str], where: str) -> list[str]:
    """The tars among some files; compressed ones, which are refused later, only where there are no others."""
    tars = sorted(one for one in found if _TAR_NAME.search(one))
    compressed = sorted(filter(_is_compressed, found))
    if tars and compressed:
        logger.warning(
            "%s: %d compressed tar(s) such as %s are not read: unpack them",
            printable(where),
            len(compressed),
            printable(os.path.basename(compressed[0])),
        )
    return tars or compressed


def _expand_braces(text: str) -> Iterator[str]:
    """Expand number ranges and comma lists, leftmost varying slowest; other braces (awk in a pipe) stay.

    One string at a time, as the caller may stop early.
    """
    match = _BRACES.search(text)
    if match is None:
        yield text
        return
    before, after = text[: match.start()], text[match.end() :]
    for choice in _choices(match[1]):
        yield from _expand_braces(before + choice + after)


def _num_expanded(text: str) -> int:
    """How many strings the braces stand for; counted before any is made."""
    count, num_braces = 1, 0
    while match := _BRACES.search(text):
        num_braces += 1
        if num_braces > _MAX_BRACES:
            return MAX_SHARDS + 1
        bounds = _RANGE.match(match[1])
        if bounds is not None:
            if max(len(bounds[1]), len(bounds[2])) > _MAX_DIGITS:
                return MAX_SHARDS + 1
            count *= abs(int(bounds[2]) - int(bounds[1])) + 1
        else:
            count *= match[1].count(",") + 1
        if count > MAX_SHARDS:
            break
        text = text[: match.start()] + text[match.end() :]
    return count


def _is_compressed(shard: str) -> bool:
    """By its name, a query behind it left aside; what a pipe gives is its own affair."""
    if shard.startswith("pipe:"):
        return False
    address = shard if is_local(shard) else shard.partition("?")[0]
    return _COMPRESSED_NAME.search(address.lower()) is not None


def _choices(inside: str) -> Iterator[str]:
    bounds = _RANGE.match(inside)
    if bounds is None:
        yield from inside.split(",")
        return
    if max(len(bounds[1]), len(bounds[2])) > _MAX_DIGITS:
        raise CmaeError(
            f"shards: the range {{{inside[:60]}}} has a number of more than {_MAX_DIGITS} digits: correct it"
        )
    first, last = int(bounds[1]), int(bounds[2])
    step = 1 if last >= first else -1
    for number in range(first, last + step, step):
        yield f"{number:0{len(bounds[1])}d}"


def _nothing_found(pattern: str, missing: list[str], *, num_found: int) -> str:
    path = expand_home(missing[0])
    if path.is_dir():
        inside = sorted(entry.name for entry in path.iterdir())[:5]
        listing = f"only {', '.join(inside)}" if inside else "it is empty"
        return (
            f"shards={pattern!r}: the folder {path} holds no .tar file, {listing}. Give the folder with "
            "the tar files, or make them from a folder of images with `cmae shards write`"
        )
    if num_found or len(missing) > 1:
        rest = " (others were not looked for)" if len(missing) >= _MAX_LOOKED_UP else ""
        return (
            f"shards={pattern!r}: {len(missing)} of {num_found + len(missing)} files are missing{rest}, "
            f"such as {path}. Correct the range in braces, or finish writing the shards"
        )
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    return (
        f"shards={pattern!r} matches nothing; {parent.resolve()} is the last part that exists. "
        "Give tar files, a folder of them, a glob, braces such as train-{000000..000004}.tar, or a URL"
    )
