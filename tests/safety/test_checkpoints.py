"""Hostile and damaged weight files: only ``CheckpointError``, and nothing in the file is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import subprocess
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from chiasm.checkpoints import huggingface, open_clip
from chiasm.checkpoints.containers import read_state_dict
from chiasm.checkpoints.pickle_reader import Inert, read_pickle
from chiasm.errors import CheckpointError


class Attack:
    """Pickles into a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def attacks(marker: Path) -> dict[str, object]:
    return {
        "os.system": Attack(os.system, f"touch {marker}"),
        "eval": Attack(eval, f"open({str(marker)!r}, 'w')"),
        "exec": Attack(exec, f"open({str(marker)!r}, 'w')"),
        "open": Attack(open, str(marker), "w"),
        "popen": Attack(subprocess.Popen, ["touch", str(marker)]),
        "mkdir": Attack(Path.mkdir, marker),
        "import": Attack(__import__, "antigravity"),
        "jit": Attack(torch.jit.load, str(marker)),
        "nested": {"a": [Attack(os.system, f"touch {marker}")]},
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", sorted(attacks(Path("x"))))
def test_malicious_pickles_do_nothing(tmp_path: Path, name: str, legacy: bool) -> None:
    marker, path = tmp_path / "marker", tmp_path / "a.pt"
    attack = attacks(marker)[name]
    torch.save({"state_dict": {"w": torch.ones(2)}, "x": attack}, path, _use_new_zipfile_serialization=not legacy)
    assert torch.equal(read_state_dict(path).tensors["w"], torch.ones(2))  # the weights are there, the call is not
    torch.save(attack, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError):
        read_state_dict(path)
    assert not marker.exists()


def test_the_call_would_really_have_happened(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(attacks(marker)["os.system"]))
    assert marker.exists()
    value = read_pickle(io.BytesIO(pickle.dumps(attacks(marker)["os.system"])))
    assert isinstance(value, Inert)
    assert value.kind.endswith(".system")


def archive(path: Path, data_pkl: bytes, records: dict[str, bytes] | None = None, *, compress: int = 0) -> Path:
    """A hand-made archive in the layout of ``torch.save``."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as file:
        file.writestr("a/data.pkl", data_pkl)
        file.writestr("a/version", b"3\n")
        for name, data in (records or {}).items():
            file.writestr(f"a/{name}", data)
    return path


class Storage:
    """Pickles as a storage's persistent id."""

    def __init__(self, numel: Any, key: Any = "0", kind: Any = torch.FloatStorage) -> None:
        self.identity = ("storage", kind, key, "cpu", numel)


class StoragePickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> object:
        return obj.identity if isinstance(obj, Storage) else None


def tensor_pickle(storage: Any, offset: Any, shape: Any, stride: Any) -> bytes:
    out = io.BytesIO()
    tensor = Attack(torch._utils._rebuild_tensor_v2, storage, offset, shape, stride, False, {})
    StoragePickler(out, protocol=2).dump({"w": tensor})
    return out.getvalue()


FOUR = {"data/0": bytes(16)}


def test_the_hand_made_archive_itself_is_good(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pt", tensor_pickle(Storage(4), 0, (2, 2), (2, 1)), FOUR)
    assert read_state_dict(path).tensors["w"].shape == (2, 2)


@pytest.mark.parametrize(
    ("description", "records", "message"),
    [
        ((Storage(4), 0, (2**40,), (1,)), FOUR, "its storage has 4"),
        ((Storage(2**60), 0, (2**60,), (1,)), FOUR, "times its size"),
        ((Storage(5), 0, (5,), (1,)), FOUR, "more elements than the file holds"),
        ((Storage(4), 0, (10**9,), (0,)), FOUR, "its storage has 4"),
        ((Storage(4), 3, (2,), (1,)), FOUR, "its storage has 4"),
        ((Storage(4), -1, (2,), (1,)), FOUR, "impossible offset"),
        ((Storage(4), 0, (-2, -2), (1, 1)), FOUR, "impossible shape"),
        ((Storage(4), 0, (2, 2), (-1, 1)), FOUR, "impossible stride"),
        ((Storage(4), 0, (2,), (2**62,)), FOUR, "its storage has 4"),
        ((Storage(4), 0, (2, 2), (1,)), FOUR, "2 dimensions and 1 strides"),
        ((Storage(4), 0, (1,) * 40, (1,) * 40), FOUR, "40 dimensions"),
        ((Storage(4), 0, (2.5,), (1,)), FOUR, "impossible shape"),
        ((Storage(4), True, (2,), (1,)), FOUR, "impossible offset"),
        ((Storage(4), 0, "ab", (1, 1)), FOUR, "wrong type"),
        (("storage", 0, (2,), (1,)), FOUR, "wrong type"),
        ((Storage(-4), 0, (2,), (1,)), FOUR, "impossible number"),
        ((Storage("4"), 0, (2,), (1,)), FOUR, "not a storage"),
        ((Storage(4, "../../etc/passwd"), 0, (2,), (1,)), FOUR, "lacks the record"),
        ((Storage(4, "7"), 0, (2,), (1,)), FOUR, "lacks the record"),
        ((Storage(4, kind=os.system), 0, (2,), (1,)), FOUR, "element type system"),
        ((Storage(4), 0, (2,), (1,)), {}, "lacks the record"),
        ((Storage(4), 0, (2,), (1,)), FOUR | {"byteorder": b"big"}, "big-endian"),
    ],
)  # fmt: skip
def test_absurd_tensors_are_refused_before_allocation(
    tmp_path: Path, description: tuple[Any, ...], records: dict[str, bytes], message: str
) -> None:
    path = archive(tmp_path / "a.pt", tensor_pickle(*description), records)
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(path)


def test_one_storage_under_a_thousand_names_is_refused(tmp_path: Path) -> None:
    big = torch.zeros(10_000)
    torch.save({f"w{i}": big for i in range(1000)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="claim more than"):
        read_state_dict(tmp_path / "a.pt")


def test_zip_bombs_and_path_tricks(tmp_path: Path) -> None:
    good = tensor_pickle(Storage(4), 0, (2, 2), (2, 1))
    bomb = archive(tmp_path / "bomb.pt", good, {"data/0": bytes(50_000_000)}, compress=1)
    assert bomb.stat().st_size < 100_000
    with pytest.raises(CheckpointError, match="compressed"):
        read_state_dict(bomb)
    outside = tmp_path / "victim"
    archive(tmp_path / "path.pt", good, FOUR | {"../../victim": b"x", "/etc/cron.d/x": b"x"})
    with pytest.raises(CheckpointError, match="leaves the archive"):
        read_state_dict(tmp_path / "path.pt")
    assert not outside.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(tmp_path / "twice.pt", "w") as file:
            for _ in range(2):
                file.writestr("a/data.pkl", good)
    with pytest.raises(CheckpointError, match="two records of one name"):
        read_state_dict(tmp_path / "twice.pt")
    with zipfile.ZipFile(tmp_path / "two.pt", "w") as file:
        file.writestr("a/data.pkl", good)
        file.writestr("b/data.pkl", good)
    with pytest.raises(CheckpointError, match="not one that PyTorch wrote"):
        read_state_dict(tmp_path / "two.pt")


def test_damaged_weights_are_noticed(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1000)}, tmp_path / "a.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    start = data.find(struct.pack("<f", 1.0) * 8)
    data[start + 100] ^= 0x40
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        read_state_dict(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "stream",
    [
        b"\x80\x02r\xff\xff\xff\xff.",  # a memo index that makes CPython's unpickler allocate 64 GB
        b"\x80\x02Nr\xff\xff\xff\xff.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"\x80\x02cos\nsystem\n(S'true'\ntR.",
        b"(ios\nsystem\n.",
        b"\x80\x02(((((((((.",
        b"\x80\x02\x81.",
        b"\x80\x02h\x05.",
        b"\x80\x02Q.",
        b"\x80\x02)Q.",
        b"\x80\x02\x82\x01.",  # extension registry
        b"\x80\x05\x97.",  # out-of-band buffer
        b"\x80\x02}(K\x01K\x02K\x03u.",
        b"\x80\x02X\xff\xff\xff\x7fab.",
        b"\x80\x02\x8a\xffab.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x02cos\n",
        b"\x80\x02ccollections\nOrderedDict\nK\x01R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"I99999999999999999999999999999999999999999x\n.",
        b"",
        b".",
    ],
)
def test_pickle_streams_never_escape(stream: bytes) -> None:
    try:
        value = read_pickle(io.BytesIO(stream))
    except CheckpointError:
        return
    assert not callable(value)


def test_deep_and_shared_structures_cost_no_more_than_their_size(tmp_path: Path) -> None:
    deep = read_pickle(io.BytesIO(b"\x80\x02N" + b"\x85" * 200_000 + b"."))
    assert isinstance(deep, tuple)
    del deep
    path = archive(tmp_path / "a.pt", b"\x80\x02}N" + b"\x85" * 200_000 + b"Ns.", FOUR)
    with pytest.raises(CheckpointError, match="no tensors"):  # hashing a nested tuple would exhaust the C stack
        read_state_dict(path)
    doubled = b"\x80\x02]" + b"2\x86" * 60 + b"."  # a pair of the same pair of the same ...: 2**60 leaves
    assert isinstance(read_pickle(io.BytesIO(doubled)), tuple)
    module = b"c__torch__\nM\n)\x81"
    shared = b"\x80\x02" + module + b"q\x00"
    for i in range(50):  # modules that each hold the one before twice
        one = b"X\x01\x00\x00\x00ah" + bytes([i]) + b"X\x01\x00\x00\x00bh" + bytes([i])
        shared += module + b"}(" + one + b"ubq" + bytes([i + 1])
    path = archive(tmp_path / "script.pt", shared + b".", {"constants.pkl": b"\x80\x02)."})
    with pytest.raises(CheckpointError, match="too many parts"):
        read_state_dict(path)


def test_hostile_safetensors(tmp_path: Path) -> None:
    def write(header: object, data: bytes = b"") -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
        return tmp_path / "a.safetensors"

    for header, data in (
        ({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 16]}}, bytes(16)),
        ({"w": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 16]}}, bytes(16)),
        ({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**60]}}, bytes(16)),
        ({"w": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}, bytes(16)),
        ({"w": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, bytes(16)),
        ({"w": {"dtype": "OBJ", "shape": [4], "data_offsets": [0, 16]}}, bytes(16)),
        ({"w": {"dtype": "F32", "shape": [4]}}, bytes(16)),
        ({"w": "x"}, bytes(16)),
        (b'{"w": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 16]}}', bytes(16)),
        (b'{"a":' * 2000 + b"1" + b"}" * 2000, b""),
    ):
        with pytest.raises(CheckpointError):
            read_state_dict(write(header, data))


