"""The tile grid against brute force."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsiengine.errors import PlanError
from wsiengine.geometry import Box, Lattice, Mpp, Size
from wsiengine.grid import Axis, TileGrid, blocks_of, tapered


@st.composite
def axes(draw: st.DrawFn) -> Axis:
    tile = draw(st.integers(1, 9))
    return Axis(draw(st.integers(1, 70)), tile, draw(st.integers(1, tile)))


def _cells_of(axis: Axis, tile: int) -> set[int]:
    return set(range(tile * axis.stride, min(tile * axis.stride + axis.tile, axis.extent)))


@given(axes())
def test_tiles_cover_every_cell_and_none_is_superfluous(axis: Axis) -> None:
    covered = set().union(*(_cells_of(axis, i) for i in range(axis.count)))
    assert covered == set(range(axis.extent))
    assert axis.count == 1 or (axis.count - 2) * axis.stride + axis.tile < axis.extent


@given(axes())
def test_a_cell_is_owned_by_the_tile_with_the_nearest_centre(axis: Axis) -> None:
    centres = np.arange(axis.count) * axis.stride + axis.tile / 2
    distance = np.abs(centres[:, None] - (np.arange(axis.extent) + 0.5))
    assert (axis.owner() == distance.argmin(axis=0)).all()  # argmin takes the lower on a tie
    assert (axis.owned_starts() == [np.flatnonzero(axis.owner() == i)[0] for i in range(axis.count)]).all()


@given(axes(), st.data())
def test_covering_names_exactly_the_tiles_that_touch(axis: Axis, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, axis.extent - 1))
    stop = data.draw(st.integers(first + 1, axis.extent))
    touching = [i for i in range(axis.count) if _cells_of(axis, i) & set(range(first, stop))]
    assert list(range(*axis.covering(first, stop))) == touching
    deepest = max(sum(c in _cells_of(axis, i) for i in range(axis.count)) for c in range(axis.extent))
    assert deepest <= axis.depth


def _grid(height: int = 700, width: int = 1000, tile: int = 224, overlap: float = 0.3) -> TileGrid:
    return TileGrid.cover(Lattice(Size(height, width), Mpp.square(1), Mpp.square(1), 32), tile, overlap)


def test_overlap_is_linear_and_rounded_to_a_cell() -> None:
    grid = _grid()
    assert grid.stride_px == 160
    assert grid.overlap == pytest.approx(0.2857, abs=1e-4)
    assert _grid(overlap=0).stride_px == 224
    assert _grid(overlap=0.99).stride_px == 32
    for wrong in (1.0, -0.1, float("nan")):
        with pytest.raises(PlanError, match="overlap"):
            _grid(overlap=wrong)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3, 0.6]))
def test_owners_and_coverage_against_brute_force(seed: int, overlap: float) -> None:
    grid = _grid(overlap=overlap)
    random = np.random.default_rng(seed)
    analysed = random.random(grid.lattice.extent_cells.shape) < 0.05
    wanted = np.zeros(grid.shape, bool)
    rows, cols = grid.rows.owner(), grid.cols.owner()
    for y, x in np.argwhere(analysed):
        wanted[rows[y], cols[x]] = True
    assert (grid.owners_of(analysed) == wanted).all()
    covered = np.zeros(analysed.shape, bool)
    for i, j in np.argwhere(wanted):
        covered[i * grid.rows.stride :, j * grid.cols.stride :][: grid.rows.tile, : grid.cols.tile] = True
    assert (grid.covered_by(wanted) == covered).all()
    assert not (analysed & ~covered).any()  # every cell to analyse lies under its owner


@given(st.integers(0, 2**32 - 1), st.integers(1, 7))
def test_each_wanted_tile_belongs_to_one_block(seed: int, side: int) -> None:
    wanted = np.random.default_rng(seed).random((11, 17)) < 0.2
    count = np.zeros(wanted.shape, int)
    for block in blocks_of(wanted, side):
        assert block.tile_count
        count[block.tiles.slices] += block.wanted
    assert (count == wanted).all()


def test_a_block_reads_only_what_its_wanted_tiles_need() -> None:
    grid = _grid()
    wanted = np.zeros(grid.shape, bool)
    wanted[1, 2] = wanted[2, 3] = True
    [block] = blocks_of(wanted, 8)
    assert block.box_px(grid) == Box(160, 320, 320 + 224, 480 + 224)
    assert block.origins_px(grid).tolist() == [[160, 320], [320, 480]]


def test_a_slide_smaller_than_a_tile_is_one_tile() -> None:
    grid = _grid(height=16, width=16)
    assert grid.shape == (1, 1)
    assert grid.lattice.extent_cells == Size(1, 1)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 9), st.integers(0, 12), st.integers(0, 99))
def test_tapered_blocks_hold_the_same_tiles_once(rows: int, cols: int, side: int, last: int, seed: int) -> None:
    wanted = np.random.default_rng(seed).random((rows, cols)) < 0.4
    whole = list(blocks_of(wanted, side))
    found = np.zeros(wanted.shape, int)
    parts = list(tapered(whole, last))
    for block in parts:
        found[block.tiles.slices] += block.wanted
        assert block.wanted.any()
    np.testing.assert_array_equal(found, wanted)
    kept = max(0, len(whole) - last)
    assert [block.tiles for block in parts[:kept]] == [block.tiles for block in whole[:kept]]
    if side > 1:
        assert all(max(block.tiles.shape) <= -(-side // 2) for block in parts[kept:])
