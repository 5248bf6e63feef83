"""Shards written by the nodes of a Ray cluster: two of them, on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.shard_data import contents, jpeg, write

from cmae.errors import CmaeError
from cmae.pipeline.shards.on_ray import write_shards_on_ray
from cmae.train.commands.main import main

pytest.importorskip("ray", reason="Ray is not installed")


@pytest.fixture
def cluster() -> Iterator[None]:
    import ray
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes.add_node(num_cpus=1)
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = nodes.address
    yield
    ray.shutdown()
    nodes.shutdown()
    os.environ.pop("RAY_ADDRESS")
    if before is not None:
        os.environ["RAY_ADDRESS"] = before


@pytest.mark.slow
def test_a_cluster_writes_what_one_machine_writes(
    cluster: None, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(images, tmp_path / "one" / "train")
    out = tmp_path / "ray" / "train"
    words = ["shards", "write", str(images), str(out), "--samples_per_shard", "5", "--on", "ray"]
    assert main(words) == 0
    assert contents(out) == contents(tmp_path / "one" / "train")
    assert "in 5 shards" in capsys.readouterr().out
    assert not list(out.glob("skipped*"))
    (images / "bee" / "bad.jpg").write_bytes(b"<html>")
    with pytest.raises(CmaeError, match=r"a part failed on the Ray cluster.*another source"):
        write_shards_on_ray(images, out, find={}, write={"samples_per_shard": 5})
    (images / "bee" / "bad.jpg").write_bytes(jpeg(1)[:100])
    with pytest.raises(CmaeError, match=r"bad\.jpg: .*strict"):
        write_shards_on_ray(images, tmp_path / "strict", find={}, write={"strict": True})


def test_without_a_cluster_the_way_to_one_is_named(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(CmaeError, match=r"no Ray cluster runs here.*ray start --head"):
        write_shards_on_ray(images, tmp_path / "out", find={}, write={})
