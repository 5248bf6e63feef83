"""Fast paths against the reference: pixels of both views, from synthetic and from real JPEGs."""

from __future__ import annotations

import io
import tarfile
import tempfile

import numpy as np
import pytest
import torch
from PIL import Image
from support.pipeline_data import jpeg, photo

from cmae.pipeline.views.config import ViewConfig
from cmae.pipeline.views.cpu import CpuViews
from cmae.pipeline.views.dali import DaliViews
from cmae.pipeline.views.params import draw_view_params
from cmae.pipeline.views.reference import reference_views

CPU = torch.device("cpu")

# Mean and 99.99 % quantile of the absolute error in units of 1/255, without colour. Both sides resample with
# the same filter; they round or clip between the two passes at different points: it shows at hard edges.
LIMITS = {"cpu": (0.1, 3), "dali": (0.5, 16)}


def synthetic() -> list[bytes]:
    sizes = [(180, 240), (400, 300), (97, 501), (260, 256), (64, 48), (33, 35)]
    files = [jpeg(photo(h, w, seed=i)) for i, (h, w) in enumerate(sizes)]
    picture = Image.fromarray(photo(210, 280, seed=9))
    files += [jpeg(picture.convert("L")), jpeg(picture.convert("CMYK"))]
    turned = Image.Exif()
    turned[0x0112] = 6
    return [*files, jpeg(picture, progressive=True), jpeg(picture, exif=turned)]


def real(shards) -> list[bytes]:
    files = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            members = [m for m in tar if m.name.lower().endswith((".jpg", ".jpeg"))]
            files += [tar.extractfile(m).read() for m in members[:12]]
    return files


def make_both(backend: str, files: list[bytes], views: ViewConfig):
    encoded = [np.frombuffer(file, np.uint8) for file in files]
    sizes = [Image.open(io.BytesIO(file)).size for file in files]
    params = draw_view_params(
        views,
        seed=0,
        epoch=0,
        sample_id=np.arange(len(files)),
        height=np.array([h for _, h in sizes]),
        width=np.array([w for w, _ in sizes]),
    )
    view_backend = (
        CpuViews(views, num_threads=2)
        if backend == "cpu"
        else DaliViews(views, CPU, batch_size=len(files), num_threads=2)
    )
    made = view_backend.collect(view_backend.submit(encoded, params))
    view_backend.close()
    assert made.bad == {}
    expected = [
        reference_views(file, params, views=views, row=row) for row, file in enumerate(files)
    ]
    return made, expected


def errors(made: torch.Tensor, expected: list[np.ndarray]) -> np.ndarray:
    assert made.dtype == torch.uint8
    assert made.is_contiguous()
    return np.abs(made.numpy().astype(int) - np.stack(expected))


def check_geometry(backend: str, files: list[bytes], views: ViewConfig) -> None:
    made, expected = make_both(backend, files, views)
    mean, quantile = LIMITS[backend]
    for view, place in ((made.online, 0), (made.target, 1)):
        if view is None:
            assert expected[0][place] is None
            continue
        error = errors(view, [pair[place] for pair in expected])
        assert error.mean() < mean
        assert np.quantile(error, 0.9999) <= quantile


@pytest.mark.parametrize("backend", ["cpu", "dali"])
@pytest.mark.parametrize(
    "views",
    [
        ViewConfig(color="none"),
        ViewConfig(color="none", online_shift=20, target_shift=7),
        ViewConfig(color="none", target_crop="random_resized"),
        ViewConfig(num_views=1, source_crop_size=224),
        ViewConfig(color="none", img_size=64, source_crop_size=80, target_shift=15),
    ],
    ids=["cmae", "both-shift", "two-crops", "mae", "small"],
)
def test_views_are_the_references(backend, views):
    check_geometry(backend, synthetic(), views)


@pytest.mark.parametrize("backend", ["cpu", "dali"])
def test_views_of_real_jpegs_are_the_references(backend, imagenet_sample):
    check_geometry(backend, real(imagenet_sample), ViewConfig(color="none"))


@pytest.mark.parametrize("backend", ["cpu", "dali"])
def test_exact_colour_after_decode_and_resize_stays_within_one_level(backend, imagenet_sample):
    made, expected = make_both(backend, real(imagenet_sample), ViewConfig())
    error = errors(made.target, [target for _, target in expected])
    # Contrast and saturation up to 1.4 magnify the resampling's differences.
    assert error.mean() < 1.0
    assert np.quantile(error, 0.999) <= 8


