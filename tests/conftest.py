"""Fixtures shared by all tests: where the research images lie, and small data made on the spot."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from hypothesis import settings
from PIL import Image
from support.shard_data import NUM_IMAGES, jpeg, tars, write

from cmae.pipeline.formats.shard_index import build_index, index_path, save_index

REPO_ROOT = Path(__file__).resolve().parent.parent


# The same examples in every run; others each time with CMAE_EXAMPLES=2000, say, which also asks for more.
settings.register_profile("tests", derandomize="CMAE_EXAMPLES" not in os.environ, deadline=None)
settings.load_profile("tests")


def pytest_configure(config: pytest.Config) -> None:
    # The problems here are small, and `make test` runs one process per core.
    torch.set_num_threads(1)
    # A shell's background job and nohup hand ignored signals on, and tests send them to their children.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) is signal.SIG_IGN:
            is_interrupt = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if is_interrupt else signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA device; none is visible")
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords would also match a folder of that name
            item.add_marker(no_gpu)


def _data_folder(name: str) -> Path:
    root = Path(os.environ.get("CMAE_DATA", REPO_ROOT.parent / "shared" / "data"))
    folder = root / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not at {root}; set CMAE_DATA to the folder that holds it")
    return folder


@pytest.fixture(scope="session")
def imagenet_sample() -> list[Path]:
    """Shards of 500 real ImageNet JPEGs; the test is skipped where they are absent."""
    return sorted(_data_folder("imagenet-sample").glob("*.tar"))


@pytest.fixture(scope="session")
def tiny_imagenet() -> Path:
    """Folder with the 64 px shards `train-*.tar` and `val-*.tar`; skipped where absent."""
    return _data_folder("tiny-imagenet-64")


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pattern of two indexed shards: 40 JPEGs of 48 x 40 px in 4 classes, each a colour and a grating."""
    folder = tmp_path_factory.mktemp("small-shards")
    for number in range(2):
        path = folder / f"small-{number:06d}.tar"
        with wds.TarWriter(str(path)) as writer:
            for position in range(20):
                index = 20 * number + position
                label = index % 4
                record = {"__key__": f"image{index:03d}", "jpg": _grating(index, label)}
                writer.write({**record, "cls": str(label)})
        save_index(build_index(path), index_path(path))
    return str(folder / "small-*.tar")


def _grating(index: int, label: int) -> bytes:
    rng = np.random.default_rng(index)
    rows, columns = np.mgrid[0:40, 0:48]
    angle = label * np.pi / 4
    wave = np.sin((rows * np.sin(angle) + columns * np.cos(angle)) / 2 + rng.uniform(0, 6))
    pixels = 127 + 60 * wave[..., None] + rng.uniform(-60, 60, 3) + rng.normal(0, 4, (40, 48, 3))
    buffer = io.BytesIO()
    Image.fromarray(np.uint8(np.clip(pixels, 0, 255))).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """24 JPEGs in three classes; one class has a subfolder."""
    root = tmp_path / "images"
    for i in range(NUM_IMAGES):
        folder = root / ["cat", "ant/deep", "bee"][i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:03d}.{['jpg', 'JPEG'][i % 2]}").write_bytes(jpeg(i))
    return root


@pytest.fixture
def written(images: Path, tmp_path: Path) -> list[Path]:
    write(images, tmp_path / "train")
    return tars(tmp_path / "train")
