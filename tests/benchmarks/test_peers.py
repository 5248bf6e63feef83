"""The other loaders of the benchmark make the views that their rows state."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pipeline_data import jpeg, photo, write_tar

from cmae.pipeline import ViewConfig
from cmae.pipeline.formats.shard_index import build_index, index_path, save_index

VIEWS = {"img_size": 32, "source_crop_size": 40, "target_shift": 8}


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The benchmark's modules."""
    from cmae.train.bench import images, loader, peers, tables
    from cmae.train.bench.peers import check, contract

    modules = {"data": images, "loader": loader, "peers": peers, "tables": tables}
    return type("Bench", (), modules | {"check": check, "contract": contract})


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Peers draw from the global random states; the workers of a DataLoader are seeded from torch's."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("peers")
    paths = []
    for shard in range(2):
        samples = [
            (f"{shard}-{number}", jpeg(photo(90 + number, 120, seed=20 * shard + number)), number)
            for number in range(12)
        ]
        path = write_tar(folder / f"part-{shard}.tar", samples)
        save_index(build_index(path), index_path(path))
        paths.append(str(path))
    return paths


def build_job(bench: Any, shards: list[str], color: str, images: Path | None) -> Any:
    views = ViewConfig(color=color, **VIEWS)  # type: ignore[arg-type]
    return bench.contract.Job(shards, images, views, batch_size=8, threads=1, device="cpu")


@pytest.mark.parametrize("color", ["exact", "fast", "none"])
def test_every_peer_that_runs_here_makes_what_it_states(
    bench: Any, shards: list[str], tmp_path: Path, color: str, capsys: pytest.CaptureFixture[str]
) -> None:
    images = bench.data.unpack_images(shards, tmp_path)
    bench.loader.check([build_job(bench, shards, color, images)])
    lines = capsys.readouterr().out.splitlines()
    checked = [line for line in lines if line.endswith(": as stated")]
    assert len(checked) >= {"exact": 4, "fast": 2, "none": 4}[color]
    assert all(": absent: " in line for line in lines if line not in checked)


def test_absent_peers_say_why(bench: Any, shards: list[str]) -> None:
    found = bench.peers.find_peers(build_job(bench, shards, "none", None))
    absent = {peer.name: peer.reason for peer in found if isinstance(peer, bench.contract.Absent)}
    assert "not unpacked" in absent["DALI, readers.file"]
    assert "no wheel" in absent["FFCV"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda online, target: (online.float(), target), "torch.float32, not uint8"),
        (lambda online, target: (online[:, :-1], target), "online is"),
        (lambda online, target: (online // 4, target // 4), "online mean"),
        (lambda online, target: (online, target.flip(2)), "no shifted crop"),
        (lambda online, target: (online, online), "shifted alike"),
        (
            lambda online, target: (online[:1].expand_as(online), target[:1].expand_as(target)),
            "images repeat",
        ),
    ],
)
def test_the_check_finds_views_that_are_not_as_stated(
    bench: Any, shards: list[str], spoil: Any, message: str
) -> None:
    job = build_job(bench, shards, "none", None)
    good = bench.peers.find_peers(job)[0]

    @contextlib.contextmanager
    def spoiled(job: Any) -> Iterator[Iterator[tuple[torch.Tensor, torch.Tensor]]]:
        with good.open(job) as pairs:
            yield (spoil(online, target) for online, target in pairs)

    mean = bench.loader.our_mean(job)
    bench.check.check_peer(good, job, expected_mean=mean)
    with pytest.raises(AssertionError, match=message):
        bench.check.check_peer(good._replace(open=spoiled), job, expected_mean=mean)


def test_pre_resized_shards_of_the_benchmark_hold_the_same_images(
    bench: Any, shards: list[str], tmp_path: Path
) -> None:
    images = bench.data.unpack_images(shards, tmp_path)
    written = bench.data.write_presized(images, tmp_path, max_size=48)
    indices = [build_index(path) for path in written]
    assert sum(map(len, indices)) == 24
    sides = [min(h, w) for one in indices for h, w in zip(one.height, one.width, strict=True)]
    assert max(sides) == 48
    assert sum(sum(one.downscaled.values()) for one in indices) == 24


def test_the_table_shows_peers_and_names_the_absent(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = {"median": 100.0, "min": 90.0, "max": 110.0, "n": 3}
    rates = {"images_per_s_per_core": summary, "cpu_s_per_1000_images": summary}
    ours = {"peer": "cmae indexed", "color": "none", "views": "ours", "version": "cmae 0.1"}
    dali = {"peer": "DALI", "color": "none", "views": "its own", "version": "DALI 2.4"}
    rows = [ours | rates, dali | rates, {"peer": "FFCV", "color": "none", "absent": "no wheel"}]
    table = bench.tables.loader_table({"rows": rows})
    assert [line[1] for line in table[1:]] == ["cmae indexed", "DALI"]
    assert bench.tables.loader_notes({"rows": rows}) == [
        "DALI, none (DALI 2.4): its own",
        "FFCV: absent, no wheel",
    ]
    old = [{"loader": "cmae indexed, host", "color": "none"} | rates]
    assert bench.tables.loader_table({"rows": old})[1][1] == "cmae indexed, cpu"
