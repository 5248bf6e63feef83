"""Shard patterns: one string or a list of them becomes the ordered list of shard paths and URLs."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmae.pipeline.remote.client import Remote, RemoteConfig
from cmae.pipeline.remote.schemes import is_local, is_remote, redact, split_scheme
from cmae.pipeline.remote.stores import open_filesystem

_RANGE = re.compile(r"^(\d+)\.\.(\d+)$")

_BRACES = re.compile(r"\{(\d+\.\.\d+|[^{}]*,[^{}]*)\}")

_TAR_NAME = re.compile(r"\.(tar(\.\w+)?|tgz)$")

_GLOB_CHARACTERS = re.compile(r"[*?\[]")

_LIST_DEADLINE_S = 60.0


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
        ValueError: A pattern matches nothing, a named file is missing, or a shard is listed twice.
        RemoteError: A store cannot be listed.
    """
    patterns = [pattern] if isinstance(pattern, str | Path) else list(pattern)
    if not patterns:
        raise ValueError("shards is an empty list: name at least one tar file, folder or pattern")
    shards: list[str] = []
    for one in map(str, patterns):
        shards += _expand_one(one, storage_options or {})
    repeated = [shard for shard, count in Counter(shards).items() if count > 1]
    if repeated:
        raise ValueError(
            f"shards lists {len(repeated)} file(s) twice, for example {min(repeated)}: every sample would be "
            "read twice an epoch; remove the overlap between the patterns"
        )
    return shards


def _expand_one(pattern: str, storage_options: Mapping[str, Any]) -> list[str]:
    shards: list[str] = []
    missing: list[str] = []
    for url in _expand_braces(pattern):
        if url.startswith("file:"):
            url = re.sub("^file:(//)?", "", url)
        if not is_local(url):
            shards += _expand_url(url, storage_options)
            continue
        found = _expand_path(os.path.expanduser(url))
        shards += found
        if not found:
            missing.append(url)
    if missing:
        raise ValueError(_nothing_found(pattern, missing, num_found=len(shards)))
    return shards


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
    shards = sorted(filesystem.unstrip_protocol(name) for name in found if _TAR_NAME.search(name))
    if not shards:
        raise ValueError(
            f"shards={redact(url)!r} matches no tar file there: {redact(wanted)} is empty. Correct the URL, "
            "or name the shards with braces such as train-{000000..000099}.tar"
        )
    return shards


def _expand_path(path: str) -> list[str]:
    if os.path.isdir(path):
        return sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
    if os.path.exists(path):  # before the glob: a file name may hold brackets
        return [path]
    if _GLOB_CHARACTERS.search(path):
        matches = glob.glob(path, recursive=True)
        return sorted(match for match in matches if _TAR_NAME.search(match))
    return []


def _expand_braces(text: str) -> list[str]:
    """Expand number ranges and comma lists, leftmost varying slowest; other braces (awk in a pipe) stay."""
    match = _BRACES.search(text)
    if match is None:
        return [text]
    before, after = text[: match.start()], text[match.end() :]
    return [
        full for choice in _choices(match[1]) for full in _expand_braces(before + choice + after)
    ]


def _choices(inside: str) -> list[str]:
    bounds = _RANGE.match(inside)
    if bounds is None:
        return inside.split(",")
    first, last = int(bounds[1]), int(bounds[2])
    step = 1 if last >= first else -1
    return [f"{number:0{len(bounds[1])}d}" for number in range(first, last + step, step)]


def _nothing_found(pattern: str, missing: list[str], *, num_found: int) -> str:
    path = Path(os.path.expanduser(missing[0]))
    if path.is_dir():
        inside = sorted(entry.name for entry in path.iterdir())[:5]
        listing = f"only {', '.join(inside)}" if inside else "it is empty"
        return (
            f"shards={pattern!r}: the folder {path} holds no .tar file, {listing}. Give the folder with "
            "the tar files, or make them from a folder of images with `cmae shards write`"
        )
    if num_found or len(missing) > 1:
        return (
            f"shards={pattern!r}: {len(missing)} of {num_found + len(missing)} files are missing, such as "
            f"{path}. Correct the range in braces, or finish writing the shards"
        )
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    return (
        f"shards={pattern!r} matches nothing; {parent.resolve()} is the last part that exists. "
        "Give tar files, a folder of them, a glob, braces such as train-{000000..000004}.tar, or a URL"
    )
