"""Bytes and operations against numbers worked out by hand, and against what torch really keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cmae.model import ModelConfig, build_model
from cmae.model.analysis.operations import Operation, Precision, operations
from cmae.model.analysis.roofline import count_memory, ema_bytes, optimizer_bytes
from cmae.model.blocks import Block

VIT_B = ModelConfig()
SMALL = ModelConfig(
    img_size=64,
    patch_size=8,
    embed_dim=96,
    depth=4,
    num_heads=3,
    decoder_embed_dim=64,
    decoder_depth=3,
    decoder_num_heads=2,
    proj_hidden_dim=32,
    proj_dim=16,
)


def listed(config: ModelConfig, precision: Precision | None = None) -> list[Operation]:
    return list(operations(config, precision or Precision(), num_keys=1))


def test_one_block_by_hand() -> None:
    # ViT-B's online block: 69 tokens of 768, 12 heads, float32 residual stream, eager.
    block = listed(VIT_B)
    start = next(i for i, op in enumerate(block) if (op.part, op.name) == ("encoder", "norm"))
    norm, qkv, attention, proj, add, _, fc1, gelu, fc2, _ = block[start : start + 10]
    rows = 69 * 768
    assert (norm.bytes, norm.saved_bytes) == (rows * 14, rows * 4)
    assert (qkv.flops, qkv.bytes) == (2 * 69 * 768 * 2304, 2 * 69 * (768 + 2304))
    assert qkv.step_bytes == 768 * 2304 * (2 + 2 + 2)  # read twice, gradient written
    assert qkv.cast_bytes == 768 * 2304 * (4 + 2 + 2 + 4)  # to 16 bits, and the gradient back
    assert attention.flops == 4 * 69 * 69 * 768
    assert attention.bytes == 2 * 4 * rows
    assert attention.saved_bytes == 2 * 3 * rows + 69 * 12 * 4
    assert proj.saved_bytes == 2 * rows
    assert (add.bytes, add.backward_bytes) == (rows * 10, rows * 18)
    assert (fc1.saved_bytes, gelu.saved_bytes, fc2.saved_bytes) == tuple(
        2 * rows * factor for factor in (1, 4, 4)
    )
    saved = sum(op.saved_bytes for op in block[start : start + 10])
    assert saved == 36 * rows + 69 * 12 * 4


def test_a_16_bit_stream_and_a_copy_of_the_target_move_less() -> None:
    wide, narrow = listed(VIT_B), listed(VIT_B, Precision(residual_bytes=2))
    assert sum(op.bytes for op in narrow) < 0.8 * sum(op.bytes for op in wide)
    target_copy = listed(VIT_B, Precision(target_copy=True))
    saved = sum(op.cast_bytes for op in wide) - sum(op.cast_bytes for op in target_copy)
    matrices = 12 * 12 * 768**2 + 768 * 768 + 768 * 1536 + 1536 * 256
    assert saved == 6 * matrices


def test_weights_gradients_and_optimiser_of_vit_b_in_bytes() -> None:
    memory = count_memory(VIT_B, Precision(target_copy=True), num_keys=4096)
    assert memory.weights == 4 * (121_269_504 + 87_374_592) + 2 * 87_374_592
    assert memory.gradients == 4 * 121_269_504
    assert memory.optimizer == 8 * 121_269_504
    assert memory.total(10) == memory.fixed + 10 * memory.activations_per_image
    assert optimizer_bytes(VIT_B) == 36 * 121_269_504
    assert ema_bytes(VIT_B, Precision()) == 12 * 87_374_592


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("change", [{}, {"contrastive_loss": "none"}, {"feature_decoder": "none"}])
def test_estimated_activations_are_those_that_autograd_keeps(
    change: dict[str, object], recompute: bool
) -> None:
    config = replace(SMALL, **change)
    model = build_model(config, seed=0)
    for module in model.modules():
        if isinstance(module, Block):
            module.recomputes = recompute
    batch = 8
    pixels = torch.zeros(batch, 64, 64, 3, dtype=torch.uint8)
    ids_keep = torch.arange(config.num_keep).expand(batch, -1)
    keys = model.target_keys(pixels) if config.has_contrast else None
    kept: dict[int, torch.UntypedStorage] = {}
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    weight_shapes = {
        shape
        for p in model.parameters()
        for shape in (p.shape, p.t().shape if p.ndim == 2 else p.shape)
    }

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.shape not in weight_shapes:
            kept[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        model(pixels, None, ids_keep, keys=keys)
    found = sum(storage.nbytes() for storage in kept.values())
    precision = Precision(recompute=recompute)
    listed_ops = list(operations(config, precision, num_keys=batch))
    saved = sum(op.saved_bytes for op in listed_ops)
    if recompute:
        # What is there while one block of each part is computed again is not seen by the hooks.
        whole = list(operations(config, Precision(), num_keys=batch))
        saved -= _one_block_of_each_part(listed_ops)
        assert saved < 0.6 * sum(op.saved_bytes for op in whole)
    assert found == pytest.approx(batch * saved, rel=0.08)


def _one_block_of_each_part(ops: list[Operation]) -> float:
    """What the model of memory adds for the block that is whole: the first input of a part over its last."""
    inputs: dict[str, list[float]] = {}
    for op in ops:
        if op.name == "block's input":
            inputs.setdefault(op.part, []).append(op.saved_bytes)
    return sum(max(sizes) - min(sizes) for sizes in inputs.values())
