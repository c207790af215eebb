"""Detectors of ordinary pictures: pixels as they are, whole images, grey and deep ones, and a second stage."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imagecodecs
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import tests.models.detectors as planted
from tests.models.detectors import Planted, build, paint
from tests.planted_slides import write
from wsiengine.errors import WsiError
from wsiengine.geometry import Box, Lattice, Mpp, Size
from wsiengine.grid import Block, TileGrid
from wsiengine.inference import infer
from wsiengine.models.integrity import file_sha256
from wsiengine.tasks.base import View
from wsiengine.tasks.detection import _checked_pixels
from wsiengine.wording import summary_words

SIZE = Size(101, 143)
MARKS = [("One", Box(10, 20, 26, 40), 250), ("Two", Box(90, 130, 101, 143), 200), ("One", Box(60, 57, 76, 70), 150)]


def png(path: Path, pixels: np.ndarray) -> Path:
    path.write_bytes(imagecodecs.png_encode(pixels))
    return path


def boxes(result: Any) -> list[tuple]:
    return sorted((a.class_name, *a.geometry.bounds) for a in result.annotations)


def drawn(marks: list[tuple[str, Box, int]]) -> list[tuple]:
    return sorted((name, *map(float, (b.x0, b.y0, b.x1, b.y1))) for name, b, _ in marks)


def test_a_picture_without_resolution_is_taken_as_it_is(tmp_path: Path) -> None:
    picture = png(tmp_path / "smear.png", paint(SIZE, MARKS))
    build(tmp_path / "m", Planted(mpp=None))
    events: list[Any] = []
    result = infer(picture, str(tmp_path / "m"), tmp_path / "out", device="cpu", listener=events.append)
    assert boxes(result) == drawn(MARKS)
    assert any("states no µm/px" in e.data["text"] for e in events if e.kind == "warning")
    assert {name for a in result.annotations for name in a.measurements} == {"Score", "Area px^2"}
    assert result.summary["density_per_mpx"] == {
        "One": pytest.approx(2e6 / SIZE.area, rel=1e-4),
        "Two": pytest.approx(1e6 / SIZE.area, rel=1e-4),
    }
    assert result.run["slide"]["mpp"] is None
    assert "tissue_mm2" not in result.summary


def test_the_same_picture_with_its_resolution(tmp_path: Path) -> None:
    picture = png(tmp_path / "smear.png", paint(SIZE, MARKS))
    build(tmp_path / "m", Planted(mpp=None))
    result = infer(picture, str(tmp_path / "m"), tmp_path / "out", device="cpu", mpp=200.0)  # as a mammogram has
    assert boxes(result) == drawn(MARKS)
    first = next(a for a in result.annotations if a.geometry.bounds[0] == 20)
    assert first.measurements["Area µm^2"] == 16 * 20 * 200**2
    assert result.summary["density_per_mm2"]["Two"] == pytest.approx(1 / (SIZE.area * 0.04), abs=1e-3)
    assert any("the whole picture is analysed" in text for text in result.run["warnings"])


def test_a_picture_smaller_than_a_tile_is_padded(tmp_path: Path) -> None:
    small = Size(41, 30)
    marks = [("One", Box(0, 0, 9, 9), 255), ("Two", Box(30, 20, 41, 30), 200)]
    picture = png(tmp_path / "small.png", paint(small, marks))
    build(tmp_path / "m", Planted(mpp=None, pad=0))
    result = infer(picture, str(tmp_path / "m"), tmp_path / "out", device="cpu")
    assert boxes(result) == drawn(marks)
    assert result.summary["tiles"] == 1


@pytest.mark.parametrize("pad", [None, 7])
def test_padding_has_the_value_of_the_card(tmp_path: Path, pad: int | None) -> None:
    """Beyond the picture alone: tile (1, 1) of a grid of 64 px over 101 × 143 begins at 32, 32 and ends at 96."""
    card = build(tmp_path / "m", Planted(mpp=None, pad=pad))
    grid = TileGrid.cover(Lattice(SIZE, Mpp.square(1), Mpp.square(1), 8), 64, 0.5)
    job = SimpleNamespace(runtime=SimpleNamespace(card=card), grid=grid)
    block = Block(Box(1, 2, 3, 4), np.ones((2, 2), bool))  # from row 32 and column 64 on
    pixels = np.full((96, 96, 3), 50, np.uint8)
    view = View(pixels, block.origins_px(grid) - (32, 64))
    seen = _checked_pixels(job, view, np.argwhere(block.wanted) + (1, 2))  # type: ignore[arg-type]
    expected = pixels.copy()
    if pad is not None:
        expected[101 - 32 :] = expected[:, 143 - 64 :] = pad
    assert np.array_equal(seen, expected)
    assert (pixels == 50).all()  # the block is another's, too


def test_a_whole_picture_is_shrunk_into_one_tile(tmp_path: Path) -> None:
    marks = [("One", Box(40, 80, 80, 120), 255), ("Two", Box(120, 160, 180, 240), 200)]
    picture = png(tmp_path / "large.png", paint(Size(200, 256), marks))
    build(
        tmp_path / "m",
        Planted(mpp=None, largest_px=60),
        top_input={"size_px": 64, "mpp": None, "whole": True, "layout": "NHWC", "dtype": "uint8"},
    )
    result = infer(picture, str(tmp_path / "m"), tmp_path / "out", device="cpu")
    assert result.summary["tiles"] == 1
    assert boxes(result) == drawn(marks)


def test_a_grey_model_refuses_colours_in_words(tmp_path: Path) -> None:
    picture = png(tmp_path / "colour.png", paint(SIZE, MARKS))
    build(tmp_path / "m", Planted(mpp=None, grey=True))
    with pytest.raises(WsiError, match="grey pictures") as caught:
        infer(picture, str(tmp_path / "m"), tmp_path / "out", device="cpu")
    assert "--normalise grey" in str(caught.value)


def test_a_deep_grey_picture_goes_through_its_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planted, "COLOURS", {"One": (200, 200), "Two": (90, 90)})
    deep = np.full(SIZE.shape, 1000, np.uint16)
    deep[10:26, 20:40] = 3212  # 200 / 255 of the window's 4095
    deep[90:, 130:] = 1445  # 90 / 255
    picture = png(tmp_path / "deep.png", deep)
    build(
        tmp_path / "m",
        Planted(mpp=None, grey=True, pad=0),
        minimum_score=0.1,
        show_score=0.1,
        top_recipe=[{"step": "window", "low": 0, "high": 4095}],
    )
    result = infer(picture, str(tmp_path / "m"), tmp_path / "out", device="cpu")
    assert boxes(result) == [("One", 20.0, 10.0, 40.0, 26.0), ("Two", 130.0, 90.0, 143.0, 101.0)]
    build(tmp_path / "n", Planted(mpp=None, grey=True))
    with pytest.raises(WsiError, match="16 bits"):
        infer(picture, str(tmp_path / "n"), tmp_path / "other", device="cpu")


@pytest.mark.parametrize("kind", ["P5", "P2", "P5 deep"])
def test_netpbm_pictures(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planted, "COLOURS", {"One": (200, 200), "Two": (90, 90)})
    grey = np.full(SIZE.shape, 40, np.uint8)
    grey[10:26, 20:40] = 200
    head = f"{kind[:2]}\n# a comment\n{SIZE.width} {SIZE.height}\n{65535 if 'deep' in kind else 255}\n".encode()
    body = {
        "P5": grey.tobytes(),
        "P2": " ".join(map(str, grey.ravel())).encode(),
        "P5 deep": (grey.astype(np.uint16) * 257).astype(">u2").tobytes(),
    }[kind]
    picture = tmp_path / "mammogram.pgm"
    picture.write_bytes(head + body)
    build(
        tmp_path / "m", Planted(mpp=None, grey=True, pad=0), top_recipe=[{"step": "window"}] if "deep" in kind else []
    )
    result = infer(picture, str(tmp_path / "m"), tmp_path / "out", device="cpu")
    assert boxes(result) == [("One", 20.0, 10.0, 40.0, 26.0)]
    picture.write_bytes((head + body)[:-3000])
    with pytest.raises(WsiError, match="cannot be decoded: it announces"):
        infer(picture, str(tmp_path / "m"), tmp_path / "other", device="cpu")


def test_a_card_may_ask_for_the_breast(tmp_path: Path) -> None:
    """What lies in the breast is found, what lies on a label beside it is not, though it is drawn the same."""
    pixels = np.full((300, 260, 3), 20, np.uint8)
    pixels[40:260, :150] = 130
    pixels[5:25, 200:230] = 210
    marks = [("One", Box(100, 60, 112, 74), 250), ("One", Box(8, 205, 20, 219), 250)]
    for name, box, score in marks:
        pixels[box.slices] = (*planted.COLOURS[name], score)
    picture = png(tmp_path / "mammogram.png", pixels)
    build(tmp_path / "m", Planted(mpp=None), top_tissue="breast")
    result = infer(picture, str(tmp_path / "m"), tmp_path / "out", device="cpu", mpp=200.0)
    assert boxes(result) == drawn(marks[:1])
    assert not any("whole picture" in text for text in result.run["warnings"])
    whole = infer(picture, str(tmp_path / "m"), tmp_path / "o2", device="cpu", mpp=200.0, tissue="none")
    assert boxes(whole) == drawn(marks)
    build(tmp_path / "n", Planted(mpp=None))
    asked = infer(picture, str(tmp_path / "n"), tmp_path / "o3", device="cpu", mpp=200.0, tissue="breast")
    assert boxes(asked) == drawn(marks[:1])


# --- a second stage ------------------------------------------------------------------------------


def classifier(path: Path, *, rows: int = 1) -> None:
    """Scores of a crop: its mean red, green and blue as fractions; features: the same and the blue of its middle."""
    side = 24
    nodes = [
        helper.make_node("Cast", ["crop"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["x", "full"], ["part"]),
        helper.make_node("ReduceMean", ["part"], ["mean"], axes=[1, 2], keepdims=0),
        helper.make_node("Slice", ["part", "from", "to", "axes"], ["middle"]),
        helper.make_node("Reshape", ["middle", "row"], ["blue"]),
        helper.make_node("Concat", ["mean", "blue"], ["features"], axis=1),
        helper.make_node("Concat", ["mean"] * rows, ["scores"], axis=0),
    ]
    constants = {
        "full": np.float32(255),
        "from": np.array([side // 2, side // 2, 2]),
        "to": np.array([side // 2 + 1, side // 2 + 1, 3]),
        "axes": np.array([1, 2, 3]),
        "row": np.array([1, 1]),
    }
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("scores", "features")]
    crop = helper.make_tensor_value_info("crop", TensorProto.UINT8, [1, side, side, 3])
    initial = [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()]
    graph = helper.make_graph(nodes, "types", [crop], ends, initial)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString(deterministic=True))


def boosting(path: Path) -> None:
    """One tree on the fourth feature: above 0.7 it is abnormal, by 0.9."""
    node = helper.make_node(
        "TreeEnsembleClassifier",
        ["rows"],
        ["label", "probabilities"],
        domain="ai.onnx.ml",
        nodes_treeids=[0, 0, 0],
        nodes_nodeids=[0, 1, 2],
        nodes_featureids=[3, 0, 0],
        nodes_modes=["BRANCH_LEQ", "LEAF", "LEAF"],
        nodes_values=[0.7, 0.0, 0.0],
        nodes_truenodeids=[1, 0, 0],
        nodes_falsenodeids=[2, 0, 0],
        class_treeids=[0, 0, 0, 0],
        class_nodeids=[1, 1, 2, 2],
        class_ids=[0, 1, 0, 1],
        class_weights=[0.8, 0.2, 0.1, 0.9],
        classlabels_int64s=[0, 1],
        post_transform="NONE",
    )
    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, [None, 4])
    ends = [
        helper.make_tensor_value_info("label", TensorProto.INT64, None),
        helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, None),
    ]
    graph = helper.make_graph([node], "boost", [rows], ends)
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx_model = helper.make_model(graph, opset_imports=domains, ir_version=8)
    path.write_bytes(onnx_model.SerializeToString(deterministic=True))


def two_stages(folder: Path, *, rows: int = 1, largest_px: float = 20.0) -> None:
    folder.mkdir()
    classifier(folder / "types.onnx", rows=rows)
    boosting(folder / "boost.onnx")
    second = {
        "file": "types.onnx",
        "crop": {"side_px": 24},
        "input": {"size_px": 24, "mpp": None, "layout": "NHWC", "dtype": "uint8"},
        "outputs": {"scores": "scores", "features": "features"},
        "classes": [{"name": "Reddish"}, {"name": "Greenish"}, {"name": "Bluish"}],
        "activation": "identity",
        "threshold": 0.6,
        "head": {
            "file": "boost.onnx",
            "scores": "probabilities",
            "classes": [{"name": "Normal", "colour": [0, 158, 115]}, {"name": "Abnormal", "colour": [213, 94, 0]}],
            "assigns": True,
        },
    }
    build(folder, Planted(largest_px=largest_px), top_second=second)


def test_two_stages_label_every_object(tmp_path: Path) -> None:
    pixels = paint(SIZE, MARKS)
    slide = write(tmp_path / "s.tiff", pixels, 1.0)
    two_stages(tmp_path / "m")
    result = infer(slide, str(tmp_path / "m"), tmp_path / "out", tissue="none", device="cpu", block_tiles=1, threads=1)
    white = np.full((SIZE.height + 48, SIZE.width + 48, 3), 255, np.uint8)
    white[24:-24, 24:-24] = pixels
    assert len(result.annotations) == len(MARKS)
    for annotation in result.annotations:
        x0, y0, x1, y1 = annotation.geometry.bounds
        y, x = (int(np.floor((a + b) / 2 - 12 + 0.5)) + 24 for a, b in ((y0, y1), (x0, x1)))
        crop = white[y : y + 24, x : x + 24] / 255
        told = [annotation.measurements[f"Probability {n}"] for n in ("Reddish", "Greenish", "Bluish")]
        assert told == pytest.approx(crop.mean(axis=(0, 1)).tolist(), abs=1e-5)
        abnormal = crop[12, 12, 2] > 0.7
        assert annotation.class_name == ("Abnormal" if abnormal else "Normal")
        assert annotation.measurements["Probability Abnormal"] == pytest.approx(0.9 if abnormal else 0.2)
    assert result.summary["objects"] == {"Normal": 1, "Abnormal": 2}
    assert set(result.summary["labels"]) == {"Reddish", "Greenish", "Bluish"}
    again = infer(slide, str(tmp_path / "m"), tmp_path / "o2", tissue="none", device="cpu", block_tiles=8, threads=3)
    assert (tmp_path / "o2/annotations.geojson").read_bytes() == (tmp_path / "out/annotations.geojson").read_bytes()
    assert again.summary == result.summary


def test_tiles_overlap_by_a_crop_where_it_is_larger(tmp_path: Path) -> None:
    slide = write(tmp_path / "s.tiff", paint(SIZE, MARKS), 1.0)
    two_stages(tmp_path / "m", largest_px=8.0)
    result = infer(slide, str(tmp_path / "m"), tmp_path / "out", tissue="none", device="cpu", overlap=0.1)
    assert result.run["plan"]["overlap_used"] == 0.5  # 24 px and a cell of 8


def test_a_second_stage_runs_where_the_first_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU the session of a crop's classifier asks for just what the detector's session has."""
    from wsiengine.models import ort
    from wsiengine.models.card import load_card
    from wsiengine.models.runtime import Runtime

    asked: dict[str, list] = {}
    original = ort._session

    def noted(ort: Any, card: Any, wanted: list, path: Any = None) -> Any:
        asked[(path or card.model_path).name] = wanted
        return original(ort, card, wanted, path)

    monkeypatch.setattr(ort, "_session", noted)
    two_stages(tmp_path / "m")
    first = Runtime(load_card(tmp_path / "m" / "card.json"), device="cpu")._session
    options = first.get_provider_options()
    assert asked.keys() == {"planted.onnx", "types.onnx", "boost.onnx"}
    assert asked["types.onnx"] == asked["boost.onnx"] == [(p, options[p]) for p in first.get_providers()]


