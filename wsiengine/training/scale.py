"""What one pixel of a set measures, found by comparing its tissue with a set whose µm/px is known::

    python -m wsiengine.training.scale --data DIR

Crypts of normal mucosa are cut in every direction, so that over many of them height and width agree if pixels are
square: their mean ratio is the ratio of µm/px across and down. Their size against GlaS' then gives the scale. Where no
crypts are drawn, nuclei serve: the width of blur to which the haematoxylin image answers most (Lindeberg 1998).
"""

import argparse
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from wsiengine.training.data import Field, read_fields, read_image, read_mask

GLAS_MPP = 0.62
_SMALLEST_GLAND_PX = 400
_SIGMAS_PX = np.geomspace(1.0, 12.0, 34)


@dataclass(frozen=True)
class GlandSize:
    """Spread of gland pixels about their centre (standard deviation), averaged over cases, in pixels."""

    down_px: float
    across_px: float
    cases: int
    glands: int


def gland_size(fields: Iterable[Field]) -> GlandSize:
    """Size of the drawn glands that do not touch a border; every case counts once."""
    by_case: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for field in fields:
        if field.mask is not None:
            by_case[field.case] += _spreads(read_mask(field.mask, read_image(field.image).shape))
    kept = [np.log(v).mean(axis=0) for v in by_case.values() if v]
    down, across = np.exp(np.mean(kept, axis=0))
    return GlandSize(float(down), float(across), len(kept), sum(map(len, by_case.values())))


def _spreads(mask: np.ndarray) -> list[tuple[float, float]]:
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask)
    found = []
    for k in range(1, count):
        x, y, width, height, area = stats[k]
        inside = x > 0 and y > 0 and x + width < mask.shape[1] and y + height < mask.shape[0]
        if inside and area >= _SMALLEST_GLAND_PX:
            rows, cols = np.nonzero(labels[y : y + height, x : x + width] == k)
            found.append((rows.std(), cols.std()))
    return found


def nucleus_px(fields: Iterable[Field]) -> float:
    """Width of blur (pixels) to which nuclei answer most: peak of the scale-normalised Laplacian, every case once."""
    by_case = defaultdict(list)
    for field in fields:
        red = read_image(field.image)[:, :, 0]  # haematoxylin takes red, eosin hardly any
        density = -np.log((red.astype(np.float32) + 1) / 256)
        by_case[field.case].append([_answer(density, sigma) for sigma in _SIGMAS_PX])
    mean = np.mean([np.mean(rows, axis=0) for rows in by_case.values()], axis=0)
    return float(_SIGMAS_PX[np.argmax(mean)])


def _answer(density: np.ndarray, sigma: float) -> float:
    blurred = cv2.GaussianBlur(density, (0, 0), sigma)
    dark = np.maximum(-cv2.Laplacian(blurred, cv2.CV_32F, ksize=1) * sigma**2, 0)
    return float(np.percentile(dark, 97))


def main(arguments: list[str] | None = None) -> None:
    """Print the estimates."""
    parser = argparse.ArgumentParser(prog="python -m wsiengine.training.scale", description="Estimate µm/px.")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds crc/")
    fields = read_fields(parser.parse_args(arguments).data)
    sets = {s: [f for f in fields if f.source == s and f.label == "Normal"] for s in ("ebhi", "glas", "lc25000")}
    glas, ebhi = gland_size(sets["glas"]), gland_size(sets["ebhi"])
    every = gland_size([f for f in fields if f.source == "ebhi" and f.label != "Adenocarcinoma"])
    for name, size in (("GlaS healthy", glas), ("EBHI Normal", ebhi), ("EBHI all but carcinoma", every)):
        spread = f"{size.down_px:.1f} × {size.across_px:.1f} px (down × across)"
        print(f"{name}: {spread}, {size.glands} glands of {size.cases} cases")
    want = GLAS_MPP * np.sqrt(glas.down_px * glas.across_px)
    mean = want / np.sqrt(ebhi.down_px * ebhi.across_px)
    ratio = np.sqrt(every.down_px / every.across_px)
    print(f"EBHI: {mean / ratio:.2f} µm/px down, {mean * ratio:.2f} across (mean {mean:.2f})")
    widths = {name: nucleus_px(chosen) for name, chosen in sets.items()}
    for name, width in widths.items():
        mpp = GLAS_MPP * widths["glas"] / width
        print(f"{name}: nuclei answer at {width:.2f} px: {mpp:.2f} µm/px if they are as large as GlaS'")


if __name__ == "__main__":
    main()
