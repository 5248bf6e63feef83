from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from nvidia.dali import fn
from nvidia.dali.pipeline import pipeline_def
from support.pipeline_data import photo
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms import functional as tv

from cmae.pipeline.views.color_batch import apply_color, color_chain
from cmae.pipeline.views.color_image import ImageColor
from cmae.pipeline.views.config import ViewConfig
from cmae.pipeline.views.params import ViewParams, draw_view_params
from cmae.pipeline.views.reference import reference_color

N = 24


def images(size: int = 56) -> torch.Tensor:
    return torch.from_numpy(np.stack([photo(size, size, seed=i) for i in range(N)]))


def params(**changes: object) -> ViewParams:
    drawn = draw_view_params(
        ViewConfig(),
        seed=0,
        epoch=0,
        sample_id=np.arange(N),
        height=np.full(N, 300),
        width=np.full(N, 400),
    )
    return replace(drawn, **changes)


def only(column: int, low: float, high: float) -> ViewParams:
    """Jitter with one operation active in every sample, and nothing else."""
    factors = np.tile(np.array([1, 1, 1, 0], dtype=np.float32), (N, 1))
    factors[:, column] = np.linspace(low, high, N)
    return params(
        jitter=np.ones(N, bool),
        factors=factors,
        grayscale=np.zeros(N, bool),
        blur_sigma=np.zeros(N, np.float32),
    )


def difference(given: ViewParams, *, mode: str = "exact") -> np.ndarray:
    pixels = images()
    made = apply_color(pixels, given, mode=mode).numpy().astype(int)
    expected = np.stack([reference_color(pixels[i].numpy(), given, row=i) for i in range(N)])
    return np.abs(made - expected)


@pytest.mark.parametrize(
    ("column", "low", "high"), [(0, 0.0, 2.0), (1, 0.0, 2.0), (2, 0.0, 2.0), (3, -0.5, 0.5)]
)
def test_each_jitter_operation_is_torchvisions(column, low, high):
    error = difference(only(column, low, high))
    assert error.max() <= 1
    assert error.mean() < 0.001


def test_whole_chain_in_random_order_is_torchvisions():
    error = difference(params())
    assert error.mean() < 0.01
    assert np.quantile(error, 0.9999) <= 1
    assert error.max() <= 4  # one pixel that rounds otherwise before a strong contrast


def test_blur_alone_is_torchvisions_with_23_taps():
    off = np.zeros(N, bool)
    sigma = np.linspace(0.1, 2.0, N).astype(np.float32)
    error = difference(params(jitter=off, grayscale=off, blur_sigma=sigma))
    assert error.max() <= 1
    assert error.mean() < 0.05


@pytest.mark.parametrize("size", [1, 2, 9, 16, 29, 30, 47])
def test_blur_of_any_size_is_torchvisions(size):
    """Blocks, borders, and images too small for either; torchvision cannot reflect 11 px of a small one."""
    sigma = 1.9
    radius = min(6, size - 1)
    pixels = torch.from_numpy(photo(size, size, seed=size))
    given = params(
        jitter=np.zeros(N, bool),
        grayscale=np.zeros(N, bool),
        blur_sigma=np.full(N, sigma, np.float32),
    )
    planes = pixels.permute(2, 0, 1)
    expected = tv.gaussian_blur(planes, [2 * radius + 1] * 2, [sigma] * 2).permute(1, 2, 0)
    made = apply_color(pixels[None], given.rows(slice(0, 1)), mode="exact")[0]
    assert (made.int() - expected.int()).abs().max() <= 1
    assert (made != expected).float().mean() < 0.01


@pytest.mark.parametrize("turn", [-0.5, -0.3, 0.0, 0.1, 0.5])
def test_hue_of_every_colour_is_torchvisions(turn):
    """All colours on a grid of 17 levels: every order of the channels, every tie."""
    level = torch.arange(17) * 255 // 16
    grid = torch.cartesian_prod(level, level, level).to(torch.uint8)  # (4913, 3)
    square = torch.zeros(71 * 71, 3, dtype=torch.uint8)
    square[: len(grid)] = grid
    square = square.view(71, 71, 3)
    made = apply_color(square[None], only(3, turn, turn).rows(slice(0, 1)), mode="exact")[0]
    expected = tv.adjust_hue(square.permute(2, 0, 1), float(np.float32(turn))).permute(1, 2, 0)
    error = (made.int() - expected.int()).abs()
    assert error.max() <= 1
    assert error.float().mean() < 0.002  # exact thirds and halves round either way


def test_memory_of_one_image_does_not_leak_into_the_next():
    pixels, drawn = images(), params()
    shared = ImageColor(pixels.shape[1])
    for row in [*range(N), *reversed(range(N))]:
        kept, fresh = (np.zeros_like(pixels[0].numpy()) for _ in range(2))
        shared.apply(pixels[row].numpy(), drawn, row=row, mode="exact", out=kept)
        ImageColor(56).apply(pixels[row].numpy(), drawn, row=row, mode="exact", out=fresh)
        assert (kept == fresh).all()


def test_order_of_the_jitter_matters_and_is_followed():
    first = params(order=np.zeros(N, np.uint8))
    last = params(order=np.full(N, 23, np.uint8))
    assert difference(first).max() <= 4
    assert difference(last).max() <= 4
    jittered = first.jitter & ~first.grayscale
    one, other = (apply_color(images(), p, mode="exact")[jittered].int() for p in (first, last))
    assert (one - other).abs().float().mean() > 0.5


def test_grey_pixels_keep_their_value_when_the_hue_turns():
    grey = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(1, 1, 1, 3)
    turned = apply_color(grey, only(3, 0.3, 0.3).rows(slice(0, 1)), mode="exact")
    assert torch.equal(turned, grey)


