"""The truth of a finished run: what its blocks yielded and what it means.

Map, labels, objects and polygons are pure functions of it, which the run's task knows (:mod:`wsiengine.tasks.base`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wsiengine.geometry import Box, Lattice, Mpp, Size
from wsiengine.grid import TileGrid
from wsiengine.scratch import IN_MEMORY, Scratch
from wsiengine.tasks import task_of
from wsiengine.tasks.base import Task
from wsiengine.tasks.classify import MapLayout

if TYPE_CHECKING:
    from wsiengine.planning import Plan


@dataclass(frozen=True, slots=True, eq=False)
class Truth:
    """What one model found on one slide, with the lattice it stands on.

    Attributes:
        layout: What the channels mean.
        grid: The tile grid.
        arrays: The task's own arrays by name, such as ``scores``.
        analysed: (rows, cols) bool: cells that the map fills.
        fingerprint: sha256 of the slide.
        key: sha256 of the run's identity.
        bounds_l0: The scanned part where the file states one (QuPath's origin is its corner).
        region_wkt: The region that limits the run, level-0 pixels, as well-known text; None without.
        task_name: What the model does.
        areas: Name and well-known text of each annotation of the region, where objects are counted in each.
        scratch: Makes the arrays of what comes of it.
    """

    layout: MapLayout
    grid: TileGrid
    arrays: Mapping[str, np.ndarray]
    analysed: np.ndarray
    fingerprint: str
    key: str
    bounds_l0: Box | None = None
    region_wkt: str | None = None
    task_name: str = "classify"
    areas: tuple[tuple[str, str], ...] = ()
    scratch: Scratch = IN_MEMORY

    @classmethod
    def of(cls, plan: "Plan", arrays: Mapping[str, np.ndarray], region: Any) -> "Truth":
        """The truth of a plan whose blocks are finished; ``region`` is its shapely geometry or None."""
        if plan.job is None:
            raise ValueError("this plan was made without a job")
        wkt = None if region is None else region.wkt
        found = (plan.layout, plan.grid, arrays, plan.analysed, plan.fingerprint, plan.job.key)
        return cls(*found, plan.info.bounds_l0, wkt, plan.task.name, scratch=plan.scratch)

    @property
    def task(self) -> Task:
        return task_of(self.task_name)

    @property
    def scores(self) -> np.ndarray:
        """Of a classifier: (tile rows, tile cols, score channels) float32, raw; NaN where a tile was not run."""
        return self.arrays["scores"]

    @property
    def ran(self) -> np.ndarray:
        """(tile rows, tile cols) bool: tiles that were run."""
        return self.arrays["ran"].astype(bool) if "ran" in self.arrays else ~np.isnan(self.scores[..., 0])

    def map(self) -> np.ndarray:
        """The probability map: (rows, cols, channels) uint8, 0 = not analysed."""
        return self.task.map(self)

    def tile_counts(self) -> np.ndarray:
        """(rows, cols) int32: tiles that were run, counted in the cell that holds their centre."""
        counts = self.scratch.zeros(self.analysed.shape, np.int32)
        i, j = np.nonzero(self.ran)
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
            **({"task": self.task_name} if self.task_name != "classify" else {}),
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
            **({"areas": [list(area) for area in self.areas]} if self.areas else {}),
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
        task = task_of(facts.get("task", "classify"))
        return cls(
            task.stored_layout({k: _tuples(v) for k, v in facts["layout"].items()}),
            TileGrid.cover(lattice, facts["tile_px"], overlap),
            stored.arrays(),
            stored.analysed[...].astype(bool),
            facts["fingerprint"],
            facts["key"],
            Box(*facts["bounds_l0"]) if facts["bounds_l0"] else None,
            facts["region"],
            task.name,
            tuple((name, wkt) for name, wkt in facts.get("areas", ())),
        )


def _tuples(value: Any) -> Any:
    """JSON lists as the tuples they were."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
