"""int8 and float16: what is rounded, that the file computes what was trained, and what the card says of it."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from tests.training.fields import write_sets
from tests.training.test_export import session, unsettle
from wsiengine.errors import WsiError
from wsiengine.evaluating import Rows
from wsiengine.evaluation_report import predicted
from wsiengine.models.card import load_card
from wsiengine.models.integrity import check_files
from wsiengine.models.session import open_runtime
from wsiengine.training import precisions, rounding
from wsiengine.training.backbones import NAMES
from wsiengine.training.cells import CellNet
from wsiengine.training.data import CLASSES, read_fields
from wsiengine.training.export import export_onnx
from wsiengine.training.int8 import write_fp16, write_int8
from wsiengine.training.onnx_torch import OnnxModule, simplified
from wsiengine.training.other_stain import StainRule, silence_other_stains
from wsiengine.training.rounding import (
    WEIGHT_MOST,
    Rounded,
    Training,
    best_range,
)

SOME = tuple(name for name in NAMES if name != "resnet50")
ROWS = tuple((k, 0.0) for k in range(3))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(folder, name="mobilenet_v2"):
    network = unsettle(CellNet(3, 0.25, name), 11)
    export_onnx(network, folder / "m.onnx", rows=ROWS, half=False)
    return folder / "m.onnx"


def tiles(seed, count=4):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 8, 12, 3)).astype(np.float32).repeat(8, 1).repeat(8, 2)
    return torch.from_numpy(np.clip(coarse + rng.normal(0, 20, coarse.shape), 0, 255).astype(np.uint8))


def rounded(path):
    made_of = Rounded(simplified(path))
    made_of.calibrate([tiles(k) for k in range(2)])
    return made_of


@pytest.mark.parametrize("name", SOME)
def test_a_graph_in_torch_says_what_its_file_says(name, tmp_path):
    path = made(tmp_path, name)
    with torch.inference_mode():
        found = OnnxModule(simplified(path))(tiles(1))
        moved = Rounded(simplified(path)).network(tiles(1))
    for name_, expected in zip(found, session(path).run(list(found), {"tiles": tiles(1).numpy()}), strict=True):
        np.testing.assert_allclose(found[name_].numpy(), expected, atol=1e-4)
        inner = (..., slice(1, None), slice(1, None)) if expected.ndim > 2 else ...
        if expected.ndim > 2 and name == "mobilenet_v2":  # bytes less 128: borders are 128 then, not 127.5
            np.testing.assert_allclose(moved[name_].numpy()[inner], expected[inner], atol=0.02)


@pytest.mark.parametrize("name", SOME)
def test_the_file_computes_what_was_trained(name, tmp_path):
    made_of = rounded(made(tmp_path, name))
    onnx.save(write_int8(made_of), tmp_path / "int8.onnx")
    with torch.inference_mode():
        whole = made_of.network(tiles(9))
        simulated = made_of.network(tiles(9), made_of.tap)
    found = session(tmp_path / "int8.onnx").run(["cam"], {"tiles": tiles(9).numpy()})[0]
    spread = float(whole["cam"].std())
    off = np.abs(found - simulated["cam"].numpy()).mean()  # requantisation in integers
    rounding = float((simulated["cam"] - whole["cam"]).abs().mean())
    assert off < 0.3 * rounding + 0.02 * spread
    assert rounding < 0.6 * spread


def cast_first(path):
    """The same network, in a file whose pixels become numbers before they are transposed."""
    model = onnx.load(path)
    turn = next(n for n in model.graph.node if n.op_type == "Transpose")
    cast = next(n for n in model.graph.node if n.op_type == "Cast" and n.input[0] == turn.output[0])
    pixels, planes = turn.input[0], cast.output[0]
    cast.input[:], cast.output[:], turn.input[:], turn.output[:] = [pixels], ["numbers"], ["numbers"], [planes]
    nodes = [cast, *(n for n in model.graph.node if n is not cast)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, path)
    return path


def test_bytes_stay_bytes_where_the_model_casts_before_it_transposes(tmp_path):
    """A quantised network that scaled its pixels in float32 would pay for that with every tile."""
    files = []
    for name, path in (("usual", made(tmp_path)), ("other", cast_first(made(tmp_path)))):
        files.append(tmp_path / f"{name}.onnx")
        onnx.save(write_int8(rounded(path)), files[-1])
    kinds = [n.op_type for n in onnx.load(files[1]).graph.node]
    assert kinds.index("Conv") < kinds.index("QuantizeLinear")
    found = [session(file).run(["cam"], {"tiles": tiles(9).numpy()})[0] for file in files]
    np.testing.assert_array_equal(*found)


def test_rules_beside_the_network_are_kept(tmp_path):
    """A rule that looks at the pixels by itself: it stays float32, untrained, and still sees the pixels."""
    path = made(tmp_path)
    silence_other_stains(path, StainRule(1.0, 1.6))
    made_of = rounded(path)
    assert sum(n.op_type == "Conv" for n in made_of.model.graph.node) == len(made_of.layout.convolutions) + 4
    onnx.save(write_int8(made_of), tmp_path / "int8.onnx")
    with torch.inference_mode():
        simulated = made_of.network(tiles(9), made_of.tap)["cam"].numpy()
        plain = rounded(made(tmp_path)).network(tiles(9))["cam"].numpy()
    found = session(tmp_path / "int8.onnx").run(["cam"], {"tiles": tiles(9).numpy()})[0]
    np.testing.assert_allclose(found, simulated, atol=0.05 * np.ptp(simulated))
    assert np.abs(found - plain).max() > 0.1 * np.ptp(plain)  # it speaks
    made_of.train(lambda i: tiles(i, 2), Training(iterations=1), lambda line: None)
    kept = {
        numpy_helper.to_array(w).tobytes() for w in simplified(path).graph.initializer if w.name.startswith("stain.")
    }
    stored = {numpy_helper.to_array(w).tobytes() for w in write_int8(made_of).graph.initializer}
    assert kept <= stored


def test_no_processor_can_overflow(tmp_path):
    """Unsigned bytes times weights, two products added in 16 bits, as processors without VNNI do it."""
    model = write_int8(rounded(made(tmp_path)))
    weights = [numpy_helper.to_array(w) for w in model.graph.initializer if w.name.endswith(".int")]
    bytes_ = [w for w in weights if w.dtype == np.int8]
    assert len(bytes_) == 52
    most = max(int(np.abs(w.astype(int)).max()) for w in bytes_)
    assert most == WEIGHT_MOST
    assert 2 * 255 * most <= np.iinfo(np.int16).max
    zeros = [w for w in model.graph.initializer if w.name.endswith(".zero")]
    assert {numpy_helper.to_array(z).dtype for z in zeros} == {np.dtype(t) for t in (np.int8, np.uint8, np.int32)}
    assert not [n for n in model.graph.node if n.op_type in ("Clip", "Relu")]  # the ranges do that


def test_an_activation_that_its_range_does_not_carry_out_stays(tmp_path):
    made_of = rounded(made(tmp_path))
    name = next(n.output[0] for n in made_of.model.graph.node if n.op_type == "Clip")
    made_of.ranges[name] = rounding.Range(0.1, 0)  # up to 25.5: the clip at 6 must be done by a node
    clips = [n for n in write_int8(made_of).graph.node if n.op_type == "Clip"]
    assert [n.output[0] for n in clips] == [name]


def test_training_brings_it_nearer(tmp_path):
    made_of = rounded(made(tmp_path, "resnet18"))
    teacher = OnnxModule(made_of.model)

    def distance():
        with torch.inference_mode():
            given, wanted = made_of.network(tiles(7, 8), made_of.tap), teacher(tiles(7, 8))
            return sum(float(rounding._difference(given[name], wanted[name])) for name in wanted)

    before = distance()
    made_of.train(lambda i: tiles(7, 8), Training(iterations=20, rate=1e-5), lambda line: None)
    assert distance() < 0.6 * before


def test_a_costly_layer_stays_float32(tmp_path):
    """A weight that never matters, but takes all the steps of its channel: rounding ruins the others."""
    made_of = rounded(made(tmp_path, "resnet18"))
    _, before, index, *_ = sorted(made_of.layout.convolutions)
    _, bias = made_of.network.convolution(before)
    weight, _ = made_of.network.convolution(index)
    with torch.no_grad():
        bias[0] = -1e4  # dark for ever
        weight[:, 0] = 60 * weight.abs().max()
    assert made_of.spare(tiles(3, 2)) == [index]
    model = write_int8(made_of)
    stored = {w.name for w in model.graph.initializer}
    assert f"w{index}" in stored
    assert f"w{index}.int" not in stored
    onnx.save(model, tmp_path / "int8.onnx")
    with torch.inference_mode():
        whole, simulated = made_of.network(tiles(9)), made_of.network(tiles(9), made_of.tap)
    found = session(tmp_path / "int8.onnx").run(["cam"], {"tiles": tiles(9).numpy()})[0]
    np.testing.assert_allclose(found, simulated["cam"].numpy(), atol=0.05 * float(np.ptp(whole["cam"].numpy())))


def test_ranges_hold_zero_and_leave_out_stray_values():
    rng = np.random.default_rng(0)
    values = np.abs(rng.normal(0, 1, 20_000))
    found = best_range(np.append(values, 40.0))
    assert found.zero == 0
    assert values.max() * 0.5 < found.high < 40
    both = best_range(rng.normal(-1, 2, 20_000))
    assert 0 < both.zero < 255


def test_float16_differs_by_its_rounding(tmp_path):
    path = made(tmp_path)
    model = write_fp16(simplified(path))
    onnx.save(model, tmp_path / "half.onnx")
    assert {w.data_type for w in model.graph.initializer} <= {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64}
    got, want = (session(p).run(["logits"], {"tiles": tiles(1).numpy()})[0] for p in (tmp_path / "half.onnx", path))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=0.03)
    assert not np.array_equal(got, want)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    path = made(folder)
    card = {
        "schema_version": 1,
        "name": "small",
        "version": "1.0",
        "task": "classify",
        "classes": [{"name": name} for name in CLASSES],
        "input": {"size_px": 96, "mpp": 1.0, "layout": "NHWC", "dtype": "uint8"},
        "outputs": {"scores": "logits", "cam": "cam"},
        "activation": "softmax",
        "output_stride_px": 32,
        "resources": [{"file": "m.onnx", "sha256": precisions.file_sha256(path)}],
        "licence": "Apache-2.0",
    }
    (folder / "card.json").write_text(json.dumps(card), encoding="utf-8")
    return folder


def sides(data):
    fields = [f for f in read_fields(data, ("ebhi",)) if f.label in CLASSES]
    return [f for f in fields if f.fold], [f for f in fields if not f.fold]


def test_what_it_costs_stands_on_the_card(model, tmp_path):
    said = []
    trained, held_out = sides(write_sets(tmp_path / "data", images=4))
    how = Training(iterations=2, batch=2, calibration=2)
    precisions.add_precisions(model, ["int8", "fp16"], trained, held_out, how=how, say=said.append)
    card = load_card(model / "card.json")
    check_files(card)
    facts = card.variants["int8"].facts
    assert (facts["images"], facts["cases"]) == (len(held_out), len({f.case for f in held_out}))
    assert 0 <= card.variants["int8"].agreement <= facts["tiles"]
    assert facts["loss_points_by_tile"] <= card.variants["int8"].loss_points
    assert (model / "m.int8.onnx").stat().st_size < 0.7 * (model / "m.onnx").stat().st_size
    assert open_runtime(card, "int8", device="cpu").card.model_path.name == "m.int8.onnx"
    assert card.at("fp32").model_path.name == "m.onnx"
    assert any("same answer on" in line for line in said)
    again = precisions.measure(card, "int8", held_out)
    assert again["agreement"] == card.variants["int8"].agreement


def test_a_format_can_be_measured_and_not_kept(model, tmp_path):
    trained, held_out = sides(write_sets(tmp_path / "data", images=4))
    before = load_card(model / "card.json")
    precisions.add_precisions(model, ["fp16"], trained, held_out, keep=False)
    card = load_card(model / "card.json")
    check_files(card)
    assert card.variants == {}
    assert card.resources == before.resources
    assert not (model / "m.fp16.onnx").exists()
    measured = card.precision["measured"]["fp16"]
    assert measured["images"] == len(held_out)
    assert measured["agreement"] > 0.5
    assert "file" not in measured


def test_what_cannot_be_quantised_gets_words(model, tmp_path):
    trained, held_out = sides(write_sets(tmp_path / "data"))
    with pytest.raises(WsiError, match="in training and in test"):
        precisions.add_precisions(model, ["fp16"], trained, trained)
    with pytest.raises(WsiError, match="there is no precision int4"):
        precisions.add_precisions(model, ["int4"], trained, held_out)
    with pytest.raises(WsiError, match="images to train on and 0 to measure on"):
        precisions.add_precisions(model, ["fp16"], trained, [])


def test_answers_differ_by_class_gate_and_doubt():
    probability = np.array([[0.9, 0.1], [0.45, 0.55], [0.9, 0.1]])
    gate, judged = np.array([0.9, 0.9, 0.1]), np.array([True, True, False])
    rows = Rows(("a", "b"), (), np.zeros(3, np.int64), probability, gate, judged, np.full(3, np.nan))
    assert predicted(rows, 0.6).tolist() == [0, 3, 2]
