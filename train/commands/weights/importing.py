"""`cmae import`: weights of other projects."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from cmae.errors import CmaeError
from cmae.model import CMAE, from_authors, from_convmae, from_mae
from cmae.paths import check_output
from cmae.train.commands.weights.exporting import describe
from cmae.train.loop.weights import save_model
from cmae.train.monitor.console import PlainConsole


def import_weights(
    source: Path,
    out: Path,
    layout: Literal["authors", "mae", "convmae"] = "authors",
    channel_order: Literal["rgb", "bgr"] = "bgr",
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    trust: bool = False,
) -> int:
    """Turn a checkpoint of the CMAE authors' code, of MAE or of ConvMAE into one of this project.

    The result works with `cmae reconstruct`, `cmae export` and `cmae pretrain --init_from`.

    Args:
        source: File that torch.save wrote: a state dict, or a dict that holds one.
        out: Checkpoint to write.
        layout: Names in the file: 'authors' for ZhichengHuang/CMAE, 'mae' for facebookresearch/mae,
            'convmae' for Alpha-VL/ConvMAE.
        channel_order: Order of the colour channels that the network was trained on ('authors' only);
            the authors' own weights are 'bgr'.
        num_heads: Attention heads of the encoder, which no file says; None: those of the published model of
            its sizes.
        decoder_num_heads: Attention heads of the decoders; None: 16, as published.
        trust: Whether to unpickle also objects that are not tensors (logs and settings that frameworks store
            beside the weights); such a file can run any code, so know where it comes from.
    """
    check_output(out, key="OUT")
    loaded = _read_foreign(source, trust=trust)
    heads = {"num_heads": num_heads, "decoder_num_heads": decoder_num_heads}
    given = {name: value for name, value in heads.items() if value is not None}
    try:
        model = _convert(loaded, layout, channel_order, given)
    except ValueError as error:
        raise CmaeError(f"{source}, read with layout={layout!r}: {error}") from error
    if model.pixel_decoder is None:
        raise CmaeError(
            f"{source} holds an encoder without decoder, which cannot go on pretraining; `cmae evaluate` and "
            "`cmae finetune` take the file as it is"
        )
    save_model(model, out)
    _report(f"{out}: {describe(model)} from {source}")
    for name in heads.keys() - given.keys():
        guessed = getattr(model.config, name)
        _report(
            f"{name}: {guessed}, as in the published models; the file does not say (--{name} sets it)"
        )
    return 0


def _convert(
    loaded: dict[str, Any],
    layout: Literal["authors", "mae", "convmae"],
    channel_order: Literal["rgb", "bgr"],
    given: dict[str, int],
) -> CMAE:
    if layout == "mae":
        return from_mae(loaded, **given)
    if layout == "convmae":
        return from_convmae(loaded, **given)
    return from_authors(loaded, channel_order=channel_order, **given)


def _read_foreign(source: Path, *, trust: bool) -> dict[str, Any]:
    if not source.is_file():
        raise CmaeError(f"{source} is not a file; name what torch.save wrote")
    try:
        loaded: dict[str, Any] = torch.load(source, map_location="cpu", weights_only=not trust)
    except Exception as error:  # torch's reader raises anything on a file that is something else
        hint = "" if trust else "; if it holds more than tensors and you trust it, add --trust true"
        raise CmaeError(
            f"{source} cannot be read ({type(error).__name__}: {error}){hint}"
        ) from error
    if not isinstance(loaded, dict):
        raise CmaeError(f"{source} holds a {type(loaded).__name__}; expected a state dict")
    return loaded


def _report(message: str) -> None:
    PlainConsole(stderr=True).print(message, soft_wrap=True)
