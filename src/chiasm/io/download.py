"""An address to a file on disk: resumable, verified, and nothing is sent but the request itself.

In: an address and, where known, the SHA-256 (or git's hash) and the size of what lies there. Out: the whole file under
its name, or an error; while it comes it lies beside as ``NAME.part``, which the next call continues. Only the standard
library is used, so there is no telemetry, no hidden call and no waiting for minutes: an address that does not answer
within :data:`REACH_S` is an error. Proxies are taken from the environment. ``HF_HUB_OFFLINE=1`` forbids every request.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import shutil
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from chiasm import __version__
from chiasm.errors import CheckpointError
from chiasm.progress import Progress, SilentProgress

#: Seconds until an address that does not answer counts as out of reach.
REACH_S = 2.0
#: Seconds without a byte until a connection counts as broken.
PATIENCE_S = 20.0
#: Attempts without a new byte before giving up.
ATTEMPTS = 3
PIECE_BYTES = 2**18
MAX_JSON_BYTES = 32 * 2**20
_AGENT = f"chiasm/{__version__}"
_BROKEN = (urllib.error.URLError, ssl.SSLError, http.client.HTTPException, TimeoutError, ConnectionError, ValueError)


class DownloadError(CheckpointError):
    """Something could not be fetched.

    Attributes:
        status: What the server answered (404, say); None: it did not answer, or broke off.
    """

    def __init__(self, message: str, *, hint: str | None = None, status: int | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status = status


def is_offline() -> bool:
    """Return whether the environment forbids requests (``HF_HUB_OFFLINE`` or ``TRANSFORMERS_OFFLINE``)."""
    values = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(value.strip().upper() in {"1", "ON", "YES", "TRUE"} for value in values)


def is_reachable(url: str, *, within_s: float = REACH_S) -> bool:
    """Return whether the server of an address, or the proxy before it, takes a connection in time.

    The look-up of a name cannot be interrupted, so it happens in a thread that is left behind.
    """
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(host):
        parts = urllib.parse.urlsplit(proxy if "//" in proxy else f"http://{proxy}")
    answered = threading.Event()

    def knock() -> None:
        with contextlib.suppress(OSError, ValueError):
            port = parts.port or (443 if parts.scheme == "https" else 80)
            with socket.create_connection((parts.hostname or "", port), timeout=within_s):
                answered.set()

    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(within_s)
    return answered.is_set()


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from https to http, and never carries a token to another host."""

    max_redirections = 5

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        old, new = urllib.parse.urlsplit(req.full_url), urllib.parse.urlsplit(newurl)
        if new.scheme not in ("https", old.scheme):
            raise DownloadError(f"`{old.hostname}` sends on to an address that is not https", status=code)
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and (old.hostname, old.port) != (new.hostname, new.port):
            request.remove_header("Authorization")
        return request


def _opener() -> urllib.request.OpenerDirector:
    opener = urllib.request.OpenerDirector()  # not `build_opener`, which would also open file: and ftp:
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener


def _open(url: str, headers: Mapping[str, str], patience_s: float) -> Any:
    if urllib.parse.urlsplit(url).scheme not in ("https", "http"):
        raise DownloadError("only https addresses are fetched")
    sent = {"User-Agent": _AGENT, "Accept-Encoding": "identity", **headers}
    return _opener().open(urllib.request.Request(url, headers=sent), timeout=patience_s)


def _refused(url: str, error: urllib.error.HTTPError) -> DownloadError:
    host = urllib.parse.urlsplit(url).hostname
    return DownloadError(
        f"`{host}` answers {error.code} ({error.reason}) for `{_file_name(url)}`",
        status=error.code,
        hint="the address may have changed; fetch the file by hand and give its path",
    )


def _file_name(url: str) -> str:
    return urllib.parse.urlsplit(url).path.rsplit("/", 1)[-1] or "the address"


def check_reach(url: str) -> None:
    """Raise ``DownloadError`` at once where requests are forbidden or the server is out of reach."""
    if is_offline():
        raise DownloadError("the environment forbids downloads (`HF_HUB_OFFLINE=1`)", hint="unset it to allow them")
    if not is_reachable(url):
        host = urllib.parse.urlsplit(url).hostname
        raise DownloadError(f"`{host}` cannot be reached from this machine", hint="check the network or the proxy")


def read_address(url: str, *, headers: Mapping[str, str] | None = None, patience_s: float = PATIENCE_S) -> Any:
    """Return the JSON value at an address.

    Raises:
        DownloadError: Refused, broken off, too large or no JSON.
    """
    try:
        with _open(url, headers or {}, patience_s) as answer:
            data = answer.read(MAX_JSON_BYTES + 1)
            if len(data) > MAX_JSON_BYTES:
                raise DownloadError(f"the answer for `{_file_name(url)}` is too large")
            return json.loads(data)
    except urllib.error.HTTPError as error:
        error.close()
        raise _refused(url, error) from error
    except (RecursionError, OSError, *_BROKEN) as error:
        raise DownloadError(f"`{urllib.parse.urlsplit(url).hostname}` gives no usable answer") from error


