"""A detector's objects on the overlay: boxes and outlines in the colour of their class, the surer the stronger."""

from dataclasses import dataclass

import cv2
import numpy as np

from wsiengine.geometry import Size
from wsiengine.object_outputs import ObjectAnnotations
from wsiengine.tasks.detect import boxes_l0

_SHIFT = 4  # drawn to 1/16 px
_FILL = 0.28  # how much of the class colour lies over an outlined object
_FAINTEST = 0.35  # opacity of an object of score 0; 1 is opaque
_STEPS = 20  # of opacity, from 0 to 1
_SIDE_PER_LINE = 12  # an object's longer side in widths of its line, at least
_DOT_PX = 3.0  # an object that is smaller in the picture is a dot of this size
_TOLD_PX = 36  # objects at least this wide have their score written beside them, where there are few
_FEW = 120


def draw_objects(canvas: np.ndarray, objects: ObjectAnnotations, size_l0: Size, line_px: int) -> None:
    """Draw objects onto ``canvas`` (rows, cols, 3), a picture of the whole slide, in place.

    An outlined object is tinted inside and has its box around it as a thin line. The opacity of lines follows the
    score, from 0.35 for 0 to 1 for 1, in steps of 0.05; the surer lie over the others. Lines are ``line_px`` wide,
    thinner around what is small. Where objects are few and large enough, their score stands above them. What is too
    small for an outline is a dot.
    """
    scale = np.array([canvas.shape[1] / size_l0.width, canvas.shape[0] / size_l0.height])
    boxes = boxes_l0(objects.objects, objects.lattice) * np.tile(scale[::-1], 2)
    sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    small, widths = sides < _DOT_PX, np.clip(np.rint(sides / _SIDE_PER_LINE), 1, line_px).astype(np.int64)
    strength = _FAINTEST + (1 - _FAINTEST) * objects.objects.scores.astype(np.float64)
    strength = np.rint(strength * _STEPS) / _STEPS
    colours = np.array([colour for _, colour in objects.layout.object_classes], np.float64)[objects.kinds]
    _dots(canvas, boxes[small], colours[small], strength[small])
    large = np.flatnonzero(~small)
    for alike in _alike(large, np.stack([objects.kinds, widths, strength])):
        line = (int(widths[alike[0]]), float(strength[alike[0]]))
        _outline(canvas, _shapes(objects, alike, scale), colours[alike[0]], line)
    told = large[(boxes[large, 2:] - boxes[large, :2]).min(axis=1) >= _TOLD_PX]
    for k in told.tolist() if len(told) <= _FEW else ():
        _write(canvas, f"{objects.objects.scores[k]:.2f}", (max(round(boxes[k, 0]) - 4, 12), round(boxes[k, 1])))


def _alike(numbers: np.ndarray, by: np.ndarray) -> list[np.ndarray]:
    """``numbers`` in the order of ``by`` (keys, n), the last key first: what is drawn alike is drawn at once."""
    if not len(numbers):
        return []
    order = numbers[np.lexsort(by[:, numbers])]
    return np.split(order, np.flatnonzero(np.diff(by[:, order]).any(axis=0)) + 1)


def _dots(canvas: np.ndarray, boxes: np.ndarray, colours: np.ndarray, strength: np.ndarray) -> None:
    """A square of three pixels for each box; where several fall on a pixel, the strongest is seen."""
    order = np.argsort(strength, kind="stable")
    corner = np.rint((boxes[order, :2] + boxes[order, 2:]) / 2 - _DOT_PX / 2).astype(np.int64)
    base = canvas.copy()
    for dy, dx in np.ndindex(int(_DOT_PX), int(_DOT_PX)):
        y, x = np.clip(corner + (dy, dx), 0, np.array(canvas.shape[:2]) - 1).T
        canvas[y, x] = _mixed(base[y, x], colours[order], strength[order, None])


