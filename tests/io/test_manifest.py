from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.errors import FileFormatError, InputError
from chiasm.io.manifest import (
    JsonlWriter,
    Rejected,
    RejectLog,
    disk_errors,
    read_jsonl,
    summarize_rejected,
    to_json,
    write_bytes_atomic,
    write_json_atomic,
)

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(st.text(), values, max_size=3), max_size=6))
def test_lines_come_back_as_written(tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, object]]) -> None:
    path = tmp_path_factory.mktemp("lines") / "a" / "log.jsonl"
    with JsonlWriter(path) as writer:
        for record in records[:3]:
            writer.write(record)
    with JsonlWriter(path) as writer:
        for record in records[3:]:
            writer.write(record)
    assert read_jsonl(path) == records


def test_numpy_and_non_finite_values_become_plain_json() -> None:
    text = to_json({"a": np.float32(0.5), "b": np.arange(3), "c": math.nan, "d": [np.inf], "e": Path("x") / "y"})
    assert json.loads(text) == {"a": 0.5, "b": [0, 1, 2], "c": None, "d": [None], "e": os.path.join("x", "y")}


@pytest.mark.parametrize("torn", [b"{", b'{"a": 1', b'{"a": "\xc3', b'{"b": 2}'])
def test_a_torn_last_line_is_ignored_and_then_cut(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"n": 0}\n{"n": 1}\n' + torn)
    assert read_jsonl(path)[:2] == [{"n": 0}, {"n": 1}]
    with JsonlWriter(path) as writer:
        writer.write({"n": 2})
    assert read_jsonl(path) == [{"n": 0}, {"n": 1}, {"n": 2}]


def test_a_torn_line_longer_than_a_block_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"n": 0}\n{"x": "' + b"a" * 200_000)
    JsonlWriter(path).close()
    assert path.read_bytes() == b'{"n": 0}\n'
    path.write_bytes(b"a" * 200_000)
    JsonlWriter(path).close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize("content", [b"nonsense\n", b"[1]\n{}\n", b'{"a": 1}\n\xff\xfe\n{"b": 1}\n'])
def test_a_bad_line_inside_is_an_error_with_its_number(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=r"line \d of `log.jsonl`"):
        read_jsonl(path)


def test_reading_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_jsonl(tmp_path / "none.jsonl")


def test_lines_of_threads_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with JsonlWriter(path) as writer:

        def work(k: int) -> None:
            for i in range(50):
                writer.write({"thread": k, "i": i, "fill": "x" * 500})

        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    records = read_jsonl(path)
    assert sorted((r["thread"], r["i"]) for r in records) == [(k, i) for k in range(4) for i in range(50)]


def test_writing_after_close_is_refused_and_close_is_idempotent(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "log.jsonl")
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.write({})


def test_an_atomic_file_is_replaced_whole_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "value.json"
    write_json_atomic(path, {"n": 1})
    write_json_atomic(path, {"n": 2})
    assert json.loads(path.read_text()) == {"n": 2}
    with pytest.raises(TypeError):
        write_json_atomic(path, {"n": object()})
    assert json.loads(path.read_text()) == {"n": 2}
    assert [p.name for p in path.parent.iterdir()] == ["value.json"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_file_that_may_not_grow_keeps_the_old_content(tmp_path: Path) -> None:
    """A real failure of the file system: the process may write only 4 kB to a file."""
    code = """
import resource, sys
from pathlib import Path
from chiasm.errors import InputError
from chiasm.io.manifest import JsonlWriter, write_json_atomic
folder = Path(sys.argv[1])
write_json_atomic(folder / "value.json", {"n": 1})
log = JsonlWriter(folder / "log.jsonl")
log.write({"n": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
long = {"n": "x" * 9000}
for action in (lambda: write_json_atomic(folder / "value.json", long), lambda: log.write(long)):
    try:
        action()
    except InputError as error:
        print(error.message, "|", error.hint)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.count("the disk is full") == 2
    assert done.stdout.count("free some space") == 2
    assert json.loads((tmp_path / "value.json").read_text()) == {"n": 1}
    assert read_jsonl(tmp_path / "log.jsonl") == [{"n": 1}]
    assert (tmp_path / "log.jsonl").read_bytes().endswith(b"\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.jsonl", "value.json"]


def test_only_errors_of_the_disk_are_translated(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="disk is full"), disk_errors("the store"):
        raise RuntimeError("lance error: LanceError(IO): No space left on device (os error 28), writer.rs")
    with pytest.raises(InputError, match="may not be written"), disk_errors("the store"):
        raise PermissionError(13, "denied", str(tmp_path))
    with pytest.raises(RuntimeError, match="other"), disk_errors("the store"):
        raise RuntimeError("other")
    with pytest.raises(FileNotFoundError), disk_errors("the store"):
        (tmp_path / "none").read_bytes()


def test_reject_log_counts_and_names_no_row(tmp_path: Path) -> None:
    log = RejectLog([Rejected(9, "patient-7", "text is empty")])
    log.add(2, "patient-3", "image file is missing")
    log.add(1, "patient-5", "text is empty")
    assert [r.row for r in log] == [1, 2, 9]
    assert len(log) == 3
    assert log.counts() == {"text is empty": 2, "image file is missing": 1}
    assert log.summary() == "3 rows rejected: 2 text is empty, 1 image file is missing"
    assert "patient" not in log.summary()
    log.write(tmp_path / "rejected.jsonl")
    assert read_jsonl(tmp_path / "rejected.jsonl")[0] == {"row": 1, "id": "patient-5", "reason": "text is empty"}
    assert summarize_rejected(()) == "no row rejected"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are POSIX")
def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    """As ``--csv /dev/stdout``; whoever may write to /dev would lose the device to a file of that name."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write_bytes_atomic(pipe, b"table")
    reader.join(5)
    assert found == [b"table"]
    assert pipe.is_fifo()
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]