def download(
    url: str,
    target: Path,
    *,
    sha256: str = "",
    git_sha1: str = "",
    size: int | None = None,
    headers: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    patience_s: float = PATIENCE_S,
) -> str:
    """Fetch a file and return its SHA-256; ``target`` appears only when all of it is there and right.

    What came so far lies in ``TARGET.part`` and is continued, by this call and by later ones: where a hash is known, in
    any case; where none is, only if the server says that the file is still the same.

    Args:
        url: Address; https, or http where the reader of the file can verify it.
        target: The file to write; its folder is created.
        sha256: Hexadecimal; empty: unknown.
        git_sha1: Hash of git's blob, as the Hugging Face hub states it for small files; empty: unknown.
        size: In bytes; None: unknown.
        headers: Sent with the request (a token, say), never on to another host.
        progress: A stage per file, in MB.
        patience_s: Seconds without a byte before trying again.

    Raises:
        DownloadError: Refused, broken off, or not what the hash says; what came of a broken download is kept.
        CheckpointError: The disk is full.
    """
    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    bar = progress or SilentProgress()
    known = bool(sha256 or git_sha1)
    failures, restarted = 0, False
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _transfer(url, part, known, size, headers or {}, bar, patience_s)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416 and before and not restarted:  # the piece is longer than the file, or its whole
                restarted = True
                if not (known and _is_right(part, sha256, git_sha1)):
                    _forget(part)
                    continue
            elif error.code >= 500 and failures + 1 < ATTEMPTS:
                failures += 1
                time.sleep(0.5 * failures)
                continue
            else:
                raise _refused(url, error) from error
        except _BROKEN as error:
            now = part.stat().st_size if part.exists() else 0
            failures = 0 if now > before else failures + 1
            if failures >= ATTEMPTS:
                raise DownloadError(
                    f"the download of `{target.name}` broke off after {now / 1e6:.1f} MB, which are kept",
                    hint="run the same command again to go on from there",
                ) from error
            time.sleep(0.2 * failures)
            continue
        finally:
            bar.finish()
        if not known or _is_right(part, sha256, git_sha1):
            break
        _forget(part)
        if before and not restarted:  # the piece from before may have been of another file
            restarted = True
            continue
        raise DownloadError(
            f"`{target.name}` is not the file that was published: its checksum differs",
            hint="nothing was kept; try again, and do not use the file from elsewhere",
        )
    found = _hash(part)
    part.replace(target)
    _forget(part)
    return found


def _transfer(
    url: str,
    part: Path,
    known: bool,
    size: int | None,
    headers: Mapping[str, str],
    bar: Progress,
    patience_s: float,
) -> None:
    """Add to the piece what is missing."""
    start = part.stat().st_size if part.exists() else 0
    stamp = _stamp_of(part)
    asked = dict(headers)
    if start and size is not None and start == size:
        return
    if start and (known or stamp):
        asked["Range"] = f"bytes={start}-"
        if not known:
            asked["If-Range"] = stamp
    with _open(url, asked, patience_s) as answer:
        if answer.headers.get_content_type() == "text/html" and not known:
            raise DownloadError(f"`{_file_name(url)}` is a web page, not a file", hint="fetch it by hand in a browser")
        goes_on = answer.status == 206 and _begins_at(answer.headers.get("Content-Range"), start)
        start = start if goes_on else 0
        length = answer.headers.get("Content-Length", "")
        total = start + int(length) if length.isdigit() else size
        _check_space(part, (total or 0) - start)
        etag = answer.headers.get("ETag", "")
        if not known and etag.startswith('"'):
            part.with_name(part.name + ".etag").write_text(etag, encoding="latin-1")
        bar.start(None if total is None else round(total / 1e6), part.name.removesuffix(".part"))
        shown = round(start / 1e6)
        bar.advance(shown)
        with part.open("r+b" if goes_on else "wb") as file:
            file.seek(start)
            while piece := answer.read(PIECE_BYTES):
                _write(file, piece, part)
                megabytes = round(file.tell() / 1e6)
                bar.advance(megabytes - shown)
                shown = megabytes
            file.truncate()
            if total is not None and file.tell() != total:
                raise ConnectionError("the connection closed early")


def _write(file: IO[bytes], piece: bytes, part: Path) -> None:
    try:
        file.write(piece)
        file.flush()
    except OSError as error:
        raise CheckpointError(
            f"`{part.name}` cannot be written: {error.strerror or type(error).__name__}",
            hint="free some space, or set CHIASM_HOME to another disk; what came so far is kept",
        ) from error


def _check_space(part: Path, needed: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if needed > free:
        raise CheckpointError(
            f"`{part.name.removesuffix('.part')}` needs {needed / 1e6:,.0f} MB, but {free / 1e6:,.0f} MB are free",
            hint="free some space, or set CHIASM_HOME to another disk",
        )


def _begins_at(stated: str | None, start: int) -> bool:
    return stated is not None and stated.startswith(f"bytes {start}-")


def _stamp_of(part: Path) -> str:
    try:
        return part.with_name(part.name + ".etag").read_text(encoding="latin-1")
    except OSError:
        return ""


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    part.with_name(part.name + ".etag").unlink(missing_ok=True)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_right(path: Path, sha256: str, git_sha1: str) -> bool:
    if sha256:
        return _hash(path) == sha256.lower()
    blob = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            blob.update(piece)
    return blob.hexdigest() == git_sha1.lower()