#: Number of damaged copies of each container: 2,500 in all.
CASES = {"zip": 500, "legacy": 500, "safetensors": 400, "script": 400, "lightning": 300, "zipped": 400}


def valid_files(folder: Path) -> dict[str, bytes]:
    torch.manual_seed(0)
    state = {"visual.w": torch.randn(4, 4), "half": torch.randn(3).half(), "n": torch.tensor(3)}
    torch.save({"epoch": 1, "state_dict": state}, folder / "zip")
    torch.save(state, folder / "legacy", _use_new_zipfile_serialization=False)
    save_file(state, folder / "safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2).eval(), torch.ones(1, 2)), folder / "script")
    callbacks = {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5), "best_model_path": Path("a.ckpt")}}
    lightning = {"epoch": 3, "global_step": 9, "pytorch-lightning_version": "1.1.4", "callbacks": callbacks,
                 "hyper_parameters": Hyper(lr=5e-5), "state_dict": {f"gloria.{k}": v for k, v in state.items()}}  # fmt: skip
    torch.save(lightning, folder / "lightning")
    with zipfile.ZipFile(folder / "zipped", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / "zip", "pytorch_model.bin")
    return {name: (folder / name).read_bytes() for name in CASES}


class Hyper(dict[str, float]):
    """A class of the training program, as Lightning checkpoints carry them."""


