"""Weight files made to do harm: each is refused, runs nothing, writes nothing and changes nothing beside it."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from chiasm.checkpoints import huggingface
from chiasm.checkpoints.containers import read_state_dict
from chiasm.checkpoints.layout import Layout
from chiasm.checkpoints.layouts import read_parts
from chiasm.errors import CheckpointError
from chiasm.load import load


class Call:
    """Pickles into a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: object = None) -> None:
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


def zipped(path: Path, records: dict[str, bytes], *, method: int = zipfile.ZIP_STORED) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, data in records.items():
                archive.writestr(name, data)
    return path


def in_torch_zip(path: Path, pickled: bytes, **records: bytes) -> Path:
    return zipped(path, {"a/data.pkl": pickled, "a/version": b"3\n", **{f"a/{k}": v for k, v in records.items()}})


def good_pickle() -> bytes:
    """The pickle of one tensor of four numbers in the storage `0`."""
    file = io.BytesIO()
    torch.save({"w": torch.ones(4)}, file)
    with zipfile.ZipFile(file) as archive:
        return archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))


def reduce_system(path: Path, canary: Path) -> None:
    in_torch_zip(path, pickle.dumps(Call(os.system, f"touch {canary}"), protocol=2))


def global_eval(path: Path, canary: Path) -> None:
    code = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    in_torch_zip(path, b"\x80\x02cbuiltins\neval\n" + pickle.dumps((code,), protocol=2)[2:-1] + b"R.")


def build_state(path: Path, canary: Path) -> None:
    """BUILD calls ``__setstate__`` of what GLOBAL named; here a class that would write on being restored."""
    body = pickle.dumps({"canary": str(canary)}, protocol=2)[2:-1]
    in_torch_zip(path, b"\x80\x02cpathlib\nPath\n)\x81" + body + b"b.")


def stack_global(path: Path, canary: Path) -> None:
    """Module and name are put together on the stack, so that a search for `os.system` finds nothing."""
    words = [pickle.dumps(w, protocol=4)[2:-1] for w in ("posix", "system")]
    argument = pickle.dumps((f"touch {canary}",), protocol=4)[2:-1]
    in_torch_zip(path, b"\x80\x04" + words[0] + words[1] + b"\x93" + argument + b"R.")


def instance(path: Path, canary: Path) -> None:
    in_torch_zip(path, b"(S'touch " + str(canary).encode() + b"'\nios\nsystem\n.")


def tensor_by_call(path: Path, canary: Path) -> None:
    """The storage of a tensor is what a call returns."""
    call = Call(os.system, f"touch {canary}")
    tensor = Call(torch._utils._rebuild_tensor_v2, call, 0, (2,), (1,), False, {})
    in_torch_zip(path, pickle.dumps({"w": tensor}, protocol=2))


def legacy_pickle(path: Path, canary: Path) -> None:
    path.write_bytes(pickle.dumps(Call(os.system, f"touch {canary}"), protocol=2))


def legacy_torch(path: Path, canary: Path) -> None:
    torch.save(Call(exec, f"open({str(canary)!r},'w')"), path, _use_new_zipfile_serialization=False)


