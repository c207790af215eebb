"""Chula red-blood-cell smears: points with a type, made into boxes of single and touching cells.

Layout (Naruenatthanaset et al. 2021, the Chula RBC-12 dataset): ``images/N.jpg`` and ``labels/N.txt`` with a line
``x y type`` for a cell; ``folds.csv`` (image, fold) may lie beside them. In many fields only some cells have a point.

A *patch* is one cell or a few that touch: the red-cell study's unit. Cells are told from the background by Otsu's
threshold on how much darker they are than what lies round them; connected ones make a patch, and clumps of more than
:data:`LARGEST_PATCH` cells are cut between the circles that fit into them. The types of a patch are those of its
points; where it has fewer points than cells, a type that no point names is unknown, not absent.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from scipy import ndimage

from wsiengine.datasets.images import read_pixels
from wsiengine.datasets.rows import NO, NO_FOLD, UNKNOWN, YES, Annotated, DetectionSet, Objects, damaged

TYPES = (
    "Normal",
    "Macrocyte",
    "Microcyte",
    "Spherocyte",
    "Target cell",
    "Stomatocyte",
    "Ovalocyte",
    "Teardrop",
    "Burr cell",
    "Schistocyte",
    "Uncategorised",
    "Hypochromia",
    "Elliptocyte",
)
CLASS = "Red cells"
LARGEST_PATCH = 3
_SMALLEST = 0.18  # of a typical cell's area: below, and without a point, it is a platelet or dirt
_USUAL_AREA_PX = 1300.0  # a normal cell at 1000×, where a field has too few to measure
_NEEDLE = 0.42  # the pointer in the eyepiece is darker than this part of the background; no cell is


@dataclass(frozen=True, slots=True, eq=False)
class Patches:
    """What was found in a field: ``labels`` (rows, cols) int32, 0 = background; ``cells`` per patch; typical area."""

    labels: np.ndarray
    cells: np.ndarray
    area_px: float
    doubtful: np.ndarray


def read_chula(folder: Path) -> DetectionSet:
    """All fields below ``folder``, their boxes derived from the pixels.

    Raises:
        WsiError: A folder or image is missing, or a line of a label file says nothing.
    """
    names = sorted((folder / "labels").glob("*.txt"))
    if not names:
        raise damaged(folder, "there is no labels/*.txt in it", "give the folder that holds images/ and labels/")
    folds = _folds(folder / "folds.csv")
    images = []
    for file in names:
        image = folder / "images" / f"{file.stem}.jpg"
        points = read_points(file)
        found = find_patches(read_pixels(image))
        images.append(Annotated(image, patch_objects(found, points), file.stem, folds.get(file.stem, NO_FOLD)))
    return DetectionSet((CLASS,), tuple(images), TYPES, TYPES.index("Normal"))


def read_points(file: Path) -> np.ndarray:
    """(N, 3) int64: x, y, type.

    Raises:
        WsiError: A line is not three whole numbers, or names a type that does not exist.
    """
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not (parts := line.split()):
            continue
        if len(parts) != 3 or not all(part.lstrip("-").isdigit() for part in parts):
            raise damaged(file, f"line {number} is {line[:40]!r}, needed three whole numbers: x y type")
        x, y, kind = map(int, parts)
        if kind not in range(len(TYPES)):
            raise damaged(file, f"line {number} names type {kind}, needed 0 to {len(TYPES) - 1}")
        rows.append((x, y, kind))
    return np.array(rows, np.int64).reshape(-1, 3)


def find_patches(pixels: np.ndarray) -> Patches:
    """Single and touching cells of a smear, uint8 RGB (rows, cols, 3)."""
    green = cv2.GaussianBlur(np.ascontiguousarray(pixels[..., 1]), (0, 0), 1.0).astype(np.float32)
    background = _background(green)
    needle = ndimage.binary_dilation(_needle(green, background), iterations=3)
    mask = _cells(background - green) & ~needle
    connected, count = ndimage.label(ndimage.binary_opening(mask, iterations=2))
    areas = np.bincount(connected.ravel(), minlength=count + 1)[1:]
    typical = _typical_area(areas)
    labels = _cut_clumps(connected, areas, typical)
    labels, areas = _without_small(labels, typical)
    near = np.unique(labels[ndimage.binary_dilation(needle, iterations=2)])
    doubtful = np.isin(np.arange(1, len(areas) + 1), near)
    return Patches(labels, np.maximum(1, np.rint(areas / typical)).astype(np.int64), typical, doubtful)


def _background(green: np.ndarray) -> np.ndarray:
    """Brightness of bare glass everywhere: a high percentile of a wide neighbourhood, smoothed."""
    small = cv2.resize(green, None, fx=1 / 8, fy=1 / 8, interpolation=cv2.INTER_AREA)
    bright = ndimage.percentile_filter(small, 85, size=25)
    return cv2.resize(cv2.GaussianBlur(bright, (0, 0), 6), (green.shape[1], green.shape[0]))


def _needle(green: np.ndarray, background: np.ndarray) -> np.ndarray:
    dark, count = ndimage.label(green < _NEEDLE * background)
    areas = np.bincount(dark.ravel(), minlength=count + 1)
    long = [
        i + 1 for i, (y, x) in enumerate(ndimage.find_objects(dark)) if max(y.stop - y.start, x.stop - x.start) > 90
    ]
    return np.isin(dark, [i for i in long if areas[i] > 500])


def _cells(darker: np.ndarray) -> np.ndarray:
    """Otsu's threshold, a quarter lower (pale cells), with the pale middles of cells filled, at the borders too."""
    limited = np.clip(darker, 0, np.percentile(darker, 99)).astype(np.uint8)
    threshold, _ = cv2.threshold(limited, 0, 255, cv2.THRESH_OTSU)
    mask = darker > 0.75 * threshold
    filled = ndimage.binary_fill_holes(mask)
    for side in ((1, 0), (0, 0)), ((0, 1), (0, 0)), ((0, 0), (1, 0)), ((0, 0), (0, 1)):
        closed = ndimage.binary_fill_holes(np.pad(mask, side, constant_values=True))
        inside = closed[side[0][0] : closed.shape[0] - side[0][1], side[1][0] : closed.shape[1] - side[1][1]]
        holes, _ = ndimage.label(inside & ~filled)
        areas = np.bincount(holes.ravel())
        filled |= (holes > 0) & (areas[holes] < 600)  # the middle of one cell, not the glass between several
    return filled