@dataclass(frozen=True, slots=True, eq=False)
class _Shapes:
    """Objects as rings of fixed-point pixels: those that are boxes, outlines, and the boxes around the outlines."""

    plain: list[np.ndarray]
    outlined: list[list[np.ndarray]]
    frames: list[np.ndarray]


def _shapes(objects: ObjectAnnotations, numbers: np.ndarray, scale: np.ndarray) -> _Shapes:
    y0, x0, y1, x1 = boxes_l0(objects.objects.take(numbers), objects.lattice).T
    corners = np.stack([x0, y0, x1, y0, x1, y1, x0, y1], axis=1).reshape(-1, 4, 2) * scale
    boxes = list(_fixed(corners))
    if not objects.objects.outlined:
        return _Shapes(boxes, [], [])
    shapes = _Shapes([], [], [])
    for box, annotation in zip(boxes, objects.some(numbers), strict=True):
        geometry = annotation.geometry
        if geometry.area >= geometry.envelope.area * 0.999:
            shapes.plain.append(box)
        else:
            shapes.outlined.append(_rings(geometry, scale))
            shapes.frames.append(box)
    return shapes


def _outline(canvas: np.ndarray, shapes: _Shapes, colour: np.ndarray, line: tuple[int, float]) -> None:
    """Objects of one class and strength."""
    line_px, strength = line
    if shapes.outlined:
        inside = np.zeros(canvas.shape[:2], np.uint8)
        for rings in shapes.outlined:  # each by itself: of polygons filled together, what two share counts as a hole
            cv2.fillPoly(inside, rings, 255, cv2.LINE_AA, _SHIFT)
        _lay_over(canvas, inside, colour, _FILL)
        _lay_over(canvas, _lines(canvas, shapes.frames, 1), colour, strength * 0.6)
    rings = [*shapes.plain, *(ring for outline in shapes.outlined for ring in outline)]
    _lay_over(canvas, _lines(canvas, rings, line_px), colour, strength)


def _lines(canvas: np.ndarray, rings: list[np.ndarray], line_px: int) -> np.ndarray:
    mask = np.zeros(canvas.shape[:2], np.uint8)
    cv2.polylines(mask, rings, True, 255, line_px, cv2.LINE_AA, _SHIFT)
    return mask


def _lay_over(canvas: np.ndarray, mask: np.ndarray, colour: np.ndarray, opacity: float) -> None:
    """Lay ``colour`` over ``canvas`` where ``mask`` (rows, cols) is above 0; 255 is the whole ``opacity``."""
    found = cv2.findNonZero(mask)  # several times as fast as numpy
    if found is not None:
        x, y = found.reshape(-1, 2).T
        canvas[y, x] = _mixed(canvas[y, x], colour, opacity * mask[y, x][:, None] / 255)


def _mixed(pixels: np.ndarray, colour: np.ndarray, opacity: float | np.ndarray) -> np.ndarray:
    return np.rint(pixels * (1 - opacity) + colour * opacity).astype(np.uint8)


def _rings(geometry: object, scale: np.ndarray) -> list[np.ndarray]:
    parts = getattr(geometry, "geoms", [geometry])
    rings = [ring for part in parts for ring in (part.exterior, *part.interiors)]
    return [_fixed(np.asarray(ring.coords)[:-1] * scale) for ring in rings]


def _fixed(xy: np.ndarray) -> np.ndarray:
    """Fixed-point pixels; half a pixel off, as OpenCV counts from pixel centres."""
    return np.rint(xy * 2**_SHIFT - 2 ** (_SHIFT - 1)).astype(np.int32)


def _write(canvas: np.ndarray, text: str, at: tuple[int, int]) -> None:
    """A score, dark on a light rim, so that it can be read on any tissue."""
    y, x = at
    rim = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
    for dy, dx in (*rim, (0, 0)):  # letters of two thicknesses differ in width: the rim is the same letters, moved
        colour = (34, 34, 34) if (dy, dx) == (0, 0) else (255, 255, 255)
        cv2.putText(canvas, text, (x + dx, y + dy), colour, cv2.FontFace("uni"), 13, 500)
