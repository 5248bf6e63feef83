"""Every parser of things that come from outside, as a function of bytes that may raise what it documents."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from support.pipeline_data import jpeg, photo, write_tar
from support.profile_data import decode_bound, loader
from support.shard_data import pack_tar
from support.tiny_runs import SMALL

from cmae.errors import CmaeError
from cmae.model import build_model
from cmae.model.export.stored import load_checkpoint, load_model
from cmae.pipeline.bad_samples import read_ledger
from cmae.pipeline.formats.dataset_folder import load_classes, read_dataset
from cmae.pipeline.formats.dataset_index import DatasetIndex
from cmae.pipeline.formats.images.jpeg import inspect_jpeg
from cmae.pipeline.formats.images.pixels import decode_any
from cmae.pipeline.formats.members.labels import read_label
from cmae.pipeline.formats.members.member_counts import MemberCounts
from cmae.pipeline.formats.shard_index import (
    build_index,
    index_path,
    load_index_file,
    save_index,
)
from cmae.pipeline.formats.tar import iter_records
from cmae.pipeline.shards.originals.image_archive import scan_image_archive
from cmae.pipeline.shards.originals.image_folder import read_image_list
from cmae.pipeline.shards.repair import repair_shards
from cmae.pipeline.shards.verify import verify_shards
from cmae.pipeline.sources.expand import expand_shards
from cmae.train.bench.estimate import find_measured
from cmae.train.config_parser import load_recipe, read_recipe
from cmae.train.loop.weights import load_initial_weights, save_model
from cmae.train.monitor.metrics import read_metrics
from cmae.train.monitor.status import read_status
from cmae.train.profiling.analysis.records import load_profile


class Harness(NamedTuple):
    """One parser."""

    run: Callable[[bytes, Path], object]
    """Gives it the bytes; the folder is empty at first and may be written to."""
    seeds: list[bytes]
    """Good inputs, made here: nobody's data."""
    share: float = 1.0
    """Of the inputs that the others get, where one takes long."""


EXPECTED = (CmaeError,)
"""What a parser may raise for bytes that are not what it reads: one line with the file and the repair."""


# ---- seeds ----------------------------------------------------------------------------------------

PHOTO = jpeg(photo(24, 32))