def _typical_area(areas: np.ndarray) -> float:
    likely = areas[(areas > 0.4 * _USUAL_AREA_PX) & (areas < 1.8 * _USUAL_AREA_PX)]
    return float(np.median(likely)) if len(likely) >= 5 else _USUAL_AREA_PX


def _cut_clumps(connected: np.ndarray, areas: np.ndarray, typical: float) -> np.ndarray:
    labels, after = connected.astype(np.int32), int(connected.max())
    for index, place in enumerate(ndimage.find_objects(connected), 1):
        if areas[index - 1] <= (LARGEST_PATCH + 0.5) * typical:
            continue
        inside = connected[place] == index
        pieces = _pieces(inside, typical)
        for piece in range(2, int(pieces.max()) + 1):
            after += 1
            labels[place][inside & (pieces == piece)] = after
    return labels


def _pieces(inside: np.ndarray, typical: float) -> np.ndarray:
    """Pieces 1, 2, … of a clump: its cells as inscribed circles, cut where two circles meet (their power diagram)."""
    distance = cv2.distanceTransform(np.pad(inside, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
    smooth = cv2.GaussianBlur(distance, (0, 0), 1.5)
    radius = np.sqrt(typical / np.pi)
    peaks = np.argwhere((smooth == ndimage.maximum_filter(smooth, size=5)) & (smooth > 0.4 * radius))
    kept: list[tuple[float, float, float]] = []
    for y, x in sorted(peaks.tolist(), key=lambda at: (-smooth[at[0], at[1]], at)):
        own = float(smooth[y, x])
        if all((y - b) ** 2 + (x - a) ** 2 > (0.75 * max(own, r)) ** 2 + (0.5 * radius) ** 2 for b, a, r in kept):
            kept.append((y, x, own))
    if not kept:
        return inside.astype(np.int64)
    ys, xs = np.indices(inside.shape)
    power = np.stack([(ys - y) ** 2 + (xs - x) ** 2 - r**2 for y, x, r in kept])
    return np.where(inside, power.argmin(axis=0) + 1, 0)


def _without_small(labels: np.ndarray, typical: float) -> tuple[np.ndarray, np.ndarray]:
    """Numbered anew from 1 by place, with their areas; the smallest are left out."""
    areas = np.bincount(labels.ravel())
    keep = [i for i in range(1, len(areas)) if areas[i] >= _SMALLEST * typical]
    number = np.zeros(len(areas), np.int32)
    number[keep] = np.arange(1, len(keep) + 1)
    return number[labels], areas[keep]


def patch_objects(found: Patches, points: np.ndarray) -> Objects:
    """The patches of a field with the types of the points in them.

    A point on no patch gets a box of a typical cell round it, as nobody annotates what is not there.

    Args:
        found: From :func:`find_patches`.
        points: (N, 3) int64 x, y, type.
    """
    height, width = found.labels.shape
    x, y = np.clip(points[:, 0], 0, width - 1), np.clip(points[:, 1], 0, height - 1)
    patch = found.labels[y, x]
    boxes, types, ignored = [], [], []
    rings: list[np.ndarray | None] = []
    for index, place in enumerate(ndimage.find_objects(found.labels), 1):
        ys, xs = place
        boxes.append((xs.start, ys.start, xs.stop, ys.stop))
        rings.append(_ring(found.labels[place] == index, xs.start, ys.start))
        types.append(_types(points[patch == index, 2], int(found.cells[index - 1])))
        ignored.append(bool(found.doubtful[index - 1]) and not (patch == index).any())
    half = np.sqrt(found.area_px / np.pi)
    for px, py, kind in points[patch == 0]:
        boxes.append((max(0, px - half), max(0, py - half), min(width, px + half), min(height, py + half)))
        rings.append(None)
        types.append(_types(np.array([kind]), 1))
        ignored.append(False)
    return Objects.of(boxes, [0] * len(boxes), ignored=ignored, rings=rings, types=np.reshape(types, (-1, len(TYPES))))


def _types(kinds: np.ndarray, cells: int) -> np.ndarray:
    row = np.full(len(TYPES), NO if len(kinds) >= cells else UNKNOWN, np.int8)
    row[kinds] = YES
    return row


def _ring(inside: np.ndarray, x0: int, y0: int) -> np.ndarray:
    """The longest outline, through the centres of border pixels, moved out to their edges' middle."""
    found, _ = cv2.findContours(np.pad(inside, 1).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    longest = max(found, key=len)[:, 0].astype(np.float64) - 1
    return longest + (x0 + 0.5, y0 + 0.5)


def _folds(table: Path) -> dict[str, int]:
    if not table.is_file():
        return {}
    with table.open(newline="", encoding="utf-8") as lines:
        return {row["image"]: int(row["fold"]) for row in csv.DictReader(lines)}
