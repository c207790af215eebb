"""Candidates of overlapping tiles → objects of the slide: each once, wherever tile borders fall."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsiengine.decoding import Found, candidates
from wsiengine.geometry import Lattice, Mpp, Size
from wsiengine.grid import TileGrid
from wsiengine.merging import merge
from wsiengine.models.card import Card, parse_card
from wsiengine.models.detection import Merge
from wsiengine.objects import LEFT, RIGHT, Objects, joined, objects_from_bytes
from wsiengine.tasks.detect import tile_view

CELL = 8
SIZE = Size(347, 421)


def card(*, side: int = 96, masks: str | None = None, **merging: object) -> Card:
    data = {
        "schema_version": 1,
        "name": "drawn",
        "version": "1",
        "task": "detect",
        "classes": [{"name": "One"}, {"name": "Two"}],
        "input": {"size_px": side, "mpp": 1.0, "layout": "NHWC", "dtype": "uint8"},
        "outputs": {"boxes": "b", "scores": "s", "labels": "l", **({"masks": "m"} if masks else {})},
        "activation": "identity",
        "output_stride_px": CELL,
        "detection": {"largest_px": 20, "masks": masks, "merge": merging},
        "resources": [{"file": "drawn.onnx", "sha256": "0" * 64}],
        "licence": "MIT",
    }
    return parse_card(data, "")


def grid_of(side: int, overlap: int) -> TileGrid:
    lattice = Lattice(SIZE, Mpp.square(1), Mpp.square(1), CELL)
    return TileGrid.cover(lattice, side, overlap / side)


def look(marks: np.ndarray, grid: TileGrid, model: Card, shape: str = "box") -> Objects:
    """What a perfect detector sees: in each tile the visible part of every mark, boxes and masks exact.

    Args:
        marks: (n, 5) whole numbers y0, x0, y1, x1, label.
    """
    wanted = np.ones(grid.shape, bool)
    found = []
    for row, col in np.ndindex(*grid.shape):
        view = tile_view(grid, wanted, row, col)
        corner = np.array([view.y, view.x, view.y, view.x])
        boxes = np.clip(marks[:, :4] - corner, 0, grid.tile_px)
        seen = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(axis=1))
        scores = (0.9 - 0.001 * seen).astype(np.float32)
        masks = None
        if model.outputs.masks:
            masks = np.stack([draw(marks[k], shape, view.y, view.x, grid.tile_px) for k in seen]) if len(seen) else None
            masks = np.empty((0, 1, 1), bool) if masks is None else masks
        found.append(candidates(Found(boxes[seen].astype(float), scores, marks[seen, 4], masks), view, model))
    return joined(found)


def draw(mark: np.ndarray, shape: str, y: int, x: int, side: int) -> np.ndarray:
    rows, cols = np.mgrid[y : y + side, x : x + side] + 0.5
    y0, x0, y1, x1 = mark[:4]
    if shape == "box":
        return (rows > y0) & (rows < y1) & (cols > x0) & (cols < x1)
    high, wide = (y1 - y0) / 2, (x1 - x0) / 2
    return ((rows - y0 - high) / high) ** 2 + ((cols - x0 - wide) / wide) ** 2 <= 1


def boxes_of(objects: Objects) -> list[tuple]:
    return sorted((*box, int(label)) for box, label in zip(objects.boxes.tolist(), objects.labels, strict=True))


@st.composite
def drawings(draw_: st.DrawFn, most: int) -> np.ndarray:
    """Marks of up to ``most`` pixels in cells of a raster, so that they never overlap but may touch."""
    pitch = most
    places = [(y, x) for y in range(0, SIZE.height, pitch) for x in range(0, SIZE.width, pitch)]
    chosen = draw_(st.lists(st.sampled_from(places), min_size=1, max_size=25, unique=True))
    marks = []
    for y, x in chosen:
        bottom, right = min(y + pitch, SIZE.height), min(x + pitch, SIZE.width)
        y0, x0 = draw_(st.integers(y, bottom - 2)), draw_(st.integers(x, right - 2))
        y1, x1 = draw_(st.integers(y0 + 2, bottom)), draw_(st.integers(x0 + 2, right))
        marks.append((y0, x0, y1, x1, draw_(st.integers(0, 1))))
    return np.array(marks)


@given(
    marks=st.sampled_from([24, 40]).flatmap(drawings),
    side=st.sampled_from([64, 96, 128]),
    overlap=st.sampled_from([40, 48]),
    masks=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_marks_up_to_the_overlap_come_back_exactly(marks: np.ndarray, side: int, overlap: int, masks: bool) -> None:
    model = card(side=side, masks="full" if masks else None)
    grid = grid_of(side, overlap)
    objects = merge(look(marks, grid, model), model.detection, grid)
    assert boxes_of(objects) == sorted(tuple(float(v) for v in m[:4]) + (m[4],) for m in marks.tolist())
    assert not objects.cut.any()


def test_marks_as_long_as_the_overlap_at_a_border_are_whole() -> None:
    grid, model = grid_of(96, 40), card()
    stride = grid.stride_px
    marks = np.array([[stride, stride, stride + 40, stride + 40, 0], [2 * stride, 8, 2 * stride + 40, 48, 1]])
    objects = merge(look(marks, grid, model), model.detection, grid)
    assert boxes_of(objects) == [tuple(float(v) for v in m[:4]) + (m[4],) for m in marks.tolist()]
    assert not objects.cut.any()


@pytest.mark.parametrize("shape", ["box", "ellipse"])
def test_large_marks_with_masks_come_back_whole(shape: str) -> None:
    grid, model = grid_of(96, 40), card(masks="full")
    marks = np.array([[5, 9, 300, 311, 0], [310, 60, 340, 400, 1], [20, 330, 290, 412, 1]])
    objects = merge(look(marks, grid, model, shape), model.detection, grid)
    assert boxes_of(objects) == sorted(tuple(float(v) for v in m[:4]) + (m[4],) for m in marks.tolist())
    assert not objects.cut.any()
    starts = objects.starts()
    for k, label in enumerate(objects.labels):
        y0, x0, y1, x1 = objects.frames[k].tolist()
        bits = np.unpackbits(objects.bits[starts[k] : starts[k + 1]], count=(y1 - y0) * (x1 - x0))
        [mark] = [m for m in marks if m[0] == y0 and m[1] == x0 and m[4] == label]
        whole = draw(mark, shape, 0, 0, 421)[y0:y1, x0:x1]
        assert np.array_equal(bits.reshape(whole.shape).astype(bool), whole)


def test_large_marks_without_masks_are_marked_as_cut() -> None:
    grid, model = grid_of(96, 40), card()
    marks = np.array([[5, 9, 300, 311, 0], [310, 60, 330, 80, 1]])
    objects = merge(look(marks, grid, model), model.detection, grid)
    assert boxes_of(objects) == [(5.0, 9.0, 300.0, 311.0, 0), (310.0, 60.0, 330.0, 80.0, 1)]
    assert (objects.cut > 0).tolist() == [True, False]


def test_touching_marks_stay_apart_and_classes_do_not_meet() -> None:
    grid, model = grid_of(96, 40), card()
    side = grid.stride_px
    marks = np.array([[y, x, y + 10, x + 10, (x // 10) % 2] for y in (side - 10, side) for x in range(0, 400, 10)])
    objects = merge(look(marks, grid, model), model.detection, grid)
    assert len(objects) == len(marks)
    same_place = np.array([[50, 50, 70, 70, 0], [50, 50, 70, 70, 1]])
    assert len(merge(look(same_place, grid, model), model.detection, grid)) == 2
    across = card(across_classes=True)
    assert merge(look(same_place, grid, across), across.detection, grid).labels.tolist() == [0]


def objects_at(boxes: list, scores: list[float], tiles: list[int], grid: TileGrid) -> Objects:
    """Whole objects of class 0, in canonical order."""
    found = []
    for box, score, tile in sorted(zip(boxes, scores, tiles, strict=True), key=lambda o: (o[2], -o[1])):
        view = tile_view(grid, np.ones(grid.shape, bool), *divmod(tile, grid.cols.count))
        here = Found(np.array([box], float), np.array([score], np.float32), np.zeros(1, np.int64))
        placed = candidates(here, view, card())
        found.append(replace(placed, boxes=np.array([box], float), cut=np.zeros(1, np.uint8)))
    return joined(found)


def test_the_best_view_wins() -> None:
    grid = grid_of(96, 40)
    two = objects_at([[60, 60, 80, 80], [61, 60, 81, 80]], [0.7, 0.8], [0, 1], grid)
    merged = merge(two, card().detection, grid)
    assert merged.scores.tolist() == [np.float32(0.8)]
    assert merged.boxes.tolist() == [[61, 60, 81, 80]]


def test_soft_suppression_lowers_neighbours_and_drops_other_views() -> None:
    grid = grid_of(96, 40)
    model = card(method="soft_nms", sigma=0.5)
    crowd = [[60, 60, 80, 80], [60, 70, 80, 90], [60, 60, 80, 80]]  # the third: the first again, in another tile
    merged = merge(objects_at(crowd, [0.9, 0.8, 0.85], [0, 0, 1], grid), model.detection, grid)
    overlap = 10 / 30
    assert merged.boxes.tolist() == crowd[:2]
    assert merged.scores.tolist() == pytest.approx([0.9, 0.8 * np.exp(-(overlap**2) / 0.5)], rel=1e-6)


def test_a_weak_view_does_not_take_the_pieces_of_a_sure_object() -> None:
    grid = grid_of(96, 40)  # tiles at x 0, 56, 112
    somewhere = [[60, 66, 80, 80]] * 3
    for weak in ([10, 60, 60, 95], [20, 60, 30, 70]):  # as large as a piece; a speck inside one
        views = objects_at(somewhere, [0.95, 0.95, 0.06], [0, 1, 1], grid)
        boxes = np.array([[10, 20, 60, 96], [10, 56, 60, 150], weak], float)
        views = replace(views, boxes=boxes, cut=np.array([RIGHT, LEFT, 0], np.uint8))
        merged = merge(views, card(overlap="ios").detection, grid)
        assert merged.boxes.tolist() == [[10, 20, 60, 150]]
        assert merged.scores.tolist() == [np.float32(0.95)]


def test_a_piece_goes_where_the_view_that_explains_it_went() -> None:
    grid = grid_of(96, 40)
    views = objects_at([[60, 66, 80, 80]] * 3, [0.7, 0.9, 0.8], [0, 1, 1], grid)
    boxes = np.array([[10, 46, 30, 64], [10, 34, 30, 60], [10, 40, 30, 68]], float)
    merged = merge(replace(views, boxes=boxes, cut=np.array([RIGHT, 0, 0], np.uint8)), card().detection, grid)
    assert merged.boxes.tolist() == [[10, 34, 30, 60]]


def test_what_one_tile_meant_may_stay() -> None:
    grid = grid_of(96, 40)
    pair = [[40, 40, 60, 60], [40, 44, 60, 64]]
    strict, kept = card().detection, card(within_tile=False).detection
    assert len(merge(objects_at(pair, [0.9, 0.8], [0, 0], grid), strict, grid)) == 1
    assert len(merge(objects_at(pair, [0.9, 0.8], [0, 0], grid), kept, grid)) == 2
    assert len(merge(objects_at(pair, [0.9, 0.8], [0, 1], grid), kept, grid)) == 1


def test_union_takes_all_views() -> None:
    grid, model = grid_of(96, 40), card(masks="full", method="union", overlap="ios")
    small, large = np.array([[50, 50, 60, 70, 0]]), np.array([[45, 50, 60, 70, 0]])
    views = joined([look(large, grid, model), look(small, grid, model)])
    views = views.take(np.argsort(views.tiles, kind="stable"))
    merged = merge(views, model.detection, grid)
    assert merged.boxes.tolist() == [[45, 50, 60, 70]]


def test_of_the_second_stage_the_central_view_counts() -> None:
    grid = grid_of(96, 40)
    two = objects_at([[70, 70, 90, 90], [70, 70, 90, 90]], [0.9, 0.8], [0, grid.cols.count + 1], grid)
    two = replace(two, extra=np.array([[0.1], [0.7]], np.float32))
    merged = merge(two, card().detection, grid)
    assert merged.scores.tolist() == [np.float32(0.9)]
    assert merged.extra.tolist() == [[float(np.float32(0.7))]]  # tile (1, 1) has the place nearer to its middle


def test_three_hundred_thousand_objects_are_merged_in_seconds() -> None:
    import time

    random = np.random.default_rng(0)
    grid = TileGrid.cover(Lattice(Size(60_000, 60_000), Mpp.square(1), Mpp.square(1), CELL), 512, 0.125)
    corner = random.integers(0, 59_900, (300_000, 2)).astype(float)
    boxes = np.concatenate([corner, corner + random.integers(8, 30, (300_000, 2))], axis=1)
    tiles = (corner // grid.stride_px).astype(np.int64) @ (grid.cols.count, 1)
    plain = np.zeros(300_000)
    found = Objects(
        boxes,
        random.random(300_000).astype(np.float32),
        plain.astype(np.uint16),
        tiles,
        plain.astype(np.uint8),
        np.empty((300_000, 0), np.float32),
        np.empty((0, 4), np.int32),
        np.empty(0, np.uint8),
    )
    found = found.take(np.argsort(tiles, kind="stable"))
    merge(found.take(np.arange(1000)), card().detection, grid)  # compiled
    started = time.perf_counter()
    merged = merge(found, card(above=0.3).detection, grid)
    assert 200_000 < len(merged) < 300_000
    assert time.perf_counter() - started < 30


def test_objects_survive_as_bytes() -> None:
    grid, model = grid_of(96, 40), card(masks="full")
    found = look(np.array([[5, 9, 40, 44, 0], [50, 60, 70, 90, 1]]), grid, model, "ellipse")
    again = objects_from_bytes(found.to_bytes())
    for name, column in found.columns().items():
        assert np.array_equal(column, again.columns()[name]), name
    assert Merge() == card().detection.merge
