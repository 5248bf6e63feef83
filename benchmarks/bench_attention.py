"""Which attention kernel is fastest at this model's short sequences?

    python benchmarks/bench_attention.py

ViT-B's encoder sees 69 tokens (online) and 197 (target) in 12 heads of 64, the decoders 197 in 16 heads of
32. Every backend of scaled_dot_product_attention, forward and forward with backward, in fp16, interleaved.
A backend that refuses a shape is a row with its reason.

Predictions, written before the first run, for an H100: flash and cuDNN within 20 % of each other at 64 wide,
flash ahead at 32; both at 120-180 TFLOP/s forward for 197 tokens, half of that for 69; math 4x slower,
compiled math 2.5x.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lib.results import write_result
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import sdpa_kernel

from cmae.train.bench.harness import summarise
from cmae.train.bench.kernels import time_us
from cmae.train.loop.sdpa import BACKENDS

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


class Shape(NamedTuple):
    """One attention of the model."""

    batch_size: int
    num_heads: int
    num_tokens: int
    head_dim: int

    @property
    def multiply_adds(self) -> int:
        """Of a forward pass; a backward pass has two and a half times as many."""
        return 2 * self.batch_size * self.num_heads * self.num_tokens**2 * self.head_dim


def find_shapes(batch_sizes: list[int]) -> list[Shape]:
    """Encoder online, encoder target, decoders."""
    kinds = [(12, 69, 64), (12, 197, 64), (16, 197, 32)]
    return [Shape(batch, *kind) for batch in batch_sizes for kind in kinds]


def build_contenders() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Attention by each backend; `compiled math` is what inductor makes of the formula."""

    def pinned(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with sdpa_kernel(BACKENDS[name]):
                return F.scaled_dot_product_attention(query, key, value)

        return attend

    def formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
        return scores.softmax(dim=-1) @ value

    found = {"torch": F.scaled_dot_product_attention, **{name: pinned(name) for name in BACKENDS}}
    if ON_GPU:
        found["compiled math"] = torch.compile(formula, fullgraph=True, dynamic=False)
    return found


def measure(shape: Shape, *, rounds: int) -> list[dict[str, Any]]:
    """Rows of all contenders on one shape."""
    batch, heads, tokens, width = shape
    dtype = torch.float16 if ON_GPU else torch.float32
    # As in the model: one projection's output, split into three and turned.
    qkv = torch.randn(batch, tokens, 3, heads, width, device=DEVICE, dtype=dtype)
    inputs = qkv.requires_grad_().permute(2, 0, 3, 1, 4)
    weight = torch.randn(batch, heads, tokens, width, device=DEVICE, dtype=dtype)
    times: dict[str, dict[str, list[float]]] = {}
    errors: dict[str, str] = {}
    contenders = build_contenders()
    for index in range(rounds + 2):
        for name, attend in contenders.items():
            if name in errors:
                continue

            def forward(attend: Callable[..., Tensor] = attend) -> Tensor:
                return attend(*inputs.unbind(0))

            def both(forward: Callable[[], Tensor] = forward) -> Tensor:
                return torch.autograd.grad(forward(), qkv, weight)[0]

            try:
                taken = {"forward_us": time_us(forward, DEVICE), "both_us": time_us(both, DEVICE)}
            except RuntimeError as error:
                errors[name] = str(error).splitlines()[0][:300]
                continue
            if index >= 2:  # the first rounds compile and warm up
                for key, us in taken.items():
                    times.setdefault(name, {}).setdefault(key, []).append(us)
    rows = []
    for name in contenders:
        row: dict[str, Any] = {"backend": name, **shape._asdict()}
        if name in errors:
            row["error"] = errors[name]
        else:
            row |= {key: summarise(values) for key, values in times[name].items()}
            row["forward_tflops"] = 2e-6 * shape.multiply_adds / row["forward_us"]["median"]
            row["both_tflops"] = 7e-6 * shape.multiply_adds / row["both_us"]["median"]
        rows.append(row)
        outcome = row.get("error") or (
            f"{row['forward_us']['median']:8.1f} us {row['forward_tflops']:6.1f} TFLOP/s, with backward "
            f"{row['both_us']['median']:8.1f} us {row['both_tflops']:6.1f} TFLOP/s"
        )
        print(f"B {batch:<4} {heads} x {tokens} x {width}  {name:<14} {outcome}", flush=True)
    return rows


def main() -> None:
    """Measure; the file is written after every shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[128, 512] if ON_GPU else [1])
    parser.add_argument("--rounds", type=int, default=30 if ON_GPU else 2)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for shape in find_shapes(arguments.batch_sizes):
        rows += measure(shape, rounds=arguments.rounds)
        if ON_GPU:
            write_result("attention", config=vars(arguments), rows=rows)


if __name__ == "__main__":
    main()
