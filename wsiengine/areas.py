"""How much of a slide was analysed: of the cells, whatever regions were drawn from them or left out."""

from typing import TYPE_CHECKING

import numpy as np

from wsiengine.geometry import Lattice
from wsiengine.scratch import strips

if TYPE_CHECKING:
    from wsiengine.truth import Truth


_STRIP_ROWS = 32  # of cells


def analysed(truth: "Truth") -> np.ndarray:
    """(rows, cols) bool: cells that were to be analysed and lie under a tile that could be."""
    covered = truth.grid.covered_by(truth.ran, truth.scratch)
    for strip in strips(covered.shape):
        covered[strip] &= truth.analysed[strip]
    return covered


def analysed_mm2(truth: "Truth") -> float:
    """Area of the analysed cells that a tile covered; cells overhang the slide and a region, which does not count."""
    lattice = truth.grid.lattice
    covered = analysed(truth)
    rows, cols = (np.asarray(part) for part in lattice.inside())
    if truth.region_wkt is None:
        return cells_inside(covered, lattice) * lattice.cell_um2 / 1e6
    import shapely

    region = shapely.from_wkt(truth.region_wkt)
    shapely.prepare(region)
    fy, fx = lattice.l0_per_cell
    total_l0 = 0.0
    for first in range(0, len(covered), _STRIP_ROWS):  # a cell's outline takes some hundred bytes
        i, j = np.nonzero(covered[first : first + _STRIP_ROWS])
        i += first
        cells = shapely.box(j * fx, i * fy, (j + cols[j]) * fx, (i + rows[i]) * fy)
        areas = rows[i] * cols[j] * fy * fx
        cut = ~shapely.contains(region, cells)
        areas[cut] = shapely.area(shapely.intersection(cells[cut], region))
        total_l0 += float(areas.sum())
    return total_l0 * lattice.slide_mpp.pixel_um2 / 1e6


def cells_inside(share: np.ndarray, lattice: Lattice) -> float:
    """Sum over cells (rows, cols), each counted by its part on the slide."""
    rows, cols = (np.asarray(part) for part in lattice.inside())
    by_column = np.zeros(len(cols))
    for strip in strips(share.shape):
        by_column += rows[strip] @ share[strip].astype(np.float64)
    return float(by_column @ cols)
