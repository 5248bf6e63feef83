"""Files that go to a store: they arrive whole or an error says so, and none is sent twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import fsspec
import pytest
from support.remote_servers import FaultyServer, serve, serve_s3

from cmae.errors import CmaeError
from cmae.pipeline.errors import RemoteError
from cmae.pipeline.remote.client import RemoteConfig
from cmae.pipeline.remote.folder import RemoteFolder
from cmae.pipeline.shards.originals.image_folder import scan_image_folder
from cmae.pipeline.shards.write import WriteReport, write_shards


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    (tmp_path / "store").mkdir()
    with serve(tmp_path / "store") as server:
        yield server


def folder_of(server: FaultyServer, deadline_s: float = 20.0) -> RemoteFolder:
    return RemoteFolder(f"{server.url}/train/", RemoteConfig(deadline_s=deadline_s))


def sent(server: FaultyServer) -> list[str]:
    return [request.path.rpartition("/")[2] for request in server.asked("PUT ")]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(range(256)) * 500)
    return path


def test_a_file_is_sent_once_and_again_when_it_changed(server: FaultyServer, file: Path) -> None:
    server.sends_md5 = True
    folder = folder_of(server)
    assert folder.put(file)
    assert not folder.put(file)
    file.write_bytes(file.read_bytes()[::-1])  # of equal size
    assert folder.put(file)
    assert (server.folder / "train" / "a.bin").read_bytes() == file.read_bytes()
    assert folder.put(file, "b.bin")
    assert sent(server) == ["a.bin", "a.bin", "b.bin"]


@pytest.mark.parametrize("fault", ["500", "503", "truncated"])
def test_what_goes_wrong_on_the_way_is_sent_again(
    server: FaultyServer, file: Path, fault: str
) -> None:
    server.fail("PUT", fault, times=2)
    assert folder_of(server).put(file)
    assert len(sent(server)) == 3
    assert (server.folder / "train" / "a.bin").read_bytes() == file.read_bytes()


def test_a_store_that_never_takes_it_is_an_error_with_its_name(
    server: FaultyServer, file: Path
) -> None:
    server.fail("PUT", "403", times=99)
    with pytest.raises(RemoteError, match=r"sending a\.bin.*403.*credentials"):
        folder_of(server).put(file)
    server.fail("PUT", "truncated", times=99)
    server._faults.pop(0)
    with pytest.raises(RemoteError, match=r"sending a\.bin.*does not hold what was sent"):
        folder_of(server, deadline_s=2).put(file)


def test_closing_ends_a_transfer_that_hangs(server: FaultyServer, file: Path) -> None:
    server.latency_s = 30
    folder = folder_of(server, deadline_s=60)
    threading.Timer(0.5, folder.close).start()
    start = time.monotonic()
    with pytest.raises(CancelledError):
        folder.put(file)
    assert time.monotonic() - start < 10


def test_a_local_folder_is_no_store() -> None:
    with pytest.raises(CmaeError, match="no folder of a store"):
        RemoteFolder("/data/shards", RemoteConfig())


class _FullError(Exception):
    pass


def test_shards_go_to_s3_as_they_are_written_and_a_second_run_sends_the_rest(
    tmp_path: Path, images: Path
) -> None:
    (tmp_path / "empty").mkdir()
    out = tmp_path / "train"

    def run(publisher: object, part: int = 0) -> WriteReport:
        source = scan_image_folder(images)
        return write_shards(
            source, out, samples_per_shard=5, num_parts=2, part=part, workers=1, publisher=publisher
        )

    with serve_s3(tmp_path / "empty", "bucket") as options:
        store = fsspec.filesystem("s3", **options, use_listings_cache=False)
        folder = RemoteFolder("s3://bucket/train", RemoteConfig(storage_options=options))

        class Fails:
            """Takes two files, as a store does whose quota is used up."""

            left = 2

            def put(self, path: Path) -> bool:
                if not self.left:
                    raise _FullError
                self.left -= 1
                return folder.put(path)

            def close(self) -> None:
                pass

        with pytest.raises(_FullError):
            run(Fails())
        assert len(store.ls("bucket/train")) == 2
        assert run(folder).num_missing > 0
        assert not store.exists("bucket/train/dataset.json")
        assert run(folder, part=1).num_missing == 0
        there = {Path(name).name: store.cat_file(name) for name in store.ls("bucket/train")}
        assert there == {one.name: one.read_bytes() for one in out.iterdir()}
        assert {"SHA256SUMS", "classes.json", "dataset.json", "train-000000.tar"} <= there.keys()


def test_dataset_json_comes_last_and_an_index_after_its_tar(tmp_path: Path, images: Path) -> None:
    order: list[str] = []

    class Notes:
        def put(self, path: Path) -> None:
            order.append(path.name)

        def close(self) -> None:
            pass

    write_shards(
        scan_image_folder(images), tmp_path / "train", samples_per_shard=5, publisher=Notes()
    )
    assert order[-1] == "dataset.json"
    for number in range(2):
        name = f"train-{number:06d}"
        assert order.index(f"{name}.tar") < order.index(f"{name}.index.npz")
