"""A detector's objects on the overlay: boxes and outlines in the colour of their class, the surer the stronger."""

import cv2
import numpy as np

from wsiengine.geometry import Size
from wsiengine.object_outputs import ObjectAnnotations
from wsiengine.qupath import Annotation
from wsiengine.tasks.detect import boxes_l0

_SHIFT = 4  # drawn to 1/16 px
_FILL = 0.28  # how much of the class colour lies over an outlined object
_FAINTEST = 0.35  # opacity of an object of score 0; 1 is opaque
_DOT_PX = 3.0  # an object that is smaller in the picture is a dot of this size
_TOLD_PX = 36  # objects at least this wide have their score written beside them, where there are few
_FEW = 120


def draw_objects(canvas: np.ndarray, objects: ObjectAnnotations, size_l0: Size, line_px: int) -> None:
    """Draw objects onto ``canvas`` (rows, cols, 3), a picture of the whole slide, in place.

    An outlined object is tinted inside and has its box around it as a thin line. The opacity of lines follows the
    score, from 0.35 for 0 to 1 for 1. Where objects are few and large enough, their score stands above them. What is
    too small for an outline is a dot.
    """
    scale = np.array([canvas.shape[1] / size_l0.width, canvas.shape[0] / size_l0.height])
    boxes = boxes_l0(objects.objects, objects.lattice) * np.tile(scale[::-1], 2)
    small = (boxes[:, 2:] - boxes[:, :2]).max(axis=1) < _DOT_PX
    strength = _FAINTEST + (1 - _FAINTEST) * objects.objects.scores.astype(np.float64)
    colours = np.array([colour for _, colour in objects.layout.object_classes], np.float64)[objects.kinds]
    _dots(canvas, boxes[small], colours[small], strength[small])
    large = np.flatnonzero(~small)
    told = large[(boxes[large, 2:] - boxes[large, :2]).min(axis=1) >= _TOLD_PX]
    for k, annotation in zip(large.tolist(), objects.some(large), strict=True):
        _outline(canvas, annotation, scale, (line_px, float(strength[k])))
    for k in told.tolist() if len(told) <= _FEW else ():
        _write(canvas, f"{objects.objects.scores[k]:.2f}", (max(round(boxes[k, 0]) - 4, 12), round(boxes[k, 1])))


def _dots(canvas: np.ndarray, boxes: np.ndarray, colours: np.ndarray, strength: np.ndarray) -> None:
    """A square of three pixels for each box; where several fall on a pixel, the strongest is seen."""
    order = np.argsort(strength, kind="stable")
    corner = np.rint((boxes[order, :2] + boxes[order, 2:]) / 2 - _DOT_PX / 2).astype(np.int64)
    base = canvas.copy()
    for dy, dx in np.ndindex(int(_DOT_PX), int(_DOT_PX)):
        y, x = np.clip(corner + (dy, dx), 0, np.array(canvas.shape[:2]) - 1).T
        canvas[y, x] = _mixed(base[y, x], colours[order], strength[order, None])


def _outline(canvas: np.ndarray, annotation: Annotation, scale: np.ndarray, line: tuple[int, float]) -> None:
    """One object, drawn on the part of the picture that holds it."""
    line_px, strength = line
    x0, y0, x1, y1 = np.array(annotation.geometry.bounds) * np.tile(scale, 2)
    top, left = max(0, int(y0) - line_px), max(0, int(x0) - line_px)
    here = canvas[top : int(y1) + line_px + 2, left : int(x1) + line_px + 2]
    if not here.size:
        return
    rings = _rings(annotation.geometry, scale, (top, left))
    box = [_fixed(np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]]), (top, left))]
    boxed = bool(annotation.geometry.area >= annotation.geometry.envelope.area * 0.999)
    if not boxed:
        _paint(here, rings, annotation.colour, _FILL, None)
        _paint(here, box, annotation.colour, strength * 0.6, 1)
    _paint(here, rings, annotation.colour, strength, line_px)


def _paint(
    here: np.ndarray, rings: list[np.ndarray], colour: tuple[int, int, int], opacity: float, line_px: int | None
) -> None:
    """Lay ``colour`` over the rings' lines, or over their inside where no width is given."""
    mask = np.zeros(here.shape[:2], np.uint8)
    if line_px is None:
        cv2.fillPoly(mask, rings, 255, cv2.LINE_AA, _SHIFT)
    else:
        cv2.polylines(mask, rings, True, 255, line_px, cv2.LINE_AA, _SHIFT)
    touched = mask > 0
    here[touched] = _mixed(here[touched], colour, opacity * mask[touched][:, None] / 255)


def _mixed(pixels: np.ndarray, colour: tuple[int, int, int] | np.ndarray, opacity: float | np.ndarray) -> np.ndarray:
    return np.rint(pixels * (1 - opacity) + np.array(colour) * opacity).astype(np.uint8)


def _rings(geometry: object, scale: np.ndarray, corner: tuple[int, int]) -> list[np.ndarray]:
    parts = getattr(geometry, "geoms", [geometry])
    rings = [ring for part in parts for ring in (part.exterior, *part.interiors)]
    return [_fixed(np.asarray(ring.coords)[:-1] * scale, corner) for ring in rings]


def _fixed(xy: np.ndarray, corner: tuple[int, int]) -> np.ndarray:
    """Fixed-point pixels from a corner (y, x); half a pixel off, as OpenCV counts from pixel centres."""
    return np.rint((xy - (corner[1], corner[0])) * 2**_SHIFT - 2 ** (_SHIFT - 1)).astype(np.int32)


def _write(canvas: np.ndarray, text: str, at: tuple[int, int]) -> None:
    """A score, dark on a light rim, so that it can be read on any tissue."""
    y, x = at
    rim = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
    for dy, dx in (*rim, (0, 0)):  # letters of two thicknesses differ in width: the rim is the same letters, moved
        colour = (34, 34, 34) if (dy, dx) == (0, 0) else (255, 255, 255)
        cv2.putText(canvas, text, (x + dx, y + dy), colour, cv2.FontFace("uni"), 13, 500)
