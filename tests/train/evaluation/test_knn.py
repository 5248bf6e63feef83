"""Weighted k-NN against a loop in plain Python, feature extraction, and reading evaluation images."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from webdataset import TarWriter

from cmae.model import CMAE, ModelConfig, build_model
from cmae.train.evaluation.knn import extract_features, knn_accuracy, load_eval_images


@pytest.fixture(scope="module")
def model() -> CMAE:
    config = ModelConfig(
        img_size=16,
        patch_size=4,
        embed_dim=16,
        depth=1,
        num_heads=2,
        decoder_embed_dim=16,
        decoder_depth=1,
        decoder_num_heads=2,
        proj_hidden_dim=8,
        proj_dim=4,
    )
    return build_model(config, seed=0)


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=100, subsampling=0)
    return buffer.getvalue()


def write_shard(path: Path, images: list[np.ndarray]) -> str:
    with TarWriter(str(path)) as tar:
        for label, pixels in enumerate(images):
            tar.write({"__key__": f"{label:03d}", "jpg": jpeg(pixels), "cls": label})
    return str(path)


def vote(bank: list[list[float]], labels: list[int], query: list[float], k: int, tau: float) -> int:
    def cosine(a: list[float], b: list[float]) -> float:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    near = sorted(((cosine(row, query), y) for row, y in zip(bank, labels, strict=True)))[-k:]
    votes: dict[int, float] = {}
    for similarity, label in near:
        votes[label] = votes.get(label, 0.0) + math.exp(similarity / tau)
    return max(votes, key=lambda label: votes[label])


@pytest.mark.parametrize(("k", "tau"), [(1, 0.07), (5, 0.07), (20, 0.07), (20, 10.0)])
def test_accuracy_equals_a_vote_counted_by_hand(k: int, tau: float) -> None:
    generator = torch.Generator().manual_seed(k)
    bank, queries = (torch.randn(n, 3, generator=generator) for n in (40, 25))
    labels, wanted = (torch.randint(0, 4, (n,), generator=generator) for n in (40, 25))
    hits = [
        vote(bank.tolist(), labels.tolist(), query, k, tau) == want
        for query, want in zip(queries.tolist(), wanted.tolist(), strict=True)
    ]
    assert 0 < sum(hits) < 25
    for chunk_size in (7, 1024):
        accuracy = knn_accuracy(
            bank,
            labels,
            queries,
            wanted,
            num_classes=4,
            k=k,
            temperature=tau,
            chunk_size=chunk_size,
        )
        assert accuracy == pytest.approx(sum(hits) / 25)


def test_length_of_features_does_not_count() -> None:
    bank = torch.tensor([[100.0, 0.0], [0.0, 0.01]])
    queries = torch.tensor([[0.1, 0.0], [3.0, 50.0]])
    labels = torch.tensor([0, 1])
    assert knn_accuracy(bank, labels, queries, labels, num_classes=2, k=1) == 1.0


def test_more_neighbours_than_samples_is_refused() -> None:
    rows, labels = torch.eye(3), torch.arange(3)
    with pytest.raises(ValueError, match=r"k is 20.*1\.\.3"):
        knn_accuracy(rows, labels, rows, labels, num_classes=3)


def test_features_do_not_depend_on_the_batch_size_and_leave_the_mode(model: CMAE) -> None:
    images = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8)
    model.train()
    whole = extract_features(model, images, batch_size=5)
    parts = extract_features(model, images, batch_size=2)
    assert model.training
    assert whole.shape == (5, 16)
    assert not whole.requires_grad
    torch.testing.assert_close(whole, parts)
    assert not torch.allclose(whole, extract_features(model, images, pool="cls"))


def test_images_come_in_order_with_their_labels(tmp_path: Path) -> None:
    shades = [np.full((20, 20, 3), 60 * i, np.uint8) for i in range(4)]
    found = load_eval_images(write_shard(tmp_path / "a.tar", shades), 8)
    assert found.images.shape == (4, 8, 8, 3)
    assert found.images.dtype == torch.uint8
    assert found.labels.tolist() == [0, 1, 2, 3]
    assert (
        found.images.float().mean((1, 2, 3)) - torch.tensor([0.0, 60, 120, 180])
    ).abs().max() < 2
    assert len(load_eval_images(str(tmp_path / "a.tar"), 8, max_samples=2).labels) == 2


def test_only_the_centre_square_is_kept(tmp_path: Path) -> None:
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, 16:48] = 255  # the centre square is white, all around it black
    shard = write_shard(tmp_path / "a.tar", [wide])
    assert int(inner(load_eval_images(shard, 16).images).min()) > 250
    wide[:4], wide[-4:], wide[:, 16:20], wide[:, 44:48] = 0, 0, 0, 0
    shard = write_shard(tmp_path / "b.tar", [wide])
    assert int(inner(load_eval_images(shard, 16, keep=0.75).images).min()) > 250
    assert int(inner(load_eval_images(shard, 16).images).min()) < 50


def inner(images: Tensor) -> Tensor:
    """Without the rim, where the filter reaches beyond the square."""
    return images[:, 1:-1, 1:-1]


def test_shards_without_labels_are_refused(tmp_path: Path) -> None:
    with TarWriter(str(tmp_path / "a.tar")) as tar:
        tar.write({"__key__": "x", "jpg": jpeg(np.zeros((8, 8, 3), np.uint8))})
    with pytest.raises(ValueError, match=r"a\.tar: x has no label.*\.cls"):
        load_eval_images(str(tmp_path / "a.tar"), 8)