def test_operations_that_touch_all_samples_leave_later_ones_to_each():
    pixels = images(32)
    off, every = np.zeros(N, bool), np.ones(N, bool)
    sigma = np.where(np.arange(N) % 2, 1.5, 0).astype(np.float32)
    given = params(jitter=off, grayscale=every, blur_sigma=sigma)
    together = color_chain(pixels, given, mode="exact")
    one_by_one = [given.rows(slice(i, i + 1)) for i in range(N)]
    alone = [color_chain(pixels[i : i + 1], one, mode="exact") for i, one in enumerate(one_by_one)]
    assert torch.equal(together, torch.cat(alone))
    assert (together.int() - apply_color(pixels, given, mode="exact").int()).abs().max() <= 1


def test_jitter_is_the_same_to_the_bit_on_the_host_and_on_batches():
    pixels, drawn = images(), params(blur_sigma=np.zeros(N, np.float32))
    assert len(np.unique(drawn.order)) > 8
    assert 0 < drawn.jitter.sum() < N
    assert 0 < drawn.grayscale.sum() < N
    together = color_chain(pixels, drawn, mode="exact")
    assert torch.equal(together, apply_color(pixels, drawn, mode="exact"))


NO_KERNEL = {"empty", "empty_like", "permute", "select", "slice", "split", "split_with_sizes"}
NO_KERNEL |= {"_unsafe_view", "unbind", "unsqueeze", "view"}


class Launches(TorchDispatchMode):
    """Counts operations that would start a kernel on a device, and copies to it."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.uploads = 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        inputs = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        outputs = [a for a in tree_leaves(out) if isinstance(a, torch.Tensor)]
        if any(a.is_meta for a in outputs):
            self.uploads += any(a.device.type == "cpu" and a.ndim for a in inputs)
            self.kernels += operation.__name__.split(".")[0] not in NO_KERNEL
        return out


def count_launches(batch_size: int, *, mode: str) -> Launches:
    drawn = draw_view_params(
        ViewConfig(),
        seed=0,
        epoch=0,
        sample_id=np.arange(batch_size),
        height=np.full(batch_size, 300),
        width=np.full(batch_size, 400),
    )
    pixels = torch.empty(batch_size, 56, 56, 3, dtype=torch.uint8, device="meta")
    with Launches() as launches:
        made = color_chain(pixels, drawn, mode=mode)
    assert made.shape == pixels.shape
    return launches


@pytest.mark.parametrize(("mode", "limit"), [("exact", 150), ("fast", 60)])
def test_a_batch_of_any_size_takes_few_launches_one_upload_and_no_wait(mode, limit):
    """On tensors without data a read by the host would raise."""
    small, large = (count_launches(size, mode=mode) for size in (64, 512))
    assert small.kernels == large.kernels <= limit
    assert small.uploads == large.uploads == 1


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_batch_and_single_images_give_the_same(mode):
    pixels, drawn = images(64), params()
    together = color_chain(pixels, drawn, mode=mode).int()
    alone = apply_color(pixels, drawn, mode=mode).int()
    # The blur's radius is that of the widest in the batch: taps of weight 1e-3 more or less.
    assert (together - alone).abs().max() <= 1
    assert (together != alone).float().mean() < 0.05


def test_untouched_samples_stay_untouched():
    pixels = images(32)
    off = np.zeros(N, bool)
    quiet = params(jitter=off, grayscale=off, blur_sigma=np.zeros(N, np.float32))
    assert torch.equal(apply_color(pixels, quiet, mode="exact"), pixels)
    some = replace(quiet, grayscale=np.arange(N) == 3)
    changed = (color_chain(pixels, some, mode="exact") != pixels).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == [3]


def test_input_is_not_written_to():
    pixels = images(32)
    before = pixels.clone()
    apply_color(pixels, params(), mode="exact")
    color_chain(pixels, params(), mode="fast")
    assert torch.equal(pixels, before)


def test_fast_mode_is_dalis_color_twist():
    pixels, drawn = (
        images(),
        params(grayscale=np.zeros(N, bool), blur_sigma=np.zeros(N, np.float32)),
    )

    @pipeline_def(batch_size=N, num_threads=1, device_id=None)
    def twist():
        image = fn.external_source(name="image", layout="HWC")
        names = ("brightness", "contrast", "saturation", "hue")
        factors = {name: fn.external_source(name=name) for name in names}
        return fn.color_twist(image, **factors)

    pipeline = twist()
    pipeline.feed_input("image", pixels.numpy())
    degrees = drawn.factors * np.array([1, 1, 1, 360], dtype=np.float32)
    for column, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        pipeline.feed_input(name, degrees[:, column].copy())
    expected = pipeline.run()[0].as_array().astype(int)
    error = np.abs(apply_color(pixels, drawn, mode="fast").numpy() - expected)
    assert error.mean() < 0.1
    assert error.max() <= 2


def test_reference_is_the_chain_of_the_method():
    given = params(
        jitter=np.ones(N, bool),
        order=np.full(N, 5, np.uint8),  # brightness, hue, saturation, contrast
        grayscale=np.ones(N, bool),
        blur_sigma=np.full(N, 1.5, np.float32),
    )
    pixels = images(48)[0].numpy()
    x = torch.from_numpy(pixels).permute(2, 0, 1)
    b, c, s, h = map(float, given.factors[0])
    x = tv.adjust_contrast(tv.adjust_saturation(tv.adjust_hue(tv.adjust_brightness(x, b), h), s), c)
    x = tv.gaussian_blur(tv.rgb_to_grayscale(x, 3), [23, 23], [1.5, 1.5])
    assert (reference_color(pixels, given) == x.permute(1, 2, 0).numpy()).all()
