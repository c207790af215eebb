"""What a person gets of a detector's objects: QuPath detections, a table, a map of their density, and counts.

All of it is made from the merged objects (:mod:`wsiengine.merging`) and a filter by class, score and area; nothing is
inferred again. Objects are made by the batch while a file is written: hundreds of thousands never stand in memory as
polygons at once.
"""

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import shapely

from wsiengine.areas import analysed
from wsiengine.classes import Colour
from wsiengine.finishing import Finish
from wsiengine.geometry import Lattice
from wsiengine.objects import Objects
from wsiengine.polygons import to_level0, trace
from wsiengine.qupath import Annotation
from wsiengine.tasks.detect import DetectLayout, boxes_l0, within
from wsiengine.tasks.detection import objects_in
from wsikernels.masks import mask_areas, unpack

if TYPE_CHECKING:
    from wsiengine.truth import Truth

_BATCH = 2048  # objects drawn at a time
_SHEET_PX = 4096  # side of the sheet on which the masks of a batch are laid out to be traced
_STRAIGHTEN_PX = 0.4  # how far a simplified outline may lie from the traced one
_PITCH_UM = 100.0  # of the density map
_PITCH_PX = 100.0  # where the picture states no µm/px
_NAMESPACE = uuid.UUID("6f0c1c62-5d0e-5f0b-9d53-1f2a7c0e8a42")  # of objects' ids; any fixed value would do


@dataclass(frozen=True, eq=False)
class ObjectAnnotations(Sequence[Annotation]):
    """The objects that are shown, each drawn when it is asked for. Iterating is quick, indexing draws one.

    Attributes:
        objects: Those that pass the filter.
        kinds: (n,) class of each, an index of ``layout.object_classes``.
        areas_px: (n,) in working pixels: of the outline, or of the box.
        layout, lattice: Of the run.
        run: Fingerprint of the slide, identity of the run.
        calibrated: Whether µm/px are known.
    """

    objects: Objects
    kinds: np.ndarray
    areas_px: np.ndarray
    layout: DetectLayout
    lattice: Lattice
    run: tuple[str, str]
    calibrated: bool

    @classmethod
    def of(cls, truth: "Truth", finish: Finish) -> "ObjectAnnotations":
        """The objects of a run that pass the filter of ``finish``, its region and its tissue."""
        objects, layout, lattice = objects_in(truth), _layout(truth), truth.grid.lattice
        kinds, areas = layout.classes_of(objects), areas_px(objects)
        calibrated = bool(truth.arrays["calibrated"][0])
        unit = lattice.mpp.pixel_um2 if calibrated else 1.0
        kept = objects.scores >= np.float32(finish.threshold)
        kept &= areas * unit >= finish.min_area_um2
        kept &= within(objects, truth.analysed, lattice.cell_px)
        if finish.classes:
            names = [name for name, _ in layout.object_classes]
            kept &= np.isin(kinds, [names.index(name) for name in finish.classes])
        if truth.region_wkt:
            kept &= _centred_in(shapely.from_wkt(truth.region_wkt), objects, lattice)
        shown = np.flatnonzero(kept)
        run = (truth.fingerprint, truth.key)
        return cls(objects.take(shown), kinds[shown], areas[shown], layout, lattice, run, calibrated)

    def __len__(self) -> int:
        return len(self.objects)

    @overload
    def __getitem__(self, index: int) -> Annotation: ...
    @overload
    def __getitem__(self, index: slice) -> list[Annotation]: ...
    def __getitem__(self, index: int | slice) -> Annotation | list[Annotation]:
        numbers = np.arange(len(self))[index]
        drawn = list(self._drawn(np.atleast_1d(numbers)))
        return drawn if isinstance(index, slice) else drawn[0]

    def __iter__(self) -> Iterator[Annotation]:
        return self.some(np.arange(len(self)))

    def some(self, numbers: np.ndarray) -> Iterator[Annotation]:
        """Those of the given numbers, in their order."""
        for first in range(0, len(numbers), _BATCH):
            yield from self._drawn(numbers[first : first + _BATCH])

    @cached_property
    def ids(self) -> np.ndarray:
        """(n, 16) uint8: a UUID of each, the same in every run of the same work."""
        numbers = np.concatenate(
            [np.round(self.objects.boxes, 3), self.kinds[:, None], self.objects.scores[:, None].astype(np.float64)],
            axis=1,
        )
        copies: dict[bytes, int] = {}
        ids = np.empty((len(self), 16), np.uint8)
        space = uuid.uuid5(_NAMESPACE, "\n".join(self.run))
        for k, row in enumerate(numbers):
            key = row.tobytes()
            copies[key] = again = copies.get(key, -1) + 1
            ids[k] = np.frombuffer(uuid.uuid5(space, f"{key.hex()} {again}").bytes, np.uint8)
        return ids

    def counts(self) -> list[tuple[str, Colour, int]]:
        """Name, colour and number of objects of each class that occurs."""
        classes = self.layout.object_classes
        numbers = np.bincount(self.kinds, minlength=len(classes)).tolist()
        return [(name, colour, n) for (name, colour), n in zip(classes, numbers, strict=True) if n]

    @property
    def unit(self) -> tuple[float, str]:
        """Area of a working pixel, and its unit."""
        return (self.lattice.mpp.pixel_um2, "µm^2") if self.calibrated else (1.0, "px^2")

    def _drawn(self, numbers: np.ndarray) -> Iterator[Annotation]:
        """Some of them as annotations, in level-0 pixels."""
        outlines = outlines_l0(self.objects.take(numbers), self.lattice)
        names = self.layout.object_classes
        factor, unit = self.unit
        columns = [(f"Probability {name}", k) for k, name in enumerate(self.layout.columns)]
        for place, k in enumerate(numbers.tolist()):
            name, colour = names[self.kinds[k]]
            measured = {"Score": float(self.objects.scores[k]), f"Area {unit}": float(self.areas_px[k] * factor)}
            measured |= {label: float(self.objects.extra[k, column]) for label, column in columns}
            if self.objects.cut[k]:
                measured["Cut by a tile"] = 1.0
            yield Annotation(
                id=str(uuid.UUID(bytes=self.ids[k].tobytes())),
                class_name=name,
                colour=colour,
                geometry=outlines[place],
                measurements=measured,
                object_type="detection",
            )


