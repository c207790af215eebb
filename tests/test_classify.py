"""From scores to map to labels, against an obvious twin."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsiengine.geometry import Box, Lattice, Mpp, Size
from wsiengine.grid import TileGrid
from wsiengine.tasks.classify import MapLayout, blend, decode, label, overview, tile_probabilities

PLAIN = MapLayout(("A", "B"), ((1, 2, 3), (4, 5, 6)), ((0,), (1,)), "softmax", uncertain_below=0.5)
GRADED = MapLayout(
    ("Normal", "Cancer"), ((1, 2, 3), (4, 5, 6)), ((0,), (1, 2)), "softmax", 0.2, "No epithelium", 0.6, "Uncertain"
)


def _grid(overlap: float, height: int = 330, width: int = 500) -> TileGrid:
    return TileGrid.cover(Lattice(Size(height, width), Mpp.square(1), Mpp.square(1), 16), 80, overlap)


def _tiles(grid: TileGrid, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    tiles = random.random((*grid.shape, 2)).astype(np.float32)
    tiles[random.random(grid.shape) < 0.3] = np.nan
    return tiles


def _slow_map(tiles: np.ndarray, analysed: np.ndarray, grid: TileGrid) -> np.ndarray:
    """Add each tile to every cell under it, divide by the number of tiles."""
    total = np.zeros((*analysed.shape, tiles.shape[2]), np.float64)
    count = np.zeros(analysed.shape, int)
    for i, j in np.argwhere(~np.isnan(tiles[..., 0])):
        y, x = i * grid.rows.stride, j * grid.cols.stride
        total[y : y + grid.rows.tile, x : x + grid.cols.tile] += tiles[i, j]
        count[y : y + grid.rows.tile, x : x + grid.cols.tile] += 1
    return np.where(((count > 0) & analysed)[..., None], total / np.maximum(count, 1)[..., None], np.nan)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.2, 0.4, 0.6, 0.8]))
def test_a_cell_is_the_mean_of_the_tiles_that_cover_it(seed: int, overlap: float) -> None:
    grid = _grid(overlap)
    tiles = _tiles(grid, seed)
    analysed = np.random.default_rng(seed + 1).random(grid.lattice.extent_cells.shape) < 0.8
    coded = blend(tiles, (0, 0), analysed, grid, Box.of(grid.lattice.extent_cells))
    slow = _slow_map(tiles, analysed, grid)
    assert ((coded[..., 0] == 0) == np.isnan(slow[..., 0])).all()
    np.testing.assert_allclose(decode(coded), slow, atol=0.5 / 254 + 1e-9)


@given(st.integers(0, 2**32 - 1), st.integers(1, 25), st.sampled_from([0.0, 0.4, 0.8]))
def test_the_map_is_the_same_however_it_is_cut(seed: int, side: int, overlap: float) -> None:
    grid = _grid(overlap)
    tiles = _tiles(grid, seed)
    extent = Box.of(grid.lattice.extent_cells)
    analysed = np.ones(extent.shape, bool)
    whole = blend(tiles, (0, 0), analysed, grid, extent)
    for cells in extent.pieces(side, side + 3):
        around = grid.covering(cells)
        part = blend(tiles[around.slices], (around.y0, around.x0), analysed[cells.slices], grid, cells)
        np.testing.assert_array_equal(part, whole[cells.slices])


def test_zero_probability_is_not_the_same_as_not_analysed() -> None:
    grid = _grid(0)
    tiles = np.zeros((*grid.shape, 2), np.float32)
    tiles[..., 1] = 1
    tiles[0, 0] = np.nan
    extent = Box.of(grid.lattice.extent_cells)
    coded = blend(tiles, (0, 0), np.ones(extent.shape, bool), grid, extent)
    assert (coded[:5, :5] == 0).all()
    assert (coded[5:, 5:, 0] == 1).all()
    assert (coded[5:, 5:, 1] == 255).all()


def test_grades_add_up_to_the_class_that_is_asserted() -> None:
    scores = np.array([[[0.0, 1.0, 1.0, 0.5], [np.nan] * 4]], np.float32)
    p = tile_probabilities(scores, GRADED)
    cancer = 2 * np.e / (1 + 2 * np.e)
    np.testing.assert_allclose(p[0, 0], [1 - cancer, cancer, 0.5], rtol=1e-6)
    assert np.isnan(p[0, 1]).all()


def _coded(*probabilities: float) -> np.ndarray:
    return np.array([[[round(1 + 254 * p) for p in probabilities]]], np.uint8)


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [
        ((0.9, 0.1, 1.0), "Normal"),
        ((0.1, 0.9, 1.0), "Cancer"),
        ((0.1, 0.9, 0.1), "No epithelium"),
        ((0.5, 0.5, 1.0), "Uncertain"),
        ((0.5, 0.5, 0.0), "No epithelium"),
    ],
)
def test_gate_then_threshold_then_best_class(probabilities: tuple[float, ...], expected: str) -> None:
    assert GRADED.labels[label(_coded(*probabilities), GRADED, GRADED.uncertain_below)[0, 0] - 1] == expected


def test_ties_go_to_the_lower_class() -> None:
    assert label(_coded(0.5, 0.5), PLAIN, 0.0)[0, 0] == 1


def test_cells_that_were_not_analysed_have_no_label_and_do_not_bleed_into_smoothing() -> None:
    coded = np.zeros((9, 9, 2), np.uint8)
    coded[:, :4] = (255, 1)
    smooth = label(coded, PLAIN, 0.9, smoothing_cells=2.0)
    assert (smooth[:, :4] == 1).all()  # with zeros smoothed in, the rim would fall below 0.9
    assert (smooth[:, 4:] == 0).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9))
def test_overviews_average_analysed_cells_only(seed: int, rows: int, cols: int) -> None:
    random = np.random.default_rng(seed)
    coded = random.integers(1, 256, (rows, cols, 2)).astype(np.uint8)
    coded[random.random((rows, cols)) < 0.4] = 0
    small = overview(coded)
    assert small.shape == (-(-rows // 2), -(-cols // 2), 2)
    for y in range(small.shape[0]):
        for x in range(small.shape[1]):
            four = coded[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].reshape(-1, 2).astype(int)
            kept = four[four[:, 0] > 0]
            expected = np.floor(kept.mean(axis=0) + 0.5) if len(kept) else np.zeros(2)
            np.testing.assert_array_equal(small[y, x], expected)
