from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support.shard_data import NUM_IMAGES, jpeg

from cmae.pipeline.shards.originals.image_folder import read_image_list, scan_image_folder


def test_classes_are_numbered_as_imagefolder_numbers_them(images: Path) -> None:
    from torchvision.datasets import ImageFolder

    source, reference = scan_image_folder(images), ImageFolder(str(images))
    assert list(source.classes) == reference.classes == ["ant", "bee", "cat"]
    assert [(image.path, image.label) for image in source.images] == reference.samples


def test_hidden_and_foreign_files_are_passed_over(images: Path) -> None:
    (images / ".cache").mkdir()
    (images / ".cache" / "x.jpg").touch()
    (images / "bee" / "readme.txt").touch()
    source = scan_image_folder(images)
    assert len(source.images) == NUM_IMAGES
    assert source.classes == ("ant", "bee", "cat")
    expected = {"image": NUM_IMAGES, "hidden or side file": 1, "file named .txt": 1}
    assert source.files.counts == expected


def test_images_beside_class_folders_are_asked_about_and_never_forgotten(images: Path) -> None:
    for i in range(12):
        (images / f"{i}.jpg").write_bytes(jpeg(i))
    with pytest.raises(ValueError, match="two ways") as caught:
        scan_image_folder(images)
    assert "12 images in the folder itself and 24 below it (--layout flat)" in str(caught.value)
    assert "--layout classes" in str(caught.value)
    flat = scan_image_folder(images, layout="flat")
    assert (len(flat.images), flat.classes) == (NUM_IMAGES + 12, ())
    assert {image.label for image in flat.images} == {-1}
    classes = scan_image_folder(images, layout="classes")
    assert len(classes.images) == NUM_IMAGES
    assert classes.files.counts == {"image": NUM_IMAGES, "image beside the class folders": 12}


def test_every_file_has_its_line(images: Path) -> None:
    (images / "bee" / ".ipynb_checkpoints").mkdir()
    (images / "bee" / "@eaDir" / "deep").mkdir(parents=True)
    names = [
        "bee/.ipynb_checkpoints/x.jpg",
        "bee/@eaDir/deep/y.jpg",
        "bee/._z.jpg",
        "bee/Thumbs.db",
    ]
    for name in [*names, ".DS_Store", "notes.txt"]:
        (images / name).write_bytes(jpeg(0))
    for suffix in ("jfif", "jpe", "avif", "heic", "jxl"):
        (images / "cat" / f"x.{suffix}").write_bytes(jpeg(1))
    (images / "cat" / "gone.jpg").symlink_to("nowhere.jpg")
    (images / "cat" / "self.jpg").symlink_to("self.jpg")
    (images / "cat" / "again").symlink_to("..", target_is_directory=True)
    source = scan_image_folder(images)
    # The link leads to the class folders again, but not to the folder that holds the link.
    num_images = len(source.images)
    assert source.files.counts["image"] == num_images
    assert source.files.counts["link that leads nowhere"] == 2
    assert source.files.counts["link to a folder that it lies in"] >= 1
    assert not any("checkpoints" in one.path or "@eaDir" in one.path for one in source.images)
    assert {"x_jfif", "x"} & {Path(one.key).name for one in source.images}
    (images / "cat" / "again").unlink()
    total = sum(len(files) for _, _, files in os.walk(images))
    assert scan_image_folder(images).files.total == total


def test_a_list_in_another_encoding_is_named_by_file_and_line(images: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_bytes("bee/002.jpg 1\nbee/ü.jpg 2\n".encode("latin1"))
    with pytest.raises(ValueError, match=r"list\.txt, line 2: byte 4 \(0xfc\) is not UTF-8"):
        read_image_list(listed, root=images)
    listed.write_bytes("bee/002.jpg 1\r\n".encode("utf-8-sig"))
    assert read_image_list(listed, root=images).images[0].key == "bee/002"


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
        ("bee/002.jpg 1_0\n", "line 1"),
        ("bee/002.jpg 18446744073709551615\n", "from 0 to 2"),
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