def _layout(truth: "Truth") -> DetectLayout:
    if not isinstance(truth.layout, DetectLayout):
        raise TypeError(f"a detector's truth has a DetectLayout, not {type(truth.layout).__name__}")
    return truth.layout


def _centred_in(geometry: Any, objects: Objects, lattice: Lattice) -> np.ndarray:
    fy, fx = lattice.l0_per_px
    shapely.prepare(geometry)
    centres = objects.centres
    return np.asarray(shapely.contains_xy(geometry, centres[:, 1] * fx, centres[:, 0] * fy))


def areas_px(objects: Objects) -> np.ndarray:
    """(n,) float64: area of each mask, or of each box where there are none, in working pixels."""
    if objects.outlined:
        return mask_areas(objects.frames, objects.bits).astype(np.float64)
    height, width = (objects.boxes[:, 2:] - objects.boxes[:, :2]).T
    return height * width


# --- outlines ------------------------------------------------------------------------------------


def outlines_l0(objects: Objects, lattice: Lattice) -> np.ndarray:
    """(n,) shapely geometries in level-0 pixels: the outline of each mask, or the box where there are none.

    A mask in several pieces is a MultiPolygon.
    """
    if not objects.outlined:
        y0, x0, y1, x1 = boxes_l0(objects, lattice).T
        return shapely.box(x0, y0, x1, y1)
    found = np.empty(len(objects), object)
    for some in _sheets(objects):
        found[some] = _traced(objects.take(some))
    return to_level0(found, lattice.l0_per_px)


def _sheets(objects: Objects) -> Iterator[np.ndarray]:
    """The objects by groups that fit onto one sheet."""
    sizes = np.prod(objects.frames[:, 2:].astype(np.int64) - objects.frames[:, :2] + 1, axis=1)
    group = (np.cumsum(sizes) - 1) // (_SHEET_PX * _SHEET_PX // 4)
    for number in np.unique(group):
        yield np.flatnonzero(group == number)


