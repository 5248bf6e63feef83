"""The demo's tiles: disjoint regions, no network, the same bytes every time; and its verdict."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmae.pipeline import expand_shards
from cmae.pipeline.formats.shard_index import load_index
from cmae.train.commands.demo import data as demo_data
from cmae.train.commands.demo.data import (
    CELL_PX,
    PHOTOGRAPHS,
    TILE_MEAN,
    TILE_PX,
    equalise,
    load_photograph,
    tile_windows,
    write_demo_shards,
)
from cmae.train.commands.demo.run import MARGIN, conclude
from cmae.train.monitor.console import PlainConsole

pytest.importorskip("skimage")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def painted(corners: list[tuple[int, int]], height: int, width: int) -> np.ndarray:
    canvas = np.zeros((height, width), bool)
    for y, x in corners:
        assert y >= 0
        assert x >= 0
        canvas[y : y + TILE_PX, x : x + TILE_PX] = True
    return canvas


@pytest.mark.parametrize("size", [(448, 448), (448, 673), (538, 448), (448, 901)])
def test_no_pixel_is_in_both_splits(size: tuple[int, int]) -> None:
    windows = tile_windows(*size)
    train, val = painted(windows.train, *size), painted(windows.val, *size)
    assert not (train & val).any()
    assert train.mean() > 0.4
    assert 0.1 < val.mean() < 0.25
    assert max(y for y, _ in windows.train) <= size[0] - TILE_PX
    assert max(x for _, x in windows.train) <= size[1] - TILE_PX


def test_validation_tiles_stay_in_one_cell() -> None:
    for y, x in tile_windows(448, 448).val:
        assert y // CELL_PX == (y + TILE_PX - 1) // CELL_PX
        assert x // CELL_PX == (x + TILE_PX - 1) // CELL_PX


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photograph_is_there_without_network(name: str) -> None:
    photograph = load_photograph(name)
    assert photograph.dtype == np.uint8
    assert photograph.shape[2] == 3
    assert min(photograph.shape[:2]) == 448
    assert len(tile_windows(*photograph.shape[:2]).train) >= 100
    assert photograph.std() > 5


def test_shards_hold_labelled_tiles_and_writing_again_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_data, "PHOTOGRAPHS", ("brick", "chelsea"))
    counts = write_demo_shards(tmp_path, max_train=6, max_val=3)
    assert counts == (12, 6)
    (shard,) = expand_shards(str(tmp_path / "shards" / "train"))
    first = Path(shard).read_bytes()
    index = load_index(shard)
    assert sorted(index.label.tolist()) == [0] * 6 + [1] * 6
    assert set(index.height.tolist()) == set(index.width.tolist()) == {TILE_PX}
    assert write_demo_shards(tmp_path, max_train=6, max_val=3) == counts
    assert Path(shard).read_bytes() == first


def test_a_tile_lies_where_its_name_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_data, "PHOTOGRAPHS", ("coffee",))
    write_demo_shards(tmp_path, max_train=3, max_val=2)
    photograph = load_photograph("coffee").astype(float)
    for split, count in (("train", 3), ("val", 2)):
        files = sorted((tmp_path / "tiles" / split / "coffee").iterdir())
        assert len(files) == count
        for file in files:
            y, x = (int(part[1:]) for part in file.stem.split("_"))
            tile = np.asarray(Image.open(file)).astype(float)
            region = photograph[y : y + TILE_PX, x : x + TILE_PX]
            assert np.corrcoef(tile.ravel(), (region - region.mean((0, 1))).ravel())[0, 1] > 0.95


def test_neither_colour_nor_light_tells_tiles_apart() -> None:
    generator = np.random.default_rng(0)
    tile = generator.integers(100, 140, (32, 32, 3)).astype(np.uint8)
    dim_and_red = np.round(tile * 0.6 + [80, 0, 20]).astype(np.uint8)
    first, second = equalise(tile).astype(int), equalise(dim_and_red).astype(int)
    assert np.abs(first.mean((0, 1)) - TILE_MEAN).max() < 1
    assert np.abs(second.mean((0, 1)) - TILE_MEAN).max() < 1
    assert np.corrcoef(first.ravel(), second.ravel())[0, 1] > 0.99
    assert abs(second.std() / first.std() - 1) < 0.2
    assert equalise(np.full((8, 8, 3), 7, np.uint8)).tolist() == np.full((8, 8, 3), 128).tolist()


@pytest.mark.parametrize(("ahead", "code"), [(MARGIN + 0.01, 0), (MARGIN - 0.01, 1), (-0.2, 1)])
@pytest.mark.parametrize("strongest", ["MAE", "random", "pixels"])
def test_demo_fails_unless_every_baseline_is_clearly_beaten(
    tmp_path: Path, strongest: str, ahead: float, code: int
) -> None:
    knn = {"CMAE": 0.5 + ahead, "MAE": 0.2, "random": 0.1, "pixels": 0.1, strongest: 0.5}
    accuracies = {name: (value, 0.9) for name, value in knn.items()}  # the probe does not decide
    assert conclude(PlainConsole(quiet=True), accuracies, tmp_path) == code
