"""Write tars as webdataset's TarWriter does, to the byte, without loading webdataset and torch."""

from __future__ import annotations

import hashlib
import tarfile
from typing import IO

from cmae.pipeline.formats.tar import TAR_BLOCK


def member_header(name: str, num_bytes: int) -> bytes:
    """Header of a regular file: ustar, with a pax header before it where ustar cannot hold the name."""
    info = tarfile.TarInfo(name)
    info.size = num_bytes
    info.mode = 0o444
    info.uname = info.gname = "bigdata"
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def padded(num_bytes: int) -> int:
    """Bytes that a payload takes in a tar."""
    return -(-num_bytes // TAR_BLOCK) * TAR_BLOCK


class ShardTar:
    """A tar being written to a file; `end` finishes it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.size = 0
        """Bytes written."""
        self.sha256 = hashlib.sha256()
        """Digest of the bytes written."""

    def add(self, name: str, data: bytes) -> int:
        """Append a regular file; return the byte offset of its payload."""
        self.add_raw(member_header(name, len(data)))
        offset = self.size
        self.add_raw(data)
        self.add_raw(bytes(padded(len(data)) - len(data)))
        return offset

    def add_raw(self, data: bytes) -> None:
        """Append whole blocks of a tar as they are."""
        self._file.write(data)
        self.sha256.update(data)
        self.size += len(data)

    def end(self) -> None:
        """Append the end marker, and zeros up to a whole record of 20 blocks."""
        self.add_raw(bytes(2 * TAR_BLOCK))
        self.add_raw(bytes(-self.size % tarfile.RECORDSIZE))
