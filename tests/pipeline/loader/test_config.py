"""The loader's configuration: what it refuses, what it fills in, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.loaders import VIEWS
from support.pipeline_data import write_photo_shards

from cmae.pipeline import LoaderConfig, LoaderState, build_loader
from cmae.pipeline.formats.dataset_index import build_indices

HEAVY = ("torch", "nvidia.dali", "webdataset")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    build_indices([str(path) for path in write_photo_shards(folder, sizes=[20, 20], edge=48)])
    return str(folder)


def loaded_by(statement: str) -> tuple[set[str], float]:
    """Heavy modules that a statement loads, and the size of its process after it in MB."""
    program = (
        f"import psutil, sys\n{statement}\n"
        f"print(*[name for name in {HEAVY} if name in sys.modules])\n"
        "print(psutil.Process().memory_info().rss / 1e6)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    names, size = done.stdout.split("\n")[:2]
    return set(names.split()), float(size)


@pytest.mark.parametrize(
    "statement",
    [
        "import cmae.pipeline.formats.tar",
        "from cmae.pipeline import LoaderConfig, ViewConfig; LoaderConfig()",
    ],
)
def test_small_parts_load_neither_torch_nor_dali(statement: str) -> None:
    names, size_mb = loaded_by(statement)
    assert names == set()
    assert size_mb < 100


def test_two_views_need_neither_masks_nor_a_global_batch(shards: str) -> None:
    with build_loader(LoaderConfig(shards, batch_size=4, views=VIEWS)) as loader:
        batch = next(loader)
        assert loader.steps_per_epoch == 10
    assert batch.online.shape == (4, 32, 32, 3)
    assert batch.target is not None
    assert (batch.ids_keep, batch.ids_mask) == (None, None)
    with pytest.raises(ValueError, match="give draw_mask to build_loader"):
        _ = batch.masks


def test_each_batch_size_follows_from_the_other() -> None:
    given = LoaderConfig(batch_size=8).resolved(world_size=4)
    assert given.global_batch_size == 32
    assert LoaderConfig(global_batch_size=32).resolved(world_size=4).batch_size == 8
    assert given.num_threads is not None
    assert given.num_threads >= 1
    with pytest.raises(ValueError, match="batch_size and global_batch_size are both None"):
        LoaderConfig().resolved()


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("prefetch", 0, ">= 1"),
        ("num_threads", 0, ">= 1, or null"),
        ("hw_decoder_load", 1.5, "between 0 and 1"),
        ("view_backend", "pil", "auto, dali or cpu"),
        ("remote", "disk", "auto, cache, range or stream"),
        ("remote_deadline_s", 0, "> 0"),
        ("shards", "https://***@x/a.tar", "given in full"),
    ],
)
def test_what_is_out_of_range_is_named_with_what_is_allowed(
    name: str, value: object, allowed: str
) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is .* must be {allowed}"):
        LoaderConfig(**{name: value})


def test_the_old_name_of_the_cpu_backend_is_taken_with_a_warning() -> None:
    with pytest.warns(FutureWarning, match="'cpu' now"):
        config = LoaderConfig(view_backend="host")
    assert config == LoaderConfig(view_backend="cpu")


@pytest.mark.parametrize(("source", "unit"), [("indexed", "sample"), ("stream", "shard")])
def test_a_state_says_what_it_counts_and_an_old_one_takes_the_sources_unit(
    shards: str, source: str, unit: str
) -> None:
    config = LoaderConfig(shards, source=source, batch_size=4, views=VIEWS)
    with build_loader(config) as loader:
        next(loader)
        state = loader.state
        following = next(loader)
    assert state.unit == unit
    old = LoaderState.from_dict(
        {"seed": 0, "epoch": state.epoch, "next_sample": state.offset, "digest": state.digest}
    )
    for known in (old, state):
        with build_loader(config, state=known) as loader:
            assert loader.state == state
            again = next(loader)
        if source == "indexed":
            assert again.sample_id.equal(following.sample_id)


def test_a_state_of_another_unit_is_refused(shards: str) -> None:
    config = LoaderConfig(shards, batch_size=4, views=VIEWS)
    with build_loader(config) as loader:
        digest = loader.state.digest
    with pytest.raises(ValueError, match="counts in units of a shard, this source in units of a"):
        build_loader(config, state=LoaderState(0, 0, 0, digest, unit="shard"))


def test_a_shard_may_be_a_path(shards: str) -> None:
    (first, _) = sorted(Path(shards).glob("*.tar"))
    with build_loader(LoaderConfig([str(first)], batch_size=4, views=VIEWS)) as loader:
        assert loader.num_samples == 20
