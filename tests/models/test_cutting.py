"""Networks cut into parts that run piece by piece: the same maps as in one piece, and no cut where there is none."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from wsiengine.errors import IntegrityError, ModelError
from wsiengine.models import cutting, ort
from wsiengine.models.cutting import Part, cut
from wsiengine.models.maps import Map, follow
from wsiengine.models.onnx_graph import Graph, read_graph
from wsiengine.models.packing import aligned
from wsiengine.models.pieces import Cut, Pieces
from wsiengine.models.registry import load_model
from wsiengine.models.runtime import Runtime

TF_PADS, MIDDLE_PADS = [0, 0, 1, 1], [1, 1, 1, 1]


class Net:
    """An ONNX network, written layer by layer; every method gives the name of its output."""

    def __init__(self, layout: str = "NHWC") -> None:
        self.rng = np.random.default_rng(5)
        self.layout = layout
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.image = "tiles"
        if layout == "NHWC":
            floats = self.add("Cast", ["tiles"], to=TensorProto.FLOAT)
            self.image = self.add("Transpose", [floats], perm=[0, 3, 1, 2])

    def weight(self, value: np.ndarray) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def add(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        output = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def conv(self, x: str, shape: tuple[int, ...], stride: int = 1, groups: int = 1, **padding: Any) -> str:
        fan = shape[1] * shape[2] * shape[3]
        w = self.weight((self.rng.normal(size=shape) / fan**0.5).astype(np.float32))
        b = self.weight(self.rng.normal(size=shape[0]).astype(np.float32) * 0.3)
        return self.add("Conv", [x, w, b], group=groups, kernel_shape=shape[2:], strides=[stride] * 2, **padding)

    def bottleneck(self, x: str, narrow: int, to: int, stride: int, pads: list[int]) -> str:
        """MobileNetV2's step: six times as wide inside, and added to its input where it can be."""
        wide = 6 * narrow
        y = self.add("Relu", [self.conv(x, (wide, narrow, 1, 1))])
        y = self.add("Relu", [self.conv(y, (wide, 1, 3, 3), stride, wide, pads=pads)])
        y = self.conv(y, (to, wide, 1, 1))
        return self.add("Add", [x, y]) if stride == 1 and narrow == to else y

    def graph(self, outputs: list[str]) -> tuple[bytes, Graph]:
        shape: list[str | int | None] = ["n", "h", "w", 3] if self.layout == "NHWC" else ["n", 3, "h", "w"]
        kind = TensorProto.UINT8 if self.layout == "NHWC" else TensorProto.FLOAT
        proto = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("tiles", kind, shape)],
            [onnx.ValueInfoProto(name=name) for name in outputs],
            self.weights,
        )
        encoded = helper.make_model(
            proto, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
        ).SerializeToString()
        return encoded, read_graph(memoryview(encoded))

    def parts(self, outputs: list[str]) -> list[Part]:
        return cut(self.graph(outputs)[1], self.lies, outputs)

    @property
    def lies(self) -> Map:
        return Map(1, 3, 1 if self.layout == "NHWC" else 2)

    def both(self, size: tuple[int, int], outputs: list[str]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The outputs for random pixels, from the network in one piece and from its parts."""
        encoded, graph = self.graph(outputs)
        pixels = np.random.default_rng(1).integers(0, 256, (1, *size, 3), np.uint8)
        if self.layout == "NCHW":
            pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2).astype(np.float32))
        whole = onnxruntime.InferenceSession(encoded).run(outputs, {"tiles": pixels})
        pieces = Pieces(Cut(graph, self.parts(outputs), self.lies), onnxruntime.InferenceSession)
        return whole, pieces.run(pixels, outputs)


def mobile(pads: list[int], layout: str = "NHWC", *, beside: bool = False) -> tuple[Net, list[str]]:
    """A network of inverted bottlenecks: a map of scores, and one of a single channel, squeezed.

    ``beside``: a way of its own from the image joins at the end, as the rule for other stains does in crc5.
    """
    net = Net(layout)
    x = net.add("Mul", [net.image, net.weight(np.array(1 / 128, np.float32))])
    x = net.add("Relu", [net.conv(x, (8, 3, 3, 3), 2, pads=pads)])
    x = net.bottleneck(x, 8, 4, 2, pads)
    x = net.bottleneck(x, 4, 4, 1, MIDDLE_PADS)
    x = net.bottleneck(x, 4, 6, 2, pads)
    x = net.bottleneck(x, 6, 6, 1, MIDDLE_PADS)
    x = net.bottleneck(x, 6, 6, 1, MIDDLE_PADS)
    scores = net.conv(x, (3, 6, 1, 1))
    if beside:
        cells = net.add("AveragePool", [net.image], kernel_shape=[8, 8], strides=[8, 8])
        around = net.add("AveragePool", [cells], kernel_shape=[3, 3], pads=MIDDLE_PADS)
        scores = net.add("Mul", [scores, net.conv(around, (1, 3, 1, 1))])
    single = net.add("Sigmoid", [net.conv(x, (1, 6, 1, 1))])
    squeezed = net.add("Squeeze", [single, net.weight(np.array([1], np.int64))])
    return net, [scores, squeezed]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a few dozen pixels, so that a small image has many of them."""
    monkeypatch.setattr(cutting, "PIECE_BYTES", 48 << 10)
    monkeypatch.setattr(cutting, "_MOST_MARGIN", 1.0)


@pytest.mark.parametrize("pads", [TF_PADS, MIDDLE_PADS], ids=["after", "middle"])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("size", [(184, 272), (320, 96), (8, 8)])
@pytest.mark.usefixtures("small_pieces")
def test_pieces_give_the_map_in_one_piece(pads: list[int], layout: str, beside: bool, size: tuple[int, int]) -> None:
    net, outputs = mobile(pads, layout, beside=beside)
    parts = net.parts(outputs)
    assert len(parts) >= 3 + 2 * beside
    assert all(part.side_px for part in parts)
    whole, pieces = net.both(size, outputs)
    for expected, found in zip(whole, pieces, strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4 * np.abs(expected).max())


@pytest.mark.usefixtures("small_pieces")
def test_a_margin_a_cell_smaller_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    net, outputs = mobile(TF_PADS)
    whole, pieces = net.both((184, 272), outputs)
    real = cutting._part

    def narrower(*given: Any) -> Part:
        part = real(*given)
        return replace(part, after_px=0)

    monkeypatch.setattr(cutting, "_part", narrower)
    wrong = net.both((184, 272), outputs)[1]
    assert np.abs(pieces[0] - whole[0]).max() < 1e-3 * np.abs(wrong[0] - whole[0]).max()


def test_parts_end_where_the_maps_are_narrow_and_margins_stay_small() -> None:
    net, outputs = mobile(TF_PADS, beside=True)
    parts = net.parts(outputs)
    assert parts[-1].outputs == tuple(outputs)
    assert all(part.maps[name].channels in (4, 6) for part in parts[:-3] for name in part.outputs)
    assert all(part.before_px + part.after_px <= part.side_px / 10 for part in parts if part.side_px)


def residual() -> tuple[Net, list[str]]:
    """ResNet's steps, as wide inside as outside: a map of scores at an eighth of the resolution."""
    net, ins = Net(), 8
    x = net.add("Mul", [net.image, net.weight(np.array(1 / 128, np.float32))])
    x = net.add("Relu", [net.conv(x, (8, 3, 3, 3), 2, pads=MIDDLE_PADS)])
    for outs, stride in ((8, 1), (16, 2), (16, 1), (24, 2), (24, 1)):
        straight = x if ins == outs else net.conv(x, (outs, ins, 1, 1), stride)
        y = net.add("Relu", [net.conv(x, (outs, ins, 3, 3), stride, pads=MIDDLE_PADS)])
        x = net.add("Relu", [net.add("Add", [straight, net.conv(y, (outs, outs, 3, 3), pads=MIDDLE_PADS)])])
        ins = outs
    return net, [net.conv(x, (3, ins, 1, 1))]


@pytest.fixture
def smaller_wide_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "WIDE_BYTES", 64 << 10)
    monkeypatch.setattr(cutting, "_MOST_WIDE_MARGIN", 1.0)