def legacy_tar(path: Path, canary: Path) -> None:
    """The format of PyTorch 0.1: a tar with pickles, here with a member that wants to leave the folder."""
    with tarfile.open(path, "w") as tar:
        for name in ("pickle", f"../../{canary.name}"):
            data = pickle.dumps(Call(os.system, f"touch {canary}"), protocol=2)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def script_with_code(path: Path, canary: Path) -> None:
    """A TorchScript archive whose value is a call and whose code would be run by the reader of torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.ReLU(), torch.ones(1)), path)
    with zipfile.ZipFile(path) as archive:
        records = {n: archive.read(n) for n in archive.namelist()}
    for name in records:
        if name.endswith("data.pkl"):
            records[name] = pickle.dumps(Call(os.system, f"touch {canary}"), protocol=2)
        if name.endswith(".py"):
            records[name] = f"import os\nos.system('touch {canary}')\n".encode()
    zipped(path, records)


def bomb(path: Path, canary: Path) -> None:
    zipped(path, {"a/data.pkl": good_pickle(), "a/data/0": bytes(30_000_000)}, method=zipfile.ZIP_DEFLATED)


def bomb_around_weights(path: Path, canary: Path) -> None:
    zipped(path, {"pytorch_model.bin": bytes(100_000_000)}, method=zipfile.ZIP_DEFLATED)


def duplicate_names(path: Path, canary: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", good_pickle())
            archive.writestr("a/data/0", bytes(16))
            archive.writestr("a/data/0", b"\xff" * 16)


def absolute_name(path: Path, canary: Path) -> None:
    zipped(path, {"a/data.pkl": good_pickle(), "a/data/0": bytes(16), str(canary): b"x"})


def climbing_name(path: Path, canary: Path) -> None:
    zipped(path, {"a/data.pkl": good_pickle(), "a/data/0": bytes(16), f"a/../../{canary.name}": b"x"})


def climbing_weights(path: Path, canary: Path) -> None:
    zipped(path, {f"../{canary.name}.bin": b"x"})


def windows_name(path: Path, canary: Path) -> None:
    zipped(path, {"..\\..\\evil.bin": b"x"})


def link_record(path: Path, canary: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("pytorch_model.bin")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")


def nested_archives(path: Path, canary: Path) -> None:
    data = b"PK\x05\x06" + bytes(18)
    for _ in range(3):
        data = zipped(path, {"pytorch_model.bin": data}).read_bytes()


def overlapping_records(path: Path, canary: Path) -> None:
    """Two entries of the directory point at one record: the trick of the densest bombs."""
    zipped(path, {"pytorch_model.bin": b"x" * 1000, "pytorch_model_.txt": b"y" * 1000})
    data = bytearray(path.read_bytes())
    second = data.rfind(b"PK\x01\x02")
    data[second + 42 : second + 46] = struct.pack("<I", 7)
    first = data.find(b"PK\x01\x02")
    data[first + 42 : first + 46] = struct.pack("<I", 2**31)
    path.write_bytes(data)


def absurd_shape(path: Path, canary: Path) -> None:
    pickled = good_pickle().replace(b"K\x04\x85", b"\x8a\x06" + (2**40).to_bytes(6, "little") + b"\x85")
    assert pickled != good_pickle()
    in_torch_zip(path, pickled, **{"data/0": bytes(16)})


def truncated(path: Path, canary: Path) -> None:
    torch.save({"w": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-500])


def safetensors(header: object, data: bytes = bytes(16)) -> Callable[[Path, Path], None]:
    def write(path: Path, canary: Path) -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)

    return write


def f32(shape: list[int], *offsets: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": list(offsets)}


def huge_header(path: Path, canary: Path) -> None:
    path.write_bytes((2**62).to_bytes(8, "little") + b'{"w":' + bytes(100))


HOSTILE: dict[str, Callable[[Path, Path], None]] = {
    f.__name__: f
    for f in (reduce_system, global_eval, build_state, stack_global, instance, tensor_by_call, legacy_pickle,
              legacy_torch, legacy_tar, script_with_code, bomb, bomb_around_weights, duplicate_names, absolute_name,
              climbing_name, climbing_weights, windows_name, link_record, nested_archives, overlapping_records,
              absurd_shape, truncated, huge_header)
} | {
    "overlapping_tensors": safetensors({"a": f32([4], 0, 16), "b": f32([4], 0, 16)}),
    "tensors_that_reach_into_each_other": safetensors({"a": f32([3], 0, 12), "b": f32([2], 8, 16)}),
    "negative_offset": safetensors({"a": f32([4], -16, 0)}),
    "offsets_beyond_the_file": safetensors({"a": f32([2**40], 0, 2**42)}),
    "a_hole_in_the_tensors": safetensors({"a": f32([1], 0, 4), "b": f32([1], 12, 16)}),
    "deep_header": safetensors(b"{" + b'"a":{' * 50_000),
}  # fmt: skip


def all_files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_files_are_refused_and_do_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    canary, path = tmp_path / "canary", tmp_path / "models" / "weights.pt"
    HOSTILE[name](path, canary)
    before = all_files(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        read_state_dict(path)
    assert str(tmp_path) not in str(caught.value)  # no message gives away a path
    with pytest.raises(CheckpointError):
        load(path, family="openai")
    assert all_files(tmp_path) == before
    assert not list((tmp_path / "temporary").iterdir())


def test_the_hostile_pickles_are_real(tmp_path: Path) -> None:
    """Python's own reader would have run them: the test would otherwise prove nothing."""
    for make in (reduce_system, global_eval, stack_global, instance):
        canary, path = tmp_path / make.__name__, tmp_path / "a.pt"
        make(path, canary)
        with zipfile.ZipFile(path) as archive:
            pickle.loads(archive.read("a/data.pkl"))
        assert canary.exists(), make.__name__


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "sub/a.safetensors", "", ".", "..", "a\0b"])
def test_an_index_names_only_shards_beside_it(tmp_path: Path, shard: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "sub").mkdir()
    for place in (tmp_path / "outside.safetensors", folder / "sub" / "a.safetensors"):
        torch.save({"w": torch.ones(2)}, place)
    for kind in huggingface.WEIGHT_FILES:
        (folder / f"{kind}.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
        with pytest.raises(CheckpointError):
            huggingface.read_weights(folder)
        (folder / f"{kind}.index.json").unlink()


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"w": 3}}', '{"weight_map": {}}']
)
def test_an_index_without_shards_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError):
        huggingface.read_weights(tmp_path)


def test_parts_of_a_named_model_may_be_sharded(tmp_path: Path) -> None:
    layout = Layout("two", lambda tensors: "w" in tensors, lambda tensors, config: dict(tensors))
    for name in ("w", "v"):
        torch.save({name: torch.ones(2)}, tmp_path / f"{name}.shard")
    listed = {"weight_map": {"w": "w.shard", "v": "v.shard"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(listed))
    assert set(read_parts(tmp_path, layout)) == {"w", "v"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"w": "../w.shard"}}))
    with pytest.raises(CheckpointError, match="outside of its directory"):
        read_parts(tmp_path, layout)


def test_an_archive_around_one_weight_file_is_read(tmp_path: Path) -> None:
    """As MedCLIP's: the weights are the same, and nothing is left in the temporary folder."""
    torch.save({"w": torch.arange(6.0).reshape(2, 3)}, tmp_path / "pytorch_model.bin")
    weights = (tmp_path / "pytorch_model.bin").read_bytes()
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        records = {"medclip/pytorch_model.bin": weights, "__MACOSX/medclip/pytorch_model.bin": b"x", "readme.txt": b"x"}
        zipped(tmp_path / "medclip.zip", records, method=method)
        found = read_state_dict(tmp_path / "medclip.zip")
        assert torch.equal(found.tensors["w"], torch.arange(6.0).reshape(2, 3))
        assert found.container == "torch"
    zipped(tmp_path / "two.zip", {"a.bin": weights, "b.bin": weights})
    with pytest.raises(CheckpointError, match="not one that PyTorch wrote"):
        read_state_dict(tmp_path / "two.zip")
