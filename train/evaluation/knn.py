"""k-nearest-neighbour accuracy of frozen features: what an encoder has learnt, nothing trained on top."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
import webdataset as wds
from jaxtyping import Float, Float32, Int64, UInt8
from PIL import Image
from torch import Tensor

from cmae.errors import CmaeError
from cmae.model import CMAE
from cmae.pipeline import expand_shards
from cmae.pipeline.formats.images.pixels import decode_jpeg
from cmae.pipeline.formats.members.labels import NO_LABEL
from cmae.pipeline.formats.tar import TarRecord, iter_records
from cmae.pipeline.remote.schemes import is_local, redact
from cmae.printable import printable


class EvalImages(NamedTuple):
    """Labelled images without augmentation."""

    images: UInt8[Tensor, "N S S 3"]
    labels: Int64[Tensor, " N"]


def load_eval_images(
    shards: str | Sequence[str],
    img_size: int,
    *,
    keep: float = 1.0,
    max_samples: int | None = None,
) -> EvalImages:
    """Read the labelled images of shards: the centre square, resized (bicubic, antialiased).

    Args:
        shards: WebDataset tars with images and labels; see `expand_shards`.
        img_size: Side of the result, px.
        keep: Side of the centre square over the image's shorter side; ImageNet's custom is 224 / 256.
        max_samples: Largest number of images; None: all.

    Raises:
        CmaeError: No image, an image without label, or `keep` is not in (0, 1].
    """
    if not 0 < keep <= 1:
        raise CmaeError(f"keep is {keep}; it must be in (0, 1]")
    images, labels = [], []
    for record in islice(_records(expand_shards(shards)), max_samples):
        images.append(_centre_square(record.image, img_size, keep))
        labels.append(record.label)
    if not labels:
        raise CmaeError(f"shards={shards!r}: there is no image in them")
    return EvalImages(torch.stack(images), torch.tensor(labels))


@torch.no_grad()
def extract_features(
    model: CMAE,
    images: UInt8[Tensor, "N S S 3"],
    *,
    pool: Literal["mean", "cls"] = "mean",
    batch_size: int = 256,
) -> Float32[Tensor, "N D"]:
    """Features of whole images, computed on the model's device and returned on the CPU."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    features = [
        model.features(chunk.to(device), pool).float().cpu() for chunk in images.split(batch_size)
    ]
    model.train(was_training)
    return torch.cat(features)


def knn_accuracy(
    train_features: Float[Tensor, "N D"],
    train_labels: Int64[Tensor, " N"],
    val_features: Float[Tensor, "M D"],
    val_labels: Int64[Tensor, " M"],
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    chunk_size: int = 1024,
) -> float:
    """Share of validation samples, 0..1, whose class wins the vote of their k nearest training samples.

    Neighbours are found by cosine; each votes with weight exp(cosine / temperature).
    Source: Wu et al., arXiv 1805.01978, section 3.4; the protocol of DINO.

    Raises:
        CmaeError: `k` exceeds the number of training samples.
    """
    found = knn_sweep(
        train_features,
        train_labels,
        val_features,
        val_labels,
        num_classes=num_classes,
        ks=[k],
        temperatures=[temperature],
        chunk_size=chunk_size,
    )
    return found[k, temperature]


@torch.no_grad()
def knn_sweep(
    train_features: Float[Tensor, "N D"],
    train_labels: Int64[Tensor, " N"],
    val_features: Float[Tensor, "M D"],
    val_labels: Int64[Tensor, " M"],
    *,
    num_classes: int,
    ks: Sequence[int],
    temperatures: Sequence[float],
    chunk_size: int = 1024,
) -> dict[tuple[int, float], float]:
    """`knn_accuracy` by k and temperature; the neighbours are found once.

    Raises:
        CmaeError: A k exceeds the number of training samples, or a temperature is not above 0.
    """
    for k in ks:
        if not 1 <= k <= len(train_features):
            raise CmaeError(f"k is {k}; it must be in 1..{len(train_features)} (training samples)")
    for temperature in temperatures:
        if temperature <= 0:
            raise CmaeError(f"temperature is {temperature}; it must be > 0")
    bank = F.normalize(train_features.float(), dim=1)
    correct = {(k, temperature): 0 for k in ks for temperature in temperatures}
    for features, labels in zip(
        val_features.split(chunk_size), val_labels.split(chunk_size), strict=True
    ):
        cosines, rows = (F.normalize(features.float(), dim=1) @ bank.T).topk(max(ks), dim=1)
        neighbours = train_labels[rows]
        for k, temperature in correct:
            votes = torch.zeros(len(features), num_classes, device=bank.device)
            votes.scatter_add_(1, neighbours[:, :k], (cosines[:, :k] / temperature).exp())
            correct[k, temperature] += int((votes.argmax(dim=1) == labels).sum())
    return {setting: count / len(val_labels) for setting, count in correct.items()}


def _records(shards: Sequence[str]) -> Iterator[TarRecord]:
    for shard in shards:
        # webdataset refuses files where WDS_SECURE forbids it commands.
        with Path(shard).open("rb") if is_local(shard) else closing(wds.gopen(shard)) as stream:
            for record in iter_records(stream, name=redact(shard)):
                if record.label == NO_LABEL:
                    raise CmaeError(
                        f"{redact(shard)}: {printable(record.key)} has no label; evaluation needs a `.cls` "
                        "file beside every image, as `cmae shards write` makes them from class folders"
                    )
                yield record


def _centre_square(data: bytes, size: int, keep: float) -> UInt8[Tensor, "S S 3"]:
    image = decode_jpeg(data)
    side = min(image.size) * keep
    left, top = (image.width - side) / 2, (image.height - side) / 2
    square = image.resize(
        (size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
    )
    return torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(size, size, 3)
