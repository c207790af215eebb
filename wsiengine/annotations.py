"""Maps and objects to annotations: one per connected region and class, with measurements.

The writer and reader of their file, :mod:`wsiengine.qupath`, are offered here too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely

from wsiengine.geometry import Box, Lattice
from wsiengine.polygons import Traced, clean, clip, rectangle, simplify, to_level0, trace, trace_components
from wsiengine.qupath import Annotation, FileLimits, make_ids, read_geojson, write_geojson
from wsiengine.scratch import IN_MEMORY, Scratch, strips

__all__ = [
    "AnnotateOptions",
    "Annotation",
    "FileLimits",
    "annotate",
    "annotate_objects",
    "read_geojson",
    "region_annotations",
    "tile_annotations",
    "write_geojson",
]

_BATCH = 2048  # outlines exported at a time
_MEASURED = 1 << 18  # cells measured at a time
Class = tuple[str, tuple[int, int, int]]  # name, colour


@dataclass(frozen=True, eq=False)
class AnnotateOptions:
    """How regions become annotations.

    Attributes:
        fingerprint: Of the slide.
        identity: Of the run: model and parameters.
        tolerance_um: How far a boundary may lie from the cells' edges. None = half a cell: stairs become slanting
            lines, areas stay. Less than half a cell: the cells' edges as they are. More: fewer vertices as well.
        min_area_um2: Regions smaller than this are left out.
        clip_l0: shapely geometry in level-0 pixels that limits everything (a region of interest), or None.
        channel_names: Of the probability map.
        tile_count: int (rows, cols): how many tiles have their centre in each cell, or None.
        scratch: Makes the maps of regions.
    """

    fingerprint: str
    identity: str
    tolerance_um: float | None = None
    min_area_um2: float = 0.0
    clip_l0: Any = None
    channel_names: tuple[str, ...] = ()
    tile_count: np.ndarray | None = None
    scratch: Scratch = IN_MEMORY


@dataclass(frozen=True, eq=False)
class _Regions:
    """Exported polygons (level-0 px), the component (from 0) that each is part of, and its label."""

    polygons: np.ndarray
    parents: np.ndarray
    labels: np.ndarray


def annotate(
    labels: np.ndarray,
    probability: np.ndarray,
    lattice: Lattice,
    classes: Sequence[Class],
    options: AnnotateOptions,
) -> list[Annotation]:
    """Every connected region of a class map as one annotation.

    Measurements: ``Area mm^2`` of the exported outline; ``Mean probability <channel>`` over the region's analysed
    cells; ``Tiles`` whose centre lies in it, where counted. A region that clipping cuts in two becomes two.

    Args:
        labels: uint8 (rows, cols) of cells; 0 = nothing, k = ``classes[k - 1]``.
        probability: uint8 (rows, cols, channels); 0 = not analysed, 1–255 = (v − 1) / 254.
        lattice: Places the cells on the slide.
        classes: (name, colour) of each label.
        options: See :class:`AnnotateOptions`.

    Returns:
        Annotations ordered by class, then by first cell in reading order.
    """
    if int(labels.max(initial=0)) > len(classes):
        raise ValueError(f"label {labels.max()} has no class: there are {len(classes)}")
    traced = trace(labels, smooth=_slanting(lattice, options), scratch=options.scratch)
    return _annotations(traced, probability, lattice, classes, options)


def annotate_objects(
    objects: tuple[np.ndarray, np.ndarray],
    probability: np.ndarray,
    lattice: Lattice,
    classes: Sequence[Class],
    options: AnnotateOptions,
) -> list[Annotation]:
    """Every object of a map of objects as one annotation, measured as by :func:`annotate`; neighbours stay apart.

    Args:
        objects: int32 (rows, cols), 0 = none, each of 1 … n connected through edges; and uint8 (n,) class, from 1.
        probability, lattice, classes, options: As for :func:`annotate`.
    """
    traced = trace_components(*objects, smooth=_slanting(lattice, options))
    return _annotations(traced, probability, lattice, classes, options)


def _tolerance(lattice: Lattice, options: AnnotateOptions) -> float:
    """In cells."""
    return 0.5 if options.tolerance_um is None else options.tolerance_um / lattice.cell_um2**0.5


def _slanting(lattice: Lattice, options: AnnotateOptions) -> bool:
    return _tolerance(lattice, options) >= 0.5


def _annotations(
    traced: Traced, probability: np.ndarray, lattice: Lattice, classes: Sequence[Class], options: AnnotateOptions
) -> list[Annotation]:
    if traced.components.shape != probability.shape[:2]:
        raise ValueError(f"labels are {traced.components.shape} cells, probabilities {probability.shape[:2]}")
    if len(options.channel_names) != probability.shape[2]:
        raise ValueError(f"{len(options.channel_names)} channel names for {probability.shape[2]} channels")
    tolerance = _tolerance(lattice, options)
    outlines = simplify(traced.polygons, tolerance if tolerance > 0.5 else 0)
    regions = _exported(traced.labels, outlines, lattice, options)
    owners = _owners(traced.components, regions, lattice, options.scratch)
    if options.clip_l0 is not None:
        _drop_outside(options.clip_l0, owners, lattice)
    measured = _measure(owners, len(regions.polygons), probability, options)
    measured = {"Area mm^2": shapely.area(regions.polygons) * lattice.slide_mpp.pixel_um2 / 1e6, **measured}
    names = [classes[label - 1][0] for label in regions.labels]
    ids = make_ids(regions.polygons, names, (options.fingerprint, options.identity))
    columns = {name: column.tolist() for name, column in measured.items()}
    return [
        Annotation(
            id=ids[i],
            class_name=names[i],
            colour=classes[regions.labels[i] - 1][1],
            geometry=polygon,
            measurements={name: column[i] for name, column in columns.items() if column[i] == column[i]},  # no NaN
        )
        for i, polygon in enumerate(regions.polygons)
    ]


def _exported(labels: np.ndarray, outlines: np.ndarray, lattice: Lattice, options: AnnotateOptions) -> _Regions:
    """Outlines in cells to level-0 pixels, clipped, clean and split; without what is too small."""
    limits = [rectangle(Box.of(lattice.slide_l0))]
    if options.clip_l0 is not None:
        limits.append(options.clip_l0)
    exported, parents = [np.empty(0, object)], [np.empty(0, np.int64)]
    for first in range(0, len(outlines), _BATCH):  # each step makes all polygons anew
        here = to_level0(outlines[first : first + _BATCH], lattice.l0_per_cell)
        parts, parent = shapely.get_parts(clean(clip(here, limits)), return_index=True)
        large = shapely.area(parts) * lattice.slide_mpp.pixel_um2 >= options.min_area_um2
        exported.append(shapely.normalize(parts[large]))
        parents.append(parent[large] + first)
    parent = np.concatenate(parents)
    return _Regions(np.concatenate(exported), parent, labels[parent])


def _owners(components: np.ndarray, regions: _Regions, lattice: Lattice, scratch: Scratch) -> np.ndarray:
    """Which region (from 1; 0 = none) each cell counts for → int32 (rows, cols).

    A region in several parts gives each cell to the part that holds its centre.
    """
    count = int(components.max(initial=0))
    lookup = np.zeros(count + 1, np.int32)
    lookup[regions.parents + 1] = np.arange(1, len(regions.parents) + 1)
    owners = scratch.by_strips(components.shape, np.int32, lambda rows: lookup[components[rows]])
    split = np.flatnonzero(np.bincount(regions.parents, minlength=count) > 1)
    if not len(split):
        return owners
    from scipy import ndimage  # slow to import

    places = ndimage.find_objects(components)
    for parent in split:
        rows, cols = np.nonzero(components[places[parent]] == parent + 1)
        rows, cols = rows + places[parent][0].start, cols + places[parent][1].start
        owners[rows, cols] = 0
        y_l0, x_l0 = _centres(rows, cols, lattice)
        for part in np.flatnonzero(regions.parents == parent):
            shapely.prepare(regions.polygons[part])
            inside = shapely.contains_xy(regions.polygons[part], x_l0, y_l0)
            owners[rows[inside], cols[inside]] = part + 1
    return owners


def _drop_outside(geometry: Any, owners: np.ndarray, lattice: Lattice) -> None:
    """Owned cells whose centre does not lie in ``geometry`` become nobody's, in place."""
    shapely.prepare(geometry)
    for strip in strips(owners.shape):
        rows, cols = np.nonzero(owners[strip])
        y_l0, x_l0 = _centres(rows + strip.start, cols, lattice)
        outside = ~shapely.contains_xy(geometry, x_l0, y_l0)
        owners[strip][rows[outside], cols[outside]] = 0


