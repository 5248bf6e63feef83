"""Which kernel computes attention: one for all shapes, or for each shape the fastest on this GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmae.errors import CmaeError
from cmae.model import CMAE, ModelConfig
from cmae.model.blocks import pin_sdpa
from cmae.model.decoder import Decoder
from cmae.model.target_copy import TargetCopy

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_WARMUP, _REPEATS = 3, 10


@dataclass(frozen=True)
class AttentionShape:
    """One attention of the model: what a kernel's speed depends on."""

    batch_size: int
    num_heads: int
    num_queries: int
    num_keys: int
    head_dim: int
    has_backward: bool

    def __str__(self) -> str:
        """Short, for logs."""
        passes = "forward and backward" if self.has_backward else "forward"
        return (
            f"{self.batch_size} images, {self.num_heads} heads, {self.num_queries} x {self.num_keys} "
            f"tokens, {self.head_dim} wide, {passes}"
        )


def pin_attention(
    model: CMAE,
    choice: str,
    *,
    target_copy: TargetCopy | None,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    log: Callable[[str], None],
    agree: Callable[[str], str] = lambda choice: choice,
) -> None:
    """Pin the attention kernel of every block.

    Args:
        model: Model whose blocks are pinned.
        choice: Value of `speed.sdpa`. 'torch' does nothing; nor does 'auto' on a CPU, where torch has one
            fast kernel.
        target_copy: 16-bit copy of the target, whose blocks are pinned alike.
        batch_size: Images in one micro-batch.
        dtype: Number format of autocast.
        device: Device of the model.
        log: Function that gets a line for each shape that was measured.
        agree: Function from this rank's choice to that of all ranks.

    Raises:
        CmaeError: This device cannot run the chosen kernel on one of the shapes.
    """
    if choice == "torch" or (choice == "auto" and device.type == "cpu"):
        return
    chosen: dict[AttentionShape, str] = {}
    for blocks, shape in attention_shapes(model, target_copy, batch_size):
        if shape not in chosen:
            timings = _measure(shape, dtype, device) if choice == "auto" else {}
            chosen[shape] = agree(min(timings, key=timings.__getitem__)) if timings else choice
            if timings:
                found = ", ".join(f"{name} {ms:.3f} ms" for name, ms in timings.items())
                log(f"attention of {shape}: {chosen[shape]} ({found})")
            else:
                _check_runs(shape, choice, dtype, device)
        pin_sdpa(blocks, BACKENDS[chosen[shape]])


def attention_shapes(
    model: CMAE, target_copy: TargetCopy | None, batch_size: int
) -> Iterator[tuple[list[nn.Module], AttentionShape]]:
    """Blocks that share a shape of attention, and that shape."""
    config = model.config
    prefix = config.num_prefix_tokens
    seen = config.num_keep + prefix
    yield list(model.encoder.blocks), _encoder_shape(config, batch_size, seen, has_backward=True)
    if model.target_encoder is not None:
        target = model.target_encoder if target_copy is None else target_copy.encoder
        num_tokens = seen if config.target_input == "visible" else config.num_patches + prefix
        shape = _encoder_shape(config, batch_size, num_tokens, has_backward=False)
        yield list(target.blocks), shape
    num_tokens = config.num_patches + prefix
    heads = config.decoder_num_heads
    width = config.decoder_embed_dim // heads
    whole = AttentionShape(batch_size, heads, num_tokens, num_tokens, width, True)
    for decoder in (model.pixel_decoder, model.feature_decoder):
        if not isinstance(decoder, Decoder):
            continue
        blocks = list(decoder.blocks)
        only_masked = decoder is model.pixel_decoder and not isinstance(
            model.feature_decoder, nn.Linear
        )
        if only_masked:  # the last block asks for the masked tokens alone
            last = AttentionShape(batch_size, heads, config.num_mask, num_tokens, width, True)
            yield [blocks.pop()], last
        yield blocks, whole


def _encoder_shape(
    config: ModelConfig, batch_size: int, num_tokens: int, *, has_backward: bool
) -> AttentionShape:
    width = config.embed_dim // config.num_heads
    return AttentionShape(batch_size, config.num_heads, num_tokens, num_tokens, width, has_backward)


def _inputs(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Query, key and value as the blocks make them: (B, H, N, D) seen in one projection's output."""
    generator = torch.Generator(device).manual_seed(0)

    def project(num_tokens: int, parts: int) -> list[Tensor]:
        width = parts * shape.num_heads * shape.head_dim
        sizes = (shape.batch_size, num_tokens, width)
        joint = torch.randn(sizes, generator=generator, dtype=dtype, device=device)
        joint.requires_grad_(shape.has_backward)
        split = joint.unflatten(-1, (parts, shape.num_heads, shape.head_dim))
        return list(split.permute(2, 0, 3, 1, 4).unbind())

    if shape.num_queries == shape.num_keys:
        return project(shape.num_keys, 3)
    return project(shape.num_queries, 1) + project(shape.num_keys, 2)


def _run(shape: AttentionShape, name: str, inputs: list[Tensor]) -> None:
    with sdpa_kernel(BACKENDS[name]):
        query, key, value = inputs
        out = F.scaled_dot_product_attention(query, key, value)
    if shape.has_backward:
        torch.autograd.grad(out, inputs, torch.ones_like(out))


def _check_runs(
    shape: AttentionShape, choice: str, dtype: torch.dtype, device: torch.device
) -> None:
    try:
        _run(shape, choice, _inputs(shape, dtype, device))
    except RuntimeError as error:
        raise CmaeError(
            f"speed.sdpa is {choice!r}, which cannot compute attention of {shape} in {dtype} on "
            f"{device}; set speed.sdpa to 'auto' or 'torch'"
        ) from error


def _measure(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Milliseconds of every kernel that can run the shape; 'math' always can."""
    inputs, timings = _inputs(shape, dtype, device), {}
    for name in BACKENDS:
        try:
            for _ in range(_WARMUP):
                _run(shape, name, inputs)
        except RuntimeError:
            continue
        timings[name] = statistics.median(_time(shape, name, inputs) for _ in range(_REPEATS))
    return timings


def _time(shape: AttentionShape, name: str, inputs: list[Tensor]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)  # about 1 ms: the host gets ahead, or its speed would be measured
    start.record()
    _run(shape, name, inputs)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