@pytest.mark.parametrize("size", [(184, 272), (320, 96), (8, 8)])
@pytest.mark.usefixtures("smaller_wide_pieces")
def test_a_network_as_wide_outside_its_steps_runs_in_larger_pieces(size: tuple[int, int]) -> None:
    net, outputs = residual()
    parts = net.parts(outputs)
    assert len(parts) >= 2
    assert all(part.side_px for part in parts)
    [whole], [pieces] = net.both(size, outputs)
    np.testing.assert_allclose(pieces, whole, rtol=1e-5, atol=1e-4 * np.abs(whole).max())


def test_the_cheapest_cuts_weigh_margins_against_maps_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies that cost nothing: a cut at every step; dear ones: as few as memory allows."""
    net, outputs = residual()
    monkeypatch.setattr(cutting, "WIDE_BYTES", 256 << 10)
    counts = []
    for copied in (0, 40, 10**6):
        monkeypatch.setattr(cutting, "_COPIED", copied)
        counts.append(len(net.parts(outputs)))
    assert counts[0] > counts[1] > counts[2] >= 2


@given(st.data())
def test_a_wanted_cell_has_its_value_whatever_else_is_wanted(data: st.DataObject) -> None:
    """But for rounding."""
    make = data.draw(st.sampled_from([residual, lambda: mobile(TF_PADS), lambda: mobile(MIDDLE_PADS, beside=True)]))
    net, outputs = make()
    rows, cols = data.draw(st.integers(4, 24)), data.draw(st.integers(4, 24))
    seed, share = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([0.003, 0.05, 1.0]))
    wanted = np.random.default_rng(seed).random((rows, cols)) < share
    wanted[rows // 2, cols // 3] = True
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("PIECE_BYTES", 12 << 10), ("WIDE_BYTES", 64 << 10), ("_MOST_MARGIN", 1.0)):
            patch.setattr(cutting, name, value)
        patch.setattr(cutting, "_MOST_WIDE_MARGIN", 1.0)
        encoded, graph = net.graph(outputs)
        pieces = Pieces(Cut(graph, net.parts(outputs), net.lies), onnxruntime.InferenceSession)
        batch = np.random.default_rng(seed).integers(0, 256, (1, 8 * rows, 8 * cols, 3), np.uint8)
        for memory in range(2):  # the second run finds what the first one left
            found = pieces.run(batch, outputs, wanted if memory else None)
    for expected, values in zip(
        onnxruntime.InferenceSession(encoded).run(outputs, {"tiles": batch}), found, strict=True
    ):
        at = (0, ..., wanted)
        np.testing.assert_allclose(values[at], expected[at], rtol=1e-5, atol=1e-4 * np.abs(expected).max())
        assert np.isfinite(values).all()


@pytest.mark.usefixtures("smaller_wide_pieces")
def test_what_is_computed_follows_what_is_wanted() -> None:
    """Of each part no more than the parts after it look at."""
    net, outputs = residual()
    _, graph = net.graph(outputs)
    seen: list[int] = []

    class Counting:
        def __init__(self, encoded: bytes) -> None:
            self._session = onnxruntime.InferenceSession(encoded)
            self.get_outputs = self._session.get_outputs

        def run(self, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            found = self._session.run(names, feeds)
            seen.append(found[0].size)
            return found

    parts = net.parts(outputs)
    counts = []
    pieces = Pieces(Cut(graph, parts, net.lies), Counting)
    for side in (64, 4):
        wanted = np.zeros((64, 64), bool)
        wanted[:side, :side] = True
        seen.clear()
        [first] = pieces.run(np.full((1, 512, 512, 3), 90, np.uint8), outputs, wanted)
        counts.append(sum(seen))
        [again] = pieces.run(np.full((1, 512, 512, 3), 90, np.uint8), outputs, wanted)
        np.testing.assert_array_equal(first, again)
    assert counts[0] > 20 * counts[1]


def test_a_plain_start_is_cut() -> None:
    """What the networks below have changed, each in one thing."""
    net = Net()
    x = net.conv(net.image, (4, 3, 3, 3), pads=MIDDLE_PADS)
    assert net.parts([net.bottleneck(net.bottleneck(x, 4, 4, 1, MIDDLE_PADS), 4, 4, 1, MIDDLE_PADS)])


def _skipping(net: Net) -> list[str]:
    """Early convolutions are needed again at the end."""
    early = net.conv(net.image, (4, 3, 3, 3), pads=MIDDLE_PADS)
    x = net.bottleneck(early, 4, 4, 1, MIDDLE_PADS)
    x = net.bottleneck(x, 4, 4, 1, MIDDLE_PADS)
    return [net.add("Add", [x, early])]


def _looking_at_all(net: Net) -> list[str]:
    """Squeeze and excite: every cell depends on the whole image."""
    x = net.conv(net.image, (4, 3, 3, 3), pads=MIDDLE_PADS)
    x = net.add("Mul", [x, net.add("Sigmoid", [net.add("GlobalAveragePool", [x])])])
    return [net.bottleneck(net.bottleneck(x, 4, 4, 1, MIDDLE_PADS), 4, 4, 1, MIDDLE_PADS)]


def _unpadded(net: Net) -> list[str]:
    """Each convolution takes a ring away, so that cells do not lie over whole pixels."""
    x = net.conv(net.image, (4, 3, 3, 3))
    return [net.bottleneck(net.bottleneck(x, 4, 4, 1, MIDDLE_PADS), 4, 4, 1, MIDDLE_PADS)]


def _padded_by_name(net: Net) -> list[str]:
    x = net.conv(net.image, (4, 3, 3, 3), 2, auto_pad="SAME_UPPER")
    return [net.bottleneck(net.bottleneck(x, 4, 4, 1, MIDDLE_PADS), 4, 4, 1, MIDDLE_PADS)]


def _with_chance(net: Net) -> list[str]:
    x = net.conv(net.image, (4, 3, 3, 3), pads=MIDDLE_PADS)
    x = net.add("Add", [x, net.add("RandomNormal", [], shape=[1, 4, 1, 1])])
    return [net.bottleneck(net.bottleneck(x, 4, 4, 1, MIDDLE_PADS), 4, 4, 1, MIDDLE_PADS)]


def _gate_from_the_image(net: Net) -> list[str]:
    """A wanted map that goes round all cuts."""
    gate = net.conv(net.add("AveragePool", [net.image], kernel_shape=[2, 2], strides=[2, 2]), (1, 3, 1, 1))
    x = net.conv(net.image, (4, 3, 3, 3), 2, pads=MIDDLE_PADS)
    x = net.bottleneck(net.bottleneck(x, 4, 4, 1, MIDDLE_PADS), 4, 4, 1, MIDDLE_PADS)
    return [net.conv(x, (24, 4, 1, 1)), net.add("Sigmoid", [gate])]


def _trunk(net: Net) -> str:
    """A start that narrows to 8 channels, and three steps."""
    x = net.add("Relu", [net.conv(net.image, (32, 3, 3, 3), 2, pads=MIDDLE_PADS)])
    x = net.conv(x, (8, 32, 1, 1))
    for _ in range(3):
        x = net.bottleneck(x, 8, 8, 1, MIDDLE_PADS)
    return x


def test_a_map_that_nobody_wants_is_no_place_to_cut() -> None:
    net = Net()
    scores = net.conv(_trunk(net), (48, 8, 1, 1))
    aside = net.conv(net.conv(net.image, (32, 3, 3, 3), 2, pads=MIDDLE_PADS), (4, 32, 1, 1))
    net.conv(net.conv(aside, (32, 4, 1, 1)), (1, 32, 1, 1))
    assert net.parts([scores]) == []


def test_weights_may_add_channels() -> None:
    net = Net()
    single = net.add("Sigmoid", [net.conv(_trunk(net), (1, 8, 1, 1))])
    x = net.add("Mul", [single, net.weight(net.rng.normal(size=(1, 8, 1, 1)).astype(np.float32))])
    outputs = [net.conv(net.conv(x, (64, 8, 1, 1)), (48, 64, 1, 1))]
    assert x in [name for part in net.parts(outputs) for name in part.inputs]  # it is cut right there
    [whole], [pieces] = net.both((184, 272), outputs)
    np.testing.assert_allclose(pieces, whole, rtol=1e-5, atol=1e-4 * np.abs(whole).max())


def test_places_of_maxima_are_no_map() -> None:
    """They count from the corner of what the pooling saw."""
    net = Net("NCHW")
    net.nodes.append(helper.make_node("MaxPool", ["tiles"], ["most", "where"], kernel_shape=[2, 2], strides=[2, 2]))
    _, graph = net.graph(["most", "where"])
    maps = follow(graph, {"tiles": net.lies}, graph.nodes)
    assert "most" in maps
    assert "where" not in maps


def test_a_file_that_was_replaced_does_not_run_in_pieces(tmp_path: Path) -> None:
    shutil.copytree(load_model("crc5").folder, tmp_path / "crc5")
    runtime = Runtime(load_model(str(tmp_path / "crc5")))
    file = runtime.card.model_path
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError, match="changed"):
        runtime.maps(np.zeros((448, 448, 3), np.uint8))
    file.unlink()
    with pytest.raises(IntegrityError, match="no longer be read"):
        Runtime.maps(runtime, np.zeros((448, 448, 3), np.uint8))


_WHOLE = [_gate_from_the_image, _with_chance, _skipping, _looking_at_all, _unpadded, _padded_by_name]


@pytest.mark.parametrize("make", _WHOLE)
def test_other_networks_stay_in_one_piece(make) -> None:  # type: ignore[no-untyped-def]
    net = Net()
    assert net.parts(make(net)) == []


def test_weights_in_another_file_stay_there() -> None:
    net, outputs = mobile(TF_PADS)
    encoded, _ = net.graph(outputs)
    model = onnx.load_from_string(encoded)
    entry = model.graph.initializer[0].external_data.add()
    entry.key, entry.value = "location", "weights.bin"
    assert cut(read_graph(memoryview(model.SerializeToString())), net.lies, outputs) == []


@pytest.fixture(scope="module")
def tissue() -> np.ndarray:
    """(608, 416, 3) uint8, pink with blue spots: crc5's rule for other stains lets it pass."""
    rng = np.random.default_rng(2)
    spots = rng.random((38, 26)).repeat(16, 0).repeat(16, 1)[..., None]
    colour = np.where(spots > 0.7, (90, 60, 140), (225, 150, 195))
    return (colour + rng.integers(-20, 20, (608, 416, 3))).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_bundled_network_in_pieces(precision: str, tissue: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "PIECE_BYTES", 256 << 10)
    card = load_model("crc5").at(precision)
    runtime = Runtime(card, device="cpu")
    found = runtime.maps(tissue)
    assert runtime._pieces is not None
    batch = aligned((1, *tissue.shape), tissue.dtype)
    batch[0] = tissue
    cam, gate = runtime._session.run([card.outputs.cam, card.outputs.gate_map], {"tiles": batch})
    expected = np.concatenate([np.moveaxis(cam[0], 0, -1), gate[0][..., None]], axis=-1)
    assert np.ptp(expected[..., 0]) > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_threads_and_sizes_do_not_show_in_a_bit(tissue: np.ndarray) -> None:
    runtime = Runtime(load_model("crc5"), device="cpu")
    views = [tissue[:288], tissue, np.ascontiguousarray(tissue[:, :192]), tissue[:288]]
    one_by_one = [runtime.maps(view) for view in views]
    with ThreadPoolExecutor(4) as pool:
        for expected, found in zip(2 * one_by_one, pool.map(runtime.maps, 2 * views), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_what_fails_in_a_piece_is_told_as_in_one_piece(tissue: np.ndarray) -> None:
    class Broken:
        def run(self, *_: object) -> None:
            raise RuntimeError("Failed to allocate memory")

    runtime = Runtime(load_model("crc5"), device="cpu")
    runtime.maps(tissue[:64])
    assert runtime._pieces is not None
    runtime._pieces.sessions[3] = Broken()
    with pytest.raises(ModelError, match=r"crc5: ONNX Runtime failed .* Failed to allocate memory"):
        runtime.maps(tissue[:64])


def test_the_plan_counts_what_pieces_take(tissue: np.ndarray) -> None:
    """A sixteenth of the network in one piece, for which 288 bytes a pixel are planned."""
    runtime = Runtime(load_model("crc5"), device="cpu")
    planned = sum(runtime.map_bytes(2240**2) or ())
    assert 32 << 20 < planned < 288 * 2240**2 / 16


def test_a_network_that_cannot_be_cut_runs_as_before(tmp_path: Path) -> None:
    from tests.models.tiny import tiny

    card = tiny(tmp_path)
    assert Runtime(card, device="cpu").map_bytes(1000) is None
    assert ort.open_pieces(card, ["cam"]) is None
    assert Runtime(card, device="cpu").maps(np.zeros((32, 64, 3), np.uint8)).shape == (4, 8, 3)


@pytest.mark.parametrize(("kind", "half"), [(np.float16, True), (np.float32, False)])
def test_half_precision_is_seen_in_the_weights(kind: type, half: bool) -> None:
    kernel = numpy_helper.from_array(np.zeros((2, 3, 1, 1), kind), "kernel")
    scalar = numpy_helper.from_array(np.array(1, np.float16), "scalar")
    graph = helper.make_graph([], "g", [], [], [scalar, kernel])
    assert read_graph(memoryview(helper.make_model(graph).SerializeToString())).half is half
