"""Names to files: the cache, a stand-in for the hub on this machine, and what is said where there is no network."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import save as serialize

from chiasm import fetch
from chiasm.encoders.catalog import CATALOG, CatalogEntry, WeightSource
from chiasm.errors import CheckpointError, FileFormatError, InputError, UnknownName
from chiasm.fetch import HubAddress, cached, obtain, obtain_address, parse_address
from chiasm.load import create_model_and_transforms, load, save_encoder
from chiasm.testing import TinyEncoder
from chiasm.types import Preprocess

COMMIT, LATER = "a" * 40, "b" * 40


def put_repository(
    site: Any, repository: str, files: dict[str, bytes], *, commit: str = COMMIT, refs: tuple[str, ...] = ("main",)
) -> None:
    """Lay out a repository as the hub's interface shows it: large files with SHA-256, small ones with git's hash."""
    siblings = []
    for name, data in files.items():
        item: dict[str, Any] = {"rfilename": name, "size": len(data)}
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        if name.endswith((".json", ".txt", ".md", "LICENSE")):
            item["blobId"] = blob
        else:
            item |= {"blobId": "0" * 40, "lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}}
        siblings.append(item)
        site.files[f"/{repository}/resolve/{commit}/{name}"] = data
    for ref in (*refs, commit):
        site.put_json(f"/api/models/{repository}/revision/{ref}?blobs=true", {"sha": commit, "siblings": siblings})


def entry(**changes: Any) -> CatalogEntry:
    return replace(CATALOG.get("openai/ViT-B-32"), **{"name": "tiny", "aliases": (), **changes})


def files_under(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_a_file_with_its_checksum(site: Any, tmp_path: Path) -> None:
    site.files["/x/Tiny.pt"] = b"weights"
    digest = hashlib.sha256(b"weights").hexdigest()
    tiny = entry(name="org/tiny", weights=WeightSource("a test", url=f"{site.address}/x/Tiny.pt", sha256=digest))
    path = obtain(tiny)
    assert path == tmp_path / "home" / "models" / "Tiny.pt"
    assert obtain(tiny) == path == cached(tiny)
    assert len(site.asked) == 1
    wrong = replace(
        tiny, name="other", weights=replace(tiny.weights, url=f"{site.address}/x/Other.pt", sha256="0" * 64)
    )
    site.files["/x/Other.pt"] = b"weights"
    with pytest.raises(CheckpointError, match="checksum differs"):
        obtain(wrong)
    assert not (tmp_path / "home" / "models" / "Other.pt").exists()


def test_a_file_without_a_known_checksum_must_stay_what_it_was_first(site: Any, tmp_path: Path) -> None:
    site.files["/tiny.zip"] = b"first"
    tiny = entry(weights=WeightSource("a test", url=f"{site.address}/tiny.zip"))
    path = obtain(tiny)
    record = json.loads((tmp_path / "home" / "models" / "fetched.json").read_text())
    assert record["tiny.zip"]["sha256"] == hashlib.sha256(b"first").hexdigest()
    path.unlink()
    site.files["/tiny.zip"] = b"other"
    with pytest.raises(CheckpointError, match="checksum differs"):
        obtain(tiny)
    site.files["/tiny.zip"] = b"first"
    assert obtain(tiny).read_bytes() == b"first"


def test_a_repository_is_fetched_once_and_its_revision_recorded(site: Any, tmp_path: Path) -> None:
    files = {
        "open_clip_config.json": b"{}", "open_clip_model.safetensors": b"w" * 100, "open_clip_pytorch_model.bin": b"w",
        "README.md": b"hello", "LICENSE": b"free", "evil.py": b"import os", "sub/model.safetensors": b"x",
        "../outside.json": b"x", "/etc/cron.json": b"x", "a\\..\\config.json": b"x", "onnx/model.onnx": b"x",
    }  # fmt: skip
    put_repository(site, "org/tiny", files)
    folder = obtain_address(HubAddress("org/tiny"))
    assert files_under(folder) == {"open_clip_config.json", "open_clip_model.safetensors", "README.md", "LICENSE"}
    assert folder.name == COMMIT
    count = len(site.asked)
    put_repository(site, "org/tiny", {**files, "open_clip_config.json": b'{"a": 1}'}, commit=LATER)
    assert obtain_address(HubAddress("org/tiny")) == folder  # the branch moved on; this machine did not
    assert len(site.asked) == count
    for path in sorted(folder.iterdir()):
        path.unlink()
    folder.rmdir()
    assert obtain_address(HubAddress("org/tiny")).name == COMMIT  # as recorded, not as the branch now stands
    assert obtain_address(HubAddress("org/tiny", "main")).name == LATER
    assert obtain_address(HubAddress("org/tiny", LATER)).name == LATER
    record = json.loads((tmp_path / "home" / "models" / "fetched.json").read_text())
    assert record["hf-hub:org/tiny"]["revision"] == COMMIT
    assert record["hf-hub:org/tiny@main"]["revision"] == LATER


def test_a_cut_repository_goes_on(site: Any) -> None:
    data = bytes(range(256)) * 2000
    put_repository(site, "org/tiny", {"config.json": b"{}", "model.safetensors": data})
    path = f"/org/tiny/resolve/{COMMIT}/model.safetensors"
    site.cut_at[path] = [100_000, 0, 0, 0]
    with pytest.raises(CheckpointError, match="broke off"):
        obtain_address(HubAddress("org/tiny"))
    assert fetch.cached_repository(HubAddress("org/tiny")) is None
    site.cut_at.clear()
    site.asked.clear()
    folder = obtain_address(HubAddress("org/tiny"))
    assert (folder / "model.safetensors").read_bytes() == data
    assert [h.get("Range") for p, h in site.asked if p == path] == ["bytes=100000-"]
    assert f"/org/tiny/resolve/{COMMIT}/config.json" not in site.paths


def test_weights_in_parts(site: Any) -> None:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
    files = {"model.safetensors.index.json": index, "model-1.safetensors": b"1", "model-2.safetensors": b"2"}
    put_repository(site, "org/parts", {**files, "model-3.safetensors": b"3"})
    assert files_under(obtain_address(HubAddress("org/parts"))) == set(files)
    for shards in ({"a": "../x"}, {"a": "absent.safetensors"}, {}):
        bad = {"model.safetensors.index.json": json.dumps({"weight_map": shards}).encode()}
        put_repository(site, f"org/bad{len(str(shards))}", bad)
        with pytest.raises(CheckpointError, match="parts that it does not hold"):
            obtain_address(HubAddress(f"org/bad{len(str(shards))}"))


def test_an_entry_says_which_files_it_wants(site: Any) -> None:
    files = {"pytorch_model.bin": b"b", "model.safetensors": b"s", "meta.yaml": b"m", "vocab.txt": b"v", "x.bin": b"x"}
    put_repository(site, "org/named", files, refs=("v1",))
    source = WeightSource(
        "a test", repository="org/named", revision="v1", files=("absent.bin", "pytorch_model.bin", "model.*", "*.yaml")
    )
    folder = obtain(entry(weights=source))
    assert files_under(folder) == {"pytorch_model.bin", "meta.yaml", "vocab.txt"}
    assert obtain(entry(weights=source)) == folder


def test_entries_that_share_a_file_or_a_repository(site: Any) -> None:
    site.files["/both.zip"] = b"weights"
    source = WeightSource("a test", url=f"{site.address}/both.zip")
    assert obtain(entry(name="one", weights=source)) == obtain(entry(name="two", weights=source))
    assert len(site.asked) == 1
    files = {"pytorch_model.bin": b"text", "biovil_image.pt": b"image", "vocab.txt": b"words"}
    put_repository(site, "org/cxr", files, refs=("v1",))
    source = WeightSource("a test", repository="org/cxr", revision="v1", files=("pytorch_model.bin",))
    text = entry(name="text", layout="cxr_bert", weights=source)
    both = entry(name="cxr", layout="biovil", weights=replace(source, files=("biovil_image.pt", "pytorch_model.bin")))
    folder = obtain(text)
    assert files_under(folder) == {"pytorch_model.bin", "vocab.txt"}
    assert cached(both) is None
    assert obtain(both) == folder
    assert files_under(folder) == set(files)
    assert cached(text) == cached(both) == folder


def test_a_file_of_a_common_name_in_the_cache_is_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`models/pytorch_model.bin` could be anything: BioCLIP's keys are QuiltNet's."""
    monkeypatch.setenv("CHIASM_HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "open_clip_pytorch_model.bin").write_bytes(b"x")
    assert cached(CATALOG.get("bioclip")) is None
    (tmp_path / "models" / "bioclip.bin").write_bytes(b"x")
    assert cached(CATALOG.get("bioclip")) == tmp_path / "models" / "bioclip.bin"


def test_a_vocabulary_from_another_repository(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put_repository(site, "org/bert", {"pytorch_model.bin": b"w", "vocab.txt": b"words", "config.json": b"{}"})
    folder = fetch.obtain_tokenizer("org/bert")
    assert folder is not None
    assert files_under(folder) == {"vocab.txt", "config.json"}
    count = len(site.asked)
    assert fetch.obtain_tokenizer("org/bert") == folder
    assert len(site.asked) == count
    assert fetch.obtain_tokenizer("org/absent") is None
    assert fetch.obtain_tokenizer("biomegatron") is None
    assert "pytorch_model.bin" in files_under(obtain_address(HubAddress("org/bert")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    site.asked.clear()
    assert fetch.obtain_tokenizer("org/other") is None
    assert not site.asked


def test_a_repository_of_several_models_must_be_named(site: Any) -> None:
    with pytest.raises(InputError, match="holds the weights of `conch`"):
        load("hf-hub:MahmoodLab/conch")
    assert fetch.entry_of(HubAddress("vinid/plip")) == CATALOG.get("plip")
    assert not site.asked


def test_a_token_goes_to_the_hub_only_where_it_is_needed(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put_repository(site, "org/open", {"model.safetensors": b"w"})
    put_repository(site, "org/gated", {"model.safetensors": b"w"})
    site.tokens = {"/api/models/org/gated/": "hf_secret", "/org/gated/": "hf_secret"}
    with pytest.raises(CheckpointError, match="answers 401") as caught:
        obtain_address(HubAddress("org/gated"))
    assert "accept the terms" in str(caught.value.hint)
    assert "HF_TOKEN" in str(caught.value.hint)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    site.asked.clear()
    obtain_address(HubAddress("org/open"))
    assert not any("Authorization" in h for _, h in site.asked)
    obtain_address(HubAddress("org/gated"))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(CheckpointError) as caught:
        obtain_address(HubAddress("org/gated", "main"))
    assert "hf_wrong" not in str(caught.value)


@pytest.mark.parametrize("answer", [[], {}, {"sha": "../x"}, {"sha": COMMIT}, {"sha": COMMIT, "siblings": [1, {}]}])
def test_a_hub_that_answers_nonsense(site: Any, answer: Any) -> None:
    site.put_json("/api/models/org/odd/revision/main?blobs=true", answer)
    with pytest.raises(CheckpointError):
        obtain_address(HubAddress("org/odd"))
    with pytest.raises(CheckpointError, match="answers 404"):
        obtain_address(HubAddress("org/absent"))


@pytest.mark.parametrize("gate", ["open", "agreement", "request"])
def test_offline_says_at_once_what_to_do(site: Any, monkeypatch: pytest.MonkeyPatch, gate: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = WeightSource("a test", repository="org/tiny", files=("model.safetensors",))
    tiny = entry(weights=source, licence="CC-BY-4.0", gate=gate)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="`tiny` are not on this machine") as caught:
        obtain(tiny)
    assert time.monotonic() - started < 3
    assert "licence: CC-BY-4.0" in str(caught.value.hint)
    assert "pretrained='/path/to/" in str(caught.value.hint)
    assert "chiasm bundle tiny DIR" in str(caught.value.hint)
    assert ("where there is a network" in str(caught.value.hint)) == (gate != "request")
    with pytest.raises(CheckpointError, match="forbids downloads") as caught:
        obtain_address(HubAddress("org/tiny"))
    assert "chiasm bundle hf-hub:org/tiny DIR" in str(caught.value.hint)
    assert not site.asked


def test_what_is_handed_out_is_never_asked_for(site: Any) -> None:
    source = WeightSource("a test", url=f"{site.address}/x.ckpt", ask="write to the authors for `x.ckpt`")
    with pytest.raises(CheckpointError) as caught:
        obtain(entry(weights=source, gate="request"))
    assert "write to the authors" in str(caught.value.hint)
    with pytest.raises(CheckpointError, match="not on this machine"):
        obtain(entry(weights=None))
    with pytest.raises(CheckpointError, match="not on this machine"):
        obtain(entry(weights=WeightSource("a paper", ask="ask")))
    assert not site.asked


def test_every_absent_model_of_the_catalog_fails_fast_and_says_where_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Offline, and with a network that swallows everything: each within 3 s, all with a place and a next step."""
    monkeypatch.setenv("CHIASM_HOME", str(tmp_path))
    for name in CATALOG.names():
        with pytest.raises(CheckpointError, match="not on this machine") as caught:
            obtain(CATALOG.get(name))
        assert "/path/to/" in str(caught.value.hint), name
    monkeypatch.delenv("HF_HUB_OFFLINE")
    over = threading.Event()

    def swallow(*_: Any, **__: Any) -> None:
        over.wait(60)
        raise OSError  # whatever else the thread left behind did would fail a later test

    monkeypatch.setattr(socket, "create_connection", swallow)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="cannot be reached"):
        obtain(CATALOG.get("openai/ViT-B-32"))
    assert time.monotonic() - started < 3
    over.set()


def test_addresses() -> None:
    assert parse_address("hf-hub:org/repo") == HubAddress("org/repo")
    assert parse_address("hf-hub:org/repo@v1.0") == HubAddress("org/repo", "v1.0")
    for wrong in (
        "hf-hub:",
        "hf-hub:repo",
        "hf-hub:a/b/c",
        "hf-hub:../x",
        "hf-hub:a/..",
        "hf-hub:a/b@../c",
        "hf-hub:a/b@-x",
    ):
        with pytest.raises(InputError, match="no address of the hub"):
            parse_address(wrong)
    laion = parse_address("open_clip:ViT-B-32/laion2b_s34b_b79k")
    assert laion == HubAddress("laion/CLIP-ViT-B-32-laion2B-s34B-b79K")
    for name in ("ViT-B-32/metaclip_400m", "ViT-B-32-quickgelu/metaclip_400m"):
        assert parse_address(f"open_clip:{name}").activation == "quick_gelu"
    assert parse_address("open_clip:ViT-L-14-336/openai") == CATALOG.get("openai/ViT-L-14-336px")
    with pytest.raises(UnknownName, match="did you mean") as caught:
        parse_address("open_clip:ViT-B-32/laion2b_s34b_b79")
    assert "hf-hub:" in str(caught.value.hint)
    with pytest.raises(UnknownName):
        parse_address("open_clip:ViT-B-32-quickgelu/laion2b_s34b_b79k")  # its weights need GELU


def test_a_damaged_record_is_named(site: Any, tmp_path: Path) -> None:
    (tmp_path / "home" / "models").mkdir(parents=True)
    (tmp_path / "home" / "models" / "fetched.json").write_text("{")
    with pytest.raises(FileFormatError, match=r"fetched\.json"):
        obtain_address(HubAddress("org/tiny"))


def test_two_processes_fetch_once(site: Any) -> None:
    put_repository(site, "org/tiny", {"config.json": b"{}", "model.safetensors": bytes(3_000_000)})
    code = "from chiasm.fetch import HubAddress, obtain_address; obtain_address(HubAddress('org/tiny'))"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert site.paths.count(f"/org/tiny/resolve/{COMMIT}/model.safetensors") == 1


@pytest.fixture(scope="module")
def open_clip_files() -> dict[str, bytes]:
    """A repository in open_clip's layout with the smallest CLIP."""
    from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, ProjectionConfig, TextTowerConfig
    from chiasm.encoders.build import build_encoder_model

    config = EncoderConfig(
        image=ImageTowerConfig(image_size=32, width=64, layers=1, patch_size=16, activation="gelu"),
        text=TextTowerConfig(width=64, layers=1, activation="gelu"),
        projection=ProjectionConfig(dim=16),
        preprocess=Preprocess(size=32),
    )
    state = build_encoder_model(config).state_dict()
    model = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    }
    stated = {"model_cfg": model, "preprocess_cfg": {}}
    return {"open_clip_config.json": json.dumps(stated).encode(), "open_clip_model.safetensors": serialize(state)}


def test_an_address_loads_and_then_needs_no_network(
    site: Any, monkeypatch: pytest.MonkeyPatch, open_clip_files: dict[str, bytes]
) -> None:
    put_repository(site, "org/tiny-clip", open_clip_files)
    encoder = load("hf-hub:org/tiny-clip")
    assert encoder.name == "org/tiny-clip"
    assert encoder.config.image.activation == "gelu"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert load("hf-hub:org/tiny-clip").space == encoder.space
    with pytest.raises(InputError, match="goes with a name"):
        load("hf-hub:org/tiny-clip", pretrained="openai")


def test_a_tag_of_open_clip_brings_its_activation(site: Any, open_clip_files: dict[str, bytes]) -> None:
    put_repository(site, "timm/vit_base_patch32_clip_224.metaclip_400m", open_clip_files)
    put_repository(site, "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", open_clip_files)
    assert load("open_clip:ViT-B-32/metaclip_400m").config.image.activation == "quick_gelu"
    assert load("open_clip:ViT-B-32/laion2b_s34b_b79k").config.image.activation == "gelu"
    with pytest.raises(CheckpointError, match="not those of"):  # the tiny one is no ViT-B-32
        create_model_and_transforms("ViT-B-32", pretrained="laion2b_s34b_b79k")


def test_loading_what_is_here_asks_nothing(site: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    encoder = TinyEncoder()
    save_encoder(encoder, tmp_path / "home" / "models" / "mine")
    assert load(tmp_path / "home" / "models" / "mine").space == encoder.space
    with pytest.raises(UnknownName):
        load("no-such-model")
    assert not site.asked


@pytest.mark.parametrize(
    "command",
    [
        "doctor --model {}",
        "bundle {} out",
        "export {} --to open_clip -o out",
        "inspect x.png a --model {}",
        "explain x.png a --model {}",
    ],
)
@pytest.mark.parametrize("model", ["plip", "hf-hub:org/tiny", "open_clip:ViT-B-32/laion2b_s34b_b79k"])
def test_commands_miss_weights_before_they_import_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, model: str
) -> None:
    """What takes seconds is the import of torch: an absent model must not cost it."""
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    code = (
        "import sys\n"
        "from chiasm.cli.main import main\n"
        f"sys.argv = ['chiasm', *{command.format(model).split()!r}]\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    print(stop.code, 'torch' in sys.modules)\n"
    )
    monkeypatch.setenv("CHIASM_HOME", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == ["1", "False"], done.stderr
    assert "chiasm bundle" in done.stderr


def test_a_name_that_nobody_knows_is_missed_early_and_a_path_is_left_to_the_loader(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean `biomedclip`"):
        fetch.prepare("BiomedCLIP")
    for path in ("~/x", "./x", "x.pt", "best_*", str(tmp_path), "ViT-B-32"):
        fetch.prepare(path)


@pytest.mark.parametrize("call", ["load({!r})", "load({!r}, pretrained='openai')", "create_model_and_transforms({!r})"])
def test_python_misses_weights_before_it_imports_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    code = (
        "import sys, chiasm\n"
        f"try:\n    chiasm.{call.format('openai/ViT-B-32')}\n"
        "except chiasm.ChiasmError as error:\n    print('torch' in sys.modules, error)\n"
    )
    monkeypatch.setenv("CHIASM_HOME", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.startswith("False "), done.stderr
    assert "chiasm bundle openai/ViT-B-32" in done.stdout
