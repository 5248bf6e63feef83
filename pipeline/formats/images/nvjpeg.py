"""Which nvJPEG decodes on the GPU: the packaged one, loaded before nvImageCodec looks for any.

nvImageCodec asks the system for `libnvjpeg.so.13`, and a folder in LD_LIBRARY_PATH comes before the package
beside it. CUDA images set that variable, so a machine with nvidia-nvjpeg 13.3 installed decoded with the
13.0 of its CUDA toolkit (seen on an H100, November 2026): nvImageCodec then refuses windows on the device,
warns once an image, and decodes on the CPU. A library that is loaded already is taken instead.
"""

from __future__ import annotations

import ctypes
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

SONAME = "libnvjpeg.so.13"
OLDEST_FOR_WINDOWS = (13, 3)
"""nvJPEG before it draws the border of a window wrongly with fancy upsampling (NVIDIA's release notes)."""


class NvJpeg(NamedTuple):
    """The library that nvImageCodec will get."""

    version: tuple[int, int, int]
    path: str
    """File it was loaded from; '' where the system does not say."""

    @property
    def name(self) -> str:
        """As printed: 'nvJPEG 13.3.2'."""
        return "nvJPEG " + ".".join(map(str, self.version))


def load_nvjpeg() -> NvJpeg | None:
    """Load the packaged nvJPEG and say which one the process has; None without any."""
    packaged = find_packaged()
    for library in ([str(packaged)] if packaged else []) + [SONAME]:
        try:
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        break
    else:
        return None
    taken = ctypes.CDLL(SONAME)
    return NvJpeg((_property(taken, 0), _property(taken, 1), _property(taken, 2)), _loaded_path())


def find_packaged() -> Path | None:
    """The library in the package nvidia-nvjpeg, if it is installed."""
    try:
        files = metadata.files("nvidia-nvjpeg") or []
    except metadata.PackageNotFoundError:
        return None
    found = [Path(str(file.locate())) for file in files if file.name == SONAME]
    return found[0] if found and found[0].is_file() else None


def _property(library: ctypes.CDLL, number: int) -> int:
    value = ctypes.c_int(-1)
    library.nvjpegGetProperty(number, ctypes.byref(value))  # 0: major, 1: minor, 2: patch
    return value.value


def _loaded_path() -> str:
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return ""
    lines = [line.split(maxsplit=5) for line in maps.splitlines() if "libnvjpeg.so" in line]
    return lines[0][5] if lines else ""


NVJPEG = load_nvjpeg()
"""The nvJPEG of this process; import this before nvImageCodec or DALI."""
