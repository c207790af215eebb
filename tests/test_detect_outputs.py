"""What is made of a detector's objects: outlines, files that QuPath takes, ids, the overlay."""

from pathlib import Path

import numpy as np
import pytest
import shapely

from benchmarks.detect import SIDE_PX, made_up
from tests.fakes import ArraySlide
from tests.qupath_rules import check
from wsiengine.finishing import Finish
from wsiengine.geometry import Lattice, Mpp, Size
from wsiengine.grid import TileGrid
from wsiengine.merging import merge
from wsiengine.models.detection import Detection
from wsiengine.object_outputs import ObjectAnnotations, outlines_l0
from wsiengine.object_overlay import _write, draw_objects
from wsiengine.objects import Objects
from wsiengine.qupath import FileLimits, read_geojson, write_geojson
from wsiengine.report import draw_overlay
from wsiengine.tasks.detect import DetectLayout
from wsiengine.truth import Truth
from wsikernels.masks import cut_masks

COLOURS = ((213, 94, 0), (0, 158, 115), (86, 180, 233))


def shown(objects: Objects, grid: TileGrid, threshold: float = 0.0) -> ObjectAnnotations:
    layout = DetectLayout(("A", "B", "C"), COLOURS, ((0,), (1,), (2,)), "identity")
    arrays = {f"object_{name}": column for name, column in objects.columns().items()}
    arrays |= {"ran": np.ones(grid.shape, np.uint8), "calibrated": np.ones(1, np.uint8)}
    analysed = np.ones(grid.lattice.extent_cells.shape, bool)
    truth = Truth(layout, grid, arrays, analysed, "slide", "run", task_name="detect")
    return ObjectAnnotations.of(truth, Finish(threshold))


@pytest.fixture(scope="module", params=[False, True], ids=["boxes", "outlines"])
def many(request: pytest.FixtureRequest) -> ObjectAnnotations:
    lattice = Lattice(Size(SIDE_PX, SIDE_PX), Mpp.square(0.5), Mpp.square(0.5), 16)
    grid = TileGrid.cover(lattice, 512, 0.125)
    return shown(merge(made_up(6000, request.param, grid), Detection(largest_px=30), grid), grid)


def test_files_are_valid_and_split(many: ObjectAnnotations, tmp_path: Path) -> None:
    path = tmp_path / "annotations.geojson"
    parts = write_geojson(many, path, limits=FileLimits(objects=2500))
    assert [p.name for p in parts] == [
        "annotations.geojson",
        "annotations.part2.geojson",
        "annotations.part3.geojson",
    ]
    assert [problem for p in parts for problem in check(p)] == []
    back = read_geojson(path)
    assert len(back) == len(many) > 5500
    assert len({a.id for a in back}) == len(back)
    assert [a.id for a in back[4000:4003]] == [many[k].id for k in range(4000, 4003)]
    assert {a.object_type for a in back} == {"detection"}


def test_one_of_many_is_the_one_of_the_list(many: ObjectAnnotations) -> None:
    listed = list(many)
    assert many[1234].geometry.equals(listed[1234].geometry)
    assert [a.id for a in many[10:12]] == [a.id for a in listed[10:12]]
    assert many[-1].measurements == listed[-1].measurements
    less = shown(many.objects, TileGrid.cover(many.lattice, 512, 0.125), threshold=0.5)
    assert {a.id for a in less} < {a.id for a in listed}  # a filter renames nobody


