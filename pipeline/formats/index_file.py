"""Read an index file that anybody may have written: bounds before memory, and one check of all it says."""

from __future__ import annotations

import io
import math
import os
import threading
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cmae.pipeline.formats.images.jpeg import MAX_PIXELS, JpegKind

Columns = dict[str, npt.NDArray[Any]]

MAX_INDEX_BYTES = 4 << 30
"""Largest index file that is read: about 40 million samples in one shard."""

MAX_SIDE = 65535
"""Largest side of a JPEG, in pixels."""

_STRINGS = ("tar_digest", "presized_settings", "member_fates", "member_examples")
_PAIRS = (("presized_settings", "presized_counts"), ("member_fates", "member_counts"))

_parsing = threading.Lock()
"""numpy evaluates array headers with `ast`, whose state in CPython 3.11 is shared by threads: two at once can
end in "SystemError: AST constructor recursion depth mismatch"."""


def read_arrays(path: Path, without: Collection[str]) -> Columns:
    """Arrays of an .npz without compression, by name.

    No array takes more memory than its bytes in the file.

    Raises:
        OSError: The file is not there, not readable, too large, or no such archive.
    """
    if os.path.getsize(path) > MAX_INDEX_BYTES:
        raise OSError(f"{path} is larger than {MAX_INDEX_BYTES >> 30} GiB")
    content = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return {
                name: _parse_array(archive.read(entry))
                for entry in archive.infolist()
                if (name := entry.filename.removesuffix(".npy")) not in without
                and _is_plain(entry, len(content))
            }
    # zipfile has one for each of its fields: RuntimeError, NotImplementedError, struct.error, ...
    except Exception as error:
        raise OSError(f"{path} is damaged or no index: {error}") from error


def _is_plain(entry: zipfile.ZipInfo, num_bytes: int) -> bool:
    """True for what `np.savez` writes.

    Raises:
        ValueError: Compressed or encrypted.
    """
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise ValueError(f"{entry.filename!r} is compressed or encrypted")
    if entry.file_size > num_bytes:
        raise ValueError(f"{entry.filename!r} claims {entry.file_size} bytes")
    return True


def _parse_array(data: bytes) -> npt.NDArray[Any]:
    file = io.BytesIO(data)
    with _parsing:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read_header = np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
    start = file.tell()
    if dtype.hasobject or len(shape) > 1:
        raise ValueError(f"an array of {dtype} and shape {shape}")
    if math.prod(shape) * dtype.itemsize != len(data) - start:
        raise ValueError(f"an array of shape {shape} in {len(data) - start} bytes")
    if dtype.itemsize == 0:
        return np.empty(shape, dtype)
    return np.frombuffer(data, dtype, offset=start).reshape(shape).copy()


def find_fault(columns: Columns, dtypes: Mapping[str, type[np.generic]]) -> str:
    """What an index says that no index can say; '' where everything makes sense.

    Args:
        columns: Arrays by name.
        dtypes: Columns that must be there, over the same samples, and their types.
    """
    return (
        _missing(columns, dtypes)
        or _wrong_types(columns, dtypes)
        or _out_of_range(columns)
        or _wrong_places(columns)
    )


def _missing(columns: Columns, dtypes: Mapping[str, type[np.generic]]) -> str:
    for name in (*dtypes, "tar_size", "tar_digest"):
        if name not in columns:
            return f"column {name} is missing"
    for name in ("tar_size", "tar_digest"):
        if columns[name].shape:
            return f"{name} is not one value"
    lengths = {columns[name].shape for name in dtypes}
    if len(lengths) > 1 or any(len(shape) != 1 for shape in lengths):
        return f"columns have the shapes {sorted(lengths)}"
    if columns.get("tar_sha256", np.empty(32)).shape != (32,):
        return "tar_sha256 is not 32 bytes"
    names = (*_PAIRS, ("member_fates", "member_examples"))
    for one, other in names:
        if one in columns and columns[one].shape != columns.get(other, np.empty(())).shape:
            return f"{one} and {other} have different lengths"
    return ""


def _wrong_types(columns: Columns, dtypes: Mapping[str, type[np.generic]]) -> str:
    for name, array in columns.items():
        kinds = "SU" if name == "keys" or name in _STRINGS else "iu"
        if array.size and array.dtype.kind not in kinds:
            return f"{name} holds {array.dtype}"
    for name, dtype in dtypes.items():
        array = columns[name]
        if not issubclass(dtype, np.integer) or not array.size:
            continue
        limits = np.iinfo(dtype)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            return f"{name} holds {int(array.min())} to {int(array.max())}"
    return ""


def _out_of_range(columns: Columns) -> str:
    kind = columns["kind"]
    if not np.isin(kind, [int(one) for one in JpegKind]).all():
        return "an unknown kind of image"
    can_decode = np.isin(kind, [int(one) for one in JpegKind if one.decodable])
    for name in ("height", "width"):
        if not np.all(columns[name] >= can_decode) or not np.all(columns[name] <= MAX_SIDE):
            return f"{name} outside of 1..{MAX_SIDE}"
    pixels = columns["height"].astype(np.int64) * columns["width"]
    if np.any(can_decode & (pixels > MAX_PIXELS)):
        return f"an image above the limit of {MAX_PIXELS} pixels"
    if not np.isin(columns["orientation"], range(1, 9)).all():
        return "an orientation outside of 1..8"
    if np.any(columns["label"] < -1):
        return "a label below -1"
    for name in ("presized_counts", "member_counts"):
        if np.any(columns.get(name, np.zeros(0, np.int64)) < 0):
            return f"{name} holds negative numbers"
    return ""


def _wrong_places(columns: Columns) -> str:
    start, size = columns["byte_offset"].astype(np.int64), columns["size"].astype(np.int64)
    end = int(columns["tar_size"])
    if not 0 <= end < 1 << 63 or np.any(size < 0) or np.any(start < 0) or np.any(size > end):
        return "sizes or offsets that no file has"
    if np.any(start > end - size):
        return "images behind the end of the tar"
    if np.any(np.diff(start) <= 0):
        return "images that are not in the order of the tar"
    return ""
