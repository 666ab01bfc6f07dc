"""The model directory: what is saved is read back, and no accident leaves half a model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from chiasm.checkpoints.native import is_model_dir, read_model_dir, save_model_dir
from chiasm.errors import CheckpointError

CONFIG = {"image": {"kind": "vit"}, "note": [1, 2.5, None, "ä"]}


def state(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    base = torch.randn(8, 4)
    return {"a.weight": base, "tied": base, "slice": base[2:4], "turned": base.T, "scale": torch.tensor(float(seed))}


def test_save_then_load_is_the_identity(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "model"
    assert not is_model_dir(folder)
    save_model_dir(folder, state(1), name="mine", config=CONFIG, training={"steps": 7}, recipe="seed = 1\n")
    assert is_model_dir(folder)
    found = read_model_dir(folder)
    assert (found.name, found.config, found.training) == ("mine", CONFIG, {"steps": 7})
    assert set(found.tensors) == set(state(1))
    assert all(torch.equal(found.tensors[k], v) for k, v in state(1).items())
    assert (folder / "recipe.toml").read_text() == "seed = 1\n"
    assert sorted(p.name for p in folder.iterdir()) == ["encoder.json", "model.safetensors", "recipe.toml"]


def test_replacing_keeps_foreign_files_and_mapped_tensors(tmp_path: Path) -> None:
    save_model_dir(tmp_path, state(1), name="one", config=CONFIG)
    (tmp_path / "notes.txt").write_text("mine")
    old = read_model_dir(tmp_path)
    save_model_dir(tmp_path, state(2), name="two", config=CONFIG)
    assert float(old.tensors["scale"]) == 1
    assert float(read_model_dir(tmp_path).tensors["scale"]) == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    save_model_dir(tmp_path / "m", state(1), name="one", config=CONFIG)
    save_model_dir(tmp_path / "new", state(2), name="two", config=CONFIG)
    # state after the first rename: new weights, old description, new description still under its provisional name
    (tmp_path / "new" / "model.safetensors").replace(tmp_path / "m" / "model.safetensors")
    (tmp_path / "new" / "encoder.json").replace(tmp_path / "m" / "encoder.json.next")
    found = read_model_dir(tmp_path / "m")
    assert (found.name, float(found.tensors["scale"])) == ("two", 2.0)
    (tmp_path / "m" / "encoder.json").unlink()  # the same for the very first model of a directory
    assert is_model_dir(tmp_path / "m")
    assert read_model_dir(tmp_path / "m").name == "two"


def test_a_kill_before_the_renames_leaves_the_old_model(tmp_path: Path) -> None:
    save_model_dir(tmp_path, state(1), name="one", config=CONFIG)
    (tmp_path / "model.safetensors.next").write_bytes(b"half a fi")
    (tmp_path / "encoder.json.next").write_bytes(b"{")
    assert read_model_dir(tmp_path).name == "one"
    save_model_dir(tmp_path, state(2), name="two", config=CONFIG)  # and the leftovers do not disturb the next save
    assert read_model_dir(tmp_path).name == "two"


FULL_DISK = """
import resource, sys, torch
from chiasm.checkpoints.native import save_model_dir
from chiasm.errors import CheckpointError
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # writing more fails, as on a full disk
try:
    save_model_dir(sys.argv[1], {"w": torch.zeros(100_000)}, name="big", config={})
except CheckpointError as error:
    print(error)
else:
    sys.exit("it was written")
"""


def test_a_full_disk_leaves_the_old_model_intact(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_model_dir(folder, state(1), name="one", config=CONFIG)
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cannot be written" in done.stdout
    assert "hint: free some space" in done.stdout
    assert read_model_dir(folder).name == "one"
    assert sorted(p.name for p in folder.iterdir()) == ["encoder.json", "model.safetensors"]


def test_unwritable_places(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_model_dir(tmp_path / "file" / "model", state(1), name="x", config={})


def test_damage_is_refused(tmp_path: Path) -> None:
    def fresh() -> Path:
        return save_model_dir(tmp_path, state(1), name="one", config=CONFIG)

    weights, description = tmp_path / "model.safetensors", tmp_path / "encoder.json"
    fresh()
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged or belongs to another model"):
        read_model_dir(tmp_path)
    fresh()
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"lacks `model\.safetensors`"):
        read_model_dir(tmp_path)
    fresh()
    description.unlink()
    with pytest.raises(CheckpointError, match=r"lacks `encoder\.json`"):
        read_model_dir(tmp_path)
    for change, message in (
        ({"format": "other"}, "no description of a chiasm model"),
        ({"version": 99}, "format version 99"),
        ({"version": None}, "format version None"),
        ({"name": 3}, "lacks the name"),
        ({"config": []}, "lacks the name"),
        ({"training": 1}, "lacks the name"),
        ({"weights": {}}, "lacks the name"),
    ):
        fresh()
        description.write_text(json.dumps(json.loads(description.read_text()) | change))
        with pytest.raises(CheckpointError, match=message):
            read_model_dir(tmp_path)


def test_every_type_and_the_files_rights(tmp_path: Path) -> None:
    types = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)
    tensors = {str(d): torch.ones(5, 3).to(d) for d in types} | {"scalar": torch.tensor(3), "none": torch.zeros(0, 2)}
    save_model_dir(tmp_path, tensors, name="x", config={})
    found = read_model_dir(tmp_path).tensors
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in tensors.items())
    rights = {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()}
    assert len(rights) == 1  # whoever may read the description may read the weights
