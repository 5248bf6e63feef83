"""Reads of remote objects: every fault ends in the right bytes, or in the named error before the deadline."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from support.remote_servers import FaultyServer, serve, serve_s3

from cmae.pipeline.errors import RemoteError
from cmae.pipeline.remote import client, stores
from cmae.pipeline.remote.client import Remote, RemoteConfig, Span, open_stream
from cmae.pipeline.remote.schemes import identity, redact, redact_options, redact_shards
from cmae.pipeline.remote.stores import open_filesystem

# Else gcsfs first asks by gRPC, which the fake does not speak, what kind of bucket it is.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

SIZE = 300_000
PART = 20_000


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small parts, and a short patience with the server."""
    monkeypatch.setattr(client, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(client, "PART_BYTES", PART)
    monkeypatch.setattr(stores, "STALL_S", 0.4)
    monkeypatch.setattr(stores, "MIN_BYTES_PER_S", 20_000)


@pytest.fixture(scope="module")
def content() -> bytes:
    return np.random.default_rng(0).integers(0, 256, SIZE, np.uint8).tobytes()


@pytest.fixture
def server(tmp_path: Path, content: bytes):
    (tmp_path / "a.tar").write_bytes(content)
    with serve(tmp_path) as running:
        yield running


def connect(**options) -> Remote:
    return Remote(RemoteConfig(**({"deadline_s": 20.0} | options)))


TRANSIENT = ["500", "503", "truncated", "reset", "trickle", "too_short", "too_long"]


@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_fault_that_passes_costs_a_retry_and_no_byte(
    server: FaultyServer, content: bytes, fault: str
) -> None:
    remote = connect()
    file = remote.file(f"{server.url}/a.tar")
    assert file.size == SIZE
    server.fail("a.tar", fault, times=2)
    assert file.read(1_000, 90_000) == content[1_000:90_000]
    assert remote.num_retries == 2


@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_fault_that_stays_ends_in_the_named_error_at_the_deadline(
    server: FaultyServer, fault: str
) -> None:
    remote = connect(deadline_s=1.2)
    file = remote.file(f"{server.url}/a.tar")
    assert file.size == SIZE
    server.fail("a.tar", fault, times=1000)
    begun = time.monotonic()
    with pytest.raises(RemoteError) as caught:
        file.read(0, 90_000)
    assert time.monotonic() - begun < 2.0
    message = str(caught.value)
    assert message.startswith(f"{server.url}/a.tar: reading bytes 0..89999 failed, ")
    assert "attempt" in message
    assert "deadline 1.2 s" in message
    assert "data.remote_deadline_s" in message
    cause = {"500": "500", "503": "503", "trickle": "stalled", "too_short": "the server sent 45000"}
    assert cause.get(fault, "Error: ") in message


@pytest.mark.parametrize(
    ("fault", "repair"), [("404", "Correct data.shards"), ("403", "credentials")]
)
def test_what_cannot_succeed_is_not_tried_again(
    server: FaultyServer, fault: str, repair: str
) -> None:
    remote = connect()
    file = remote.file(f"{server.url}/a.tar")
    server.fail("a.tar", fault, times=1000)
    begun = time.monotonic()
    with pytest.raises(RemoteError, match=rf"1 attempt in .*{fault}.*{repair}"):
        file.read(0, 10)
    assert time.monotonic() - begun < 1.0
    assert remote.num_retries == 0


def test_retry_after_is_waited_for(server: FaultyServer, content: bytes) -> None:
    file = connect().file(f"{server.url}/a.tar")
    server.fail("a.tar", "503", times=1)  # asks for 0.4 s
    begun = time.monotonic()
    assert file.read(0, 10) == content[:10]
    assert time.monotonic() - begun >= 0.4


def test_a_server_that_says_nothing_is_given_up(server: FaultyServer) -> None:
    server.latency_s = 5.0
    with pytest.raises(RemoteError, match=r"no answer|[Tt]imeout"):
        _ = connect(deadline_s=1.0).file(f"{server.url}/a.tar").size


def test_nobody_listens(content: bytes) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(RemoteError, match=r"attempts in .*deadline 0\.5 s.*Check the network"):
        _ = connect(deadline_s=0.5).file(f"http://127.0.0.1:{port}/a.tar").size


def test_an_object_that_changes_during_the_run_is_named(server: FaultyServer) -> None:
    file = connect().file(f"{server.url}/a.tar")
    file.read(0, 10)
    file.check_unchanged()
    before = file.info.version
    (server.folder / "a.tar").write_bytes(b"x" * SIZE)
    with pytest.raises(RemoteError, match=f"it had {before}.*must not change"):
        file.read(0, 10)
    with pytest.raises(RemoteError, match=f"replaced during the run.*{before}"):
        file.check_unchanged()


def test_spans_are_read_at_the_same_time(server: FaultyServer, content: bytes) -> None:
    remote = connect()
    file = remote.file(f"{server.url}/a.tar")
    assert file.size == SIZE
    server.latency_s = 0.2
    spans = [Span(file, start, start + 7) for start in range(0, 24_000, 1_000)]
    begun = time.monotonic()
    assert remote.read_spans(spans) == [content[span.start : span.end] for span in spans]
    assert time.monotonic() - begun < 24 * 0.2 / 4


def test_one_span_that_fails_fails_all_at_once(server: FaultyServer) -> None:
    remote = connect()
    good, bad = remote.file(f"{server.url}/a.tar"), remote.file(f"{server.url}/b.tar")
    with pytest.raises(RemoteError, match=r"b\.tar.*404"):
        remote.read_spans([Span(good, 0, 10), Span(bad, 0, 10)])


def test_close_ends_a_read_under_way(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "STALL_S", 60.0)
    remote = connect()
    file = remote.file(f"{server.url}/a.tar")
    assert file.size == SIZE
    server.latency_s = 10.0
    threading.Timer(0.2, remote.close).start()
    begun = time.monotonic()
    with pytest.raises(BaseException, match=r"^$"):  # CancelledError says nothing
        file.read(0, 10)
    assert time.monotonic() - begun < 2.0
    with pytest.raises(RemoteError, match="closed"):
        file.read(0, 10)


# --- streams ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize("fault", ["500", "truncated", "reset", "trickle", "too_long"])
def test_a_stream_that_breaks_goes_on_without_losing_or_repeating_a_byte(
    server: FaultyServer, content: bytes, fault: str, has_ranges: bool
) -> None:
    server.has_ranges = has_ranges
    remote = connect()
    file = remote.file(f"{server.url}/a.tar")
    assert file.info.has_ranges == has_ranges
    server.fail("a.tar", fault, times=1, after=3 if has_ranges else 0)
    with open_stream(file) as stream:
        assert stream.read(1_000) + stream.read() == content
    if has_ranges:
        # One part again, of fifteen; more only where a busy machine ran into the timeout.
        assert remote.num_retries >= 1
        assert server.bytes_asked("a.tar") <= SIZE + remote.num_retries * PART + 1
    elif fault != "too_long":  # there all bytes came before the connection broke
        assert remote.num_retries >= 1


def test_a_stream_that_ends_early_says_so(server: FaultyServer) -> None:
    server.has_ranges = False
    file = connect(deadline_s=1.0).file(f"{server.url}/a.tar")
    assert file.size == SIZE
    server.fail("a.tar", "too_short", times=1000)
    with (
        open_stream(file) as stream,
        pytest.raises(RemoteError, match="ended after 150000 of 300000"),
    ):
        stream.read()


def test_parts_of_a_stream_are_ahead_of_the_reader(server: FaultyServer, content: bytes) -> None:
    file = connect().file(f"{server.url}/a.tar")
    assert file.size == SIZE
    server.latency_s = 0.1
    begun = time.monotonic()
    with open_stream(file) as stream:
        assert stream.read() == content
    assert time.monotonic() - begun < 15 * 0.1 / 2


# --- other stores -----------------------------------------------------------------------------------------


def test_s3(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with serve_s3(tmp_path, "bucket") as options:
        remote = connect(storage_options=options)
        file = remote.file("s3://bucket/train/a.tar")
        assert file.size == SIZE
        assert file.info.md5 == file.info.version != ""
        assert file.read(5, 70_000) == content[5:70_000]
        assert b"".join(file.chunks()) == content
        with pytest.raises(RemoteError, match=r"b\.tar.*1 attempt.*Correct data\.shards"):
            _ = remote.file("s3://bucket/train/b.tar").size
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        nobody = connect(storage_options={"endpoint_url": options["endpoint_url"]})
        with pytest.raises(RemoteError, match=r"1 attempt.*[Cc]redentials.*anon: true"):
            _ = nobody.file("s3://bucket/train/a.tar").size


def test_gs(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bucket" / "train").mkdir(parents=True)
    (tmp_path / "bucket" / "train" / "a.tar").write_bytes(content)
    with serve(tmp_path) as server:
        remote = connect(storage_options={"token": "anon", "endpoint_url": server.url})
        file = remote.file("gs://bucket/train/a.tar")
        assert (file.size, len(file.info.md5)) == (SIZE, 32)
        assert file.read(5, 70_000) == content[5:70_000]
        server.fail("download", "truncated", times=1)
        assert b"".join(file.chunks()) == content
        with pytest.raises(RemoteError, match="1 attempt"):
            _ = remote.file("gs://bucket/train/b.tar").size


def test_a_file_system_without_async_works_too(content: bytes) -> None:
    fsspec.filesystem("memory").pipe("/shards/a.tar", content)
    file = connect().file("memory://shards/a.tar")
    assert file.size == SIZE
    assert file.read(3, 50_000) == content[3:50_000]


@pytest.mark.parametrize(("scheme", "extra"), [("s3", "s3"), ("gs", "gs")])
def test_a_missing_package_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, scheme: str, extra: str
) -> None:
    def missing(name: str, **options: object) -> None:
        raise ImportError(f"Install the package for {name}")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(ValueError, match=rf"pip install 'cmae\[{extra}\]'"):
        connect().file(f"{scheme}://bucket/a.tar")


def test_an_unknown_scheme_and_a_wrong_option_are_named() -> None:
    with pytest.raises(ValueError, match="nosuch"):
        connect().file("nosuch://bucket/a.tar")
    with pytest.raises(ValueError, match=r"keys \['config_kwargs'\]"):
        connect(storage_options={"config_kwargs": 5}).file("s3://bucket/a.tar")


# --- secrets ----------------------------------------------------------------------------------------------


def test_secrets_are_hidden_in_urls() -> None:
    url = "https://user:pass@host/a.tar?X-Amz-Signature=abc&X-Amz-Expires=60&token=d"
    assert (
        redact(f"failed: {url} again")
        == "failed: https://***@host/a.tar?X-Amz-Signature=***&X-Amz-Expires=***&token=*** again"
    )
    assert redact("s3://bucket/a@b.tar") == "s3://bucket/a@b.tar"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:p@ss@host/a.tar", "https://***@host/a.tar"),
        ("https://me:p/a@ss@host/a.tar?x", "https://***@host/a.tar?***"),
        ("https://host:8080/a@b.tar", "https://host:8080/a@b.tar"),
        (
            "https://host/a.tar?pwd=SECRET&pass=SECRET&sas=SECRET",
            "https://host/a.tar?pwd=***&pass=***&sas=***",
        ),
        ("https://host/a.tar?SECRET", "https://host/a.tar?***"),
        ("https://host/a.tar?a=SECRET=SECRET;b=SECRET", "https://host/a.tar?a=***"),
        ("https://host/a#access_token=SECRET", "https://host/a#access_token=***"),
        ("GET /a.tar?sig=SECRET failed", "GET /a.tar?sig=*** failed"),
        ("pipe:curl -H 'X-Api-Key: SECRET' https://h/d/0.tar", "pipe:curl *** 0.tar"),
        ("pipe:PASSWORD=SECRET aws s3 cp s3://b/a.tar -", "pipe:*** *** a.tar"),
        ("pipe:/opt/bin/fetch SECRET\nSECRET", "pipe:fetch ***"),
        ("pipe:cat '/data/a.tar.gz' | gunzip", "pipe:cat *** a.tar.gz"),
        ("pipe:", "pipe:*** ***"),
        ("s3://bucket/x-{0..9}.tar", "s3://bucket/x-{0..9}.tar"),
        ("/data/x?y[0].tar", "/data/x?y[0].tar"),
    ],
)
def test_no_value_of_a_query_no_password_and_no_command_is_shown(url: str, shown: str) -> None:
    assert redact(url) == shown
    assert redact(shown) == shown
    assert redact_shards([url, url]) == [shown, shown]