def blob(height: int, width: int, holes: bool) -> np.ndarray:
    y, x = np.mgrid[:height, :width] + 0.5
    mask = (2 * y / height - 1) ** 2 + (2 * x / width - 1) ** 2 <= 1
    if holes:
        mask[height // 2, width // 2] = False
    return mask


def test_outlines_follow_their_masks() -> None:
    frames = np.array([[5, 7, 35, 50], [100, 9, 120, 29], [40, 60, 41, 61], [200, 300, 260, 330]], np.int32)
    masks = [blob(*(f[2:] - f[:2]).tolist(), holes=k == 1) for k, f in enumerate(frames)]
    masks[3][20:30] = False  # in two pieces
    canvas = np.zeros((4, 400, 400), bool)
    for k, (y0, x0, y1, x1) in enumerate(frames):
        canvas[k, y0:y1, x0:x1] = masks[k]
    objects = Objects(
        frames.astype(np.float64),
        np.full(4, 0.5, np.float32),
        np.zeros(4, np.uint16),
        np.zeros(4, np.int64),
        np.zeros(4, np.uint8),
        np.empty((4, 0), np.float32),
        frames,
        cut_masks(canvas, frames),
    )
    lattice = Lattice(Size(800, 1200), Mpp.square(0.5), Mpp(1.0, 1.5), 16)  # two and three level-0 pixels a pixel
    outlines = outlines_l0(objects, lattice)
    assert [g.geom_type for g in outlines] == ["Polygon", "Polygon", "Polygon", "MultiPolygon"]
    assert len(outlines[1].interiors) == 1
    for k, outline in enumerate(outlines):
        assert outline.is_valid
        assert outline.area == pytest.approx(canvas[k].sum() * 6, rel=0.03)
        rows, cols = np.nonzero(canvas[k])
        inside = shapely.contains_xy(outline, (cols + 0.5) * 3, (rows + 0.5) * 2)
        assert inside.mean() > 0.97
        y0, x0, y1, x1 = frames[k]
        assert np.abs(np.array(outline.bounds) - [x0 * 3, y0 * 2, x1 * 3, y1 * 2]).max() <= 1.6


def test_the_overlay_shows_class_and_confidence(tmp_path: Path) -> None:
    lattice = Lattice(Size(1000, 1400), Mpp.square(0.5), Mpp.square(0.5), 16)
    grid = TileGrid.cover(lattice, 512, 0.125)
    boxes = np.array([[100, 100, 300, 300], [100, 600, 300, 800], [600, 1000, 601, 1001]], np.float64)
    objects = Objects(
        boxes,
        np.array([1.0, 0.1, 1.0], np.float32),
        np.array([0, 0, 1], np.uint16),
        np.zeros(3, np.int64),
        np.zeros(3, np.uint8),
        np.empty((3, 0), np.float32),
        np.empty((0, 4), np.int32),
        np.empty(0, np.uint8),
    )
    slide = ArraySlide(np.full((1000, 1400, 3), 200, np.uint8), mpp=Mpp.square(0.5))
    draw_overlay(slide, shown(objects, grid), tmp_path / "a.png", title="objects")
    import cv2

    page = cv2.imread(str(tmp_path / "a.png"))[..., ::-1].astype(int)
    sure = np.abs(page - COLOURS[0]).sum(axis=2) < 12
    assert sure.sum() > 1200  # the first box's lines; of the second, faint, only the legend's square looks like it
    faint = np.array([200, 200, 200]) * 0.585 + np.array(COLOURS[0]) * 0.415
    assert (np.abs(page - faint).sum(axis=2) < 12).sum() > 1200
    assert (np.abs(page - COLOURS[1]).sum(axis=2) < 12).sum() > 100  # legend, and a dot
    draw_overlay(slide, shown(objects, grid), tmp_path / "b.png", title="objects", calibrated=False)
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()  # a bar in pixels


def drawn_on(
    frames: list[list[int]], scores: list[float], kinds: list[int], *, outlined: bool, line_px: int = 2
) -> np.ndarray:
    """Objects on grey of 200, a pixel of the picture for one of the slide."""
    boxes = np.array(frames, np.int32)
    masks = np.zeros((len(boxes), 300, 400), bool)
    for mask, (y0, x0, y1, x1) in zip(masks, frames, strict=True):
        mask[y0:y1, x0:x1] = blob(y1 - y0, x1 - x0, holes=False)
    objects = Objects(
        boxes.astype(np.float64),
        np.array(scores, np.float32),
        np.array(kinds, np.uint16),
        np.zeros(len(boxes), np.int64),
        np.zeros(len(boxes), np.uint8),
        np.empty((len(boxes), 0), np.float32),
        boxes if outlined else np.empty((0, 4), np.int32),
        cut_masks(masks, boxes) if outlined else np.empty(0, np.uint8),
    )
    size = Size(300, 400)
    grid = TileGrid.cover(Lattice(size, Mpp.square(0.5), Mpp.square(0.5), 16), 512, 0.125)
    canvas = np.full((300, 400, 3), 200, np.uint8)
    draw_objects(canvas, shown(objects, grid), size, line_px)
    return canvas


def test_what_two_outlines_share_is_tinted_like_the_rest() -> None:
    canvas = drawn_on([[50, 50, 150, 150], [50, 90, 150, 190]], [0.9, 0.9], [0, 0], outlined=True)
    tint = np.rint(np.array([200, 200, 200]) * 0.72 + np.array(COLOURS[0]) * 0.28)
    for x in (70, 120, 170):  # in the first, in both, in the second
        assert np.abs(canvas[100, x] - tint).max() <= 1
    assert (canvas[20, 20] == 200).all()


@pytest.mark.parametrize("outlined", [False, True])
@pytest.mark.parametrize("kinds", [[0, 2], [2, 0]])
def test_the_surer_lies_over_the_other(kinds: list[int], outlined: bool) -> None:
    """Whichever comes first by place or class, where a frame of either crosses the other's."""
    canvas = drawn_on([[60, 50, 160, 200], [110, 120, 210, 300]], [1.0, 0.3], kinds, outlined=outlined)
    assert (canvas[110, 199] == COLOURS[kinds[0]]).all()  # on the first's right and the second's upper line


def test_lines_leave_small_objects_to_be_seen() -> None:
    canvas = drawn_on([[50, 50, 70, 70], [100, 100, 200, 200]], [1.0, 1.0], [0, 1], outlined=False, line_px=6)
    assert (canvas[60, 53:67] == 200).all()  # a cell of 20 px, its line of 2
    assert (canvas[150, 102] == COLOURS[1]).all()  # 6 wide, half of it inside
    assert (canvas[150, 105:195] == 200).all()


@pytest.mark.parametrize("text", ["0.79", "0.95", "1.00"])
def test_every_letter_of_a_score_stands_in_its_rim(text: str) -> None:
    tissue = (214, 160, 196)
    canvas = np.full((40, 80, 3), tissue, np.uint8)
    _write(canvas, text, (25, 10))
    dark = (canvas < 60).all(axis=2)
    assert dark.sum() > 20
    rows, cols = np.nonzero(dark)
    for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):  # beside a letter is a letter or its rim, never the tissue
        assert not (canvas[rows + dy, cols + dx] == tissue).all(axis=1).any()
    light = np.nonzero((canvas > 220).all(axis=2))
    for of, ink in zip(light, (rows, cols), strict=True):
        assert of.min() < ink.min()
        assert of.max() > ink.max()
