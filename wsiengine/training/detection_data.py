"""Annotated images as training crops: turned, scaled, mirrored and recoloured, with what is in them.

A crop is one affine map of its image, so that outlines are mapped point by point and boxes are drawn round them anew.
"""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from wsiengine.datasets.images import openable, read_pixels
from wsiengine.datasets.rows import Annotated, Objects, bounds_xyxy
from wsiengine.errors import WsiError
from wsiengine.geometry import Box, Lattice, Mpp
from wsiengine.normalise import Recipe, fit_normaliser
from wsiengine.slides import open_slide
from wsiengine.tissue import TissueMask

_LEAST_VISIBLE = 0.35  # of an object's box: with less in the crop it neither counts as found nor as missed


@dataclass(frozen=True)
class Sample:
    """Pixels, uint8 RGB (rows, cols, 3), and the objects in them, in the same pixels."""

    pixels: np.ndarray
    objects: Objects


@dataclass(frozen=True)
class Augment:
    """How crops differ from their images.

    Attributes:
        side_px: Side of a crop.
        scales: Least and greatest magnification.
        turn: ``any`` angle, ``quarter`` turns or ``none``; with ``none`` crops are mirrored left to right only.
        lean_deg: With ``none``: turned by at most so much.
        colour: How strongly channels, contrast and brightness vary; 0 leaves them.
        centre_on_objects: Part of the crops that are centred near an object.
        fill: Grey value outside the image, as the card's ``pad``.
    """

    side_px: int
    scales: tuple[float, float] = (0.8, 1.25)
    turn: str = "any"
    lean_deg: float = 0.0
    colour: float = 0.15
    centre_on_objects: float = 0.3
    fill: int = 255


def load_sample(row: Annotated, side_px: int | None = None) -> Sample:
    """An image as it is, or shrunk so that its longer side is ``side_px``."""
    pixels = read_pixels(row.image)
    if side_px is None or max(pixels.shape[:2]) <= side_px:
        return Sample(pixels, row.objects)
    factor = side_px / max(pixels.shape[:2])
    matrix = np.array([[factor, 0.0, 0.0], [0.0, factor, 0.0]])
    rows, cols = (round(n * factor) for n in pixels.shape[:2])
    small = cv2.resize(pixels, (cols, rows), interpolation=cv2.INTER_AREA)
    return Sample(small, mapped(row.objects, matrix, (rows, cols)))


def mapped(objects: Objects, matrix: np.ndarray, shape: tuple[int, int]) -> Objects:
    """Objects under an affine map of their coordinates, cut off at a picture of ``shape``; those outside are gone.

    Args:
        objects: Before.
        matrix: (2, 3): (x, y, 1) → (x, y), at pixel edges.
        shape: (rows, cols) of the picture they come to lie in.
    """
    boxes, rings, keep, cut = [], [], [], []
    for i in range(len(objects)):
        ring = objects.outline(i) @ matrix[:, :2].T + matrix[:, 2]
        x0, y0, x1, y1 = bounds_xyxy(ring)
        inside = max(0.0, x0), max(0.0, y0), min(float(shape[1]), x1), min(float(shape[0]), y1)
        width, height = inside[2] - inside[0], inside[3] - inside[1]
        if width < 2 or height < 2:
            continue
        keep.append(i)
        boxes.append(inside)
        rings.append(np.clip(ring, (0, 0), (shape[1], shape[0])) if objects.rings[i] is not None else None)
        cut.append(width * height < _LEAST_VISIBLE * (x1 - x0) * (y1 - y0))
    return Objects.of(
        boxes,
        objects.labels[keep].tolist(),
        ignored=objects.ignored[keep] | np.array(cut, bool),
        rings=rings,
        types=objects.types[keep],
    )


def draw(sample: Sample, augment: Augment, random: np.random.Generator) -> Sample:
    """One crop of a sample."""
    linear = _linear(augment, random)
    matrix = about(_centre(sample, augment, linear, random), linear, augment.side_px)
    pixels = warped(sample.pixels, matrix, augment.side_px, augment.fill)
    if augment.colour:
        pixels = recolour(pixels, augment.colour, random)
    return Sample(pixels, mapped(sample.objects, matrix, (augment.side_px, augment.side_px)))


def draw_around(
    pixels: np.ndarray, centre: tuple[float, float], augment: Augment, random: np.random.Generator
) -> np.ndarray:
    """A crop round a point (x, y) of uint8 RGB ``pixels``."""
    matrix = about(np.array(centre), _linear(augment, random), augment.side_px)
    crop = warped(pixels, matrix, augment.side_px, augment.fill)
    return recolour(crop, augment.colour, random) if augment.colour else crop


