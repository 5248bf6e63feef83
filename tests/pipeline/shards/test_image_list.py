from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.shard_data import NUM_IMAGES, jpeg

from cmae.pipeline.shards.image_folder import read_image_list, scan_image_folder


def test_classes_are_numbered_as_imagefolder_numbers_them(images: Path) -> None:
    from torchvision.datasets import ImageFolder

    source, reference = scan_image_folder(images), ImageFolder(str(images))
    assert list(source.classes) == reference.classes == ["ant", "bee", "cat"]
    assert [(image.path, image.label) for image in source.images] == reference.samples


def test_hidden_and_foreign_files_are_passed_over(images: Path) -> None:
    (images / ".cache").mkdir()
    (images / ".cache" / "x.jpg").touch()
    (images / "bee" / "readme.txt").touch()
    (images / "loose.jpg").touch()
    source = scan_image_folder(images)
    assert len(source.images) == NUM_IMAGES
    assert source.classes == ("ant", "bee", "cat")
    assert source.num_ignored == 1


def test_a_flat_folder_is_a_set_without_labels(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
    source = scan_image_folder(tmp_path)
    assert source.classes == ()
    assert [image.label for image in source.images] == [-1, -1, -1]


def test_wrong_folders_are_explained(tmp_path: Path, images: Path) -> None:
    def message(folder: Path) -> str:
        with pytest.raises(ValueError, match="images=") as caught:
            scan_image_folder(folder)
        return str(caught.value)

    assert "does not exist" in message(tmp_path / "no" / "where")
    (tmp_path / "empty").mkdir()
    assert "found nothing" in message(tmp_path / "empty")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").touch()
    assert "found 1 .txt" in message(tmp_path / "text")
    assert "is a file" in message(tmp_path / "text" / "a.txt")
    (tmp_path / "png" / "a").mkdir(parents=True)
    (tmp_path / "png" / "a" / "a.png").touch()
    assert "convert" in message(tmp_path / "png")
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "a.tar").touch()
    assert "cmae shards index" in message(tmp_path / "tars")
    shutil.copytree(images, tmp_path / "imagenet" / "train")
    assert str(tmp_path / "imagenet" / "train") in message(tmp_path / "imagenet")
    (images / "dog").mkdir()
    assert "1 of 4 class folders hold no image, for example dog" in message(images)


def test_an_image_list_gives_paths_and_labels(images: Path, tmp_path: Path) -> None:
    (images / "bee" / "with space.jpg").write_bytes(jpeg(99))
    listed = tmp_path / "list.txt"
    listed.write_text(f"bee/002.jpg 7\n\nbee/with space.jpg\t0\n{images}/cat/000.jpg\t-1\n")
    source = read_image_list(listed, root=images)
    assert [(image.key, image.label) for image in source.images] == [
        ("bee/002", 7),
        ("bee/with space", 0),
        ("cat/000", -1),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bee/002.jpg cat\n", "line 1: 'bee/002.jpg cat' is not"),
        ("bee/002.jpg 1\nbee/005.JPEG\n", "line 2"),
        ("bee/002.jpg -2\n", "line 1"),
        ("bee/002.jpg 1\nbee/none.jpg 1\n", r"1 of 2 files are missing.*bee/none\.jpg"),
        ("\n", "0 of 0"),
    ],
)
def test_a_faulty_image_list_names_the_line_or_file(
    images: Path, tmp_path: Path, text: str, message: str
) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_image_list(listed, root=images)
