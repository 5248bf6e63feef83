"""RandAugment on batches beside timm's on Pillow images: operations, arguments, pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from timm.data import auto_augment as timm_augment

from cmae.train.finetune.rand_augment import OPERATIONS, RandAugment, apply, to_argument

NAMES = {
    "auto_contrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
    "rotate": "Rotate",
    "posterize": "PosterizeIncreasing",
    "solarize": "SolarizeIncreasing",
    "solarize_add": "SolarizeAdd",
    "color": "ColorIncreasing",
    "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}
FILL = (124, 116, 104)
GEOMETRY = {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}


def photograph() -> np.ndarray:
    image = Image.fromarray(data.astronaut()).resize((96, 80))
    return np.asarray(image)


def timms(name: str, level: float, sign: float, image: np.ndarray, monkeypatch) -> np.ndarray:
    """timm's operation with this level and sign."""
    monkeypatch.setattr(timm_augment, "_randomly_negate", lambda value: sign * value)
    hparams = {"translate_pct": 0.45, "img_mean": FILL}
    to_args = timm_augment.LEVEL_TO_ARG[NAMES[name]]
    arguments = to_args(level, hparams) if to_args is not None else ()
    options = {"fillcolor": FILL, "resample": Image.Resampling.BILINEAR}
    function = timm_augment.NAME_TO_OP[NAMES[name]]
    return np.asarray(function(Image.fromarray(image), *arguments, **options))


def ours(name: str, level: float, sign: float, image: np.ndarray) -> np.ndarray:
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()
    values = to_argument(name, np.array([level]), np.array([sign]))
    made = apply(name, pixels, values, fill=FILL)
    return made[0].permute(1, 2, 0).to(torch.uint8).numpy()


def test_the_operations_are_timms_increasing_ones() -> None:
    assert list(OPERATIONS) == list(NAMES)
    assert set(NAMES.values()) == set(timm_augment._RAND_INCREASING_TRANSFORMS)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("level", [0.0, 3.3, 9.0, 10.0])
@pytest.mark.parametrize("name", NAMES)
def test_each_operation_makes_pillows_pixels(
    name: str, level: float, sign: float, monkeypatch
) -> None:
    if (name, level) == ("posterize", 10.0):
        pytest.skip("timm asks Pillow to keep 0 bits, which it refuses; one bit is kept here")
    image = photograph()
    expected = timms(name, level, sign, image, monkeypatch).astype(int)
    error = np.abs(ours(name, level, sign, image).astype(int) - expected)
    if name in GEOMETRY:  # sub-pixel places, and what is outside
        inner = error[8:-8, 8:-8]
        assert np.mean(inner) < 1.0
        assert np.mean(inner <= 2) > 0.95
    else:
        assert error.max() <= 1


def test_draws_have_timms_frequencies_and_depend_on_the_generator_alone() -> None:
    images = torch.from_numpy(np.stack([photograph()] * 400))
    augment = RandAugment()
    first = augment(images, np.random.default_rng(1))
    assert torch.equal(first, augment(images, np.random.default_rng(1)))
    assert not torch.equal(first, augment(images, np.random.default_rng(2)))
    assert torch.equal(images, torch.from_numpy(np.stack([photograph()] * 400)))
    unchanged = (first == images).flatten(1).all(1).float().mean().item()
    assert 0.15 < unchanged < 0.40  # (1 - .5) ** 2, and operations that change nothing


def test_nothing_is_done_without_operations() -> None:
    images = torch.from_numpy(photograph()[None])
    assert torch.equal(RandAugment(num_ops=0)(images, np.random.default_rng(0)), images)
    assert torch.equal(RandAugment(prob=0.0)(images, np.random.default_rng(0)), images)
