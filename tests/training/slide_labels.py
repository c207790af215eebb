"""Small annotated slides, as QuPath would leave them."""

import json
from pathlib import Path

import numpy as np

from tests import planted_slides as planted
from wsiengine.geometry import Box, Size
from wsiengine.slides.pyramid import PyramidLayout, write_pyramid


def write_geojson(path: Path, shapes: list[tuple[str | None, Box]]) -> Path:
    """A FeatureCollection of rectangles with their classes."""
    features = []
    for name, box in shapes:
        ring = [[box.x0, box.y0], [box.x1, box.y0], [box.x1, box.y1], [box.x0, box.y1], [box.x0, box.y0]]
        properties = {"objectType": "annotation"}
        if name is not None:
            properties["classification"] = {"name": name, "color": [1, 2, 3]}
        geometry = {"type": "Polygon", "coordinates": [ring]}
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8")
    return path


def paint(path: Path, size: Size, tissue: Box, parts: list[Box]) -> np.ndarray:
    """Write a slide: mottled tissue on glass, whose parts are darker; every pixel of tissue tells its place."""
    pixels = planted.paint(size, [], tissue=tissue, seed=path.name.__len__())
    for k, box in enumerate(parts):
        pixels[box.slices] = pixels[box.slices] // 2 + np.array([10 + 50 * k, 5, 60], np.uint8)
    y, x = np.mgrid[: size.height, : size.width]
    pixels[tissue.slices] -= ((y * 3 + x) % 23).astype(np.uint8)[tissue.slices][..., None]
    write_pyramid(path, pixels, size, 0.5, PyramidLayout(compression="deflate", downsamples=(1, 4)))
    return pixels
