"""URLs of shards: which are local, which remote, and what of them may be shown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+:")  # two letters at least: C:\ is a path


def is_local(url: str) -> bool:
    """Whether the shard is a file that can be read at any offset, not a `pipe:`, http or s3 URL."""
    return _SCHEME.match(url) is None


def is_remote(url: str) -> bool:
    """Whether fsspec reads it: neither a local file nor a `pipe:`."""
    return not is_local(url) and not url.startswith("pipe:")


REDACTED = "***"
"""Stands for a secret wherever settings and URLs are written."""

_HARMLESS_OPTIONS = {
    *(
        "access",
        "account_name",
        "anon",
        "asynchronous",
        "client_kwargs",
        "config_kwargs",
        "project",
        "s3",
    ),
    *(
        "endpoint_override",
        "endpoint_url",
        "host",
        "mode",
        "port",
        "protocol",
        "region",
        "region_name",
    ),
    *(
        "addressing_style",
        "consistency",
        "requester_pays",
        "service_name",
        "signature_version",
        "use_ssl",
    ),
    *(
        "connect_timeout",
        "read_timeout",
        "requests_timeout",
        "timeout",
        "total",
        "retries",
        "max_attempts",
    ),
    *(
        "block_size",
        "cache_regions",
        "default_block_size",
        "default_cache_type",
        "default_fill_cache",
    ),
    *("listings_expiry_time", "max_concurrency", "max_paths", "max_pool_connections"),
    *("skip_instance_cache", "use_listings_cache", "version_aware"),
}
"""Keys of storage options whose values may be written down; those of all others may not."""

_GCS_METHODS = ("anon", "cache", "cloud", "browser", "google_default")
"""Values of gcsfs's `token` that are no token."""

_AUTHORITY_USER = re.compile(
    r"""(://)(?:
        [^/?\#\s'"]*@                          # up to the last @ before the path
        |[^/?\#\s'":]*:(?!\d*[/?\#])[^\s'"]*@   # a password with a slash: what follows : is no port
    )""",
    re.VERBOSE,
)
_QUERY_VALUE = re.compile(r"""([?&;][^=&;\#\s'"]+=)[^&\#\s'"]*""")
_BARE_QUERY = re.compile(r"""(://[^?\s'"]*\?)[^=&*\s'"]+(?=$|[&\s'"])""")
_FRAGMENT_VALUE = re.compile(r"""(://[^\#\s'"]*\#[^=&\#\s'"]*=)[^\s'"]*""")
_PIPE = re.compile(r"\bpipe:(.*)", re.DOTALL)
_TAR_WORD = re.compile(r"(?<![^\s/'\"])[\w.+-]*\w\.tar(?:\.\w{2,4})?(?![\w.=])")

_MAX_URL = 16384
"""Characters of a URL above which all of it is hidden: to look for its parts would take too long."""

_OLD_QUERY = re.compile(
    r"([?&][^=&#\s]*(?:key|secret|token|passw|credential|authori|cookie|sig|auth)[^=&#\s]*=)[^&#\s'\"]+",
    re.IGNORECASE,
)
_OLD_USER = re.compile(r"(://)[^/@\s]+@")


def split_scheme(url: str) -> str:
    """`https://host/x` -> `https`."""
    return url.split(":", 1)[0].lower()


def may_be_pipe(pattern: str) -> bool:
    """Whether a shard pattern can expand to a `pipe:`, which runs a shell; braces before a colon can."""
    scheme, colon, _ = pattern.removeprefix("file:").removeprefix("//").partition(":")
    return bool(colon) and (scheme == "pipe" or "{" in scheme)


def identity(url: str) -> str:
    """What tells an object from others, whoever signs the request for it; to be hashed, never to be shown."""
    return _OLD_USER.sub(rf"\1{REDACTED}@", _OLD_QUERY.sub(rf"\1{REDACTED}", url))


def redact(text: str) -> str:
    """Hide what may be secret in the URLs of a text: users, passwords, all values of queries, commands.

    Of a `pipe:` the program's name and the names of tars stay.
    """
    text = _PIPE.sub(_redact_pipe, text)
    if len(text) > _MAX_URL:
        text = "".join(map(_without_long_url, re.split(r"(\s+)", text)))
    text = _AUTHORITY_USER.sub(rf"\1{REDACTED}@", text)
    for pattern in (_QUERY_VALUE, _BARE_QUERY, _FRAGMENT_VALUE):
        text = pattern.sub(rf"\1{REDACTED}", text)
    return text


def _without_long_url(word: str) -> str:
    return REDACTED if len(word) > _MAX_URL and "://" in word else word


def _redact_pipe(match: re.Match[str]) -> str:
    words = match[1].split(maxsplit=1)
    program = words[0].rpartition("/")[2] if words else ""
    is_name = re.fullmatch(r"[A-Za-z][\w.+-]{0,30}", program) is not None
    tars = _TAR_WORD.findall(words[1]) if len(words) > 1 else []
    return "pipe:" + " ".join([program if is_name else REDACTED, REDACTED, *tars])


def redact_shards(shards: str | list[str]) -> str | list[str]:
    """`data.shards` as it may be written down."""
    return redact(shards) if isinstance(shards, str) else [redact(str(one)) for one in shards]


def redact_options(value: Any, name: str = "") -> Any:
    """Hide all values of storage options but switches and those of harmless keys, however deep they lie.

    Args:
        value: The options, or a part of them.
        name: Key of that part; '' for the whole.
    """
    if value is None or isinstance(value, bool):
        return value
    if name == "token" and isinstance(value, str) and value in _GCS_METHODS:
        return value
    if name and name not in _HARMLESS_OPTIONS:
        return REDACTED
    if isinstance(value, Mapping):
        return {key: redact_options(item, str(key) or REDACTED) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_options(item, name) for item in value]
    return redact(value) if isinstance(value, str) else value
