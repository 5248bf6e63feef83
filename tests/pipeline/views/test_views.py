from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from cmae.pipeline.sampling.counter_rng import uniforms
from cmae.pipeline.views.config import ViewConfig
from cmae.pipeline.views.params import CROP_TRIES, JITTER_ORDERS, draw_view_params

N = 20_000


def draw(views: ViewConfig, *, n: int = N, seed: int = 0, epoch: int = 0, height=375, width=500):
    return draw_view_params(
        views,
        seed=seed,
        epoch=epoch,
        sample_id=np.arange(n, dtype=np.int64),
        height=np.full(n, height, dtype=np.int32),
        width=np.full(n, width, dtype=np.int32),
    )


def torchvision_crop(monkeypatch, views: ViewConfig, u: np.ndarray, height: int, width: int):
    """RandomResizedCrop.get_params fed with our numbers instead of torch's."""
    tries = iter(np.stack([u[:CROP_TRIES], u[CROP_TRIES : 2 * CROP_TRIES]], axis=1).ravel())
    places = iter(u[-2:])

    def uniform_(tensor, low, high):
        return torch.tensor([low + next(tries) * (high - low)], dtype=torch.float64)

    def randint(low, high, size):
        return torch.tensor([int(low + next(places) * (high - low))])

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "uniform_", uniform_)
        patch.setattr(torch, "randint", randint)
        patch.setattr(
            torch, "log", lambda x: np.log(np.array([views.min_aspect, views.max_aspect]))
        )
        return RandomResizedCrop.get_params(
            torch.empty(3, height, width),
            [views.min_area, views.max_area],
            [views.min_aspect, views.max_aspect],
        )


@pytest.mark.parametrize(
    ("height", "width"), [(375, 500), (500, 333), (64, 64), (20, 900), (900, 21), (1, 1), (3, 2)]
)
def test_crop_is_torchvisions_for_the_same_random_numbers(monkeypatch, height, width):
    views = ViewConfig(min_area=0.2)
    samples = np.arange(150, dtype=np.int64)
    u = uniforms(5, 2, sample_id=samples, num_draws=2 * CROP_TRIES + 2)
    expected = [torchvision_crop(monkeypatch, views, row, height, width) for row in u]
    params = draw_view_params(
        views,
        seed=5,
        epoch=2,
        sample_id=samples,
        height=np.full(150, height),
        width=np.full(150, width),
    )
    assert params.crop.tolist() == [list(row) for row in expected]


def test_window_lies_inside_the_image_and_varies_as_configured():
    params = draw(ViewConfig())
    top, left, height, width = params.crop.T
    assert (np.minimum(top, left) >= 0).all()
    assert (top + height <= 375).all()
    assert (left + width <= 500).all()
    area = height * width / (375 * 500)
    assert area.min() == pytest.approx(0.2, abs=0.01)
    # Tries that do not fit are drawn again, so large areas are a little rarer than uniform.
    assert 0.45 < area.mean() < 0.6
    assert np.isclose((width / height).min(), 0.75, atol=0.02)
    assert np.isclose((width / height).max(), 4 / 3, atol=0.02)


@pytest.mark.parametrize(("name", "shift"), [("online_offset", 5), ("target_offset", 31)])
def test_offsets_are_whole_pixels_up_to_the_shift_inclusive(name, shift):
    params = draw(ViewConfig(online_shift=5, target_shift=31))
    offsets = getattr(params, name)
    for axis in (0, 1):
        counts = np.bincount(offsets[:, axis], minlength=shift + 1)
        assert len(counts) == shift + 1
        expected = N / (shift + 1)
        assert (np.abs(counts - expected) < 6 * np.sqrt(expected)).all()
    assert abs(np.corrcoef(offsets.T)[0, 1]) < 0.04  # axes are independent


def test_probabilities_and_ranges_are_those_configured():
    views = ViewConfig()
    params = draw(views)
    for values, prob in (
        (params.flip, 0.5),
        (params.jitter, 0.8),
        (params.grayscale, 0.2),
        (params.blur_sigma > 0, 0.5),
    ):
        assert values.mean() == pytest.approx(prob, abs=5 * np.sqrt(prob * (1 - prob) / N))
    brightness, contrast, saturation, hue = params.factors[params.jitter].T
    for factor in (brightness, contrast, saturation):
        assert np.allclose([factor.min(), factor.max()], [0.6, 1.4], atol=0.01)
    assert np.allclose([hue.min(), hue.max()], [-0.1, 0.1], atol=0.01)
    assert (params.factors[~params.jitter] == [1, 1, 1, 0]).all()
    sigma = params.blur_sigma[params.blur_sigma > 0]
    assert np.allclose([sigma.min(), sigma.max(), sigma.mean()], [0.1, 2.0, 1.05], atol=0.03)


