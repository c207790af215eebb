"""The truth of a finished run: scores and what they mean. Map, labels and polygons are pure functions of it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wsiengine.geometry import Box, Lattice, Mpp, Size
from wsiengine.grid import TileGrid
from wsiengine.tasks.classify import MapLayout, blend, tile_probabilities

if TYPE_CHECKING:
    from wsiengine.planning import Plan

_STRIP = 1024  # cells blended at a time


@dataclass(frozen=True, slots=True, eq=False)
class Truth:
    """Scores of one slide by one model, with the lattice they stand on.

    Attributes:
        layout: What the channels mean.
        grid: The tile grid.
        scores: (tile rows, tile cols, score channels) float32, raw; NaN where a tile was not run.
        analysed: (rows, cols) bool: cells that the map fills.
        fingerprint: sha256 of the slide.
        key: sha256 of the run's identity.
        bounds_l0: The scanned part where the file states one (QuPath's origin is its corner).
        region_wkt: The region that limits the run, level-0 pixels, as well-known text; None without.
    """

    layout: MapLayout
    grid: TileGrid
    scores: np.ndarray
    analysed: np.ndarray
    fingerprint: str
    key: str
    bounds_l0: Box | None = None
    region_wkt: str | None = None

    @classmethod
    def of(cls, plan: "Plan", scores: np.ndarray, region: Any) -> "Truth":
        """The truth of a plan whose tiles have been scored; ``region`` is its shapely geometry or None."""
        if plan.job is None:
            raise ValueError("this plan was made without a job")
        wkt = None if region is None else region.wkt
        return cls(
            plan.layout, plan.grid, scores, plan.analysed, plan.fingerprint, plan.job.key, plan.info.bounds_l0, wkt
        )

    def map(self) -> np.ndarray:
        """The probability map: (rows, cols, channels) uint8, 0 = not analysed."""
        extent = self.grid.lattice.extent_cells
        out = np.zeros((*extent.shape, len(self.layout.channels)), np.uint8)
        for cells in Box.of(extent).pieces(_STRIP, _STRIP):
            analysed = self.analysed[cells.slices]
            if analysed.any():
                around = self.grid.covering(cells)
                tiles = tile_probabilities(self.scores[around.slices], self.layout)
                out[cells.slices] = blend(tiles, (around.y0, around.x0), analysed, self.grid, cells)
        return out

    def tile_counts(self) -> np.ndarray:
        """(rows, cols) int32: tiles that were run, counted in the cell that holds their centre."""
        counts = np.zeros(self.analysed.shape, np.int32)
        i, j = np.nonzero(~np.isnan(self.scores[..., 0]))
        rows, cols = self.grid.rows, self.grid.cols
        y = np.minimum(i * rows.stride + rows.tile // 2, rows.extent - 1)
        x = np.minimum(j * cols.stride + cols.tile // 2, cols.extent - 1)
        np.add.at(counts, (y, x), 1)
        return counts

    def attributes(self) -> dict[str, Any]:
        """All but the arrays, as JSON."""
        lattice = self.grid.lattice
        box = self.bounds_l0
        return {
            "layout": asdict(self.layout),
            "lattice": {
                "size_l0": list(lattice.slide_l0.shape),
                "slide_mpp": [lattice.slide_mpp.y, lattice.slide_mpp.x],
                "mpp": [lattice.mpp.y, lattice.mpp.x],
                "cell_px": lattice.cell_px,
            },
            "tile_px": self.grid.tile_px,
            "stride_px": self.grid.stride_px,
            "fingerprint": self.fingerprint,
            "key": self.key,
            "bounds_l0": [box.y0, box.x0, box.y1, box.x1] if box else None,
            "region": self.region_wkt,
            "coding": "uint8; 0 = not analysed, 1-255 = (value - 1) / 254",
        }

    @classmethod
    def load(cls, path: Path) -> "Truth":
        """Read back from a ``probability.zarr``.

        Raises:
            OutputError: There is no finished map.
        """
        from wsiengine.store import open_store

        stored = open_store(path)
        facts: Mapping[str, Any] = stored.attributes
        shape = facts["lattice"]
        lattice = Lattice(Size(*shape["size_l0"]), Mpp(*shape["slide_mpp"]), Mpp(*shape["mpp"]), int(shape["cell_px"]))
        overlap = 1 - facts["stride_px"] / facts["tile_px"]
        fields = {k: _tuples(v) for k, v in facts["layout"].items()}
        return cls(
            MapLayout(**fields),
            TileGrid.cover(lattice, facts["tile_px"], overlap),
            stored.scores[...],
            stored.analysed[...].astype(bool),
            facts["fingerprint"],
            facts["key"],
            Box(*facts["bounds_l0"]) if facts["bounds_l0"] else None,
            facts["region"],
        )


def _tuples(value: Any) -> Any:
    """JSON lists as the tuples they were."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
