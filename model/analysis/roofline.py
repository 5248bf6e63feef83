"""What a training step moves and keeps: bytes and floating point operations of every part, without a GPU.

Counts are of the mathematics: no recomputation, no launch costs, perfect caches inside one kernel and none
between two. Activations and matrix products are 16-bit under autocast; `residual_bytes` is the width of the
residual stream. The convolutional stages of the hybrid encoder are counted in operations, but their
traffic and activations are only those of their matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cmae.model.analysis.flops import count_multiply_adds, count_parameters
from cmae.model.config import ModelConfig

PARTS = ("target", "encoder", "pixel decoder", "feature decoder", "heads", "losses")
_HALF, _FULL = 2, 4  # bytes of a number


@dataclass(frozen=True)
class Precision:
    """How numbers are held and kernels fused."""

    residual_bytes: int = _FULL
    """4: residual streams and norms in float32, as autocast on a GPU has them; 2: in 16 bits."""
    fused: bool = False
    """Casts are fused into their neighbours, as torch.compile does."""
    target_copy: bool = False
    """16-bit weights of the target are kept, not cast in every step."""


@dataclass(frozen=True)
class Operation:
    """One kernel, or one of equal ones, forward and backward."""

    part: str
    name: str
    flops: float
    """Forward, for one image; a multiply-add counts 2."""
    bytes: float
    """Forward, for one image."""
    backward_bytes: float
    """For one image; 0 in the target, which has no backward pass."""
    step_bytes: float = 0.0
    """Once in a step whatever the batch: 16-bit weights read and their gradients written."""
    cast_bytes: float = 0.0
    """Once in a step, by kernels of their own: weights cast to 16 bits, gradients cast back."""
    saved_bytes: float = 0.0
    """Kept for the backward pass, for one image."""

    @property
    def backward_flops(self) -> float:
        """Twice the forward pass where there is a backward pass."""
        return 2 * self.flops if self.part != "target" else 0.0


def operations(config: ModelConfig, precision: Precision, *, num_keys: int) -> Iterator[Operation]:
    """Every operation of one image's way through the step, optimiser and EMA aside.

    Args:
        config: of the model.
        precision: number formats.
        num_keys: keys that a query is compared with: the global batch.
    """
    counter = _Counter(config, precision)
    prefix, visible = config.num_prefix_tokens, config.num_keep
    if config.has_contrast:
        seen = visible if config.target_input == "visible" else config.num_patches
        yield from counter.encoder("target", seen, is_cut=not config.target_final_norm)
        yield from counter.head("target", config.embed_dim)
    yield from counter.encoder("encoder", visible, is_cut=False)
    yield counter.norm("encoder", visible + prefix, config.embed_dim)
    if config.has_reconstruction:
        is_shared = config.has_contrast and config.feature_decoder == "shared"
        yield from counter.decoder("pixel decoder", config.decoder_depth, is_cut=not is_shared)
        row = config.patch_size**2 * 3
        yield counter.linear("pixel decoder", config.num_mask, config.decoder_embed_dim, row)
        # Reads predictions and uint8 pixels, keeps a float32 difference.
        values = config.num_mask * row
        traffic, back = values * (_HALF + 1), values * (_FULL + _HALF)
        yield Operation("losses", "pixel loss", 0, traffic, back, saved_bytes=_FULL * values)
    if config.has_contrast:
        yield from counter.contrast(num_keys)


@dataclass(frozen=True)
class _Counter:
    """Formulas for the kinds of operation; all sizes are per image."""

    config: ModelConfig
    precision: Precision

    def encoder(self, part: str, num_patches: int, *, is_cut: bool) -> Iterator[Operation]:
        config = self.config
        dim, num_tokens = config.embed_dim, num_patches + config.num_prefix_tokens
        row = config.patch_size**2 * 3
        yield Operation(part, "gather", 0, num_patches * row * (1 + _HALF), 0)
        if config.encoder == "vit":
            yield self.linear(part, num_patches, row, dim)
        else:
            yield self._conv_stages(part, num_tokens)
        for index in range(config.depth):
            is_last = is_cut and index == config.depth - 1
            tail = num_patches if is_last else num_tokens
            yield from self.attention(part, num_tokens, num_tokens, dim, config.num_heads)
            yield from self.mlp(part, tail, dim, config.mlp_ratio, is_mean=is_last)

    def decoder(self, part: str, depth: int, *, is_cut: bool) -> Iterator[Operation]:
        config = self.config
        prefix, dim = config.num_prefix_tokens, config.decoder_embed_dim
        num_tokens = config.num_patches + prefix
        yield self.linear(part, config.num_keep + prefix, config.embed_dim, dim)
        for index in range(depth):
            tail = config.num_mask if is_cut and index == depth - 1 else num_tokens
            yield from self.attention(part, num_tokens, tail, dim, config.decoder_num_heads)
            yield from self.mlp(part, tail, dim, config.decoder_mlp_ratio, is_mean=False)
        yield self.norm(part, tail, dim)

    def contrast(self, num_keys: int) -> Iterator[Operation]:
        config = self.config
        width, dim = config.embed_dim, config.decoder_embed_dim
        if config.feature_decoder == "own":
            depth = config.feature_decoder_depth
            yield from self.decoder("feature decoder", depth, is_cut=False)
        if config.feature_decoder != "none":
            yield self.linear("feature decoder", 1, dim, width)
        yield from self.head("heads", width)
        if config.predictor:
            yield from self.head("heads", config.proj_dim)
        products = num_keys if config.contrastive_loss == "info_nce" else 1
        logits = _FULL * products
        yield Operation(
            "losses",
            "contrast",
            2 * products * config.proj_dim,
            2 * logits,
            2 * logits,
            saved_bytes=2 * logits,
        )

    def head(self, part: str, width: int) -> Iterator[Operation]:
        hidden = self.config.proj_hidden_dim
        yield self.linear(part, 1, width, hidden)
        yield self.linear(part, 1, hidden, self.config.proj_dim)

    def linear(self, part: str, num_rows: int, width: int, width_out: int) -> Operation:
        weight = width * width_out
        is_target = part == "target"
        cast = 0 if is_target and self.precision.target_copy else weight * (_FULL + _HALF)
        if not is_target:
            cast *= 2
        step = weight * _HALF * (1 if is_target else 3)
        rows = _HALF * num_rows * (width + width_out)
        return Operation(
            part,
            f"linear {width} -> {width_out}",
            2 * num_rows * weight,
            rows,
            0 if is_target else 2 * rows,
            step_bytes=step,
            cast_bytes=cast,
            saved_bytes=0 if is_target else _HALF * num_rows * width,
        )

    def norm(self, part: str, num_tokens: int, dim: int) -> Operation:
        """LayerNorm and the cast of its output; its input, the residual stream, is kept."""
        residual = self.precision.residual_bytes
        forward, back = residual + _HALF, 2 * residual + _HALF
        if residual == _FULL and not self.precision.fused:
            forward, back = 3 * _FULL + _HALF, 3 * _FULL + _HALF + _FULL
        values = num_tokens * dim
        is_target = part == "target"
        return Operation(
            part,
            "norm",
            0,
            values * forward,
            0 if is_target else values * back,
            saved_bytes=0 if is_target else values * residual,
        )

    def add(self, part: str, num_tokens: int, dim: int) -> Operation:
        """Residual sum; going back, the branch's gradient is cast and the two are summed."""
        residual = self.precision.residual_bytes
        values = num_tokens * dim
        cast = residual + _HALF if residual == _FULL else 0
        back = 0 if part == "target" else values * (3 * residual + cast)
        return Operation(part, "residual sum", 0, values * (2 * residual + _HALF), back)

    def attention(
        self, part: str, num_tokens: int, num_queries: int, dim: int, num_heads: int
    ) -> Iterator[Operation]:
        yield self.norm(part, num_tokens, dim)
        if num_queries == num_tokens:
            yield self.linear(part, num_tokens, dim, 3 * dim)
        else:
            for rows, width in ((num_queries, dim), (num_tokens, 2 * dim)):
                linear = self.linear(part, rows, dim, width)
                yield linear
        read, kept = num_queries + 2 * num_tokens, num_queries * 4 * num_heads
        is_target = part == "target"
        yield Operation(
            part,
            "attention",
            4 * num_queries * num_tokens * dim,
            _HALF * dim * (read + num_queries),
            0 if is_target else _HALF * dim * (2 * read + 2 * num_queries),
            saved_bytes=0 if is_target else _HALF * dim * read + kept,
        )
        yield self.linear(part, num_queries, dim, dim)
        yield self.add(part, num_queries, dim)

    def mlp(
        self, part: str, num_tokens: int, dim: int, ratio: float, *, is_mean: bool
    ) -> Iterator[Operation]:
        hidden = int(dim * ratio)
        yield self.norm(part, num_tokens, dim)
        yield self.linear(part, num_tokens, dim, hidden)
        values = _HALF * num_tokens * hidden
        is_target = part == "target"
        yield Operation(
            part,
            "gelu",
            0,
            2 * values,
            0 if is_target else 3 * values,
            saved_bytes=0 if is_target else values,
        )
        yield self.linear(part, 1 if is_mean else num_tokens, hidden, dim)
        yield self.add(part, num_tokens, dim)

    def _conv_stages(self, part: str, num_tokens: int) -> Operation:
        """All of the hybrid encoder before its blocks, as one operation."""
        config = self.config
        key = "target_encoder" if part == "target" else "encoder"
        total = count_multiply_adds(config, exact_cuts=False)[key]
        dim, ratio = config.embed_dim, config.mlp_ratio
        token = 4 * dim * dim + 2 * dim * int(dim * ratio) + 2 * num_tokens * dim
        flops = 2 * (total - config.depth * num_tokens * token)
        return Operation(part, "convolution stages", flops, 0, 0)


