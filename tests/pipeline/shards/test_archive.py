"""ImageNet's archives as they come: a tar of one tar a class, and a flat tar with its ground truth apart."""

from __future__ import annotations

import gzip
import io
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from support.shard_data import contents, jpeg, pack_tar, read_with_webdataset, tars

from cmae.errors import CmaeError
from cmae.pipeline.formats.shard_index import load_index
from cmae.pipeline.shards.originals.image_archive import is_archive, scan_image_archive
from cmae.pipeline.shards.originals.image_folder import scan_image_folder
from cmae.pipeline.shards.originals.imagenet_devkit import label_validation
from cmae.pipeline.shards.originals.source import ImageSource
from cmae.pipeline.shards.verify import verify_shards
from cmae.pipeline.shards.write import write_shards

CLASSES = ("n01443537", "n01440764", "n15075141")


def class_images(number: int) -> dict[str, bytes]:
    """Images of a class as ImageNet names them, by no means in the order of their names."""
    return {f"{CLASSES[number]}_{i}.JPEG": jpeg(10 * number + i) for i in (10, 9, 2)}


@pytest.fixture
def train(tmp_path: Path) -> Path:
    """ILSVRC2012_img_train.tar in small."""
    path = tmp_path / "ILSVRC2012_img_train.tar"
    path.write_bytes(pack_tar({f"{CLASSES[i]}.tar": pack_tar(class_images(i)) for i in range(3)}))
    return path


def unpack(archive: Path, to: Path) -> Path:
    """What ImageNet's instructions tell one to do."""
    with tarfile.open(archive) as tar:
        tar.extractall(to, filter="data")
    for packed in sorted(to.rglob("*.tar")):
        with tarfile.open(packed) as tar:
            tar.extractall(packed.with_suffix(""), filter="data")
        packed.unlink()
    return to


def write(source: ImageSource, out: Path) -> dict[str, bytes]:
    write_shards(source, out, samples_per_shard=4)
    return contents(out)


def test_shards_of_the_archive_are_those_of_the_unpacked_folder(
    train: Path, tmp_path: Path
) -> None:
    folder = unpack(train, tmp_path / "unpacked")
    source = scan_image_archive(train)
    assert source.classes == tuple(sorted(CLASSES))
    assert source.files.counts == {"image": 9}
    from_archive = write(source, tmp_path / "a" / "train")
    assert from_archive == write(scan_image_folder(folder), tmp_path / "b" / "train")
    assert verify_shards(tars(tmp_path / "a" / "train"), decode="pil").ok
    read = read_with_webdataset(tmp_path / "a" / "train")
    assert read["n01440764/n01440764_9"] == (jpeg(19), 0)
    assert read["n15075141/n15075141_2"] == (jpeg(22), 2)


def test_a_folder_around_the_classes_and_what_is_no_image_are_passed(tmp_path: Path) -> None:
    files = {f"winter21_whole/{CLASSES[i]}.tar": pack_tar(class_images(i)) for i in range(2)}
    files |= {"winter21_whole/.DS_Store": b"x", "./winter21_whole/readme.txt": b"hello"}
    path = tmp_path / "winter21_whole.tar"
    path.write_bytes(pack_tar(files))
    source = scan_image_archive(path)
    assert source.classes == tuple(sorted(CLASSES[:2]))
    assert source.files.counts == {"image": 6, "hidden or side file": 1, "file named .txt": 1}
    assert source.images[0].key == "n01440764/n01440764_10"


def test_a_file_that_was_appended_again_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "images.tar"
    path.write_bytes(pack_tar({"cat/1.jpg": jpeg(1), "dog/1.jpg": jpeg(2)}))
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.jpg").write_bytes(jpeg(3))
    subprocess.run(["tar", "-C", tmp_path, "-rf", path, "cat/1.jpg"], check=True)
    source = scan_image_archive(path)
    assert source.files.counts == {"image": 2, "file that a later one of its name replaces": 1}
    write(source, tmp_path / "out")
    assert read_with_webdataset(tmp_path / "out")["cat/1"] == (jpeg(3), 0)


@pytest.mark.parametrize("where", ["outer", "inner header", "inner end"])
def test_an_archive_that_is_damaged_or_cut_is_named_and_not_half_read(
    train: Path, where: str
) -> None:
    data = bytearray(train.read_bytes())
    inner = data.find(b"n01440764_9.JPEG")
    if where == "outer":
        del data[-15_000:]  # a download that broke off
    elif where == "inner header":
        data[inner + 100] ^= 1
    else:
        start = data.find(b"n01440764.tar")
        data[start + 124 : start + 136] = b"%011o\0" % 3000  # the tar inside is cut
        data[start + 148 : start + 156] = b" " * 8
        data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    train.write_bytes(data)
    with pytest.raises(
        CmaeError, match=r"ILSVRC2012_img_train\.tar.*(truncated|damaged|not a tar)"
    ):
        scan_image_archive(train)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("winter21_whole.tar.gz", r"gunzip -c \S*winter21_whole.tar.gz > \S*/winter21_whole.tar`"),
        ("images.tgz", r"gunzip -c \S*images.tgz > \S*images.tar`"),
        ("images.tar.xz", "unxz"),
        ("images.zip", "unpack it"),
        ("images.tar", "does not exist"),
    ],
)
def test_other_archives_are_refused_with_the_repair(
    tmp_path: Path, name: str, message: str
) -> None:
    assert is_archive(tmp_path / name)
    with pytest.raises(CmaeError, match=message):
        scan_image_archive(tmp_path / name)


