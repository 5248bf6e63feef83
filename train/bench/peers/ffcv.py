"""FFCV, which does not install here."""

from cmae.train.bench.peers.contract import Absent

FFCV = Absent(
    "FFCV",
    "1.0.2 (2023) has no wheel, and its source build stops where pkg-config does not find opencv and "
    "libturbojpeg; it reads no tars, so the images would be written again as .beton",
)