def _centres(rows: np.ndarray, cols: np.ndarray, lattice: Lattice) -> tuple[np.ndarray, np.ndarray]:
    fy, fx = lattice.l0_per_cell
    return (rows + 0.5) * fy, (cols + 0.5) * fx


def _measure(
    owners: np.ndarray, count: int, probability: np.ndarray, options: AnnotateOptions
) -> dict[str, np.ndarray]:
    """Columns of measurements, float64 (count,) each; NaN where a region has no analysed cell."""
    columns: dict[str, np.ndarray] = {}
    for channel, name in enumerate(options.channel_names):
        cells, total = np.zeros(count, np.int64), np.zeros(count)
        for rows in strips(owners.shape, _MEASURED):  # whole numbers: the sums are exact, however they are cut
            here, values = owners[rows].ravel(), probability[rows, :, channel].ravel()
            cells += np.bincount(here[values > 0], minlength=count + 1)[1:]
            total += np.bincount(here, weights=values, minlength=count + 1)[1:]
        mean = (total / np.maximum(cells, 1) - 1) / 254
        columns[f"Mean probability {name}"] = np.where(cells > 0, mean, np.nan)
    if options.tile_count is not None:
        tiles = np.zeros(count)
        for strip in strips(owners.shape, _MEASURED):
            weights = options.tile_count[strip].ravel()
            tiles += np.bincount(owners[strip].ravel(), weights=weights, minlength=count + 1)[1:]
        columns["Tiles"] = tiles
    return columns


