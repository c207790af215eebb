"""From the truth to the files a person opens: map, annotations, overlay, ``run.json``.

No model runs here, so ``export`` calls the same functions with another threshold or smoothing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from wsiengine.annotations import AnnotateOptions, Annotation, annotate, tile_annotations, write_geojson
from wsiengine.areas import analysed_mm2
from wsiengine.finish import Finish, refuse_unfit
from wsiengine.tasks.classify import label, tile_probabilities
from wsiengine.truth import Truth


def make_annotations(truth: Truth, coded: np.ndarray, finish: Finish) -> Sequence[Annotation]:
    """What was found, as objects in level-0 pixels: regions of each class, glands, cells: as the model's task has it.

    Args:
        truth: The run.
        coded: Its map, (rows, cols, channels) uint8.
        finish: How to draw.
    """
    refuse_unfit(finish, truth.task.name, truth.layout)
    return truth.task.annotate(truth, coded, finish)


def summarise(truth: Truth, annotations: Sequence[Annotation]) -> dict[str, Any]:
    """Area of each class (mm², only classes that occur), of all of them, numbers of regions and tiles, and more."""
    return truth.task.summarise(truth, annotations)


def class_regions(truth: Truth, coded: np.ndarray, finish: Finish) -> list[Annotation]:
    """Regions of each class of a map as annotations in level-0 pixels."""
    lattice = truth.grid.lattice
    cell_um = lattice.mpp.mean * lattice.cell_px
    labels = label(coded, truth.layout, finish.threshold, finish.smoothing_um / cell_um, truth.scratch)
    colours = truth.layout.label_colours
    options = AnnotateOptions(
        fingerprint=truth.fingerprint,
        identity=truth.key,
        tolerance_um=finish.tolerance_um,
        min_area_um2=finish.min_area_um2,
        clip_l0=shapely.from_wkt(truth.region_wkt) if truth.region_wkt else None,
        channel_names=truth.layout.channels,
        tile_count=truth.tile_counts(),
        scratch=truth.scratch,
    )
    return annotate(labels, coded, lattice, list(zip(truth.layout.labels, colours, strict=True)), options)


def class_areas(truth: Truth, annotations: Sequence[Annotation]) -> dict[str, Any]:
    """Area of each class (mm², only classes that occur), of all of them, regions and tiles."""
    areas: dict[str, float] = {}
    for annotation in annotations:
        name = annotation.class_name or ""
        areas[name] = areas.get(name, 0.0) + annotation.measurements["Area mm^2"]
    ordered = {name: round(areas[name], 6) for name in truth.layout.labels if name in areas}
    return {
        "area_mm2": ordered,
        "analysed_mm2": round(analysed_mm2(truth), 6),
        "regions": len(annotations),
        "tiles": int(np.count_nonzero(truth.ran)),
    }


def qupath_offset(truth: Truth) -> tuple[int, int]:
    """Where QuPath puts its origin, (y, x) in level-0 pixels: the corner of the scanned bounds, if the file has any."""
    return (truth.bounds_l0.y0, truth.bounds_l0.x0) if truth.bounds_l0 else (0, 0)


def write_annotations(truth: Truth, annotations: Sequence[Annotation], finish: Finish, folder: Path) -> list[str]:
    """``annotations.geojson`` and the task's further files → names of the files written."""
    written = write_geojson(annotations, folder / "annotations.geojson", offset_l0=qupath_offset(truth))
    return [*(path.name for path in written), *truth.task.write(truth, annotations, finish, folder)]


def write_tiles(truth: Truth, finish: Finish, folder: Path) -> list[str]:
    """``tiles.geojson`` → names of the files written."""
    path = folder / "tiles.geojson"
    return [p.name for p in write_geojson(tile_objects(truth, finish), path, offset_l0=qupath_offset(truth))]


def tile_objects(truth: Truth, finish: Finish) -> list[Annotation]:
    """Each tile that was run, as a QuPath ``tile`` object with its class and probabilities."""
    i, j = np.nonzero(~np.isnan(truth.scores[..., 0]))
    probabilities = tile_probabilities(truth.scores[i, j], truth.layout)
    coded = (1 + np.floor(probabilities.astype(np.float64) * 254 + 0.5)).astype(np.uint8)
    labels = label(coded[None], truth.layout, finish.threshold)[0]
    colours = truth.layout.label_colours
    fy, fx = (f * truth.grid.stride_px for f in truth.grid.lattice.l0_per_px)
    side_y, side_x = (f * truth.grid.tile_px for f in truth.grid.lattice.l0_per_px)
    boxes = np.stack([i * fy, j * fx, i * fy + side_y, j * fx + side_x], axis=1)
    return tile_annotations(
        boxes,
        [truth.layout.labels[k - 1] for k in labels],
        [colours[k - 1] for k in labels],
        {name: probabilities[:, c] for c, name in enumerate(truth.layout.channels)},
        truth.grid.lattice,
        (truth.fingerprint, truth.key),
    )