@dataclass(frozen=True)
class Memory:
    """Device memory of a step, bytes."""

    weights: int
    """float32 weights of both branches, and the target copy."""
    gradients: int
    optimizer: int
    cast_weights: int
    """16-bit weights of the online branch, which autocast keeps until the backward pass is over."""
    activations_per_image: float

    @property
    def fixed(self) -> int:
        """Whatever the batch size."""
        return self.weights + self.gradients + self.optimizer + self.cast_weights

    def total(self, batch_size: int) -> float:
        """For one micro-batch."""
        return self.fixed + batch_size * self.activations_per_image


def count_memory(config: ModelConfig, precision: Precision, *, num_keys: int) -> Memory:
    """Memory of weights, gradients, AdamW and of what the backward pass needs.

    The allocator's fragments, cuBLAS's workspace and the CUDA context (about 1 GB) come on top.
    """
    counts = count_parameters(config)
    online, target = counts["online"], counts["target"]
    images = 3 * config.img_size**2 * (2 if config.has_contrast else 1)
    saved = sum(op.saved_bytes for op in operations(config, precision, num_keys=num_keys))
    return Memory(
        weights=_FULL * (online + target) + (_HALF * target if precision.target_copy else 0),
        gradients=_FULL * online,
        optimizer=2 * _FULL * online,
        cast_weights=_HALF * online,
        activations_per_image=saved + images,
    )


def optimizer_bytes(config: ModelConfig) -> int:
    """Traffic of the unscaling pass (8 bytes a parameter) and of fused AdamW (28)."""
    return 36 * count_parameters(config)["online"]


def ema_bytes(config: ModelConfig, precision: Precision) -> int:
    """Traffic of the moving average (12 bytes a parameter) and of the target copy's refresh (6)."""
    return (18 if precision.target_copy else 12) * count_parameters(config)["target"]
