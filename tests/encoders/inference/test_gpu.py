"""The GPU's path, tried on the CPU: the same wrapper under the CPU's autocast, and CUDA's graphs played by a mock."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from chiasm.encoders.base import Encoder
from chiasm.encoders.inference import engine as engines
from chiasm.encoders.inference import gpu
from chiasm.encoders.inference.engine import Engine, make_engine
from chiasm.encoders.inference.gpu import GpuEngine, StaticBatches, recorded, unrecorded
from chiasm.errors import ConfigError

Make = Callable[..., Any]
LAW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def pixels(batch: int, side: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def angle(found: Tensor, expected: Tensor) -> float:
    return 1 - float(F.cosine_similarity(found, expected).min())


class Graphs:
    """What ``torch.cuda`` offers for graphs: the kernels of the block run again on the same memory at ``replay``."""

    def __init__(self) -> None:
        self.warmed = self.replays = 0
        self.work: Callable[[], object] | None = None
        self.streams: list[Any] = []

    def CUDAGraph(self) -> Any:
        def replay() -> None:
            assert self.work is not None
            self.replays += 1
            self.work()

        return SimpleNamespace(replay=replay)

    def Stream(self, device: Any) -> Any:
        self.streams.append(SimpleNamespace(wait_stream=lambda other: None, device=device))
        return self.streams[-1]

    def current_stream(self, device: Any) -> Any:
        return SimpleNamespace(wait_stream=lambda other: None)

    def stream(self, stream: Any) -> Any:
        return nullcontext()

    def device(self, device: Any) -> Any:
        return nullcontext()

    def graph(self, graph: Any, *, stream: Any, capture_error_mode: str) -> Any:
        assert stream is self.streams[-1]  # the one that was warmed up, on the device of the example
        assert capture_error_mode == "thread_local"
        return nullcontext()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    found = Graphs()
    for name in ("CUDAGraph", "Stream", "current_stream", "stream", "graph", "device"):
        monkeypatch.setattr(torch.cuda, name, getattr(found, name))
    return found


@pytest.mark.parametrize("image", [{}, {"kind": "resnet"}])
@pytest.mark.parametrize("static_batch", [None, 2])
@torch.inference_mode()
def test_float32_is_the_model_itself(
    tiny: Make, make_texts: Make, image: dict[str, Any], static_batch: int | None
) -> None:
    model = tiny(image=image)
    side = model.config.image.image_size
    engine = GpuEngine(model, "fp32", static_batch=static_batch)
    assert engine.plain == {}
    for batch in (0, 1, 2, 5):
        x = pixels(batch, side)
        assert torch.allclose(engine.encode_image(x), model.encode_image(x), atol=2e-5)
        assert torch.allclose(engine.encode_image(x, True), model.encode_image(x, normalize=True), atol=1e-5)
    ids = make_texts([4, 9, 16])
    assert torch.allclose(engine.encode_text(ids), model.encode_text(ids), atol=1e-5)


@pytest.mark.parametrize("image", [{}, {"kind": "resnet"}])
@torch.inference_mode()
def test_bfloat16_by_autocast_gives_float32_vectors(tiny: Make, make_texts: Make, image: dict[str, Any]) -> None:
    model = tiny(image=image)
    side = model.config.image.image_size
    seen: list[torch.dtype] = []
    name = "visual.layer1.0.conv1" if image else "visual.transformer.resblocks.0.mlp.c_fc"
    handle = model.get_submodule(name).register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    engine = GpuEngine(model, "bf16", static_batch=2)
    x, ids = pixels(3, side), make_texts([4, 16])
    found = engine.encode_image(x, normalize=True)
    assert set(seen) == {torch.bfloat16}
    handle.remove()
    expected = model.encode_image(x, normalize=True)
    assert found.dtype == torch.float32
    assert torch.allclose(found.norm(dim=-1), torch.ones(3), atol=1e-6)
    assert 0 < angle(found, expected) < 2e-3
    words = engine.encode_text(ids, normalize=True)
    assert words.dtype == torch.float32
    assert 0 < angle(words, model.encode_text(ids, normalize=True)) < 2e-3
    assert next(model.parameters()).dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


@torch.inference_mode()
def test_half_precision_by_name(tiny: Make) -> None:
    model = tiny()
    engine = GpuEngine(model, "fp16")
    assert engine._dtype == torch.float16
    found = engine.encode_image(pixels(2))
    assert found.dtype == torch.float32
    assert angle(found, model.encode_image(pixels(2))) < 1e-4


def test_convolutions_get_channels_last_and_the_model_keeps_its_layout(tiny: Make) -> None:
    model = tiny(image={"kind": "resnet"})
    seen: list[bool] = []
    conv: nn.Module = model.visual.conv1
    conv.register_forward_hook(
        lambda m, args, out: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    GpuEngine(model, "fp32").encode_image(pixels(2, 64))
    assert seen == [True]
    assert model.visual.conv2.weight.is_contiguous()


def test_int8_and_empty_graphs_are_refused(tiny: Make) -> None:
    with pytest.raises(ConfigError, match="precision `int8` does not run on `cpu`") as refusal:
        GpuEngine(tiny(), "int8")
    assert refusal.value.hint == "use `bf16`"
    for wrong in (0, -3):
        with pytest.raises(ConfigError, match=f"at least 1 image, got {wrong}"):
            GpuEngine(tiny(), "bf16", static_batch=wrong)


@LAW
@given(count=st.integers(0, 11), batch=st.integers(1, 6))
def test_batches_of_one_size_give_every_row_in_order(graphs: Graphs, count: int, batch: int) -> None:
    """Whatever the count: as many rows, in order, and the function only ever sees one shape."""
    shapes: set[tuple[int, ...]] = set()

    def call(x: Tensor) -> Tensor:
        shapes.add(tuple(x.shape))
        return x.flatten(1)[:, :4] * 2

    static = StaticBatches(call, batch, 4, unrecorded)
    x = torch.randn(count, 2, 3)
    assert torch.equal(static(x), x.flatten(1)[:, :4] * 2)
    assert shapes == ({(batch, 2, 3)} if count else set())


@torch.inference_mode()
def test_a_graph_is_recorded_once_and_replayed(graphs: Graphs) -> None:
    calls: list[int] = []

    def call(x: Tensor) -> Tensor:
        calls.append(x.data_ptr())
        result = x * 3
        graphs.work = lambda: torch.mul(x, 3, out=result)  # kernels on the same memory
        return result

    static = StaticBatches(call, 2, 3, recorded)
    x = torch.arange(15.0).view(5, 3)
    first = static(x)
    assert torch.equal(first, x * 3)
    assert len(calls) == gpu.WARM_UP + 1
    assert len(set(calls)) == 1  # one place in memory for all
    assert graphs.replays == 3
    kept = first.clone()
    assert torch.equal(static(-x), -3 * x)
    assert torch.equal(first, kept)  # what was given out is not overwritten
    assert len(calls) == gpu.WARM_UP + 1
    static(x.double())
    assert len(calls) == 2 * (gpu.WARM_UP + 1)  # another type, another graph
    assert [stream.device for stream in graphs.streams] == [x.device] * 2


@torch.inference_mode()
def test_a_mean_over_the_batch_would_be_seen() -> None:
    """Why the function has to work row by row: the rows that fill a batch up would change the others."""
    static = StaticBatches(lambda x: x - x.mean(0), 4, 3, unrecorded)
    x = torch.randn(3, 3)
    assert not torch.allclose(static(x), x - x.mean(0))


# which engine


class Elsewhere:
    """A model that says it lies on another device."""

    def __init__(self, model: Any, device: str) -> None:
        self._model, self.device = model, torch.device(device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_the_device_chooses_the_engine(tiny: Make, device: str) -> None:
    model = tiny()
    assert isinstance(make_engine(model, "fp32"), Engine)
    assert isinstance(make_engine(model, "fp32", static_batch=4), Engine)
    elsewhere: Any = Elsewhere(model, device)
    engine = make_engine(elsewhere, "bf16")
    assert isinstance(engine, GpuEngine)
    assert engine._device == torch.device(device)


@pytest.mark.parametrize(("device", "record"), [("cuda", recorded), ("mps", unrecorded)])
def test_graphs_are_for_cuda(tiny: Make, device: str, record: Any) -> None:
    elsewhere: Any = Elsewhere(tiny(), device)
    engine: Any = make_engine(elsewhere, "bf16", static_batch=4)
    assert engine._image._record is record


def test_an_encoder_asks_for_a_graph_once(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    made: list[int | None] = []

    def make(model: Any, precision: Any, *, static_batch: int | None = None) -> GpuEngine:
        made.append(static_batch)
        return GpuEngine(model, precision, static_batch=static_batch)

    monkeypatch.setattr(engines, "make_engine", make)
    encoder = Encoder(model, model.config, name="tiny").prepare(static_batch=3)
    expected = model.encode_image(pixels(4)).detach()
    assert torch.allclose(encoder.encode_image(pixels(4)), expected, atol=1e-5)
    encoder.prepare(static_batch=3).encode_image(pixels(4))
    assert made == [3]
    encoder.prepare().encode_image(pixels(4))
    assert made == [3]  # whoever only prepares keeps the graph, embedding a folder for one
    with torch.no_grad():
        model.visual.conv1.weight.mul_(1.5)
    changed = encoder.encode_image(pixels(4))
    assert made == [3, 3]
    assert not torch.allclose(changed, expected, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_real_gpu(tiny: Make) -> None:
    model = tiny(image={"kind": "resnet"}).cuda()
    x = pixels(5, 64).cuda()
    with torch.inference_mode():
        expected = model.encode_image(x)
        for precision in ("bf16", "fp16"):
            found = [GpuEngine(model, precision, static_batch=b).encode_image(x) for b in (None, 2)]
            assert angle(found[0], expected) < 2e-3
            assert angle(found[1], found[0]) < 1e-4
