"""How much of a slide was analysed: of the cells, whatever regions were drawn from them or left out."""

from typing import TYPE_CHECKING

import numpy as np
import shapely

if TYPE_CHECKING:
    from wsiengine.truth import Truth


def analysed(truth: "Truth") -> np.ndarray:
    """(rows, cols) bool: cells that were to be analysed and lie under a tile that could be."""
    return truth.analysed & truth.grid.covered_by(truth.ran)


def analysed_mm2(truth: "Truth") -> float:
    """Area of the analysed cells that a tile covered; cells overhang the slide and a region, which does not count."""
    lattice = truth.grid.lattice
    covered = analysed(truth)
    rows, cols = (np.asarray(part) for part in lattice.inside())
    if truth.region_wkt is None:
        return float(rows @ covered.astype(np.float64) @ cols) * lattice.cell_um2 / 1e6
    region = shapely.from_wkt(truth.region_wkt)
    shapely.prepare(region)
    i, j = np.nonzero(covered)
    fy, fx = lattice.l0_per_cell
    cells = shapely.box(j * fx, i * fy, (j + cols[j]) * fx, (i + rows[i]) * fy)
    areas = rows[i] * cols[j] * fy * fx
    cut = ~shapely.contains(region, cells)
    areas[cut] = shapely.area(shapely.intersection(cells[cut], region))
    return float(areas.sum()) * lattice.slide_mpp.pixel_um2 / 1e6
