"""Fine-tuning and the linear probe number by number, as the public MAE code defines them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.tiny_runs import SMALL

from cmae.errors import CmaeError
from cmae.model import ModelConfig, build_model
from cmae.train.evaluation.encoders import Encoder, from_model, interpolate_positions
from cmae.train.evaluation.probes import TRUST, LarsHeads
from cmae.train.evaluation.schedule import cosine_schedule
from cmae.train.finetune.classifier import (
    Classifier,
    build_classifier_optimizer,
    layer_of,
    parameter_groups,
)
from cmae.train.finetune.config import FinetuneConfig

CONFIG = FinetuneConfig(encoder="x", train="x", val="x")


def encoder(config: ModelConfig = SMALL, **options: Any) -> Encoder:
    return from_model(build_model(config, seed=0), name="small", **options)


class TestLayerDecay:
    def test_every_parameter_has_its_layers_scale_and_its_decay(self) -> None:
        config = replace(SMALL, depth=12)
        model = Classifier(encoder(config), 10)
        groups = parameter_groups(model, weight_decay=0.05, layer_decay=0.65)
        found = {
            id(p): (group["lr_scale"], group["weight_decay"])
            for group in groups
            for p in group["params"]
        }
        parameters = dict(model.named_parameters())
        assert len(found) == len(parameters)
        expected = {
            "encoder.vit.cls_token": (0.65**13, 0.0),
            "encoder.vit.pos_embed": (0.65**13, 0.0),
            "encoder.vit.patch_embed.proj.weight": (0.65**13, 0.05),
            "encoder.vit.patch_embed.proj.bias": (0.65**13, 0.0),
            "encoder.vit.blocks.0.attn.qkv.weight": (0.65**12, 0.05),
            "encoder.vit.blocks.0.norm1.weight": (0.65**12, 0.0),
            "encoder.vit.blocks.11.mlp.fc2.weight": (0.65, 0.05),
            "norm.weight": (1.0, 0.0),
            "fc.weight": (1.0, 0.05),
            "fc.bias": (1.0, 0.0),
        }
        for name, (scale, decay) in expected.items():
            assert found[id(parameters[name])] == (pytest.approx(scale), decay), name

    def test_layers_are_counted_from_the_embeddings(self) -> None:
        assert layer_of("encoder.vit.patch_embed.proj.bias", 12) == 0
        assert layer_of("encoder.vit.blocks.7.attn.proj.weight", 12) == 8
        assert layer_of("encoder.vit.norm.weight", 12) == 13
        assert layer_of("fc.weight", 12) == 13


class TestSchedule:
    @pytest.mark.parametrize(
        ("epoch", "expected"),
        [
            (0.0, 0.0),
            (2.5, 2e-3 / 2),
            (5.0, 2e-3),
            (52.5, 1e-6 + (2e-3 - 1e-6) * 0.5),
            (100.0, 1e-6),
        ],
    )
    def test_peaks_after_the_warm_up_and_ends_at_the_least(
        self, epoch: float, expected: float
    ) -> None:
        peak = 5e-4 * 1024 / 256
        share = cosine_schedule(epoch, warmup=5, total=100, least=1e-6 / peak)
        assert peak * share == pytest.approx(expected)

    def test_every_value_is_the_formulas(self) -> None:
        for step in range(1000):
            epoch = step / 10
            value = 1e-6 + (2e-3 - 1e-6) * 0.5 * (1 + math.cos(math.pi * (epoch - 5) / 95))
            expected = 2e-3 * epoch / 5 if epoch < 5 else value
            found = 2e-3 * cosine_schedule(epoch, warmup=5, total=100, least=1e-6 / 2e-3)
            assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


class TestPositions:
    def test_another_grid_is_bicubic_and_leaves_the_cls_token(self) -> None:
        table = torch.randn(1, 17, 6, dtype=torch.float64)
        resized = interpolate_positions(table, (7, 7))
        assert torch.equal(resized[:, 0], table[:, 0])
        square = table[0, 1:].view(4, 4, 6)
        weights = bicubic_matrix(4, 7)
        expected = torch.einsum("ai,kj,ijd->akd", weights, weights, square)
        torch.testing.assert_close(resized[0, 1:].view(7, 7, 6), expected)

    def test_the_same_grid_is_the_same_table(self) -> None:
        table = torch.randn(1, 17, 6)
        assert interpolate_positions(table, (4, 4)) is table

    def test_an_encoder_takes_larger_images(self) -> None:
        larger = encoder(img_size=48)
        assert larger.img_size == 48
        images = torch.randint(0, 256, (2, 48, 48, 3), dtype=torch.uint8)
        assert larger(images)["mean", 1].shape == (2, SMALL.embed_dim)


def bicubic_matrix(size: int, wanted: int) -> torch.Tensor:
    """Weights of cubic convolution with a = -.75, pixel centres aligned, borders repeated."""
    matrix = torch.zeros(wanted, size, dtype=torch.float64)
    for row in range(wanted):
        place = (row + 0.5) * size / wanted - 0.5
        first = math.floor(place)
        for tap in range(-1, 3):
            x, a = abs(place - (first + tap)), -0.75
            if x <= 1:
                weight = (a + 2) * x**3 - (a + 3) * x**2 + 1
            else:
                weight = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            matrix[row, min(max(first + tap, 0), size - 1)] += weight
    return matrix


class TestHead:
    def test_patch_tokens_are_pooled_before_a_norm_of_their_own(self) -> None:
        source = build_model(SMALL, seed=0).eval()
        model = Classifier(from_model(source, name="small"), 5).eval()
        images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
        source.encoder.norm = torch.nn.Identity()
        tokens = source.encoder(images)
        pooled = tokens[:, 1:].mean(1)
        normed = F.layer_norm(pooled, pooled.shape[1:], model.norm.weight, model.norm.bias, 1e-6)
        expected = normed @ model.fc.weight.T + model.fc.bias
        torch.testing.assert_close(model.classify(images), expected, rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize(("head", "std"), [("norm", 2e-5), ("batch_norm", 0.01)])
    def test_last_layers_start_small(self, head: Any, std: float) -> None:
        torch.manual_seed(0)
        model = Classifier(encoder(replace(SMALL, embed_dim=64)), 1000, head=head)
        assert model.fc.weight.std().item() == pytest.approx(std, rel=0.03)
        assert not model.fc.bias.any()

    def test_the_probes_norm_has_no_parameters_and_the_encoder_none_to_train(self) -> None:
        model = Classifier(encoder(), 5, head="batch_norm", blocks=0)
        assert [n for n, p in model.named_parameters() if p.requires_grad] == [
            "fc.weight",
            "fc.bias",
        ]
        assert model.norm.eps == 1e-6

    @pytest.mark.parametrize(
        ("blocks", "prefixes"),
        [
            (0, ()),
            (0.5, ("blocks.1.norm2.", "blocks.1.mlp.")),
            (1, ("blocks.1.",)),
            (2, ("blocks.0.", "blocks.1.")),
        ],
    )
    def test_partial_fine_tuning_trains_the_last_blocks(
        self, blocks: float, prefixes: tuple[str, ...]
    ) -> None:
        model = Classifier(encoder(), 5, blocks=blocks)
        for name, parameter in model.named_parameters():
            inner = name.removeprefix("encoder.vit.")
            expected = inner == name or inner.startswith(prefixes)
            assert parameter.requires_grad == (expected if prefixes or inner == name else False), (
                name
            )

    def test_more_blocks_than_there_are_is_an_error(self) -> None:
        with pytest.raises(CmaeError, match="blocks is 3, and the encoder has 2"):
            Classifier(encoder(), 5, blocks=3)


class TestLars:
    def test_updates_are_those_of_maes_code(self) -> None:
        """v = .9 v + trust * g with trust = .001 |w| / |g| for weights, 1 for biases; w -= lr v."""
        torch.manual_seed(0)
        model = Classifier(encoder(), 5, head="batch_norm", blocks=0)
        config = replace(CONFIG, optimizer="lars", weight_decay=0.0, layer_decay=1.0)
        optimizer = build_classifier_optimizer(model, config)
        weight, bias = model.fc.weight.detach().double(), model.fc.bias.detach().double()
        speeds = [torch.zeros_like(weight), torch.zeros_like(bias)]
        for _ in range(4):
            gradients = [torch.randn_like(weight), torch.randn_like(bias)]
            for group in optimizer.param_groups:
                group["lr"] = 0.3
            model.fc.weight.grad, model.fc.bias.grad = (one.float() for one in gradients)
            optimizer.step()
            gradients[0] = gradients[0] * 0.001 * weight.norm() / gradients[0].norm()
            for speed, gradient in zip(speeds, gradients, strict=True):
                speed.mul_(0.9).add_(gradient)
            weight, bias = weight - 0.3 * speeds[0], bias - 0.3 * speeds[1]
            torch.testing.assert_close(model.fc.weight.double(), weight, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(model.fc.bias.double(), bias, rtol=1e-5, atol=1e-7)

    def test_many_heads_at_once_are_each_what_they_are_alone(self) -> None:
        torch.manual_seed(0)
        x, labels = torch.randn(64, 12), torch.randint(0, 5, (64,))
        lrs = torch.tensor([0.1, 1.0, 30.0])
        make = {"momentum": 0.9, "seed": 0, "device": torch.device("cpu")}
        together = LarsHeads(12, 5, 3, **make)
        for _ in range(5):
            together.train_step(x, labels, lr=lrs)
        for index, lr in enumerate(lrs):
            layer = torch.nn.Linear(12, 5)
            layer.weight.data = LarsHeads(12, 5, 1, **make).weight[0].T.clone()
            layer.bias.data.zero_()
            speed = [torch.zeros_like(layer.weight), torch.zeros_like(layer.bias)]
            norm = torch.nn.BatchNorm1d(12, affine=False, eps=1e-6)
            for _ in range(5):
                loss = F.cross_entropy(layer(norm(x)), labels)
                own, theirs = torch.autograd.grad(loss, [layer.weight, layer.bias])
                own = own * TRUST * layer.weight.norm() / own.norm()
                for value, v, gradient in zip(
                    (layer.weight, layer.bias), speed, (own, theirs), strict=True
                ):
                    v.mul_(0.9).add_(gradient)
                    value.data -= lr * v
            torch.testing.assert_close(together.weight[index], layer.weight.T, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(together.bias[index, 0], layer.bias, rtol=1e-4, atol=1e-6)
