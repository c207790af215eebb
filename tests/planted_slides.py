"""Small slides with planted marks of known place, for tests of the whole path."""

from pathlib import Path

import numpy as np
import shapely

from wsiengine.geometry import Box, Size
from wsiengine.models.planted import MARKS
from wsiengine.slides.pyramid import PyramidLayout, write_pyramid

TISSUE = (214, 160, 196)
GLASS = (244, 243, 245)
A, B, C = MARKS


def paint(size: Size, marks: list[tuple[str, Box]], *, tissue: Box | None = None, seed: int = 0) -> np.ndarray:
    """Mottled drawn tissue (``tissue``, else everywhere) on glass, with flat rectangular marks."""
    random = np.random.default_rng(seed)
    pixels = np.empty((*size.shape, 3), np.uint8)
    pixels[:] = GLASS
    where = (Box.of(size) if tissue is None else tissue).slices
    noise = random.integers(-14, 15, (*pixels[where].shape[:2], 1))
    pixels[where] = np.clip(np.array(TISSUE) + noise, 0, 255)
    for name, box in marks:
        pixels[box.slices] = MARKS[name]
    return pixels


def write(path: Path, pixels: np.ndarray, mpp: float = 0.5, *, compression: str = "deflate") -> Path:
    layout = PyramidLayout(compression=compression, downsamples=(1, 4))  # type: ignore[arg-type]
    write_pyramid(path, pixels, Size(*pixels.shape[:2]), mpp, layout)
    return path


def iou(annotations: list, name: str, box: Box) -> float:
    """Of the annotations of a class and a box, level-0 pixels."""
    found = shapely.union_all([a.geometry for a in annotations if a.class_name == name])
    true = shapely.box(box.x0, box.y0, box.x1, box.y1)
    return found.intersection(true).area / found.union(true).area
