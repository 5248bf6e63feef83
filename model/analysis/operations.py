"""One walk through a training step: the floating point operations, traffic and memory of every kernel.

Counts are of the mathematics: no recomputation, no launch costs, perfect caches inside one kernel and none
between two. Activations and matrix products are 16-bit under autocast; `residual_bytes` is the width of the
residual stream. The convolutional stages of the hybrid encoder are counted in operations, but their
traffic and activations are only those of their matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from cmae.model.config import ModelConfig
from cmae.model.hybrid import CONV_DEPTH, FIRST_STRIDE, stage_dims

PARTS = ("target", "encoder", "pixel decoder", "feature decoder", "heads", "losses")
HALF, FULL = 2, 4
"""Bytes of a 16-bit and of a float32 number."""


@dataclass(frozen=True)
class Precision:
    """How numbers are held and kernels fused."""

    residual_bytes: int = FULL
    """4: residual streams and norms in float32, as autocast on a GPU has them; 2: in 16 bits."""
    fused: bool = False
    """Casts are fused into their neighbours, as torch.compile does."""
    target_copy: bool = False
    """16-bit weights of the target are kept, not cast in every step."""
    recompute: bool = False
    """Blocks keep their input alone, and are computed again in the backward pass."""


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
    is_recomputed: bool = False
    """Whether the backward pass computes it again first."""

    @property
    def backward_flops(self) -> float:
        """Twice the forward pass where there is a backward pass, and once more where it is recomputed."""
        return (3 if self.is_recomputed else 2) * self.flops if self.part != "target" else 0.0


def operations(
    config: ModelConfig, precision: Precision, *, num_keys: int, as_published: bool = False
) -> Iterator[Operation]:
    """Every operation of one image's way through the step, optimiser and EMA aside.

    Args:
        config: Model that takes the step.
        precision: Number formats.
        num_keys: Keys that a query is compared with: the global batch.
        as_published: Whether to count as papers do: every patch is embedded, and every token passes every
            layer. This code leaves out what nothing reads.
    """
    counter = _Counter(config, precision, as_published)
    prefix, visible = config.num_prefix_tokens, config.num_keep
    if config.has_contrast:
        seen = visible if config.target_input == "visible" else config.num_patches
        yield from counter.encoder("target", seen, to_mean=not config.target_final_norm)
        yield from counter.head("target", config.embed_dim)
    yield from counter.encoder("encoder", visible, to_mean=False)
    yield counter.norm("encoder", visible + prefix, config.embed_dim)
    if config.has_reconstruction:
        is_shared = config.has_contrast and config.feature_decoder == "shared"
        yield from counter.decoder("pixel decoder", config.decoder_depth, only_masked=not is_shared)
        row = config.patch_size**2 * 3
        yield counter.decoder_head("pixel decoder", config.num_mask, row)
        # Reads predictions and uint8 pixels, keeps a float32 difference.
        values = config.num_mask * row
        traffic, back = values * (HALF + 1), values * (FULL + HALF)
        yield Operation("losses", "pixel loss", 0, traffic, back, saved_bytes=FULL * values)
    if config.has_contrast:
        yield from counter.contrast(num_keys)


@dataclass(frozen=True)
class _Counter:
    """Formulas for the kinds of operation; all sizes are per image."""

    config: ModelConfig
    precision: Precision
    as_published: bool

    @property
    def num_decoded(self) -> int:
        """Tokens of a decoder."""
        return self.config.num_patches + self.config.num_prefix_tokens

    def encoder(self, part: str, num_patches: int, *, to_mean: bool) -> Iterator[Operation]:
        """Embedding and blocks; `to_mean`: the last block makes the mean of its patches alone."""
        config = self.config
        dim, num_tokens = config.embed_dim, num_patches + config.num_prefix_tokens
        row = config.patch_size**2 * 3
        yield Operation(part, "gather", 0, num_patches * row * (1 + HALF), 0)
        num_embedded = config.num_patches if self.as_published else num_patches
        if config.encoder == "vit":
            yield self.linear(part, num_embedded, row, dim)
        else:
            yield self._conv_stages(part, num_embedded)
        for index in range(config.depth):
            is_last = to_mean and not self.as_published and index == config.depth - 1
            tail = num_patches if is_last else num_tokens
            block = [
                *self.attention(part, num_tokens, num_tokens, dim, config.num_heads),
                *self.mlp(part, tail, dim, config.mlp_ratio, is_mean=is_last),
            ]
            yield from self.block(part, block, num_tokens * dim, is_first=index == 0)

    def decoder(self, part: str, depth: int, *, only_masked: bool) -> Iterator[Operation]:
        """Embedding, blocks and norm; `only_masked`: the last block makes the masked tokens alone."""
        config = self.config
        dim, num_tokens = config.decoder_embed_dim, self.num_decoded
        num_visible = config.num_keep + config.num_prefix_tokens
        num_embedded = num_tokens if self.as_published else num_visible
        yield self.linear(part, num_embedded, config.embed_dim, dim)
        for index in range(depth):
            is_last = only_masked and not self.as_published and index == depth - 1
            tail = config.num_mask if is_last else num_tokens
            block = [
                *self.attention(part, num_tokens, tail, dim, config.decoder_num_heads),
                *self.mlp(part, tail, dim, config.decoder_mlp_ratio, is_mean=False),
            ]
            yield from self.block(part, block, num_tokens * dim, is_first=index == 0)
        yield self.norm(part, tail, dim)

    def block(
        self, part: str, block: Sequence[Operation], num_values: int, *, is_first: bool
    ) -> Iterator[Operation]:
        """A block as it is or, where it is computed again, with its input alone kept.

        One block of a part is whole in memory at a time, which its first one stands for.
        """
        if not self.precision.recompute or part == "target":
            yield from block
            return
        kept = self.precision.residual_bytes * num_values
        whole = sum(op.saved_bytes for op in block) if is_first else 0
        yield Operation(part, "block's input", 0, 0, 0, saved_bytes=kept + whole)
        for op in block:
            back = op.backward_bytes + op.bytes
            yield replace(op, saved_bytes=0, backward_bytes=back, is_recomputed=True)

    def decoder_head(self, part: str, num_rows: int, width_out: int) -> Operation:
        """A decoder's last layer, for the tokens that are read or, as published, for all."""
        num_rows = self.num_decoded if self.as_published else num_rows
        return self.linear(part, num_rows, self.config.decoder_embed_dim, width_out)

    def contrast(self, num_keys: int) -> Iterator[Operation]:
        """Feature decoder, heads and the loss between queries and keys."""
        config = self.config
        width = config.embed_dim
        if config.feature_decoder == "own":
            depth = config.feature_decoder_depth
            yield from self.decoder("feature decoder", depth, only_masked=False)
            yield self.decoder_head("feature decoder", 1, width)
        elif config.feature_decoder == "shared":
            yield self.linear("feature decoder", 1, config.decoder_embed_dim, width)
        yield from self.head("heads", width)
        if config.predictor:
            yield from self.head("heads", config.proj_dim)
        products = num_keys if config.contrastive_loss == "info_nce" else 1
        logits = FULL * products
        yield Operation(
            "losses",
            "contrast",
            2 * products * config.proj_dim,
            2 * logits,
            2 * logits,
            saved_bytes=2 * logits,
        )

    def head(self, part: str, width: int) -> Iterator[Operation]:
        """Projector or predictor, for one row of `width`."""
        hidden = self.config.proj_hidden_dim
        yield self.linear(part, 1, width, hidden)
        yield self.linear(part, 1, hidden, self.config.proj_dim)

    def linear(self, part: str, num_rows: int, width: int, width_out: int) -> Operation:
        """A matrix product with a weight, which is cast to 16 bits and has a gradient, but in the target."""
        weight = width * width_out
        is_target = part == "target"
        cast = 0 if is_target and self.precision.target_copy else weight * (FULL + HALF)
        if not is_target:
            cast *= 2
        step = weight * HALF * (1 if is_target else 3)
        rows = HALF * num_rows * (width + width_out)
        return Operation(
            part,
            f"linear {width} -> {width_out}",
            2 * num_rows * weight,
            rows,
            0 if is_target else 2 * rows,
            step_bytes=step,
            cast_bytes=cast,
            saved_bytes=0 if is_target else HALF * num_rows * width,
        )

    def norm(self, part: str, num_tokens: int, dim: int) -> Operation:
        """LayerNorm and the cast of its output; its input, the residual stream, is kept."""
        residual = self.precision.residual_bytes
        forward, back = residual + HALF, 2 * residual + HALF
        if residual == FULL and not self.precision.fused:
            forward, back = 3 * FULL + HALF, 3 * FULL + HALF + FULL
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
        cast = residual + HALF if residual == FULL else 0
        back = 0 if part == "target" else values * (3 * residual + cast)
        return Operation(part, "residual sum", 0, values * (2 * residual + HALF), back)

    def attention(
        self, part: str, num_tokens: int, num_queries: int, dim: int, num_heads: int
    ) -> Iterator[Operation]:
        """Norm, projections, attention of the queries to all tokens, and the residual sum."""
        yield self.norm(part, num_tokens, dim)
        if num_queries == num_tokens:
            yield self.linear(part, num_tokens, dim, 3 * dim)
        else:
            for rows, width in ((num_queries, dim), (num_tokens, 2 * dim)):
                yield self.linear(part, rows, dim, width)
        read, kept = num_queries + 2 * num_tokens, num_queries * 4 * num_heads
        is_target = part == "target"
        yield Operation(
            part,
            "attention",
            4 * num_queries * num_tokens * dim,
            HALF * dim * (read + num_queries),
            0 if is_target else HALF * dim * (2 * read + 2 * num_queries),
            saved_bytes=0 if is_target else HALF * dim * read + kept,
        )
        yield self.linear(part, num_queries, dim, dim)
        yield self.add(part, num_queries, dim)

    def mlp(
        self, part: str, num_tokens: int, dim: int, ratio: float, *, is_mean: bool
    ) -> Iterator[Operation]:
        """Norm, both layers and the residual sum; `is_mean`: the second layer sees the tokens' mean alone."""
        hidden = int(dim * ratio)
        yield self.norm(part, num_tokens, dim)
        yield self.linear(part, num_tokens, dim, hidden)
        values = HALF * num_tokens * hidden
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

    def _conv_stages(self, part: str, num_patches: int) -> Operation:
        """All of the hybrid encoder before its blocks; depthwise convolutions run on whole maps."""
        config = self.config
        first, second = stage_dims(config)
        dim = config.embed_dim
        inputs = ((16, FIRST_STRIDE**2 * 3, first), (4, 4 * first, second), (1, 4 * second, dim))
        count = sum(positions * width_in * width for positions, width_in, width in inputs)
        depthwise = 0
        for positions, width in ((16, first), (4, second)):
            block = 2 * width * width + 2 * width * int(width * config.mlp_ratio)
            count += positions * (CONV_DEPTH * block + width * dim)
            depthwise += positions * CONV_DEPTH * 25 * width
        flops = 2 * (num_patches * (count + dim * dim) + config.num_patches * depthwise)
        return Operation(part, "convolution stages", flops, 0, 0)