def _traced(objects: Objects) -> np.ndarray:
    """Outlines in working pixels: the masks are laid out on one sheet, a pixel apart, and traced together."""
    sizes = (objects.frames[:, 2:] - objects.frames[:, :2]).tolist()
    places = _layout_on_sheet(sizes)
    height = max(y + h for (y, _), (h, _) in zip(places, sizes, strict=True)) + 1
    width = max(x + w for (_, x), (_, w) in zip(places, sizes, strict=True)) + 1
    sheet, owner = np.zeros((height, width), np.uint8), np.zeros((height, width), np.int32)
    starts = objects.starts()
    for k, ((y, x), (h, w)) in enumerate(zip(places, sizes, strict=True)):
        sheet[y : y + h, x : x + w] = unpack(objects.bits[starts[k] : starts[k + 1]], (h, w))
        owner[y : y + h, x : x + w] = k
    traced = trace(sheet, smooth=True)
    inside = np.flatnonzero(traced.components)
    components, at = np.unique(traced.components.ravel()[inside], return_index=True)
    owners = owner.ravel()[inside[at]]
    polygons = shapely.simplify(traced.polygons[components - 1], _STRAIGHTEN_PX)
    shift = objects.frames[:, :2] - np.array(places)
    return _gathered(polygons, owners, shift, len(objects))


def _layout_on_sheet(sizes: list[list[int]]) -> list[tuple[int, int]]:
    """A place (y, x) on the sheet for each (height, width): in rows, a pixel apart."""
    places = []
    y = x = tallest = 0
    for height, width in sizes:
        if x and x + width > _SHEET_PX:
            y, x, tallest = y + tallest + 1, 0, 0
        places.append((y, x))
        x, tallest = x + width + 1, max(tallest, height)
    return places


def _gathered(polygons: np.ndarray, owners: np.ndarray, shift: np.ndarray, count: int) -> np.ndarray:
    """The pieces of each object, moved to their place on the slide, as one geometry."""
    xy, index = shapely.get_coordinates(polygons, return_index=True)
    moved = shapely.set_coordinates(polygons.copy(), xy + shift[owners[index]][:, ::-1])
    order = np.argsort(owners, kind="stable")
    edges = np.searchsorted(owners[order], np.arange(count + 1))
    found = np.empty(count, object)
    for k in range(count):
        pieces = moved[order[edges[k] : edges[k + 1]]]
        found[k] = pieces[0] if len(pieces) == 1 else shapely.MultiPolygon(list(pieces))
    return found


# --- counts --------------------------------------------------------------------------------------


def count_objects(truth: "Truth", shown: ObjectAnnotations) -> dict[str, Any]:
    """For the summary: objects and their density by class, over all that was analysed and in each drawn area."""
    names = [name for name, _ in shown.layout.object_classes]
    lattice = truth.grid.lattice
    unit = lattice.slide_mpp.pixel_um2 / 1e6 if shown.calibrated else 1e-6
    per = "per_mm2" if shown.calibrated else "per_mpx"
    tissue = shapely.union_all(
        to_level0(trace(analysed(truth).view(np.uint8), scratch=truth.scratch).polygons, lattice.l0_per_cell)
    )
    tissue = shapely.intersection(tissue, shapely.box(0, 0, lattice.slide_l0.width, lattice.slide_l0.height))
    if truth.region_wkt:
        tissue = shapely.intersection(tissue, shapely.from_wkt(truth.region_wkt))
    counts = np.bincount(shown.kinds, minlength=len(names))
    size = tissue.area * unit
    area_px2 = np.bincount(shown.kinds, weights=shown.areas_px, minlength=len(names))
    fy, fx = lattice.l0_per_px
    areas = {name: round(float(a * fy * fx * unit), 6) for name, a, n in zip(names, area_px2, counts, strict=True) if n}
    return {
        "area_mm2" if shown.calibrated else "area_mpx": areas,
        "analysed_mm2" if shown.calibrated else "analysed_mpx": round(size, 6),
        "regions": len(shown),
        "tiles": int(np.count_nonzero(truth.ran)),
        **_counted(names, counts, size, per),
        **_labelled(shown),
        **({"cut": int(np.count_nonzero(shown.objects.cut))} if shown.objects.cut.any() else {}),
        **({"left_out": int(truth.arrays["left_out"][0])} if truth.arrays["left_out"][0] else {}),
        **({"areas": _by_area(truth, shown, tissue, (unit, per))} if truth.areas else {}),
    }


def _counted(names: list[str], counts: np.ndarray, size: float, per: str) -> dict[str, Any]:
    found = {name: int(n) for name, n in zip(names, counts, strict=True) if n}
    density = {name: _rounded(n / size) for name, n in found.items()} if size else {}
    return {"objects": found, f"density_{per}": density}


def _rounded(density: float) -> float:
    """To thousandths; small ones (of masses, say) to three digits."""
    return round(density, 3) if density >= 0.1 else float(f"{density:.3g}")


