"""A web server on this machine for the tests of downloads: it can cut, stall, redirect, refuse and forget."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Site:
    """What the server answers, and what it was asked.

    Attributes:
        files: Path -> content.
        redirects: Path -> address.
        statuses: Path -> statuses of the next answers, in order; 0 stands for a normal one.
        cut_at: Path -> bytes of the body after which the connection is closed, for each of the next answers.
        stall_at: Path -> bytes of the body after which nothing more comes.
        ranges: Whether a piece of a file may be asked for.
        tokens: Paths that need this token.
        etag: Stamp of every file; empty: none.
        kind: Content type.
        asked: Every request: path and headers.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    statuses: dict[str, list[int]] = field(default_factory=dict)
    cut_at: dict[str, list[int]] = field(default_factory=dict)
    stall_at: dict[str, list[int]] = field(default_factory=dict)
    ranges: bool = True
    tokens: dict[str, str] = field(default_factory=dict)
    etag: str = ""
    kind: str = "application/octet-stream"
    asked: list[tuple[str, Mapping[str, str]]] = field(default_factory=list)
    address: str = ""

    def put_json(self, path: str, value: Any) -> None:
        self.files[path] = json.dumps(value).encode()

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]


class _Handler(BaseHTTPRequestHandler):
    site: Site
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        site = self.site
        site.asked.append((self.path, dict(self.headers)))
        status = site.statuses[self.path].pop(0) if site.statuses.get(self.path) else 0
        token = next((t for p, t in site.tokens.items() if self.path.startswith(p)), None)
        if token and self.headers.get("Authorization") != f"Bearer {token}":
            status = 401
        if self.path in site.redirects:
            self.send_response(302)
            self.send_header("Location", site.redirects[self.path])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if status or self.path not in site.files:
            self.send_response(status or 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self._send(site.files[self.path])

    def _send(self, data: bytes) -> None:
        site, start = self.site, 0
        asked = self.headers.get("Range", "")
        same = self.headers.get("If-Range") in (None, site.etag)
        if site.ranges and asked.startswith("bytes=") and same:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(data):
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Type", site.kind)
        self.send_header("Content-Length", str(len(data) - start))
        if site.etag:
            self.send_header("ETag", site.etag)
        self.end_headers()
        body = data[start:]
        for limits, stalls in ((site.cut_at, False), (site.stall_at, True)):
            if limits.get(self.path):
                self.wfile.write(body[: limits[self.path].pop(0)])
                self.wfile.flush()
                if stalls:
                    time.sleep(1.0)
                self.close_connection = True
                return
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A running server that stands for the hub, an empty cache, and leave to download."""
    site = Site()
    handler = type("Handler", (_Handler,), {"site": site})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    site.address = f"http://127.0.0.1:{server.server_address[1]}"
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HTTP_PROXY", "http_proxy", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no-token"))
    monkeypatch.setenv("CHIASM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", site.address)
    yield site
    server.shutdown()
    server.server_close()
    thread.join()
