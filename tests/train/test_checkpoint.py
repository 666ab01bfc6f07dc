from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from chiasm.errors import CheckpointError, TrainingError
from chiasm.train.checkpoint import (
    Position,
    load_checkpoint,
    locked_digest,
    read_position,
    save_checkpoint,
    trained_state,
    write_safetensors,
)
from chiasm.train.optim import make_optimizer
from chiasm.train.recipe import OptimConfig


def stepped(model, steps=2):
    optimizer = make_optimizer(model, OptimConfig(lr=1e-2))
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        optimizer.step()
    return optimizer


def test_saving_and_loading_is_the_identity(tiny, tmp_path):
    model = tiny(bias=-10.0)
    optimizer = stepped(model)
    position = Position(
        step=7, seed=3, config="abc", best=0.5, best_step=4, best_metrics={"loss": 1.0}, last={"loss": 2.0}
    )
    path = tmp_path / "deep" / "last.safetensors"
    save_checkpoint(path, model, optimizer=optimizer, position=position)
    other = tiny(seed=5, bias=-10.0)
    fresh = make_optimizer(other, OptimConfig(lr=1e-2))
    assert load_checkpoint(path, other, optimizer=fresh) == position == read_position(path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    old, new = optimizer.state_dict()["state"], fresh.state_dict()["state"]
    assert old.keys() == new.keys()
    assert all(torch.equal(old[i][slot], new[i][slot]) for i in old for slot in old[i])
    assert [p.name for p in path.parent.iterdir()] == ["last.safetensors"]


def test_locked_weights_are_recognised_not_stored(tiny, tmp_path):
    model = tiny()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("proj" in name)
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, model, position=Position())
    assert set(trained_state(model)) == {"visual.proj", "text_projection"} or "visual.proj" in trained_state(model)
    assert all("conv1" not in n for n in load_file(path))
    load_checkpoint(path, model)
    with torch.no_grad():
        model.visual.conv1.weight[0, 0, 0, 0] += 1
    with pytest.raises(CheckpointError, match="other locked weights"):
        load_checkpoint(path, model)
    assert locked_digest(tiny()) == ""


def test_a_checkpoint_of_another_model_changes_nothing(tiny, tmp_path):
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, tiny(bias=-10.0), position=Position())
    model = tiny(seed=1)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="has the foreign tensor `logit_bias`"):
        load_checkpoint(path, model)
    save_checkpoint(path, model, position=Position())
    with pytest.raises(CheckpointError, match="lacks `logit_bias`"):
        load_checkpoint(path, tiny(bias=-10.0))
    tensors = load_file(path)
    tensors["model/visual.proj"] = torch.zeros(3, 3)
    write_safetensors(path, tensors, {"format": "chiasm-training-1", "position": {}})
    with pytest.raises(CheckpointError, match="another shape"):
        load_checkpoint(path, model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_hostile_files(tiny, tmp_path):
    path = tmp_path / "last.safetensors"
    with pytest.raises(CheckpointError, match="no checkpoint"):
        read_position(path)
    save_checkpoint(path, tiny(), position=Position())
    whole = path.read_bytes()
    for bad in (b"", b"\x00" * 64, whole[: len(whole) // 2], b"\xff" * 8 + whole[8:]):
        path.write_bytes(bad)
        with pytest.raises(CheckpointError):
            load_checkpoint(path, tiny())
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="not a training checkpoint"):
        read_position(path)
    save_file({"a": torch.zeros(2)}, path, {"chiasm": "[1"})
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_position(path)
    for position in ([1], {"step": 1, "nested": {}}, None):
        write_safetensors(path, {"a": torch.zeros(2)}, {"format": "chiasm-training-1", "position": position})
        if isinstance(position, dict):
            assert read_position(path).step == 1, "fields of a later version are ignored"
            continue
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_position(path)


def test_tied_weights_and_leftovers(tiny, tmp_path):
    model = tiny()
    model.twin = model.visual.proj
    path = tmp_path / "last.safetensors"
    torn = tmp_path / ".last.safetensors.abc.part"
    torn.write_bytes(b"torn")
    save_checkpoint(path, model, position=Position())
    assert not torn.exists()
    load_checkpoint(path, model)


FULL_DISK = """
import resource, sys, json, torch
from chiasm.errors import TrainingError
from chiasm.train.checkpoint import Position, save_checkpoint
path = sys.argv[1]
small, large = torch.nn.Linear(4, 4), torch.nn.Linear(400, 400)
save_checkpoint(path, small, position=Position(step=1))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_checkpoint(path, large, position=Position(step=2))
except TrainingError as error:
    print(json.dumps([error.message, error.hint]))
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on file sizes")
def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path):
    path = tmp_path / "last.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True, timeout=120
    )
    message, hint = json.loads(done.stdout)
    assert "last.safetensors" in message
    assert "kept" in message
    assert str(tmp_path) not in message
    assert "--resume" in hint
    assert read_position(path).step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.safetensors"]


def test_a_folder_that_cannot_be_made_is_a_training_error(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot be written"):
        save_checkpoint(tmp_path / "file" / "last.safetensors", tiny(), position=Position())