def damage(data: bytearray, rng: random.Random) -> bytearray:
    """Cut the end off, flip bits, overwrite a piece or move one in."""
    match rng.randrange(4) if data else -1:
        case 0:
            del data[rng.randrange(len(data)) :]
        case 1:
            for _ in range(rng.choice((1, 3, 20))):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 2:
            start, size = rng.randrange(len(data)), rng.randrange(1, 40)
            data[start : start + size] = rng.randbytes(size)
        case 3:
            start, size, to = rng.randrange(len(data)), rng.randrange(1, 60), rng.randrange(len(data))
            data[to:to] = data[start : start + size]
    return data


@pytest.mark.parametrize("kind", sorted(CASES))
def test_fuzz_damaged_copies_of_valid_files(tmp_path: Path, kind: str) -> None:
    """Truncation, bit flips, overwritten and moved pieces, with fixed seeds."""
    original = valid_files(tmp_path)[kind]
    path = tmp_path / "fuzzed"
    path.write_bytes(original)
    assert read_state_dict(path).tensors
    outcomes = {"read": 0, "refused": 0}
    for seed in range(CASES[kind]):
        path.write_bytes(damage(bytearray(original), random.Random(f"{kind} {seed}")))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # zipfile warns of duplicate names, say
                for tensor in read_state_dict(path).tensors.values():
                    tensor.double().sum()
            outcomes["read"] += 1
        except CheckpointError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > CASES[kind] / 5, outcomes