def test_a_second_stage_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    slide = write(tmp_path / "s.tiff", paint(SIZE, MARKS), 1.0)
    two_stages(tmp_path / "m", rows=2)
    with pytest.raises(WsiError, match=r"needs \(1, 3\)"):
        infer(slide, str(tmp_path / "m"), tmp_path / "out", tissue="none", device="cpu")
    two_stages(tmp_path / "n")
    boost = tmp_path / "n" / "boost.onnx"
    boost.write_bytes(boost.read_bytes() + b" ")
    assert file_sha256(boost)
    with pytest.raises(WsiError, match=r"boost\.onnx"):
        infer(slide, str(tmp_path / "n"), tmp_path / "out", tissue="none", device="cpu")


def test_sparse_objects_keep_their_density(tmp_path: Path) -> None:
    """One mass on a mammogram is 5e-5 per mm²: not 0, and no number for a sentence."""
    picture = png(tmp_path / "p.png", paint(SIZE, MARKS[:1]))
    build(tmp_path / "m", Planted(mpp=None))
    summary = infer(picture, str(tmp_path / "m"), tmp_path / "out", device="cpu", mpp=200.0).summary
    assert summary["density_per_mm2"]["One"] == pytest.approx(1 / (SIZE.area * 0.04), rel=0.01)
    assert summary_words(summary).startswith("1 One")
    assert "per mm²" not in summary_words(summary)