@pytest.mark.parametrize(
    "name",
    [
        "connection_string",
        "sas_token",
        "headers",
        "pwd",
        "x-api-key",
        "auth",
        "params",
        "account_key",
    ],
)
def test_options_are_shown_by_a_list_of_what_is_harmless(name: str) -> None:
    for value in ("SECRET", 12345, ["SECRET"], {"any": "SECRET", "deep": [{"host2": "SECRET"}]}):
        shown = str(redact_options({name: value, "client_kwargs": {name: value}}))
        assert "SECRET" not in shown
        assert "12345" not in shown
        assert name in shown
    harmless = {
        "anon": True,
        "endpoint_url": "http://h:9000",
        "client_kwargs": {"region_name": "eu"},
    }
    assert redact_options(harmless) == harmless
    assert redact_options({"endpoint_url": "http://a:b@h?k=v"}) == {
        "endpoint_url": "http://***@h?k=***"
    }


def test_a_copy_keeps_its_place_when_a_signature_is_renewed_and_no_other_value_is_lost() -> None:
    assert identity("https://h/a.tar?part=1&sig=x") == identity("https://h/a.tar?part=1&sig=y")
    assert identity("https://h/a.tar?part=1") != identity("https://h/a.tar?part=2")


def test_secrets_are_hidden_in_options_however_deep() -> None:
    options = {
        "key": "AKIA",
        "secret": "s",
        "token": {"private_key": "p", "type": "service_account"},
        "anon": False,
        "client_kwargs": {
            "aws_session_token": "t",
            "region_name": "eu",
            "headers": {"Cookie": "c"},
        },
        "config_kwargs": {"signature_version": "s3v4"},
        "proxies": ["http://me:pw@proxy"],
    }
    assert redact_options(options) == {
        "key": "***",
        "secret": "***",
        "token": "***",
        "anon": False,
        "client_kwargs": {
            "aws_session_token": "***",
            "region_name": "eu",
            "headers": "***",
        },
        "config_kwargs": {"signature_version": "s3v4"},
        "proxies": "***",
    }
    assert redact_options({"token": "anon"}) == {"token": "anon"}


def test_an_error_shows_no_secret(server: FaultyServer) -> None:
    server.fail("a.tar", "403", times=1)
    with pytest.raises(RemoteError) as caught:
        _ = connect().file(f"{server.url}/a.tar?sig=verysecret").size
    assert "verysecret" not in str(caught.value)
    assert "sig=***" in str(caught.value)


def test_a_file_system_of_another_year_is_named(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise TypeError("unexpected keyword argument 'endpoint_url'")

    monkeypatch.setattr(fsspec, "filesystem", refuse)
    versions = {"s3fs": "0.4.2", "fsspec": "2026.9.0"}
    monkeypatch.setattr(stores.metadata, "version", versions.__getitem__)
    with pytest.raises(ValueError, match=r"s3fs 0\.4\.2 .*pip install --upgrade s3fs"):
        open_filesystem("s3://bucket/a.tar", {"endpoint_url": "http://localhost"})
