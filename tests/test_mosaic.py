"""Mosaics whose true classes are known everywhere: what the exported polygons say, against what was laid down.

An oracle, which tells the zones by colour, shows the geometry of the engine: any loss is the engine's. crc5 on fields
that it never saw shows the whole path on real tissue; its floors are modest, the figures are printed.
"""

from pathlib import Path

import numpy as np
import onnx
import pytest
import shapely
from onnx import TensorProto, helper, numpy_helper

from tests.data import data_dir
from tests.models.tiny import write_card
from tests.mosaics import CLASSES, MosaicPlan, Truth, _zones, mosaic_size, mosaic_slide
from tests.qupath_rules import check
from wsiengine import Result, infer
from wsiengine.models.integrity import file_sha256
from wsiengine.slides.pyramid import PyramidLayout, write_pyramid
from wsiengine.slides.whole import WholeSlide

TILE_UM = 224.0
COLOURS = {"normal": (205, 65, 60), "adenoma": (70, 200, 75), "adenocarcinoma": (60, 75, 210)}
NAMES = {"normal": "Normal", "adenoma": "Adenoma", "adenocarcinoma": "Adenocarcinoma"}
PLAN = MosaicPlan(mpp=0.5)


def _area_of(truth: Truth, label: str, margin_um: float = 0.0) -> shapely.Geometry:
    """The zones of a class, each shrunk by a margin, in level-0 pixels."""
    boxes = [z.box_l0 for z in truth.zones if z.label == label]
    margin = margin_um / truth.mpp
    return shapely.union_all([shapely.box(b.x0, b.y0, b.x1, b.y1).buffer(-margin, join_style="mitre") for b in boxes])


def _found(result: Result, label: str) -> shapely.Geometry:
    return shapely.union_all([a.geometry for a in result.annotations if a.class_name == NAMES[label]])


def ious(result: Result, truth: Truth, margin_um: float = 0.0) -> dict[str, float]:
    """Intersection over union per class; with a margin, of what lies farther than that from every zone's edge."""
    labels = sorted({zone.label for zone in truth.zones}, key=CLASSES.index)
    inner = shapely.union_all([_area_of(truth, label, margin_um) for label in labels]) if margin_um else None
    scores = {}
    for label in labels:
        true, found = _area_of(truth, label, margin_um), _found(result, label)
        if inner is not None:
            found = shapely.intersection(found, inner)
        scores[label] = true.intersection(found).area / true.union(found).area
    return scores


def offsets_um(result: Result, truth: Truth) -> dict[str, tuple[float, float]]:
    """How far the centre of each class's area lies from where it should, (y, x) in µm."""
    moved = {}
    for label in sorted({zone.label for zone in truth.zones}):
        true, found = _area_of(truth, label).centroid, _found(result, label).centroid
        moved[label] = ((found.y - true.y) * truth.mpp, (found.x - true.x) * truth.mpp)
    return moved