def valid_folders(folder: Path) -> dict[str, Callable[[Path], object]]:
    """Write one folder of each kind, with a CLIP of the smallest width; return who reads which."""
    torch.manual_seed(0)
    names = ("text_projection", "visual.proj", "visual.conv1.weight", "positional_embedding", "token_embedding.weight")
    state = {n: torch.randn(s).half() for n, s in zip(names, [(4, 4), (4, 4), (4, 3, 2, 2), (8, 4), (49408, 4)],
                                                        strict=True)}  # fmt: skip
    state["visual.positional_embedding"] = torch.randn(5, 4).half()
    for prefix in ("", "visual."):
        state[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"] = torch.randn(16, 4).half()
    theirs = huggingface.to_huggingface(state)
    half = len(theirs) // 2
    parts = [dict(list(theirs.items())[:half]), dict(list(theirs.items())[half:])]
    tower = {"num_attention_heads": 1, "hidden_act": "quick_gelu"}
    for kind, ending in (("sharded safetensors", "model.safetensors"), ("sharded bin", "pytorch_model.bin")):
        (folder / kind).mkdir()
        shards = [f"{ending.split('.')[0]}-0000{i}-of-00002.{ending.split('.')[1]}" for i in (1, 2)]
        for part, name in zip(parts, shards, strict=True):
            (save_file if "safe" in kind else torch.save)(part, folder / kind / name)
        listed = {k: name for part, name in zip(parts, shards, strict=True) for k in part}
        config = {"model_type": "clip", "vision_config": tower, "text_config": tower}
        for name, value in (("config.json", config), (f"{ending}.index.json", {"weight_map": listed})):
            (folder / kind / name).write_text(json.dumps(value))
    (folder / "open_clip").mkdir()
    save_file(state, folder / "open_clip" / "open_clip_model.safetensors")
    model = {"embed_dim": 4, "quick_gelu": True, "vision_cfg": {"image_size": 4, "head_width": 4, "patch_size": 2},
             "text_cfg": {"heads": 1}}  # fmt: skip
    stated = {"model_cfg": model, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}
    (folder / "open_clip" / "open_clip_config.json").write_text(json.dumps(stated))
    hf = huggingface.read_model_dir
    return {"sharded safetensors": hf, "sharded bin": hf, "open_clip": open_clip.read_model_dir}


@pytest.mark.parametrize("kind", ["sharded safetensors", "sharded bin", "open_clip"])
def test_fuzz_damaged_copies_of_valid_folders(tmp_path: Path, kind: str) -> None:
    """One file of a folder is damaged, mostly in its first or last kilobytes, where the structure lies."""
    read = valid_folders(tmp_path)[kind]
    folder = tmp_path / kind
    files = sorted(p for p in folder.iterdir() if p.is_file())
    originals = {p: p.read_bytes() for p in files}
    assert read(folder)
    refused = 0
    for seed in range(200):
        rng = random.Random(f"{kind} {seed}")
        path = files[seed % len(files)]
        data = originals[path]
        head, tail = bytearray(data[:3000]), bytearray(data[max(3000, len(data) - 2000) :])
        middle = data[3000 : len(data) - len(tail)]
        head, tail = (damage(head, rng), tail) if rng.random() < 0.6 or not tail else (head, damage(tail, rng))
        path.write_bytes(bytes(head) + middle + bytes(tail))
        try:
            read(folder)
        except CheckpointError:
            refused += 1
        path.write_bytes(data)
    assert refused > 50


def test_fuzz_random_bytes(tmp_path: Path) -> None:
    path = tmp_path / "random"
    starts = (b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"\x10" + bytes(7) + b"{")
    for seed in range(500):
        rng = random.Random(seed)
        path.write_bytes(starts[seed % len(starts)] + rng.randbytes(rng.randrange(300)))
        with pytest.raises(CheckpointError):
            read_state_dict(path)
