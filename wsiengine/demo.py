"""A slide drawn by program: shapes on glass with planted marks whose place is known, to check the geometry of a run.

Nothing here is tissue; no model is trained on it, and what a tissue model says about it means nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import shapely
from scipy import ndimage

from wsiengine.annotations import Annotation
from wsiengine.geometry import Size
from wsiengine.models.planted import MARKS
from wsiengine.slides.pyramid import PyramidLayout, write_pyramid

SIZE = Size(5003, 7019)  # no multiple of any tile
MPP = 0.5
LEAST_IOU = 0.9
_SEED = 20261120
_GLASS, _STROMA, _GLAND, _LUMEN = (244, 243, 245), (226, 168, 200), (150, 96, 168), (240, 232, 240)


@dataclass(frozen=True, slots=True)
class Mark:
    """A planted region: its class, and its outline in level-0 pixels."""

    name: str
    outline: shapely.Polygon


def planted_marks() -> list[Mark]:
    """Three marks: a rectangle, a disc, and a frame with a hole."""
    names = list(MARKS)
    frame = shapely.box(4600, 2700, 6100, 4100).difference(shapely.box(5000, 3100, 5700, 3700))
    return [
        Mark(names[0], shapely.box(1100, 1200, 2300, 2000)),
        Mark(names[1], shapely.Point(5300, 1500).buffer(620, quad_segs=64)),
        Mark(names[2], frame),
    ]


def draw_slide(path: Path) -> list[Mark]:
    """Write the demo slide, a pyramidal tiled-JPEG TIFF with SVS metadata → its marks."""
    marks = planted_marks()
    pixels = _paint(marks)
    write_pyramid(path, pixels, SIZE, MPP, PyramidLayout(downsamples=(1, 4, 16)))
    return marks


def _paint(marks: Sequence[Mark]) -> np.ndarray:
    import cv2

    random = np.random.default_rng(_SEED)
    canvas = np.empty((*SIZE.shape, 3), np.uint8)
    canvas[:] = _GLASS
    for cy, cx, ry, rx in ((2500, 1900, 2000, 1500), (2600, 5200, 2050, 1500)):
        _blob(canvas, (cy, cx), (ry, rx), random)
    for mark in marks:
        rings = [mark.outline.exterior, *mark.outline.interiors]
        colours = [MARKS[mark.name], *[_STROMA] * len(mark.outline.interiors)]
        for ring, colour in zip(rings, colours, strict=True):
            # A mark covers whole pixels up to its outline: cv2 fills the border pixels too, hence the half.
            cv2.fillPoly(canvas, [np.round(np.asarray(ring.coords)[:-1] - 0.5).astype(np.int32)], colour)
    return canvas


def _blob(canvas: np.ndarray, centre: tuple[int, int], radii: tuple[int, int], random: np.random.Generator) -> None:
    """A piece of drawn tissue: a wobbly outline, mottled, with rings in rows."""
    import cv2

    angle = np.linspace(0, 2 * np.pi, 240, endpoint=False)
    wobble = 1 + 0.05 * sum(np.sin(k * angle + random.uniform(0, 6)) for k in (2, 3, 5, 7))
    outline = np.stack(
        [centre[1] + radii[1] * wobble * np.cos(angle), centre[0] + radii[0] * wobble * np.sin(angle)], 1
    )
    mask = np.zeros(canvas.shape[:2], np.uint8)
    cv2.fillPoly(mask, [outline.astype(np.int32)], 1)
    shade = ndimage.zoom(
        random.normal(0, 1, (SIZE.height // 64 + 2, SIZE.width // 64 + 2)).astype(np.float32), 64, order=1
    )
    shade = shade[: SIZE.height, : SIZE.width, None] * 9 + random.integers(-6, 7, (*SIZE.shape, 1)).astype(np.float32)
    textured = np.clip(np.array(_STROMA, np.float32) + shade, 0, 255).astype(np.uint8)
    np.copyto(canvas, textured, where=mask[..., None].astype(bool))
    for y in range(centre[0] - radii[0], centre[0] + radii[0], 210):
        for x in range(centre[1] - radii[1], centre[1] + radii[1], 210):
            cy, cx = y + int(random.integers(-35, 36)), x + int(random.integers(-35, 36))
            inside = 0 <= cy < SIZE.height and 0 <= cx < SIZE.width and mask[cy, cx]
            if inside:
                axes = (int(random.integers(55, 80)), int(random.integers(65, 95)))
                tilt = float(random.uniform(0, 180))
                cv2.ellipse(canvas, (cx, cy), axes, tilt, 0, 360, _GLAND, -1, cv2.LINE_AA)
                cv2.ellipse(canvas, (cx, cy), (axes[0] // 2, axes[1] // 2), tilt, 0, 360, _LUMEN, -1, cv2.LINE_AA)


@dataclass(frozen=True, slots=True)
class Check:
    """How well a planted mark came back: intersection over union of its outline and the annotations of its class."""

    name: str
    iou: float

    @property
    def passed(self) -> bool:
        return self.iou >= LEAST_IOU


def check(marks: Sequence[Mark], annotations: Sequence[Annotation]) -> list[Check]:
    """Compare annotations (level-0 pixels) with the planted marks."""
    found = []
    for mark in marks:
        union = shapely.union_all([a.geometry for a in annotations if a.class_name == mark.name])
        common, either = union.intersection(mark.outline).area, union.union(mark.outline).area
        found.append(Check(mark.name, common / either))
    return found
