"""mini-MIAS mammograms (Suckling et al. 1994): masses as circles, 200 µm/px.

``labels.csv`` has the columns file, patient, tissue, abnormality, severity, x, y, radius, fold; y counts from the top.
"""

from collections import defaultdict
from pathlib import Path

import numpy as np

from wsiengine.datasets.rows import NO_FOLD, Annotated, DetectionSet, Objects, check_box, damaged
from wsiengine.datasets.sheets import read_sheet

MASSES = ("CIRC", "SPIC", "MISC")
CLASS = "Mass"
MPP = 200.0
_SIDE_PX = 1024
_COLUMNS = ("file", "patient", "abnormality", "x", "y", "radius")


def read_mias(folder: Path) -> DetectionSet:
    """All mammograms of ``folder/labels.csv``.

    A mass without a place makes its whole image neither right nor wrong. Calcifications, distortions and asymmetries
    are no masses: nothing is annotated there.

    Raises:
        WsiError: No table, a missing column, or a row whose numbers are none.
    """
    table = folder / "labels.csv"
    if not table.is_file():
        raise damaged(table, "there is no such file")
    names, listed = read_sheet(table)
    found: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in listed:
        found[row.get("file") or ""].append(row)
    if missing := sorted(set(_COLUMNS) - set(names)):
        raise damaged(table, f"it has no column {', '.join(missing)}")
    try:
        rows = tuple(_image(folder / file, said) for file, said in found.items())
    except ValueError as error:
        raise damaged(table, f"a number is none: {error}") from error
    return DetectionSet((CLASS,), rows)


def circle(x: float, y: float, radius: float) -> np.ndarray:
    """(32, 2) points of a circle."""
    angle = np.arange(32) * (2 * np.pi / 32)
    return np.column_stack([x + radius * np.cos(angle), y + radius * np.sin(angle)])


def _image(image: Path, said: list[dict[str, str]]) -> Annotated:
    boxes: list[tuple[float, float, float, float]] = []
    rings: list[np.ndarray | None] = []
    ignored = []
    for row in (r for r in said if r["abnormality"] in MASSES):
        if not row["x"]:
            boxes.append((0.0, 0.0, _SIDE_PX, _SIDE_PX))
            rings.append(None)
            ignored.append(True)
            continue
        x, y, radius = float(row["x"]) + 0.5, float(row["y"]) + 0.5, float(row["radius"])
        boxes.append((x - radius, y - radius, x + radius, y + radius))
        check_box(image, boxes[-1])
        rings.append(circle(x, y, radius))
        ignored.append(False)
    objects = Objects.of(boxes, [0] * len(boxes), ignored=ignored, rings=rings)
    fold = int(said[0]["fold"]) if said[0].get("fold") else NO_FOLD
    facts = {"findings": [{k: r[k] for k in ("abnormality", "severity", "tissue") if k in r} for r in said]}
    return Annotated(image, objects, said[0]["patient"], fold, (MPP, MPP), facts)
