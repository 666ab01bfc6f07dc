"""Weight files are recognised by content and give exactly what torch and safetensors themselves would give."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from chiasm.checkpoints.containers import read_json, read_state_dict, sniff
from chiasm.errors import CheckpointError

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)


def sample_tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    base = torch.randn(6, 4)
    tensors = {f"t.{i}": (torch.randn(3, 5) * 9).to(d) for i, d in enumerate(DTYPES)}
    return tensors | {
        "base": base,
        "view.T": base.T,  # shares the storage, other strides
        "view.row": base[2],
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "parameter": nn.Parameter(torch.randn(2, 2)),
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor.detach()), name


def test_torch_zip(tmp_path: Path) -> None:
    path = tmp_path / "weights.whatever"  # the ending of a name says nothing
    torch.save(sample_tensors(), path)
    assert sniff(path) == "torch"
    assert_same(read_state_dict(path).tensors, sample_tensors())


def test_torch_legacy(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(OrderedDict(sample_tensors()), path, _use_new_zipfile_serialization=False)
    assert sniff(path) == "torch_legacy"
    assert_same(read_state_dict(path).tensors, sample_tensors())


def test_safetensors(tmp_path: Path) -> None:
    tensors = {k: v.detach().clone().contiguous() for k, v in sample_tensors().items()}
    save_file(tensors, tmp_path / "a.bin", metadata={"format": "pt", "note": "x"})
    state = read_state_dict(tmp_path / "a.bin")
    assert state.container == "safetensors"
    assert state.metadata == {"format": "pt", "note": "x"}
    assert_same(dict(sorted(state.tensors.items())), dict(sorted(tensors.items())))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(tmp_path: Path, protocol: int) -> None:
    tensors = sample_tensors()
    torch.save({"epoch": 3, "state_dict": tensors, "numbers": [1, -5, 2**40, 1.5, None, True, b"x", {1, 2}]},
               tmp_path / "a.pt", pickle_protocol=protocol)  # fmt: skip
    state = read_state_dict(tmp_path / "a.pt")
    assert_same(state.tensors, tensors)
    assert state.metadata == {"epoch": 3}


def test_training_checkpoint_is_unwrapped_and_module_prefix_removed(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    checkpoint = {"epoch": 7, "name": "run", "state_dict": state, "optimizer": optimizer.state_dict()}
    torch.save(checkpoint, tmp_path / "epoch_7.pt")
    found = read_state_dict(tmp_path / "epoch_7.pt")
    assert_same(found.tensors, model.state_dict())
    assert found.metadata == {"epoch": 7, "name": "run"}


def test_objects_of_unknown_classes_stay_inert(tmp_path: Path) -> None:
    class Tracker:
        def __init__(self) -> None:
            self.best = 0.5

    Tracker.__module__, Tracker.__qualname__ = "somewhere.else_", "Tracker"
    import sys
    import types

    module = types.ModuleType("somewhere.else_")
    module.Tracker = Tracker  # type: ignore[attr-defined]
    sys.modules["somewhere"] = types.ModuleType("somewhere")
    sys.modules["somewhere.else_"] = module
    try:
        torch.save({"callbacks": {Tracker: Tracker()}, "state_dict": {"w": torch.ones(2)}}, tmp_path / "lightning.ckpt")
    finally:
        del sys.modules["somewhere.else_"], sys.modules["somewhere"]
    assert_same(read_state_dict(tmp_path / "lightning.ckpt").tensors, {"w": torch.ones(2)})


def test_torchscript_archive_without_running_it(tmp_path: Path) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(3, 3).half()
            self.register_buffer("running", torch.arange(3.0))
            self.register_buffer("input_resolution", torch.tensor(224))

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x.half()).float() + self.running

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = Inner()
            self.blocks = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(self.visual(x)) * self.scale

        def encode(self, x: Tensor) -> Tensor:
            return self.visual(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        example = torch.ones(1, 3)
        script = torch.jit.trace_module(Outer().eval(), {"forward": example, "encode": example})
        torch.jit.save(script, tmp_path / "ViT.pt")
    assert sniff(tmp_path / "ViT.pt") == "torchscript"
    found = read_state_dict(tmp_path / "ViT.pt").tensors
    expected = script.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[k], expected[k]) and found[k].dtype == expected[k].dtype for k in expected)


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(100)}, tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()
    tensor = read_state_dict(tmp_path / "a.pt").tensors["w"]
    tensor.fill_(7)
    assert (tmp_path / "a.pt").read_bytes() == before
    assert read_state_dict(tmp_path / "a.pt").tensors["w"].sum() == 0


def test_tensors_outlive_a_replaced_file(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1000)}, tmp_path / "a.pt")
    tensor = read_state_dict(tmp_path / "a.pt").tensors["w"]
    torch.save({"w": torch.zeros(10)}, tmp_path / "b.pt")
    (tmp_path / "b.pt").replace(tmp_path / "a.pt")
    assert tensor.sum() == 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "a PNG image"),
        (b"\xff\xd8\xff\xe0" + bytes(40), "a JPEG image"),
        (b"<!DOCTYPE html><html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs"),
        (b"\x93NUMPY\x01\x00", "a NumPy array"),
        (b"just some text\n", "no weight file"),
        (b"\x00" * 100, "no weight file"),
        (b"{" * 20, "no weight file"),
        ((10**6).to_bytes(8, "little") + b'{"a": 1}', "truncated safetensors"),
        ((2).to_bytes(8, "little") + b"{}", "no tensors"),
        ((3).to_bytes(8, "little") + b"{]}", "damaged safetensors"),
        (b"\x80\x02}q\x00.", "not one of `torch.save`"),
    ],
)  # fmt: skip
def test_foreign_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(path)


def test_foreign_archives_and_values(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        sniff(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match="is no file"):
        sniff(tmp_path)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="not one that PyTorch wrote"):
        sniff(tmp_path / "a.zip")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds list"):
        read_state_dict(tmp_path / "list.pt")
    torch.save({"a": 1}, tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="no tensors"):
        read_state_dict(tmp_path / "none.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pt")
    with pytest.raises(CheckpointError, match="whole pickled object") as caught:
        read_state_dict(tmp_path / "whole.pt")
    assert "state_dict()" in str(caught.value)
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("x"), io.BytesIO())
    with pytest.raises(CheckpointError, match="tar archive"):
        sniff(tmp_path / "a.tar")


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=4), min_size=1, max_size=5),
    dtype=st.sampled_from(DTYPES),
    legacy=st.booleans(),
    steps=st.integers(1, 3),
)
def test_whatever_torch_saves_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], dtype: torch.dtype, legacy: bool, steps: int
) -> None:
    path = tmp_path_factory.mktemp("roundtrip") / "w.pt"
    tensors = {f"näme.{i}": (torch.randn(*s, 4) * 50).to(dtype)[..., ::steps] for i, s in enumerate(shapes)}
    torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
    assert_same(read_state_dict(path).tensors, tensors)


def test_read_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for content, message in (
        (b"{", "not JSON"),
        (b"[1]", "JSON object"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 10**5, "JSON"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_json(path)
    with pytest.raises(CheckpointError, match=r"lacks `absent\.json`"):
        read_json(tmp_path / "absent.json")