def test_strong_jitter_does_not_draw_negative_factors():
    params = draw(ViewConfig(brightness=2.0, jitter_prob=1.0))
    assert params.factors[:, 0].min() >= 0
    assert params.factors[:, 0].max() == pytest.approx(3.0, abs=0.01)


def test_all_24_orders_of_the_jitter_occur_equally_often():
    assert sorted(map(tuple, JITTER_ORDERS)) == sorted(set(map(tuple, JITTER_ORDERS)))
    counts = np.bincount(draw(ViewConfig()).order, minlength=24)
    assert len(counts) == len(JITTER_ORDERS) == 24
    assert (np.abs(counts - N / 24) < 6 * np.sqrt(N / 24)).all()


def test_parameters_are_drawn_independently_of_each_other():
    params = draw(ViewConfig())
    columns = np.column_stack(
        [
            params.crop[:, 2],
            params.crop[:, 0],
            params.flip,
            params.target_offset,
            params.jitter,
            params.order,
            params.grayscale,
            params.blur_sigma,
        ]
    ).astype(float)
    correlation = np.corrcoef(columns.T) - np.eye(columns.shape[1])
    correlation[0, 1] = correlation[1, 0] = 0  # a large window leaves few places
    assert np.abs(correlation).max() < 0.04


def test_a_sample_has_the_same_views_in_any_batch():
    views = ViewConfig(target_crop="random_resized")
    whole = draw(views, n=64, seed=3, epoch=8)
    alone = draw_view_params(
        views,
        seed=3,
        epoch=8,
        sample_id=np.array([17]),
        height=np.array([375]),
        width=np.array([500]),
    )
    assert (whole.matrix()[17] == alone.matrix()[0]).all()


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}])
def test_seed_and_epoch_change_the_views(change):
    assert (draw(ViewConfig(), n=50).crop != draw(ViewConfig(), n=50, **change).crop).any(1).all()


def test_matrix_holds_every_field_at_its_column():
    params = draw(ViewConfig(target_crop="random_resized"), n=9)
    matrix = params.matrix()
    assert matrix.dtype == np.float32
    columns = params.columns()
    for field in fields(params):
        values = getattr(params, field.name).reshape(9, -1)
        start = columns[field.name]
        assert (matrix[:, start : start + values.shape[1]] == values).all()
    assert matrix.shape == (9, 22)


def test_target_follows_the_master_unless_it_has_its_own_crop():
    shift, own = draw(ViewConfig()), draw(ViewConfig(target_crop="random_resized"))
    assert (shift.target_crop == shift.crop).all()
    assert (shift.target_flip == shift.flip).all()
    assert (own.crop == shift.crop).all()
    assert (own.target_crop != own.crop).any(axis=1).mean() > 0.99
    assert (own.target_flip != own.flip).mean() == pytest.approx(0.5, abs=0.02)
    assert (own.target_offset == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_shift": 33}, r"views\.target_shift is 33; .* 0\.\.32"),
        ({"online_shift": -1}, r"views\.online_shift is -1"),
        ({"source_crop_size": 200}, r"views\.source_crop_size is 200; .* at least img_size=224"),
        ({"hflip_prob": 1.5}, r"views\.hflip_prob is 1\.5; .* between 0 and 1"),
        ({"min_area": 0.0}, r"views\.min_area is 0\.0"),
        ({"hue": 0.6}, r"views\.hue is 0\.6"),
        ({"blur_sigma_max": 9.0}, r"blur_sigma_max at most"),
        ({"color": "strong"}, r"views\.color is 'strong'"),
        ({"num_views": 3}, r"views\.num_views is 3"),
    ],
)
def test_config_errors_name_key_value_and_range(change, message):
    with pytest.raises(ValueError, match=message):
        replace(ViewConfig(), **change)


def test_one_view_without_room_is_a_plain_random_resized_crop():
    views = ViewConfig(num_views=1, source_crop_size=224)
    assert not views.has_target
    assert (draw(views, n=10).online_offset == 0).all()
