from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmae.pipeline.formats.shard_index import index_path, load_index
from cmae.train.commands import shards as shards_cli
from cmae.train.commands.main import main


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for i in range(12):
        folder = root / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        pixels = np.random.default_rng(i).integers(0, 255, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(buffer, "JPEG")
        (folder / f"{i}.jpg").write_bytes(buffer.getvalue())
    return root


def test_write_index_verify_inspect_in_turn(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "train"
    (images / "class0" / "bad.jpg").write_bytes(b"<html>")
    assert shards_cli.write(images, out, samples_per_shard=5) == 0
    printed = capsys.readouterr().out
    assert "12 images, 2 classes in 3 shards" in printed
    assert "1 file skipped" in printed

    index_path(out / "train-000001.tar").unlink()
    assert shards_cli.verify(str(out)) == 1
    captured = capsys.readouterr()
    assert "1 problem in 12 samples" in captured.out
    assert "train-000001.tar: " in captured.err
    assert "cmae shards index" in captured.err

    assert shards_cli.index(str(out)) == 0
    assert "1 indexed, 2 fresh already" in capsys.readouterr().out
    assert shards_cli.verify([str(out)]) == 0
    assert "no problem in 12 samples" in capsys.readouterr().out

    assert shards_cli.inspect(str(out), sheet=tmp_path / "sheet.png") == 0
    printed = capsys.readouterr().out
    assert "12 baseline" in printed
    assert "2 classes with 6 images" in printed
    assert (tmp_path / "sheet.png").stat().st_size > 1000


def test_a_shard_that_cannot_be_indexed_is_reported(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "train"
    shards_cli.write(images, out, samples_per_shard=5)
    (out / "train-000000.tar").write_bytes(b"junk" * 1000)
    assert shards_cli.index(str(out)) == 1
    captured = capsys.readouterr()
    assert "1 shard without an index" in captured.out
    assert "not a tar file" in captured.err


def test_repair_writes_clean_shards_and_says_what_changed(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, clean = tmp_path / "train", tmp_path / "clean"
    shards_cli.write(images, out, samples_per_shard=6)
    first = out / "train-000000.tar"
    whole = bytearray(first.read_bytes())
    whole[int(load_index(first).byte_offset[2]) - 500] ^= 1  # the header before the image
    first.write_bytes(whole)
    assert shards_cli.verify(str(out)) == 1
    assert "5 record(s) can be recovered" in capsys.readouterr().err
    assert main(["shards", "repair", str(out), str(clean), "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "11 samples in 2 shards" in printed
    assert "1 dropped, 1 damaged stretches passed over" in printed
    assert str(clean / "repaired.jsonl") in printed
    assert shards_cli.verify(str(clean)) == 0


def test_ctrl_c_says_how_to_continue(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cmae.pipeline.shards.write.write_shards", interrupted)
    assert shards_cli.write(images, tmp_path / "train") == 130
    assert "same command again to continue" in capsys.readouterr().err


def test_an_output_that_cannot_be_made_is_one_line(images: Path) -> None:
    with pytest.raises(ValueError, match="cannot write shards"):
        shards_cli.write(images, next(images.rglob("*.jpg")))


def test_urls_are_refused_with_the_repair() -> None:
    with pytest.raises(ValueError, match="copy the shards to a disk first"):
        shards_cli.verify("s3://bucket/a.tar")


def test_a_list_file_and_the_size_limit_reach_the_writer(images: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("class0/0.jpg 5\nclass1/1.jpg 6\n")
    out = tmp_path / "train"
    assert shards_cli.write(images, out, list_file=tmp_path / "list.txt", max_shard_mib=1) == 0
    assert sorted(load_index(out / "train-000000.tar").label.tolist()) == [5, 6]
    settings = json.loads((out / "dataset.json").read_text())["settings"]
    assert settings["max_shard_bytes"] == 2**20


def test_paths_that_the_shell_expanded_become_one_argument() -> None:
    assert shards_cli.join_shards(["index", "a.tar", "b.tar", "--workers", "2"]) == [
        "index",
        '["a.tar", "b.tar"]',
        "--workers",
        "2",
    ]
    for unchanged in (
        ["verify", "a.tar"],
        ["write", "a", "b"],
        ["repair", "a", "b"],
        ["index", "--help"],
        [],
    ):
        assert shards_cli.join_shards(unchanged) == unchanged


@pytest.mark.parametrize(
    ("module", "light"),
    [
        ("cmae.train.commands.shards", {"numpy", "PIL", "rich", "fsspec"}),
        ("cmae.pipeline.shards.write", {"fsspec", "rich", "scipy"}),
        ("cmae.pipeline.shards.repair", {"fsspec", "rich", "scipy"}),
        ("cmae.pipeline.shards.verify", {"fsspec", "rich", "scipy"}),
    ],
)
def test_the_shard_tools_load_neither_torch_nor_dali(module: str, light: set[str]) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    unwanted = {"torch", "nvidia.dali", "nvidia.nvimgcodec", "webdataset", "jaxtyping"} | light
    assert not unwanted & set(run.stdout.split())