def test_shards_splits_and_empty_classes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    for files, message in (
        ({"1.cls": b"0", "1.jpg": jpeg(0)}, "it is a shard already"),
        ({"set/train/c/1.jpg": jpeg(0), "set/val/c/1.jpg": jpeg(1)}, "holds splits"),
        (
            {"cat/1.jpg": jpeg(0), "dog.tar": pack_tar({})},
            "1 of 2 class folders hold no image.*dog",
        ),
        ({"cat/1.jpg": jpeg(0), "1.jpg": jpeg(1)}, "can be read in two ways"),
        ({"a.txt": b""}, "holds no .jpg"),
    ):
        path.write_bytes(pack_tar(files))
        with pytest.raises(CmaeError, match=message):
            scan_image_archive(path)


def make_devkit(path: Path, ids: list[int]) -> Path:
    """ILSVRC2012_devkit_t12.tar.gz in small: three classes, and one synset above them."""
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    rows = [(i + 1, name, 0) for i, name in enumerate(CLASSES)] + [(4, "n00001740", 3)]
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": np.array(rows, dtype=fields)[:, None]})
    root = "ILSVRC2012_devkit_t12/data"
    truth = "".join(f"{one}\n" for one in ids).encode()
    files = {
        f"{root}/meta.mat": meta.getvalue(),
        f"{root}/ILSVRC2012_validation_ground_truth.txt": truth,
    }
    path.write_bytes(gzip.compress(pack_tar(files)))
    return path


@pytest.fixture
def val(tmp_path: Path) -> Path:
    """ILSVRC2012_img_val.tar in small."""
    path = tmp_path / "ILSVRC2012_img_val.tar"
    names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in (3, 1, 2, 4)]
    path.write_bytes(pack_tar({name: jpeg(int(name[-7:-5])) for name in names}))
    return path


def test_validation_images_get_the_labels_of_the_training_folders(
    val: Path, tmp_path: Path
) -> None:
    kit = make_devkit(tmp_path / "kit.tar.gz", [2, 1, 3, 2])
    source = label_validation(scan_image_archive(val), kit)
    assert source.classes == tuple(sorted(CLASSES))
    write(source, tmp_path / "val")
    read = read_with_webdataset(tmp_path / "val")
    # id 2 is n01440764, the first by name; id 1 is n01443537, the second.
    assert {key[-1]: label for key, (_, label) in read.items()} == {"1": 0, "2": 1, "3": 2, "4": 0}
    assert read["ILSVRC2012_val_00000003"][0] == jpeg(3)
    folder = unpack(kit, tmp_path / "kit") / "ILSVRC2012_devkit_t12"
    assert label_validation(scan_image_archive(val), folder).images == source.images


def test_a_devkit_that_does_not_fit_is_named(val: Path, train: Path, tmp_path: Path) -> None:
    flat = scan_image_archive(val)
    kit = make_devkit(tmp_path / "kit.tar.gz", [2, 1, 3, 2])
    with pytest.raises(CmaeError, match="these lie in 3, such as n01440764"):
        label_validation(scan_image_archive(train), kit)
    with pytest.raises(CmaeError, match=r"val_00000004\.JPEG is not named as one of the 3"):
        label_validation(flat, make_devkit(tmp_path / "short.tar.gz", [2, 1, 3]))
    with pytest.raises(CmaeError, match=r"line 2 of the ground truth is .*4"):
        label_validation(flat, make_devkit(tmp_path / "odd.tar.gz", [2, 4, 3, 2]))
    with pytest.raises(CmaeError, match=r"does not hold data/meta\.mat"):
        label_validation(flat, val)
    for name, data in (("none", None), ("junk", b"junk"), ("cut", kit.read_bytes()[:200])):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(CmaeError, match=f"--devkit .*{name} cannot be read"):
            label_validation(flat, tmp_path / name)


def test_the_digests_are_those_of_sha256sum(train: Path, tmp_path: Path) -> None:
    out = tmp_path / "train"
    source = scan_image_archive(train)
    for part in (1, 0):  # the last to end writes the list
        write_shards(source, out, samples_per_shard=4, num_parts=2, part=part)
    check = ["sha256sum", "--strict", "-c", "SHA256SUMS"]
    subprocess.run(check, cwd=out, check=True, stdout=subprocess.DEVNULL)
    assert len((out / "SHA256SUMS").read_text().splitlines()) == len(tars(out)) == 3
    first = tars(out)[0]
    assert len(load_index(first).tar_sha256) == 32
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    assert subprocess.run(check, cwd=out, check=False, capture_output=True).returncode == 1
