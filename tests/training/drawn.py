"""Pictures with drawn ellipses of two colours, whose outlines are known."""

import cv2
import numpy as np

from wsiengine.datasets.rows import Objects, bounds_xyxy
from wsiengine.training.detection_data import Sample

COLOURS = ((60, 90, 190), (200, 60, 120))


def picture(shape: tuple[int, int], count: int, seed: int) -> Sample:
    """``count`` ellipses (fewer where they do not fit) on a ground whose grey encodes the place."""
    random = np.random.default_rng(seed)
    rows, cols = np.indices(shape)
    pixels = np.stack([225 + (rows // 16) % 16, 225 + (cols // 16) % 16, 230 + (rows + cols) % 8], axis=-1).astype(
        np.uint8
    )
    centres: list[np.ndarray] = []
    rings, labels = [], []
    for _ in range(count * 30):
        centre = random.uniform((26, 26), (shape[1] - 26, shape[0] - 26))
        if len(centres) == count or any(np.abs(centre - other).max() < 50 for other in centres):
            continue
        angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        ring = centre + random.uniform(11, 22, 2) * np.column_stack([np.cos(angle), np.sin(angle)])
        label = int(random.integers(2))
        cv2.fillPoly(pixels, [np.rint(ring - 0.5).astype(np.int32).reshape(-1, 1, 2)], COLOURS[label])
        centres.append(centre)
        rings.append(ring)
        labels.append(label)
    return Sample(pixels, Objects.of([bounds_xyxy(ring) for ring in rings], labels, rings=rings))
