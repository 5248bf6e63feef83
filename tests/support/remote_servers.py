"""A web server on 127.0.0.1 whose faults the tests choose, and a local S3."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

Fault = Literal[
    "500", "503", "404", "403", "truncated", "reset", "trickle", "too_short", "too_long"
]


@dataclass
class Request:
    path: str
    start: int | None
    """First byte of the range; None for the whole file."""
    end: int
    """One past the last byte."""


@dataclass
class FaultyServer:
    """Serves a folder; `fail` makes the next requests of some paths go wrong."""

    folder: Path
    has_ranges: bool = True
    has_etag: bool = True
    sends_md5: bool = False
    latency_s: float = 0.0
    """Before each answer."""
    bytes_per_s: float | None = None
    """Of one connection."""
    requests: list[Request] = field(default_factory=list)
    url: str = ""
    _faults: list[list] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, name: str, fault: Fault, *, times: int = 1, after: int = 0) -> None:
        """Spoil `times` answers about paths that contain `name`, after `after` good ones."""
        self._faults.append([name, fault, times, after])

    def take_fault(self, path: str) -> Fault | None:
        with self._lock:
            for entry in self._faults:
                name, fault, times, after = entry
                if name not in path or times == 0:
                    continue
                if after:
                    entry[3] -= 1
                    return None
                entry[2] -= 1
                return fault
        return None

    def asked(self, name: str) -> list[Request]:
        return [request for request in self.requests if name in request.path]

    def bytes_asked(self, name: str) -> int:
        return sum(request.end - (request.start or 0) for request in self.asked(name))


@contextmanager
def serve(folder: Path, **options) -> Iterator[FaultyServer]:
    """Run a server in threads for the time of the block."""
    server = FaultyServer(folder, **options)

    class Handler(_Handler):
        faulty = server

    http = _Server(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(
        target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    )
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


@lru_cache(maxsize=32)
def _read(file: Path, size: int, modified_ns: int) -> tuple[bytes, str]:
    """Contents and their digest, once for each version of a file."""
    body = file.read_bytes()
    return body, hashlib.sha1(body).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # the clients come all at once


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    faulty: FaultyServer

    def log_message(self, *arguments) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_PUT(self) -> None:
        """Store what comes in chunks; `truncated` keeps half of it and says that all is well."""
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        fault = self.faulty.take_fault(f"PUT {self.path}")
        self.faulty.requests.append(Request(f"PUT {self.path}", None, len(body)))
        if fault in ("500", "503", "403"):
            self._refuse(int(fault))
            return
        file = self.faulty.folder / self.path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(body[: len(body) // 2] if fault == "truncated" else body)
        self._refuse(201)

    def _answer(self, *, with_body: bool) -> None:
        server = self.faulty
        time.sleep(server.latency_s)
        path = urlsplit(self.path).path
        if gcs := re.fullmatch(r"(/download)?/storage/v1/b/([^/]+)/o/(.+)", path):
            file = server.folder / gcs[2] / unquote(gcs[3])
            if gcs[1] is None:
                self._describe_gcs(file, gcs[2])
                return
        else:
            file = server.folder / path.lstrip("/")
        if file.is_dir():
            self._list(file, with_body=with_body)
            return
        fault = server.take_fault(self.path)
        if fault in ("500", "503", "404", "403") or not file.is_file():
            self._refuse(int(fault) if fault and fault.isdigit() else 404)
            return
        status = file.stat()
        body, digest = _read(file, status.st_size, status.st_mtime_ns)
        headers = {}
        if server.has_etag:
            headers["ETag"] = f'"{digest}"'
        if server.sends_md5:
            digest = base64.b64encode(hashlib.md5(body).digest()).decode()
            headers["Digest"] = f"md5={digest}"
        size = len(body)
        if fault == "rotten":  # one bit, of a byte that no header of the tar nor of a JPEG holds
            body = bytearray(body)
            body[1200] ^= 1
            body = bytes(body)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, end = (int(asked[1]), min(int(asked[2]) + 1, size)) if asked else (None, size)
        server.requests.append(Request(self.path, start, end))
        if asked and server.has_ranges:
            self.send_response(206)
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
            body = memoryview(body)[start:end]
        else:
            self.send_response(200)
        self._send(body if with_body else b"", headers, fault, len(body))

    def _send(self, body: bytes, headers: dict[str, str], fault: Fault | None, size: int) -> None:
        # The header is true to the body, but the body is not what was asked for.
        if fault == "too_short":
            body, size = body[: size // 2], size // 2
        if fault == "too_long":
            size += 1000
        self.send_header("Content-Length", str(size))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if fault in ("truncated", "reset"):
            self.wfile.write(body[: len(body) // 2])
            if fault == "reset":  # RST instead of FIN
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
        elif fault == "trickle":
            for i in range(len(body)):
                self.wfile.write(body[i : i + 1])
                time.sleep(0.05)
        else:
            self._write(memoryview(body))
            self.close_connection = fault == "too_long"

    def _write(self, body: memoryview) -> None:
        rate = self.faulty.bytes_per_s
        if rate is None:
            self.wfile.write(body)
            return
        step = max(int(rate / 50), 1)
        for i in range(0, len(body), step):
            self.wfile.write(body[i : i + step])
            time.sleep(step / rate)

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):  # the client gave up
            self.close_connection = True

    def _describe_gcs(self, file: Path, bucket: str) -> None:
        if not file.is_file():
            self._refuse(404)
            return
        md5 = base64.b64encode(hashlib.md5(file.read_bytes()).digest()).decode()
        described = {
            "kind": "storage#object",
            "bucket": bucket,
            "name": str(file.relative_to(self.faulty.folder / bucket)),
            "size": str(file.stat().st_size),
            "md5Hash": md5,
            "etag": md5,
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }
        body = json.dumps(described).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self._send(body, {}, None, len(body))

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        if status == 503:
            self.send_header("Retry-After", "0.4")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _list(self, folder: Path, *, with_body: bool) -> None:
        names = [entry.name + "/" * entry.is_dir() for entry in sorted(folder.iterdir())]
        page = "".join(f'<a href="{name}">{name}</a>\n' for name in names).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page if with_body else b"")


@contextmanager
def serve_s3(folder: Path, bucket: str) -> Iterator[dict]:
    """A local S3 whose bucket holds the files of a folder; gives the storage options."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {"endpoint_url": f"http://{host}:{port}", "key": "test-key", "secret": "test-secret"}
    try:
        client = boto3.client(
            "s3",
            endpoint_url=options["endpoint_url"],
            aws_access_key_id=options["key"],
            aws_secret_access_key=options["secret"],
            region_name="us-east-1",
        )
        client.create_bucket(Bucket=bucket)
        for file in sorted(folder.iterdir()):
            client.put_object(Bucket=bucket, Key=f"train/{file.name}", Body=file.read_bytes())
        yield options
    finally:
        # Its buckets live in this process, and the next server would have them too.
        reset = urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")
        urllib.request.urlopen(reset).close()
        server.stop()
