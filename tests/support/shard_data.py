"""Small tars, shards and image folders for the tests of the index, the writer and the checks."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import webdataset as wds
from PIL import Image

from cmae.pipeline.formats.shard_index import ShardIndex, build_index, index_path, save_index
from cmae.pipeline.shards.originals.image_folder import scan_image_folder
from cmae.pipeline.shards.verify import VerifyReport
from cmae.pipeline.shards.write import WriteReport, write_shards

NUM_IMAGES = 24


def jpeg(seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def pack_tar(members: Mapping[str, bytes], *, tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar of these files, in this order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_tar(
    path: Path, members: Mapping[str, bytes], *, tar_format: int = tarfile.USTAR_FORMAT
) -> Path:
    path.write_bytes(pack_tar(members, tar_format=tar_format))
    return path


def shard(path: Path, count: int = 5, *, seed: int = 0) -> Path:
    members: dict[str, bytes] = {}
    for i in range(count):
        members[f"k{seed}_{i}.cls"] = str(i % 3).encode()
        members[f"k{seed}_{i}.jpg"] = jpeg(seed * 1000 + i, (12 + i, 10))
    return write_tar(path, members)


def indexed_shard(path: Path, count: int = 5, *, seed: int = 0) -> Path:
    save_index(build_index(shard(path, count, seed=seed)), index_path(path))
    return path


def assert_equal(a: ShardIndex, b: ShardIndex) -> None:
    for name in ShardIndex.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def write(
    root: Path,
    out: Path,
    *,
    samples_per_shard: int = 5,
    seed: int = 0,
    num_parts: int = 1,
    part: int = 0,
) -> WriteReport:
    return write_shards(
        scan_image_folder(root),
        out,
        samples_per_shard=samples_per_shard,
        seed=seed,
        num_parts=num_parts,
        part=part,
    )


def tars(out: Path) -> list[Path]:
    return sorted(out.glob("*.tar"))


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def read_with_webdataset(out: Path) -> dict[str, tuple[bytes, int]]:
    dataset = wds.WebDataset([str(path) for path in tars(out)], shardshuffle=False)
    return {sample["__key__"]: (sample["jpg"], int(sample["cls"])) for sample in dataset}


def problem_lines(report: VerifyReport) -> str:
    return "\n".join(f"{Path(p.shard).name} {p.key}: {p.what}" for p in report.problems)