# --- the oracle ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that knows the zones by colour.

    Scores are the shares of the tile that are mostly red, green and blue: linear, so that the place of an edge inside a
    tile tells in the blended map. The gate is the share that has any colour.
    """
    folder = tmp_path_factory.mktemp("oracle")
    constants = {
        "middle": np.array([1, 2], np.int64),
        "channel": np.array([3], np.int64),
        "last": np.array([1], np.int64),
        "least": np.float32(70),
    }
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMin", ["f", "channel"], ["low"], keepdims=1),
        helper.make_node("Sub", ["f", "low"], ["above"]),  # 0 in grey
        helper.make_node("Greater", ["above", "least"], ["mostly"]),
        helper.make_node("Cast", ["mostly"], ["one"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["one", "middle"], ["shares"], keepdims=0),
        helper.make_node("ReduceSum", ["shares", "last"], ["gate"], keepdims=1),
    ]
    graph = helper.make_graph(
        nodes,
        "oracle",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, ["n", 224, 224, 3])],
        [
            helper.make_tensor_value_info("shares", TensorProto.FLOAT, ["n", 3]),
            helper.make_tensor_value_info("gate", TensorProto.FLOAT, ["n", 1]),
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), folder / "o.onnx")
    card = {
        "schema_version": 1,
        "name": "oracle",
        "version": "1.0",
        "task": "classify",
        "classes": [{"name": NAMES[label], "colour": list(COLOURS[label])} for label in COLOURS],
        "input": {"size_px": 224, "mpp": 1.0, "layout": "NHWC", "dtype": "uint8"},
        "outputs": {"scores": "shares", "gate": "gate"},
        "activation": "identity",
        "output_stride_px": 32,
        "gate": {"minimum": 0.5, "otherwise": "Nothing"},
        "resources": [{"file": "o.onnx", "sha256": file_sha256(folder / "o.onnx")}],
        "licence": "Apache-2.0",
    }
    write_card(folder, card)
    return str(folder)


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    """The zones of a mosaic as speckled colours, no multiple of anything long, on glass."""
    size = mosaic_size(PLAN, 1, 3)
    truth = Truth(size, PLAN.mpp, tuple(_zones(size, PLAN, tuple(COLOURS))))

    def rows(y0: int, y1: int) -> np.ndarray:
        canvas = np.full((y1 - y0, size.width, 3), 244, np.uint8)
        for zone in truth.zones:
            top, bottom = max(zone.box_l0.y0, y0), min(zone.box_l0.y1, y1)
            if top < bottom:
                y, x = np.mgrid[top:bottom, zone.box_l0.x0 : zone.box_l0.x1]
                speckle = ((y * 31 + x * 17) % 29).astype(np.uint8)[..., None]
                part = canvas[top - y0 : bottom - y0, zone.box_l0.x0 : zone.box_l0.x1]
                part[:] = np.array(COLOURS[zone.label], np.uint8) + speckle
        return canvas

    path = tmp_path_factory.mktemp("coloured") / "zones.svs"
    write_pyramid(path, rows, size, PLAN.mpp, PyramidLayout(downsamples=(1, 4)))
    return path, truth


# Without overlap an edge lies where a tile ends; with it, in the cell where the tiles on both sides balance. Corners of
# zones are rounded by about a tenth of a tile. Measured: 0.847, 0.963, 0.965 and 76, 5, 16 µm.
@pytest.mark.parametrize(("overlap", "floor", "off_um"), [(0.0, 0.83, 112), (0.3, 0.955, 8), (0.57, 0.955, 24)])
def test_an_oracle_gives_the_zones_back(
    oracle: str, coloured: tuple[Path, Truth], tmp_path: Path, overlap: float, floor: float, off_um: float
) -> None:
    path, truth = coloured
    result = infer(path, oracle, tmp_path / "out", tissue="none", overlap=overlap)
    assert min(ious(result, truth).values()) > floor
    assert min(ious(result, truth, TILE_UM).values()) > 0.9999
    assert max(abs(v) for pair in offsets_um(result, truth).values() for v in pair) < off_um


@pytest.mark.parametrize(("dy_px", "dx_px"), [(0, 32), (-32, 0)])
def test_a_shift_by_one_cell_is_seen(
    oracle: str,
    coloured: tuple[Path, Truth],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dy_px: int,
    dx_px: int,
) -> None:
    path, truth = coloured
    original = WholeSlide.read
    monkeypatch.setattr(WholeSlide, "read", lambda self, box, mpp: original(self, box.shift(dy_px, dx_px), mpp))
    result = infer(path, oracle, tmp_path / "out", tissue="none")
    assert min(ious(result, truth).values()) < 0.953
    assert max(abs(v) for pair in offsets_um(result, truth).values() for v in pair) > 24


# --- real fields ---------------------------------------------------------------------------------


# Least IoU of a class, with and without a tile's margin; measured with crc5 1.0: 0.85 and 0.90, 0.47 and 0.45.
@pytest.mark.parametrize(("source", "floor", "inner_floor"), [("ebhi", 0.6, 0.65), ("glas", 0.2, 0.2)])
def test_crc5_on_fields_that_it_never_saw(source: str, floor: float, inner_floor: float, tmp_path: Path) -> None:
    plan = MosaicPlan(source, 0.5, fold=0)
    truth = mosaic_slide(tmp_path / "m.svs", mosaic_size(plan, 1, 3), plan, data_dir())
    result = infer(tmp_path / "m.svs", "crc5", tmp_path / "out")
    whole, inner = ious(result, truth), ious(result, truth, TILE_UM)
    print(f"{source}: " + " · ".join(f"{label} {whole[label]:.2f}, inner {inner[label]:.2f}" for label in whole))
    assert min(whole.values()) > floor
    assert min(inner.values()) > inner_floor
    zones_mm2 = sum(_area_of(truth, label).area for label in whole) * truth.mpp**2 / 1e6
    assert result.summary["analysed_mm2"] == pytest.approx(zones_mm2, rel=0.05)  # the glass between them is left out
    assert check(tmp_path / "out" / "annotations.geojson") == []


def test_planted_finds_nothing_in_tissue(tmp_path: Path) -> None:
    plan = MosaicPlan("glas", 0.5, fold=0, zone_um=900)
    truth = mosaic_slide(tmp_path / "m.svs", mosaic_size(plan, 1, 3), plan, data_dir())
    result = infer(tmp_path / "m.svs", "planted", tmp_path / "out", tissue="none")
    assert set(result.summary["area_mm2"]) == {"No mark"}
    assert result.summary["analysed_mm2"] == pytest.approx(truth.size_l0.area * truth.mpp**2 / 1e6)
