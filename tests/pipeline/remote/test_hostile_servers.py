"""Servers that answer something else than was asked: memory is bounded, and secrets stay with their host."""

from __future__ import annotations

import contextlib
import gzip
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support.remote_servers import serve
from support.shard_data import indexed_shard

from cmae.pipeline.errors import RemoteError
from cmae.pipeline.formats.shard_index import index_path
from cmae.pipeline.remote.cache import ShardCache
from cmae.pipeline.remote.client import Remote, RemoteConfig
from cmae.pipeline.remote.index import fetch_index

Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def answering(answer: Answer) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            answer(self)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}"
    finally:
        http.shutdown()
        http.server_close()


def connect(**options: object) -> Remote:
    return Remote(RemoteConfig(deadline_s=3.0, **options))  # type: ignore[arg-type]


def partial_content(request: BaseHTTPRequestHandler, total: int) -> None:
    request.send_response(206)
    request.send_header("Content-Range", f"bytes 0-0/{total}")
    request.send_header("ETag", '"1"')


def test_an_answer_without_an_end_is_cut_off_at_the_bytes_that_were_asked_for() -> None:
    sent = []

    def endless(request: BaseHTTPRequestHandler) -> None:
        partial_content(request, 1 << 40)
        request.end_headers()
        if request.headers["Range"] == "bytes=0-0":
            request.wfile.write(b"x")
            return
        with contextlib.suppress(OSError):
            for _ in range(4000):
                request.wfile.write(bytes(1 << 20))
                sent.append(1)

    with answering(endless) as url, pytest.raises(RemoteError, match="the server sends more"):
        connect().file(f"{url}/a.tar").read(0, 64 << 10)
    assert sum(sent) < 1000  # of MiB, over all attempts: what lies in the sockets


def test_a_body_that_is_compressed_all_the_same_is_refused_at_once() -> None:
    asked = []

    def compressing(request: BaseHTTPRequestHandler) -> None:
        asked.append(request.headers["Accept-Encoding"])
        body = gzip.compress(bytes(1 << 20))
        request.send_response(200)
        request.send_header("Content-Encoding", "gzip")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    with answering(compressing) as url, pytest.raises(RemoteError, match="'gzip', and was asked"):
        connect().file(f"{url}/a.tar").fetch_info()
    assert asked == ["identity"]


def test_an_index_larger_than_its_tar_is_not_fetched(tmp_path: Path) -> None:
    def huge(request: BaseHTTPRequestHandler) -> None:
        partial_content(request, 6 << 30 if "index" in request.path else 10240)
        request.send_header("Content-Length", "1")
        request.end_headers()
        request.wfile.write(b"x")

    with answering(huge) as url, pytest.raises(RemoteError, match="larger than 1058816 bytes"):
        fetch_index(connect().file(f"{url}/a.tar"), ShardCache(tmp_path / "cache"))


def test_the_users_headers_do_not_follow_a_redirect_to_another_host() -> None:
    seen: dict[str, list[str | None]] = {"first": [], "same": [], "other": []}

    def other(request: BaseHTTPRequestHandler) -> None:
        seen["other"].append(request.headers["X-Api-Key"])
        assert request.headers["Range"] == "bytes=0-0"
        partial_content(request, 77)
        request.send_header("Content-Length", "1")
        request.end_headers()
        request.wfile.write(b"x")

    with answering(other) as elsewhere:

        def redirecting(request: BaseHTTPRequestHandler) -> None:
            is_first = request.path == "/a.tar"
            seen["first" if is_first else "same"].append(request.headers["X-Api-Key"])
            request.send_response(302)
            request.send_header("Location", "/b.tar" if is_first else f"{elsewhere}/c.tar")
            request.send_header("Content-Length", "0")
            request.end_headers()

        options = {
            "headers": {"X-Api-Key": "secret"},
            "client_kwargs": {"headers": {"X-More": "y"}},
        }
        with answering(redirecting) as url:
            assert connect(storage_options=options).file(f"{url}/a.tar").size == 77
    assert seen == {"first": ["secret"], "same": ["secret"], "other": [None]}


@pytest.mark.parametrize("target", ["file:///etc/passwd", "/a.tar"])
def test_redirects_that_lead_nowhere_end(target: str) -> None:
    def redirecting(request: BaseHTTPRequestHandler) -> None:
        request.send_response(302)
        request.send_header("Location", target)
        request.send_header("Content-Length", "0")
        request.end_headers()

    with answering(redirecting) as url, pytest.raises(RemoteError, match="redirects"):
        connect().file(f"{url}/a.tar").fetch_info()


@pytest.mark.parametrize("suffix", [".partial", ".parts", ".lock", ".meta"])
def test_a_planted_link_in_the_cache_is_never_written_through(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "store").mkdir()
    indexed_shard(tmp_path / "store" / "a.tar")
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    with serve(tmp_path / "store") as server:
        cache = ShardCache(tmp_path / "cache")
        file = connect().file(f"{server.url}/a.tar")
        copy = cache.path(file.url)
        copy.parent.mkdir()
        copy.with_name(f".a.tar{suffix}").symlink_to(precious)
        try:
            cache.fetch(file, check=lambda path: None)
        except RemoteError as error:
            assert "is a link" in str(error)  # noqa: PT017
    assert precious.read_bytes() == b"precious"


def test_an_index_that_is_fetched_replaces_a_planted_link(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    indexed_shard(tmp_path / "store" / "a.tar")
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    with serve(tmp_path / "store") as server:
        cache = ShardCache(tmp_path / "cache")
        file = connect().file(f"{server.url}/a.tar")
        target = index_path(cache.path(file.url))
        target.parent.mkdir()
        target.symlink_to(precious)
        fetch_index(file, cache)
        assert not target.is_symlink()
    assert precious.read_bytes() == b"precious"