def about(centre: np.ndarray, linear: np.ndarray, side_px: int) -> np.ndarray:
    """The (2, 3) map that does ``linear`` (2, 2) and brings ``centre`` (x, y) to the middle of a crop."""
    return np.column_stack([linear, side_px / 2 - linear @ centre])


def warped(pixels: np.ndarray, matrix: np.ndarray, side_px: int, fill: int) -> np.ndarray:
    """uint8 RGB pixels under a (2, 3) map of coordinates at pixel edges."""
    at_centres = matrix.copy()  # the same map between pixel centres, as OpenCV counts
    at_centres[:, 2] += matrix[:, :2] @ (0.5, 0.5) - 0.5
    return cv2.warpAffine(
        pixels, at_centres, (side_px, side_px), borderMode=cv2.BORDER_CONSTANT, borderValue=(fill, fill, fill)
    )


def _linear(augment: Augment, random: np.random.Generator) -> np.ndarray:
    low, high = np.log(augment.scales)
    scale = float(np.exp(random.uniform(low, high)))
    angle = {
        "any": random.uniform(0, 360),
        "quarter": 90.0 * random.integers(4),
        "none": random.uniform(-augment.lean_deg, augment.lean_deg),
    }[augment.turn]
    cos, sin = np.cos(np.radians(angle)) * scale, np.sin(np.radians(angle)) * scale
    return np.array([[cos, -sin], [sin, cos]]) @ np.diag([-1.0 if random.random() < 0.5 else 1.0, 1.0])


def _centre(sample: Sample, augment: Augment, linear: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Near an object, or anywhere that keeps the crop inside as far as it fits."""
    height, width = sample.pixels.shape[:2]
    reach = augment.side_px / np.sqrt(abs(np.linalg.det(linear)))
    counted = np.flatnonzero(~sample.objects.ignored)
    if len(counted) and random.random() < augment.centre_on_objects:
        x0, y0, x1, y1 = sample.objects.boxes_xyxy[random.choice(counted)]
        return np.array([(x0 + x1) / 2, (y0 + y1) / 2]) + random.uniform(-0.3, 0.3, 2) * reach
    free = [max(0.0, n - reach) / 2 for n in (width, height)]
    return np.array([width / 2, height / 2]) + [random.uniform(-f, f) if f else 0.0 for f in free]


def recolour(pixels: np.ndarray, strength: float, random: np.random.Generator) -> np.ndarray:
    """Every channel with its own gain and shift, all with one gamma: what light and stain do to a smear."""
    gamma = np.exp(random.uniform(-strength, strength))
    gain = np.exp(random.uniform(-strength, strength) + random.uniform(-strength / 2, strength / 2, 3))
    shift = random.uniform(-strength, strength) * 0.3
    levels = np.linspace(0, 1, 256)[:, None]
    table = np.clip((levels**gamma) * gain + shift, 0, 1) * 255
    return cv2.LUT(pixels, np.rint(table).astype(np.uint8)[:, None, :])


def load_samples(rows: tuple[Annotated, ...], side_px: int | None = None) -> list[Sample]:
    """All images in memory."""
    return [load_sample(row, side_px) for row in rows]


def normalised_sample(row: Annotated, recipe: Recipe, mpp: float) -> Sample:
    """An image as the engine hands it to a model of this recipe and µm/px, and its objects there.

    Raises:
        WsiError: The image cannot be read, or its µm/px is not known.
    """
    if row.mpp_yx is None:
        raise WsiError(
            f"µm/px of {row.image} is not known", hint="use a reader that knows it, or the pixels as they are"
        )
    with openable(row.image) as file:
        pixels, lattice = _normalised(file, Mpp(*row.mpp_yx), recipe, Mpp.square(mpp))
    per_l0 = np.diag([1 / f for f in reversed(lattice.l0_per_px)])
    return Sample(pixels, mapped(row.objects, np.column_stack([per_l0, np.zeros(2)]), pixels.shape[:2]))


def _normalised(file: Path, own: Mpp, recipe: Recipe, mpp: Mpp) -> tuple[np.ndarray, Lattice]:
    slide = open_slide(file, mpp=own, window=recipe.window)
    try:
        lattice = Lattice(slide.info.size_l0, own, mpp, 1)
        normaliser = fit_normaliser(recipe, slide, TissueMask.everywhere(slide.info.size_l0, own), mpp)
        box = Box.of(lattice.extent_px)
        return normaliser.apply(slide.read(box.grow(normaliser.halo_px), mpp), box), lattice
    finally:
        slide.close()