def test_views_overlap_as_the_offsets_say():
    views = ViewConfig(color="none", online_shift=32, target_shift=32)
    files = synthetic()
    made, _ = make_both("cpu", files, views)
    params = draw_view_params(
        views,
        seed=0,
        epoch=0,
        sample_id=np.arange(1),
        height=np.array([180]),
        width=np.array([240]),
    )
    dy, dx = params.target_offset[0] - params.online_offset[0]

    def overlap(view, dy, dx):
        return view[max(dy, 0) : 224 + min(dy, 0), max(dx, 0) : 224 + min(dx, 0)]

    assert torch.equal(overlap(made.online[0], dy, dx), overlap(made.target[0], -dy, -dx))


def test_handed_out_host_batches_are_never_written_again():
    views = ViewConfig(img_size=32, source_crop_size=40, target_shift=8)
    view_backend = CpuViews(views, num_threads=2)
    files = [np.frombuffer(file, np.uint8) for file in synthetic()[:6]]

    def make(seed):
        height, width = np.full(6, 33), np.full(6, 35)
        params = draw_view_params(
            views, seed=seed, epoch=0, sample_id=np.arange(6), height=height, width=width
        )
        return view_backend.collect(view_backend.submit(files, params))

    first = make(0)
    kept = first.online.clone(), first.target.clone()
    for seed in range(1, 20):
        make(seed)
    assert torch.equal(first.online, kept[0])
    assert torch.equal(first.target, kept[1])
    view_backend.close()


def test_handed_out_dali_batches_are_never_written_again():
    views = ViewConfig(img_size=32, source_crop_size=40, target_shift=8, color="none")
    view_backend = DaliViews(views, CPU, batch_size=6, num_threads=2)
    files = [np.frombuffer(file, np.uint8) for file in synthetic()[:6]]
    size = np.full(6, 33)
    made, kept, jobs = [], [], []
    for seed in range(12):
        params = draw_view_params(
            views, seed=seed, epoch=0, sample_id=np.arange(6), height=size, width=size
        )
        jobs.append(view_backend.submit(files, params))
        if len(jobs) > 2:
            made.append(view_backend.collect(jobs.pop(0)))
            kept.append((made[-1].online.clone(), made[-1].target.clone()))
    for views_made, (online, target) in zip(made, kept, strict=True):
        assert torch.equal(views_made.online, online)
        assert torch.equal(views_made.target, target)
    view_backend.close()


@pytest.mark.parametrize("backend", ["cpu", "dali"])
def test_a_file_that_does_not_decode_is_named_and_the_next_batch_is_fine(backend):
    views = ViewConfig(img_size=32, source_crop_size=40, target_shift=8)
    good = np.frombuffer(jpeg(photo(50, 60)), np.uint8)
    bad = good.copy()
    bad[20:300] = 0  # quantisation and Huffman tables are gone
    params = draw_view_params(
        views,
        seed=0,
        epoch=0,
        sample_id=np.arange(4),
        height=np.full(4, 50),
        width=np.full(4, 60),
    )
    view_backend = (
        CpuViews(views, num_threads=2)
        if backend == "cpu"
        else DaliViews(views, CPU, batch_size=4, num_threads=2)
    )
    jobs = [view_backend.submit(files, params) for files in ([good] * 4, [good, good, bad, good])]
    jobs += [view_backend.submit([good] * 4, params) for _ in range(2)]
    results = [view_backend.collect(job) for job in jobs]
    assert [sorted(made.bad) for made in results] == [[], [2], [], []]
    assert torch.equal(results[0].online, results[3].online)
    again = view_backend.collect(view_backend.submit([good] * 4, params))
    assert torch.equal(again.target, results[0].target)
    view_backend.close()


def test_dali_leaves_no_files_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    check_geometry("dali", synthetic()[:3], ViewConfig(color="none"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target_crop", ["shift", "random_resized"])
def test_whole_images_give_the_windows_of_a_window_decoder(target_crop):
    views = ViewConfig(color="none", target_crop=target_crop)
    files = synthetic()
    made = []
    for way in ("window", "whole"):
        sizes = [Image.open(io.BytesIO(file)).size for file in files]
        height, width = (np.array([size[axis] for size in sizes]) for axis in (1, 0))
        params = draw_view_params(
            views, seed=0, epoch=0, sample_id=np.arange(len(files)), height=height, width=width
        )
        backend = DaliViews(views, CPU, batch_size=len(files), num_threads=2, decode_way=way)
        encoded = [np.frombuffer(file, np.uint8) for file in files]
        made.append(backend.collect(backend.submit(encoded, params)))
        backend.close()
    assert torch.equal(made[0].online, made[1].online)
    assert torch.equal(made[0].target, made[1].target)
