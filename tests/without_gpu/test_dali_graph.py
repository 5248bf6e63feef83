"""The loader's graph for a GPU, as DALI defines it without one: devices, arguments, executor, versions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata
from typing import Any, cast, get_args
from unittest import mock

import pytest

pytest.importorskip("nvidia.dali")

import torch
from nvidia.dali import backend
from nvidia.dali.ops import _registry as operators
from nvidia.dali.pipeline import Pipeline
from packaging.version import Version

from cmae.pipeline.views import dali
from cmae.pipeline.views.config import DecodeWay, ViewConfig, ViewStep

GPU = torch.device("cuda", 0)
REGISTERED = {
    "cpu": operators.cpu_ops(),
    "gpu": operators.gpu_ops(),
    "mixed": operators.mixed_ops(),
}


def define(views: ViewConfig, **options: Any) -> Pipeline:
    """The graph as far as a machine without a GPU can go: defined, not built."""

    def only_define(pipeline: Any) -> None:
        pipeline._build_graph()

    with mock.patch.object(Pipeline, "build", only_define):
        return dali.build_view_graph(views, GPU, batch_size=4, num_threads=2, **options)


def nodes(pipeline: Pipeline) -> Iterator[tuple[str, str, Any]]:
    """Each operator's name in its schema, its device, and its node."""
    for node in cast("Any", pipeline)._ops:
        text = str(node.spec)
        name = re.search(r"OpSpec for (\w+)", text)
        device = re.search(r"^\s+device: (\w+)", text, re.MULTILINE)
        assert name, text
        assert device, text
        yield name[1], device[1], node


GRAPHS = [
    (ViewConfig(target_crop=crop), way, step)
    for crop in ("shift", "random_resized")
    for way in get_args(DecodeWay)
    for step in get_args(ViewStep)
]


@pytest.mark.parametrize(
    ("views", "way", "step"), GRAPHS, ids=lambda one: getattr(one, "target_crop", one)
)
def test_every_operator_exists_on_its_device_with_its_arguments(
    views: ViewConfig, way: DecodeWay, step: ViewStep
) -> None:
    pipeline = define(views, decode_way=way, last_step=step)
    for name, device, node in nodes(pipeline):
        schema: Any = backend.GetSchema(name)  # type: ignore[attr-defined]
        schema.CheckArgs(node.spec)
        assert name in REGISTERED[device], (name, device)
        for number, one in enumerate(node.inputs[: node.spec.NumRegularInput()]):
            takes = schema.GetInputDevice(number, one.device, device)
            assert one.device == ("cpu" if takes == "mixed" else takes), (name, number)
        for one in node.inputs[node.spec.NumRegularInput() :]:
            assert one.device == "cpu", (name, one.name)  # arguments are read by the host


@pytest.mark.parametrize("crop", ["shift", "random_resized"])
@pytest.mark.parametrize("way", get_args(DecodeWay))
def test_pixels_come_to_the_device_once_and_stay_there(crop: Any, way: DecodeWay) -> None:
    found = list(nodes(define(ViewConfig(target_crop=crop), decode_way=way)))
    decoders = [(name, device) for name, device, _ in found if "Image" in name]
    windows = 2 if crop == "random_resized" else 1
    expected = {
        "window": [("decoders__ImageSlice", "mixed")] * windows,
        "whole": [("decoders__Image", "mixed")],
        "cpu": [("decoders__ImageSlice", "cpu")] * windows,
    }[way]
    assert decoders == expected
    made = {one.name: one.device for _, _, node in found for one in node.outputs}
    copies = [one for _, _, node in found for one in node.inputs if one.device != made[one.name]]
    assert len(copies) == (windows if way == "cpu" else 0)
    for name, device, node in found:
        if name in ("Resize", "Flip", "Slice"):
            assert device == "gpu", name
            assert all(one.device == "gpu" for one in node.outputs)


@pytest.mark.parametrize("way", get_args(DecodeWay))
def test_the_executor_is_the_dynamic_one(way: DecodeWay) -> None:
    """Only it keeps outputs that are still referenced and goes on after a batch that failed."""
    assert cast("Any", define(ViewConfig(), decode_way=way))._exec_dynamic


def test_the_check_finds_an_argument_that_is_not_there() -> None:
    """As when an operator loses one in a later DALI."""
    pipeline = define(ViewConfig())
    name, _, node = next(one for one in nodes(pipeline) if one[0] == "Resize")
    node.spec.AddArg("no_such_argument", 1)
    with pytest.raises(ValueError, match="no_such_argument"):
        backend.GetSchema(name).CheckArgs(node.spec)  # type: ignore[attr-defined]


def test_installed_decoders_are_new_enough() -> None:
    """Before nvJPEG 13.3 windows had wrong borders; `pip install` must not choose one that does."""
    assert Version(metadata.version("nvidia-nvjpeg")) >= Version("13.3")
    dali_version = next(
        Version(one.version)
        for one in metadata.distributions()
        if (one.metadata["Name"] or "").startswith("nvidia-dali")
    )
    assert dali_version >= Version("2.0")
