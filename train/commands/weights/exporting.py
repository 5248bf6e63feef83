"""`cmae export`: encoders for timm, Hugging Face, ONNX and torch.export, each with a card."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor, nn

from cmae.errors import CmaeError
from cmae.model import CMAE, ModelConfig, load_model, to_convmae, to_timm
from cmae.model.export.huggingface import preprocessor, to_vit, to_vit_mae
from cmae.model.export.stored import list_checkpoints
from cmae.paths import check_output
from cmae.pipeline.formats.atomic import atomic_write
from cmae.train.checkpoints.writer import write_atomically
from cmae.train.commands.weights.card import model_card
from cmae.train.evaluation.encoders import from_model
from cmae.train.monitor.console import PlainConsole

Format = Literal["timm", "convmae", "huggingface", "huggingface_mae", "onnx", "torch_export"]
FORMATS: dict[Format, str] = {
    "timm": "a file with timm's names; with the suffix .safetensors it is one",
    "convmae": "of a hybrid encoder: a file with ConvMAE's names, with the pixel decoder",
    "huggingface": "a folder for ViTModel: config.json, model.safetensors, preprocessor_config.json",
    "huggingface_mae": "a folder for ViTMAEForPreTraining, with the pixel decoder",
    "onnx": "a file .onnx: images (B, 3, S, S) normalised -> tokens (B, N + 1, D); needs onnx and onnxscript",
    "torch_export": "a file .pt2 of torch.export with the same input and output",
}

_TOLERANCE = 1e-4
"""Largest difference that a check of an exported program bears, over the largest value."""


def export_weights(
    checkpoint: Path, out: Path, branch: Literal["online", "target"] = "online", to: Format = "timm"
) -> int:
    """Write the encoder of a checkpoint for others, checked against ours, with a card.

    Args:
        checkpoint: Run folder, or checkpoint of this project.
        out: File or folder to write.
        branch: Encoder to write: 'online' is the trained one, 'target' its moving average.
        to: What to write, see `FORMATS`.

    Raises:
        CmaeError: The checkpoint lacks what is asked for, or the exported model computes something else.
    """
    check_output(out, key="OUT")
    model = load_model(checkpoint)
    write: dict[str, Callable[[], str]] = {
        "timm": lambda: _write_timm(model, out, branch),
        "convmae": lambda: _write_convmae(model, out, branch),
        "huggingface": lambda: _write_folder(out, *to_vit(model, branch=branch), model),
        "huggingface_mae": lambda: _write_mae(model, out, branch),
        "onnx": lambda: _write_onnx(_program(model, branch), model, out),
        "torch_export": lambda: _write_program(_program(model, branch), model, out),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    told = write[to]()
    newest = list_checkpoints(checkpoint / "checkpoints") if checkpoint.is_dir() else [checkpoint]
    card = out / "README.md" if out.is_dir() else out.with_name(f"{out.name}.md")
    how = _timm_use(model.config, branch) if to == "timm" else USE[to]
    text = model_card(newest[-1], model, branch=branch, file=out.name, how=how)
    with atomic_write(card) as file:
        file.write(text.encode())
    PlainConsole(stderr=True).print(
        f"{out}: {branch} encoder, {describe(model)}, {told}; card: {card}", soft_wrap=True
    )
    return 0


USE: dict[str, str] = {
    "convmae": "convvit_base_patch16(global_pool=True).load_state_dict(torch.load('{file}'), strict=False)\n"
    "cmae.model.from_convmae(torch.load('{file}')).features(images)",
    "huggingface": "transformers.ViTModel.from_pretrained('{file}', add_pooling_layer=False)",
    "huggingface_mae": "transformers.ViTMAEForPreTraining.from_pretrained('{file}')",
    "onnx": "onnxruntime.InferenceSession('{file}').run(None, {{'images': normalised}})",
    "torch_export": "torch.export.load('{file}').module()(normalised)",
}
"""How each is read, on a card; `_timm_use` makes timm's."""

_TIMM_NAMES = {
    (192, 12, 3, 16): "vit_tiny_patch16_224",
    (384, 12, 6, 16): "vit_small_patch16_224",
    (768, 12, 12, 16): "vit_base_patch16_224",
    (1024, 24, 16, 16): "vit_large_patch16_224",
    (1280, 32, 16, 14): "vit_huge_patch14_224",
}
"""timm's models by width, depth, heads and patch; their MLPs are 4 times as wide, their images of 224 px."""


def _timm_use(config: ModelConfig, branch: str) -> str:
    """How timm reads an export of these sizes, its train.py too, with '{file}'."""
    sizes: dict[str, Any] = {
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "patch_size": config.patch_size,
    }
    name = _TIMM_NAMES.get(tuple(sizes.values()), "")
    options = {} if name else sizes
    if config.mlp_ratio != 4:
        options["mlp_ratio"] = config.mlp_ratio
    if config.img_size != 224:
        options["img_size"] = config.img_size
    if branch == "target" and not config.target_final_norm:
        options["final_norm"] = False
    name = name or "vit_base_patch16_224"
    given = "".join(f"{key}={value!r}, " for key, value in options.items())
    words = "".join(f" {key}={value}" for key, value in options.items())
    words = f" --model-kwargs{words}" if words else ""
    return (
        f"timm.create_model('{name}', {given}num_classes=0, checkpoint_path='{{file}}')\n"
        "cmae.model.load_model('{file}').features(images)  # a safetensors file\n"
        "# Fine-tuning with timm's own script:\n"
        f"# python train.py --data-dir DATA --model {name}{words} --pretrained --pretrained-path {{file}} "
        "--num-classes 1000"
    )


