"""Annotated images of any known set or format, told from what lies in the folder."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from wsiengine.datasets.images import picture_size
from wsiengine.datasets.rows import DetectionSet
from wsiengine.datasets.sheets import read_sheet
from wsiengine.errors import WsiError

_DRAWN = ("voc", "coco", "qupath")  # in pixels, by hand or program; YOLO's numbers are parts of the picture
_LEAST_INSIDE = 0.5
_NAMED = 5
FORMATS = ("chula", "mias", "ddsm", "inbreast", "cbis", "voc", "coco", "yolo", "qupath")


def read_detections(path: Path, form: str = "auto") -> DetectionSet:
    """The annotated images at ``path``.

    Args:
        path: A folder, or a COCO or GeoJSON file.
        form: One of :data:`FORMATS`, or ``auto``: recognised by its files.

    Raises:
        WsiError: Nothing there, an unknown form, or a damaged file.
    """
    if not path.exists():
        raise WsiError(f"there is nothing at {path}", hint="give the folder or file of the annotations")
    if form == "auto":
        form = recognise(path)
    if form not in FORMATS:
        raise WsiError(f"no reader for {form!r}", hint=f"use {', '.join(FORMATS)}")
    found = _reader(form)(_only_json(path) if form == "coco" else path)
    if form in _DRAWN:
        check_inside(found, path)
    return found


def check_inside(found: DetectionSet, path: Path) -> None:
    """Refuse boxes most of which lie beside their picture: no model could find them, and none can learn them.

    A box may reach over the edge, as many programs let it. Pictures that only the engine reads are not looked at.

    Raises:
        WsiError: Naming up to five of the boxes.
    """
    outside = []
    for row in found.images:
        size = picture_size(row.image)
        if size is None or not len(row.objects):
            continue
        boxes = row.objects.boxes_xyxy
        inside = np.clip(boxes, 0, [*size, *size])
        share = _areas(inside) / np.maximum(_areas(boxes), 1e-9)
        for x0, y0, x1, y1 in boxes[share < _LEAST_INSIDE].tolist():
            outside.append(f"{row.image.name} ({size[0]} × {size[1]} px): x {x0:g} to {x1:g}, y {y0:g} to {y1:g}")
    if outside:
        count = f"{len(outside)} boxes lie" if len(outside) > 1 else "1 box lies"
        more = f"; and {len(outside) - _NAMED} more" if len(outside) > _NAMED else ""
        raise WsiError(
            f"{path}: {count} outside the picture: {'; '.join(outside[:_NAMED])}{more}",
            hint="are they of another picture, or of one that was scaled since? Correct or remove them",
        )


def _areas(boxes_xyxy: np.ndarray) -> np.ndarray:
    size = np.maximum(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2], 0)
    return np.asarray(size[:, 0] * size[:, 1])


def recognise(path: Path) -> str:
    """The form of what lies at ``path``.

    Raises:
        WsiError: None that is known.
    """
    if path.is_file():
        by_suffix = {".geojson": "qupath", ".json": "coco"}
        if found := by_suffix.get(path.suffix.lower()):
            return found
        raise WsiError(
            f"{path} is no annotation file that is known here", hint="give .json (COCO), .geojson or a folder"
        )
    for form, is_there in _SIGNS:
        if is_there(path):
            return form
    raise WsiError(
        f"{path} holds no annotations in a known form ({', '.join(FORMATS)})",
        hint="docs/datasets.md shows how each of them is laid out",
    )


def _some(path: Path, *patterns: str) -> bool:
    return any(next(path.glob(pattern), None) is not None for pattern in patterns)


def _is_mias(path: Path) -> bool:
    table = path / "labels.csv"
    if not table.is_file():
        return False
    return "abnormality" in read_sheet(table)[0]


def _is_chula(path: Path) -> bool:
    for file in sorted((path / "labels").glob("*.txt")):
        lines = [line.split() for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
        if any(lines):  # an empty file, an image without objects, tells nothing
            return all(len(line) == 3 for line in lines if line)
    return False


_SIGNS: tuple[tuple[str, Callable[[Path], bool]], ...] = (
    ("mias", _is_mias),
    ("ddsm", lambda p: _some(p, "*.ics", "*/*.ics", "*/*/*.ics")),
    ("cbis", lambda p: _some(p, "*case_description*.csv", "*/*case_description*.csv")),
    ("inbreast", lambda p: _some(p, "AllDICOMs", "*/AllDICOMs", "AllXML")),
    ("chula", _is_chula),
    ("yolo", lambda p: _some(p, "labels/*.txt", "labels/*/*.txt")),
    ("voc", lambda p: _some(p, "Annotations/*.xml", "*.xml")),
    ("qupath", lambda p: _some(p, "*.geojson")),
    ("coco", lambda p: _some(p, "*.json")),
)


def _reader(form: str) -> Callable[[Path], DetectionSet]:
    """Imported when needed: each reader brings its own libraries."""
    if form in ("voc", "coco", "yolo", "qupath"):
        from wsiengine.datasets import common

        return {
            "voc": common.read_voc,
            "coco": common.read_coco,
            "yolo": common.read_yolo,
            "qupath": common.read_qupath,
        }[form]
    if form in ("inbreast", "cbis"):
        from wsiengine.datasets import dicom

        return dicom.read_inbreast if form == "inbreast" else dicom.read_cbis
    from wsiengine.datasets import chula, ddsm, mias

    return {"chula": chula.read_chula, "ddsm": ddsm.read_ddsm, "mias": mias.read_mias}[form]


def _only_json(path: Path) -> Path:
    if path.is_file():
        return path
    files = sorted(path.glob("*.json"))
    if len(files) != 1:
        names = ", ".join(f.name for f in files[:5])
        raise WsiError(
            f"{path} holds {len(files)} .json files: {names}", hint="name the one that holds the annotations"
        )
    return files[0]
