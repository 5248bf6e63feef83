"""An export in timm's hands: the card's own lines, and fine-tuning as timm's train.py does it."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from support.tiny_runs import SMALL
from timm.data import create_dataset, create_loader  # type: ignore[attr-defined]
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]

from cmae.model import CMAE, PRESETS, build_model, load_model
from cmae.train.commands.weights.exporting import _timm_use, export_weights
from cmae.train.loop.weights import save_model

NUM_CLASSES = 2


@pytest.fixture
def exported(tmp_path: Path) -> tuple[CMAE, Path, str]:
    """A model of sizes that timm has no name for, its export, and its card."""
    config = replace(SMALL, embed_dim=32, num_heads=4, mlp_ratio=3.0, target_final_norm=False)
    save_model(build_model(config, seed=0), tmp_path / "model.pt")
    out = tmp_path / "encoder.safetensors"
    assert export_weights(tmp_path / "model.pt", out) == 0
    card = (tmp_path / "encoder.safetensors.md").read_text(encoding="utf-8")
    return load_model(tmp_path / "model.pt"), out, card


def block_of(card: str) -> list[str]:
    found = re.search(r"```python\n(.*?)```", card, re.S)
    assert found is not None
    return found[1].splitlines()


def test_the_card_builds_timms_model_with_the_same_features(
    exported: tuple[CMAE, Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out, card = exported
    monkeypatch.chdir(out.parent)
    vit = eval(block_of(card)[0], {"timm": timm}).eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        theirs = vit.forward_features(images)[:, 1:].mean(1)
        torch.testing.assert_close(theirs, model.features(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["cmae_vit_b", "cmae_vit_h"])
def test_published_sizes_have_timms_name_alone(name: str) -> None:
    line = _timm_use(PRESETS[name], "online").splitlines()[0].format(file="x.safetensors")
    expected = {"cmae_vit_b": "vit_base_patch16_224", "cmae_vit_h": "vit_huge_patch14_224"}[name]
    assert line == (
        f"timm.create_model('{expected}', num_classes=0, checkpoint_path='x.safetensors')"
    )
    assert "final_norm=False" in _timm_use(PRESETS[name], "target")


def options_of(line: str) -> dict[str, Any]:
    """What train.py makes of its words: keyword arguments of `timm.create_model`.

    `--pretrained-path` is loaded as if it were the model's own weights, with a head of another size.
    """
    words = shlex.split(line.removeprefix("# python train.py "))
    found: dict[str, Any] = {"pretrained": "--pretrained" in words}
    sizes = words[words.index("--model-kwargs") + 1 : words.index("--pretrained")]
    for word in sizes:
        key, value = word.split("=")
        found[key] = float(value) if "." in value else int(value)
    path = words[words.index("--pretrained-path") + 1]
    found["pretrained_cfg_overlay"] = {"file": path, "num_classes": -1}
    return found | {"model_name": words[words.index("--model") + 1]}


def test_timms_own_training_takes_an_export(
    exported: tuple[CMAE, Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out, card = exported
    monkeypatch.chdir(out.parent)
    rng = np.random.default_rng(0)
    for label in range(NUM_CLASSES):
        folder = out.parent / "data" / "train" / f"class{label}"
        folder.mkdir(parents=True)
        for number in range(16):
            pixels = rng.integers(120 * label, 120 * label + 100, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    options = options_of(block_of(card)[-1])
    network = timm.create_model(**options, num_classes=NUM_CLASSES, drop_path_rate=0.1)
    for name, value in model.encoder.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value)
    data = create_dataset("", root=str(out.parent / "data"), split="train", is_training=True)
    loader = create_loader(
        data, input_size=(3, 32, 32), batch_size=16, is_training=True, use_prefetcher=False,
        num_workers=0, color_jitter=0.4, re_prob=0.25, device=torch.device("cpu"),
    )  # fmt: skip
    optimizer = create_optimizer_v2(
        network, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75
    )
    criterion, losses = LabelSmoothingCrossEntropy(0.1), []
    network.train()
    for _ in range(12):
        for images, labels in loader:
            loss = criterion(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[0] > 0.6
    assert sum(losses[-4:]) / 4 < 0.5
