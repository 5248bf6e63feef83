"""A digest of what a checkpoint holds, kept in it: bytes that changed on the way are found, wherever."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DIGEST = "digest"
"""Entry of a checkpoint that holds the digest of all others."""


_CHUNK = 16 << 20


def content_digest(state: dict[str, Any]) -> str:
    """SHA-256 over names, plain values and every byte of every tensor, in hex; entry `digest` is left out.

    The zip archive around it has a CRC32 a tensor; this one also covers what happened in memory before the
    archive was written, and configuration, counters and the place in the data.

    Args:
        state: What a checkpoint holds: nested dicts and lists of tensors on the host and plain values.
    """
    digest = hashlib.sha256()
    _add(digest, {name: value for name, value in state.items() if name != DIGEST})
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(_CHUNK):
            digest.update(part)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"tensor {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.detach().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    elif isinstance(value, dict):
        digest.update(f"dict {len(value)}\n".encode())
        for name, item in value.items():
            digest.update(f"{name!r}\n".encode())
            _add(digest, item)
    elif isinstance(value, list | tuple):
        digest.update(f"list {len(value)}\n".encode())
        for item in value:
            _add(digest, item)
    else:
        digest.update(f"{value!r}\n".encode())