def tile_annotations(
    boxes_l0: np.ndarray,
    class_names: Sequence[str | None],
    colours: Sequence[tuple[int, int, int]],
    probabilities: Mapping[str, np.ndarray],
    lattice: Lattice,
    run: tuple[str, str],
) -> list[Annotation]:
    """Each tile as a QuPath ``tile`` object, clipped to the slide.

    Args:
        boxes_l0: float (n, 4): y0, x0, y1, x1 in level-0 pixels.
        class_names: Of each tile; None for a tile without class.
        colours: Of each tile's class.
        probabilities: Channel name → (n,) probabilities.
        lattice: Of the run: gives the slide's size.
        run: Fingerprint of the slide, identity of the run.
    """
    limit = np.array([*lattice.slide_l0.shape, *lattice.slide_l0.shape])
    y0, x0, y1, x1 = np.clip(np.round(np.asarray(boxes_l0, np.float64), 2), 0, limit).T
    tiles = shapely.normalize(shapely.box(x0, y0, x1, y1))
    # "tile": a region may be one tile, of that class, and stand in the same file
    ids = make_ids(tiles, class_names, (run[0], f"{run[1]} tile"))
    columns = {f"Probability {name}": np.asarray(column, np.float64).tolist() for name, column in probabilities.items()}
    return [
        Annotation(
            id=ids[i],
            class_name=class_names[i],
            colour=colours[i],
            geometry=tile,
            measurements={name: column[i] for name, column in columns.items()},
            object_type="tile",
        )
        for i, tile in enumerate(tiles)
    ]


def region_annotations(
    polygons_l0: Sequence[Any], class_name: str, colour: tuple[int, int, int], fingerprint: str
) -> list[Annotation]:
    """Plain outlines of one class, such as the tissue, as annotations without measurements."""
    outlines = np.empty(len(polygons_l0), object)
    outlines[:] = polygons_l0
    parts = shapely.normalize(shapely.get_parts(clean(outlines)))
    ids = make_ids(parts, [class_name] * len(parts), (fingerprint, ""))
    return [Annotation(ids[i], class_name, colour, part) for i, part in enumerate(parts)]
