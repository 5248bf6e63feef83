"""The target pass and the online passes of one GPU as CUDA graphs: recorded once, then replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_WARMUP = (
    3  # cuBLAS and cuDNN allocate and choose in the first calls, which a recording must not hold
)


class Recording:
    """A function of tensors whose kernels are recorded and then replayed without Python.

    Inputs are copied into buffers of the recording; the output is a buffer too, overwritten by the next call.
    Everything else the function reads or writes (weights, gradients, loss scale) must keep its place.

    Args:
        function: takes tensors by name and returns one tensor. It must not synchronise with the host.
        inputs: the first inputs; later ones must have their shapes and dtypes.
    """

    def __init__(self, function: Callable[..., Tensor], inputs: Mapping[str, Tensor]) -> None:
        self._inputs = {name: tensor.detach().clone() for name, tensor in inputs.items()}
        self._replay = capture(lambda: function(**self._inputs))

    def __call__(self, **inputs: Tensor) -> Tensor:
        """Replay with new inputs.

        Raises:
            ValueError: an input has another shape or dtype than the recorded one.
        """
        for name, tensor in inputs.items():
            place = self._inputs[name]
            if tensor.shape != place.shape or tensor.dtype != place.dtype:
                raise ValueError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}, but the CUDA graph was recorded with "
                    f"{place.dtype} {tuple(place.shape)}; batches must all have one size with "
                    "speed.cuda_graphs, or set it to false"
                )
            place.copy_(tensor, non_blocking=True)
        return self._replay()


def capture(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Run a function a few times on a side stream, record it, and return what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARMUP):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # The loader's thread allocates and copies meanwhile, which a capture of all threads would not bear.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = function()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


class GraphedPasses:
    """Both recordings of a training step, made when the first batch comes.

    Gradients stay where they are: they are zeroed and added to, never freed, or a replay would write into
    memory that belongs to something else.

    Args:
        model: whose gradients and buffers the passes change.
        target_pass: (target, ids_keep) -> keys of this micro-batch.
        online_pass: (online, ids_keep, ids_mask[, keys]) -> losses; it also runs the backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        target_pass: Callable[..., Tensor],
        online_pass: Callable[..., Tensor],
    ) -> None:
        self._model = model
        self._functions = {"target": target_pass, "online": online_pass}
        self._recordings: dict[str, Recording] = {}
        self._gradients: list[Tensor] = []

    def zero_gradients(self) -> None:
        """Zero all gradients in place; allocate them at the first call."""
        if not self._gradients:
            for parameter in self._model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
                    self._gradients.append(parameter.grad)
        torch._foreach_zero_(self._gradients)

    def keys(self, **inputs: Tensor) -> Tensor:
        """Target keys of one micro-batch, in a tensor of their own."""
        return self._recording("target", inputs)(**inputs).clone()

    def losses(self, **inputs: Tensor) -> Tensor:
        """Losses of one micro-batch, in a tensor of their own; its gradients are added."""
        return self._recording("online", inputs)(**inputs).clone()

    def _recording(self, name: str, inputs: Mapping[str, Tensor]) -> Recording:
        if name not in self._recordings:
            # The first runs only warm up: what they do to gradients and running statistics is undone.
            with _kept((*self._gradients, *self._model.buffers())):
                self._recordings[name] = Recording(self._functions[name], inputs)
        return self._recordings[name]


@contextmanager
def _kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Give tensors back the values they had, in place."""
    kept = list(tensors)
    values = [tensor.clone() for tensor in kept]
    yield
    with torch.no_grad():
        for tensor, value in zip(kept, values, strict=True):
            tensor.copy_(value)
