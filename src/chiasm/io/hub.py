"""The Hugging Face hub's interface, as far as fetching a model needs it: what lies in a repository, and where.

In: a repository and a revision. Out: its commit and its files with the sizes and hashes that the hub states. A token of
the user's is sent only to the hub, and only where it refuses without.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from chiasm.io.download import DownloadError, read_address

COMMIT = re.compile(r"[0-9a-f]{40}")


def endpoint() -> str:
    """Return the hub's address: ``HF_ENDPOINT``, else the official one."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def file_address(repository: str, commit: str, name: str) -> str:
    """Return the address of a file."""
    return f"{endpoint()}/{repository}/resolve/{commit}/{quote(name)}"


def read_listing(repository: str, revision: str) -> tuple[str, dict[str, dict[str, Any]], dict[str, str]]:
    """Return the commit of a revision, its files, and the headers that it takes to fetch them.

    The files map name -> what is known (``size``, and ``sha256`` or ``git_sha1``: arguments of ``download``); names
    that would leave the folder are dropped.

    Raises:
        DownloadError: Refused, out of reach, or an answer that names no commit.
    """
    url = f"{endpoint()}/api/models/{repository}/revision/{quote(revision, safe='')}?blobs=true"
    headers: dict[str, str] = {}
    try:
        value = read_address(url)
    except DownloadError as error:
        token = _token()
        if error.status not in (401, 403, 404) or not token:
            raise
        headers = {"Authorization": f"Bearer {token}"}
        value = read_address(url, headers=headers)
    if not isinstance(value, dict):
        raise DownloadError(f"the hub gives no usable answer for `{repository}`")
    if value.get("gated") and not headers and (token := _token()):  # its list is open, its files are not
        headers = {"Authorization": f"Bearer {token}"}
    commit = value.get("sha")
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise DownloadError(f"the hub's answer for `{repository}` names no commit")
    return commit, _sizes(value), headers


def _sizes(listing: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    siblings = listing.get("siblings")
    for item in siblings if isinstance(siblings, list) else []:
        name = item.get("rfilename") if isinstance(item, dict) else None
        if not isinstance(name, str) or not _is_inside(name):
            continue
        known: dict[str, Any] = {}
        large = item.get("lfs") if isinstance(item.get("lfs"), dict) else {}
        size = large.get("size", item.get("size"))
        if isinstance(size, int) and size >= 0:
            known["size"] = size
        if isinstance(large.get("sha256"), str):
            known["sha256"] = large["sha256"]
        elif isinstance(item.get("blobId"), str) and not large:
            known["git_sha1"] = item["blobId"]
        found[name] = known
    return found


def _is_inside(name: str) -> bool:
    parts = name.replace("\\", "/").split("/")
    return all(p not in ("", ".", "..") and ":" not in p and "\0" not in p for p in parts) and "\\" not in name


def _token() -> str:
    """The user's token for the hub, from where the hub's own client keeps it; sent to the hub alone."""
    stated = os.environ.get("HF_TOKEN") or ""
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    if not stated:
        with contextlib.suppress(OSError, UnicodeError):
            stated = Path(os.environ.get("HF_TOKEN_PATH") or home / "token").read_text(encoding="ascii")
    stated = stated.strip()
    return stated if re.fullmatch(r"[!-~]+", stated) else ""
