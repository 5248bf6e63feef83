"""URLs of shards: which are local, which remote, and what of them may be shown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_GCS_METHODS = ("anon", "cache", "cloud", "browser", "google_default")  # values of gcsfs's `token`

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+:")  # two letters at least: C:\ is a path


def is_local(url: str) -> bool:
    """Whether the shard is a file that can be read at any offset, not a `pipe:`, http or s3 URL."""
    return _SCHEME.match(url) is None


def is_remote(url: str) -> bool:
    """Whether fsspec reads it: neither a local file nor a `pipe:`."""
    return not is_local(url) and not url.startswith("pipe:")


_SECRET_WORDS = "key|secret|token|passw|credential|authori|cookie"

_SECRET_NAME = re.compile(rf"{_SECRET_WORDS}|^auth$|^proxy_auth$", re.IGNORECASE)

_SECRET_QUERY = re.compile(
    rf"([?&][^=&#\s]*(?:{_SECRET_WORDS}|sig|auth)[^=&#\s]*=)[^&#\s'\"]+", re.IGNORECASE
)

_SECRET_USER = re.compile(r"(://)[^/@\s]+@")

REDACTED = "***"
"""Stands for a secret wherever settings and URLs are written."""


def split_scheme(url: str) -> str:
    """`https://host/x` -> `https`."""
    return url.split(":", 1)[0].lower()


def redact(text: str) -> str:
    """Hide passwords and signatures in the URLs of a text."""
    return _SECRET_USER.sub(rf"\1{REDACTED}@", _SECRET_QUERY.sub(rf"\1{REDACTED}", text))


def redact_options(value: Any, name: str = "") -> Any:
    """Hide the values of keys such as `key`, `secret` and `token` in nested settings, and those in URLs."""
    if (
        _SECRET_NAME.search(name)
        and not isinstance(value, bool | None)
        and value not in _GCS_METHODS
    ):
        return REDACTED
    if isinstance(value, Mapping):
        return {key: redact_options(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_options(item, name) for item in value]
    return redact(value) if isinstance(value, str) else value