def _labelled(shown: ObjectAnnotations) -> dict[str, Any]:
    """How many objects hold each label of the stages that assign no class."""
    found, column = {}, 0
    for stage in shown.layout.stages:
        for name in stage.names:
            if not stage.assigns:
                found[name] = int(np.count_nonzero(shown.objects.extra[:, column] >= np.float32(stage.threshold)))
            column += 1
    return {"labels": found} if found else {}


def _by_area(truth: "Truth", shown: ObjectAnnotations, tissue: Any, units: tuple[float, str]) -> list[dict[str, Any]]:
    """The same for each annotation of ``--region``."""
    unit, per = units
    names = [name for name, _ in shown.layout.object_classes]
    rows = []
    for label, wkt in truth.areas:
        geometry = shapely.from_wkt(wkt)
        inside = _centred_in(geometry, shown.objects, shown.lattice)
        size = shapely.intersection(tissue, geometry).area * unit
        counts = np.bincount(shown.kinds[inside], minlength=len(names))
        rows.append(
            {"name": label, per.replace("per_", "analysed_"): round(size, 6), **_counted(names, counts, size, per)}
        )
    return rows


# --- table ---------------------------------------------------------------------------------------


def write_table(truth: "Truth", shown: ObjectAnnotations, path: Path) -> None:
    """``objects.zarr``: columns of the shown objects, in the order of the GeoJSON file, and their density.

    Args:
        truth: The run.
        shown: Its objects.
        path: Folder to make.
    """
    from wsiengine.store import write_objects

    factor, _ = shown.unit
    boxes = boxes_l0(shown.objects, shown.lattice)
    columns = {
        "id": shown.ids,
        **{name: boxes[:, k] for k, name in enumerate(("y0_l0", "x0_l0", "y1_l0", "x1_l0"))},
        "class": shown.kinds.astype(np.uint16),
        "score": shown.objects.scores,
        "area_um2" if shown.calibrated else "area_px2": (shown.areas_px * factor).astype(np.float32),
        "cut": shown.objects.cut,
        "tile": shown.objects.tiles,
        **{f"probability_{k}": shown.objects.extra[:, k] for k in range(len(shown.layout.columns))},
    }
    density, pitch_cells = density_map(truth, shown)
    names = [name for name, _ in shown.layout.object_classes]
    pitch_um = [
        shown.lattice.mpp.y * shown.lattice.cell_px * pitch_cells,
        shown.lattice.mpp.x * shown.lattice.cell_px * pitch_cells,
    ]
    facts = {
        "classes": names,
        "colours": [list(colour) for _, colour in shown.layout.object_classes],
        "probabilities": list(shown.layout.columns),
        "fingerprint": shown.run[0],
        "key": shown.run[1],
        "density": {
            "unit": f"objects per {'mm²' if shown.calibrated else 'megapixel'} analysed; NaN where nothing was",
            "pitch": {"unit": "µm" if shown.calibrated else "px", "y": pitch_um[0], "x": pitch_um[1]},
        },
    }
    write_objects(path, columns, density, facts)


def density_map(truth: "Truth", shown: ObjectAnnotations) -> tuple[np.ndarray, int]:
    """Objects per mm² (per megapixel without µm/px) in squares of about 100 µm → (classes, rows, cols) float32, NaN
    where nothing was analysed; and the side of a square in cells of the map."""
    lattice = shown.lattice
    cell = lattice.mpp.mean * lattice.cell_px
    side = max(1, round((_PITCH_UM if shown.calibrated else _PITCH_PX) / cell))
    rows, cols = (-(-n // side) for n in truth.analysed.shape)
    inside_y, inside_x = (np.asarray(line) for line in lattice.inside())
    area = np.zeros((rows * side, cols * side))
    area[: truth.analysed.shape[0], : truth.analysed.shape[1]] = analysed(truth) * inside_y[:, None] * inside_x
    unit = lattice.cell_um2 / 1e6
    seen = area.reshape(rows, side, cols, side).sum(axis=(1, 3)) * unit
    counts = np.zeros((len(shown.layout.object_classes), rows, cols))
    square = np.floor(shown.objects.centres / (lattice.cell_px * side)).astype(np.int64)
    np.add.at(counts, (shown.kinds, np.minimum(square[:, 0], rows - 1), np.minimum(square[:, 1], cols - 1)), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(seen > 0, counts / seen, np.nan).astype(np.float32), side