def describe(model: CMAE) -> str:
    """Sizes of a model's encoder, for people."""
    config = model.config
    return (
        f"{config.encoder} {config.embed_dim}/{config.depth}/{config.num_heads}, patch "
        f"{config.patch_size}, image {config.img_size}"
    )


def _write_timm(model: CMAE, out: Path, branch: Literal["online", "target"]) -> str:
    notes = {"num_heads": str(model.config.num_heads)}
    return _write_file(to_timm(model, branch=branch), out, notes, "timm")


def _write_file(state: dict[str, Tensor], out: Path, notes: dict[str, str], names: str) -> str:
    if out.suffix == ".safetensors":
        _save(state, out, notes)
    else:
        write_atomically(out, state)
    return f"{len(state)} tensors with {names}'s names"


def _write_convmae(model: CMAE, out: Path, branch: Literal["online", "target"]) -> str:
    notes = {"num_heads": str(model.config.num_heads)}
    if branch == "online" and model.pixel_decoder is not None:
        notes["decoder_num_heads"] = str(model.config.decoder_num_heads)
    return _write_file(to_convmae(model, branch=branch), out, notes, "ConvMAE")


def _write_mae(model: CMAE, out: Path, branch: str) -> str:
    if branch != "online":
        raise CmaeError(
            "--branch target has no pixel decoder: huggingface_mae is of the online encoder"
        )
    return _write_folder(out, *to_vit_mae(model), model)


def _write_folder(
    out: Path, weights: dict[str, Tensor], config: dict[str, Any], model: CMAE
) -> str:
    if out.is_file():
        raise CmaeError(
            f"{out} is a file; a folder is written for Hugging Face: name another place"
        )
    out.mkdir(parents=True, exist_ok=True)
    _save(weights, out / "model.safetensors", {"format": "pt"})
    for name, content in {
        "config.json": config,
        "preprocessor_config.json": preprocessor(model),
    }.items():
        with atomic_write(out / name) as file:
            file.write((json.dumps(content, indent=2) + "\n").encode())
    return f"{len(weights)} tensors for {config['architectures'][0]}"


def _save(weights: dict[str, Tensor], path: Path, notes: dict[str, str]) -> None:
    """A safetensors file, whole or not at all, with the rights of other files."""
    with atomic_write(path) as file:
        file.write(save({name: value.contiguous() for name, value in weights.items()}, notes))


class _Program(nn.Module):
    """The encoder as a plain program: normalised images in, tokens after the final norm out."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.vit.forward_features(images)  # type: ignore[operator]
        return tokens


def _program(model: CMAE, branch: Literal["online", "target"]) -> _Program:
    return _Program(from_model(model, name="export", branch=branch).vit).eval()


def _example(model: CMAE, batch: int) -> Tensor:
    side = model.config.img_size
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


def _write_program(program: _Program, model: CMAE, out: Path) -> str:
    if out.suffix != ".pt2":
        raise CmaeError(f"{out}: a program of torch.export has the suffix .pt2")
    batch = torch.export.Dim("batch", min=1, max=4096)
    exported = torch.export.export(
        program, (_example(model, 2),), dynamic_shapes={"images": {0: batch}}
    )
    torch.export.save(exported, out)
    loaded = torch.export.load(out).module()
    return _checked(lambda images: loaded(images), program, model, out)


def _write_onnx(program: _Program, model: CMAE, out: Path) -> str:
    if out.suffix != ".onnx":
        raise CmaeError(f"{out}: an ONNX file has the suffix .onnx")
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise CmaeError(f"ONNX needs more packages ({error}): pip install 'cmae[onnx]'") from error
    torch.onnx.export(
        program,
        (_example(model, 2),),
        out,
        input_names=["images"],
        output_names=["tokens"],
        dynamo=True,
        dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1, max=4096)}},
        external_data=False,
        verbose=False,
    )
    try:
        import onnxruntime
    except ImportError:
        return "not checked: onnxruntime is not installed"
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return _checked(run, program, model, out)


@torch.no_grad()
def _checked(run: Callable[[Tensor], Tensor], program: _Program, model: CMAE, out: Path) -> str:
    """Compare with ours on batches of other sizes.

    Raises:
        CmaeError: They differ.
    """
    worst = 0.0
    for batch in (1, 3):
        images = _example(model, batch)
        expected = program(images)
        worst = max(worst, ((run(images) - expected).abs().max() / expected.abs().max()).item())
    if not worst <= _TOLERANCE:
        raise CmaeError(
            f"{out} computes something else: it differs by {worst:.2g} of the largest value"
        )
    return f"checked: differs by {worst:.1e} of the largest value"
