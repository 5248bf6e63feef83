"""Which nvJPEG decodes on the GPU: the packaged one, loaded before torchvision brings an older one.

nvImageCodec asks for `libnvjpeg.so.13` by name, and a library of that name that is loaded already is taken.
torchvision's wheels hold nvJPEG 13.0 under that name, and timm imports torchvision. With it, nvImageCodec
decodes windows on the CPU, with a warning for each image (seen on an H100, November 2026: three quarters of
the rate of ready batches). So the package loads its own when it is imported.
"""
from __future__ import annotations

import ctypes
import sys
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
    """Load the packaged nvJPEG and say which one nvImageCodec will get; None without any."""
    packaged = find_packaged()
    own = _load(str(packaged)) if packaged else None
    taken = _load(SONAME)
    if taken is None:
        return None
    if own is not None and _version(own) == _version(taken):
        return NvJpeg(_version(taken), str(packaged))
    return NvJpeg(_version(taken), _find_loaded(without=packaged))


def find_packaged() -> Path | None:
    """The library of the package nvidia-nvjpeg, if it is installed."""
    for folder in sys.path:
        path = Path(folder, "nvidia", "cu13", "lib", SONAME)
        if path.is_file():
            return path
    return None


def _load(library: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(library)
    except OSError:
        return None


def _version(library: ctypes.CDLL) -> tuple[int, int, int]:
    values = [ctypes.c_int(-1) for _ in range(3)]
    for number, value in enumerate(values):  # major, minor, patch
        library.nvjpegGetProperty(number, ctypes.byref(value))
    return (values[0].value, values[1].value, values[2].value)


def _find_loaded(*, without: Path | None) -> str:
    """Path of an nvJPEG in this process's memory."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return ""
    paths = [line.split(maxsplit=5)[5] for line in maps.splitlines() if "/libnvjpeg." in line]
    return next((path for path in paths if path != str(without)), "")


NVJPEG = load_nvjpeg()
"""The nvJPEG that was loaded when the package was imported."""