def _tar(tar_format: int, *, odd: bool = False) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tar_format) as tar:
        names = ["a/0.jpg", "a/0.cls", "1.json", "1.jpeg", "n" * 120 + ".jpg"]
        contents = [PHOTO, b"3", b'{"label": 7}', PHOTO, PHOTO[:200]]
        for name, data in zip(names, contents, strict=True):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if odd:
                info.pax_headers = {"comment": "x", "size": str(len(data)), "path": f"p/{name}"}
            tar.addfile(info, io.BytesIO(data))
        for kind, name in ((tarfile.SYMTYPE, "2.jpg"), (tarfile.DIRTYPE, "folder")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a/0.jpg"
            tar.addfile(info)
    return file.getvalue()


TARS = [
    _tar(tarfile.PAX_FORMAT),
    _tar(tarfile.PAX_FORMAT, odd=True),
    _tar(tarfile.GNU_FORMAT),
    _tar(tarfile.GNU_FORMAT, odd=True),
]


def _index_bytes(folder: Path) -> bytes:
    tar = write_tar(folder / "x.tar", [(f"s{i}", PHOTO, i) for i in range(3)])
    save_index(build_index(tar), index_path(tar))
    return Path(index_path(tar)).read_bytes()


def _checkpoint_bytes(folder: Path) -> bytes:
    save_model(build_model(SMALL, seed=0), folder / "m.pt")
    return (folder / "m.pt").read_bytes()


def _status_bytes() -> bytes:
    names = {"rank": 0, "world_size": 1, "pid": 1, "step": 3, "total_steps": 9, "time": 1.7e9}
    names |= {"global_batch_size": 8, "step_age_s": 0.1, "step_ms": 40.0, "loss": 2.5}
    words = {"host": "h", "device": "cpu", "state": "running"}
    return json.dumps({**names, **words, "window": loader(), "gpu": {}, "format": 2}).encode()


def _profile_bytes(folder: Path) -> bytes:
    decode_bound().save(folder / "profile.json")
    return (folder / "profile.json").read_bytes()


RECIPE = yaml.safe_dump(
    {
        "model": {"depth": 2, "embed_dim": 48, "num_heads": 3},
        "optim": {"epochs": 3, "betas": [0.9, 0.95], "precision": "fp32"},
        "data": {"shards": "x-{0..3}.tar", "views": {"color": "none"}},
        "run": {"out": "runs/x"},
    }
).encode()
LEDGER = b'{"shard": "a.tar", "key": "k", "record_number": 3, "reason": "x", "epoch": 0}\n'
METRICS = b'{"step": 1, "total": 2.5, "lr": 0.1}\n{"step": 2, "total": null}\n'
RESULT = {
    "machine": {"device": "NVIDIA A100"},
    "rows": [
        {
            "gmacs_per_image": 56.47629312,
            "batch_size": 128,
            "images_per_s": {"median": 1.0, "n": 3},
            "method": "cmae",
        }
    ],
}
DATASET = {"settings": {"max_size": 64}, "presized": {"x": 2}, "num_samples": 4}


# ---- what runs ------------------------------------------------------------------------------------


def _write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _tar_records(data: bytes, folder: Path) -> None:
    counts = MemberCounts()
    for record in iter_records(io.BytesIO(data), name="x.tar", members=counts):
        record.key.encode("utf-8", "surrogateescape")


def _shard_tools(data: bytes, folder: Path) -> None:
    path = _write(folder, "x.tar", data)
    verify_shards([path])
    repair_shards([path], folder / "out")


def _index(data: bytes, folder: Path) -> None:
    load_index_file(_write(folder, "x.tar.idx.npz", data))


def _index_columns(data: bytes, folder: Path) -> None:
    """The index of a good tar, with one column replaced by arbitrary numbers."""
    tar = write_tar(folder / "x.tar", [(f"s{i}", PHOTO, i) for i in range(3)])
    save_index(build_index(tar), index_path(tar))
    columns = dict(np.load(index_path(tar), allow_pickle=False))
    name = sorted(columns)[data[0] % len(columns)] if data else "kind"
    kinds = (np.int64, np.float32, np.uint8, np.int32)
    dtype = np.dtype(kinds[data[1] % 4] if len(data) > 1 else np.int64)
    body = data[2 : 2 + len(data[2:]) // dtype.itemsize * dtype.itemsize]
    columns[name] = np.frombuffer(body, dtype)
    with Path(index_path(tar)).open("wb") as file:
        np.savez(file, **columns)
    try:
        DatasetIndex.load([str(tar)])
    except (FileNotFoundError, OSError) as error:
        if "damaged" not in str(error):
            raise


def _recipe(data: bytes, folder: Path) -> None:
    path = _write(folder, "r.yaml", data)
    read_recipe(path)
    load_recipe(path)


def _urls(data: bytes, folder: Path) -> None:
    text = data.decode("utf-8", "surrogateescape").replace("\0", "")
    if text.startswith(("http", "s3:", "gs:", "pipe:")):
        return  # nobody's server is asked
    expand_shards(str(folder / "x") + text)


def _checkpoint(data: bytes, folder: Path) -> None:
    path = _write(folder, "m.pt", data)
    load_checkpoint(path)
    load_model(path)


def _initial(data: bytes, folder: Path) -> None:
    load_initial_weights(build_model(SMALL, seed=0), _write(folder, "m.pt", data))


def _checkpoint_config(data: bytes, folder: Path) -> None:
    """A good checkpoint whose configuration is the document."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return
    torch.save(
        {"format": 1, "step": 0, "config": {"model": document}, "model": {}}, folder / "c.pt"
    )
    load_model(folder / "c.pt")


def _archive_bytes() -> bytes:
    """A tar of tars, as ImageNet's are."""
    names = ("a.JPEG", "b.JPEG", "c.txt")
    return pack_tar(
        {
            f"{one}.tar": pack_tar({f"{one}_{name}": b"abc" for name in names})
            for one in ("n1", "n2")
        }
    )


def build_harnesses(folder: Path) -> dict[str, Harness]:
    """All parsers, by name.

    Args:
        folder: Folder for the making of seeds.
    """
    config = {"img_size": 32, "patch_size": 16, "embed_dim": 48, "depth": 1, "num_heads": 3}
    config |= {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2, "mask_unit": 1}
    dumps = [json.dumps(one).encode() for one in (RESULT, DATASET, ["a", "b"], config)]
    result, dataset, classes, stored = dumps
    checkpoint = _checkpoint_bytes(folder)
    return {
        "tar records": Harness(_tar_records, TARS),
        "verify and repair": Harness(_shard_tools, TARS, share=0.1),
        "jpeg walk": Harness(lambda data, _: inspect_jpeg(data), [PHOTO, PHOTO[:300]]),
        "decoded images": Harness(lambda data, _: decode_any(data), [PHOTO], share=0.5),
        "label cls": Harness(lambda data, _: read_label("cls", data), [b"3", b"-1\n"]),
        "label json": Harness(lambda data, _: read_label("json", data), [b'{"label": 3}']),
        "index bytes": Harness(_index, [_index_bytes(folder)], share=0.5),
        "index columns": Harness(_index_columns, [bytes(range(64)), bytes(40)], share=0.1),
        "dataset.json": Harness(lambda d, f: read_dataset(_write(f, "dataset.json", d)), [dataset]),
        "classes.json": Harness(
            lambda d, f: load_classes(_write(f, "classes.json", d).parent), [classes]
        ),
        "image list": Harness(
            lambda d, f: read_image_list(_write(f, "list.txt", d), root=f), [b"a.jpg 3\nb.jpg\t4\n"]
        ),
        "image archive": Harness(
            lambda d, f: scan_image_archive(_write(f, "a.tar", d)), [_archive_bytes()]
        ),
        "urls": Harness(_urls, [b"-{000..003}.tar", b"*.tar", b"{a,b}/?.tar"]),
        "recipe": Harness(_recipe, [RECIPE], share=0.02),
        "checkpoint": Harness(_checkpoint, [checkpoint], share=0.1),
        "initial weights": Harness(_initial, [checkpoint], share=0.1),
        "checkpoint config": Harness(_checkpoint_config, [stored], share=0.2),
        "metrics": Harness(lambda d, f: read_metrics(_write(f, "metrics.jsonl", d)), [METRICS]),
        "ledger": Harness(lambda d, f: list(read_ledger(_write(f, "l.jsonl", d))), [LEDGER * 2]),
        "live status": Harness(
            lambda d, f: read_status(_write(f, "live/rank-000.json", d).parents[1]),
            [_status_bytes()],
        ),
        "profile.json": Harness(
            lambda d, f: load_profile(_write(f, "profile.json", d)),
            [_profile_bytes(folder)],
            share=0.3,
        ),
        "bench results": Harness(
            lambda d, f: find_measured(_write(f, "1_step_x.json", d).parent, SMALL, "a100", 128),
            [result],
            share=0.3,
        ),
    }
